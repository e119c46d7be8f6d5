// cuda/include/gdr/ptx.cuh for the host.
#pragma once

namespace gdr {

using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;

namespace ptx {

inline float half_to_float(u16 x) { return static_cast<float>(same_bits<_Float16>(x)); }
inline u16 float_to_half(float x) { return same_bits<u16>(static_cast<_Float16>(x)); }
inline u16 float_to_bfloat16(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 floats_to_bfloat16s(float low, float high) {
    return float_to_bfloat16(low) | u32{float_to_bfloat16(high)} << 16;
}

template <int kBytes>
void copy(void* to, const void* from, const void* aligned) {
    if (reinterpret_cast<size_t>(aligned) % kBytes) {
        fprintf(stderr, "%d bytes at an address that is no multiple of that\n", kBytes);
        abort();
    }
    if (DEPENDENT && !fibers[current].waited) {
        fprintf(stderr, "a dependent kernel uses memory before it waits\n");
        abort();
    }
    memcpy(to, from, kBytes);
}
inline void load_streaming(const void* from, u32 (&x)[4]) { copy<16>(x, from, from); }
inline void store_streaming(void* to, const u32 (&x)[4]) { copy<16>(to, x, to); }
inline void load16(const void* from, u32* x) { copy<16>(x, from, from); }
inline void load_once(const void* from, u32 (&x)[4]) { copy<16>(x, from, from); }
inline void load8(const void* from, u32* x) { copy<8>(x, from, from); }
inline u32 load4(const void* from) {
    u32 x;
    copy<4>(&x, from, from);
    return x;
}
inline u32 load2(const void* from) {
    u16 x;
    copy<2>(&x, from, from);
    return x;
}
inline void copy16(void* to, const void* from, bool exists) {
    const u32 zeros[4] = {};
    copy<16>(to, exists ? from : zeros, exists ? from : to);
}
inline void wait_copies() {}
inline char* dynamic_shared() { return shared; }
constexpr bool kStartsEarly = true;
inline void raise_flag(u32* flag) {
    if (*flag != 0) {
        fprintf(stderr, "a flag was up before\n");
        abort();
    }
    *flag = 1;
}
inline bool flag_is_up(const u32* flag) { return *flag != 0; }
inline void set_mark(u32* mark) { *mark = 1; }
inline bool mark_is_set(const u32* mark) { return *mark != 0; }
inline u32 peek4(const void* from) {
    static unsigned count;
    u32 x;
    memcpy(&x, from, 4);
    return lies && count++ % 3 == 0 ? x ^ 1 : x;  // as if a kernel ahead would yet write it
}
inline void prefetch(const void* from) { (void)*static_cast<const volatile char*>(from); }  // must exist
inline void prefetch_bulk(const void* from, u32 bytes) {
    if ((reinterpret_cast<size_t>(from) | bytes) % 16) {
        fprintf(stderr, "no multiple of 16 bytes to prefetch\n");
        abort();
    }
    prefetch(from), prefetch(static_cast<const char*>(from) + bytes - 1);
}
inline void wait_for_kernels_ahead() { fibers[current].waited = true; }
inline void run_beside_kernel_ahead() { fibers[current].waited = true; }
inline void let_kernel_behind_start() {}
inline void forget(u32&) {}

}  // namespace ptx
}  // namespace gdr
