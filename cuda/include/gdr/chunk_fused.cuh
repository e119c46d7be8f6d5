// What the warps of a block of chunk_fused_sm90.cu share. That file defines kColumns and kCluster.
#pragma once

#include "gdr/chunk_local.cuh"
#include "gdr/chunk_walk.cuh"
#include "gdr/cluster.cuh"

namespace gdr {

constexpr int kSlots = 2;          // chunks whose values, T and P are there
constexpr int kAuxiliary = kRows;  // warps that multiply keys and queries
constexpr int kMovers = 4;         // warps that make operands
static_assert(kFirstWarp == kAuxiliary + kMovers);
// What one of these does alone: a chunk's decays; columns of T, beside which one has K and Q brought, one values, and
// stores outputs.
constexpr int kDecaysRole = 0, kFirstColumnRole = 1, kKeysRole = 2, kValuesRole = 3, kSolvers = 3;

// Whether the blocks of a cluster have columns of the same value head. The first one then finds T for both, and the second
// one P and the decays.
constexpr bool kOneHead = kCluster == 2 && kBlocks % 2 == 0;
__device__ __forceinline__ bool finds_T(u32 rank) { return !kOneHead || rank == 0; }
__device__ __forceinline__ bool finds_P(u32 rank) { return !kOneHead || rank == 1; }
__device__ __forceinline__ bool finds_decays(u32 rank) { return !kOneHead || rank == 1; }

struct TileParams {
    TileMap k, q, v, out;
    Params params;
};

struct Decay {
    // Where a token's decays lie: with those of the tokens that the same lanes have of 16.
    static __device__ __forceinline__ int place(int t) { return t / 16 * 16 + t % 8 / 2 * 4 + t / 8 % 2 * 2 + t % 2; }

    Gates gates;
    float d[kC], scaled_d[kC], e[kC];
};

// T and P, where the walk expects them.
struct Whole {
    static constexpr __device__ int at(int i, int j) { return j * kColumnBytes + i * kBlockBytes; }
};

struct Shared {
    char keys[kStages][2 * kKeyTileBytes];                 // K, Q
    char values[kSlots][kColumns / 64 * kValueTileBytes];  // then outputs
    Decay decays[kStages];
    char squares[kSlots][2 * kSquareBytes];  // T, P
    Triangle triangles[kSlots];
    // K and Q as they are in memory, and as operands; values; the inverses of T's diagonal blocks; T and P.
    Barrier tokens_full[kStages], keys_full[kStages], values_full[kSlots], inverted[kSlots], squares_full[kSlots];
    Barrier done[kStages];  // the walk is: of K and Q, values, T and P, and outputs are there
    // In a cluster: both walks are done with K, Q and the decays; the other block has what this one copied there.
    Barrier keys_empty[kStages], keys_copied[kStages];
    Barrier squares_empty[kSlots];  // the other block's walk is done with T and P: more can be copied there
    Barrier tail_come;              // the values of a last chunk that is not whole, and what follows them
};

// The block's number in its cluster.
__device__ __forceinline__ u32 rank_of_block() { return kCluster == 2 ? block_of_cluster() : 0; }

__device__ __forceinline__ void init_barriers(Shared& sm) {
    const u32 rank = rank_of_block();
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
        sm.tokens_full[i].init(1), sm.keys_full[i].init(kMovers), sm.done[i].init(kWarps);
        if constexpr (kCluster == 2) sm.keys_empty[i].init(2), sm.keys_copied[i].init(1);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        sm.values_full[i].init(kAligned ? 1 : kMovers);
        sm.inverted[i].init(kAuxiliary), sm.squares_empty[i].init(1);
        sm.squares_full[i].init((finds_T(rank) ? kSolvers : 0) + (finds_P(rank) ? kAuxiliary : 0) + kOneHead);
    }
    sm.tail_come.init(1);
    Barrier::publish_inits();
}

// What leads from an address in shared memory to the same one of the cluster's other block.
__device__ __forceinline__ u32 to_other_block(const Shared& sm) {
    if constexpr (kCluster == 1) return 0;
    return address_in_block(shared_address(&sm), rank_of_block() ^ 1) - shared_address(&sm);
}

}  // namespace gdr
