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
__device__ __forceinline__ float from_bits(u16 bits) {
    return kDType == kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
}

template <int kDType>
__device__ __forceinline__ u16 to_bits(float x) {
    return kDType == kFloat16 ? ptx::float_to_half(x) : ptx::float_to_bfloat16(x);
}

template <int kDType>
__device__ __forceinline__ float load(const void* base, i64 index) {
    const char* from = at(base, kDType, index);
    if constexpr (kDType == kFloat32) return __uint_as_float(ptx::load4(from));
    else return from_bits<kDType>(ptx::load2(from));
}

template <int kDType>
__device__ __forceinline__ void store(void* base, i64 index, float x) {
    char* to = at(base, kDType, index);
    if constexpr (kDType == kFloat32) *reinterpret_cast<float*>(to) = x;
    else *reinterpret_cast<u16*>(to) = to_bits<kDType>(x);
}

// The same with a type known only at run time: for scalars, whose types would multiply the specialisations.
__device__ __forceinline__ float load(int dtype, const void* base, i64 index) {
    if (dtype == kFloat32) return load<kFloat32>(base, index);
    const u16 bits = ptx::load2(at(base, kFloat16, index));
    return dtype == kFloat16 ? from_bits<kFloat16>(bits) : from_bits<kBFloat16>(bits);
}

template <int kDType, int kCount>
__device__ __forceinline__ void unpack(const u32* words, float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (kDType == kFloat32) x[i] = __uint_as_float(words[i]);
        else if constexpr (kDType == kFloat16) x[i] = ptx::half_to_float(static_cast<u16>(words[i / 2] >> (i % 2 * 16)));
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

}  // namespace gdr
