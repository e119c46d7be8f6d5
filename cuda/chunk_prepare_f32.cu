// What a chunk's outputs and state update need of the chunk alone, in float32: T, P and factors. See gdr/chunk.cuh for
// the formulas and gdr/chunk_f32.cuh for the products and the workspace.
//
// A block of 4 warps takes one chunk of one key head. K K^T and Q K^T are products on tensor cores, whose lower halves
// all value heads share. Then a warp has T of a value head, or all the rest, and a lane a column of that; of (I + L)^-1
// it finds one by forward substitution.
// requires: sm_80
#include "gdr/chunk_f32.cuh"
#include "gdr/log_decays.cuh"

using namespace gdr;

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kProductRow = kC + 8;  // floats: 4 rows in different banks
constexpr int kColumn = kC + 4;      // 8 columns in different banks

// Of a token and value head: the running sum of the log decays, and a factor of its row of L or P.
struct alignas(16) Token {
    Sum G;
    float factor;
};

struct Shared {
    union {
        struct {
            char K[kTokenBytes], Q[kTokenBytes];
        };
        alignas(16) float L[kWarps][kC][kColumn];  // -L by columns, once the products are done
    };
    float products[2][kC][kProductRow];  // K K^T, Q K^T
    float norms[2][kC];                  // what normalises K, Q
    Token tokens[kWarps][kC];
};

// The gates of a value head, a token a lane. Tokens past the end of the sequence neither decay nor write.
struct GateBits {
    u32 a, b, A_log, dt_bias;

    __device__ __forceinline__ void load(const Params& p, i64 from_a, i64 from_b, int hv, int tokens) {
        const int t = min(static_cast<int>(threadIdx.x % 32), tokens - 1);
        a = load_bits(p.a_type, p.a, from_a + hv * p.a_strides.head + t * p.a_strides.token);
        b = load_bits(p.b_type, p.b, from_b + hv * p.b_strides.head + t * p.b_strides.token);
        if constexpr (kRawGates) {
            A_log = load_bits(p.A_log_type, p.A_log, hv * p.A_log_stride);
            dt_bias = load_bits(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
        }
    }
    __device__ __forceinline__ void finish(const Params& p, int tokens, Sum& G, float& strength) const {
        float g = 0.f;
        strength = 0.f;
        if (static_cast<int>(threadIdx.x % 32) < tokens) find_gates(p, a, b, A_log, dt_bias, g, strength);
        G = sum_up_to_lane(Sum::of(g));
    }
};

// What normalises K's and Q's rows: 8 lanes a row, which read 8 pieces of it at a time.
__device__ __forceinline__ void fill_norms(Shared& sm) {
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int row = threadIdx.x / 8; row < 2 * kC; row += kThreads / 8) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < kPieces; i += 8) {
            const float4 x =
                *reinterpret_cast<const float4*>(sm.K + row / kC * kTokenBytes + place_of(row % kC, i + piece));
            squares = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, squares))));
        }
#pragma unroll
        for (int mask = 4; mask > 0; mask /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
        if (piece == 0) sm.norms[row / kC][row % kC] = 1.f / sqrtf(squares + 1e-6f);
    }
}

// Rows [16 kHalf, 16 kHalf + 16) of K K^T (Q K^T with kQueries), up to the diagonal.
template <int kHalf>
__device__ __forceinline__ void multiply(Shared& sm, int queries) {
    constexpr int kColumns = 2 * kHalf + 2;  // of 8 tokens
    const int lane = threadIdx.x % 32;
    float sums[kColumns][4] = {};
#pragma unroll 2
    for (int m = 0; m < kKeys / 16; ++m) {
        const char* right = sm.K + by_keys_f32(lane, m);
        const char* left = right + queries * kTokenBytes + kHalf * 16 * kRowBytes;
        const float4 top = *reinterpret_cast<const float4*>(left),
                     bottom = *reinterpret_cast<const float4*>(left + 8 * kRowBytes);
        float4 keys[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) keys[i] = *reinterpret_cast<const float4*>(right + i * 8 * kRowBytes);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            Left a;
            if (step == 0) a.set(top.x, bottom.x, top.y, bottom.y);
            else a.set(top.z, bottom.z, top.w, bottom.w);
            Right b[kColumns];
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                b[i].set(step == 0 ? keys[i].x : keys[i].z, step == 0 ? keys[i].y : keys[i].w);
            add_products(sums, a, b);
        }
    }
    float* to = &sm.products[queries][kHalf * 16 + lane / 4][lane % 4 * 2];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        *reinterpret_cast<float2*>(to + i * 8) = make_float2(sums[i][0], sums[i][1]);
        *reinterpret_cast<float2*>(to + i * 8 + 8 * kProductRow) = make_float2(sums[i][2], sums[i][3]);
    }
}

// The lane's column of a product times decays and factors, by 8 rows: give(tile, row 0 to 7 ..) gets those that the
// diagonal crosses or that lie below it. What lies above it is 0.
template <class Give>
__device__ __forceinline__ void fill_column(const float (&product)[kC][kProductRow], const Token (&tokens)[kC],
                                            const Sum& own, float norm, Give&& give) {
    const int s = threadIdx.x % 32;
#pragma unroll 2
    for (int tile = 0; tile < kTiles; ++tile) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int t = tile * 8 + i;
            const float4 token = *reinterpret_cast<const float4*>(&tokens[t]);
            // Above the diagonal there may be anything in `product`.
            const float below =
                product[t][s] * (token.z * norm) * exp2_fast((token.x - own.high) + (token.y - own.low));
            x[i] = t < s ? 0.f : below;
        }
        give(tile, x);
    }
}

// The lane's column of T, by substitution.
__device__ __forceinline__ void solve_column(const float (&L)[kC][kColumn], float strength, HeadTileF32& out) {
    const int s = threadIdx.x % 32;
    float x[kC];
#pragma unroll
    for (int i = 0; i < kC; ++i) x[i] = i == s ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < kC - 1; ++j) {
#pragma unroll
        for (int i4 = (j + 1) / 4 * 4; i4 < kC; i4 += 4) {
            const float4 l = *reinterpret_cast<const float4*>(&L[j][i4]);
            if (i4 > j) x[i4] = fmaf(l.x, x[j], x[i4]);
            if (i4 + 1 > j) x[i4 + 1] = fmaf(l.y, x[j], x[i4 + 1]);
            if (i4 + 2 > j) x[i4 + 2] = fmaf(l.z, x[j], x[i4 + 2]);
            if (i4 + 3 > j) x[i4 + 3] = fmaf(l.w, x[j], x[i4 + 3]);
        }
    }
#pragma unroll
    for (int i = 0; i < kC; ++i)
        if (s / 8 <= i / 8) out.T[lower_tile(i / 8, s / 8) + i % 8 * 8 + s % 8] = x[i] * strength;
}

}  // namespace

// Blocks (key heads, chunks).
extern "C" __global__ void __launch_bounds__(kThreads, 4) chunk_prepare_f32(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int h = blockIdx.x, slot = blockIdx.y;
    const int n = p.N == 1 ? 0 : find_owner(p, p.first_chunk + slot);
    if (n < 0) return;
    const Sequence seq = find_sequence(p, n);
    const int chunk = p.first_chunk + slot - seq.chunk;
    if (chunk >= seq.chunks) return;
    const i64 start = static_cast<i64>(chunk) * kC;
    const int tokens = static_cast<int>(min(seq.length - start, static_cast<i64>(kC)));
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

    copy_tokens<kThreads>(sm.K, token_row(p.k, p.k_strides, seq, start, h), p.k_strides.token * 4, tokens, threadIdx.x);
    copy_tokens<kThreads>(sm.Q, token_row(p.q, p.q_strides, seq, start, h), p.q_strides.token * 4, tokens, threadIdx.x);
    const i64 from_a = seq.batch * p.a_strides.batch + (seq.first + start) * p.a_strides.token,
              from_b = seq.batch * p.b_strides.batch + (seq.first + start) * p.b_strides.token;
    GateBits bits;
    if (warp < 2 * p.group) bits.load(p, from_a, from_b, h * p.group + warp / 2, tokens);
    wait_copies();
    __syncthreads();
    if constexpr (kL2Norm) fill_norms(sm);
    if (warp % 2 == 0) multiply<0>(sm, warp / 2);
    else multiply<1>(sm, warp / 2);
    __syncthreads();

    const float key_norm = kL2Norm ? sm.norms[0][lane] : 1.f, query_norm = kL2Norm ? sm.norms[1][lane] : 1.f;
    Token(&own)[kC] = sm.tokens[warp];
#pragma unroll 1
    for (int i = warp; i < 2 * p.group; i += kWarps) {
        const int head = i / 2;
        const bool solves = (i + i / kWarps) % 2 == 0;  // in turn
        HeadTileF32& out =
            reinterpret_cast<HeadTileF32*>(p.head_tiles)[(static_cast<i64>(slot) * p.H + h) * p.group + head];
        Sum G;
        float strength;
        bits.finish(p, tokens, G, strength);
        if (i + kWarps < 2 * p.group) bits.load(p, from_a, from_b, h * p.group + (i + kWarps) / 2, tokens);
        __syncwarp();  // the last head's is read
        own[lane] = {G, solves ? -strength * key_norm : p.scale * query_norm};
        __syncwarp();
        if (solves) {
            float (&L)[kC][kColumn] = sm.L[warp];
            fill_column(sm.products[0], own, G, key_norm, [&](int tile, const float (&x)[8]) {
                *reinterpret_cast<float4*>(&L[lane][tile * 8]) = make_float4(x[0], x[1], x[2], x[3]);
                *reinterpret_cast<float4*>(&L[lane][tile * 8 + 4]) = make_float4(x[4], x[5], x[6], x[7]);
            });
            __syncwarp();
            solve_column(L, strength, out);
        } else {
            const Sum none = {0.f, 0.f};
            const float d = decay_unbiased(G, none);
            out.read[lane] = d * key_norm, out.query[lane] = d * (p.scale * query_norm);
            out.write[lane] = decay_unbiased(own[kC - 1].G, G) * key_norm;
            if (lane == kC - 1) out.d_last = d;
            fill_column(sm.products[1], own, G, key_norm, [&](int tile, const float (&x)[8]) {
                if (lane / 8 <= tile) {
#pragma unroll
                    for (int t = 0; t < 8; ++t) out.P[lower_tile(tile, lane / 8) + t * 8 + lane % 8] = x[t];
                }
            });
        }
    }
}
