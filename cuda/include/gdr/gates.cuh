// Log decay and write strength from raw logits.
#pragma once

namespace gdr {

// log1p(exp(beta x)) / beta where beta x <= threshold, else x. exp is taken of -|beta x|: it cannot overflow.
__device__ __forceinline__ float softplus(float x, float beta, float threshold) {
    const float z = beta * x;
    if (!(z <= threshold)) return x;
    return (fmaxf(z, 0.f) + log1pf(expf(-fabsf(z)))) / beta;
}

__device__ __forceinline__ float log_decay(float A_log, float a, float dt_bias, float beta, float threshold) {
    return -expf(A_log) * softplus(a + dt_bias, beta, threshold);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

}  // namespace gdr
