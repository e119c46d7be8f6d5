// Chunks: a few neighbouring elements that one thread loads or stores at once.
#pragma once

#include "gdr/types.cuh"

namespace gdr {

enum class Cache { kNormal, kStreaming, kOnce };

// Loads kCount elements, of which the first `valid` exist; the others are 0. With kAligned the chunk exists whole or
// not at all and lies on a multiple of its size (16 bytes at most).
template <int kDType, int kCount, bool kAligned, Cache kCache = Cache::kNormal>
__device__ __forceinline__ void load_chunk(const void* base, i64 index, int valid, u32* words) {
    constexpr int kWords = words_of(kDType, kCount);
    const char* from = at(base, kDType, index);
    if constexpr (kAligned) {
        static_assert(kWords == 2 || kWords % 4 == 0);
        if (valid <= 0) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) words[i] = 0;
        } else if constexpr (kWords == 2) {
            ptx::load8(from, words);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                u32(&four)[4] = *reinterpret_cast<u32(*)[4]>(words + i);
                if constexpr (kCache == Cache::kStreaming) ptx::load_streaming(from + i * 4, four);
                else if constexpr (kCache == Cache::kOnce) ptx::load_once(from + i * 4, four);
                else ptx::load16(from + i * 4, four);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if constexpr (kDType == kFloat32) {
                words[i] = i < valid ? ptx::load4(from + i * 4) : 0;
            } else {
                const u32 bits = i < valid ? ptx::load2(from + i * 2) : 0;
                words[i / 2] = i % 2 ? words[i / 2] | (bits << 16) : bits;
            }
        }
    }
}

// Stores the first `valid` of kCount elements; as above with kAligned.
template <int kDType, int kCount, bool kAligned>
__device__ __forceinline__ void store_chunk(void* base, i64 index, int valid, u32* words) {
    constexpr int kWords = words_of(kDType, kCount);
    char* to = at(base, kDType, index);
    if constexpr (kAligned) {
        static_assert(kWords == 2 || kWords % 4 == 0);
        if (valid <= 0) return;
        if constexpr (kWords == 2) {
            *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; i += 4)
                ptx::store_streaming(to + i * 4, *reinterpret_cast<u32(*)[4]>(words + i));
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i >= valid) continue;
            if constexpr (kDType == kFloat32) reinterpret_cast<u32*>(to)[i] = words[i];
            else reinterpret_cast<u16*>(to)[i] = static_cast<u16>(words[i / 2] >> (i % 2 * 16));
        }
    }
}

}  // namespace gdr
