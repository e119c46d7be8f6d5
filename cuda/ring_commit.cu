// Makes the accepted drafts of sequences pending entries, those on the path to one of them, and drops the others.
//
// launch: dependent
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

// Numbers are loaded where the code says.
template <int kBytes>
__device__ __forceinline__ i64 number(const char* from, i64 i) {
    u32 words[2];
    if constexpr (kBytes == 4) return static_cast<int>(ptx::load4(from + i * 4));
    ptx::load8(from + i * 8, words);
    return static_cast<i64>(static_cast<unsigned long long>(words[1]) << 32 | words[0]);
}

// The lower half of an index of 8 bytes is the whole of what is in bounds.
template <int kBytes>
__device__ __forceinline__ i64 peek(const char* from, i64 i) {
    return static_cast<int>(ptx::peek4(from + i * kBytes));
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

// Whether drafts 0 .. count - 1 of a slot follow one another.
__device__ __forceinline__ bool is_chain(const uint4& parents, int count) {
    const u32 each[4] = {parents.x ^ 0x020100ffu, parents.y ^ 0x06050403u, parents.z ^ 0x0a090807u,
                         parents.w ^ 0x0e0d0c0bu};
    u32 others = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int bytes = count - 4 * i;
        if (bytes > 0) others |= bytes < 4 ? each[i] << (32 - 8 * bytes) : each[i];
    }
    return others == 0;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 8) ring_commit(const __grid_constant__ CommitParams p) {
    __shared__ int path[kMost], on_path;
    __shared__ union {
        uint4 words;
        signed char each[kMost];
    } shared;
    const u32 n = blockIdx.x;
    ptx::let_kernel_behind_start();
    // What a slot has is loaded together with the slot, from where that most likely is: as far as one can see while kernels
    // ahead may still run.
    i64 slot = ptx::kStartsEarly ? peek<GDR_SLOTS>(p.slots, n) : -1;
    ptx::wait_for_kernels_ahead();
    u32 word = 0, parents_words[4];
    const auto exists = [&](i64 slot) { return slot >= 0 && slot < p.num_slots; };
    const auto load = [&] {
        word = ptx::load4(p.fills + slot * 2);
        ptx::load16(p.draft_parents + slot * kMost, parents_words);
    };
    if (exists(slot)) load();
    i64 wanted = 0;
    if constexpr (GDR_ACCEPTED != 0) wanted = number<GDR_ACCEPTED>(p.accepted, n);
    const i64 actual = number<GDR_SLOTS>(p.slots, n);
    if (!exists(actual)) return;
    if (slot != actual) {
        slot = actual;
        load();
    }
    const uint4 parents = make_uint4(parents_words[0], parents_words[1], parents_words[2], parents_words[3]);
    u32* const fill = p.fills + slot * 2;
    const u32 pending = min(word & 0xff, p.entries), half = word >> 24 & 1;
    const int drafts = static_cast<int>(min(min(word >> 16 & 0xff, p.entries - pending), u32{kMost}));
    int count = static_cast<int>(max(min(wanted, i64{drafts}), 0ll));
    // A chain stays where it is. (Once it counts, other threads find no drafts: for them, too, there is nothing to move.)
    if (!is_chain(parents, count)) {
        if (threadIdx.x == 0) {
            shared.words = parents;
            const int last = count - 1;
            count = 0;
            for (int draft = last; draft >= 0; draft = shared.each[draft]) ++count;
            for (int draft = last, i = count - 1; i >= 0; draft = shared.each[draft], --i) path[i] = draft;
            on_path = count;
        }
        __syncthreads();
        count = on_path;
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
