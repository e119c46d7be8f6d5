// What chunks need that the walk does not change (see gdr/chunk_local.cuh), for all chunks at once, into the workspace of
// gdr/chunk.cuh.
//
// A block of 4 warps takes one chunk of one key head and some of its value heads, which share K K^T and Q K^T. Value
// heads go two at a time: for each, two warps find T.
// requires: sm_80
// launch: dependent
#include "gdr/chunk_local.cuh"

using namespace gdr;

namespace {

constexpr int kWarps = kRows, kHeadsAtOnce = 2;

struct Packed {
    static constexpr __device__ int at(int i, int j) { return lower_block(i, j); }
};

struct Shared {
    union {
        struct {
            char K[kKeyTileBytes], Q[kKeyTileBytes];
        };
        Triangle triangles[kHeadsAtOnce];  // once the products are done
    };
    Gates gates[kWarps];
};

// Copies a tile to the workspace once all threads have published what they stored of it.
__device__ __forceinline__ void copy_out(char* to, const char* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) store_bulk(to, shared_address(from), bytes);
#else
    for (int i = threadIdx.x * 16; i < bytes; i += 32 * kWarps * 16)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
#endif
}

// Finds the factors of all heads' decays, a thread a token.
__device__ __forceinline__ void fill_factors(Gates* gates, HeadTile* out, int heads, float scale) {
    const int t = threadIdx.x % kC, block = t / 16 * 16;
#pragma unroll 1
    for (int head = threadIdx.x / kC; head < heads; head += 32 * kWarps / kC)
        fill_factors(gates[head], out[head], t, block, scale);
}

// Brings keys and queries; `meanwhile` runs while the first of them are on their way. Rows past the sequence's end are
// read from its last token, then cleared.
template <class Meanwhile>
__device__ __forceinline__ void fill_keys(const Params& p, Shared& sm, const Place& place, Meanwhile&& meanwhile) {
    constexpr int kAtOnce = !kAligned ? 1 : kKeys <= 128 ? 4 : 2;  // groups of 8 tokens in flight
    const int lane = threadIdx.x % 32, token = threadIdx.x / 32 * 8 + lane % 8;
    const int offset = lane / 8 * kKeyStep + threadIdx.x / 32 * kMatrixBytes + lane % 8 * 16;
    const char* const rows_of[2] = {at(p.k, kQkv, place.offset(p.k_strides, place.h) + lane / 8 * 8),
                                    at(p.q, kQkv, place.offset(p.q_strides, place.h) + lane / 8 * 8)};
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
        Rows rows[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int which = (first + i) / 2;
            const int t = min(token + (first + i) % 2 * 32, place.tokens - 1);
            rows[i].load(at(rows_of[which], kQkv, t * (which == 0 ? p.k_strides : p.q_strides).token));
        }
        if (first == 0) meanwhile();
        if (place.tokens < kC) {
            __syncwarp();  // keeps this apart from what whole chunks do
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (token + (first + i) % 2 * 32 >= place.tokens) rows[i].clear();
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            char* to = sm.K + offset + (first + i) / 2 * kKeyTileBytes + (first + i) % 2 * 4 * kMatrixBytes;
            rows[i].convert(rows[i].norm_factor());
            rows[i].store([&](int j) { return to + j * 4 * kKeyStep; });
        }
    }
}

}  // namespace

// Blocks (key heads, chunks, parts of the key head's value heads).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 4) chunk_prepare(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    ptx::wait_for_kernels_ahead();
    ptx::let_kernel_behind_start();
    const int h = blockIdx.x, slot = blockIdx.y, part = blockIdx.z;
    const int n = p.N == 1 ? 0 : find_owner(p, p.first_chunk + slot);
    if (n < 0) return;
    Place place;
    place.seq = find_sequence(p, n);
    const int chunk = p.first_chunk + slot - place.seq.chunk;
    if (chunk >= place.seq.chunks) return;
    place.start = static_cast<i64>(chunk) * kC, place.h = h;
    place.tokens = static_cast<int>(min(place.seq.length - place.start, static_cast<i64>(kC)));

    const i64 number_of_keys = static_cast<i64>(slot) * p.H + h;
    const int first = part * p.heads_per_block, heads = min(p.heads_per_block, p.group - first);
    HeadTile* out = reinterpret_cast<HeadTile*>(p.head_tiles) + number_of_keys * p.group + first;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

    GateBits bits;
    if (warp < heads) bits.load(p, place, h * p.group + first + warp);
    fill_keys(p, sm, place, [&] {
        if (warp < heads) bits.finish(p, place.tokens, sm.gates[warp]);
    });
    publish_to_engines();
    __syncthreads();
    if (part == 0) copy_out(p.key_tiles + number_of_keys * (2 * kKeyTileBytes), sm.K, 2 * kKeyTileBytes);
    fill_factors(sm.gates, out, heads, p.scale);
    const u32 keys = shared_address(sm.K);
    Products products;
    if (warp == 0) multiply<0>(keys, products);
    else if (warp == 1) multiply<1>(keys, products);
    else if (warp == 2) multiply<2>(keys, products);
    else multiply<3>(keys, products);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) wait_bulk_stores_read();
#endif
#pragma unroll 1
    for (int head = 0; head < heads; head += kHeadsAtOnce) {
        __syncthreads();  // what the last heads' warps, or the products, read is free
#pragma unroll 1
        for (int i = 0; i < kHeadsAtOnce; ++i) {
            if (head + i >= heads) break;
            const Gates& gates = sm.gates[head + i];
            fill_lower<ByDistance>(gates, products[0], [&](int n) { return products[n]; }, sm.triangles[i], warp);
            fill_scores<Packed, ByDistance>(
                gates, products[kRows], [&](int n) { return products[kRows - n]; }, out[head + i].P, p.scale,
                kRows - 1 - warp);
        }
        __syncthreads();
        const int mine = head + warp % 2;
        Triangle& triangle = sm.triangles[warp % 2];
        const Gates& gates = sm.gates[mine];
        char* T = out[mine].T;
        if (mine < heads) {
            const int lane = threadIdx.x % 32;
            if (warp < 2) invert_column<Packed, 0>(triangle, gates, T, lane / 8, lane % 8);
            else invert_column<Packed, 8>(triangle, gates, T, lane / 8, 8 + lane % 8);
        }
        __syncthreads();
        if (mine < heads) {
            if (warp < 2) {
                solve_column<Packed, 1>(triangle, gates, T), solve_column<Packed, 2>(triangle, gates, T);
            } else {
                solve_column<Packed, 0>(triangle, gates, T);
            }
        }
    }
}
