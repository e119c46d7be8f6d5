// The warps of chunk_fused_sm90.cu that make operands of K and Q, find decays and columns of T, and have the copy engine
// bring tokens and store outputs.
#pragma once

#include "gdr/chunk_fused.cuh"

namespace gdr {

// What all lanes have the same takes no vector registers, of which these warps have few, if the compiler knows.
__device__ __forceinline__ u32 same(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ int same(int x) { return static_cast<int>(same(static_cast<u32>(x))); }
__device__ __forceinline__ i64 same(i64 x) {
    const unsigned long long high = same(static_cast<u32>(x >> 32));
    return static_cast<i64>(high << 32 | same(static_cast<u32>(x)));
}

// Where the first token of the work has its own of a value head's.
__device__ __forceinline__ i64 element(const Work& work, const TokenStrides& s) {
    return work.seq.batch * s.batch + work.seq.first * s.token + work.hv * s.head;
}

struct Mover {
    const TileParams& tiles;
    const Params& p;
    Shared& sm;
    const int mover;         // the warp
    const u32 rank, other;   // the block of the cluster; see to_other_block
    const int chunks, tail;  // tokens of the last one
    const TilePlace keys_at, values_at;
    // Bytes from a token to the next: those of 64 tokens fit 32 bits.
    const u32 k_step, q_step, v_step, out_step;
    const i64 a, b;  // the gates of the sequence's first token, in elements
    u32 A_log, dt_bias;

    __device__ __forceinline__ Mover(const TileParams& tiles, const Work& work, Shared& sm, int mover)
        : tiles(tiles),
          p(tiles.params),
          sm(sm),
          mover(same(mover)),
          rank(rank_of_block()),
          other(to_other_block(sm)),
          chunks(same(work.last)),
          tail(same(work.last > 0 ? work.tokens(work.last - 1) : 0)),
          keys_at({0, same(static_cast<int>(work.seq.first)), same(work.hv / p.group),
                   same(static_cast<int>(work.seq.batch))}),
          values_at({same(work.first_column), keys_at.token, same(work.hv), keys_at.batch}),
          k_step(static_cast<u32>(p.k_strides.token) * kValueBytes),
          q_step(static_cast<u32>(p.q_strides.token) * kValueBytes),
          v_step(static_cast<u32>(p.v_strides.token) * kValueBytes),
          out_step(static_cast<u32>(p.out_strides.token) * kValueBytes),
          a(same(element(work, p.a_strides))),
          b(same(element(work, p.b_strides))) {
        GateBits bits;
        bits.load_head(p, work.hv);
        if constexpr (kRawGates) A_log = same(bits.A_log), dt_bias = same(bits.dt_bias);
    }

    __device__ __forceinline__ int tokens(int chunk) const { return chunk + 1 < chunks ? kC : tail; }
    // Where a token of a chunk is in memory, whose first one of the sequence is `at`.
    __device__ __forceinline__ const char* find(const void* base, const TokenStrides& s, const TilePlace& at,
                                                int chunk) const {
        return gdr::at(base, kQkv,
                       at.batch * s.batch + (at.token + i64{kC} * chunk) * s.token + at.head * s.head + at.column);
    }
    // The first token of K and Q that the warp has.
    __device__ __forceinline__ int first_token() const {
        return kCluster == 1 ? mover * 16 : rank * (kC / 2) + mover * 8;
    }
    // Brings the block's tokens of a chunk's K and Q: rows of memory to rows.
    __device__ __forceinline__ void bring_keys(int chunk, u32 keys, Barrier& full) const {
        if (threadIdx.x % 32 != 0) return;
        full.arrive_expect(2 * kKeyTileBytes / kCluster);
        TilePlace at = keys_at;
        at.token += chunk * kC + rank * (kC / 2);
        const u32 to = keys + rank * (kKeyTileBytes / 2);
        copy_tile(to, tiles.k, at, full);
        copy_tile(to + kKeyTileBytes, tiles.q, at, full);
    }
    // Makes operands of two groups of 8 tokens in the same place; where the copy engine can not bring them, reads them. A
    // lane has token lane % 8 and every fourth piece of 8 keys, other ones for each token: rows as well as matrices then
    // lie in different banks.
    struct Group {
        u32 at;
        int token;
        const void* from;
        const TokenStrides& strides;
        u32 step;
    };
    __device__ __forceinline__ void convert(const Group (&groups)[2], int chunk) const {
        const u32 lane = threadIdx.x % 32, row = lane % 8, turned = kAligned ? row : 0;
        const u32 piece[2] = {lane / 8 ^ turned, lane / 8 ^ turned ^ 4};  // and those 8 after them
        Rows rows[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const Group& g = groups[n];
            const int t = g.token + static_cast<int>(row);
            if constexpr (kAligned) {
#pragma unroll
                for (int i = 0; i < Rows::kChunks; ++i)
                    load_shared16(g.at + row * (kKeys * 2) + piece[i % 2] * 16 + i / 2 * 128, rows[n].words[i]);
                if (tokens(chunk) < kC && t >= tail) rows[n].clear();
            } else {
                if (t < tokens(chunk))
                    rows[n].load(find(g.from, g.strides, keys_at, chunk) + (t * g.step + lane / 8 * 16));
                else rows[n].clear();
            }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            rows[n].convert(rows[n].norm_factor());
            // All are converted where they are before the first is stored: through other registers, which are few, one
            // would wait for the other.
#pragma unroll
            for (int i = 0; i < Rows::kChunks * 4; ++i) ptx::forget(rows[n].words[i / 4][i % 4]);
        }
        __syncwarp();
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < Rows::kChunks; ++i)
                store_shared16(groups[n].at + row * 16 + piece[i % 2] * kMatrixBytes + i / 2 * (8 * kMatrixBytes),
                               rows[n].words[i]);
        }
    }
    __device__ __forceinline__ void convert_keys(int chunk, u32 keys) const {
        const int token = first_token();
        const u32 at = keys + token / 8 * kTokenStep;
        const Group K = {at, token, p.k, p.k_strides, k_step},
                    Q = {at + kKeyTileBytes, token, p.q, p.q_strides, q_step};
        if constexpr (kCluster == 2) {
            convert({K, Q}, chunk);
        } else {
            convert({K, {K.at + kTokenStep, token + 8, p.k, p.k_strides, k_step}}, chunk);
            convert({Q, {Q.at + kTokenStep, token + 8, p.q, p.q_strides, q_step}}, chunk);
        }
    }
    // Says that the warp's tokens are there, and copies them to the other block.
    __device__ __forceinline__ void pass_on(u32 keys, Barrier& full) const {
        publish_to_engines();
        __syncwarp();
        if (threadIdx.x % 32 != 0) return;
        if constexpr (kCluster == 1) {
            full.arrive();
        } else {
            // Of the other block's tokens, and the decays if they come from there.
            full.arrive_expect(2 * kTokenStep + (!finds_decays(rank) && mover == 0 ? sizeof(Decay) : 0));
            const u32 from = keys + first_token() / 8 * kTokenStep;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                copy_in_cluster(from + i * kKeyTileBytes + other, from + i * kKeyTileBytes, kTokenStep,
                                full.address() + other);
        }
    }
    // The decays of a chunk.
    __device__ __forceinline__ void load_gates(int chunk, GateBits& bits) const {
        const i64 first = i64{kC} * chunk;
        bits.load_tokens(p, a + first * p.a_strides.token, b + first * p.b_strides.token, tokens(chunk));
    }
    __device__ __forceinline__ void fill_decays(int chunk, GateBits& bits) const {
        Decay& to = sm.decays[chunk % kStages];
        bits.A_log = A_log, bits.dt_bias = dt_bias;
        bits.finish(p, tokens(chunk), to.gates);
        __syncwarp();
#pragma unroll
        for (int first = 0; first < kC; first += 32) {
            const int t = first + threadIdx.x % 32;
            fill_factors(to.gates, to, t, t / 16 * 16, p.scale);
        }
    }
    // Of values and outputs one warp has all tokens; where the copy engine can not move them, each has 16.
    static constexpr int kTokens = kAligned ? kC : kC / kMovers;

    __device__ __forceinline__ void bring_values(int chunk) const {
        const int lane = threadIdx.x % 32, slot = chunk % kSlots, tokens = this->tokens(chunk);
        const u32 values = shared_address(sm.values[slot]);
        Barrier& full = sm.values_full[slot];
        if constexpr (kAligned) {
            if (lane != 0) return;
            Barrier& come = tokens == kC ? full : sm.tail_come;
            come.arrive_expect(sizeof(sm.values[0]));
#pragma unroll
            for (int i = 0; i < kColumns / 64; ++i) {
                TilePlace at = values_at;
                at.column += i * 64, at.token += chunk * kC;
                copy_tile(values + value_offset(0, i * 64), tiles.v, at, come);
            }
            return;
        }
        const int first = mover * kTokens;
        const char* from = find(p.v, p.v_strides, values_at, chunk);
#pragma unroll 1
        for (int t = first + lane / 8; t < first + kTokens; t += 4) {
#pragma unroll
            for (int i = 0; i < kColumns / 64; ++i) {
                u32 words[4];
                load_chunk<kQkv, 8, kAligned>(from + (t * v_step + lane % 8 * 16), i * 64, t < tokens ? 8 : 0, words);
                store_shared16(values + value_offset(t, i * 64 + lane % 8 * 8), words);
            }
        }
        __syncwarp();
        if (lane == 0) full.arrive();
    }
    // What follows the sequence's last token may be anything: once the last chunk's values have come, zeros are there
    // instead.
    __device__ __forceinline__ void clear_tail() const {
        const int lane = threadIdx.x % 32, slot = (chunks - 1) % kSlots;
        sm.tail_come.wait(0);
#pragma unroll 1
        for (int t = tail + lane / 8; t < kC; t += 4) {
            const u32 zeros[4] = {};
#pragma unroll
            for (int i = 0; i < kColumns / 64; ++i)
                store_shared16(shared_address(sm.values[slot]) + value_offset(t, i * 64 + lane % 8 * 8), zeros);
        }
        __syncwarp();
        if (lane == 0) sm.values_full[slot].arrive();
    }
    // Stores a chunk's outputs; their place is free once wait_bulk_stores_read has returned in lane 0.
    template <bool kWhole>
    __device__ __forceinline__ void store_outputs(int chunk, const char* values) const {
        const int lane = threadIdx.x % 32, first = kAligned ? 0 : mover * kTokens;
        const int tokens = kWhole ? kC : this->tokens(chunk);
        const u32 from = shared_address(values);
        if (kAligned && tokens == kC) {
            if (lane != 0) return;
#pragma unroll
            for (int i = 0; i < kColumns / 64; ++i) {
                TilePlace at = values_at;
                at.column += i * 64, at.token += chunk * kC;
                store_tile(tiles.out, at, from + value_offset(0, i * 64));
            }
            end_tile_stores();
            return;
        }
        char* to = const_cast<char*>(find(p.out, p.out_strides, values_at, chunk));
#pragma unroll 1
        for (int t = first + lane / 8; t < first + kTokens; t += 4) {
#pragma unroll
            for (int i = 0; i < kColumns / 64; ++i) {
                u32 words[4];
                load_shared16(from + value_offset(t, i * 64 + lane % 8 * 8), words);
                store_chunk<kQkv, 8, kAligned>(to + (t * out_step + lane % 8 * 16), i * 64, t < tokens ? 8 : 0, words);
            }
        }
    }

    // A column of T below the inverses.
    __device__ __forceinline__ void solve(int chunk, int column) const {
        const int slot = chunk % kSlots;
        const Gates& gates = sm.decays[chunk % kStages].gates;
        const Triangle& triangle = sm.triangles[slot];
        char* const T = sm.squares[slot];
        sm.inverted[slot].wait(chunk / kSlots & 1);
        if (column == 0) solve_column<Whole, 0, true>(triangle, gates, T);
        else if (column == 1) solve_column<Whole, 1, true>(triangle, gates, T);
        else solve_column<Whole, 2, true>(triangle, gates, T);
        publish_to_engines();
        __syncwarp();
        if (threadIdx.x % 32 != 0) return;
        sm.squares_full[slot].arrive();
        // The last block of the diagonal, which has nothing below it, goes with the column beside it.
        if constexpr (kOneHead)
            copy_in_cluster(shared_address(T) + column * kColumnBytes + other,
                            shared_address(T) + column * kColumnBytes, (column == kSolvers - 1 ? 2 : 1) * kColumnBytes,
                            sm.squares_full[slot].address() + other);
    }
    // Lets the other block copy T or P of a chunk here.
    __device__ __forceinline__ void let_squares_come(int chunk) const {
        if (!kOneHead || threadIdx.x % 32 != 0) return;
        Barrier& full = sm.squares_full[chunk % kSlots];
        full.arrive_expect(kSquareBytes);
        if (chunk >= kSlots) arrive_in_cluster(sm.squares_empty[chunk % kSlots].address() + other);
    }

    __device__ __forceinline__ void wait_done(int chunk) const { sm.done[chunk % kStages].wait(chunk / kStages & 1); }

    // Asks for the first chunk. One warp does it, before anything else; more at once would only come later.
    __device__ __forceinline__ void start() const {
        for (int t = threadIdx.x % 32; t < tokens(0); t += 32) {
            ptx::prefetch(at(p.a, p.a_type, a + t * p.a_strides.token));
            ptx::prefetch(at(p.b, p.b_type, b + t * p.b_strides.token));
        }
        for (int chunk = 0; chunk < min(chunks, kSlots); ++chunk) let_squares_come(chunk);
        if (!kAligned || chunks == 0) return;
        bring_keys(0, shared_address(sm.keys[0]), sm.tokens_full[0]);
        bring_values(0);
    }

    // In round i, K and Q of chunk i are asked for, and those of the chunk before have come. The walk is done with chunk
    // i - 4: they take the place of its K and Q, and the values of chunk i - 2 that of its outputs. What one warp does alone
    // goes round, so that none has more than the others.
    __device__ __forceinline__ void run() const {
#pragma unroll 1
        for (int i = 0; i < chunks + 2; ++i) {
            const int role = (mover - i) & (kMovers - 1), stage = i % kStages, slot = i % kSlots;
            const bool again = i >= kStages;  // the places were used before
            const bool started = kAligned && i == 0;
            GateBits bits;
            const bool has_decays = role == kDecaysRole && i < chunks && finds_decays(rank);
            if (has_decays) load_gates(i, bits);
            if (!kAligned && again) wait_done(i - kStages);
            if (!kAligned || role == kValuesRole) {
                if (again) {
                    if constexpr (kAligned) wait_done(i - kStages);
                    if (role == kValuesRole) let_squares_come(i - kSlots);
                    store_outputs<true>(i - kStages, sm.values[slot]);
                    if (threadIdx.x % 32 == 0) wait_bulk_stores_read();
                    __syncwarp();
                }
                if (again) bring_values(i - kSlots);
                else if (!started && i < min(chunks, kSlots)) bring_values(i);
            }
            if (role == kKeysRole && !started && i < chunks) {
                if (kAligned && again) wait_done(i - kStages);
                if (kCluster == 2 && again) {
                    sm.keys_copied[stage].wait(i / kStages & 1 ^ 1);
                    if (threadIdx.x % 32 == 0) {
                        sm.keys_empty[stage].arrive();
                        arrive_in_cluster(sm.keys_empty[stage].address() + other);
                    }
                }
                if constexpr (kAligned) bring_keys(i, shared_address(sm.keys[stage]), sm.tokens_full[stage]);
            }
            if (i > 0 && i <= chunks) {
                const int chunk = i - 1, stage = chunk % kStages;
                const u32 keys = shared_address(sm.keys[stage]);
                if constexpr (kAligned) sm.tokens_full[stage].wait(chunk / kStages & 1);
                const auto wait_for_room = [&] {
                    if (kCluster == 2 && chunk >= kStages) sm.keys_empty[stage].wait(chunk / kStages & 1 ^ 1);
                };
                if constexpr (!kAligned) wait_for_room();
                convert_keys(chunk, keys);
                if constexpr (kAligned) wait_for_room();
                pass_on(keys, sm.keys_full[stage]);
            }
            if (i >= 2 && role != kDecaysRole && finds_T(rank)) solve(i - 2, role - kFirstColumnRole);
            if (has_decays) {
                if (kOneHead && again) sm.keys_empty[stage].wait(i / kStages & 1 ^ 1);
                else if (kAligned && again) wait_done(i - kStages);
                fill_decays(i, bits);
                if constexpr (kOneHead) {
                    publish_to_engines();
                    __syncwarp();
                    const u32 from = shared_address(&sm.decays[stage]);
                    if (threadIdx.x % 32 == 0)
                        copy_in_cluster(from + other, from, sizeof(Decay), sm.keys_full[stage].address() + other);
                }
            }
        }
        // By the warp that had nothing to do in the last round.
        if (kAligned && chunks > 0 && tail < kC && ((mover - chunks - 1) & (kMovers - 1)) == kDecaysRole) clear_tail();
#pragma unroll 1
        for (int chunk = max(chunks - 2, 0); chunk < chunks; ++chunk) {
            if (kAligned && ((mover - chunk) & (kMovers - 1)) != kValuesRole) continue;
            wait_done(chunk);
            store_outputs<false>(chunk, sm.values[chunk % kSlots]);
        }
        if (threadIdx.x % 32 == 0) wait_bulk_stores_read();
    }
};

}  // namespace gdr
