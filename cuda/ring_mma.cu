// One token, or drafts, of each sequence of a pool with deferred write-back, on tensor cores: ring_step and ring_verify
// say what is worked out. For tokens of 16 bits and states [slots, HV, V, K] of the same type or of float32.
// requires: sm_80
// options: -fmad=false
//
// A warp multiplies 16 rows (value columns) of the state at a time with the keys and queries of all tokens, which are
// the columns of a second operand: kDrafts keys, then kDrafts queries. Where a lane's share of K lies is free as long as
// it is the same in both: 16 bytes side by side, as they are loaded. Numbers of 16 bits are multiplied as they are; a
// float32 number is the sum of two of 11 bits each, which loses what float32 would round away.
//
// The products end up with lane 4 g + t of a warp having rows g and g + 8 and columns 2 t and 2 t + 1 of every 8. A token
// is solved by the lanes that have its key's column, and the others get its update from them by shuffles.
//
// A step keeps its part of the state in registers until it may be folded. Drafts need the registers: where their state is
// folded, it is read once more.
//
//   GDR_DRAFTS        most tokens of a sequence: 4, 8 or 16
#include "gdr/mma.cuh"
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

constexpr int kDrafts = GDR_DRAFTS, kColumns = 2 * kDrafts, kTiles = kColumns / 8;
constexpr bool kNarrow = kState != kFloat32;
constexpr int kLaneElements = kChunk;                  // neighbours in a row, in 16 bytes
constexpr int kLaneChunks = kK / (4 * kLaneElements);  // of them in a row
constexpr int kSteps = kLaneElements / 4;              // 16 elements of K at a time
constexpr int kWarpTiles = kRows / (16 * kWarps);
// Products with entries' keys are sums of kParts over parts of K, which the warps share. There are as many whatever the
// number of warps is, so that it does not show in the sums.
constexpr int kParts = 4, kOwnParts = kParts / kWarps;
constexpr bool kHolds = kOneToken;                        // the state, in registers
constexpr int kTokenStride = kK * 2 + 8 * kLaneElements;  // bytes; lanes read different banks
constexpr int kStateColumn = kDrafts;                     // in Shared::left, after those of the drafts
static_assert(kK % 32 == 0 && kV % 16 == 0 && kEntries == 16 && kVk && kWarpTiles >= 1 && kParts % kWarps == 0);
static_assert(kQkv != kFloat32 && (!kNarrow || kState == kQkv));

using Narrow = Operand<kQkv == kBFloat16>;

struct Shared {
    alignas(16) char tokens[kHolds ? 16 : kColumns * kTokenStride];  // keys, then queries
    SharedUpdates updates[kEntries];
    float products[kParts][kEntries][kColumns];  // of entries' keys with tokens, by parts of K
    float gram[16][kColumns];                    // of tokens' keys (then queries, where there is room) with tokens
    float queries[kDrafts];                      // q . q
    float logs[kDrafts][kDrafts + 1];            // decay from after a draft (or the state) through another
    float coefficients[kDrafts][kColumns];       // of a draft's update, in what the others read
    float columns[kColumns];                     // what normalises (and scales) a column, and its decay
    float beta[kDrafts], log_decay[kDrafts], k_scale[kDrafts], decay[kDrafts];
    float left[kEntries], state_decay;
    signed char parents[kDrafts];
    bool last;
    SharedKey keys[kEntries];
    float weighted[kEntries][kRows];  // for folds, by place_of
};

// The 11 leading bits of a float32 number, and what they leave.
__device__ __forceinline__ u32 leading(u32 x) { return x & 0xffffe000u; }
__device__ __forceinline__ u32 rest(u32 x, u32 leading) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(leading));
}

// A lane's part of the columns, for one chunk of its part of K.
using ColumnChunk = u32[kTiles][kSteps][2];

// 16 rows of K elements, of the states' type: rows g and g + 8, chunks t, t + 4, ..
struct RowChunk {
    u32 words[2][4];

    __device__ __forceinline__ void load_row(const char* state, i64 row, int i, int j, int t) {
        load_chunk<kState, kLaneElements, kAlignedStates, Cache::kStreaming>(
            state, (row + i * 8) * kK + (4 * j + t) * kLaneElements, row + i * 8 < kV ? kLaneElements : 0, words[i]);
    }
    __device__ __forceinline__ void load(const char* state, i64 row, int j, int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) load_row(state, row, i, j, t);
    }
    __device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const ColumnChunk& columns) const {
        if constexpr (kNarrow) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const u32 a[4] = {words[0][2 * step], words[1][2 * step], words[0][2 * step + 1],
                                  words[1][2 * step + 1]};
#pragma unroll
                for (int n = 0; n < kTiles; ++n) Narrow::mma(sums[n], a, columns[n][step][0], columns[n][step][1]);
            }
        } else {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 high[4], low[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 x = words[i % 2][2 * pair + i / 2];
                    high[i] = leading(x), low[i] = rest(x, high[i]);
                }
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    float two[2];
                    unpack<kQkv>(&columns[n][0][pair], two);
                    const u32 b0 = __float_as_uint(two[0]), b1 = __float_as_uint(two[1]);
                    mma_tf32(sums[n], high, b0, b1);
                    mma_tf32(sums[n], low, b0, b1);
                }
            }
        }
    }
};

// The tokens as columns: lane 4 g + t has column g of every 8, chunks t, t + 4, .. of it. Drafts lie in shared memory.
struct Columns {
    u32 words[kHolds ? kLaneChunks : 1][kTiles][kSteps][2];

    static __device__ __forceinline__ const char* row(const Params& p, const Span& span, u32 h, int column) {
        const int token = column % kDrafts;
        return column < kDrafts ? row_of(p.k, p.k_strides, span, token, h) : row_of(p.q, p.q_strides, span, token, h);
    }
    __device__ __forceinline__ void load(const Params& p, const Span& span, u32 h, int g, int t, Shared& shared) {
        const int T = static_cast<int>(span.length);
        if constexpr (kHolds) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                const int column = n * 8 + g, exists = column % kDrafts < T ? kLaneElements : 0;
#pragma unroll
                for (int j = 0; j < kLaneChunks; ++j)
                    load_chunk<kQkv, kLaneElements, kAlignedTokens>(
                        row(p, span, h, column), (4 * j + t) * kLaneElements, exists, &words[j][n][0][0]);
            }
        } else {
            constexpr int kRowChunks = kK / 8;
#pragma unroll
            for (int i = 0; i < ceil_div(kColumns * kRowChunks, kThreads); ++i) {
                const int at = threadIdx.x + i * kThreads, column = at / kRowChunks, chunk = at % kRowChunks;
                if (at >= kColumns * kRowChunks) break;
                const int valid = column % kDrafts < T ? 8 : 0;
                char* const to = shared.tokens + column * kTokenStride + chunk * 16;
                if constexpr (kAlignedTokens) {
                    ptx::copy16(to, at_chunk(row(p, span, h, column), chunk), valid > 0);
                } else {
                    u32 four[4];
                    load_chunk<kQkv, 8, false>(row(p, span, h, column), chunk * 8, valid, four);
                    *reinterpret_cast<uint4*>(to) = make_uint4(four[0], four[1], four[2], four[3]);
                }
            }
        }
    }
    __device__ __forceinline__ void get(int j, int g, int t, const Shared& shared, ColumnChunk& chunk) const {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const char* const from = shared.tokens + (n * 8 + g) * kTokenStride + (4 * j + t) * kLaneElements * 2;
            if constexpr (kHolds) {
#pragma unroll
                for (int x = 0; x < 2 * kSteps; ++x) chunk[n][x / 2][x % 2] = words[j][n][x / 2][x % 2];
            } else if constexpr (kSteps == 1) {
                const uint2 two = *reinterpret_cast<const uint2*>(from);
                chunk[n][0][0] = two.x, chunk[n][0][1] = two.y;
            } else {
                const uint4 four = *reinterpret_cast<const uint4*>(from);
                chunk[n][0][0] = four.x, chunk[n][0][1] = four.y;
                chunk[n][kSteps - 1][0] = four.z, chunk[n][kSteps - 1][1] = four.w;
            }
        }
    }

  private:
    static __device__ __forceinline__ const char* at_chunk(const char* row, int chunk) { return row + chunk * 16; }
};

// The products of the tokens with one another, by one warp.
__device__ __forceinline__ void multiply_tokens(const Columns& tokens, int lane, Shared& shared) {
    const int g = lane / 4, t = lane % 4;
    float sums[kTiles][4] = {}, queries[2][4] = {};
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) {
        ColumnChunk columns;
        tokens.get(j, g, t, shared, columns);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            // Rows 8 .. 15: queries with up to 8 drafts, the second half of the keys with 16.
            constexpr int kSecond = kTiles > 1 ? 1 : 0;
            const u32 a[4] = {columns[0][step][0], kTiles > 1 ? columns[kSecond][step][0] : 0u, columns[0][step][1],
                              kTiles > 1 ? columns[kSecond][step][1] : 0u};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) Narrow::mma(sums[n], a, columns[n][step][0], columns[n][step][1]);
            if constexpr (kTiles == 4) {
                const u32 q[4] = {columns[2][step][0], columns[3][step][0], columns[2][step][1], columns[3][step][1]};
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    Narrow::mma(queries[n], q, columns[2 + n][step][0], columns[2 + n][step][1]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) shared.gram[g + x / 2 * 8][n * 8 + 2 * t + x % 2] = sums[n][x];
    __syncwarp();
    if constexpr (kTiles == 4) {
#pragma unroll
        for (int x = 0; x < 2; ++x)
            if (g == 2 * t + x) shared.queries[g] = queries[0][x], shared.queries[g + 8] = queries[1][2 + x];
    } else if (lane < kDrafts) {
        constexpr int kFirst = kTiles > 1 ? 8 : 4;
        shared.queries[lane] = shared.gram[kFirst + lane][kDrafts + lane];
    }
    __syncwarp();
}

__device__ __forceinline__ bool on_path(const signed char* parents, int s, int t) {
    while (t > s) t = parents[t];
    return t == s;
}

// What the tokens are to one another, by one warp: lane i brings the gates of token i.
__device__ __forceinline__ void relate_tokens(const RingParams& p, u32 n, int T, const GateBits& gates, int lane,
                                              Shared& shared) {
    float g = 0.f;
    int parent = -1;
    if (lane < T) {
        g = log_decay_of(p.call, gates);
        parent = parent_of(p.ring, n, T, lane);
        shared.parents[lane] = static_cast<signed char>(parent);
        float k_scale = 1.f, q_scale = p.call.scale;
        if constexpr (kL2Norm) {
            k_scale = rsqrtf(shared.gram[lane][lane] + 1e-6f);
            q_scale = rsqrtf(shared.queries[lane] + 1e-6f) * p.call.scale;
        }
        shared.beta[lane] = gates.beta(p.call);
        shared.log_decay[lane] = g;
        shared.k_scale[lane] = k_scale;
        shared.columns[lane] = k_scale, shared.columns[kDrafts + lane] = q_scale;
    }
    // Lane s: decays from after draft s; the one after the last draft: those of the state. -inf: s is not on the path.
    for (int i = 0; i < T; ++i) {
        const int before = __shfl_sync(0xffffffffu, parent, i);
        const float own = __shfl_sync(0xffffffffu, g, i);
        if (lane <= kDrafts) {
            float sum = lane == kStateColumn ? 0.f : __int_as_float(0xff800000);
            if (before >= 0) sum = shared.logs[before][lane];
            shared.logs[i][lane] = lane == i ? 0.f : sum + own;
        }
    }
    __syncwarp();
    for (int at = lane; at < T * kColumns; at += 32) {
        const int s = at / kColumns, column = at % kColumns, i = column % kDrafts;
        // What is not on its path does not touch a draft, not even as 0 times NaN.
        const bool reads = i < T && (column < kDrafts ? s < i : s <= i) && on_path(shared.parents, s, i);
        shared.coefficients[s][column] = reads ? exp_unbiased(shared.logs[i][s]) * shared.k_scale[s] *
                                                     shared.columns[column] * shared.gram[s][column]
                                               : 0.f;
    }
    __syncwarp();
    for (int column = lane; column < kColumns; column += 32) {
        const int i = column % kDrafts;
        const float decay = i < T ? exp_unbiased(shared.logs[i][kStateColumn]) : 0.f;
        if (column < kDrafts) shared.decay[i] = decay;
        shared.columns[column] = i < T ? decay * shared.columns[column] : 0.f;
    }
}

// Adds what the entries contribute: their updates times the products of their keys.
__device__ __forceinline__ void add_entries(float (&sums)[kWarpTiles][kTiles][4], const Shared& shared, int pending,
                                            int row, int g, int t) {
#pragma unroll
    for (int first = 0; first < kEntries; first += 8) {
        if (first >= pending) break;
        const int entries[2] = {first + t, first + t + 4};
        u32 high[kWarpTiles][4], low[kWarpTiles][4];
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int entry = entries[i / 2];
                const float u = entry < pending ? shared.updates[entry].get(row + m * 16 + g + i % 2 * 8) : 0.f;
                high[m][i] = __float_as_uint(u);
                if constexpr (!kNarrow) {
                    high[m][i] = leading(__float_as_uint(u));
                    low[m][i] = rest(__float_as_uint(u), high[m][i]);
                }
            }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            u32 b_high[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = 0.f;
#pragma unroll
                for (int x = 0; x < kParts; ++x) sum += shared.products[x][entries[i]][n * 8 + g];
                const u32 x = __float_as_uint(sum * shared.left[entries[i]]);
                b_high[i] = leading(x), b_low[i] = rest(x, b_high[i]);
            }
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) {
                mma_tf32(sums[m][n], high[m], b_high[0], b_high[1]);
                mma_tf32(sums[m][n], high[m], b_low[0], b_low[1]);
                if constexpr (!kNarrow) mma_tf32(sums[m][n], low[m], b_high[0], b_high[1]);
            }
        }
    }
}

// The pending entries' part of a folded state, for the rows and chunks of a lane. States of 16 bits take it from tensor
// cores, with the updates times what is left of them in two parts of 16 bits; float32 states in float32.
struct Folded {
    u32 high[kWarpTiles][4], low[kWarpTiles][4];

    __device__ __forceinline__ Folded(Shared& shared, float token_decay, int pending, int row, int g, int t) {
        const int lane = threadIdx.x % 32;
        if constexpr (!kNarrow) {
            weigh(shared.updates, token_decay * shared.left[lane % kEntries], pending, shared.weighted);
        } else {
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float x[2], y[2];
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        const int entry = 2 * t + b + i / 2 * 8;
                        x[b] = entry < pending ? token_decay * shared.left[entry] *
                                                     shared.updates[entry].get(row + m * 16 + g + i % 2 * 8)
                                               : 0.f;
                    }
                    high[m][i] = Narrow::pack(x[0], x[1]);
                    unpack<kQkv>(&high[m][i], y);
                    low[m][i] = Narrow::pack(x[0] - y[0], x[1] - y[1]);
                }
        }
    }

    // h += keys^T updates, for chunk j.
    __device__ __forceinline__ void add(float (&h)[kWarpTiles][2][kLaneElements], const Shared& shared, int pending,
                                        int j, int row, int g, int t) const {
        if constexpr (kNarrow) {
            // Column n of eight is element 8 (n / 2) + n % 2 of the row, and two more for each x: lane t gets its own.
#pragma unroll
            for (int x = 0; x < kLaneElements; x += 2) {
                u32 keys[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int entry = 2 * t + 8 * i;
                    const u16 first = reinterpret_cast<const u16*>(shared.keys[entry].chunks[4 * j + g / 2])[x + g % 2];
                    const u16 second =
                        reinterpret_cast<const u16*>(shared.keys[entry + 1].chunks[4 * j + g / 2])[x + g % 2];
                    keys[i] = first | u32{second} << 16;
                }
#pragma unroll
                for (int m = 0; m < kWarpTiles; ++m) {
                    float sums[4] = {h[m][0][x], h[m][0][x + 1], h[m][1][x], h[m][1][x + 1]};
                    Narrow::mma(sums, high[m], keys[0], keys[1]);
                    Narrow::mma(sums, low[m], keys[0], keys[1]);
                    h[m][0][x] = sums[0], h[m][0][x + 1] = sums[1], h[m][1][x] = sums[2], h[m][1][x + 1] = sums[3];
                }
            }
        } else {
#pragma unroll 2
            for (int e = 0; e < pending; ++e) {
                const uint4 four = *reinterpret_cast<const uint4*>(shared.keys[e].chunks[4 * j + t]);
                const u32 words[4] = {four.x, four.y, four.z, four.w};
                float key[kLaneElements];
                unpack<kState>(words, key);
#pragma unroll
                for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float u = shared.weighted[e][place_of(row + m * 16 + g + i * 8)];
#pragma unroll
                        for (int x = 0; x < kLaneElements; ++x) h[m][i][x] = fmaf(key[x], u, h[m][i][x]);
                    }
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS) ring_mma(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = block.slice * kRows, row = warp * (16 * kWarpTiles);
    const Span span = find_span(p.call, block.n);
    const int T = kOneToken ? 1 : static_cast<int>(span.length);

    // Every load is issued before anything waits for one.
    const Rows rows(p.call, block.n);
    Columns tokens;
    tokens.load(p.call, span, block.h, g, t, shared);
    GateBits gates{};
    LaneToken::Words words;
    if (warp == 0) {
        if constexpr (kOneToken) words.load(p.call, span, 0, block.h, lane % kLanes);
        if (kOneToken || lane < T) gates.load(p.call, span, kOneToken ? 0 : lane, block.hv);
    }
    // Values of the tokens whose keys' columns the lane has.
    constexpr int kKeyTiles = kTiles > 1 ? kTiles / 2 : 1;
    u32 values[kWarpTiles][kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const int token = n * 8 + 2 * t + x % 2;
            const char* from = row_of(p.call.v, p.call.v_strides, span, token, block.hv);
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) {
                const int at = first_row + row + m * 16 + g + x / 2 * 8;
                values[m][n][x] = token < T && at < kV ? load_bits(kQkv, from, at) : 0;
            }
        }
    const Work work(p.call, rows, block.hv);
    if (work.padding) return write_zeros(p.call, span, block.hv, first_row, min(first_row + kRows, kV));
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    const Fill fill(ptx::load4(counts));
    const i64 own_row = i64{first_row} + row + g;
    RowChunk state[kWarpTiles][kLaneChunks];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < kLaneChunks; ++j) state[m][j].load_row(work.read, own_row + m * 16, i, j, t);

    const int pending = fill.pending();
    const bool folds =
        kOneToken ? pending + 1 >= static_cast<int>(limit_of(p.ring, fill, slot)) : pending + T > kEntries;
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    // A lane copies the keys' chunks that it multiplies; those of entries that are not there are zeros.
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (j % kWarps == warp)
                copy_chunk(shared.keys[g + i * 8].chunks[4 * j + t], entries.key(g + i * 8),
                           (4 * j + t) * kLaneElements, g + i * 8 < pending ? kLaneElements : 0);
    copy_updates(entries, pending, first_row, shared.updates);
    Remains remains(entries, warp == 0 ? pending : 0, lane);

    if constexpr (!kHolds) {
        ptx::wait_copies();
        __syncthreads();
    }
    if (warp == 0) {
        if constexpr (kOneToken) {
            const LaneToken token(words);
            const Scalars s = token.scalars(p.call.scale, 1.f, gates.beta(p.call));
            const float g_own = log_decay_of(p.call, gates), decay = exp_unbiased(g_own);
            if (lane == 0) {
                shared.beta[0] = s.beta, shared.log_decay[0] = g_own, shared.k_scale[0] = s.k_scale;
                shared.decay[0] = decay;
                shared.columns[0] = decay * s.k_scale, shared.columns[kDrafts] = decay * s.from_q;
                shared.coefficients[0][kDrafts] = s.from_u;
            }
        } else {
            multiply_tokens(tokens, lane, shared);
            relate_tokens(p, block.n, T, gates, lane, shared);
        }
        remains.scan(lane);
        if (lane < kEntries) shared.left[lane] = exp_unbiased(remains.log_entry) * remains.key_scale;
        if (lane == 0) shared.state_decay = exp_unbiased(remains.log_state);
    }
    float sums[kWarpTiles][kTiles][4];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int x = 0; x < 4; ++x) sums[m][n][x] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) {
        ColumnChunk columns;
        tokens.get(j, g, t, shared, columns);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
            state[m][j].multiply(sums[m], columns);
        }
    }
    if constexpr (kHolds) ptx::wait_copies();
#pragma unroll
    for (int x = 0; x < kOwnParts; ++x) {
        const int part = x * kWarps + warp;
        float with_keys[kTiles][4] = {};
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
            ColumnChunk columns;
            tokens.get(j, g, t, shared, columns);
            keys.multiply(with_keys, columns);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *reinterpret_cast<float2*>(&shared.products[part][g + i * 8][n * 8 + 2 * t]) =
                    make_float2(with_keys[n][2 * i], with_keys[n][2 * i + 1]);
    }
    __syncthreads();

    // Every thread of this block has the entries by now.
    u32 arrived = 0;
    if (threadIdx.x == 0) {
        if (!kOneToken && folds) {
            u32* const arrivals = p.ring.arrivals + slot * p.ring.H + block.h;
            const bool last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
            if (last) *arrivals = 0;
            shared.last = last;
        }
        arrived = atomicAdd(counts + 1, 1u);
    }
    const float state_decay = shared.state_decay;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int x = 0; x < 4; ++x) sums[m][n][x] *= state_decay;
    add_entries(sums, shared, pending, row, g, t);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const float2 scale = *reinterpret_cast<const float2*>(&shared.columns[n * 8 + 2 * t]);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
            for (int x = 0; x < 4; ++x) sums[m][n][x] *= x % 2 ? scale.y : scale.x;
    }

    const int base = folds ? 0 : pending;
    const bool appends = !(kOneToken && folds);
    float update[kWarpTiles][2];
#pragma unroll
    for (int i = 0; i < (kOneToken ? 1 : kDrafts); ++i) {
        if (i >= T) break;
        const float beta = shared.beta[i];
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float value = value_of(kQkv, values[m][i / 8][2 * x + i % 2]);
                const float u = beta * (value - sums[m][i / 8][2 * x + i % 2]);
                update[m][x] = __shfl_sync(0xffffffffu, u, (lane & ~3) | i % 8 / 2);
            }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const float2 c = *reinterpret_cast<const float2*>(&shared.coefficients[i][n * 8 + 2 * t]);
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x)
                    if (kOneToken || (x % 2 ? c.y : c.x) != 0.f)
                        sums[m][n][x] = fmaf(x % 2 ? c.y : c.x, update[m][x / 2], sums[m][n][x]);
        }
        // Two of the four lanes that have the updates of two rows write one each.
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
            const int at = first_row + row + m * 16 + g + t * 8;
            if (appends && t < 2 && at < kV)
                store<kState>(entries.update(base + i, at), 0, t ? update[m][1] : update[m][0]);
        }
    }
#pragma unroll
    for (int n = kTiles / 2; n < kTiles; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const int column = n * 8 + 2 * t + x % 2, token = column - kDrafts;
            if (token < 0 || token >= T) continue;
            char* const out = row_of(p.call.out, p.call.out_strides, span, token, block.hv);
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) {
                const int at = first_row + row + m * 16 + g + x / 2 * 8;
                if (at < kV) store<kQkv>(out, at, sums[m][n][x]);
            }
        }

    if (folds) {
        // A step folds its own token in as well.
        const float token_decay = kOneToken ? shared.decay[0] : 1.f, decay = state_decay * token_decay;
        const float k_scale = kOneToken ? shared.k_scale[0] : 0.f;
        const char* const k_row = row_of(p.call.k, p.call.k_strides, span, 0, block.h);
        const Folded folded(shared, token_decay, pending, row, g, t);
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j) {
            float k[kLaneElements] = {};
            if constexpr (kOneToken) {
                u32 part[words_of(kQkv, kLaneElements)];
                load_chunk<kQkv, kLaneElements, kAlignedTokens>(k_row, (4 * j + t) * kLaneElements, kLaneElements,
                                                                part);
                unpack<kQkv>(part, k);
            }
            float h[kWarpTiles][2][kLaneElements];
            if constexpr (!kHolds)
#pragma unroll
                for (int m = 0; m < kWarpTiles; ++m) state[m][j].load(work.read, own_row + m * 16, j, t);
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (u32& word : state[m][j].words[i]) ptx::forget(word);
                    unpack<kState>(state[m][j].words[i], h[m][i]);
#pragma unroll
                    for (int x = 0; x < kLaneElements; ++x) {
                        h[m][i][x] *= decay;
                        if constexpr (kOneToken) h[m][i][x] = fmaf(k[x], k_scale * update[m][i], h[m][i][x]);
                    }
                }
            folded.add(h, shared, pending, j, row, g, t);
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const i64 at = own_row + m * 16 + i * 8;
                    pack<kState>(h[m][i], state[m][j].words[i]);
                    store_chunk<kState, kLaneElements, kAlignedStates>(
                        work.write, at * kK + (4 * j + t) * kLaneElements, at < kV ? kLaneElements : 0,
                        state[m][j].words[i]);
                }
        }
    }

    const u32 half = !kOneToken && folds ? fill.half() ^ 1 : fill.half();
    const Entries written(p.ring, slot, half, block.h, block.hv);
    if (appends && block.slice == 0 && threadIdx.x < T) {
        written.gates[base + threadIdx.x] = shared.log_decay[threadIdx.x];
        if (!kOneToken && block.hv == 0)
            p.ring.draft_parents[slot * kMostDrafts + threadIdx.x] = shared.parents[threadIdx.x];
    }
    // Keys that others may still read are replaced by who knows that all have been read.
    if (!kOneToken && folds) __syncthreads();
    const bool leads = block.slice == 0 && block.hv % p.call.group == 0;
    if (kOneToken ? leads && !folds : folds ? shared.last : leads) {
        const int part = threadIdx.x % kLanes;
        for (int i = threadIdx.x / kLanes; i < T; i += kAtOnce) {
            words.load(p.call, span, i, block.h, part);
            const LaneToken token(words);
            StoredKey::store(written.key(base + i), part, token.k, shared.k_scale[i]);
            if (part == 0) written.key_scales[base + i] = StoredKey::scale(shared.k_scale[i]);
        }
    }
    if (threadIdx.x == 0 && arrived == gridDim.x * gridDim.y - 1) {
        counts[1] = 0;
        counts[0] = Fill(folds       ? 0
                         : kOneToken ? pending + 1
                                     : pending,
                         folds ? p.ring.capacity : fill.limit(), kOneToken ? 0 : T, half)
                        .word;
    }
}
