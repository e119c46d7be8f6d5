// cuda/include/gdr/cluster.cuh for the host. A cluster address is never a block's own address, so that neither passes
// for the other.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

inline u32 block_of_cluster() { return cluster::block; }
inline void meet_cluster() { of_cluster.wait(live); }

inline u32 address_in_block(u32 address, u32 block) {
    at_shared<char>(address);
    if (block >= static_cast<u32>(cluster::count)) {
        fprintf(stderr, "block %u of a cluster of %d\n", block, cluster::count);
        abort();
    }
    return (block + 1) * cluster::kStep + address;
}

template <class T>
T* at_cluster(u32 address) {
    const u32 there = address / cluster::kStep - 1, offset = address % cluster::kStep;
    if (there >= static_cast<u32>(cluster::count) || offset % sizeof(T) || offset + sizeof(T) > shared_bytes) {
        fprintf(stderr, "a cluster's shared memory: %zu bytes at %u\n", sizeof(T), address);
        abort();
    }
    if (there != static_cast<u32>(cluster::block) && of_cluster.round == 0) {
        fprintf(stderr, "block %u of the cluster may not have started: the blocks have not met\n", there);
        abort();
    }
    if (cluster::blocks[there].live == 0) {
        fprintf(stderr, "block %u of the cluster has ended\n", there);
        abort();
    }
    return reinterpret_cast<T*>(cluster::memory + there * cluster::kStep + offset);
}

inline void arrive_in_cluster(u32 barrier) { at_cluster<Barrier>(barrier)->arrive(); }
inline void copy_in_cluster(u32 to, u32 from, u32 bytes, u32 barrier) {
    if ((to | from | bytes) % 16 || to / cluster::kStep != barrier / cluster::kStep) {
        fprintf(stderr, "no copy of %u bytes from %u to %u, with the barrier at %u\n", bytes, from, to, barrier);
        abort();
    }
    at_cluster<char>(to + bytes - 1);
    memcpy(at_cluster<char>(to), at_shared<char>(from), bytes);
    at_cluster<Barrier>(barrier)->land(bytes);
}

}  // namespace gdr
