// What chunks need that the walk does not change (see gdr/chunk_local.cuh), for all chunks at once, into the workspace of
// gdr/chunk.cuh.
//
// A group of 4 warps takes one chunk of one key head and some of its value heads, which share K K^T and Q K^T. Value
// heads go two at a time: for each, two warps find T.
//
// A block is one such group. With GDR_BESIDE it is three, each of which does one piece of work after the other: such a
// block takes a processor for itself, and leaves the others to the walk.
// requires: sm_80
// launch: dependent
#include "gdr/chunk_beside.cuh"
#include "gdr/chunk_local.cuh"

using namespace gdr;

namespace {

constexpr int kWarps = kRows, kHeadsAtOnce = 2;
constexpr int kGroupThreads = 32 * kWarps, kGroups = kBeside ? 3 : 1;

__device__ __forceinline__ unsigned thread_of_group() { return kBeside ? threadIdx.x % kGroupThreads : threadIdx.x; }

__device__ __forceinline__ void sync_group() {
    if constexpr (kBeside) sync_threads(1 + threadIdx.x / kGroupThreads, kGroupThreads);
    else __syncthreads();
}

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
    if (thread_of_group() == 0) store_bulk(to, shared_address(from), bytes);
#else
    for (int i = thread_of_group() * 16; i < bytes; i += kGroupThreads * 16)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
#endif
}

// Finds the factors of all heads' decays, a thread a token.
__device__ __forceinline__ void fill_factors(Gates* gates, HeadTile* out, int heads, float scale) {
    const int t = threadIdx.x % kC, block = t / 16 * 16;
#pragma unroll 1
    for (int head = thread_of_group() / kC; head < heads; head += kGroupThreads / kC)
        fill_factors(gates[head], out[head], t, block, scale);
}

// Brings keys and queries; `meanwhile` runs while the first of them are on their way. Rows past the sequence's end are
// read from its last token, then cleared.
template <class Meanwhile>
__device__ __forceinline__ void fill_keys(const Params& p, Shared& sm, const Place& place, Meanwhile&& meanwhile) {
    constexpr int kAtOnce = !kAligned ? 1 : kKeys <= 128 ? 4 : 2;  // groups of 8 tokens in flight
    const int lane = threadIdx.x % 32, warp = thread_of_group() / 32, token = warp * 8 + lane % 8;
    const int offset = lane / 8 * kKeyStep + warp * kMatrixBytes + lane % 8 * 16;
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

// What is done with a chunk of a key head. `during_loads` runs while keys and queries are on their way, `after_loads` then.
template <class DuringLoads, class AfterLoads>
__device__ __forceinline__ void prepare_chunk(const Params& p, Shared& sm, const Place& place, int slot, int part,
                                              DuringLoads&& during_loads, AfterLoads&& after_loads) {
    const int h = place.h;
    const i64 number_of_keys = static_cast<i64>(slot) * p.H + h;
    const int first = part * p.heads_per_block, heads = min(p.heads_per_block, p.group - first);
    HeadTile* out = reinterpret_cast<HeadTile*>(p.head_tiles) + number_of_keys * p.group + first;
    const int warp = __shfl_sync(0xffffffffu, thread_of_group() / 32, 0);

    GateBits bits;
    if (warp < heads) bits.load(p, place, h * p.group + first + warp);
    fill_keys(p, sm, place, [&] {
        during_loads();
        if (warp < heads) bits.finish(p, place.tokens, sm.gates[warp]);
    });
    after_loads();
    publish_to_engines();
    sync_group();
    if (part == 0) copy_out(p.key_tiles + number_of_keys * (2 * kKeyTileBytes), sm.K, 2 * kKeyTileBytes);
    fill_factors(sm.gates, out, heads, p.scale);
    const u32 keys = shared_address(sm.K);
    Products products;
    if (warp == 0) multiply<0>(keys, products);
    else if (warp == 1) multiply<1>(keys, products);
    else if (warp == 2) multiply<2>(keys, products);
    else multiply<3>(keys, products);
#if __CUDA_ARCH__ >= 900
    if (thread_of_group() == 0) wait_bulk_stores_read();
#endif
#pragma unroll 1
    for (int head = 0; head < heads; head += kHeadsAtOnce) {
        sync_group();  // what the last heads' warps, or the products, read is free
#pragma unroll 1
        for (int i = 0; i < kHeadsAtOnce; ++i) {
            if (head + i >= heads) break;
            const Gates& gates = sm.gates[head + i];
            fill_lower<ByDistance>(gates, products[0], [&](int n) { return products[n]; }, sm.triangles[i], warp);
            fill_scores<Packed, ByDistance>(
                gates, products[kRows], [&](int n) { return products[kRows - n]; }, out[head + i].P, p.scale,
                kRows - 1 - warp);
        }
        sync_group();
        const int mine = head + warp % 2;
        Triangle& triangle = sm.triangles[warp % 2];
        const Gates& gates = sm.gates[mine];
        char* T = out[mine].T;
        if (mine < heads) {
            const int lane = threadIdx.x % 32;
            if (warp < 2) invert_column<Packed, 0>(triangle, gates, T, lane / 8, lane % 8);
            else invert_column<Packed, 8>(triangle, gates, T, lane / 8, 8 + lane % 8);
        }
        sync_group();
        if (mine < heads) {
            if (warp < 2) {
                solve_column<Packed, 1>(triangle, gates, T), solve_column<Packed, 2>(triangle, gates, T);
            } else {
                solve_column<Packed, 0>(triangle, gates, T);
            }
        }
    }
}

#if GDR_BESIDE
struct BesideShared {
    Shared groups[kGroups];
    PieceOrder order;
};

// Brings the tokens of a piece into L2.
__device__ __forceinline__ void prefetch(const Params& p, const PieceOrder& order, int number) {
    if (number >= order.all) return;
    Place place;
    const Piece piece = order.find(p, number, place);
    constexpr int kLines = ceil_div(kK * bytes_of(kQkv), 128);
    const int thread = thread_of_group();
    for (int i = thread; i < kC * kLines; i += kGroupThreads) {
        const int t = min(i / kLines, place.tokens - 1), key = i % kLines * (128 / bytes_of(kQkv));
        ptx::prefetch(at(p.k, kQkv, place.offset(p.k_strides, place.h) + t * p.k_strides.token + key));
        ptx::prefetch(at(p.q, kQkv, place.offset(p.q_strides, place.h) + t * p.q_strides.token + key));
    }
    const int t = min(thread % kC, place.tokens - 1), hv = place.h * p.group + piece.part * p.heads_per_block;
    if (thread < kC) ptx::prefetch(at(p.a, p.a_type, place.offset(p.a_strides, hv) + t * p.a_strides.token));
    else ptx::prefetch(at(p.b, p.b_type, place.offset(p.b_strides, hv) + t * p.b_strides.token));
}

__device__ __forceinline__ void prepare_beside(const Params& p, BesideShared& sm) {
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
    const PieceOrder& order = sm.order;
    if (threadIdx.x < 32) sm.order.fill(p);
    __syncthreads();
    PieceFlags* const flags = flags_of(p);
    const int first = group * gridDim.x + blockIdx.x, step = kGroups * gridDim.x;
    for (int number = first + thread_of_group() * step; number < order.all; number += kGroupThreads * step)
        flags[order.find_flag(p, number)] = {0, 0};
    __threadfence();
    __syncthreads();
    ptx::let_kernel_behind_start();
    const int ahead = step + kChunksAhead * p.N * order.of_chunk;
    int patience = kPatience;
    int done = -1;  // the flag of the last piece, which is raised while the next one's tokens are on their way
    const auto raise = [&] {
        if (thread_of_group() == 0 && done >= 0) {
            wait_bulk_stores();
            ptx::raise_flag(&flags[done].ready);
        }
    };
#pragma unroll 1
    for (int number = first; number < order.all; number += step) {
        if (number >= ahead) {
            if (thread_of_group() == 0 && patience > 0) {
                const u32* const read = &flags[order.find_flag(p, number - ahead)].read;
                if (!ptx::mark_is_set(read)) {
                    raise(), done = -1;
                    while (patience > 0 && !ptx::mark_is_set(read)) --patience;
                    if (patience > 0) patience = kPatience;
                }
            }
            sync_group();
        }
        Place place;
        const Piece piece = order.find(p, number, place);
        prepare_chunk(p, sm.groups[group], place, piece.slot, piece.part, raise,
                      [&] { prefetch(p, order, number + step); });
        done = order.find_flag(p, number);
        order_with_engines();
        sync_group();
    }
    raise();
}
#endif

}  // namespace

// Blocks (key heads, chunks, parts of the key head's value heads), or with GDR_BESIDE as many as there are processors for
// them.
extern "C" __global__ void __launch_bounds__(kGroups* kGroupThreads, kBeside ? 1 : 4)
    chunk_prepare(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    ptx::wait_for_kernels_ahead();
#if GDR_BESIDE
    prepare_beside(p, *reinterpret_cast<BesideShared*>(shared));
#else
    ptx::let_kernel_behind_start();
    const int slot = blockIdx.y, n = p.N == 1 ? 0 : find_owner(p, p.first_chunk + slot);
    if (n < 0) return;
    Place place;
    place.seq = find_sequence(p, n);
    const int chunk = p.first_chunk + slot - place.seq.chunk;
    if (chunk >= place.seq.chunks) return;
    place.start = static_cast<i64>(chunk) * kC, place.h = blockIdx.x;
    place.tokens = static_cast<int>(min(place.seq.length - place.start, static_cast<i64>(kC)));
    prepare_chunk(p, *reinterpret_cast<Shared*>(shared), place, slot, blockIdx.z, [] {}, [] {});
#endif
}
