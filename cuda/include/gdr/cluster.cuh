// Blocks that run together (a thread block cluster, sm_90): they copy to each other's shared memory and arrive at each
// other's barriers, at *cluster addresses*.
//
// A block's shared memory is there from its start to its end: the blocks meet before the first copy or arrival, and
// none ends before the last one to it has been waited for.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

__device__ __forceinline__ u32 block_of_cluster() {
    u32 block;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    return block;
}

// All threads of all blocks; each sees what any wrote to shared memory before.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The cluster address of what another block (or this one) has at a shared address of ours.
__device__ __forceinline__ u32 address_in_block(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

// An arrival at the barrier at a cluster address: it says that this thread has read, not what it wrote, for which all of
// its stores would have to be waited for.
__device__ __forceinline__ void arrive_in_cluster(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Starts a copy of whole 16 bytes from this block's shared memory to a cluster address; the barrier at another one in the
// same block hears of its bytes.
__device__ __forceinline__ void copy_in_cluster(u32 to, u32 from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "r"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

}  // namespace gdr
