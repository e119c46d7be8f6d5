// As much of CUDA C++ as the kernels use, for one block at a time (or one cluster of them) on one thread of the host:
// each of its threads is a fiber that runs until it waits for others.
#pragma once
#undef _FORTIFY_SOURCE  // it takes a jump from one fiber to another for a mistake

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __constant__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // GDR_CLUSTER says it
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// What is static belongs to all blocks: that will do where they run one after another.
#define TEXT_OF_VALUE(x) #x
#define TEXT_OF(x) TEXT_OF_VALUE(x)
constexpr bool runs_alone(const char* cluster) { return cluster[0] == 'G' || cluster[0] == '1'; }
#define __shared__                                                                                     \
    static_assert(runs_alone(TEXT_OF(GDR_CLUSTER)), "blocks of a cluster have dynamic shared memory"); \
    static

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline long long min(long long x, int y) { return x < y ? x : y; }
inline long long max(long long x, int y) { return x > y ? x : y; }

template <class To, class From>
To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- Threads.

constexpr int kMostThreads = 1024, kSharedBytes = 227 << 10;  // threads of all blocks at a time

struct Fiber {
    jmp_buf place;
    std::vector<char> stack;
    bool done, waited;  // for the kernels ahead
};
inline Fiber fibers[kMostThreads];
inline jmp_buf scheduler;
inline int current, live;
inline bool lies;  // what peek4 sees is wrong now and then

struct Index {
    unsigned x, y, z;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;
inline char* shared;      // the dynamic shared memory of the block whose thread runs
inline int shared_bytes;  // of it, what the launch asked for

// Goes on at another place; not by swapcontext, which asks the kernel for the mask of signals each time.
inline void go_on(jmp_buf& here, jmp_buf& there) {
    if (!_setjmp(here)) _longjmp(there, 1);
}
inline void let_others() { go_on(fibers[current].place, scheduler); }

struct Meeting {
    int arrived = 0;
    unsigned round = 0;

    void wait(const int& count) {  // may fall while one waits: threads end
        const unsigned mine = round;
        ++arrived;
        while (round == mine) {
            if (arrived >= count) arrived = 0, ++round;
            else let_others();
        }
    }
};
inline Meeting of_cluster, of_warps[kMostThreads / 32];

// The blocks that run at the same time.
namespace cluster {
constexpr int kMost = 8;
constexpr unsigned kStep = 1 << 18;  // bytes from the shared memory of one to the next
alignas(1024) inline char memory[kMost * kStep];
struct Block {
    int live;
    Meeting of_all, of_some[16];
};
inline Block blocks[kMost];
inline int block, count;  // the one whose thread runs, of how many
}  // namespace cluster

inline void __syncthreads() { cluster::blocks[cluster::block].of_all.wait(cluster::blocks[cluster::block].live); }
inline void __syncwarp(unsigned = ~0u) {
    static const int count = 32;
    of_warps[current / 32].wait(count);
}
inline void __threadfence_block() {}
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* x, unsigned more) { return (*x += more) - more; }

// What the lanes of a warp show each other.
template <class T>
const T* show(const T& x) {
    static T all[2][kMostThreads];
    T* now = all[of_warps[current / 32].round % 2];  // the other lanes may still read what was shown before
    now[current] = x;
    __syncwarp();
    return now + current / 32 * 32;
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return show(x)[lane % 32];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return show(x)[current % 32 ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
    return show(x)[max(current % 32 - distance, distance > current % 32 ? current % 32 : 0)];
}
template <class T>
T __shfl_down_sync(unsigned, T x, int distance) {
    return show(x)[current % 32 + (current % 32 + distance < 32 ? distance : 0)];
}
inline unsigned __ballot_sync(unsigned, bool x) {
    const bool* all = show(x);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i]) << i;
    return votes;
}
inline int __reduce_max_sync(unsigned, int x) {
    const int* all = show(x);
    return *std::max_element(all, all + 32);
}
