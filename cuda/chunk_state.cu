// The walk from chunk to chunk: outputs and states, with T, P, the decays and the operands K and Q from
// chunk_prepare. See gdr/chunk.cuh for the formulas and the workspace.
//
// A block has kColumns columns of one value head's state of one sequence. A warp has 16 columns and the keys of one of
// kSplit splits, as S = h^T: 16 columns x kWarpKeys keys in float32 accumulators, from the first token to the last.
// The columns are the rows of every product's left operand, which thereby is always made from accumulators in the
// same registers; K, Q, T and P are right operands, read from shared memory.
//
//     X = S K^T,  Y = S Q^T                 over the warp's keys; the splits exchange their parts through shared memory
//     W = V^T - d X,  U = W T^T             all tokens, in every split
//     O^T = scaled_d Y + U P^T              for the warp's share of the tokens
//     S = d_last S + (e U) K
//
// Tiles arrive kStages chunks ahead: the copy engine brings the workspace (sm_90; cp.async before), cp.async V.
//
//   GDR_COLUMNS, GDR_SPLIT, GDR_STAGES    kColumns, kSplit, kStages
// requires: sm_80
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = GDR_SPLIT, kStages = GDR_STAGES;
constexpr bool kCompose = false;
}  // namespace gdr

#include "gdr/chunk_state.cuh"

using namespace gdr;

namespace {

constexpr int kOwnRows = kRows / kSplit;  // blocks of 16 tokens whose outputs a warp finishes
static_assert(kSplit == 1 || kSplit == 2);

// A chunk in shared memory.
struct alignas(128) Stage {
    char K[kKeyTileBytes], Q[kKeyTileBytes];
    HeadTile head;
    // Values: blocks of 16 tokens x 16 columns, by tokens first, with the matrices (tokens 0-7, columns 0-7),
    // (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    char V[kC * kColumns * kValueBytes];
};
struct Stages {
    Stage stages[kStages];
    Barrier full[kStages];
};

// ---- Copies.

// The pieces of 16 bytes of a chunk's values that a thread copies are kPieceTokens tokens apart. 8 neighbouring threads
// fill one matrix.
constexpr int kPieceTokens = 16 * kSplit;
__device__ __forceinline__ int piece_token() { return threadIdx.x / kColumns * 8 + threadIdx.x % 8; }
__device__ __forceinline__ int piece_column8() { return threadIdx.x / 8 % (kColumns / 8); }

__device__ __forceinline__ void copy_values(const Work& work, Stage& stage, int chunk) {
    const int token = piece_token(), column8 = piece_column8(), tokens = work.tokens(chunk);
    const char* from = work.values + static_cast<i64>(chunk) * kC * work.value_step;
    char* to = stage.V + (token / 16 * (kColumns / 16) + column8 / 2) * kBlockBytes + column8 % 2 * 256 +
               token / 8 % 2 * 128 + token % 8 * 16;
#pragma unroll
    for (int i = 0; i < kC / kPieceTokens; ++i) {
        const bool exists = token + i * kPieceTokens < tokens;
        if constexpr (kAligned) {
            copy16(shared_address(to), exists ? from : work.values, exists);
        } else {
            u32 words[4];
            load_chunk<kQkv, 8, false>(from, 0, exists ? 8 : 0, words);
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        from += kPieceTokens * work.value_step;
        to += kPieceTokens / 16 * (kColumns / 16) * kBlockBytes;
    }
}

// Every thread calls it; the stage's barrier completes once all has landed.
__device__ __forceinline__ void copy_chunk(const Params& p, const Work& work, Stage& stage, Barrier& full, int chunk) {
    const i64 slot = work.seq.chunk + chunk - p.first_chunk;
    const char* keys = p.key_tiles + (slot * p.H + work.hv / p.group) * (2 * kKeyTileBytes);
    const char* head = p.head_tiles + (slot * (p.H * p.group) + work.hv) * sizeof(HeadTile);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        full.arrive_expect(2 * kKeyTileBytes + sizeof(HeadTile));
        full.copy_bulk(shared_address(stage.K), keys, 2 * kKeyTileBytes);
        full.copy_bulk(shared_address(&stage.head), head, sizeof(HeadTile));
    }
#else
    for (int i = threadIdx.x; i < 2 * kKeyTileBytes / 16; i += kThreads)
        copy16(shared_address(stage.K) + i * 16, keys + i * 16, true);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadTile)) / 16; i += kThreads)
        copy16(shared_address(&stage.head) + i * 16, head + i * 16, true);
#endif
    copy_values(work, stage, chunk);
    if constexpr (!kAligned) __threadfence_block();
    full.arrive_after_copies();
}

constexpr int kArrivals = kThreads +
#if __CUDA_ARCH__ >= 900
                          1;
#else
                          0;
#endif

// What two warps of the same columns give each other: X of all tokens and Y of the other's, a float4 a lane and tile.
struct Exchange {
    float4 X[kRows][2][32], Y[kOwnRows][2][32];
};

struct Shared {
    Stages copies;
    alignas(16) Exchange exchange[kWarps][2];  // by warp and parity of the chunk; not there with one split
};

// Blocks of 16 tokens in the warp's order: first those whose outputs it finishes. Two splits take 0, 3 and 1, 2: the
// same number of blocks of P.
__device__ __forceinline__ int token_block(int split, int i) {
    if constexpr (kSplit == 1) return i;
    return i < 2 ? (i == 0 ? split : 3 - split) : (i == 2 ? 1 - split : 2 + split);
}

__device__ __forceinline__ void add(Tile& x, const float4 (&y)[2][32], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float4 z = y[half][lane];
        x.x[half][0] += z.x, x.x[half][1] += z.y, x.x[half][2] += z.z, x.x[half][3] += z.w;
    }
}

__device__ __forceinline__ void give(float4 (&y)[2][32], const Tile& x, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
        y[half][lane] = make_float4(x.x[half][0], x.x[half][1], x.x[half][2], x.x[half][3]);
}

template <class Refill>
__device__ __forceinline__ void do_chunk(const Work& work, Shared& sm, const Stage& stage, State& S, int chunk,
                                         Refill&& refill) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = warp % kSplit, row = warp / kSplit;
    const u32 K = shared_address(stage.K) + key_block(0, split * kWarpKeyBlocks);
    const u32 Q = K + kKeyTileBytes, T = shared_address(stage.head.T) + in_order(lane),
              P = shared_address(stage.head.P) + in_order(lane);

    Tile X[kRows], Y[kRows];  // X by tokens, Y in the warp's order
    {
        u32 left[kWarpKeyBlocks][4];
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k) {
            left[k][0] = Op::pack(S[2 * k][0], S[2 * k][1]), left[k][1] = Op::pack(S[2 * k][2], S[2 * k][3]);
            left[k][2] = Op::pack(S[2 * k + 1][0], S[2 * k + 1][1]),
            left[k][3] = Op::pack(S[2 * k + 1][2], S[2 * k + 1][3]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            X[i].clear(), Y[i].clear();
        }
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                u32 b[4];
                load_matrices(K + key_block(i, k) + by_keys(lane), b);
                X[i].add_product<Op>(left[k], b);
            }
        }
        if constexpr (kSplit == 2) {
            Exchange& mine = sm.exchange[warp][chunk % 2];
#pragma unroll
            for (int i = 0; i < kRows; ++i) give(mine.X[i], X[i], lane);
        }
#pragma unroll
        for (int k = 0; k < kWarpKeyBlocks; ++k) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                u32 b[4];
                load_matrices(Q + key_block(token_block(split, i), k) + by_keys(lane), b);
                Y[i].add_product<Op>(left[k], b);
            }
        }
    }
    if constexpr (kSplit == 2) {
        Exchange& mine = sm.exchange[warp][chunk % 2];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) give(mine.Y[i], Y[kOwnRows + i], lane);
    }
    __syncthreads();
    refill();
    if constexpr (kSplit == 2) {
        const Exchange& other = sm.exchange[warp ^ 1][chunk % 2];
#pragma unroll
        for (int i = 0; i < kRows; ++i) add(X[i], other.X[i], lane);
        // The other warp's last blocks are this one's first, in the order of token_block.
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) add(Y[i], other.Y[i], lane);
    }

    // W, as the left operand of the next product.
    u32 W[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        u32 v[4];
        load_matrices_transposed(shared_address(stage.V) + (i * (kColumns / 16) + row) * kBlockBytes + in_order(lane),
                                 v);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 d = *reinterpret_cast<const float2*>(&stage.head.d[i * 16 + half * 8 + lane % 4 * 2]);
            float (&x)[4] = X[i].x[half];
            const float2 top = values_of(v[half]), bottom = values_of(v[half + 2]);
            W[i][half * 2] = Op::pack(fmaf(-d.x, x[0], top.x), fmaf(-d.y, x[1], top.y));
            W[i][half * 2 + 1] = Op::pack(fmaf(-d.x, x[2], bottom.x), fmaf(-d.y, x[3], bottom.y));
        }
    }
    Tile U[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) U[i].clear();
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int i = k; i < kRows; ++i) {
            u32 b[4];
            load_matrices_transposed(T + lower_block(i, k), b);
            U[i].add_product<Op>(W[k], b);
        }
    }
    u32 plain[kRows][4], decayed[kRows][4];  // U and e U
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        U[i].pack<Op>(plain[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 e = *reinterpret_cast<const float2*>(&stage.head.e[i * 16 + half * 8 + lane % 4 * 2]);
            float (&u)[4] = U[i].x[half];
            decayed[i][half * 2] = Op::pack(u[0] * e.x, u[1] * e.y),
                              decayed[i][half * 2 + 1] = Op::pack(u[2] * e.x, u[3] * e.y);
        }
    }

    const float d_last = stage.head.d[kC - 1];
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) S[j][i] *= d_last;
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int j = 0; j < kWarpKeyBlocks; ++j) {
            u32 b[4];
            load_matrices_transposed(K + key_block(k, j) + by_tokens(lane), b);
            Op::mma(S[2 * j], decayed[k], b[0], b[1]);
            Op::mma(S[2 * j + 1], decayed[k], b[2], b[3]);
        }
    }

    const int tokens = work.tokens(chunk);
    char* to = work.outputs + static_cast<i64>(chunk) * kC * work.output_step;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
        const int block = token_block(split, i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 d =
                *reinterpret_cast<const float2*>(&stage.head.scaled_d[block * 16 + half * 8 + lane % 4 * 2]);
            float (&y)[4] = Y[i].x[half];
            y[0] *= d.x, y[1] *= d.y, y[2] *= d.x, y[3] *= d.y;
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            if (k > block) break;
            u32 b[4];
            load_matrices(P + lower_block(block, k), b);
            Y[i].add_product<Op>(plain[k], b);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = block * 16 + half * 8;
            u32 pairs[2];
            pack_pairs(Y[i].x[half], pairs);
            store_pairs(to + token * work.output_step, pairs, token + lane / 4 < tokens);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) chunk_state(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    Stages& stages = sm.copies;
    const int warp = threadIdx.x / 32;
    Work work;
    if (!find_work(p, work)) return;
    const int column = work.first_column + warp / kSplit * 16, first_key = warp % kSplit * kWarpKeys;
    const int lane = threadIdx.x % 32;
    find_tokens(p, work, piece_token(), piece_column8(), lane / 4, column + lane % 4 * 2);

    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) stages.full[i].init(kArrivals);
        Barrier::publish_inits();
    }
    __syncthreads();
    for (int i = 0; i < kStages - 1; ++i)
        if (work.first + i < work.last) copy_chunk(p, work, stages.stages[i], stages.full[i], work.first + i);

    State S;
    load_state(p, work, S, column, first_key);
    int stage = 0, filled = kStages - 1;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        stages.full[stage].wait(parity);
        do_chunk(work, sm, stages.stages[stage], S, chunk, [&] {
            const int next = chunk + kStages - 1;
            if (next < work.last) copy_chunk(p, work, stages.stages[filled], stages.full[filled], next);
        });
        filled = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    save_state(p, work, S, column, first_key);
}
