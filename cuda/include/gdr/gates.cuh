// Log decay and write strength from raw logits. No branches: a warp works them out while it waits for a state.
#pragma once

namespace gdr {

// log(1 + u) for u in [0, 1], within 2e-7 of its value: 2 atanh(s) with s = u / (2 + u).
__device__ __forceinline__ float log1p_unit(float u) {
    const float s = __fdividef(u, 2.f + u), t = s * s;
    float series = 0.2817465663f;
    series = fmaf(series, t, 0.2796141803f);
    series = fmaf(series, t, 0.4002485275f);
    series = fmaf(series, t, 0.6666631699f);
    return s * fmaf(series, t, 2.f);
}

// log1p(exp(beta x)) / beta where beta x <= threshold, else x. exp is taken of -|beta x|: it cannot overflow.
__device__ __forceinline__ float softplus(float x, float beta, float one_over_beta, float threshold) {
    const float z = beta * x;
    const float soft = fmaxf(z, 0.f) + log1p_unit(expf(-fabsf(z)));
    return z <= threshold ? soft * one_over_beta : x;
}

__device__ __forceinline__ float log_decay(float A_log, float a, float dt_bias, float beta, float one_over_beta,
                                           float threshold) {
    return -expf(A_log) * softplus(a + dt_bias, beta, one_over_beta, threshold);
}

// exp(f) for f within 0.35 of 0.
__device__ __forceinline__ float exp_near_zero(float f) {
    float series = 1.984127e-4f;
    series = fmaf(series, f, 1.388888889e-3f);
    series = fmaf(series, f, 8.333333333e-3f);
    series = fmaf(series, f, 4.166666667e-2f);
    series = fmaf(series, f, 1.666666667e-1f);
    series = fmaf(series, f, 0.5f);
    return fmaf(f * f, series, f) + 1.f;
}

__device__ __forceinline__ float power_of_two(float n) { return __int_as_float((static_cast<int>(n) + 127) << 23); }

// exp(x) within 1.1 units in the last place (0.51 near 0) and with no bias. expf has one, which a state that decays slowly
// would add up over all its memory.
__device__ __forceinline__ float exp_unbiased(float x) {
    const float n = fminf(rintf(x * 1.442695041f), 128.f);
    const float f = fmaf(n, 1.904654299e-9f, fmaf(n, -0.6931471825f, x));
    return x < -87.33654f ? 0.f : exp_near_zero(f) * power_of_two(n);  // less would be subnormal
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

}  // namespace gdr
