// One token of each sequence of a pool with deferred write-back, on tensor cores: ring_step says what is worked out. For
// tokens of 16 bits and states [slots, HV, V, K] of the same type.
// requires: sm_80
// options: -fmad=false
// launch: dependent
//
// A warp owns rows (value columns) of the state, sixteen at a time the rows of a left operand; key and query are two
// columns of the right one. Where a lane's share of K lies is free as long as it is the same in both: 16 bytes side by
// side, as they are loaded. The products end up in the first lane of every four that share rows, and the rows lie in an
// order that gives it neighbours.
#include "gdr/mma.cuh"
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

constexpr int kLaneChunks = kK / (4 * kChunk);            // of a lane, in a row
constexpr int kTiles = kRows / (16 * kWarps);             // of 16 rows, of a warp
constexpr int kOwn = 2 * kTiles;                          // neighbouring rows of a lane
constexpr bool kPairs = GDR_ALIGNED_VALUES && kOwn == 4;  // values and outputs of four rows move at once
// Products with entries' keys are sums of kParts over parts of K, which the warps share. There are as many whatever the
// number of warps is, so that it does not show in the sums.
constexpr int kParts = 4, kOwnParts = kParts / kWarps;
static_assert(kK % 32 == 0 && kV % 16 == 0 && kEntries == 16 && kVk && kTiles >= 1 && kParts % kWarps == 0);
static_assert(kState != kFloat32 && kState == kQkv && kChunk == 8 && StoredKey::kExact);

using Narrow = Operand<kQkv == kBFloat16>;

struct TokenScalars {
    float decay, beta, k_scale, q_scale, from_u, log_decay;
};

struct Shared {
    SharedUpdates updates[kEntries];
    SharedKey keys[kEntries];
    float2 products[kParts][kEntries];  // of entries' keys with k and q, by parts of K
    float left[kEntries], state_decay;
    TokenScalars token;
};

// A lane's part of 16 rows of K elements, chunk t, t + 4, ..: two of them.
struct RowChunk {
    u32 words[2][4];

    // Column 0 is the key's, column 1 the query's.
    __device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&column)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 a[4] = {words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]};
            Narrow::mma(sums, a, column[i], column[i + 1]);
        }
    }
};

// The updates of an entry in a lane's rows, zeros where there is no entry.
__device__ __forceinline__ void get_updates(const Shared& shared, int entry, int pending, int row, float (&u)[kOwn]) {
    u32 words[kOwn / 2];
#pragma unroll
    for (int i = 0; i < kOwn / 2; ++i)
        words[i] = entry < pending ? reinterpret_cast<const u32*>(shared.updates[entry].chunks)[row / 2 + i] : 0;
    unpack<kState>(words, u);
}

// Adds what the entries contribute: their updates times the products of their keys.
__device__ __forceinline__ void add_entries(float (&sums)[kTiles][4], const Shared& shared, int pending, int row, int g,
                                            int t) {
#pragma unroll
    for (int first = 0; first < kEntries; first += 8) {
        if (first >= pending) break;
        float u[2][kOwn];
        Split products[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int entry = first + t + 4 * i;
            get_updates(shared, entry, pending, row, u[i]);
            if (g < 2) {
                float sum = 0.f;
#pragma unroll
                for (int x = 0; x < kParts; ++x) sum += g ? shared.products[x][entry].y : shared.products[x][entry].x;
                products[i] = Split(sum * shared.left[entry]);
            }
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
            const u32 a[4] = {__float_as_uint(u[0][2 * m]), __float_as_uint(u[0][2 * m + 1]),
                              __float_as_uint(u[1][2 * m]), __float_as_uint(u[1][2 * m + 1])};
            mma_tf32(sums[m], a, products[0].high, products[1].high);
            mma_tf32(sums[m], a, products[0].low, products[1].low);
        }
    }
}

// The pending entries' part of a folded state, with the updates times what is left of them in two parts of 16 bits.
struct Folded {
    u32 high[kTiles][4], low[kTiles][4];

    __device__ __forceinline__ Folded(const Shared& shared, float token_decay, int pending, int row, int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float u[2][kOwn], y[2];
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int entry = 2 * t + b + i * 8;
                get_updates(shared, entry, pending, row, u[b]);
                const float scale = entry < pending ? token_decay * shared.left[entry] : 0.f;
#pragma unroll
                for (int r = 0; r < kOwn; ++r) u[b][r] *= scale;
            }
#pragma unroll
            for (int r = 0; r < kOwn; ++r) {
                u32& first = high[r / 2][r % 2 + 2 * i];
                first = Narrow::pack(u[0][r], u[1][r]);
                unpack<kQkv>(&first, y);
                low[r / 2][r % 2 + 2 * i] = Narrow::pack(u[0][r] - y[0], u[1][r] - y[1]);
            }
        }
    }

    // h += keys^T updates, for chunk j.
    __device__ __forceinline__ void add(float (&h)[kOwn][kChunk], const Shared& shared, int j, int g, int t) const {
        // Column n of eight is element 8 (n / 2) + n % 2 of the row, and two more for each x: lane t gets its own.
#pragma unroll
        for (int x = 0; x < kChunk; x += 2) {
            u32 keys[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const auto key = [&](int entry) {
                    return reinterpret_cast<const u16*>(shared.keys[entry].chunks[4 * j + g / 2])[x + g % 2];
                };
                keys[i] = key(2 * t + 8 * i) | u32{key(2 * t + 8 * i + 1)} << 16;
            }
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                float sums[4] = {h[2 * m][x], h[2 * m][x + 1], h[2 * m + 1][x], h[2 * m + 1][x + 1]};
                Narrow::mma(sums, high[m], keys[0], keys[1]);
                Narrow::mma(sums, low[m], keys[0], keys[1]);
                h[2 * m][x] = sums[0], h[2 * m][x + 1] = sums[1];
                h[2 * m + 1][x] = sums[2], h[2 * m + 1][x + 1] = sums[3];
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS)
    ring_step_mma(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = block.slice * kRows, own = warp * (16 * kTiles) + kOwn * g, row = first_row + own;
    const bool exists = kV % kRows == 0 || row < kV;
    const Span span{block.n, 0, 1};
    take_turn(p, block);

    // Every load is issued before anything waits for one.
    const Rows rows(p.call, block.n);
    u32 columns[kLaneChunks][4];
    const char* const k_row = row_of(p.call.k, p.call.k_strides, span, 0, block.h);
    const char* const q_row = row_of(p.call.q, p.call.q_strides, span, 0, block.h);
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j)
        load_chunk<kQkv, kChunk, kAlignedTokens>(g ? q_row : k_row, (4 * j + t) * kChunk, g < 2 ? kChunk : 0,
                                                 columns[j]);
    GateBits gates{};
    LaneToken::Words words;
    if (warp == 0) {
        words.load(p.call, span, 0, block.h, lane % kLanes);
        gates.load(p.call, span, 0, block.hv);
    }
    u32 values[kOwn / 2] = {};
    if (t == 0 && exists)
        load_chunk<kQkv, kOwn, kPairs>(row_of(p.call.v, p.call.v_strides, span, 0, block.hv), row, kOwn, values);
    const Work work(p.call, rows, block.hv);
    if (work.padding) return write_zeros(p.call, span, block.hv, first_row, min(first_row + kRows, kV));
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    const Fill fill(ptx::load4(counts));
    RowChunk state[kTiles][kLaneChunks];
    const auto offset = [&](int r, int j) { return (i64{row} + r) * kK + (4 * j + t) * kChunk; };
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j)
            load_chunk<kState, kChunk, kAlignedStates, Cache::kStreaming>(work.read, offset(r, j), exists ? kChunk : 0,
                                                                          state[r / 2][j].words[r % 2]);

    const int pending = fill.pending();
    const bool folds = pending + 1 >= static_cast<int>(limit_of(p.ring, fill, slot));
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    // A lane copies the keys' chunks that it multiplies; those of entries that are not there are zeros.
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (j % kWarps == warp)
                copy_chunk(shared.keys[g + i * 8].chunks[4 * j + t], entries.key(g + i * 8), (4 * j + t) * kChunk,
                           g + i * 8 < pending ? kChunk : 0);
    copy_updates(entries, pending, first_row, shared.updates);
    Remains remains(entries, warp == 0 ? pending : 0, lane);

    if (warp == 0) {
        const LaneToken token(words);
        const Scalars s = token.scalars(p.call.scale, 1.f, gates.beta(p.call));
        const float log = log_decay_of(p.call, gates);
        if (lane == 0) shared.token = {exp_unbiased(log), s.beta, s.k_scale, s.from_q, s.from_u, log};
        remains.scan(lane);
        if (lane < kEntries) shared.left[lane] = exp_unbiased(remains.log_entry) * remains.key_scale;
        if (lane == 0) shared.state_decay = exp_unbiased(remains.log_state);
    }
    float sums[kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j)
#pragma unroll
        for (int m = 0; m < kTiles; ++m) state[m][j].multiply(sums[m], columns[j]);
    ptx::wait_copies();
#pragma unroll
    for (int x = 0; x < kOwnParts; ++x) {
        const int part = x * kWarps + warp;
        float with_keys[4] = {};
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j) {
            if (j % kParts != part) continue;
            RowChunk keys;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 four = *reinterpret_cast<const uint4*>(shared.keys[g + i * 8].chunks[4 * j + t]);
                keys.words[i][0] = four.x, keys.words[i][1] = four.y;
                keys.words[i][2] = four.z, keys.words[i][3] = four.w;
            }
            keys.multiply(with_keys, columns[j]);
        }
        if (t == 0) {
            shared.products[part][g] = make_float2(with_keys[0], with_keys[1]);
            shared.products[part][g + 8] = make_float2(with_keys[2], with_keys[3]);
        }
    }
    __syncthreads();

    // Every thread of this block has the entries by now.
    u32 arrived = 0;
    if (threadIdx.x == 0) arrived = atomicAdd(counts + 1, 1u);
    const TokenScalars s = shared.token;
    const float state_decay = shared.state_decay;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int x = 0; x < 4; ++x) sums[m][x] *= state_decay;
    add_entries(sums, shared, pending, own, g, t);

    // The first of the lanes that share rows has their products.
    float value[kOwn], u[kOwn], o[kOwn];
    unpack<kQkv>(values, value);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
        const float hk = sums[r / 2][r % 2 * 2], hq = sums[r / 2][r % 2 * 2 + 1];
        u[r] = s.beta * (value[r] - s.decay * s.k_scale * hk);
        o[r] = fmaf(s.from_u, u[r], s.decay * s.q_scale * hq);
    }
    if (t == 0 && exists) {
        u32 packed[kOwn / 2];
        pack<kQkv>(o, packed);
        store_chunk<kQkv, kOwn, kPairs>(row_of(p.call.out, p.call.out_strides, span, 0, block.hv), row, kOwn, packed);
        if (!folds) {
            pack<kState>(u, packed);
            u32* const to = reinterpret_cast<u32*>(entries.update(pending, row));
            if constexpr (kOwn == 4) *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
            else *to = packed[0];
        }
    }

    if (folds) {
#pragma unroll
        for (int r = 0; r < kOwn; ++r) u[r] = s.k_scale * __shfl_sync(0xffffffffu, u[r], lane & ~3);
        const float decay = state_decay * s.decay;
        const Folded folded(shared, s.decay, pending, own, t);
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j) {
            float k[kChunk], h[kOwn][kChunk];
            u32 part[words_of(kQkv, kChunk)];
            load_chunk<kQkv, kChunk, kAlignedTokens>(k_row, (4 * j + t) * kChunk, kChunk, part);
            unpack<kQkv>(part, k);
#pragma unroll
            for (int r = 0; r < kOwn; ++r) {
                u32(&packed)[4] = state[r / 2][j].words[r % 2];
#pragma unroll
                for (u32& word : packed) ptx::forget(word);
                unpack<kState>(packed, h[r]);
#pragma unroll
                for (int x = 0; x < kChunk; ++x) h[r][x] = fmaf(k[x], u[r], decay * h[r][x]);
            }
            folded.add(h, shared, j, g, t);
#pragma unroll
            for (int r = 0; r < kOwn; ++r) {
                u32(&packed)[4] = state[r / 2][j].words[r % 2];
                pack<kState>(h[r], packed);
                store_chunk<kState, kChunk, kAlignedStates>(work.write, offset(r, j), exists ? kChunk : 0, packed);
            }
        }
    } else if (warp == 0 && block.slice == 0) {
        if (lane == 0) entries.gates[pending] = s.log_decay;
        if (block.hv % p.call.group == 0) {
            if (lane == 0) entries.key_scales[pending] = StoredKey::scale(s.k_scale);
            const LaneToken token(words);
            if (lane < kLanes) StoredKey::store(entries.key(pending), lane, token.k, s.k_scale);
        }
    }
    if (threadIdx.x == 0 && arrived == gridDim.x * gridDim.y - 1) {
        counts[1] = 0;
        counts[0] =
            (folds ? Fill(0, p.ring.capacity, 0, fill.half()) : Fill(pending + 1, fill.limit(), 0, fill.half())).word;
    }
}
