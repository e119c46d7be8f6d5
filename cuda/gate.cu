// Log decay and write strength of every token and head, float32, from raw logits.
// options: -fmad=false
// launch: dependent
#include "gdr/gates.cuh"
#include "gdr/types.cuh"

using namespace gdr;

namespace {

struct Strides {
    i64 batch, token, head;
};

struct Params {
    const void *A_log, *dt_bias, *a, *b;
    float *g, *beta;
    i64 count, T, HV;
    Strides a_strides, b_strides;
    i64 A_log_stride, dt_bias_stride;
    int A_log_type, dt_bias_type, a_type, b_type;
    float softplus_beta, one_over_softplus_beta, softplus_threshold;
};

__device__ __forceinline__ float read(int dtype, const void* base, i64 index) {
    return value_of(dtype, load_bits(dtype, base, index));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) gate(const __grid_constant__ Params p) {
    ptx::let_kernel_behind_start();
    ptx::wait_for_kernels_ahead();
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
        const i64 hv = i % p.HV, t = i / p.HV % p.T, n = i / p.HV / p.T;
        const float a = read(p.a_type, p.a, n * p.a_strides.batch + t * p.a_strides.token + hv * p.a_strides.head);
        const float b = read(p.b_type, p.b, n * p.b_strides.batch + t * p.b_strides.token + hv * p.b_strides.head);
        const float A_log = read(p.A_log_type, p.A_log, hv * p.A_log_stride);
        const float dt_bias = read(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
        p.g[i] = log_decay(A_log, a, dt_bias, p.softplus_beta, p.one_over_softplus_beta, p.softplus_threshold);
        p.beta[i] = sigmoid(b);
    }
}
