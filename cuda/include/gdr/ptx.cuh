// The PTX that CUDA C++ has no spelling for without its headers. All inline assembly of the recurrence is here.
#pragma once

namespace gdr {

using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;

namespace ptx {

__device__ __forceinline__ float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u16 float_to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else  // the same rounding, to nearest even, by hand
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

__device__ __forceinline__ u32 floats_to_bfloat16s(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return float_to_bfloat16(low) | (u32{float_to_bfloat16(high)} << 16);
#endif
}

// Loads and stores are volatile: they are issued where the code says, above all before the waits that they overlap.
// The states pass through once, so their loads leave L1 alone and their stores are the first to leave L2.

__device__ __forceinline__ void load_streaming(const void* from, u32 (&x)[4]) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(from));
}

__device__ __forceinline__ void store_streaming(void* to, const u32 (&x)[4]) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

#if __CUDA_ARCH__ >= 800
// A policy for what is read once: it is the first to leave L2.
__device__ __forceinline__ unsigned long long first_to_leave() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

__device__ __forceinline__ void load_once(const void* from, u32 (&x)[4]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(from), "l"(first_to_leave()));
#else
    load_streaming(from, x);
#endif
}

__device__ __forceinline__ void load16(const void* from, u32* x) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(from));
}

__device__ __forceinline__ void load8(const void* from, u32* x) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(from));
}

__device__ __forceinline__ u32 load4(const void* from) {
    u32 x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

__device__ __forceinline__ u32 load2(const void* from) {
    u32 x;
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

// Copies 16 bytes to shared memory, or zeros where nothing exists; nothing waits for them before wait_copies (and
// GPUs that have no such copies wait at once).
__device__ __forceinline__ void copy16(void* to, const void* from, bool exists) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(exists ? 16 : 0)
                 : "memory");
#else
    u32 x[4] = {0, 0, 0, 0};
    if (exists) load16(from, x);
    *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
#endif
}

__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// For kernels that are launched as dependent ones (see gdr/_cuda_loader.py): whether they may start before the kernels
// ahead of them in the stream have ended; the wait until these have, and what they wrote can be seen; and what lets the
// kernel behind start as soon as all blocks have called it or ended, in the room that they leave. That one waits too.
constexpr bool kStartsEarly = __CUDA_ARCH__ >= 900;

__device__ __forceinline__ void wait_for_kernels_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Instead, where the kernel ahead runs beside this one and had waited itself before it let this one start.
__device__ __forceinline__ void run_beside_kernel_ahead() {}

__device__ __forceinline__ void let_kernel_behind_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Flags of two kernels that run beside each other. What one block's threads stored before they met can be seen by
// whoever sees the flag that one of them raises then; a mark says nothing of other memory.
__device__ __forceinline__ void raise_flag(u32* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ bool flag_is_up(const u32* flag) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    return x != 0;
}
__device__ __forceinline__ void set_mark(u32* mark) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(mark) : "memory");
}
__device__ __forceinline__ bool mark_is_set(const u32* mark) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(mark) : "memory");
    return x != 0;
}

// A word that a kernel ahead may be writing: it is read past L1, where it would stay.
__device__ __forceinline__ u32 peek4(const void* from) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}

// Brings the 128 bytes around an address into L2. Whoever writes them later writes them there.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// The same of `bytes` bytes, both multiples of 16, by the copy engine.
__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Makes a register's value unknown to the compiler, which then converts it again where it is used rather than keep
// the converted values alive.
__device__ __forceinline__ void forget(u32& x) { asm volatile("" : "+r"(x)); }

}  // namespace ptx
}  // namespace gdr
