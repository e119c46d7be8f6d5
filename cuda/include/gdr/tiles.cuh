// Tiles of arrays in global memory that the copy engine of sm_90 brings and stores as one: it finds them itself, by a map
// of the array that the host has made (see gdr/_cuda_tiles.py). What lies outside the array is zeros, and is not stored.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

struct alignas(64) TileMap {
    unsigned long long words[16];
};

// Where a tile begins: column, token, head, batch.
struct TilePlace {
    int column, token, head, batch;
};

// Brings a tile to shared memory; the barrier hears of its bytes.
__device__ __forceinline__ void copy_tile(u32 to, const TileMap& map, const TilePlace& at, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(at.column), "r"(at.token), "r"(at.head), "r"(at.batch), "r"(barrier.address())
        : "memory");
}

// Stores a tile from shared memory; see end_tile_stores.
__device__ __forceinline__ void store_tile(const TileMap& map, const TilePlace& at, u32 from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(at.column), "r"(at.token), "r"(at.head), "r"(at.batch), "r"(from)
                 : "memory");
}

// Ends a group of this thread's stores, for which wait_bulk_stores_read waits.
__device__ __forceinline__ void end_tile_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Pieces of 16 bytes of tiles with rows of 128 lie in different banks for 8 rows: the piece that is there is this one.
constexpr __host__ __device__ int turned_piece(int row, int piece) { return piece ^ row % 8; }

}  // namespace gdr
