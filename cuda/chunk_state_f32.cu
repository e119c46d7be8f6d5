// The walk from chunk to chunk in float32: outputs and states, with T, P and factors from chunk_prepare_f32. See
// gdr/chunk.cuh for the formulas and gdr/chunk_f32.cuh for the products and the workspace.
//
// As chunk_state, with chunks of 32 tokens. A warp has 16 of the block's value columns and every kSplit-th 16 keys of
// the state S = h^T in float32 registers.
//
//     X = S K^T,  Y = S Q^T                 over the warp's keys; the splits exchange their parts through shared memory
//     W = V^T - read X,  U = W T^T          all tokens, in every split
//     O^T = query Y + U P^T                 for the warp's share of the tokens
//     S = d_last S + (write U) K
//
// One more warp brings K, Q and V from where the caller has them, and the workspace, up to kStages chunks ahead.
//
//   GDR_COLUMNS, GDR_SPLIT, GDR_STAGES    kColumns, kSplit, kStages
// requires: sm_80
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = GDR_SPLIT, kStages = GDR_STAGES;
constexpr bool kCompose = false;
}  // namespace gdr

#include "gdr/chunk_f32.cuh"
#include "gdr/chunk_state.cuh"

using namespace gdr;

namespace {

constexpr int kOwnTiles = kTiles / kSplit;  // tiles of 8 tokens whose outputs a warp finishes
constexpr int kGroups = kWarpKeys / 16;     // of 16 keys
static_assert(kSplit == 2 || kSplit == 4);

// A chunk in shared memory.
struct alignas(128) Stage {
    char K[kTokenBytes], Q[kTokenBytes];
    HeadTileF32 head;
    float V[kC][kColumns + 4];  // 4 rows, 2 apart, in different banks
};

// What a warp gives the others of the same columns: its part of X of all tokens, and of Y of theirs.
struct Exchange {
    float4 X[kTiles][32], Y[kTiles - kOwnTiles][32];
};

struct Shared {
    Stage stages[kStages];
    Barrier full[kStages], empty[kStages];
    alignas(16) Exchange exchange[kWarps][2];  // by warp and parity of the chunk
};

// ---- The warp that brings chunks.

constexpr int kArrivals = 32 +
#if __CUDA_ARCH__ >= 900
                          1;
#else
                          0;
#endif

__device__ __forceinline__ void bring_head(const char* from, Stage& stage, Barrier& full, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        full.arrive_expect(HeadTileF32::kUsed);
        full.copy_bulk(shared_address(&stage.head), from, HeadTileF32::kUsed);
    }
#else
    for (int i = lane; i < HeadTileF32::kUsed / 16; i += 32)
        copy16(shared_address(&stage.head) + i * 16, from + i * 16, true);
#endif
}

__device__ __forceinline__ void bring_values(const char* from, i64 step, Stage& stage, int tokens, int lane) {
    constexpr int kAcross = kColumns / 4, kDown = 32 / kAcross;
    const int across = lane % kAcross, down = lane / kAcross;
    from += down * step + across * 16;
#pragma unroll
    for (int token = 0; token < kC; token += kDown) {
        const bool exists = token + down < tokens;
        float* const to = &stage.V[token + down][across * 4];
        if constexpr (kAligned) {
            copy16(shared_address(to), from, exists);
        } else {
            u32 words[4];
            load_chunk<kFloat32, 4, false>(from, 0, exists ? 4 : 0, words);
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        from += kDown * step;
    }
}

__device__ __forceinline__ void bring_chunks(const Params& p, const Work& work, Shared& sm) {
    const int lane = threadIdx.x % 32;
    const i64 first = static_cast<i64>(work.first) * kC, slot = work.seq.chunk + work.first - p.first_chunk;
    const i64 k_step = p.k_strides.token * kValueBytes, q_step = p.q_strides.token * kValueBytes;
    const i64 head_step = static_cast<i64>(p.H * p.group) * sizeof(HeadTileF32);
    const char* k = token_row(p.k, p.k_strides, work.seq, first, work.hv / p.group);
    const char* q = token_row(p.q, p.q_strides, work.seq, first, work.hv / p.group);
    const char* v = work.values + first * work.value_step;
    const char* head = p.head_tiles + slot * head_step + work.hv * sizeof(HeadTileF32);
    int stage = 0;
    u32 parity = 1;  // the first round finds every stage empty
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const int tokens = work.tokens(chunk);
        Stage& to = sm.stages[stage];
        sm.empty[stage].wait(parity);
        bring_head(head, to, sm.full[stage], lane);
        copy_tokens<32>(to.K, k, k_step, tokens, lane);
        copy_tokens<32>(to.Q, q, q_step, tokens, lane);
        bring_values(v, work.value_step, to, tokens, lane);
        if constexpr (!kAligned) __threadfence_block();
        sm.full[stage].arrive_after_copies();
        k += kC * k_step, q += kC * q_step, v += kC * work.value_step, head += head_step;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_copies();
}

// ---- Splits.

// Tiles of 8 tokens in the warp's order: first those whose outputs it finishes. Two splits take 0, 3 and 1, 2: the same
// number of tiles of P.
__device__ __forceinline__ int token_tile(int split, int i) {
    if constexpr (kSplit == 4) return (split + i) % 4;
    return i < 2 ? (i == 0 ? split : 3 - split) : (i == 2 ? 1 - split : 2 + split);
}
// Where among the tiles that split `from` gives away lies that with place i in the order of split `to`.
__device__ __forceinline__ int given_tile(int from, int to, int i) { return kSplit == 4 ? (to + 4 - from) % 4 - 1 : i; }

__device__ __forceinline__ void give(float4 (&to)[32], const float (&x)[4], int lane) {
    to[lane] = make_float4(x[0], x[1], x[2], x[3]);
}

// x plus the parts of the other splits, added in one order whatever the split: what(warp) is that warp's part.
template <class What>
__device__ __forceinline__ void gather(float (&x)[4], int warp, int lane, What&& what) {
    const float4 y = what(warp ^ 1)[lane];
    x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    if constexpr (kSplit == 4) {
        const float4 a = what(warp ^ 2)[lane], b = what(warp ^ 3)[lane];
        x[0] += a.x + b.x, x[1] += a.y + b.y, x[2] += a.z + b.z, x[3] += a.w + b.w;
    }
}

// ---- A chunk.

__device__ __forceinline__ float4 load4(const char* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float2 load2(const void* from) { return *reinterpret_cast<const float2*>(from); }

// c[n] = a b of several tiles with a contraction of few steps: three sums, so that little waits.
struct Sums {
    float high[4] = {}, left[4] = {}, right[4] = {};

    __device__ __forceinline__ void add(const Left& a, const float2& x) {
        Right b;
        b.set(x.x, x.y);
        mma_tf32(left, a.low, b.high[0], b.high[1]);
        mma_tf32(right, a.high, b.low[0], b.low[1]);
        mma_tf32(high, a.high, b.high[0], b.high[1]);
    }
    __device__ __forceinline__ float operator[](int i) const { return high[i] + (left[i] + right[i]); }
};

__device__ __forceinline__ void do_chunk(const Work& work, Shared& sm, const Stage& stage, State& S, int chunk) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = warp % kSplit;
    const int column = warp / kSplit * 16 + lane / 4;  // of the block
    const HeadTileF32& head = stage.head;

    float Z[2 * kTiles][4];  // X by tokens, Y in the warp's order
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) Z[i][j] = 0.f;
    }
    const char* const by_keys = stage.K + by_keys_f32(lane, split);
    const char* query_tiles[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) query_tiles[i] = by_keys + kTokenBytes + token_tile(split, i) * 8 * kRowBytes;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
        float4 keys[2 * kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            keys[i] = load4(by_keys + i * 8 * kRowBytes + m * kSplit * 64);
            keys[kTiles + i] = load4(query_tiles[i] + m * kSplit * 64);
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            Left a;
            a.set(S[2 * m][step], S[2 * m][step + 2], S[2 * m + 1][step], S[2 * m + 1][step + 2]);
            Right b[2 * kTiles];
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i)
                b[i].set(step == 0 ? keys[i].x : keys[i].z, step == 0 ? keys[i].y : keys[i].w);
            add_products(Z, a, b);
        }
    }
    float (&X)[kTiles][4] = *reinterpret_cast<float (*)[kTiles][4]>(Z);
    float (&Y)[kTiles][4] = *reinterpret_cast<float (*)[kTiles][4]>(Z + kTiles);
    Exchange(&exchange)[kWarps][2] = sm.exchange;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) give(exchange[warp][chunk % 2].X[i], X[i], lane);
#pragma unroll
    for (int i = kOwnTiles; i < kTiles; ++i) give(exchange[warp][chunk % 2].Y[i - kOwnTiles], Y[i], lane);
    sync_threads(1 + warp / kSplit, 32 * kSplit);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) gather(X[i], warp, lane, [&](int w) { return exchange[w][chunk % 2].X[i]; });
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
        gather(Y[i], warp, lane, [&](int w) { return exchange[w][chunk % 2].Y[given_tile(w % kSplit, split, i)]; });
    }

    Sums U[kTiles];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
        const int token = k * 8 + lane % 4 * 2;
        const float2 read = load2(&head.read[token]);
        const float* V = &stage.V[token][column];
        constexpr int kNext = kColumns + 4;
        Left W;
        W.set(fmaf(-read.x, X[k][0], V[0]), fmaf(-read.x, X[k][2], V[8]), fmaf(-read.y, X[k][1], V[kNext]),
              fmaf(-read.y, X[k][3], V[kNext + 8]));
#pragma unroll
        for (int i = k; i < kTiles; ++i) U[i].add(W, load2(&head.T[lower_tile(i, k) + lane * 2]));
    }
    Left plain[kTiles], weighted[kTiles];  // U and write U
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const float u[4] = {U[i][0], U[i][1], U[i][2], U[i][3]};
        const float2 write = load2(&head.write[i * 8 + lane % 4 * 2]);
        plain[i].set(u);
        weighted[i].set(u[0] * write.x, u[2] * write.x, u[1] * write.y, u[3] * write.y);
    }

    const int tokens = work.tokens(chunk);
    char* const to = work.outputs + static_cast<i64>(chunk) * kC * work.output_step;
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
        const int tile = token_tile(split, i);
        Sums sums;
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
            if (k > tile) break;
            sums.add(plain[k], load2(&head.P[lower_tile(tile, k) + lane * 2]));
        }
        const float2 query = load2(&head.query[tile * 8 + lane % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = tile * 8 + j % 2;
            if (token + lane % 4 * 2 < tokens)
                *reinterpret_cast<float*>(to + token * work.output_step + j / 2 * 8 * kValueBytes) =
                    fmaf(j % 2 ? query.y : query.x, Y[i][j], sums[j]);
        }
    }

    const float d_last = head.d_last;
    const char* const even = stage.K + by_tokens_f32(lane, split, 0);
    const char* const odd = stage.K + by_tokens_f32(lane, split, 1);
    constexpr int kAtOnce = kGroups % 2 == 0 ? 2 : 1;  // groups of 16 keys
#pragma unroll
    for (int m = 0; m < kGroups; m += kAtOnce) {
        float sums[2 * kAtOnce][4] = {};
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
            Right b[2 * kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int offset = k * 8 * kRowBytes + (m + j) * kSplit * 64;
                const float2 x = load2(even + offset), y = load2(odd + offset);
                b[2 * j].set(x.x, y.x), b[2 * j + 1].set(x.y, y.y);
            }
            add_products(sums, weighted[k], b);
        }
#pragma unroll
        for (int j = 0; j < 2 * kAtOnce; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) S[2 * m + j][i] = fmaf(d_last, S[2 * m + j][i], sums[j][i]);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads + 32, 1) chunk_state_f32(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    Work work;
    if (!find_work(p, work)) return;
    const int column = work.first_column + warp / kSplit * 16, first_key = warp % kSplit * 16;
    find_tokens(p, work, 0, 0, lane % 4 * 2, column + lane / 4);

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.full[i].init(kArrivals), sm.empty[i].init(kWarps);
        Barrier::publish_inits();
    }
    __syncthreads();
    if (warp == kWarps) {
        bring_chunks(p, work, sm);
        return;
    }
    State S;
    load_state(p, work, S, column, first_key);
    int stage = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        sm.full[stage].wait(parity);
        do_chunk(work, sm, sm.stages[stage], S, chunk);
        __syncwarp();
        if (lane == 0) sm.empty[stage].arrive();
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    save_state(p, work, S, column, first_key);
}
