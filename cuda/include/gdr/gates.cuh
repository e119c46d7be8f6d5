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

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

}  // namespace gdr
