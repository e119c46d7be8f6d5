// The chunkwise rule in one kernel: the walk of gdr/chunk_walk.cuh beside warps that find what each chunk needs of
// itself. Nothing but tokens, outputs and states passes through memory. It does the chunk's own work anew for each value
// head and block of columns, so it is for calls whose sequences and heads nearly fill the GPU.
//
// A block has some columns of one value head of one sequence. Of its warpgroups
//     one for each 64 columns walks from chunk to chunk with the state in registers;
//     one, a chunk ahead of them, multiplies keys and queries and finds T and P;
//     one, two chunks ahead, makes operands of K and Q and finds the decays; it asks for K and Q one more chunk ahead,
//     brings values, and stores outputs, which lie where their chunk's K was.
// What all of them move through shared memory is close to what it can: tokens are copied by whole rows, and K and Q
// become matrices where they are.
//
//   GDR_COLUMNS    value columns of a block, 64 or 128
// requires: sm_90
// options: -arch=sm_90a
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = 1, kStages = 4, kFirstWarp = 8;
constexpr bool kCompose = false, kLean = true;
}  // namespace gdr

#define GDR_TOKENS_TOGETHER 1
#include "gdr/chunk_local.cuh"
#include "gdr/chunk_walk.cuh"

using namespace gdr;

namespace {

constexpr int kSlots = 2;          // chunks whose values, T and P are there
constexpr int kMovers = 4;         // warps that bring tokens, 16 of a chunk each
constexpr int kAuxiliary = kRows;  // warps that find T and P
static_assert(kFirstWarp == kAuxiliary + kMovers);

struct Decay {
    Gates gates;
    float d[kC], scaled_d[kC], e[kC];
};

// T and P, where the walk expects them.
struct Whole {
    static constexpr __device__ int at(int i, int j) { return j * kColumnBytes + i * kBlockBytes; }
};

struct Shared {
    char keys[kStages][2 * kKeyTileBytes];  // K, Q; then outputs
    char values[kSlots][kC * kValueRow];
    Decay decays[kStages];
    char squares[kSlots][2 * kSquareBytes];  // T, P
    Triangle triangles[2];
    Barrier keys_full[kStages], values_full[kSlots], squares_full[kSlots], done[kStages];
};

// Outputs by tokens, in the rows of K and, where these are shorter, of Q: 16 bytes of every 64 columns where they are in
// different banks for 8 tokens and for 8 pieces.
struct Rearranged {
    static constexpr int kRow = kKeys * 2, kColumns64 = kKeys == 128 ? 128 : kKeyTileBytes;
    static __device__ __forceinline__ u32 at(int token, int columns64, int piece) {
        return token * kRow + columns64 * kColumns64 + (piece ^ token % 8) * 16;
    }
};

// A place in a ring of kCount, and how many rounds were done before.
template <int kCount>
struct Turn {
    int at = 0;
    u32 parity = 0;

    __device__ __forceinline__ void next() {
        if (++at == kCount) at = 0, parity ^= 1;
    }
};

struct Stage {
    const char *keys, *V;
    const float *d, *scaled_d, *e;
};

struct Feed {
    Shared& sm;
    Turn<kStages> now = {};
    Turn<kSlots> slot = {};

    __device__ __forceinline__ void wait() const {
        sm.keys_full[now.at].wait(now.parity);
        sm.values_full[slot.at].wait(slot.parity);
        sm.squares_full[slot.at].wait(slot.parity);
    }
    __device__ __forceinline__ Stage stage() const {
        const Decay& decay = sm.decays[now.at];
        return {sm.keys[now.at], sm.values[slot.at], decay.d, decay.scaled_d, decay.e};
    }
    __device__ __forceinline__ u32 squares() const { return shared_address(sm.squares[slot.at]); }
    __device__ __forceinline__ void next() { now.next(), slot.next(); }
    // Once all warps that walk are done with K.
    __device__ __forceinline__ void give_back(const PackedOutputs& o) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kFirstWarp;
        const u32 to = shared_address(sm.keys[now.at]) +
                       Rearranged::at(lane / 16 * 8 + lane % 8, warp / 4, warp % 4 * 2 + lane / 8 % 2);
        meet<2, 32 * kWarps>();
#pragma unroll
        for (int i = 0; i < kRows; ++i) store_matrices_transposed(to + i * 16 * Rearranged::kRow, o[i]);
        __syncwarp();
        if (lane == 0) sm.done[now.at].arrive();
    }
};

// ---- The warps that bring tokens and store outputs.

// What all lanes have the same takes no vector registers, of which these warps have few, if the compiler knows.
__device__ __forceinline__ u32 same(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ int same(int x) { return static_cast<int>(same(static_cast<u32>(x))); }
__device__ __forceinline__ i64 same(i64 x) {
    const unsigned long long high = same(static_cast<u32>(x >> 32));
    return static_cast<i64>(high << 32 | same(static_cast<u32>(x)));
}
__device__ __forceinline__ const char* same(const char* x) {
    return reinterpret_cast<const char*>(same(reinterpret_cast<i64>(x)));
}

// Where the first token of the work has its own of a value head's.
__device__ __forceinline__ i64 element(const Work& work, const TokenStrides& s) {
    return work.seq.batch * s.batch + work.seq.first * s.token + work.hv * s.head;
}

struct Mover {
    const Params& p;
    Shared& sm;
    const int mover;         // the warp
    const int chunks, tail;  // tokens of the last one
    // Bytes from a token to the next: those of 64 tokens fit 32 bits.
    const u32 k_step, q_step, v_step, out_step;
    GateBits bits;
    const char *k, *q, *v;  // the chunk's first token
    i64 a, b;               // its gates, in elements
    char* outputs;          // the first token of the next chunk whose outputs are not stored

    __device__ __forceinline__ Mover(const Params& p, const Work& work, Shared& sm, int mover)
        : p(p),
          sm(sm),
          mover(same(mover)),
          chunks(same(work.last)),
          tail(same(work.last > 0 ? work.tokens(work.last - 1) : 0)),
          k_step(static_cast<u32>(p.k_strides.token) * kValueBytes),
          q_step(static_cast<u32>(p.q_strides.token) * kValueBytes),
          v_step(static_cast<u32>(p.v_strides.token) * kValueBytes),
          out_step(static_cast<u32>(p.out_strides.token) * kValueBytes),
          k(same(token_row(p.k, p.k_strides, work.seq, 0, work.hv / p.group))),
          q(same(token_row(p.q, p.q_strides, work.seq, 0, work.hv / p.group))),
          v(same(token_row(p.v, p.v_strides, work.seq, 0, work.hv)) + work.first_column * kValueBytes),
          a(same(element(work, p.a_strides))),
          b(same(element(work, p.b_strides))),
          outputs(const_cast<char*>(same(token_row(p.out, p.out_strides, work.seq, 0, work.hv))) +
                  work.first_column * kValueBytes) {
        bits.load_head(p, work.hv);
        if constexpr (kRawGates) bits.A_log = same(bits.A_log), bits.dt_bias = same(bits.dt_bias);
    }

    __device__ __forceinline__ int tokens(int chunk) const { return chunk + 1 < chunks ? kC : tail; }

    // Copies the warp's tokens of K or Q, one after the other: whole rows of memory to whole rows.
    __device__ __forceinline__ void bring(const char* from, u32 step, char* tile, int token, int tokens) const {
        constexpr int kLanes = kKeys / 8, kAtOnce = 32 / kLanes;
        const u32 lane = threadIdx.x % 32, keys = lane % kLanes;
        const u32 to = shared_address(tile) + token * (kKeys * 2) + lane * 16;
#pragma unroll
        for (int i = 0; i < 16; i += kAtOnce) {
            const int t = token + i + static_cast<int>(lane / kLanes);
            const bool exists = t < tokens && (kK == kKeys || keys * 8 < kK);
            copy16(to + i * (kKeys * 2), from + (exists ? t * step + keys * 16 : 0), exists);
        }
    }
    // Makes operands of them in the same place; where they can not be copied by 16 bytes, reads them. A lane has token
    // lane % 8 of each 8 and every fourth piece of 8 keys, other ones for each token: rows as well as matrices then lie
    // in different banks.
    __device__ __forceinline__ void convert(const char* from, u32 step, char* tile, int token, int tokens) const {
        const u32 lane = threadIdx.x % 32, row = lane % 8, turned = kAligned ? row : 0;
        const u32 piece[2] = {lane / 8 ^ turned, lane / 8 ^ turned ^ 4};  // and those 8 after them
        const u32 here = shared_address(tile) + token / 8 * kTokenStep;
        Rows rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kAligned) {
#pragma unroll
                for (int i = 0; i < Rows::kChunks; ++i)
                    load_shared16(here + row * (kKeys * 2) + piece[i % 2] * 16 + half * kTokenStep + i / 2 * 128,
                                  rows[half].words[i]);
            } else {
                const int t = token + half * 8 + static_cast<int>(row);
                if (t < tokens) rows[half].load(from + (t * step + lane / 8 * 16));
                else rows[half].clear();
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows[half].convert(rows[half].norm_factor());
            // All are converted where they are before the first is stored: through other registers, which are few, one
            // would wait for the other.
#pragma unroll
            for (int i = 0; i < Rows::kChunks * 4; ++i) ptx::forget(rows[half].words[i / 4][i % 4]);
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows[half].store([&](int i) {
                return tile + token / 8 * kTokenStep + row * 16 + piece[i % 2] * kMatrixBytes + half * kTokenStep +
                       i / 2 * (8 * kMatrixBytes);
            });
        }
    }
    // The decays of a chunk, by one of the warps.
    __device__ __forceinline__ bool has_decays(int chunk) const { return chunk < chunks && chunk % kMovers == mover; }
    __device__ __forceinline__ void load_gates(int chunk) {
        if (has_decays(chunk)) bits.load_tokens(p, a, b, tokens(chunk));
        a += kC * p.a_strides.token, b += kC * p.b_strides.token;
    }
    __device__ __forceinline__ void fill_decays(int chunk) {
        if (!has_decays(chunk)) return;
        Decay& to = sm.decays[chunk % kStages];
        bits.finish(p, tokens(chunk), to.gates);
        __syncwarp();
#pragma unroll
        for (int first = 0; first < kC; first += 32) {
            const int t = first + threadIdx.x % 32;
            fill_factors(to.gates, to, t, t / 16 * 16, p.scale);
        }
    }
    __device__ __forceinline__ void bring_values(char* values, int token, int tokens) const {
        const int lane = threadIdx.x % 32, t = token + lane / 8;
        char* to = values + t * kValueRow + lane % 8 * 16;
        u32 offset = t * v_step + lane % 8 * 16;
#pragma unroll 2
        for (int i = 0; i < 16; i += 4) {
            const bool exists = t + i < tokens;
#pragma unroll
            for (int j = 0; j < kColumns / 64; ++j) {
                if constexpr (kAligned) {
                    copy16(shared_address(to + j * 128), v + (exists ? offset : 0) + j * 128, exists);
                } else {
                    u32 words[4];
                    load_chunk<kQkv, 8, false>(v + offset, j * 64, exists ? 8 : 0, words);
                    *reinterpret_cast<uint4*>(to + j * 128) = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
            offset += 4 * v_step, to += 4 * kValueRow;
        }
        if constexpr (!kAligned) __threadfence_block();
    }
    __device__ __forceinline__ void store_outputs(const char* keys, int token, int tokens) {
        const int lane = threadIdx.x % 32, t = token + lane / 8;
        u32 offset = t * out_step + lane % 8 * 16;
#pragma unroll 2
        for (int i = 0; i < 16; i += 4) {
            u32 words[kColumns / 64][4];
#pragma unroll
            for (int j = 0; j < kColumns / 64; ++j)
                load_shared16(shared_address(keys) + Rearranged::at(t + i, j, lane % 8), words[j]);
#pragma unroll
            for (int j = 0; j < kColumns / 64; ++j)
                store_chunk<kQkv, 8, kAligned>(outputs + offset, j * 64, t + i < tokens ? 8 : 0, words[j]);
            offset += 4 * out_step;
        }
        __syncwarp();
        outputs += i64{kC} * out_step;
    }

    __device__ __forceinline__ void run() {
        if (chunks == 0) return;
        Turn<kStages> now, before;
        Turn<kSlots> slot;
        // In round i, K and Q of chunk i are asked for, and those of the chunk before have come. The walk is done with chunk
        // i - 4: they take its place, and the values of chunk i - 2 that of its values.
#pragma unroll 1
        for (int i = 0; i < chunks + 2; ++i) {
            // The warp's first token; what follows from it is found anew, not kept from chunk to chunk.
            u32 token = mover * 16;
            ptx::forget(token);
            load_gates(i);
            if (i >= kStages) {
                sm.done[now.at].wait(now.parity ^ 1);
                store_outputs(sm.keys[now.at], token, kC);
            }
            if (i >= 2) {
                bring_values(sm.values[slot.at], token, tokens(i - 2));
                sm.values_full[slot.at].arrive_after_copies();
                v += i64{kC} * v_step;
                slot.next();
            }
            end_copies();
            if (i > 0) {
                wait_copies_but<1>();
                if (i <= chunks) {
                    const int here = tokens(i - 1);
                    char *const keys = sm.keys[before.at], *const queries = keys + kKeyTileBytes;
                    __syncwarp();
                    convert(k - i64{kC} * k_step, k_step, keys, token, here);
                    convert(q - i64{kC} * q_step, q_step, queries, token, here);
                    publish_to_engines();
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) sm.keys_full[before.at].arrive();
                }
                before.next();
            }
            if (kAligned && i < chunks) {
                bring(k, k_step, sm.keys[now.at], token, tokens(i));
                bring(q, q_step, sm.keys[now.at] + kKeyTileBytes, token, tokens(i));
            }
            k += i64{kC} * k_step, q += i64{kC} * q_step;
            end_copies();
            now.next();
            fill_decays(i);
        }
#pragma unroll 1
        for (int chunk = chunks - 2; chunk < chunks; ++chunk) {
            if (chunk >= 0) {
                sm.done[now.at].wait(now.parity ^ 1);
                store_outputs(sm.keys[now.at], mover * 16, tokens(chunk));
            }
            now.next();
        }
        wait_copies();
    }
};

// ---- The warps that find T and P.

// Starts products of rows of K or Q with those of K: the warp's 16 with all 64.
__device__ __forceinline__ void start_products(Tile (&x)[kRows], u32 rows, u32 keys) {
    const Right left(rows, kKeyStep, kTokenStep), right(keys, kKeyStep, kTokenStep);
    pin(x);
    begin_products();
#pragma unroll
    for (int i = 0; i < kKeyBlocks; ++i) multiply<Op>(x, left.at(key_block(0, i)), right.at(key_block(0, i)), i > 0);
    end_products();
}

__device__ __forceinline__ Tile select(const Tile (&x)[kRows], int n) {
    Tile y = x[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i)
        if (i == n) y = x[i];
    return y;
}

// Each warp has a row of blocks. They wait for each other once a chunk: what they share has two places.
__device__ __forceinline__ void find_squares(const Params& p, const Work& work, Shared& sm, int warp) {
    constexpr int kThreads = 32 * kAuxiliary;
    Turn<kStages> now, past;
    Turn<kSlots> slot;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const Gates& gates = sm.decays[now.at].gates;
        const u32 keys = shared_address(sm.keys[now.at]);
        Triangle& triangle = sm.triangles[slot.at];
        char *const T = sm.squares[slot.at], *const P = T + kSquareBytes;
        // What follows from these is found anew, not kept from chunk to chunk.
        u32 row = warp;
        ptx::forget(row);
        sm.keys_full[now.at].wait(now.parity);
        Tile x[kRows];
        start_products(x, keys, keys);
        wait_products<0>();
        pin(x);
        const u32 corner = fill_lower<ByColumn>(gates, select(x, row), [&](int j) { return x[j]; }, triangle, row);
        // The walk is done with the chunk before the last one: its T and P are free.
        if (chunk >= kSlots) sm.done[past.at].wait(past.parity), past.next();
        __syncwarp();
        // Before the second products, not beside them: with the walk's in the queue a warp waits at each of them.
        invert_block<Whole>(triangle, gates, T, corner, row);
        start_products(x, keys + kKeyTileBytes, keys);
        wait_products<0>();
        pin(x);
        fill_scores<Whole, ByColumn>(gates, select(x, row), [&](int j) { return x[j]; }, P, p.scale, row);
        meet<1, kThreads>();
        if (warp == 0) solve_column<Whole, 0, true>(triangle, gates, T);
        else if (warp == 1) solve_column<Whole, 1, true>(triangle, gates, T);
        else if (warp == 2) solve_column<Whole, 2, true>(triangle, gates, T);
        publish_to_engines();
        __syncwarp();
        if (threadIdx.x % 32 == 0) sm.squares_full[slot.at].arrive();
        now.next(), slot.next();
    }
}

}  // namespace

constexpr bool kTwo = kColumns == 128;
constexpr int kBlockThreads = kThreads + 32 * (kAuxiliary + kMovers);

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1) chunk_fused_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    Work work;
    if (!find_work(p, work)) return;

    // T and P are zero above the diagonal, and so are inverses of its blocks.
    for (int i = threadIdx.x; i < (sizeof(sm.squares) + sizeof(sm.triangles)) / 16; i += kBlockThreads)
        reinterpret_cast<uint4*>(sm.squares)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.keys_full[i].init(kMovers), sm.done[i].init(kWarps);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) sm.values_full[i].init(kMovers * 32), sm.squares_full[i].init(kAuxiliary);
        Barrier::publish_inits();
    }
    publish_to_engines();
    __syncthreads();
    // Where warps want the same, the first ones get it: of these the others wait for all they do.
    if (warp < kAuxiliary) {
        keep_registers<kTwo ? 72 : 136>();
        find_squares(p, work, sm, warp);
    } else if (warp < kFirstWarp) {
        keep_registers<kTwo ? 56 : 136>();
        Mover(p, work, sm, warp - kAuxiliary).run();
    } else {
        take_registers<kTwo ? 192 : 232>();
        const int column = work.first_column + (warp - kFirstWarp) * 16;
        State S;
        load_state(p, work, S, column, 0);
        Feed feed{sm};
        compute(work, feed, S);
        save_state(p, work, S, column, 0);
    }
}
