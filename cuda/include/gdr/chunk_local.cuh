// What a chunk's outputs and state update need of the chunk alone, piece by piece: gates, K and Q as the products'
// operands (normalised first with GDR_L2NORM), K K^T and Q K^T, T and P. 4 warps do a chunk together.
//
// Decays between blocks are products of factors that belong to one token or one block, each the exponential of a sum
// of log decays between them: a product underflows only where the decay does. Only tokens of the same 8 take an
// exponential a pair.
//
// T by blocks: the diagonal blocks of (I + L)^-1 by forward substitution in float32, a lane a column; then columns of
// blocks, X_ij = -X_ii sum_k L_ik X_kj, as transposes Z_ij = X_ij^T, so that each product's result is the left
// operand of the next one in the same registers. No powers of L: with correlated keys they overflow.
#pragma once

#include "gdr/log_decays.cuh"

namespace gdr {

// Of one value head, for every token: the running sum of the log decays, the write strength, and the factors of
// decays between blocks.
struct alignas(16) Gates {
    Sum G[kC];
    float beta[kC];
    float from_start[kC];  // from before the token's block of 16 to the token
    float to_end[kC];      // from the token to the end of its block of 16
    float middle[kC];      // between the token and the end of its block's first 8 tokens
};

// L of one value head, and what T is found with.
struct alignas(16) Triangle {
    char L[6 * kBlockBytes];      // -L below the diagonal, row after row; (rows 0-7, columns 0-7), (0-7, 8-15), ..
    char X[kRows * kBlockBytes];  // inverses of the diagonal blocks, each as T's are
    float diagonal[kRows][16 * 20 + 4];  // diagonal blocks of -L, by columns, 20 floats apart
};

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
        load_tokens(p, place.offset(p.a_strides, hv), place.offset(p.b_strides, hv), place.tokens);
        load_head(p, hv);
    }
    // From the elements where the first token's are.
    __device__ __forceinline__ void load_tokens(const Params& p, i64 from_a, i64 from_b, int tokens) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Where there is no token, the last one again.
            const int t = min(static_cast<int>(threadIdx.x % 32 * 2 + i), tokens - 1);
            a[i] = load_bits(p.a_type, p.a, from_a + t * p.a_strides.token);
            b[i] = load_bits(p.b_type, p.b, from_b + t * p.b_strides.token);
        }
    }
    __device__ __forceinline__ void load_head(const Params& p, int hv) {
        if constexpr (kRawGates) {
            A_log = load_bits(p.A_log_type, p.A_log, hv * p.A_log_stride);
            dt_bias = load_bits(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
        }
    }
    __device__ __forceinline__ void finish(const Params& p, int tokens, Gates& to) const {
        const int lane = threadIdx.x % 32, t = 2 * lane;
        float g[2] = {0.f, 0.f}, strength[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (t + i >= tokens) continue;
            find_gates(p, a[i], b[i], A_log, dt_bias, g[i], strength[i]);
        }
        const Sum g0 = Sum::of(g[0]);
        const Sum second = sum_up_to_lane(g0 + Sum::of(g[1]));
        const Sum before = second.from_lane_below(1), first = lane == 0 ? g0 : before + g0;
        *reinterpret_cast<float4*>(&to.G[t]) = make_float4(first.high, first.low, second.high, second.low);
        *reinterpret_cast<float2*>(&to.beta[t]) = make_float2(strength[0], strength[1]);
    }
};

// The factors of one token's decays, once its head's sums are there; `out` has what the walk takes.
template <class Out>
__device__ __forceinline__ void fill_factors(Gates& to, Out& out, int t, int block, float scale) {
    const Sum* G = to.G;
    const Sum x = G[t], none = {0.f, 0.f}, middle = G[block + 7];
    const float d = decay(x, none);
    to.from_start[t] = decay(x, block == 0 ? none : G[block - 1]);
    to.to_end[t] = decay(G[block + 15], x);
    to.middle[t] = decay(t % 16 < 8 ? middle : x, t % 16 < 8 ? x : middle);
    const int at = Out::place(t);
    out.d[at] = d, out.scaled_d[at] = d * scale, out.e[at] = decay(G[kC - 1], x);
}

// ---- Keys and queries.

// 8 tokens: lane l has token l % 8 and keys 8 (l / 8 + 4 i) and on.
struct Rows {
    static constexpr int kChunks = kKeys / 32, kWords = words_of(kQkv, 8);
    u32 words[kChunks][kWords];

    __device__ __forceinline__ void load(const char* row) {  // from the lane's first key
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            load_chunk<kQkv, 8, kAligned, kBeside ? Cache::kOnce : Cache::kNormal>(
                row, i * 32, kK == kKeys ? 8 : kK - i * 32 - threadIdx.x % 32 / 8 * 8, words[i]);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kChunks * kWords; ++i) words[i / kWords][i % kWords] = 0;
    }
    // What the token is multiplied by.
    __device__ __forceinline__ float norm_factor() const {
        if constexpr (!kL2Norm) return 1.f;
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
        return rsqrtf(squares + 1e-6f);
    }
    // Makes operands of them, times the factor of the norm.
    __device__ __forceinline__ void convert(float factor) {
        if constexpr (kQkv == Op::kType && !kL2Norm) return;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            float x[8];
            unpack<kQkv>(words[i], x);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                words[i][j] =
                    kL2Norm ? Op::pack(x[2 * j] * factor, x[2 * j + 1] * factor) : Op::pack(x[2 * j], x[2 * j + 1]);
        }
    }
    // Stores keys 32 i and on where to(i) says.
    template <class To>
    __device__ __forceinline__ void store(To&& to) const {
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            *reinterpret_cast<uint4*>(to(i)) = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
    }
};

// ---- Products. Of the 10 lower blocks of each, warp w takes row w of K K^T and row 3 - w of Q K^T: 5 blocks for every
// warp. Of row w of K K^T, block w - n is x[n]; of row 3 - w of Q K^T, block 3 - w - n is x[4 - n].
using Products = Tile[kRows + 1];

// Of K in shared memory, which Q follows.
template <int kWarp>
__device__ __forceinline__ void multiply(u32 K, Products& x) {
    constexpr int kQRow = kRows - 1 - kWarp;
    const int lane = threadIdx.x % 32;
    const u32 columns = K + by_keys(lane), rows = K + by_tokens(lane);
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

// How the blocks left of the diagonal are numbered; from the diagonal on, `body` gets a block's number and its column.
// Where registers are few, a block's factors are read when they are needed.
struct ByDistance {
    static constexpr bool kFew = false;
    template <class Body>
    static __device__ __forceinline__ void left(int row, Body&& body) {
#pragma unroll
        for (int n = 1; n < kRows; ++n) {
            if (n > row) break;
            body(n, row - n);
        }
    }
};
struct ByColumn {
    static constexpr bool kFew = true;
    template <class Body>
    static __device__ __forceinline__ void left(int row, Body&& body) {
#pragma unroll
        for (int j = kRows - 2; j >= 0; --j)
            if (j < row) body(j, j);
    }
};

// The factors of a row of blocks that a lane needs.
template <class Order>
struct Factors {
    float2 from_start;        // of the lane's rows
    float2 to_end[kRows][2];  // of the lane's columns in the blocks left of the diagonal
    float across[kRows];      // of those blocks, from end to end
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
        if constexpr (!Order::kFew) Order::left(row, [&](int n, int column) { load(gates, n, column); });
    }
    __device__ __forceinline__ void load(const Gates& gates, int n, int column) {
        const float* of = &gates.to_end[column * 16 + threadIdx.x % 32 % 4 * 2];
        to_end[n][0] = *reinterpret_cast<const float2*>(of);
        to_end[n][1] = *reinterpret_cast<const float2*>(of + 8);
        across[n] = gates.from_start[column * 16 + 15];
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
    // Block n, the next one left of it: y has all of the decay but that in its own columns, and then that too.
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

// A row of blocks of -L below the diagonal, and on it (there, what is above is anything), from those of K K^T. Returns
// the diagonal block's rows 8-15, columns 0-7 as an operand.
template <class Order, class Block>
__device__ __forceinline__ u32 fill_lower(const Gates& gates, const Tile& diagonal, Block&& block, Triangle& triangle,
                                          int row) {
    const int lane = threadIdx.x % 32, t = row * 16 + lane / 4;
    Factors<Order> factors(gates, row);
    float2 y = make_float2(-gates.beta[t], -gates.beta[t + 8]);
    Tile x = diagonal;
    factors.apply_diagonal(x, y);
    float* to = triangle.diagonal[row] + lane % 4 * 2 * 20 + lane / 4;
    to[0] = x.x[0][0], to[20] = x.x[0][1];
    to[8] = x.x[0][2], to[28] = x.x[0][3];
    to[8 * 20 + 8] = x.x[1][2], to[9 * 20 + 8] = x.x[1][3];
    y.x *= factors.from_start.x, y.y *= factors.from_start.y;
    const u32 corner = Op::pack(x.x[0][2], x.x[0][3]);
    char* L = triangle.L + row * (row - 1) / 2 * kBlockBytes;
    Order::left(row, [&](int n, int column) {
        x = block(n);
        if constexpr (Order::kFew) factors.load(gates, n, column);
        factors.apply(x, y, n);
        store_block(L + column * kBlockBytes, x);
    });
    return corner;
}

// A row of blocks of P from those of Q K^T. Where blocks of T and P go, Layout::at says.
template <class Layout, class Order, class Block>
__device__ __forceinline__ void fill_scores(const Gates& gates, const Tile& diagonal, Block&& block, char* P,
                                            float scale, int row) {
    Factors<Order> factors(gates, row);
    float2 y = make_float2(scale, scale);
    Tile x = diagonal;
    factors.apply_diagonal(x, y);
    store_block(P + Layout::at(row, row), x);
    y.x *= factors.from_start.x, y.y *= factors.from_start.y;
    Order::left(row, [&](int n, int column) {
        x = block(n);
        if constexpr (Order::kFew) factors.load(gates, n, column);
        factors.apply(x, y, n);
        store_block(P + Layout::at(row, column), x);
    });
}

// ---- T.

// A lane's column of the inverse of a diagonal block of I + L, kFirst or one after it.
template <class Layout, int kFirst>
__device__ __forceinline__ void invert_column(Triangle& triangle, const Gates& gates, char* T, int block, int column) {
    const float* L = triangle.diagonal[block];
    const float strength = gates.beta[block * 16 + column];
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.f : 0.f;
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
    const int offset = column * 16;
    char *to = triangle.X + block * kBlockBytes + offset, *out = T + Layout::at(block, block) + offset;
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

// The inverse of a diagonal block of I + L by a warp: as invert_column for its two blocks of 8 tokens, then what is below
// them, as the other blocks of T, from -L there. What is above them is not written.
template <class Layout>
__device__ __forceinline__ void invert_block(Triangle& triangle, const Gates& gates, char* T, u32 corner, int block) {
    const int lane = threadIdx.x % 32, half = lane / 8 % 2, column = lane % 8;
    const float* L = triangle.diagonal[block] + half * (8 * 20 + 8);
    const float strength = gates.beta[block * 16 + half * 8 + column], below = gates.beta[block * 16 + lane / 4];
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < 7; ++j) {
#pragma unroll
        for (int i4 = (j + 1) / 4 * 4; i4 < 8; i4 += 4) {
            const float4 l = *reinterpret_cast<const float4*>(L + j * 20 + i4);
            if (i4 > j) x[i4] = fmaf(l.x, x[j], x[i4]);
            if (i4 + 1 > j) x[i4 + 1] = fmaf(l.y, x[j], x[i4 + 1]);
            if (i4 + 2 > j) x[i4 + 2] = fmaf(l.z, x[j], x[i4 + 2]);
            if (i4 + 3 > j) x[i4 + 3] = fmaf(l.w, x[j], x[i4 + 3]);
        }
    }
    char *X = triangle.X + block * kBlockBytes, *out = T + Layout::at(block, block);
    *reinterpret_cast<uint4*>(X + half * 384 + column * 16) =
        make_uint4(Op::pack(x[0], x[1]), Op::pack(x[2], x[3]), Op::pack(x[4], x[5]), Op::pack(x[6], x[7]));
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= strength;
    *reinterpret_cast<uint4*>(out + half * 384 + column * 16) =
        make_uint4(Op::pack(x[0], x[1]), Op::pack(x[2], x[3]), Op::pack(x[4], x[5]), Op::pack(x[6], x[7]));
    __syncwarp();
    u32 first[4], last[4];
    load_matrices(shared_address(X) + in_order(lane), first);
    load_matrices_transposed(shared_address(X) + in_order(lane), last);
    __syncwarp();
    float z[4] = {0.f, 0.f, 0.f, 0.f}, y[4] = {0.f, 0.f, 0.f, 0.f};
    first[1] = first[2] = first[3] = 0;
    Op::mma(y, first, corner, 0);
    first[0] = Op::pack(y[0], y[1]);
    Op::mma(z, first, last[3], 0);
    *reinterpret_cast<u32*>(X + 256 + lane * 4) = Op::pack(z[0], z[1]);
    *reinterpret_cast<u32*>(out + 256 + lane * 4) = Op::pack(z[0] * below, z[1] * below);
}

// Column kColumn of blocks of T below the diagonal. With kEager, a block goes into all sums as soon as it is there: more
// registers, fewer products one after the other.
template <class Layout, int kColumn, bool kEager = false>
__device__ __forceinline__ void solve_column(const Triangle& triangle, const Gates& gates, char* T) {
    const int lane = threadIdx.x % 32;
    const u32 L = shared_address(triangle.L) + in_order(lane), X = shared_address(triangle.X) + in_order(lane);
    const float strength[2] = {gates.beta[kColumn * 16 + lane / 4], gates.beta[kColumn * 16 + lane / 4 + 8]};
    u32 z[kRows][4];  // Z_ij for i = j, j + 1, ..
    load_matrices(X + kColumn * kBlockBytes, z[kColumn]);
    Tile sums[kRows];
    const auto add = [&](int i, int k) {
        u32 b[4];
        load_matrices(L + (i * (i - 1) / 2 + k) * kBlockBytes, b);
        sums[i].add_product<Op>(z[k], b);
    };
#pragma unroll
    for (int i = kColumn + 1; i < kRows; ++i) sums[i].clear();
#pragma unroll
    for (int i = kColumn + 1; i < kRows; ++i) {
        Tile block;
        block.clear();
        u32 b[4], left[4];
        if constexpr (kEager) {
#pragma unroll
            for (int later = i; later < kRows; ++later) add(later, i - 1);
        } else {
#pragma unroll
            for (int k = kColumn; k < i; ++k) add(i, k);
        }
        sums[i].pack<Op>(left);
        load_matrices_transposed(X + i * kBlockBytes, b);
        block.add_product<Op>(left, b);
        block.pack<Op>(z[i]);
#pragma unroll
        for (int n = 0; n < 8; ++n) block.x[n / 4][n % 4] *= strength[n % 4 / 2];
        u32 words[4];
        block.pack<Op>(words);
        char* to = T + Layout::at(i, kColumn) + lane * 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) *reinterpret_cast<u32*>(to + n * 128) = words[n];
    }
}

}  // namespace gdr
