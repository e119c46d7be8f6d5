// The walk of chunk_state.cu by warpgroups: K, Q, T and P are read from shared memory once for 64 columns instead of
// once for 16. Everything stays in the same registers as there, and products run beside the arithmetic between them:
//
//     X = S K^T                    meanwhile the previous chunk's outputs are stored
//     Y = S Q^T, first half        meanwhile W = V^T - d X
//     U = W T^T                    meanwhile S = d_last S
//     Y = S Q^T, second half       meanwhile e U
//     S = S + (e U) K              meanwhile Y = scaled_d Y
//     Y = Y + U P^T                meanwhile S is made the next chunk's left operand
//
// One warp a scheduler for each 64 columns does that, and what it issues is what takes the time: other warps bring what
// it reads and store its outputs.
//
// A stage is what a chunk has in shared memory: K and Q as `keys`, `V`, and the decays `d`, `scaled_d` and `e`.
//
// The including file says which is the first of these warps, kFirstWarp, and with kLean that others need the registers:
// what a step needs is then read in it, not a step before, and outputs are taken before the next chunk begins.
#pragma once

#include "gdr/chunk_state.cuh"
#include "gdr/tiles.cuh"
#include "gdr/wgmma.cuh"

namespace gdr {

static_assert(kColumns % 64 == 0 && kKeys <= 128);

// With kLean two warpgroups do not leave enough registers to read anything before it is needed.
constexpr bool kFew = kLean && kColumns == 128;

// T and P in shared memory, column after column of whole blocks: with zeros above the diagonal.
constexpr int kColumnBytes = kRows * kBlockBytes, kSquareBytes = kRows * kColumnBytes;
constexpr int kValueRow = kColumns * kValueBytes + 16;  // 8 rows of V in different banks
// With kLean V is in tiles of 64 columns (see tiles.cuh) instead.
constexpr int kValueTileBytes = kC * 128;

// Where a piece of 8 columns of a token's values lies.
__device__ __forceinline__ int value_offset(int token, int column) {
    if constexpr (kLean) return column / 64 * kValueTileBytes + token * 128 + turned_piece(token, column % 64 / 8) * 16;
    else return token * kValueRow + column * kValueBytes;
}

constexpr int kStorers = kColumns / 64;

// Outputs of a chunk: pieces of 8 columns, with 16 bytes a token. 8 pieces of a token lie in different banks.
constexpr int kPieceBytes = kC * 16 + 16, kPieces = kColumns / 8;

struct Outputs {
    char pieces[kCompose ? 16 : kPieces * kPieceBytes];
    Barrier full, empty;

    __device__ __forceinline__ void init() { full.init(kWarps), empty.init(kStorers); }
};

// ---- The warps that store outputs.

__device__ __forceinline__ void store_outputs(const Work& work, Outputs& outputs, int storer) {
    const int lane = threadIdx.x % 32, piece = lane % 8 + storer * 8;
    const char* from = outputs.pieces + piece * kPieceBytes + lane / 8 * 16;
    char* to = work.outputs;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const int tokens = work.tokens(chunk);
        outputs.full.wait(parity);
        parity ^= 1;
        constexpr int kAtOnce = kColumns == 128 ? 2 : 8;  // few registers there
#pragma unroll 1
        for (int first = 0; first < kC; first += 4 * kAtOnce) {
            u32 words[kAtOnce][4];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) load_shared16(shared_address(from) + (first + 4 * i) * 16, words[i]);
            if (first + 4 * kAtOnce == kC) {
                __syncwarp();
                if (lane == 0) outputs.empty.arrive();
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                store_chunk<kQkv, 8, kAligned>(to, 0, first + 4 * i + lane / 8 < tokens ? 8 : 0, words[i]);
                to += 4 * work.output_step;
            }
        }
    }
}

// ---- The warps that compute.

// c = a square (+ c), the square being T or P.
template <bool kTransposed>
__device__ __forceinline__ void multiply_square(Tile (&c)[kRows], const u32 (&a)[kRows][4], u32 square, bool add) {
    const Right right(square, kMatrixBytes, 2 * kMatrixBytes);
#pragma unroll
    for (int k = 0; k < kRows; ++k) multiply<Op, kTransposed>(c, a[k], right.at(k * kColumnBytes), add || k > 0);
}

// c = a keys (+ c) for the steps [kFirst, kLast) of the depth.
template <int kFirst, int kLast>
__device__ __forceinline__ void multiply_keys(Tile (&c)[kRows], const u32 (&a)[kWarpKeyBlocks][4], const Right& keys) {
#pragma unroll
    for (int k = kFirst; k < kLast; ++k) multiply<Op, false>(c, a[k], keys.at(key_block(0, k)), k > 0);
}

using PackedOutputs = u32[kRows][4];

__device__ __forceinline__ void put_outputs(Outputs& outputs, const PackedOutputs& o) {
    const int lane = threadIdx.x % 32, piece = (threadIdx.x / 32 - kFirstWarp) * 2 + lane / 8 % 2;
    const u32 to = shared_address(outputs.pieces) + piece * kPieceBytes + lane / 16 * 128 + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) store_matrices_transposed(to + i * 256, o[i]);
}

struct Decays {
    float2 x[kRows][2];

    __device__ __forceinline__ void load(const float* from) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) load(from, i);
    }
    __device__ __forceinline__ void load(const float* from, int i) {  // of 16 tokens
        const int lane = threadIdx.x % 32;
        if constexpr (kLean) {  // a lane's four lie side by side
            u32 words[4];
            load_shared16(shared_address(from) + (i * 16 + lane % 4 * 4) * 4, words);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                x[i][half] = make_float2(__uint_as_float(words[half * 2]), __uint_as_float(words[half * 2 + 1]));
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                x[i][half] = load_shared_pair(shared_address(from) + (i * 16 + half * 8 + lane % 4 * 2) * 4);
        }
    }
};

// What a warp keeps of a chunk and its columns from one product to the next.
struct Chunk {
    u32 left[kWarpKeyBlocks][4];  // S before it
    u32 W[kRows][4];
};

// Left operands of the state.
__device__ __forceinline__ void pack(const State& S, u32 (&left)[kWarpKeyBlocks][4]) {
#pragma unroll
    for (int k = 0; k < kWarpKeyBlocks; ++k) {
        left[k][0] = Op::pack(S[2 * k][0], S[2 * k][1]), left[k][1] = Op::pack(S[2 * k][2], S[2 * k][3]);
        left[k][2] = Op::pack(S[2 * k + 1][0], S[2 * k + 1][1]),
        left[k][3] = Op::pack(S[2 * k + 1][2], S[2 * k + 1][3]);
    }
}

// Shared memory answers late while products read it: what one step needs is asked for a step before.

// W, and the first half of Y's first product. `take_outputs` runs when X is on its way, before Y is begun, and
// `put` when both are.
template <class Stage, class TakeOutputs, class Put>
__device__ __forceinline__ void begin_chunk(const Stage& stage, Chunk& c, Tile (&Y)[kRows], TakeOutputs&& take_outputs,
                                            Put&& put) {
    const int lane = threadIdx.x % 32, column = (threadIdx.x / 32 - kFirstWarp) * 16;
    const u32 values = shared_address(stage.V) + value_offset(lane % 16, column + lane / 16 * 8);
    Decays d;
    u32 V[kRows][4];
    const auto load_values = [&](int i) { load_matrices_transposed(values + value_offset(i * 16, 0), V[i]); };
    if constexpr (!kFew) {
        d.load(stage.d);
#pragma unroll
        for (int i = 0; i < kRows; ++i) load_values(i);
    }
    const Right keys(shared_address(stage.keys), kKeyStep, kTokenStep);
    Tile X[kRows];
    pin(X);
    begin_products();
    multiply_keys<0, kWarpKeyBlocks>(X, c.left, keys);
    end_products();
    take_outputs();
    if constexpr (!kCompose) {
        const Right queries(shared_address(stage.keys) + kKeyTileBytes, kKeyStep, kTokenStep);
        pin(Y);
        begin_products();
        multiply_keys<0, kWarpKeyBlocks / 2>(Y, c.left, queries);
        end_products();
    }
    put();
    if constexpr (kFew) d.load(stage.d, 0), load_values(0), d.load(stage.d, 1), load_values(1);
    wait_products<kCompose || kFew ? 0 : 1>();
    pin(X);
    if constexpr (kFew) pin(Y);
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) {
        const int half = i % 2;
        if constexpr (kFew) {
            if (half == 0 && i / 2 + 2 < kRows) d.load(stage.d, i / 2 + 2), load_values(i / 2 + 2);
        }
        const float2 decay = d.x[i / 2][half];
        const float (&x)[4] = X[i / 2].x[half];
        const float2 top = values_of(V[i / 2][half]), bottom = values_of(V[i / 2][half + 2]);
        c.W[i / 2][half * 2] = Op::pack(fmaf(-decay.x, x[0], top.x), fmaf(-decay.y, x[1], top.y));
        c.W[i / 2][half * 2 + 1] = Op::pack(fmaf(-decay.x, x[2], bottom.x), fmaf(-decay.y, x[3], bottom.y));
    }
}

// From W to the state after the chunk, with T and then P at an address; the last product of Y is left on its way.
template <class Stage>
__device__ __forceinline__ void end_chunk(const Stage& stage, u32 T, State& S, const Chunk& c, Tile (&Y)[kRows]) {
    const u32 K = shared_address(stage.keys);
    const float d_last = load_shared(shared_address(&stage.d[kC - 1]));
    Decays e;
    e.load(stage.e);
    Tile U[kRows];
    pin(U);
    begin_products();
    multiply_square<true>(U, c.W, T, false);
    end_products();
    if constexpr (!kCompose) {
        multiply_keys<kWarpKeyBlocks / 2, kWarpKeyBlocks>(Y, c.left, Right(K + kKeyTileBytes, kKeyStep, kTokenStep));
        end_products();
    }
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) S[i / 4][i % 4] *= d_last;
    wait_products<kCompose ? 0 : 1>();
    pin(U);
    Decays d;
    if constexpr (!kCompose && !kFew) d.load(stage.scaled_d);

    u32 decayed[kRows][4];  // e U
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) {
        const int half = i % 2;
        const float2 decay = e.x[i / 2][half];
        const float (&u)[4] = U[i / 2].x[half];
        decayed[i / 2][half * 2] = Op::pack(u[0] * decay.x, u[1] * decay.y);
        decayed[i / 2][half * 2 + 1] = Op::pack(u[2] * decay.x, u[3] * decay.y);
    }
    if constexpr (!kCompose && kFew) d.load(stage.scaled_d);
    const Right keys(K, kTokenStep, kKeyStep);
    pin(S);
    begin_products();
#pragma unroll
    for (int k = 0; k < kRows; ++k) multiply<Op, true>(S, decayed[k], keys.at(key_block(k, 0)), true);
    end_products();
    if constexpr (!kCompose) {
        u32 plain[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) U[i].pack<Op>(plain[i]);
        wait_products<1>();
        pin(Y);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float (&y)[4] = Y[i].x[half];
                y[0] *= d.x[i][half].x, y[1] *= d.x[i][half].y, y[2] *= d.x[i][half].x, y[3] *= d.x[i][half].y;
            }
        }
        pin(Y);
        begin_products();
        multiply_square<false>(Y, plain, T + kSquareBytes, true);
        end_products();
    }
    wait_products<kCompose ? 0 : 1>();
    pin(S);
}

// Walks a block's chunks. Of `feed`, stage() has what the current chunk is and squares() where its T and P are, once
// wait() has returned; next() goes to the chunk after it, and release(), which every warp calls, gives back the stage
// of the one before, outputs() being where its outputs go. Where others make chunks from tokens, which takes long,
// give_back() takes outputs and stage before this waits for the next one.
template <class Feed>
__device__ __forceinline__ void compute(const Work& work, Feed& feed, State& S) {
    // By way of a reduction the compiler knows that all lanes have the same: the products' descriptors, which follow
    // from the round, then take no vector registers and few instructions.
    const int chunks = __reduce_max_sync(0xffffffffu, work.last - work.first);
    if (chunks <= 0) return;
    const int lane = threadIdx.x % 32;
    Chunk c;
    Tile Y[kRows];
    u32 outputs_parity = 1;  // the first chunk finds the place for outputs empty
    pack(S, c.left);
    // Where registers are few, values are read when the first products are on their way.
    const auto wait = [&] {
        feed.wait();
        if constexpr (kLean && !kFew) feed.wait_for_values();
    };
    const auto wait_late = [&] {
        if constexpr (kFew) feed.wait_for_values();
    };
    wait();
    begin_chunk(feed.stage(), c, Y, [] {}, wait_late);
    // No product is on its way from one round to the next: the compiler would wait for each on its own.
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_products<0>();
        pin(Y);
        if constexpr (kLean) feed.wait_for_squares();
        end_chunk(feed.stage(), feed.squares(), S, c, Y);
        PackedOutputs o;
        const auto take_outputs = [&] {
            if constexpr (!kCompose) {
                wait_products<kLean ? 0 : 1>();
                pin(Y);
#pragma unroll
                for (int i = 0; i < kRows; ++i) Y[i].pack<Operand<kQkv == kBFloat16>>(o[i]);
            }
        };
        if constexpr (kLean) pack(S, c.left), take_outputs(), feed.give_back(o);
        feed.next();
        if constexpr (!kLean) pack(S, c.left);
        // After the last chunk this runs on a stage that is not filled any more, for nothing.
        if (chunk + 1 < chunks) wait();
        if constexpr (kLean) {
            begin_chunk(
                feed.stage(), c, Y, [] {},
                [&] {
                    if (chunk + 1 < chunks) wait_late();
                });
        } else {
            begin_chunk(feed.stage(), c, Y, take_outputs, [&] {
                if constexpr (!kCompose) {
                    feed.outputs().empty.wait(outputs_parity);
                    outputs_parity ^= 1;
                    put_outputs(feed.outputs(), o);
                }
                __syncwarp();
                if (!kCompose && lane == 0) feed.outputs().full.arrive();
                feed.release();
            });
        }
    }
    wait_products<0>();
    pin(Y);
}

}  // namespace gdr
