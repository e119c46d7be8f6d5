// What a chunk's outputs and state update need of the chunk alone: K and Q as the products' operands (normalised
// first with GDR_L2NORM), T, P and the decays. See gdr/chunk.cuh for the formulas and the workspace.
//
// A block of 4 warps takes one chunk of one key head and some of its value heads, which share K K^T and Q K^T. Of the
// 10 lower blocks of each, warp w takes row w of K K^T and row 3 - w of Q K^T: 5 blocks for every warp.
//
// T by blocks: the diagonal blocks of (I + L)^-1 by forward substitution in float32, a lane a column; then column j
// of blocks by warp j, X_ij = -X_ii sum_k L_ik X_kj, as transposes Z_ij = X_ij^T, so that each product's result is
// the left operand of the next one in the same registers. No powers of L: with correlated keys they overflow.
// requires: sm_80
#include "gdr/chunk.cuh"

using namespace gdr;

namespace {

constexpr int kWarps = kRows, kHeadsAtOnce = kWarps;
constexpr float kLog2e = 1.4426950408889634f;
// exp(-256) is 0 in float32, and so is the exponential of any sum that contains it: a log decay below it, -inf
// included, is the same as -256, and no sum of a chunk's log decays leaves the range where they are exact.
constexpr float kForgotten = -256.f;

// A sum of log decays as two floats: differences of long sums stay exact.
struct alignas(8) Sum {
    float high, low;

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
    return exp2_fast(((t.high - s.high) + (t.low - s.low)) * kLog2e);
}

struct Shared {
    char K[kKeyTileBytes], Q[kKeyTileBytes];
    char L[kLowerBlocks * kBlockBytes];  // below the diagonal; (rows 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), ..
    char X[kRows * kBlockBytes];         // inverses of the diagonal blocks, in the same order
    float diagonal[kRows][16][20];       // diagonal blocks of L, by columns, 4 floats apart
    Sum G[kHeadsAtOnce][kC];
    float beta[kHeadsAtOnce][kC];
};

// Groups of 8 tokens of K (0 to 7) or Q (8 to 15): lane l has token l % 8 and keys 8 (l / 8 + 4 i) and on.
struct Rows {
    static constexpr int kChunks = kKeys / 32;
    u32 words[kChunks][words_of(kQkv, 8)];

    __device__ __forceinline__ void load(const Params& p, const Sequence& seq, i64 start, int h, int group, int lane) {
        const i64 t = start + group % 8 * 8 + lane % 8;
        const char* row = group < 8 ? token_row(p.k, p.k_strides, seq, t, h) : token_row(p.q, p.q_strides, seq, t, h);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int key = (lane / 8 + 4 * i) * 8;
            load_chunk<kQkv, 8, kAligned>(row, key, t < seq.length ? kK - key : 0, words[i]);
        }
    }
    __device__ __forceinline__ void store(char* shared, char* global, int group, int lane) {
        float x[kChunks][8], squares = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) unpack<kQkv>(words[i], x[i]);
        float factor = 1.f;
        if constexpr (kL2Norm) {
#pragma unroll
            for (int i = 0; i < kChunks * 8; ++i) squares = fmaf(x[i / 8][i % 8], x[i / 8][i % 8], squares);
            squares += __shfl_xor_sync(0xffffffffu, squares, 8);
            squares += __shfl_xor_sync(0xffffffffu, squares, 16);
            factor = rsqrtf(squares + 1e-6f);
        }
        const int token8 = group % 8;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int key8 = lane / 8 + 4 * i;
            const int offset = key8 * kKeyStep + token8 * kMatrixBytes + lane % 8 * 16;
            uint4 y;
            y.x = Op::pack(x[i][0] * factor, x[i][1] * factor), y.y = Op::pack(x[i][2] * factor, x[i][3] * factor);
            y.z = Op::pack(x[i][4] * factor, x[i][5] * factor), y.w = Op::pack(x[i][6] * factor, x[i][7] * factor);
            *reinterpret_cast<uint4*>(shared + offset) = y;
            if (global != nullptr) *reinterpret_cast<uint4*>(global + offset) = y;
        }
    }
};

__device__ __forceinline__ void fill_keys(const Params& p, Shared& sm, const Sequence& seq, i64 start, int h,
                                          char* global) {
    constexpr int kBatch = kKeys <= 128 ? 2 : 1;  // groups in flight
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int first = warp; first < 16; first += kBatch * kWarps) {
        Rows rows[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) rows[i].load(p, seq, start, h, first + i * kWarps, lane);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int group = first + i * kWarps;
            const bool is_key = group < 8;
            char* to = global == nullptr ? nullptr : is_key ? global : global + kKeyTileBytes;
            rows[i].store(is_key ? sm.K : sm.Q, to, group, lane);
        }
    }
}

// The running sum of the log decays and the write strengths of one value head, by one warp. Tokens past the end of
// the sequence neither decay nor write.
__device__ __forceinline__ void fill_gates(const Params& p, Sum* G, float* beta, const Sequence& seq, i64 start,
                                           int hv) {
    const int lane = threadIdx.x % 32;
    u32 a[2], b[2], A_log = 0, dt_bias = 0;  // loads first, then arithmetic
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const i64 token = seq.first + start + 2 * lane + i;
        if (start + 2 * lane + i >= seq.length) continue;
        a[i] =
            load_bits(p.a_type, p.a, seq.batch * p.a_strides.batch + token * p.a_strides.token + hv * p.a_strides.head);
        b[i] =
            load_bits(p.b_type, p.b, seq.batch * p.b_strides.batch + token * p.b_strides.token + hv * p.b_strides.head);
    }
    if constexpr (kRawGates) {
        A_log = load_bits(p.A_log_type, p.A_log, hv * p.A_log_stride);
        dt_bias = load_bits(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
    }
    float g[2] = {0.f, 0.f}, strength[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (start + 2 * lane + i >= seq.length) continue;
        g[i] = value_of(p.a_type, a[i]), strength[i] = value_of(p.b_type, b[i]);
        if constexpr (kRawGates) {
            g[i] = log_decay(value_of(p.A_log_type, A_log), g[i], value_of(p.dt_bias_type, dt_bias), p.softplus_beta,
                             1.f / p.softplus_beta, p.softplus_threshold);
            strength[i] = sigmoid(strength[i]);
        }
        g[i] = g[i] < kForgotten ? kForgotten : g[i];
    }
    const Sum first = {g[0], 0.f}, both = first + Sum{g[1], 0.f};
    Sum sum = both;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const Sum below = sum.from_lane_below(distance);
        if (lane >= distance) sum = below + sum;
    }
    const Sum before = sum.from_lane_below(1);
    G[2 * lane] = lane == 0 ? first : before + first;
    G[2 * lane + 1] = sum;
    beta[2 * lane] = strength[0], beta[2 * lane + 1] = strength[1];
}

// Row `warp` of K K^T and row 3 - `warp` of Q K^T: block j of the one is x[j], block j of the other x[4 - j].
using Products = Tile[kRows + 1];

__device__ __forceinline__ void multiply(const Shared& sm, Products& x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, last = max(warp, kRows - 1 - warp);
    const u32 K = shared_address(sm.K), Q = shared_address(sm.Q);
    const u32 k_rows = K + key_block(warp, 0) + by_tokens(lane),
              q_rows = Q + key_block(kRows - 1 - warp, 0) + by_tokens(lane);
#pragma unroll
    for (int j = 0; j <= kRows; ++j) x[j].clear();
#pragma unroll 2
    for (int block = 0; block < kKeyBlocks; ++block) {
        u32 k[4], q[4];
        load_matrices(k_rows + key_block(0, block), k);
        load_matrices(q_rows + key_block(0, block), q);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            if (j > last) continue;
            u32 b[4];
            load_matrices(K + key_block(j, block) + by_keys(lane), b);
            if (j <= warp) x[j].add_product<Op>(k, b);
            if (j <= kRows - 1 - warp) x[kRows - j].add_product<Op>(q, b);
        }
    }
}

// A block of a product times factors of its rows and the decays between its rows t and columns s, 0 above the
// diagonal (and on it, where `strict`).
__device__ __forceinline__ void apply_decays(Tile& x, const Sum* G, const Sum (&row_sums)[2], const float (&factors)[2],
                                             int lane, int j, bool diagonal, bool strict) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = half * 8 + lane % 4 * 2;
        const float4 sums = *reinterpret_cast<const float4*>(&G[j * 16 + column]);
        const Sum column_sums[2] = {{sums.x, sums.y}, {sums.z, sums.w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8;
            float& y = x.x[half][i];
            y *= factors[i / 2] * decay(row_sums[i / 2], column_sums[i % 2]);
            if (diagonal && (strict ? row <= column + i % 2 : row < column + i % 2)) y = 0.f;
        }
    }
}

// Stores a block as 16-bit operands, its matrices in the order (rows 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), ..
__device__ __forceinline__ void store_block(char* to, const Tile& x, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        *reinterpret_cast<u32*>(to + i * 128 + lane * 4) = Op::pack(x.x[i % 2][i / 2 * 2], x.x[i % 2][i / 2 * 2 + 1]);
}

// (I + L)^-1 of the warp's diagonal block: lane c (and c + 16) solves for column c.
__device__ __forceinline__ void invert_diagonal(const float (&L)[16][20], char* X, int lane) {
    const int column = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < 15; ++j) {
#pragma unroll
        for (int i4 = j / 4 * 4; i4 < 16; i4 += 4) {  // rows at or above j have L = 0 in this column
            const float4 l = *reinterpret_cast<const float4*>(&L[j][i4]);
            if (i4 > j) x[i4] = fmaf(-l.x, x[j], x[i4]);
            if (i4 + 1 > j) x[i4 + 1] = fmaf(-l.y, x[j], x[i4 + 1]);
            if (i4 + 2 > j) x[i4 + 2] = fmaf(-l.z, x[j], x[i4 + 2]);
            if (i4 + 3 > j) x[i4 + 3] = fmaf(-l.w, x[j], x[i4 + 3]);
        }
    }
    if (lane < 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            *reinterpret_cast<u16*>(X + (i / 8 * 2 + column / 8) * 128 + i % 8 * 16 + column % 8 * 2) =
                to_bits<Op::kType>(x[i]);
    }
}

// Column j of blocks of T, from its diagonal block down.
__device__ __forceinline__ void solve_column(const Shared& sm, const float* beta, char* T, int lane, int j) {
    const u32 L = shared_address(sm.L) + in_order(lane), X = shared_address(sm.X) + in_order(lane);
    const float strength[2] = {beta[j * 16 + lane / 4], beta[j * 16 + lane / 4 + 8]};
    u32 z[kRows][4];  // Z_ij for i = j, j + 1, ..
    load_matrices_transposed(X + j * kBlockBytes, z[0]);
    {
        char* to = T + lower_block(j, j) + lane * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x[2];
            unpack<Op::kType>(&z[0][i], x);
            *reinterpret_cast<u32*>(to + i * 128) = Op::pack(x[0] * strength[i % 2], x[1] * strength[i % 2]);
        }
    }
#pragma unroll
    for (int below = 1; below < kRows; ++below) {
        const int i = j + below;
        if (i >= kRows) break;
        Tile sum;
        sum.clear();
#pragma unroll
        for (int k = 0; k < below; ++k) {
            u32 b[4];
            load_matrices(L + lower_block(i, j + k), b);
            sum.add_product<Op>(z[k], b);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) sum.x[n / 4][n % 4] = -sum.x[n / 4][n % 4];
        u32 left[4], b[4];
        sum.pack<Op>(left);
        load_matrices(X + i * kBlockBytes, b);
        Tile block;
        block.clear();
        block.add_product<Op>(left, b);
        block.pack<Op>(z[below]);
#pragma unroll
        for (int n = 0; n < 8; ++n) block.x[n / 4][n % 4] *= strength[n % 4 / 2];
        u32 words[4];
        block.pack<Op>(words);
        char* to = T + lower_block(i, j) + lane * 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) *reinterpret_cast<u32*>(to + n * 128) = words[n];
    }
}

__device__ __forceinline__ void prepare_head(const Params& p, Shared& sm, const Products& products, int which,
                                             HeadTile& out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q_row = kRows - 1 - warp;
    const Sum* G = sm.G[which];
    const float* beta = sm.beta[which];

    const int row = warp * 16 + lane / 4;
    const Sum sums[2] = {G[row], G[row + 8]};
    const float strengths[2] = {beta[row], beta[row + 8]};
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
        if (j > warp) break;
        Tile x = products[j];
        apply_decays(x, G, sums, strengths, lane, j, j == warp, true);
        if (j < warp) {
            store_block(sm.L + lower_block(warp, j), x, lane);
        } else {
#pragma unroll
            for (int n = 0; n < 8; ++n)
                sm.diagonal[warp][n / 4 * 8 + lane % 4 * 2 + n % 2][lane / 4 + n % 4 / 2 * 8] = x.x[n / 4][n % 4];
        }
    }
    __syncwarp();
    invert_diagonal(sm.diagonal[warp], sm.X + warp * kBlockBytes, lane);

    const int out_row = q_row * 16 + lane / 4;
    const Sum out_sums[2] = {G[out_row], G[out_row + 8]};
    const float scales[2] = {p.scale, p.scale};
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
        if (j > q_row) break;
        Tile x = products[kRows - j];
        apply_decays(x, G, out_sums, scales, lane, j, j == q_row, false);
        store_block(out.P + lower_block(q_row, j), x, lane);
    }
    if (threadIdx.x < kC) {
        const int t = threadIdx.x;
        const float d = decay(G[t], {0.f, 0.f});
        out.d[t] = d, out.scaled_d[t] = d * p.scale, out.e[t] = decay(G[kC - 1], G[t]);
    }
    __syncthreads();
    solve_column(sm, beta, out.T, lane, warp);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * kWarps, 4) chunk_prepare(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int slot = blockIdx.x, h = blockIdx.y % p.H, part = blockIdx.y / p.H;
    const int n = find_owner(p, p.first_chunk + slot);
    if (n < 0) return;
    const Sequence seq = find_sequence(p, n);
    const int chunk = p.first_chunk + slot - seq.chunk;
    if (chunk >= seq.chunks) return;
    const i64 start = static_cast<i64>(chunk) * kC;

    char* key_tiles = p.key_tiles + (static_cast<i64>(slot) * p.H + h) * (2 * kKeyTileBytes);
    HeadTile* head_tiles =
        reinterpret_cast<HeadTile*>(p.head_tiles) + static_cast<i64>(slot) * (p.H * p.group) + h * p.group;
    const int first = part * p.heads_per_block, last = min(first + p.heads_per_block, p.group);
    const int warp = threadIdx.x / 32;

    if (first + warp < last) fill_gates(p, sm.G[warp], sm.beta[warp], seq, start, h * p.group + first + warp);
    fill_keys(p, sm, seq, start, h, part == 0 ? key_tiles : nullptr);
    __syncthreads();
    Products products;
    multiply(sm, products);
#pragma unroll 1
    for (int head = first; head < last; ++head) {
        const int which = (head - first) % kHeadsAtOnce;
        if (head > first) {
            __syncthreads();
            if (which == 0) {
                const int mine = head + warp;
                if (mine < last) fill_gates(p, sm.G[warp], sm.beta[warp], seq, start, h * p.group + mine);
                __syncthreads();
            }
        }
        prepare_head(p, sm, products, which, head_tiles[head]);
    }
}
