// The chunkwise rule in one kernel: the walk of gdr/chunk_walk.cuh beside warps that find what each chunk needs of
// itself. Nothing but tokens, outputs and states passes through memory. It does the chunk's own work anew for each value
// head and block of columns, so it is for calls whose sequences and heads nearly fill the GPU.
//
// A block has some columns of one value head of one sequence; of packed ones, see find_longest. Of its warpgroups
//     one for each 64 columns walks from chunk to chunk with the state in registers;
//     one, a chunk ahead of them, multiplies keys and queries and finds P and the inverses of T's diagonal blocks;
//     one, two chunks ahead, makes operands of K and Q, finds the decays and the rest of T, and has the copy engine bring
//     tokens and store outputs, which lie where their chunk's values were (gdr/chunk_operands.cuh).
// All of these take nearly as long, and what they move through shared memory is close to what it can. So two blocks that
// have the same key head, a cluster, each make operands of half of its tokens, for both; and if they have the same value
// head, one finds T and the other P and the decays.
//
//   GDR_COLUMNS    value columns of a block, 64 or 128
//   GDR_CLUSTER    blocks of a cluster, 1 or 2
// requires: sm_90
// options: -arch=sm_90a
// launch: dependent
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kCluster = GDR_CLUSTER, kSplit = 1, kStages = 4, kFirstWarp = 8;
constexpr bool kCompose = false, kLean = true;
}  // namespace gdr

#define GDR_TOKENS_TOGETHER 1
#include "gdr/chunk_operands.cuh"

using namespace gdr;

namespace {

// A place in a ring of kCount, and how many rounds were done before.
template <int kCount>
struct Turn {
    int at = 0;
    u32 parity = 0;

    __device__ __forceinline__ void next() {
        if (++at == kCount) at = 0, parity ^= 1;
    }
};

struct Stage {
    const char *keys, *V;
    const float *d, *scaled_d, *e;
};

struct Feed {
    Shared& sm;
    Turn<kStages> now = {};
    Turn<kSlots> slot = {};

    __device__ __forceinline__ void wait() const { sm.keys_full[now.at].wait(now.parity); }
    __device__ __forceinline__ void wait_for_values() const { sm.values_full[slot.at].wait(slot.parity); }
    __device__ __forceinline__ void wait_for_squares() const { sm.squares_full[slot.at].wait(slot.parity); }
    __device__ __forceinline__ Stage stage() const {
        const Decay& decay = sm.decays[now.at];
        return {sm.keys[now.at], sm.values[slot.at], decay.d, decay.scaled_d, decay.e};
    }
    __device__ __forceinline__ u32 squares() const { return shared_address(sm.squares[slot.at]); }
    __device__ __forceinline__ void next() { now.next(), slot.next(); }
    // Outputs go where the warp's values were.
    __device__ __forceinline__ void give_back(const PackedOutputs& o) {
        const int lane = threadIdx.x % 32, column = (threadIdx.x / 32 - kFirstWarp) * 16;
        const u32 to =
            shared_address(sm.values[slot.at]) + value_offset(lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < kRows; ++i) store_matrices_transposed(to + value_offset(i * 16, 0), o[i]);
        publish_to_engines();
        __syncwarp();
        if (lane == 0) sm.done[now.at].arrive();
    }
};

// ---- The warps that multiply keys and queries.

// Starts products of rows of K or Q with those of K: the warp's 16 with all 64.
__device__ __forceinline__ void start_products(Tile (&x)[kRows], u32 rows, u32 keys) {
    const Right left(rows, kKeyStep, kTokenStep), right(keys, kKeyStep, kTokenStep);
    pin(x);
    begin_products();
#pragma unroll
    for (int i = 0; i < kKeyBlocks; ++i) multiply<Op>(x, left.at(key_block(0, i)), right.at(key_block(0, i)), i > 0);
    end_products();
}

__device__ __forceinline__ Tile select(const Tile (&x)[kRows], int n) {
    Tile y = x[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i)
        if (i == n) y = x[i];
    return y;
}

// Each warp has a row of blocks.
__device__ __forceinline__ void find_squares(const Params& p, const Work& work, Shared& sm, int warp) {
    const u32 rank = rank_of_block(), other = to_other_block(sm);
    Turn<kStages> now, past;
    Turn<kSlots> slot;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const Gates& gates = sm.decays[now.at].gates;
        const u32 keys = shared_address(sm.keys[now.at]);
        Triangle& triangle = sm.triangles[slot.at];
        char *const T = sm.squares[slot.at], *const P = T + kSquareBytes;
        // What follows from these is found anew, not kept from chunk to chunk.
        u32 row = warp;
        ptx::forget(row);
        sm.keys_full[now.at].wait(now.parity);
        if (kCluster == 2 && threadIdx.x == 0) arrive_in_cluster(sm.keys_copied[now.at].address() + other);
        // The walks are done with the chunk before the last one: what T was found from is free, and so are T and P, and
        // copies of them have been made.
        const auto wait_for_room = [&] {
            if (chunk < kSlots) return;
            sm.done[past.at].wait(past.parity), past.next();
            if constexpr (kOneHead) sm.squares_empty[slot.at].wait(slot.parity ^ 1);
        };
        Tile x[kRows];
        if (finds_T(rank)) {
            start_products(x, keys, keys);
            wait_products<0>();
            pin(x);
            wait_for_room();
            const u32 corner = fill_lower<ByColumn>(gates, select(x, row), [&](int j) { return x[j]; }, triangle, row);
            __syncwarp();
            // Before the second products, not beside them: with the walk's in the queue a warp waits at each of them.
            invert_block<Whole>(triangle, gates, T, corner, row);
            if constexpr (kOneHead) publish_to_engines();
            __syncwarp();
            if (threadIdx.x % 32 == 0) sm.inverted[slot.at].arrive();
        }
        if (finds_P(rank)) {
            start_products(x, keys + kKeyTileBytes, keys);
            wait_products<0>();
            pin(x);
            if constexpr (kOneHead) wait_for_room();
            fill_scores<Whole, ByColumn>(gates, select(x, row), [&](int j) { return x[j]; }, P, p.scale, row);
            publish_to_engines();
            __syncwarp();
            if (threadIdx.x % 32 == 0) sm.squares_full[slot.at].arrive();
            if constexpr (kOneHead) {
                meet<1, 32 * kAuxiliary>();
                if (threadIdx.x == 0)
                    copy_in_cluster(shared_address(P) + other, shared_address(P), kSquareBytes,
                                    sm.squares_full[slot.at].address() + other);
            }
        }
        now.next(), slot.next();
    }
}

}  // namespace

constexpr bool kTwo = kColumns == 128;
constexpr int kBlockThreads = kThreads + 32 * (kAuxiliary + kMovers);

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    chunk_fused_sm90(const __grid_constant__ TileParams tiles) {
    const Params& p = tiles.params;
    extern __shared__ __align__(1024) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == kAuxiliary && lane == 0) {
        init_barriers(sm);
        publish_to_engines();
    }
    ptx::wait_for_kernels_ahead();
    Work work;
    find_block(p, work);
    if (!find_work(p, work, find_longest(p, work.row))) return;
    if (warp == kAuxiliary) Mover(tiles, work, sm, 0).start();
    if (kHasInitial && warp == kAuxiliary + 1 && lane == 0) initial_place(p, work).prefetch(work.first_column);
    // Meanwhile: T and P are zero above the diagonal, and so are inverses of its blocks.
    for (int i = threadIdx.x; i < (sizeof(sm.squares) + sizeof(sm.triangles)) / 16; i += kBlockThreads)
        reinterpret_cast<uint4*>(sm.squares)[i] = make_uint4(0, 0, 0, 0);
    publish_to_engines();
    if constexpr (kCluster == 2) meet_cluster();
    else __syncthreads();
    // Where warps want the same, the first ones get it: of these the others wait for all they do.
    if (warp < kAuxiliary) {
        keep_registers<kTwo ? 72 : 136>();
        find_squares(p, work, sm, warp);
    } else if (warp < kFirstWarp) {
        keep_registers<kTwo ? 56 : 136>();
        Mover(tiles, work, sm, warp - kAuxiliary).run();
    } else {
        take_registers<kTwo ? 192 : 232>();
        const int column = work.first_column + (warp - kFirstWarp) * 16;
        State S;
        load_state(p, work, S, column, 0);
        // Else part of what was loaded in two ways stays in local memory throughout the walk.
        if constexpr (kFew || Neighbours::kExist) pin(S);
        Feed feed{sm};
        compute(work, feed, S);
        save_state(p, work, S, column, 0);
    }
    // While a block copies to the other one or arrives there, that one must not end.
    if constexpr (kCluster == 2) meet_cluster();
}
