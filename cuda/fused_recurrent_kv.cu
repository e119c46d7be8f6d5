// The fused recurrence on states [slots, HV, K, V].
// options: -fmad=false
// launch: dependent
//
// A block owns some columns of one head's state of one sequence; they stay in registers from the first token to the
// last. The rows are dealt to kSplits splits of kSteps neighbouring rows. A column's products with k and q are sums
// over all splits: first over those of one thread, then over lanes, then over warps through shared memory, as one
// binary tree. How many columns a block takes may depend on the batch: the tree stays the same.
//
//   GDR_LANES         lanes that lie side by side along a row
//   GDR_WARPS         warps of a block; they share the rows (8 for K <= 128, else 16)
//   GDR_MIN_BLOCKS    blocks a multiprocessor should hold
#include "gdr/recurrent.cuh"

using namespace gdr;

namespace {

constexpr int kLanes = GDR_LANES, kWarps = GDR_WARPS, kThreads = 32 * kWarps;
constexpr int kSplits = 32, kSteps = ceil_div(kK, kSplits);
constexpr int kWarpRows = 32 / kLanes;                       // splits side by side in a warp
constexpr int kLaneSplits = kSplits / (kWarps * kWarpRows);  // splits of one thread
constexpr int kColumns = kLanes * kChunk;                    // columns of a block
static_assert(kLaneSplits >= 1 && kColumns <= kThreads);

constexpr int kTokenLanes = 16;
using Tokens = TokenBlock<kThreads, kTokenLanes, 4, kColumns>;
using Loader = TokenLoader<kThreads, kTokenLanes, 4, kColumns>;

// Partial sums of both products by warp, and u on its way back.
struct Exchange {
    float sums[kWarps][2][kColumns];
    float4 u[kColumns / 4];
};

// The sum of the warps' partial sums of a column, as a binary tree.
template <int kFirst = 0, int kCount = kWarps>
__device__ __forceinline__ float sum_warps(const Exchange& exchange, int product, int column) {
    if constexpr (kCount == 1) return exchange.sums[kFirst][product][column];
    else
        return sum_warps<kFirst, kCount / 2>(exchange, product, column) +
               sum_warps<kFirst + kCount / 2, kCount / 2>(exchange, product, column);
}

struct Tile {
    StateChunk chunks[kLaneSplits][kSteps];
    int split, column, valid_columns;  // this thread's first split and column

    __device__ __forceinline__ Tile(int lane, int warp, int first_column)
        : split(warp * (kLaneSplits * kWarpRows) + lane / kLanes),
          column(first_column + lane % kLanes * kChunk),
          valid_columns(kV % kColumns == 0 ? kChunk : kV - column) {}

    __device__ __forceinline__ int row(int m, int i) const { return (split + m * kWarpRows) * kSteps + i; }
    __device__ __forceinline__ int valid(int m, int i) const {
        return kK == kSplits * kSteps || row(m, i) < kK ? valid_columns : 0;
    }
    __device__ __forceinline__ void prefetch(const Guess& guess, const StateStrides& strides, int lane) const {
        constexpr int kRows = kLaneSplits * kWarpRows * kSteps, kBytes = kColumns * bytes_of(kStateType);
        const int first = (split - lane / kLanes) * kSteps, first_column = column - lane % kLanes * kChunk;
        guess.prefetch<kRows, kBytes>(state_offset<kStateType, kV>(strides.row, first, first_column),
                                      row_bytes<kStateType, kV>(strides.row), kK - first,
                                      (kV - first_column) * bytes_of(kStateType), lane);
    }
    template <int kType>
    __device__ __forceinline__ i64 offset(int m, int i, i64 row_stride) const {
        return state_offset<kType, kV>(row_stride, i64{split} * kSteps + m * (kWarpRows * kSteps) + i, column);
    }
    __device__ __forceinline__ void load(const char* state, i64 row_stride) {
#pragma unroll
        for (int m = 0; m < kLaneSplits; ++m)
#pragma unroll
            for (int i = 0; i < kSteps; ++i) chunks[m][i].load(state + offset<kInitial>(m, i, row_stride), valid(m, i));
    }
    __device__ __forceinline__ void open() {
#pragma unroll
        for (int m = 0; m < kLaneSplits; ++m)
#pragma unroll
            for (int i = 0; i < kSteps; ++i) chunks[m][i].open();
    }
    __device__ __forceinline__ void store(char* state, i64 row_stride) {
#pragma unroll
        for (int m = 0; m < kLaneSplits; ++m)
#pragma unroll
            for (int i = 0; i < kSteps; ++i) chunks[m][i].store(state + offset<kFinal>(m, i, row_stride), valid(m, i));
    }

    // This thread's part of the products of split m: columns with k, then columns with q.
    __device__ __forceinline__ void products(int m, const Tokens& tokens, int t, float (&x)[2 * kChunk]) {
        float k[kSteps], q[kSteps];
        tokens.read_rows(tokens.k[t], row(m, 0), k);
        tokens.read_rows(tokens.q[t], row(m, 0), q);
#pragma unroll
        for (int e = 0; e < 2 * kChunk; ++e) x[e] = 0.f;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            float h[kChunk];
            chunks[m][i].get(h);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) {
                x[e] = fmaf(h[e], k[i], x[e]);
                x[kChunk + e] = fmaf(h[e], q[i], x[kChunk + e]);
            }
        }
    }

    // The same summed over splits m, m + kStride, ..: the halves first, as lanes do it.
    template <int kStride = 1>
    __device__ __forceinline__ void sum_products(int m, const Tokens& tokens, int t, float (&x)[2 * kChunk]) {
        if constexpr (kStride == kLaneSplits) {
            products(m, tokens, t, x);
        } else {
            float y[2 * kChunk];
            sum_products<2 * kStride>(m, tokens, t, x);
            sum_products<2 * kStride>(m + kStride, tokens, t, y);
#pragma unroll
            for (int e = 0; e < 2 * kChunk; ++e) x[e] += y[e];
        }
    }

    __device__ __forceinline__ void update(const Tokens& tokens, int t, const float (&u)[kChunk], float decay) {
#pragma unroll
        for (int m = 0; m < kLaneSplits; ++m) {
            float k[kSteps];
            tokens.read_rows(tokens.k[t], row(m, 0), k);
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                float h[kChunk];
                chunks[m][i].get(h);
#pragma unroll
                for (int e = 0; e < kChunk; ++e) h[e] = fmaf(k[i], u[e], decay * h[e]);
                chunks[m][i].set(h);
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS)
    fused_recurrent_kv(const __grid_constant__ Params p) {
    __shared__ Tokens tokens;
    __shared__ Exchange exchange;
    const Block<ceil_div(kV, kColumns)> block(p);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_column = block.slice * kColumns;
    Tile tile(lane, warp, first_column);

    ptx::let_kernel_behind_start();
    if (fetches_early<kColumns * kK>()) tile.prefetch(Guess(p, block.n, block.hv), p.initial_strides, lane);
    ptx::wait_for_kernels_ahead();
    const Rows rows(p, block.n);
    const Span span = find_span(p, block.n);
    Loader tokens_now;
    if (span.length > 0) tokens_now.load(p, block, span, 0, first_column);
    const Work work(p, rows, block.hv);
    if (work.padding) return write_zeros(p, span, block.hv, first_column, min(first_column + kColumns, kV));
    if (work.nothing_to_do(span)) return;
    tile.load(work.read, p.initial_strides.row);
    if (span.length > 0) tokens_now.store(p, tokens);
    tile.open();

    // Thread t finishes column t.
    const bool finishes = threadIdx.x < kColumns && first_column + threadIdx.x < kV;
#pragma unroll 1
    for (u32 first = 0; first < span.length; first += kTokens) {
        if (first > 0) {
            Loader loader;
            loader.load(p, block, span, first, first_column);
            __syncthreads();
            loader.store(p, tokens);
        }
        __syncthreads();
        const u32 count = min(span.length - first, static_cast<u32>(kTokens));
        char* out = row_of(p.out, p.out_strides, span, first, block.hv);
#pragma unroll 1
        for (u32 t = 0; t < count; ++t) {
            float x[2 * kChunk];
            tile.sum_products(0, tokens, t, x);
            constexpr int kLeft = 2 * kChunk / kWarpRows;  // sums that a lane is left with
            const int which = sum_transposed<2 * kChunk, 16, kLanes>(x, lane);
#pragma unroll
            for (int e = 0; e < kLeft; ++e) {
                const int id = which + e;
                exchange.sums[warp][id / kChunk][lane % kLanes * kChunk + id % kChunk] = x[e];
            }
            __syncthreads();
            const Scalars s = tokens.scalars[t];
            if (finishes) {
                const float hk = sum_warps(exchange, 0, threadIdx.x), hq = sum_warps(exchange, 1, threadIdx.x);
                const float u = s.u(hk, tokens.v[t][threadIdx.x]);
                reinterpret_cast<float*>(exchange.u)[threadIdx.x] = s.k_scale * u;
                store<kQkv>(out, first_column + threadIdx.x, s.o(hq, u));
            }
            __syncthreads();
            float u[kChunk];
#pragma unroll
            for (int e = 0; e < kChunk; e += 4) {
                const float4 four = exchange.u[(lane % kLanes * kChunk + e) / 4];
                u[e] = four.x, u[e + 1] = four.y, u[e + 2] = four.z, u[e + 3] = four.w;
            }
            tile.update(tokens, t, u, s.decay);
            out += p.out_strides.token;
        }
    }
    tile.store(work.write, p.final_strides.row);
}
