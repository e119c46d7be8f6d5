// The walk of chunk_state.cu by warpgroups: K, Q, T and P are read from shared memory once for 64 columns instead of
// once for 16. Everything stays in the same registers as there, and products run beside the arithmetic between them:
//
//     X = S K^T, Y = S Q^T         meanwhile the previous chunk's outputs are stored; W = V^T - d X beside Y
//     U = W T^T                    meanwhile S = d_last S
//     S = S + (e U) K              meanwhile Y = scaled_d Y
//     Y = Y + U P^T
//
// The first warps do that; the last one only brings tiles, up to kStages chunks ahead.
//
//   GDR_COLUMNS, GDR_STAGES    value columns of a block (a multiple of 64), chunks in shared memory
// requires: sm_90
// options: -arch=sm_90a
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = 1, kStages = GDR_STAGES;
}

#include "gdr/chunk_state.cuh"
#include "gdr/wgmma.cuh"

using namespace gdr;

namespace {

static_assert(kColumns % 64 == 0 && kKeys <= 128);

// T and P in shared memory, column after column of whole blocks: with zeros above the diagonal.
constexpr int kColumnBytes = kRows * kBlockBytes;
struct alignas(128) SquareTile {
    char T[kRows * kColumnBytes], P[kRows * kColumnBytes];
    float d[kC], scaled_d[kC], e[kC];
};
using Stage = StageOf<SquareTile>;

struct Shared {
    Stage stages[kStages];
    Barrier full[kStages], empty[kStages];
};

// ---- The warp that brings tiles.

// Lane l copies 16 bytes of token l % 8 of every 8, from the columns 8 (l / 8) + 32 i on.
__device__ __forceinline__ void copy_values(const Work& work, Stage& stage, int chunk) {
    const int lane = threadIdx.x % 32, tokens = work.tokens(chunk);
    const char* from = work.values + static_cast<i64>(chunk) * kC * work.value_step;
    char* to = stage.V + lane / 16 * kBlockBytes + lane / 8 % 2 * 256 + lane % 8 * 16;
#pragma unroll 2
    for (int token8 = 0; token8 < kC / 8; ++token8) {
        const bool exists = token8 * 8 + lane % 8 < tokens;
#pragma unroll
        for (int i = 0; i < kColumns / 32; ++i) {
            char* there = to + (token8 / 2 * (kColumns / 16) + i * 2) * kBlockBytes + token8 % 2 * 128;
            if constexpr (kAligned) {
                copy16(shared_address(there), exists ? from + i * 32 * kValueBytes : work.values, exists);
            } else {
                u32 words[4];
                load_chunk<kQkv, 8, false>(from, i * 32, exists ? 8 : 0, words);
                *reinterpret_cast<uint4*>(there) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        from += 8 * work.value_step;
    }
}

__device__ __forceinline__ void copy_chunk(const Params& p, const Work& work, Stage& stage, Barrier& full, int chunk) {
    const int lane = threadIdx.x % 32;
    const i64 slot = work.seq.chunk + chunk - p.first_chunk;
    const char* keys = p.key_tiles + (slot * p.H + work.hv / p.group) * (2 * kKeyTileBytes);
    const char* head = p.head_tiles + (slot * (p.H * p.group) + work.hv) * sizeof(HeadTile);
    if (lane == 0) {
        full.arrive_expect(2 * kKeyTileBytes + sizeof(HeadTile));
        full.copy_bulk(shared_address(stage.K), keys, 2 * kKeyTileBytes);
        full.copy_bulk(shared_address(stage.head.d), head + 2 * kLowerBlocks * kBlockBytes, 3 * kC * 4);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {  // columns of T and P, from the diagonal down
            const int from = lower_block(j, j), to = j * (kColumnBytes + kBlockBytes);
            const u32 bytes = (kRows - j) * kBlockBytes;
            full.copy_bulk(shared_address(stage.head.T) + to, head + from, bytes);
            full.copy_bulk(shared_address(stage.head.P) + to, head + kLowerBlocks * kBlockBytes + from, bytes);
        }
    }
    copy_values(work, stage, chunk);
    if constexpr (!kAligned) __threadfence_block();
    full.arrive_after_copies();
}

__device__ __forceinline__ void bring_tiles(const Params& p, const Work& work, Shared& sm) {
    int stage = 0;
    u32 parity = 1;  // the first round finds every stage empty
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        sm.empty[stage].wait(parity);
        copy_chunk(p, work, sm.stages[stage], sm.full[stage], chunk);
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_copies();
}

__device__ __forceinline__ void zero_squares(Stage& stage) {
    uint4* to = reinterpret_cast<uint4*>(stage.head.T);
    for (int i = threadIdx.x; i < 2 * kRows * kColumnBytes / 16; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
}

// ---- The warps that compute.

// c = a square (+ c), the square being T or P.
template <bool kTransposed>
__device__ __forceinline__ void multiply_square(Tile (&c)[kRows], const u32 (&a)[kRows][4], u32 square, bool add) {
    const Right right(square, kMatrixBytes, 2 * kMatrixBytes);
#pragma unroll
    for (int k = 0; k < kRows; ++k) multiply<Op, kTransposed>(c, a[k], right.at(k * kColumnBytes), add || k > 0);
}

// Of 16 columns x 64 tokens, pairs of tokens of a column.
using Outputs = u32[kRows][2][2];

__device__ __forceinline__ void store_outputs(const Work& work, const Outputs& o, int chunk) {
    const int token = threadIdx.x % 32 / 4, tokens = work.tokens(chunk);
    char* to = work.outputs + static_cast<i64>(chunk) * kC * work.output_step;
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) {
        store_pairs(to, o[i / 2][i % 2], token + i * 8 < tokens);
        to += 8 * work.output_step;
    }
}

struct Decays {
    float2 x[kRows][2];

    __device__ __forceinline__ void load(const float* from) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kC / 8; ++i)
            x[i / 2][i % 2] = *reinterpret_cast<const float2*>(from + i * 8 + lane % 4 * 2);
    }
};

__device__ __forceinline__ void compute(const Params& p, const Work& work, Shared& sm, State& S) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    Outputs outputs;
    int stage_index = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const Stage& stage = sm.stages[stage_index];
        const u32 K = shared_address(stage.K);
        const Right by_keys(K, kKeyStep, kMatrixBytes), by_tokens(K, kMatrixBytes, kKeyStep);  // K^T and K
        u32 left[kWarpKeyBlocks][4];
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k) {
            left[k][0] = Op::pack(S[2 * k][0], S[2 * k][1]), left[k][1] = Op::pack(S[2 * k][2], S[2 * k][3]);
            left[k][2] = Op::pack(S[2 * k + 1][0], S[2 * k + 1][1]),
            left[k][3] = Op::pack(S[2 * k + 1][2], S[2 * k + 1][3]);
        }
        sm.full[stage_index].wait(parity);

        Tile X[kRows], Y[kRows], U[kRows];
        pin(X), pin(Y);
        begin_products();
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k) multiply<Op, false>(X, left[k], by_keys.at(key_block(0, k)), k > 0);
        end_products();
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k)
            multiply<Op, false>(Y, left[k], by_keys.at(kKeyTileBytes + key_block(0, k)), k > 0);
        end_products();

        if (chunk > work.first) store_outputs(work, outputs, chunk - 1);
        Decays d;
        d.load(stage.head.d);
        u32 V[kRows][4], W[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            load_matrices_transposed(
                shared_address(stage.V) + (i * (kColumns / 16) + row) * kBlockBytes + in_order(lane), V[i]);
        wait_products<1>();
        pin(X);
#pragma unroll
        for (int i = 0; i < kC / 8; ++i) {
            const int half = i % 2;
            const float2 decay = d.x[i / 2][half];
            const float (&x)[4] = X[i / 2].x[half];
            const float2 top = values_of(V[i / 2][half]), bottom = values_of(V[i / 2][half + 2]);
            W[i / 2][half * 2] = Op::pack(fmaf(-decay.x, x[0], top.x), fmaf(-decay.y, x[1], top.y));
            W[i / 2][half * 2 + 1] = Op::pack(fmaf(-decay.x, x[2], bottom.x), fmaf(-decay.y, x[3], bottom.y));
        }
        pin(U);
        begin_products();
        multiply_square<true>(U, W, shared_address(stage.head.T), false);
        end_products();
        const float d_last = stage.head.d[kC - 1];
#pragma unroll
        for (int i = 0; i < kWarpKeys / 2; ++i) S[i / 4][i % 4] *= d_last;
        Decays e;
        e.load(stage.head.e);
        wait_products<0>();
        pin(U), pin(Y);

        u32 plain[kRows][4], decayed[kRows][4];  // U and e U
#pragma unroll
        for (int i = 0; i < kC / 8; ++i) {
            const int half = i % 2;
            const float2 decay = e.x[i / 2][half];
            const float (&u)[4] = U[i / 2].x[half];
            decayed[i / 2][half * 2] = Op::pack(u[0] * decay.x, u[1] * decay.y);
            decayed[i / 2][half * 2 + 1] = Op::pack(u[2] * decay.x, u[3] * decay.y);
        }
        pin(S);
        begin_products();
#pragma unroll
        for (int k = 0; k < kRows; ++k) multiply<Op, true>(S, decayed[k], by_tokens.at(key_block(k, 0)), true);
        end_products();
        d.load(stage.head.scaled_d);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            U[i].pack<Op>(plain[i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float (&y)[4] = Y[i].x[half];
                y[0] *= d.x[i][half].x, y[1] *= d.x[i][half].y, y[2] *= d.x[i][half].x, y[3] *= d.x[i][half].y;
            }
        }
        pin(Y);
        begin_products();
        multiply_square<false>(Y, plain, shared_address(stage.head.P), true);
        end_products();
        wait_products<0>();
        pin(S), pin(Y);
        __syncwarp();
        if (lane == 0) sm.empty[stage_index].arrive();
#pragma unroll
        for (int i = 0; i < kC / 8; ++i) pack_pairs(Y[i / 2].x[i % 2], outputs[i / 2][i % 2]);
        if (++stage_index == kStages) stage_index = 0, parity ^= 1;
    }
    if (work.first < work.last) store_outputs(work, outputs, work.last - 1);
}

}  // namespace

// With two warpgroups that compute, registers are too few to go round evenly: a third, whose first warp brings tiles,
// gives some of its own to them.
constexpr bool kTwo = kColumns == 128;
constexpr int kBlockThreads = kThreads + (kTwo ? 128 : 32);

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1) chunk_state_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column_of_warp = warp % kWarps * 16;
    Work work;
    if (!find_work(p, work)) return;
    const int column = work.first_column + column_of_warp;
    find_tokens(p, work, lane % 8, lane / 8, column);

    for (int i = 0; i < kStages; ++i) zero_squares(sm.stages[i]);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.full[i].init(33), sm.empty[i].init(kWarps);
        Barrier::publish_inits();
    }
    publish_to_engines();
    __syncthreads();
    if (warp >= kWarps) {
        if constexpr (kTwo) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == kWarps) bring_tiles(p, work, sm);
    } else {
        if constexpr (kTwo) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        State S;
        load_state(p, work, S, column, 0);
        compute(p, work, sm, S);
        save_state(p, work, S, column, 0);
    }
}
