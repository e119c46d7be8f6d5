// The fused recurrence on states [slots, HV, V, K].
// options: -fmad=false
// launch: dependent
//
// A block owns some rows (value columns) of one head's state of one sequence; they stay in registers from the first
// token to the last. kLanes lanes share a row, each with the same columns of all of its rows, so that the products of
// the rows with k and q are sums over lanes of one warp: warps never wait for one another but for tokens.
// How many rows a block takes may depend on the batch: the sums are the same trees for every choice.
//
//   GDR_ROWS          rows a lane works on at a time
//   GDR_WARPS         warps of a block
//   GDR_MIN_BLOCKS    blocks a multiprocessor should hold
//   GDR_ALONE         one token, few blocks: every warp makes the token ready for itself, which takes the least time
//                     where processors would be idle otherwise; else the block shares tokens that it makes ready once
#include "gdr/recurrent.cuh"

using namespace gdr;

namespace {

constexpr int kLanes = lanes_for(ceil_div(kK, kChunk));
constexpr int kLaneRows = GDR_ROWS, kWarps = GDR_WARPS, kThreads = 32 * kWarps;
constexpr int kWarpRows = 32 / kLanes;                 // rows that a warp holds side by side
constexpr int kRows = kWarps * kLaneRows * kWarpRows;  // rows of a block
constexpr int kSharers = kLanes / kLaneRows;           // lanes that end up with the same sum
static_assert(kLaneRows <= kLanes && kLanes % kLaneRows == 0);

constexpr bool kAlone = GDR_ALONE;
static_assert(kOneToken || !kAlone);

using LaneToken = Token<kLanes, kChunk>;
using Tokens = TokenBlock<kThreads, kLanes, kChunk, kRows>;
using Loader = TokenLoader<kThreads, kLanes, kChunk, kRows>;
constexpr int kChunks = LaneToken::kChunks;

struct Tile {
    StateChunk chunks[kLaneRows][kChunks];
    int part, row;  // this lane's share of a row, and its first row

    __device__ __forceinline__ Tile(int lane, int first_row) : part(lane % kLanes), row(first_row + lane / kLanes) {}

    __device__ __forceinline__ int valid(int r, int j) const {
        const int left = LaneToken::kWhole ? kChunk : kK - (j * kLanes + part) * kChunk;
        return kV % kRows == 0 || row + r * kWarpRows < kV ? left : 0;
    }
    __device__ __forceinline__ void prefetch(const Guess& guess, const StateStrides& strides, int lane) const {
        const int first = row - lane / kLanes;
        constexpr int kBytes = kK * bytes_of(kStateType);
        guess.prefetch<kLaneRows * kWarpRows, kBytes>(state_offset<kStateType, kK>(strides.row, first, 0),
                                                      row_bytes<kStateType, kK>(strides.row), kV - first, kBytes, lane);
    }
    template <int kType>
    __device__ __forceinline__ i64 offset(int r, int j, i64 row_stride) const {
        return state_offset<kType, kK>(row_stride, i64{row} + r * kWarpRows, (i64{part} + j * kLanes) * kChunk);
    }
    __device__ __forceinline__ void load(const char* state, i64 row_stride) {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
                chunks[r][j].load(state + offset<kInitial>(r, j, row_stride), valid(r, j));
    }
    __device__ __forceinline__ void open() {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
            for (int j = 0; j < kChunks; ++j) chunks[r][j].open();
    }
    __device__ __forceinline__ void store(char* state, i64 row_stride) {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
            for (int j = 0; j < kChunks; ++j) chunks[r][j].store(state + offset<kFinal>(r, j, row_stride), valid(r, j));
    }

    // Decays the rows and adds k (scaled_u)^T; each lane brings what belongs to its own row.
    __device__ __forceinline__ void update(const LaneToken& token, float decay, float scaled_u, int lane) {
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
            const float row_u = __shfl_sync(0xffffffffu, scaled_u, lane - part + r * kSharers);
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                float h[kChunk];
                chunks[r][j].get(h);
#pragma unroll
                for (int i = 0; i < kChunk; ++i) h[i] = fmaf(token.k[j * kChunk + i], row_u, decay * h[i]);
                chunks[r][j].set(h);
            }
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS)
    fused_recurrent_vk(const __grid_constant__ Params p) {
    const Block<ceil_div(kV, kRows)> block(p);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = block.slice * kRows;
    Tile tile(lane, first_row + warp * (kLaneRows * kWarpRows));

    ptx::let_kernel_behind_start();
    if (fetches_early<kRows * kK>()) tile.prefetch(Guess(p, block.n, block.hv), p.initial_strides, lane);
    ptx::wait_for_kernels_ahead();

    // The row whose sums this lane ends up with.
    const int own = tile.row + tile.part / kSharers * kWarpRows;
    const bool writes = tile.part % kSharers == 0 && own < kV;

    const Rows rows(p, block.n);
    const Span span = find_span(p, block.n);
    float hk, hq;
    if constexpr (kAlone) {
        LaneToken::Words words;
        GateBits gates;
        u32 value = 0;
        words.load(p, span, 0, block.h, tile.part);
        gates.load(p, span, 0, block.hv);
        if (own < kV) value = load_bits(kQkv, row_of(p.v, p.v_strides, span, 0, block.hv), own);
        const Work work(p, rows, block.hv);
        if (work.padding) return write_zeros(p, span, block.hv, first_row, min(first_row + kRows, kV));
        tile.load(work.read, p.initial_strides.row);
        const LaneToken token(words);
        const Scalars s = token.scalars(p.scale, gates.decay(p), gates.beta(p));
        tile.open();
        multiply_rows(tile.chunks, token, lane, hk, hq);
        const float u = s.u(hk, value_of(kQkv, value));
        tile.update(token, s.decay, s.k_scale * u, lane);
        tile.store(work.write, p.final_strides.row);
        if (writes) store<kQkv>(row_of(p.out, p.out_strides, span, 0, block.hv), own, s.o(hq, u));
    } else {
        __shared__ Tokens tokens;
        Loader tokens_now;
        if (span.length > 0) tokens_now.load(p, block, span, 0, first_row);
        const Work work(p, rows, block.hv);
        if (work.padding) return write_zeros(p, span, block.hv, first_row, min(first_row + kRows, kV));
        if (work.nothing_to_do(span)) return;
        tile.load(work.read, p.initial_strides.row);
        if (span.length > 0) tokens_now.store(p, tokens);
        tile.open();

#pragma unroll 1
        for (u32 first = 0; first < span.length; first += kTokens) {
            if (first > 0) {
                Loader loader;
                loader.load(p, block, span, first, first_row);
                __syncthreads();
                loader.store(p, tokens);
            }
            __syncthreads();
            const u32 count = min(span.length - first, static_cast<u32>(kTokens));
            char* out = row_of(p.out, p.out_strides, span, first, block.hv);
#pragma unroll 1
            for (u32 t = 0; t < count; ++t) {
                const LaneToken token = tokens.read(t, tile.part);
                const Scalars s = tokens.scalars[t];
                multiply_rows(tile.chunks, token, lane, hk, hq);
                const float u = s.u(hk, tokens.v[t][own - first_row]);
                tile.update(token, s.decay, s.k_scale * u, lane);
                if (writes) store<kQkv>(out, own, s.o(hq, u));
                out += p.out_strides.token;
            }
        }
        tile.store(work.write, p.final_strides.row);
    }
}
