// Log decays of a chunk's tokens, their sums, whose differences stay exact, and the exponentials of these.
#pragma once

#include "gdr/chunk.cuh"

namespace gdr {

// exp(-256) is 0 in float32, and so is the exponential of any sum that contains it: a log decay below it, -inf
// included, is the same as -256, and no sum of a chunk's log decays leaves the range where they are exact.
constexpr float kForgotten = -256.f;

// The log decay and the write strength of a token, from the bits of its gates and of its head's parameters.
__device__ __forceinline__ void find_gates(const Params& p, u32 a, u32 b, u32 A_log, u32 dt_bias, float& g,
                                           float& strength) {
    g = value_of(p.a_type, a), strength = value_of(p.b_type, b);
    if constexpr (kRawGates) {
        g = log_decay(value_of(p.A_log_type, A_log), g, value_of(p.dt_bias_type, dt_bias), p.softplus_beta,
                      1.f / p.softplus_beta, p.softplus_threshold);
        strength = sigmoid(strength);
    }
    g = g < kForgotten ? kForgotten : g;
}

// A sum of log decays, to the base 2, as two floats: differences of long sums stay exact.
struct alignas(8) Sum {
    float high, low;

    static __device__ __forceinline__ Sum of(float g) {
        constexpr float kLog2e = 1.4426950408889634f, kRest = 1.925963033500011e-8f;
        const float high = g * kLog2e;
        return {high, fmaf(g, kRest, fmaf(g, kLog2e, -high))};
    }
    __device__ __forceinline__ Sum operator+(const Sum& y) const {
        const float sum = high + y.high, part = sum - high;
        const float error = (high - (sum - part)) + (y.high - part);
        return {sum, low + y.low + error};
    }
    __device__ __forceinline__ Sum from_lane_below(int distance) const {
        return {__shfl_up_sync(0xffffffffu, high, distance), __shfl_up_sync(0xffffffffu, low, distance)};
    }
};

// The sum of x in the lane and in all lanes below it.
__device__ __forceinline__ Sum sum_up_to_lane(Sum x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const Sum below = x.from_lane_below(distance);
        if (threadIdx.x % 32 >= distance) x = below + x;
    }
    return x;
}

// The decay from s to t, exp(G_t - G_s), within 3 units in the last place.
__device__ __forceinline__ float decay(const Sum& t, const Sum& s) {
    return exp2_fast((t.high - s.high) + (t.low - s.low));
}

// The same without bias, for factors that a state meets again and again; see exp_unbiased.
__device__ __forceinline__ float decay_unbiased(const Sum& t, const Sum& s) {
    const float high = t.high - s.high, n = rintf(high), f = (high - n) + (t.low - s.low);
    return high < -126.f ? 0.f : exp_near_zero(f * 0.6931471806f) * power_of_two(n);
}

}  // namespace gdr
