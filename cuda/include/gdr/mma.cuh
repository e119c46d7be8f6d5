// Tensor-core products of 16-bit operands (mma.sync), and the ways tiles get into shared memory.
//
// A *block* is 16 x 16 elements of 16 bits in 512 bytes: four 8 x 8 matrices one after another, each with its rows of
// 16 bytes in order. ldmatrix reads a block, transposed or not, without bank conflicts, at an address that is the
// lane's own offset plus a constant.
#pragma once

#include "gdr/types.cuh"

namespace gdr {

constexpr int kBlockBytes = 512;

// What the products' operands are rounded to: float16, or bfloat16 for values beyond float16's range.
template <bool kWide>
struct Operand {
    static constexpr int kType = kWide ? kBFloat16 : kFloat16;

    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 x;
        if constexpr (kWide) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
        else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
        return x;
    }
    // c += a b, with a 16 x 16 by rows, b 16 x 8 by columns, c 16 x 8: lane 4 g + t has rows g and g + 8, columns
    // 2 t and 2 t + 1 of c.
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        if constexpr (kWide)
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        else
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// The same with 8 of K and float32 operands, of which 11 bits count: lane 4 g + t has rows g and g + 8 of a, and column g
// of b, for t and t + 4 of K.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A 16 x 16 float32 accumulator: two tiles of 8 columns.
struct Tile {
    float x[2][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = 0.f;
    }
    // The accumulator as the left operand of the next product: the lanes hold the same elements.
    template <class Op>
    __device__ __forceinline__ void pack(u32 (&a)[4]) const {
        a[0] = Op::pack(x[0][0], x[0][1]), a[1] = Op::pack(x[0][2], x[0][3]);
        a[2] = Op::pack(x[1][0], x[1][1]), a[3] = Op::pack(x[1][2], x[1][3]);
    }
    template <class Op>
    __device__ __forceinline__ void add_product(const u32 (&a)[4], const u32 (&b)[4]) {
        Op::mma(x[0], a, b[0], b[1]);
        Op::mma(x[1], a, b[2], b[3]);
    }
};

__device__ __forceinline__ u32 shared_address(const void* x) { return static_cast<u32>(__cvta_generic_to_shared(x)); }

// Four 8 x 8 matrices from a block; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 address, u32 (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(u32 address, u32 (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// An 8 x 8 matrix of 16-bit elements spread over a warp as an accumulator's columns are, transposed.
__device__ __forceinline__ u32 transpose(u32 x) {
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
    return x;
}

#if __CUDA_ARCH__ >= 900
// Four 8 x 8 matrices, spread over a warp as an accumulator's columns are, by columns; lane i gives the address of row
// i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices_transposed(u32 address, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

// Loads from shared memory, issued where the code says.
__device__ __forceinline__ float load_shared(u32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
    return x;
}
__device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}
__device__ __forceinline__ void load_shared16(u32 address, u32 (&x)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
__device__ __forceinline__ void store_shared16(u32 address, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
#endif

// A lane's offset in a block whose four matrices are read in order.
__device__ __forceinline__ u32 in_order(int lane) { return lane * 16; }

// 2 ** x to 2 ulp.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Waits for so many threads of the block, which name the same barrier of 1 to 15.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Copies into shared memory that nothing waits for, and the barrier that tells of their end.

// 16 bytes, or 16 zero bytes where `exists` is false.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
#if __CUDA_ARCH__ >= 900
// Those are the first to leave L2.
__device__ __forceinline__ void copy16_once(u32 to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(exists ? 16 : 0), "l"(ptx::first_to_leave())
                 : "memory");
}
#endif

// Waits for this thread's copies.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes this thread's stores to shared memory visible to wgmma and the copy engine.
__device__ __forceinline__ void publish_to_engines() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// Starts a copy from shared memory to global memory, of whole 16 bytes, and waits until such copies of this thread no
// longer read.
__device__ __forceinline__ void store_bulk(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
                 "r"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void wait_bulk_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// The same until they have arrived.
__device__ __forceinline__ void wait_bulk_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders accesses to global memory, this thread's and those it knows of, with the copy engine's.
__device__ __forceinline__ void order_with_engines() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
#endif

struct Barrier {
    unsigned long long state;

    __device__ __forceinline__ u32 address() const { return shared_address(this); }
    __device__ __forceinline__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
    }
    // After init, so that the copy engine sees it.
    static __device__ __forceinline__ void publish_inits() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(address()) : "memory");
    }
    // This thread's arrival once its copies so far have landed.
    __device__ __forceinline__ void arrive_after_copies() {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
    }
    __device__ __forceinline__ bool done(u32 parity) const {
        u32 yes;
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(yes)
                     : "r"(address()), "r"(parity)
                     : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(yes)
                     : "r"(address()), "r"(parity)
                     : "memory");
#endif
        return yes;
    }
    __device__ __forceinline__ void wait(u32 parity) const {
        while (!done(parity)) {
        }
    }
#if __CUDA_ARCH__ >= 900
    // This thread's arrival, and word of how many bytes the copy engine will bring.
    __device__ __forceinline__ void arrive_expect(u32 bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    }
    __device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
            "l"(from), "r"(bytes), "r"(address())
            : "memory");
    }
#endif
};

}  // namespace gdr
