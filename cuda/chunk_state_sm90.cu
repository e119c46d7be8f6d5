// The walk of chunk_state.cu by warpgroups: K, Q, T and P are read from shared memory once for 64 columns instead of
// once for 16. Everything stays in the same registers as there, products run beside the arithmetic between them:
//
//     X = S K^T | Y = S Q^T        while Y is on its way: W = V^T - d X
//     U = W T^T                    while U is on its way: S = d_last S
//     S = S + (e U) K | Y = scaled_d Y + U P^T
//
//   GDR_COLUMNS, GDR_STAGES    value columns of a block (a multiple of 64), chunks in shared memory
// requires: sm_90
// options: -arch=sm_90a
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = 1, kStages = GDR_STAGES;
constexpr bool kSquare = true;
}

#include "gdr/chunk_state.cuh"
#include "gdr/wgmma.cuh"

using namespace gdr;

namespace {

static_assert(kColumns % 64 == 0 && kKeys <= 128);

// c = a square (+ c), the square being T or P.
template <bool kTransposed>
__device__ __forceinline__ void multiply_square(Tile (&c)[kRows], const u32 (&a)[kRows][4], u32 square, bool add) {
    const Right right(square, kMatrixBytes, 2 * kMatrixBytes);
#pragma unroll
    for (int k = 0; k < kRows; ++k) multiply<Op, kTransposed>(c, a[k], right.at(k * kColumnBytes), add || k > 0);
}

__device__ __forceinline__ void decay_columns(Tile& x, const float* decays, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 d = *reinterpret_cast<const float2*>(decays + half * 8 + lane % 4 * 2);
        x.x[half][0] *= d.x, x.x[half][1] *= d.y, x.x[half][2] *= d.x, x.x[half][3] *= d.y;
    }
}

template <class Refill>
__device__ __forceinline__ void do_chunk(const Work& work, const Stage& stage, State& S, int chunk, Refill&& refill) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    const u32 K = shared_address(stage.K);
    const Right by_keys(K, kKeyStep, kMatrixBytes), by_tokens(K, kMatrixBytes, kKeyStep);  // K^T and K

    u32 left[kWarpKeyBlocks][4];
#pragma unroll
    for (int k = 0; k < kWarpKeyBlocks; ++k) {
        left[k][0] = Op::pack(S[2 * k][0], S[2 * k][1]), left[k][1] = Op::pack(S[2 * k][2], S[2 * k][3]);
        left[k][2] = Op::pack(S[2 * k + 1][0], S[2 * k + 1][1]), left[k][3] = Op::pack(S[2 * k + 1][2], S[2 * k + 1][3]);
    }
    Tile X[kRows], Y[kRows], U[kRows];
    pin(X), pin(Y);
    begin_products();
#pragma unroll
    for (int k = 0; k < kWarpKeyBlocks; ++k)
        multiply<Op, false>(X, left[k], by_keys.at(key_block(0, k)), k > 0);
    end_products();
#pragma unroll
    for (int k = 0; k < kWarpKeyBlocks; ++k)
        multiply<Op, false>(Y, left[k], by_keys.at(kKeyTileBytes + key_block(0, k)), k > 0);
    end_products();
    __syncthreads();
    refill();

    u32 V[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        load_matrices_transposed(shared_address(stage.V) + (i * (kColumns / 16) + row) * kBlockBytes + in_order(lane), V[i]);
    wait_products<1>();
    pin(X);
    u32 W[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 d = *reinterpret_cast<const float2*>(&stage.head.d[i * 16 + half * 8 + lane % 4 * 2]);
            const float(&x)[4] = X[i].x[half];
            const float2 top = values_of(V[i][half]), bottom = values_of(V[i][half + 2]);
            W[i][half * 2] = Op::pack(fmaf(-d.x, x[0], top.x), fmaf(-d.y, x[1], top.y));
            W[i][half * 2 + 1] = Op::pack(fmaf(-d.x, x[2], bottom.x), fmaf(-d.y, x[3], bottom.y));
        }
    }
    pin(U);
    begin_products();
    multiply_square<true>(U, W, shared_address(stage.head.T), false);
    end_products();
    const float d_last = stage.head.d[kC - 1];
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) S[i / 4][i % 4] *= d_last;
    wait_products<0>();
    pin(U), pin(Y);

    u32 plain[kRows][4], decayed[kRows][4];  // U and e U
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        U[i].pack<Op>(plain[i]);
        decay_columns(U[i], stage.head.e + i * 16, lane);
        U[i].pack<Op>(decayed[i]);
        decay_columns(Y[i], stage.head.scaled_d + i * 16, lane);
    }
    pin(S), pin(Y);
    begin_products();
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
        multiply<Op, true>(S, decayed[k], by_tokens.at(key_block(k, 0)), true);
    }
    end_products();
    multiply_square<false>(Y, plain, shared_address(stage.head.P), true);
    end_products();
    const int tokens = work.tokens(chunk);
    char* to = work.outputs + static_cast<i64>(chunk) * kC * work.output_step;
    wait_products<0>();
    pin(S), pin(Y);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        store_output(work, Y[i], to + i * 16 * work.output_step, tokens - i * 16);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) chunk_state_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    walk(p, *reinterpret_cast<Stages*>(shared), [&](const Work& work, const Stage& stage, State& S, int chunk, auto&& refill) {
        do_chunk(work, stage, S, chunk, refill);
    });
}
