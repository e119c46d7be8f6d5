// Makes the accepted drafts of sequences pending entries, those on the path to one of them, and drops the others.
//
//   GDR_SLOTS, GDR_ACCEPTED   bytes of an index, of a number in `accepted` (0: none is accepted)
#include "gdr/ptx.cuh"

using namespace gdr;

namespace {

constexpr int kThreads = 128, kMost = 16;

struct CommitParams {
    const char *slots, *accepted;  // [N]; 1 + the number of the last draft, or 0
    char *keys, *updates;
    float *gates, *key_scales;
    u32* fills;
    const signed char* draft_parents;
    i64 num_slots;
    u32 H, HV, entries, key_bytes, update_bytes;
};

template <int kBytes>
__device__ __forceinline__ i64 number(const char* from, i64 i) {
    if constexpr (kBytes == 8) return reinterpret_cast<const i64*>(from)[i];
    else return reinterpret_cast<const int*>(from)[i];
}

// Moves rows of `words` words from positions base + path[i] to base + i. A thread moves the same words of every row,
// in order, so that what is overwritten has been moved before.
__device__ __forceinline__ void move(u32* rows, u32 words, u32 base, const int* path, int count) {
    for (u32 word = threadIdx.x; word < words; word += kThreads)
        for (int i = 0; i < count; ++i)
            if (path[i] != i) rows[(base + i) * words + word] = rows[(base + path[i]) * words + word];
}

__device__ __forceinline__ void move_halves(u16* rows, u32 halves, u32 base, const int* path, int count) {
    for (u32 at = threadIdx.x; at < halves; at += kThreads)
        for (int i = 0; i < count; ++i)
            if (path[i] != i) rows[(base + i) * halves + at] = rows[(base + path[i]) * halves + at];
}

__device__ __forceinline__ void move_bytes(char* rows, u32 bytes, u32 base, const int* path, int count) {
    if (bytes % 4 == 0) move(reinterpret_cast<u32*>(rows), bytes / 4, base, path, count);
    else move_halves(reinterpret_cast<u16*>(rows), bytes / 2, base, path, count);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 8) ring_commit(const __grid_constant__ CommitParams p) {
    __shared__ int path[kMost];
    __shared__ int accepted, moved;
    __shared__ union {
        uint4 words;
        signed char each[kMost];
    } parents;
    const u32 n = blockIdx.x;
    const i64 slot = number<GDR_SLOTS>(p.slots, n);
    i64 wanted = 0;
    if constexpr (GDR_ACCEPTED != 0) wanted = number<GDR_ACCEPTED>(p.accepted, n);
    if (slot < 0 || slot >= p.num_slots) return;
    u32* const fill = p.fills + slot * 2;
    const u32 word = *fill;
    const u32 pending = min(word & 0xff, p.entries), half = word >> 24 & 1;
    const int drafts = static_cast<int>(min(min(word >> 16 & 0xff, p.entries - pending), u32{kMost}));
    if (threadIdx.x == 0) {
        parents.words = *reinterpret_cast<const uint4*>(p.draft_parents + slot * kMost);
        int count = 0, others = 0;
        if constexpr (GDR_ACCEPTED != 0) {
            const int last = static_cast<int>(max(min(wanted, i64{drafts}), 0ll)) - 1;
            for (int draft = last; draft >= 0; draft = parents.each[draft]) ++count;
            for (int draft = last, i = count - 1; i >= 0; draft = parents.each[draft], --i) path[i] = draft;
            others = count <= last;  // a path that leaves none out is a chain
        }
        accepted = count, moved = others;
    }
    __syncthreads();
    const int count = accepted;
    if (moved) {
        for (u32 h = 0; h < p.H; ++h)
            move_bytes(p.keys + (slot * p.H + h) * p.entries * p.key_bytes, p.key_bytes, pending, path, count);
        for (u32 hv = 0; hv < p.HV; ++hv)
            move_bytes(p.updates + (slot * p.HV + hv) * p.entries * p.update_bytes, p.update_bytes, pending, path,
                       count);
        for (u32 h = threadIdx.x; h < p.H + p.HV; h += kThreads) {
            float* const scalars = h < p.H ? p.key_scales + ((slot * 2 + half) * p.H + h) * p.entries
                                           : p.gates + ((slot * 2 + half) * p.HV + h - p.H) * p.entries;
            for (int i = 0; i < count; ++i) scalars[pending + i] = scalars[pending + path[i]];
        }
    }
    if (threadIdx.x == 0) *fill = (pending + count) | (word & 0xff00) | half << 24;
}
