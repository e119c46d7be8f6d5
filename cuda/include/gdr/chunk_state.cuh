// What the kernels that walk from chunk to chunk share: copies into shared memory, states, outputs, and the walk.
// The including file defines kColumns, kSplit and kStages (value columns of a block, splits of the keys, chunks in
// shared memory), and kSquare: whether T and P lie there as whole squares, with zeros above the diagonal.
#pragma once

#include "gdr/chunk.cuh"

namespace gdr {

constexpr int kWarps = kColumns / 16 * kSplit, kThreads = 32 * kWarps;
constexpr int kWarpKeys = kKeys / kSplit, kWarpKeyBlocks = kWarpKeys / 16;
constexpr int kValueBytes = bytes_of(kQkv);
static_assert(kColumns % 16 == 0 && kV % kColumns == 0 && kKeys % (16 * kSplit) == 0);
static_assert(kValueBytes == 2, "float32 goes through the recurrence");

// T and P, column after column of whole blocks.
constexpr int kColumnBytes = kRows * kBlockBytes;
struct alignas(128) SquareTile {
    char T[kRows * kColumnBytes], P[kRows * kColumnBytes];
    float d[kC], scaled_d[kC], e[kC];
};
template <bool kIsSquare>
struct HeadTileIn {
    using Type = HeadTile;
};
template <>
struct HeadTileIn<true> {
    using Type = SquareTile;
};

struct alignas(128) Stage {
    char K[kKeyTileBytes], Q[kKeyTileBytes];
    typename HeadTileIn<kSquare>::Type head;
    // Values: blocks of 16 tokens x 16 columns, by tokens first, with the matrices (tokens 0-7, columns 0-7),
    // (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    char V[kC * kColumns * kValueBytes];
};

struct Stages {
    Stage stages[kStages];
    Barrier full[kStages];
};

struct Work {
    Sequence seq;
    int hv, first_column;  // of the block
    int first, last;       // chunks of this launch
    // Where this thread's first piece of the first chunk's values comes from, and where the first token that it
    // stores goes; bytes from a token to the next.
    const char* values;
    char* outputs;
    i64 value_step, output_step;

    __device__ __forceinline__ int tokens(int chunk) const {  // of a chunk and all that follow
        return static_cast<int>(min(seq.length - static_cast<i64>(chunk) * kC, static_cast<i64>(kC)));
    }
};

// ---- Copies.

// The pieces of 16 bytes of a chunk's values that a thread copies are kPieceTokens tokens apart. 8 neighbouring threads
// fill one matrix.
constexpr int kPieceTokens = 16 * kSplit;
__device__ __forceinline__ int piece_token() { return threadIdx.x / kColumns * 8 + threadIdx.x % 8; }
__device__ __forceinline__ int piece_column8() { return threadIdx.x / 8 % (kColumns / 8); }

__device__ __forceinline__ void copy_values(const Work& work, Stage& stage, int chunk) {
    const int token = piece_token(), column8 = piece_column8(), tokens = work.tokens(chunk);
    const char* from = work.values + static_cast<i64>(chunk) * kC * work.value_step;
    char* to = stage.V + (token / 16 * (kColumns / 16) + column8 / 2) * kBlockBytes + column8 % 2 * 256 + token / 8 % 2 * 128 +
               token % 8 * 16;
#pragma unroll
    for (int i = 0; i < kC / kPieceTokens; ++i) {
        const bool exists = token + i * kPieceTokens < tokens;
        if constexpr (kAligned) {
            copy16(shared_address(to), exists ? from : work.values, exists);
        } else {
            u32 words[4];
            load_chunk<kQkv, 8, false>(from, 0, exists ? 8 : 0, words);
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        from += kPieceTokens * work.value_step;
        to += kPieceTokens / 16 * (kColumns / 16) * kBlockBytes;
    }
}

// Zeros above the diagonals: copies write the other blocks alone.
__device__ __forceinline__ void zero_squares(Stage& stage) {
    uint4* to = reinterpret_cast<uint4*>(stage.head.T);
    for (int i = threadIdx.x; i < 2 * kRows * kColumnBytes / 16; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Every thread calls it; the stage's barrier completes once all has landed.
__device__ __forceinline__ void copy_chunk(const Params& p, const Work& work, Stage& stage, Barrier& full, int chunk) {
    const i64 slot = work.seq.chunk + chunk - p.first_chunk;
    const char* keys = p.key_tiles + (slot * p.H + work.hv / p.group) * (2 * kKeyTileBytes);
    const char* head = p.head_tiles + (slot * (p.H * p.group) + work.hv) * sizeof(HeadTile);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            full.arrive_expect(2 * kKeyTileBytes + sizeof(HeadTile));
            full.copy_bulk(shared_address(stage.K), keys, 2 * kKeyTileBytes);
            if constexpr (!kSquare) full.copy_bulk(shared_address(&stage.head), head, sizeof(HeadTile));
            else full.copy_bulk(shared_address(stage.head.d), head + 2 * kLowerBlocks * kBlockBytes, 3 * kC * 4);
        }
        if (kSquare && warp < kRows) {  // column `warp` of T and P
            const int from = lower_block(warp, warp), to = warp * (kColumnBytes + kBlockBytes);
            const u32 bytes = (kRows - warp) * kBlockBytes;
            full.copy_bulk(shared_address(stage.head.T) + to, head + from, bytes);
            full.copy_bulk(shared_address(stage.head.P) + to, head + kLowerBlocks * kBlockBytes + from, bytes);
        }
    }
#else
    for (int i = threadIdx.x; i < 2 * kKeyTileBytes / 16; i += kThreads)
        copy16(shared_address(stage.K) + i * 16, keys + i * 16, true);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadTile)) / 16; i += kThreads)
        copy16(shared_address(&stage.head) + i * 16, head + i * 16, true);
#endif
    copy_values(work, stage, chunk);
    if constexpr (!kAligned) __threadfence_block();
    full.arrive_after_copies();
}

constexpr int kArrivals = kThreads +
#if __CUDA_ARCH__ >= 900
                          1;
#else
                          0;
#endif

// ---- States. S[j][i]: column 8 (i / 2) + lane / 4 of the warp's 16, key 8 j + 2 (lane % 4) + i % 2 of its keys.

using State = float[kWarpKeys / 8][4];

template <int kType, class Visit>
__device__ __forceinline__ void for_each(const StateStrides& strides, i64 slot, int hv, int column, int first_key, Visit&& visit) {
    const int lane = threadIdx.x % 32;
    const i64 base = slot * strides.slot + hv * strides.head;
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int v = column + lane / 4 + i / 2 * 8, key = first_key + j * 8 + lane % 4 * 2 + i % 2;
            if (kK == kKeys || key < kK) visit(j, i, base + (kVK ? v * strides.row + key : key * strides.row + v));
        }
    }
}

template <int kType>
__device__ __forceinline__ void read_state(State& S, const void* from, const StateStrides& strides, i64 slot, int hv, int column, int first_key) {
    for_each<kType>(strides, slot, hv, column, first_key, [&](int j, int i, i64 index) {
        S[j][i] = value_of(kType, load_bits(kType, from, index));
    });
}

template <int kType>
__device__ __forceinline__ void write_state(const State& S, void* to, const StateStrides& strides, i64 slot, int hv, int column, int first_key) {
    for_each<kType>(strides, slot, hv, column, first_key, [&](int j, int i, i64 index) { store<kType>(to, index, S[j][i]); });
}

// Where this thread's part of a state lies between launches.
__device__ __forceinline__ i64 carried_index(const Work& work, int j) {
    const i64 warp = (static_cast<i64>(work.hv) * (kV / kColumns) + work.first_column / kColumns) * kWarps + threadIdx.x / 32;
    return (warp * (kWarpKeys / 8) + j) * 32 + threadIdx.x % 32;
}

// ---- Values and outputs.

__device__ __forceinline__ float2 values_of(u32 pair) {
    float x[2];
    unpack<kQkv>(&pair, x);
    return make_float2(x[0], x[1]);
}

// Stores 16 columns x 16 tokens: two tokens of one column a register pair, transposed to two columns of one token.
// `to` is this thread's place in the first token, of which and the following ones `tokens` exist.
__device__ __forceinline__ void store_output(const Work& work, const Tile& o, char* to, int tokens) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool exists = half * 8 + lane / 4 < tokens;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 pair = transpose(Operand<kQkv == kBFloat16>::pack(o.x[half][2 * i], o.x[half][2 * i + 1]));
            char* at = to + i * 8 * kValueBytes;
            if constexpr (kAligned) {
                if (exists) *reinterpret_cast<u32*>(at) = pair;
            } else if (exists) {
                reinterpret_cast<u16*>(at)[0] = static_cast<u16>(pair), reinterpret_cast<u16*>(at)[1] = static_cast<u16>(pair >> 16);
            }
        }
        to += 8 * work.output_step;
    }
}

__device__ __forceinline__ void zero_output(const Params& p, const Work& work) {
    for (i64 t = 0; t < work.seq.length; ++t) {
        const i64 row = work.seq.batch * p.out_strides.batch + (work.seq.first + t) * p.out_strides.token + work.hv * p.out_strides.head;
        for (int i = threadIdx.x; i < kColumns; i += kThreads) store<kQkv>(p.out, row + work.first_column + i, 0.f);
    }
}

// The slot of sequence n in a state array, or -1 where it lies outside.
__device__ __forceinline__ i64 find_slot(const void* slots, bool wide, i64 rows, int n) {
    const i64 slot = slots == nullptr ? n : load_index(slots, n, wide);
    return slot < rows ? max(slot, -1ll) : -1;
}

// The kernel. One block after another: columns of a value head, value heads of a sequence, sequences.
// do_chunk(work, stage, S, chunk, refill) calls refill() once no warp needs the previous chunk's stage any more.
template <class DoChunk>
__device__ __forceinline__ void walk(const Params& p, Stages& sm, DoChunk&& do_chunk) {
    constexpr int kBlocks = kV / kColumns;
    const int heads = p.H * p.group, n = blockIdx.x / (heads * kBlocks), warp = threadIdx.x / 32;
    Work work;
    work.hv = blockIdx.x / kBlocks % heads, work.first_column = blockIdx.x % kBlocks * kColumns;
    work.seq = find_sequence(p, n);
    const Sequence& seq = work.seq;
    work.first = max(0, p.first_chunk - seq.chunk), work.last = min(seq.chunks, p.last_chunk - seq.chunk);
    const bool begins = p.first_chunk <= seq.chunk && seq.chunk < p.last_chunk;
    if (work.first >= work.last && !(begins && seq.chunks == 0)) return;

    const i64 from = kHasInitial || p.initial_slots != nullptr ? find_slot(p.initial_slots, p.initial_slots_wide, p.initial_rows, n) : n;
    const i64 to = kHasFinal ? find_slot(p.final_slots, p.final_slots_wide, p.final_rows, n) : n;
    if (from < 0 || to < 0) {
        if (begins) zero_output(p, work);
        return;
    }

    if constexpr (kSquare) {
        for (int i = 0; i < kStages; ++i) zero_squares(sm.stages[i]);
    }
    const int column = work.first_column + warp / kSplit * 16, first_key = warp % kSplit * kWarpKeys;
    work.value_step = p.v_strides.token * kValueBytes, work.output_step = p.out_strides.token * kValueBytes;
    work.values = token_row(p.v, p.v_strides, seq, piece_token() < seq.length ? piece_token() : 0, work.hv) +
                  (work.first_column + piece_column8() * 8) * kValueBytes;
    work.outputs = at(p.out, kQkv, seq.batch * p.out_strides.batch + (seq.first + threadIdx.x % 32 / 4) * p.out_strides.token +
                                       work.hv * p.out_strides.head + column + threadIdx.x % 4 * 2);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.full[i].init(kArrivals);
        Barrier::publish_inits();
    }
    __syncthreads();
    for (int i = 0; i < kStages - 1; ++i)
        if (work.first + i < work.last) copy_chunk(p, work, sm.stages[i], sm.full[i], work.first + i);

    State S;
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) S[j][i] = 0.f;
    }
    if (work.first > 0) {
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
            const float4 x = p.carried_in[carried_index(work, j)];
            S[j][0] = x.x, S[j][1] = x.y, S[j][2] = x.z, S[j][3] = x.w;
        }
    } else if constexpr (kHasInitial) {
        read_state<kInitial>(S, p.initial_state, p.initial_strides, from, work.hv, column, first_key);
    }

    int stage = 0, filled = kStages - 1;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        sm.full[stage].wait(parity);
        do_chunk(work, sm.stages[stage], S, chunk, [&] {
            const int next = chunk + kStages - 1;
            if (next < work.last) copy_chunk(p, work, sm.stages[filled], sm.full[filled], next);
        });
        filled = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }

    if (work.last < seq.chunks) {
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) 
            p.carried_out[carried_index(work, j)] = make_float4(S[j][0], S[j][1], S[j][2], S[j][3]);
    } else if constexpr (kHasFinal) {
        // Without tokens a state moves only where it is read and written in different places.
        const void* read = kHasInitial ? at(p.initial_state, kInitial < 0 ? kFloat32 : kInitial, from * p.initial_strides.slot) : nullptr;
        if (seq.chunks > 0 || read != at(p.final_state, kFinal, to * p.final_strides.slot))
            write_state<kFinal>(S, p.final_state, p.final_strides, to, work.hv, column, first_key);
    }
}

}  // namespace gdr
