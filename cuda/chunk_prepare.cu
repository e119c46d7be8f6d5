// What a chunk's outputs and state update need of the chunk alone: K and Q as the products' operands (normalised
// first with GDR_L2NORM), T, P and the decays. See gdr/chunk.cuh for the formulas and the workspace.
//
// A block of 4 warps takes one chunk of one key head and some of its value heads, which share K K^T and Q K^T. Of the
// 10 lower blocks of each, warp w takes row w of K K^T and row 3 - w of Q K^T: 5 blocks for every warp. Value heads go
// two at a time: for each, two warps find T.
//
// Decays between blocks are products of factors that belong to one token or one block, each the exponential of a sum
// of log decays between them: a product underflows only where the decay does. Only tokens of the same 8 take an
// exponential a pair.
//
// T by blocks: the diagonal blocks of (I + L)^-1 by forward substitution in float32, a lane a column; then columns of
// blocks, X_ij = -X_ii sum_k L_ik X_kj, as transposes Z_ij = X_ij^T, so that each product's result is the left
// operand of the next one in the same registers. No powers of L: with correlated keys they overflow.
// requires: sm_80
#include "gdr/chunk.cuh"

using namespace gdr;

namespace {

constexpr int kWarps = kRows, kHeadsAtOnce = 2;
// exp(-256) is 0 in float32, and so is the exponential of any sum that contains it: a log decay below it, -inf
// included, is the same as -256, and no sum of a chunk's log decays leaves the range where they are exact.
constexpr float kForgotten = -256.f;

// A sum of log decays, to the base 2, as two floats: differences of long sums stay exact.
struct alignas(8) Sum {
    float high, low;

    static __device__ __forceinline__ Sum of(float g) {
        constexpr float kLog2e = 1.4426950408889634f, kRest = 1.925963033500011e-8f;
        const float high = g * kLog2e;
        return {high, fmaf(g, kRest, fmaf(g, kLog2e, -high))};
    }
    __device__ __forceinline__ Sum operator+(const Sum& y) const {
        const float sum = high + y.high, part = sum - high;
        const float error = (high - (sum - part)) + (y.high - part);
        return {sum, low + y.low + error};
    }
    __device__ __forceinline__ Sum from_lane_below(int distance) const {
        return {__shfl_up_sync(0xffffffffu, high, distance), __shfl_up_sync(0xffffffffu, low, distance)};
    }
};

__device__ __forceinline__ float decay(const Sum& t, const Sum& s) {  // exp(G_t - G_s)
    return exp2_fast((t.high - s.high) + (t.low - s.low));
}

// Of one value head, for every token: the running sum of the log decays, the write strength, and the factors of
// decays between blocks.
struct alignas(16) Gates {
    Sum G[kC];
    float beta[kC];
    float from_start[kC];  // from before the token's block of 16 to the token
    float to_end[kC];      // from the token to the end of its block of 16
    float middle[kC];      // between the token and the end of its block's first 8 tokens
};

// What the two warps of one value head work on.
struct alignas(16) Work {
    char L[6 * kBlockBytes];      // -L below the diagonal, row after row; (rows 0-7, columns 0-7), (0-7, 8-15), ..
    char X[kRows * kBlockBytes];  // inverses of the diagonal blocks, as T's lie in the workspace
    float diagonal[kRows][16 * 20 + 4];  // diagonal blocks of -L, by columns, 20 floats apart
};

struct Shared {
    union {
        struct {
            char K[kKeyTileBytes], Q[kKeyTileBytes];
        };
        Work work[kHeadsAtOnce];  // once the products are done
    };
    Gates gates[kWarps];
};

// Copies a tile to the workspace once all threads have published what they stored of it.
__device__ __forceinline__ void copy_out(char* to, const char* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) store_bulk(to, shared_address(from), bytes);
#else
    for (int i = threadIdx.x * 16; i < bytes; i += 32 * kWarps * 16)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
#endif
}

// A chunk of one key head.
struct Place {
    Sequence seq;
    i64 start;  // its first token in the sequence
    int tokens, h;

    template <class Strides>
    __device__ __forceinline__ i64 offset(const Strides& s, int head) const {
        return seq.batch * s.batch + (seq.first + start) * s.token + head * s.head;
    }
};

// ---- The gates of one value head, by one warp: lane l has tokens 2 l and 2 l + 1. Tokens past the end of the sequence
// neither decay nor write.

struct GateBits {
    u32 a[2], b[2], A_log, dt_bias;

    __device__ __forceinline__ void load(const Params& p, const Place& place, int hv) {
        const i64 from_a = place.offset(p.a_strides, hv), from_b = place.offset(p.b_strides, hv);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Where there is no token, the last one again.
            const int t = min(static_cast<int>(threadIdx.x % 32 * 2 + i), place.tokens - 1);
            a[i] = load_bits(p.a_type, p.a, from_a + t * p.a_strides.token);
            b[i] = load_bits(p.b_type, p.b, from_b + t * p.b_strides.token);
        }
        if constexpr (kRawGates) {
            A_log = load_bits(p.A_log_type, p.A_log, hv * p.A_log_stride);
            dt_bias = load_bits(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
        }
    }
    __device__ __forceinline__ void finish(const Params& p, const Place& place, Gates& to) const {
        const int lane = threadIdx.x % 32, t = 2 * lane;
        float g[2] = {0.f, 0.f}, strength[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (t + i >= place.tokens) continue;
            g[i] = value_of(p.a_type, a[i]), strength[i] = value_of(p.b_type, b[i]);
            if constexpr (kRawGates) {
                g[i] = log_decay(value_of(p.A_log_type, A_log), g[i], value_of(p.dt_bias_type, dt_bias),
                                 p.softplus_beta, 1.f / p.softplus_beta, p.softplus_threshold);
                strength[i] = sigmoid(strength[i]);
            }
            g[i] = g[i] < kForgotten ? kForgotten : g[i];
        }
        const Sum g0 = Sum::of(g[0]);
        Sum second = g0 + Sum::of(g[1]);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const Sum below = second.from_lane_below(distance);
            if (lane >= distance) second = below + second;
        }
        const Sum before = second.from_lane_below(1), first = lane == 0 ? g0 : before + g0;
        *reinterpret_cast<float4*>(&to.G[t]) = make_float4(first.high, first.low, second.high, second.low);
        *reinterpret_cast<float2*>(&to.beta[t]) = make_float2(strength[0], strength[1]);
    }
};

// Finds the factors of all heads' decays, a thread a token.
__device__ __forceinline__ void fill_factors(Gates* gates, HeadTile* out, int heads, float scale) {
    const int t = threadIdx.x % kC, block = t / 16 * 16;
#pragma unroll 1
    for (int head = threadIdx.x / kC; head < heads; head += 32 * kWarps / kC) {
        Gates& to = gates[head];
        const Sum* G = to.G;
        const Sum x = G[t], none = {0.f, 0.f}, middle = G[block + 7];
        const float d = decay(x, none);
        to.from_start[t] = decay(x, block == 0 ? none : G[block - 1]);
        to.to_end[t] = decay(G[block + 15], x);
        to.middle[t] = decay(t % 16 < 8 ? middle : x, t % 16 < 8 ? x : middle);
        out[head].d[t] = d, out[head].scaled_d[t] = d * scale, out[head].e[t] = decay(G[kC - 1], x);
    }
}

// ---- Keys and queries.

// 8 tokens: lane l has token l % 8 and keys 8 (l / 8 + 4 i) and on.
struct Rows {
    static constexpr int kChunks = kKeys / 32, kWords = words_of(kQkv, 8);
    u32 words[kChunks][kWords];

    __device__ __forceinline__ void load(const char* row) {  // from the lane's first key
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            load_chunk<kQkv, 8, kAligned>(row, i * 32, kK == kKeys ? 8 : kK - i * 32 - threadIdx.x % 32 / 8 * 8,
                                          words[i]);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kChunks * kWords; ++i) words[i / kWords][i % kWords] = 0;
    }
    // Stores them as operands, at the lane's place among 8 tokens of a tile.
    __device__ __forceinline__ void store(char* to) {
        float factor = 1.f;
        if constexpr (kL2Norm) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                float x[8];
                unpack<kQkv>(words[i], x);
#pragma unroll
                for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares);
            }
            squares += __shfl_xor_sync(0xffffffffu, squares, 8);
            squares += __shfl_xor_sync(0xffffffffu, squares, 16);
            factor = rsqrtf(squares + 1e-6f);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            uint4 y;
            if constexpr (kQkv == Op::kType && !kL2Norm) {
                y = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
            } else {
                float x[8];
                unpack<kQkv>(words[i], x);
                if constexpr (kL2Norm) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) x[j] *= factor;
                }
                y = make_uint4(Op::pack(x[0], x[1]), Op::pack(x[2], x[3]), Op::pack(x[4], x[5]), Op::pack(x[6], x[7]));
            }
            *reinterpret_cast<uint4*>(to + i * 4 * kKeyStep) = y;
        }
    }
};

// Brings keys and queries; `meanwhile` runs while the first of them are on their way. Rows past the sequence's end are
// read from its last token, then cleared.
template <class Meanwhile>
__device__ __forceinline__ void fill_keys(const Params& p, Shared& sm, const Place& place, Meanwhile&& meanwhile) {
    constexpr int kAtOnce = !kAligned ? 1 : kKeys <= 128 ? 4 : 2;  // groups of 8 tokens in flight
    const int lane = threadIdx.x % 32, token = threadIdx.x / 32 * 8 + lane % 8;
    const int offset = lane / 8 * kKeyStep + threadIdx.x / 32 * kMatrixBytes + lane % 8 * 16;
    const char* const rows_of[2] = {at(p.k, kQkv, place.offset(p.k_strides, place.h) + lane / 8 * 8),
                                    at(p.q, kQkv, place.offset(p.q_strides, place.h) + lane / 8 * 8)};
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
        Rows rows[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int which = (first + i) / 2;
            const int t = min(token + (first + i) % 2 * 32, place.tokens - 1);
            rows[i].load(at(rows_of[which], kQkv, t * (which == 0 ? p.k_strides : p.q_strides).token));
        }
        if (first == 0) meanwhile();
        if (place.tokens < kC) {
            __syncwarp();  // keeps this apart from what whole chunks do
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (token + (first + i) % 2 * 32 >= place.tokens) rows[i].clear();
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            rows[i].store(sm.K + offset + (first + i) / 2 * kKeyTileBytes + (first + i) % 2 * 4 * kMatrixBytes);
    }
}

// ---- Products. Of row w of K K^T, block w - n is x[n]; of row 3 - w of Q K^T, block 3 - w - n is x[4 - n].
using Products = Tile[kRows + 1];

template <int kWarp>
__device__ __forceinline__ void multiply(const Shared& sm, Products& x) {
    constexpr int kQRow = kRows - 1 - kWarp;
    const int lane = threadIdx.x % 32;
    const u32 K = shared_address(sm.K), columns = K + by_keys(lane), rows = K + by_tokens(lane);
#pragma unroll
    for (int n = 0; n <= kRows; ++n) x[n].clear();
#pragma unroll 2
    for (int block = 0; block < kKeyBlocks; ++block) {
        u32 k[4], q[4];
        load_matrices(rows + key_block(kWarp, block), k);
        load_matrices(rows + kKeyTileBytes + key_block(kQRow, block), q);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            if (j > kWarp && j > kQRow) continue;
            u32 column[4];
            load_matrices(columns + key_block(j, block), column);
            if (j <= kWarp) x[kWarp - j].add_product<Op>(k, column);
            if (j <= kQRow) x[kRows - kQRow + j].add_product<Op>(q, column);
        }
    }
}

// ---- Decays. In a block, a lane has rows lane / 4 and lane / 4 + 8.

// The factors of a row of blocks that a lane needs.
struct Factors {
    float2 from_start;        // of the lane's rows
    float2 to_end[kRows][2];  // of the lane's columns, n blocks left of the diagonal
    float across[kRows];      // of the blocks n left of the diagonal, from end to end
    float4 columns[2];        // sums of the columns of the diagonal block
    Sum rows[2];
    float2 to_middle;
    float from_middle;

    __device__ __forceinline__ Factors(const Gates& gates, int row) {
        const int lane = threadIdx.x % 32, t = row * 16 + lane / 4, s = row * 16 + lane % 4 * 2;
        from_start = make_float2(gates.from_start[t], gates.from_start[t + 8]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            columns[i] = *reinterpret_cast<const float4*>(&gates.G[s + i * 8]);
            rows[i] = gates.G[t + i * 8];
        }
        to_middle = *reinterpret_cast<const float2*>(&gates.middle[s]);
        from_middle = gates.middle[t + 8];
#pragma unroll
        for (int n = 1; n < kRows; ++n) {
            if (n > row) break;
            to_end[n][0] = *reinterpret_cast<const float2*>(&gates.to_end[s - n * 16]);
            to_end[n][1] = *reinterpret_cast<const float2*>(&gates.to_end[s - n * 16 + 8]);
            across[n] = gates.from_start[(row - n) * 16 + 15];
        }
    }
    // A diagonal block of a product times the decays between rows and columns and factors of its rows; 0 above the
    // diagonal.
    __device__ __forceinline__ void apply_diagonal(Tile& x, const float2& y) const {
        const int lane = threadIdx.x % 32;
        const bool one = lane % 4 * 2 <= lane / 4,
                   both = lane % 4 * 2 < lane / 4;  // columns are not above the diagonal
        const float4 &left = columns[0], &right = columns[1];
        const float middle = y.y * from_middle;
        x.x[0][0] = one ? x.x[0][0] * y.x * decay(rows[0], {left.x, left.y}) : 0.f;
        x.x[0][1] = both ? x.x[0][1] * y.x * decay(rows[0], {left.z, left.w}) : 0.f;
        x.x[0][2] *= middle * to_middle.x;
        x.x[0][3] *= middle * to_middle.y;
        x.x[1][0] = x.x[1][1] = 0.f;
        x.x[1][2] = one ? x.x[1][2] * y.y * decay(rows[1], {right.x, right.y}) : 0.f;
        x.x[1][3] = both ? x.x[1][3] * y.y * decay(rows[1], {right.z, right.w}) : 0.f;
    }
    // The block n left of it: y has all of the decay but that in its own columns, and then that too.
    __device__ __forceinline__ void apply(Tile& x, float2& y, int n) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2& c = to_end[n][half];
            x.x[half][0] *= y.x * c.x, x.x[half][1] *= y.x * c.y;
            x.x[half][2] *= y.y * c.x, x.x[half][3] *= y.y * c.y;
        }
        y.x *= across[n], y.y *= across[n];
    }
};

// Stores a block as 16-bit operands, its matrices in the order (rows 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), ..
__device__ __forceinline__ void store_block(char* to, const Tile& x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        *reinterpret_cast<u32*>(to + i * 128 + lane * 4) = Op::pack(x.x[i % 2][i / 2 * 2], x.x[i % 2][i / 2 * 2 + 1]);
}

// The warp's blocks of -L below the diagonal, and on it (there, what is above is anything).
__device__ __forceinline__ void fill_lower(const Gates& gates, const Products& products, Work& work, int warp) {
    const int lane = threadIdx.x % 32, t = warp * 16 + lane / 4;
    const Factors factors(gates, warp);
    float2 y = make_float2(-gates.beta[t], -gates.beta[t + 8]);
    Tile x = products[0];
    factors.apply_diagonal(x, y);
    float* diagonal = work.diagonal[warp] + lane % 4 * 2 * 20 + lane / 4;
    diagonal[0] = x.x[0][0], diagonal[20] = x.x[0][1];
    diagonal[8] = x.x[0][2], diagonal[28] = x.x[0][3];
    diagonal[8 * 20 + 8] = x.x[1][2], diagonal[9 * 20 + 8] = x.x[1][3];
    y.x *= factors.from_start.x, y.y *= factors.from_start.y;
    char* to = work.L + warp * (warp - 1) / 2 * kBlockBytes;
#pragma unroll
    for (int n = 1; n < kRows; ++n) {
        if (n > warp) break;
        x = products[n];
        factors.apply(x, y, n);
        store_block(to + (warp - n) * kBlockBytes, x);
    }
}

// The warp's blocks of P.
__device__ __forceinline__ void fill_scores(const Gates& gates, const Products& products, char* P, float scale,
                                            int row) {
    const Factors factors(gates, row);
    float2 y = make_float2(scale, scale);
    Tile x = products[kRows];
    factors.apply_diagonal(x, y);
    store_block(P + lower_block(row, row), x);
    y.x *= factors.from_start.x, y.y *= factors.from_start.y;
#pragma unroll
    for (int n = 1; n < kRows; ++n) {
        if (n > row) break;
        x = products[kRows - n];
        factors.apply(x, y, n);
        store_block(P + lower_block(row, row - n), x);
    }
}

// ---- T.

// Columns of the inverses of all diagonal blocks of I + L: lane l has column kFirst + l % 8 of block l / 8.
template <int kFirst>
__device__ __forceinline__ void invert_columns(Work& work, const Gates& gates, char* T) {
    const int lane = threadIdx.x % 32, block = lane / 8, column = lane % 8;
    const float* L = work.diagonal[block];
    const float strength = gates.beta[block * 16 + kFirst + column];
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == kFirst + column ? 1.f : 0.f;
#pragma unroll
    for (int j = kFirst; j < 15; ++j) {
#pragma unroll
        for (int i4 = (j + 1) / 4 * 4; i4 < 16; i4 += 4) {
            const float4 l = *reinterpret_cast<const float4*>(L + j * 20 + i4);
            if (i4 > j) x[i4] = fmaf(l.x, x[j], x[i4]);
            if (i4 + 1 > j) x[i4 + 1] = fmaf(l.y, x[j], x[i4 + 1]);
            if (i4 + 2 > j) x[i4 + 2] = fmaf(l.z, x[j], x[i4 + 2]);
            if (i4 + 3 > j) x[i4 + 3] = fmaf(l.w, x[j], x[i4 + 3]);
        }
    }
    const int offset = kFirst / 8 * 128 + column * 16;
    char *to = work.X + block * kBlockBytes + offset, *out = T + lower_block(block, block) + offset;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float (&y)[8] = *reinterpret_cast<float (*)[8]>(x + half * 8);
        *reinterpret_cast<uint4*>(to + half * 256) =
            make_uint4(Op::pack(y[0], y[1]), Op::pack(y[2], y[3]), Op::pack(y[4], y[5]), Op::pack(y[6], y[7]));
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] *= strength;
        *reinterpret_cast<uint4*>(out + half * 256) =
            make_uint4(Op::pack(y[0], y[1]), Op::pack(y[2], y[3]), Op::pack(y[4], y[5]), Op::pack(y[6], y[7]));
    }
}

// Column kColumn of blocks of T below the diagonal.
template <int kColumn>
__device__ __forceinline__ void solve_column(const Work& work, const Gates& gates, char* T) {
    const int lane = threadIdx.x % 32;
    const u32 L = shared_address(work.L) + in_order(lane), X = shared_address(work.X) + in_order(lane);
    const float strength[2] = {gates.beta[kColumn * 16 + lane / 4], gates.beta[kColumn * 16 + lane / 4 + 8]};
    u32 z[kRows][4];  // Z_ij for i = j, j + 1, ..
    load_matrices(X + kColumn * kBlockBytes, z[kColumn]);
#pragma unroll
    for (int i = kColumn + 1; i < kRows; ++i) {
        Tile sum, block;
        sum.clear(), block.clear();
        u32 b[4], left[4];
#pragma unroll
        for (int k = kColumn; k < i; ++k) {
            load_matrices(L + (i * (i - 1) / 2 + k) * kBlockBytes, b);
            sum.add_product<Op>(z[k], b);
        }
        sum.pack<Op>(left);
        load_matrices_transposed(X + i * kBlockBytes, b);
        block.add_product<Op>(left, b);
        block.pack<Op>(z[i]);
#pragma unroll
        for (int n = 0; n < 8; ++n) block.x[n / 4][n % 4] *= strength[n % 4 / 2];
        u32 words[4];
        block.pack<Op>(words);
        char* to = T + lower_block(i, kColumn) + lane * 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) *reinterpret_cast<u32*>(to + n * 128) = words[n];
    }
}

}  // namespace

// Blocks (key heads, chunks, parts of the key head's value heads).
extern "C" __global__ void __launch_bounds__(32 * kWarps, 4) chunk_prepare(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int h = blockIdx.x, slot = blockIdx.y, part = blockIdx.z;
    const int n = p.N == 1 ? 0 : find_owner(p, p.first_chunk + slot);
    if (n < 0) return;
    Place place;
    place.seq = find_sequence(p, n);
    const int chunk = p.first_chunk + slot - place.seq.chunk;
    if (chunk >= place.seq.chunks) return;
    place.start = static_cast<i64>(chunk) * kC, place.h = h;
    place.tokens = static_cast<int>(min(place.seq.length - place.start, static_cast<i64>(kC)));

    const i64 number_of_keys = static_cast<i64>(slot) * p.H + h;
    const int first = part * p.heads_per_block, heads = min(p.heads_per_block, p.group - first);
    HeadTile* out = reinterpret_cast<HeadTile*>(p.head_tiles) + number_of_keys * p.group + first;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

    GateBits bits;
    if (warp < heads) bits.load(p, place, h * p.group + first + warp);
    fill_keys(p, sm, place, [&] {
        if (warp < heads) bits.finish(p, place, sm.gates[warp]);
    });
    publish_to_engines();
    __syncthreads();
    if (part == 0) copy_out(p.key_tiles + number_of_keys * (2 * kKeyTileBytes), sm.K, 2 * kKeyTileBytes);
    fill_factors(sm.gates, out, heads, p.scale);
    Products products;
    if (warp == 0) multiply<0>(sm, products);
    else if (warp == 1) multiply<1>(sm, products);
    else if (warp == 2) multiply<2>(sm, products);
    else multiply<3>(sm, products);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) wait_bulk_stores_read();
#endif
#pragma unroll 1
    for (int head = 0; head < heads; head += kHeadsAtOnce) {
        __syncthreads();  // what the last heads' warps, or the products, read is free
#pragma unroll 1
        for (int i = 0; i < kHeadsAtOnce; ++i) {
            if (head + i >= heads) break;
            const Gates& gates = sm.gates[head + i];
            fill_lower(gates, products, sm.work[i], warp);
            fill_scores(gates, products, out[head + i].P, p.scale, kRows - 1 - warp);
        }
        __syncthreads();
        const int mine = head + warp % 2;
        Work& work = sm.work[warp % 2];
        const Gates& gates = sm.gates[mine];
        char* T = out[mine].T;
        if (mine < heads) {
            if (warp < 2) invert_columns<0>(work, gates, T);
            else invert_columns<8>(work, gates, T);
        }
        __syncthreads();
        if (mine < heads) {
            if (warp < 2) {
                solve_column<1>(work, gates, T), solve_column<2>(work, gates, T);
            } else {
                solve_column<0>(work, gates, T);
            }
        }
    }
}
