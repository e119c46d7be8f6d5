// What chunk_prepare and a walk that runs beside it (GDR_BESIDE) agree on: flags behind the tiles of the workspace, and the
// order in which pieces of work are done. A piece is a chunk of a key head and a part of its value heads.
#pragma once

#include "gdr/chunk.cuh"

namespace gdr {

struct PieceFlags {
    u32 ready;  // raised when the tiles are there
    u32 read;   // marked when a walk has begun to read them
};

__device__ __forceinline__ int parts_of_heads(const Params& p) { return ceil_div(p.group, p.heads_per_block); }

// For each chunk, part and key head.
__device__ __forceinline__ PieceFlags* flags_of(const Params& p) {
    const i64 chunks = p.last_chunk - p.first_chunk;
    return reinterpret_cast<PieceFlags*>(p.head_tiles + chunks * (p.H * p.group) * static_cast<i64>(sizeof(HeadTile)));
}

// How many chunks of a sequence may be ready before they are read, that they are read from L2; and how often a group
// that has come so far looks whether they have been, until it takes it that no walk runs yet.
constexpr int kChunksAhead = 6, kPatience = 256;

struct Piece {
    int slot, part;
};

// The pieces of a launch, so that all sequences can be walked to their ends at the same time: the longest one's first
// chunks, then those of each of the others from when as many are left of it. All pieces of a chunk follow each other.
struct PieceOrder {
    static constexpr int kMost = 32;  // sequences
    // By length: where tokens begin, and the first of this launch's chunks, how many there are, the slot of the first of
    // them, and how many chunks come before the sequence's first.
    i64 batch[kMost], first[kMost], length[kMost];
    int chunk[kMost], chunks[kMost], slot[kMost], before[kMost];
    int of_chunk, all;

    __device__ __forceinline__ void fill(const Params& p) {  // by one warp
        const int lane = threadIdx.x % 32;
        Sequence seq = {};
        int begin = 0, mine = 0;
        if (lane < p.N) {
            seq = find_sequence(p, lane);
            begin = max(0, p.first_chunk - seq.chunk), mine = max(0, min(seq.chunks, p.last_chunk - seq.chunk) - begin);
        }
        int rank = 0, sum = 0, ahead = 0;  // chunks of those that come first
        for (int i = 0; i < kMost; ++i) {
            const int other = __shfl_sync(0xffffffffu, mine, i);
            if (other > mine || (other == mine && i < lane)) ++rank, ahead += other;
            sum += other;
        }
        batch[rank] = seq.batch, first[rank] = seq.first, length[rank] = seq.length;
        chunk[rank] = begin, chunks[rank] = mine, slot[rank] = seq.chunk + begin - p.first_chunk;
        before[rank] = ahead - rank * mine;
        of_chunk = p.H * parts_of_heads(p), all = sum * of_chunk;
    }
    // Which chunk comes at a place: of the i-th sequence that many after the first.
    __device__ __forceinline__ void find_chunk(const Params& p, int at, int& i, int& number) const {
        int last = 0;  // of the sequences that have begun
#pragma unroll
        for (int step = kMost / 2; step > 0; step /= 2)
            if (before[last + step] <= at) last += step;
        i = last, number = at - before[last];
        if (p.N > 1) {
            i = number % (last + 1);
            number = chunks[i] - chunks[last] + number / (last + 1);
        }
    }
    __device__ __forceinline__ int find_flag(const Params& p, int piece) const {
        int i, number;
        find_chunk(p, piece / of_chunk, i, number);
        return (slot[i] + number) * of_chunk + piece % of_chunk;
    }
    template <class Place>
    __device__ __forceinline__ Piece find(const Params& p, int piece, Place& place) const {
        u32 pieces = of_chunk, H = p.H;
        ptx::forget(pieces), ptx::forget(H);  // what quotients are found with is not kept for the next piece
        const int rest = piece % pieces;
        int i, number;
        find_chunk(p, piece / pieces, i, number);
        place.seq.batch = batch[i], place.seq.first = first[i];
        place.start = static_cast<i64>(chunk[i] + number) * kC, place.h = rest % H;
        place.tokens = static_cast<int>(min(length[i] - place.start, static_cast<i64>(kC)));
        return {slot[i] + number, static_cast<int>(rest / H)};
    }
};

}  // namespace gdr
