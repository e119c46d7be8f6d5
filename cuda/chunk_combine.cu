// Goes from segment to segment of a sequence with the maps that a composing walk found: the state after a segment is
// that before it times M, plus N, whose place it takes. See gdr/chunk.cuh. In float32 throughout: these products are
// few, and a state may hold more than 16-bit operands can.
//
// A block has kValueRows columns of a value head's state; a thread has 4 keys, and one of kParts parts of the sums.
// requires: sm_80
// launch: dependent
#include "gdr/chunk.cuh"

using namespace gdr;

namespace {

constexpr int kValueRows = 8, kParts = 8, kQuads = kKeys / 4, kTerms = kKeys / kParts;
constexpr int kThreads = kQuads * kParts;
static_assert(kV % kValueRows == 0 && kParts == kValueRows);

__device__ __forceinline__ void add_scaled(float4& y, const float4& x, float factor) {
    y.x = fmaf(x.x, factor, y.x), y.y = fmaf(x.y, factor, y.y);
    y.z = fmaf(x.z, factor, y.z), y.w = fmaf(x.w, factor, y.w);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) chunk_combine(const __grid_constant__ Params p) {
    __shared__ __align__(16) float before[kQuads][4 * kValueRows + 4];  // of 4 keys; neighbours in different banks
    __shared__ float4 sums[kParts][kValueRows][kQuads];
    ptx::wait_for_kernels_ahead();
    ptx::let_kernel_behind_start();
    const int heads = p.H * p.group;
    const int value = blockIdx.x % (kV / kValueRows) * kValueRows, hv = blockIdx.x / (kV / kValueRows) % heads;
    const int n = blockIdx.x / (kV / kValueRows * heads);
    const Sequence seq = find_sequence(p, n);
    const int first = max(seq.chunk, p.first_chunk), last = min(seq.chunk + seq.chunks, p.last_chunk);
    if (first >= last) return;
    // Rows of `maps`; the last segment's map is not there.
    const int begin = first / p.segment_chunks + n - p.first_chunk / p.segment_chunks;
    const int end = (last - 1) / p.segment_chunks + n - p.first_chunk / p.segment_chunks;
    if (begin + 1 >= end) return;

    const int quad = threadIdx.x % kQuads, part = threadIdx.x / kQuads;
    const auto map_of = [&](int row) {
        return reinterpret_cast<float4*>(p.maps) + (static_cast<i64>(row) * heads + hv) * (kV + kKeys) * kQuads;
    };
    const auto keep = [&](const float4& state) {  // of value column `part`
        before[quad][part] = state.x, before[quad][kValueRows + part] = state.y;
        before[quad][2 * kValueRows + part] = state.z, before[quad][3 * kValueRows + part] = state.w;
    };
    const auto load = [&](float4(&M)[kTerms], int row) {
#pragma unroll
        for (int i = 0; i < kTerms; ++i) M[i] = map_of(row)[(kV + part * kTerms + i) * kQuads + quad];
    };
    const auto step = [&](const float4(&M)[kTerms], float4(&next)[kTerms], int row) {
        if (row + 1 < end) load(next, row + 1);
        float4* there = map_of(row) + (value + part) * kQuads + quad;
        float4 state = *there;
        float4 sum[kValueRows] = {};
#pragma unroll
        for (int i = 0; i < kTerms; ++i) {
#pragma unroll
            for (int v = 0; v < kValueRows; ++v)
                add_scaled(sum[v], M[i], before[part * (kTerms / 4) + i / 4][i % 4 * kValueRows + v]);
        }
#pragma unroll
        for (int v = 0; v < kValueRows; ++v) sums[part][v][quad] = sum[v];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kParts; ++i) add_scaled(state, sums[i][part][quad], 1.f);
        *there = state;
        keep(state);
        __syncthreads();
    };
    float4 even[kTerms], odd[kTerms];  // a row of maps comes while the one before is used
    load(even, begin + 1);
    keep(map_of(begin)[(value + part) * kQuads + quad]);
    __syncthreads();
#pragma unroll 1
    for (int row = begin + 1; row < end; row += 2) {
        step(even, odd, row);
        if (row + 1 < end) step(odd, even, row + 1);
    }
}
