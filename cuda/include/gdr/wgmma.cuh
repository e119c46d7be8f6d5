// Products of a warpgroup (wgmma, sm_90a): 64 rows by its 4 warps, the left operand (mostly) and the sums in registers as
// in mma.cuh, the right operand in shared memory as 8 x 8 matrices of 128 bytes, read by all 4 warps at once.
#pragma once

#include "gdr/mma.cuh"

namespace gdr {

// A right operand, as the instruction wants it. (All sums of one product lie in one array: products into a part of it
// are not run asynchronously.)
struct Right {
    u32 low, high;

    // Matrices along the depth and along the columns are `depth` and `column` bytes apart.
    __device__ __forceinline__ Right(u32 address, int depth, int column)
        : low((address & 0x3ffff) >> 4 | depth >> 4 << 16), high(column >> 4) {}
    __device__ __forceinline__ unsigned long long at(int bytes) const {
        return static_cast<unsigned long long>(high) << 32 | (low + (bytes >> 4));
    }
};

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kLeft groups of products are on their way.
template <int kLeft>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// A warpgroup gives all but some of its registers to others of its block, or takes some more.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Some warps of a block, kThreads threads in all, wait for each other.
template <int kNumber, int kThreads>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// Ties registers to this place in the code: products write them behind the compiler's back.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
template <int kCount>
__device__ __forceinline__ void pin(Tile (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount * 8; ++i) pin(x[i / 8].x[i / 4 % 2][i % 4]);
}
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount * 4; ++i) pin(x[i / 4][i % 4]);
}

#define GDR_TILE(t)                                                                                                   \
    "+f"((t).x[0][0]), "+f"((t).x[0][1]), "+f"((t).x[0][2]), "+f"((t).x[0][3]), "+f"((t).x[1][0]), "+f"((t).x[1][1]), \
        "+f"((t).x[1][2]), "+f"((t).x[1][3])
#define GDR_ROW(s) "+f"((s)[0]), "+f"((s)[1]), "+f"((s)[2]), "+f"((s)[3])
#define GDR_ROWS8(s, i)                                                                                          \
    GDR_ROW((s)[i]), GDR_ROW((s)[(i) + 1]), GDR_ROW((s)[(i) + 2]), GDR_ROW((s)[(i) + 3]), GDR_ROW((s)[(i) + 4]), \
        GDR_ROW((s)[(i) + 5]), GDR_ROW((s)[(i) + 6]), GDR_ROW((s)[(i) + 7])

// c = a b (+ c). With kTransposed the rows of b's matrices are along the depth.
template <class Op, bool kTransposed>
__device__ __forceinline__ void multiply(Tile (&c)[4], const u32 (&a)[4], unsigned long long b, bool add) {
    if constexpr (Op::kType == kFloat16)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : GDR_TILE(c[0]), GDR_TILE(c[1]), GDR_TILE(c[2]), GDR_TILE(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : GDR_TILE(c[0]), GDR_TILE(c[1]), GDR_TILE(c[2]), GDR_TILE(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
}

template <class Op, bool kTransposed>
__device__ __forceinline__ void multiply(float (&c)[16][4], const u32 (&a)[4], unsigned long long b, bool add) {
    if constexpr (Op::kType == kFloat16)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
            "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
            : GDR_ROWS8(c, 0), GDR_ROWS8(c, 8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
            "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
            : GDR_ROWS8(c, 0), GDR_ROWS8(c, 8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
}

template <class Op, bool kTransposed>
__device__ __forceinline__ void multiply(float (&c)[8][4], const u32 (&a)[4], unsigned long long b, bool add) {
    if constexpr (Op::kType == kFloat16)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : GDR_ROWS8(c, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
            : GDR_ROWS8(c, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(add)), "n"(kTransposed));
}

// c = a b (+ c), where a is in shared memory as well: 64 rows, one of its matrices after the other as b's columns.
template <class Op>
__device__ __forceinline__ void multiply(Tile (&c)[4], unsigned long long a, unsigned long long b, bool add) {
    if constexpr (Op::kType == kFloat16)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, 0;}"
            : GDR_TILE(c[0]), GDR_TILE(c[1]), GDR_TILE(c[2]), GDR_TILE(c[3])
            : "l"(a), "l"(b), "r"(static_cast<u32>(add)));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
            "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, 0;}"
            : GDR_TILE(c[0]), GDR_TILE(c[1]), GDR_TILE(c[2]), GDR_TILE(c[3])
            : "l"(a), "l"(b), "r"(static_cast<u32>(add)));
}

#undef GDR_TILE
#undef GDR_ROW
#undef GDR_ROWS8

}  // namespace gdr
