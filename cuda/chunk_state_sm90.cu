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
// The first warps do that, one a scheduler for each 64 columns: what they issue is what takes the time. So two other
// warps bring tiles and values, up to kStages chunks ahead, and others store outputs.
//
//   GDR_COLUMNS, GDR_STAGES    value columns of a block (a multiple of 64), chunks in shared memory
//   GDR_COMPOSE                the walk that finds the maps of segments
// requires: sm_90
// options: -arch=sm_90a
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = 1, kStages = GDR_STAGES;
constexpr bool kCompose = GDR_COMPOSE;
}  // namespace gdr

#include "gdr/chunk_state.cuh"
#include "gdr/wgmma.cuh"

using namespace gdr;

namespace {

static_assert(kColumns % 64 == 0 && kKeys <= 128);

// T and P in shared memory, column after column of whole blocks: with zeros above the diagonal.
constexpr int kColumnBytes = kRows * kBlockBytes, kSquareBytes = kRows * kColumnBytes;
constexpr int kDecayBytes = 3 * kC * 4;
constexpr int kValueRow = kColumns * kValueBytes + 16;  // 8 rows in different banks
// A chunk in shared memory. Composing needs neither Q nor P.
struct alignas(128) Stage {
    static constexpr int kWith = kCompose ? 1 : 2;
    static constexpr int kSquaresAt = kWith * kKeyTileBytes, kDecaysAt = kSquaresAt + kWith * kSquareBytes;
    char keys[kWith * kKeyTileBytes];    // K, Q
    char squares[kWith * kSquareBytes];  // T, P
    float d[kC], scaled_d[kC], e[kC];
    char V[kC * kValueRow];
};

// Outputs of a chunk: pieces of 8 columns, with 16 bytes a token. 8 pieces of a token lie in different banks.
constexpr int kPieceBytes = kC * 16 + 16, kPieces = kColumns / 8;

struct Shared {
    Stage stages[kStages];
    char outputs[kCompose ? 16 : kPieces * kPieceBytes];
    Barrier full[kStages], empty[kStages], outputs_full, outputs_empty;
};

// ---- The warps that bring a chunk's tiles and values.

// What the copy engine brings, a piece a lane.
__device__ __forceinline__ void bring_tiles(const Params& p, const Work& work, Shared& sm) {
    constexpr int kKeyBytes = sizeof(sm.stages[0].keys), kSquares = Stage::kWith;
    constexpr int kBytes = kKeyBytes + kSquares * kLowerBlocks * kBlockBytes + kDecayBytes;
    // Columns of T and P from the diagonal down, decays, keys.
    constexpr int kDecays = kSquares * kRows, kKeysLane = kDecays + 1;
    const int lane = threadIdx.x % 32;
    const i64 slot = work.seq.chunk + work.first - p.first_chunk;
    const i64 key_step = static_cast<i64>(p.H) * (2 * kKeyTileBytes);
    const i64 head_step = static_cast<i64>(p.H * p.group) * sizeof(HeadTile);
    const char* from;
    i64 step;
    u32 to, bytes;
    if (lane < kDecays) {
        const int j = lane % kRows;
        from = p.head_tiles + lane / kRows * (kLowerBlocks * kBlockBytes) + lower_block(j, j);
        to = Stage::kSquaresAt + lane / kRows * kSquareBytes + j * (kColumnBytes + kBlockBytes);
        bytes = (kRows - j) * kBlockBytes;
    } else if (lane == kDecays) {
        from = p.head_tiles + 2 * kLowerBlocks * kBlockBytes, to = Stage::kDecaysAt, bytes = kDecayBytes;
    } else {
        from = p.key_tiles, to = 0, bytes = kKeyBytes;
    }
    if (lane < kKeysLane) {
        from += slot * head_step + work.hv * static_cast<i64>(sizeof(HeadTile)), step = head_step;
    } else {
        from += slot * key_step + work.hv / p.group * (2 * kKeyTileBytes), step = key_step;
    }
    int stage = 0;
    u32 parity = 1;  // the first round finds every stage empty
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        Barrier& full = sm.full[stage];
        sm.empty[stage].wait(parity);
        if (lane == 0) full.arrive_expect(kBytes);
        __syncwarp();
        if (lane <= kKeysLane) full.copy_bulk(shared_address(&sm.stages[stage]) + to, from, bytes);
        from += step;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
}

// Lane l copies 16 bytes of token l / 8 of every 4: whole lines of memory to whole rows.
__device__ __forceinline__ void bring_values(const Work& work, Shared& sm) {
    const int lane = threadIdx.x % 32;
    const char* from = work.values + work.first * (kC * work.value_step);
    int stage = 0;
    u32 parity = 1;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const int tokens = work.tokens(chunk);
        sm.empty[stage].wait(parity);
        char* to = sm.stages[stage].V + lane / 8 * kValueRow + lane % 8 * 16;
        if (!kCompose || work.first_column < kV) {
#pragma unroll 4
            for (int token = 0; token < kC; token += 4) {
                const bool exists = token + lane / 8 < tokens;
#pragma unroll
                for (int i = 0; i < kColumns / 64; ++i) {
                    char* there = to + token * kValueRow + i * 128;
                    if constexpr (kAligned) {
                        copy16(shared_address(there), exists ? from + i * 128 : work.values, exists);
                    } else {
                        u32 words[4];
                        load_chunk<kQkv, 8, false>(from, i * 64, exists ? 8 : 0, words);
                        *reinterpret_cast<uint4*>(there) = make_uint4(words[0], words[1], words[2], words[3]);
                    }
                }
                from += 4 * work.value_step;
            }
        }
        if constexpr (!kAligned) __threadfence_block();
        sm.full[stage].arrive_after_copies();
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_copies();
}

// Zeros for what no copy fills: above the diagonals, and the values of a map's columns.
__device__ __forceinline__ void zero_rest(const Work& work, Stage& stage) {
    const auto zero = [](char* to, int bytes) {
        for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
            reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
    };
    zero(stage.squares, sizeof(stage.squares));
    if (work.first_column >= kV) zero(stage.V, sizeof(stage.V));
}

// ---- The warps that store outputs.

constexpr int kStorers = kColumns / 64;

__device__ __forceinline__ void store_outputs(const Work& work, Shared& sm, int storer) {
    const int lane = threadIdx.x % 32, piece = lane % 8 + storer * 8;
    const char* from = sm.outputs + piece * kPieceBytes + lane / 8 * 16;
    char* to = work.outputs;
    u32 parity = 0;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const int tokens = work.tokens(chunk);
        sm.outputs_full.wait(parity);
        parity ^= 1;
        constexpr int kAtOnce = kColumns == 128 ? 2 : 8;  // few registers there
#pragma unroll 1
        for (int first = 0; first < kC; first += 4 * kAtOnce) {
            u32 words[kAtOnce][4];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) load_shared16(shared_address(from) + (first + 4 * i) * 16, words[i]);
            if (first + 4 * kAtOnce == kC) {
                __syncwarp();
                if (lane == 0) sm.outputs_empty.arrive();
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

__device__ __forceinline__ void put_outputs(Shared& sm, const PackedOutputs& o) {
    const int lane = threadIdx.x % 32, piece = threadIdx.x / 32 * 2 + lane / 8 % 2;
    const u32 to = shared_address(sm.outputs) + piece * kPieceBytes + lane / 16 * 128 + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) store_matrices_transposed(to + i * 256, o[i]);
}

struct Decays {
    float2 x[kRows][2];

    __device__ __forceinline__ void load(const float* from) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kC / 8; ++i)
            x[i / 2][i % 2] = load_shared_pair(shared_address(from) + (i * 8 + lane % 4 * 2) * 4);
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
template <class TakeOutputs, class Put>
__device__ __forceinline__ void begin_chunk(const Stage& stage, Chunk& c, Tile (&Y)[kRows], TakeOutputs&& take_outputs,
                                            Put&& put) {
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16;
    const u32 values = shared_address(stage.V) + lane % 16 * kValueRow + (column + lane / 16 * 8) * kValueBytes;
    Decays d;
    d.load(stage.d);
    u32 V[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_matrices_transposed(values + i * 16 * kValueRow, V[i]);
    const Right keys(shared_address(stage.keys), kKeyStep, kMatrixBytes);
    Tile X[kRows];
    pin(X);
    begin_products();
    multiply_keys<0, kWarpKeyBlocks>(X, c.left, keys);
    end_products();
    take_outputs();
    if constexpr (!kCompose) {
        const Right queries(shared_address(stage.keys) + kKeyTileBytes, kKeyStep, kMatrixBytes);
        pin(Y);
        begin_products();
        multiply_keys<0, kWarpKeyBlocks / 2>(Y, c.left, queries);
        end_products();
    }
    put();
    wait_products<kCompose ? 0 : 1>();
    pin(X);
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) {
        const int half = i % 2;
        const float2 decay = d.x[i / 2][half];
        const float (&x)[4] = X[i / 2].x[half];
        const float2 top = values_of(V[i / 2][half]), bottom = values_of(V[i / 2][half + 2]);
        c.W[i / 2][half * 2] = Op::pack(fmaf(-decay.x, x[0], top.x), fmaf(-decay.y, x[1], top.y));
        c.W[i / 2][half * 2 + 1] = Op::pack(fmaf(-decay.x, x[2], bottom.x), fmaf(-decay.y, x[3], bottom.y));
    }
}

// From W to the state after the chunk; the last product of Y is left on its way.
__device__ __forceinline__ void end_chunk(const Stage& stage, State& S, const Chunk& c, Tile (&Y)[kRows]) {
    const u32 K = shared_address(stage.keys), T = shared_address(stage.squares);
    const float d_last = load_shared(shared_address(&stage.d[kC - 1]));
    Decays e;
    e.load(stage.e);
    Tile U[kRows];
    pin(U);
    begin_products();
    multiply_square<true>(U, c.W, T, false);
    end_products();
    if constexpr (!kCompose) {
        multiply_keys<kWarpKeyBlocks / 2, kWarpKeyBlocks>(Y, c.left, Right(K + kKeyTileBytes, kKeyStep, kMatrixBytes));
        end_products();
    }
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) S[i / 4][i % 4] *= d_last;
    wait_products<kCompose ? 0 : 1>();
    pin(U);
    Decays d;
    if constexpr (!kCompose) d.load(stage.scaled_d);

    u32 decayed[kRows][4];  // e U
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) {
        const int half = i % 2;
        const float2 decay = e.x[i / 2][half];
        const float (&u)[4] = U[i / 2].x[half];
        decayed[i / 2][half * 2] = Op::pack(u[0] * decay.x, u[1] * decay.y);
        decayed[i / 2][half * 2 + 1] = Op::pack(u[2] * decay.x, u[3] * decay.y);
    }
    const Right keys(K, kMatrixBytes, kKeyStep);
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

__device__ __forceinline__ void compute(const Work& work, Shared& sm, State& S) {
    // By way of a reduction the compiler knows that all lanes have the same: the products' descriptors, which follow
    // from the round, then take no vector registers and few instructions.
    const int chunks = __reduce_max_sync(0xffffffffu, work.last - work.first);
    if (chunks <= 0) return;
    const int lane = threadIdx.x % 32;
    Chunk c;
    Tile Y[kRows];
    int stage = 0;
    u32 parity = 0, outputs_parity = 1;  // the first chunk finds the place for outputs empty
    pack(S, c.left);
    sm.full[0].wait(0);
    begin_chunk(sm.stages[0], c, Y, [] {}, [] {});
    // No product is on its way from one round to the next: the compiler would wait for each on its own.
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_products<0>();
        pin(Y);
        end_chunk(sm.stages[stage], S, c, Y);
        const int before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
        pack(S, c.left);
        // After the last chunk this runs on a stage that is not filled any more, for nothing.
        if (chunk + 1 < chunks) sm.full[stage].wait(parity);
        PackedOutputs o;
        begin_chunk(
            sm.stages[stage], c, Y,
            [&] {
                if constexpr (!kCompose) {
                    wait_products<1>();
                    pin(Y);
#pragma unroll
                    for (int i = 0; i < kRows; ++i) Y[i].pack<Operand<kQkv == kBFloat16>>(o[i]);
                }
            },
            [&] {
                if constexpr (!kCompose) {
                    sm.outputs_empty.wait(outputs_parity);
                    outputs_parity ^= 1;
                    put_outputs(sm, o);
                }
                __syncwarp();
                if (!kCompose && lane == 0) sm.outputs_full.arrive();
                if (lane == 0) sm.empty[before].arrive();
            });
    }
    wait_products<0>();
    pin(Y);
}

}  // namespace

// Warps that compute, two that bring tiles and values, some that store outputs. With two warpgroups that compute, registers are
// too few to go round evenly: a third gives some of its own to them.
constexpr bool kTwo = kColumns == 128;
constexpr int kBlockThreads = kThreads + (kTwo ? 128 : 96);

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1) chunk_state_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, storer = warp - kWarps - 2;
    Work work;
    if (!find_work(p, work)) return;
    find_tokens(p, work, lane / 8, lane % 8, lane / 8, work.first_column + max(storer, 0) * 64 + lane % 8 * 8);
    work.outputs += work.first * (kC * work.output_step);

    for (int i = 0; i < kStages; ++i) zero_rest(work, sm.stages[i]);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.full[i].init(33), sm.empty[i].init(kWarps);
        sm.outputs_full.init(kWarps), sm.outputs_empty.init(kStorers);
        Barrier::publish_inits();
    }
    publish_to_engines();
    __syncthreads();
    if (warp >= kWarps) {
        if constexpr (kTwo) keep_registers<40>();
        if (storer == -2) bring_tiles(p, work, sm);
        else if (storer == -1) bring_values(work, sm);
        else if (!kCompose && storer < kStorers) store_outputs(work, sm, storer);
    } else {
        if constexpr (kTwo) take_registers<232>();
        const int column = work.first_column + warp * 16;
        State S;
        load_state(p, work, S, column, 0);
        compute(work, sm, S);
        save_state(p, work, S, column, 0);
    }
}
