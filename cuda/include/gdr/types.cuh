// Element types by number, and conversions between words in memory and float32.
#pragma once

#include "gdr/ptx.cuh"

namespace gdr {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr __host__ __device__ int bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Words of 32 bits that n elements fill.
constexpr __host__ __device__ int words_of(int dtype, int n) { return n * bytes_of(dtype) / 4; }

__device__ __forceinline__ const char* at(const void* base, int dtype, i64 index) {
    return static_cast<const char*>(base) + index * bytes_of(dtype);
}

__device__ __forceinline__ char* at(void* base, int dtype, i64 index) {
    return static_cast<char*>(base) + index * bytes_of(dtype);
}

template <int kDType>
__device__ __forceinline__ u16 to_bits(float x) {
    return kDType == kFloat16 ? ptx::float_to_half(x) : ptx::float_to_bfloat16(x);
}

template <int kDType>
__device__ __forceinline__ void store(void* base, i64 index, float x) {
    char* to = at(base, kDType, index);
    if constexpr (kDType == kFloat32) *reinterpret_cast<float*>(to) = x;
    else *reinterpret_cast<u16*>(to) = to_bits<kDType>(x);
}

// An element's bits, and their value once it is needed: between the two the load is on its way. The type of a scalar
// is known only at run time, for it would multiply the specialisations.
__device__ __forceinline__ u32 load_bits(int dtype, const void* base, i64 index) {
    const char* from = static_cast<const char*>(base) + (index << (dtype == kFloat32 ? 2 : 1));
    return dtype == kFloat32 ? ptx::load4(from) : ptx::load2(from);
}

__device__ __forceinline__ float value_of(int dtype, u32 bits) {
    const float half = ptx::half_to_float(static_cast<u16>(bits));
    return dtype == kFloat16 ? half : __uint_as_float(dtype == kFloat32 ? bits : bits << 16);
}

template <int kDType, int kCount>
__device__ __forceinline__ void unpack(const u32* words, float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (kDType == kFloat32) x[i] = __uint_as_float(words[i]);
        else if constexpr (kDType == kFloat16)
            x[i] = ptx::half_to_float(static_cast<u16>(words[i / 2] >> (i % 2 * 16)));
        else x[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    }
}

template <int kDType, int kCount>
__device__ __forceinline__ void pack(const float (&x)[kCount], u32* words) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (kDType == kFloat32) words[i] = __float_as_uint(x[i]);
        else if (i % 2 == 0) {
            if constexpr (kDType == kBFloat16) words[i / 2] = ptx::floats_to_bfloat16s(x[i], x[i + 1]);
            else words[i / 2] = ptx::float_to_half(x[i]) | (u32{ptx::float_to_half(x[i + 1])} << 16);
        }
    }
}

// A float32 number's 11 leading bits, which are those that tensor cores read, and what they leave.
struct Split {
    u32 high = 0, low = 0;

    __device__ __forceinline__ Split() {}
    __device__ __forceinline__ explicit Split(float x)
        : high(__float_as_uint(x) & 0xffffe000u), low(__float_as_uint(x - __uint_as_float(high))) {}
};

}  // namespace gdr
