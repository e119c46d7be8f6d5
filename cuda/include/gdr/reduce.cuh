// Sums over the lanes of a warp, always in one order whatever the number of values.
#pragma once

namespace gdr {

// Sums each of some values over groups of kLanes neighbouring lanes; every lane gets the sums.
template <int kLanes, int kCount>
__device__ __forceinline__ void sum_lanes(float (&x)[kCount]) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2)
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], mask);
}

// Sums kCount values over the lanes that differ in the bits of kMask, kMask / 2, .. kLast. At each step a lane hands
// the half of its values to its partner whose sums the partner goes on with, so that in the end the sums lie spread
// over the lanes: x[0], x[1], .. are then those of the values from the returned index on. Each sum is the same tree
// whatever kCount is.
template <int kCount, int kMask, int kLast, int kSize>
__device__ __forceinline__ int sum_transposed(float (&x)[kSize], int lane) {
    if constexpr (kMask >= kLast && kMask > 0) {
        if constexpr (kCount > 1) {
            constexpr int kHalf = kCount / 2;
            const bool upper = lane & kMask;
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const float given = upper ? x[i] : x[i + kHalf];
                const float kept = upper ? x[i + kHalf] : x[i];
                x[i] = kept + __shfl_xor_sync(0xffffffffu, given, kMask);
            }
            return (upper ? kHalf : 0) + sum_transposed<kHalf, kMask / 2, kLast>(x, lane);
        } else {
            x[0] += __shfl_xor_sync(0xffffffffu, x[0], kMask);
            return sum_transposed<1, kMask / 2, kLast>(x, lane);
        }
    } else {
        return 0;
    }
}

}  // namespace gdr
