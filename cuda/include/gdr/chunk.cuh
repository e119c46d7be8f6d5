// What the kernels of the chunkwise rule share: arguments, sequences and their chunks, and the workspace between them.
//
// A sequence is cut into chunks of kC tokens: 64, or 32 of float32. For one chunk and value head, with G the running sum
// of the log decays in the chunk, d_t = exp(G_t), D_ts = exp(G_t - G_s), e_t = exp(G_last - G_t), h the state before:
//     T = (I + tril(diag(beta) (K K^T * D), -1))^-1 diag(beta)          P = scale tril(Q K^T * D)
//     U = T (V - diag(d) K h)        O = scale diag(d) Q h + P U        h' = d_last h + K^T diag(e) U
// T and P belong to the chunk alone: chunk_prepare computes them for all chunks at once, and chunk_state walks from
// chunk to chunk with the state in registers. Both have twins for float32, which multiply and keep other things: see
// chunk_f32.cuh.
//
// Where that leaves processors idle, a long sequence is cut into segments of several chunks, which are walked at the
// same time. A segment turns the state h before it into M h + N. A first walk finds M and N of all segments at once, as
// the states that it leaves behind of the identity, without values, and of zero; chunk_combine goes from segment to
// segment with them; a second walk starts each segment from its own state.
//
// Where a walk without segments leaves many processors idle, chunk_prepare runs beside it on those: a few of its blocks
// do everything, chunk after chunk, and set a flag for each piece of the workspace that is there. It lets the walk start
// once all of its blocks run, and keeps so little ahead of it that tiles are read while they are in L2. If the walk does
// not come, for whatever else is on the GPU, it waits no longer: the walk always gets what it waits for.
//
// One specialisation is chosen by macros:
//   GDR_QKV, GDR_INITIAL, GDR_FINAL      types (DType, -1 for "no such array")
//   GDR_K, GDR_V                         head dimensions
//   GDR_RAW_GATES, GDR_L2NORM, GDR_VARLEN, GDR_VK    as in the recurrence; states are [.., V, K] with GDR_VK
//   GDR_WIDE                             products of bfloat16 instead of float16
//   GDR_ALIGNED                          q, k and v can be read by 16 bytes
//   GDR_BESIDE                           chunk_prepare runs beside the walk
#pragma once

#include "gdr/gates.cuh"
#include "gdr/memory.cuh"
#include "gdr/mma.cuh"
#include "gdr/types.cuh"

namespace gdr {

constexpr __host__ __device__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

constexpr int kQkv = GDR_QKV, kInitial = GDR_INITIAL, kFinal = GDR_FINAL;
constexpr int kC = kQkv == kFloat32 ? 32 : 64;  // tokens of a chunk
constexpr int kRows = kC / 16;                  // blocks of 16 tokens
constexpr int kK = GDR_K, kV = GDR_V;
constexpr int kKeys = ceil_div(kK, 64) * 64;  // K, filled up with zeros
constexpr int kKeyBlocks = kKeys / 16;
constexpr bool kRawGates = GDR_RAW_GATES, kL2Norm = GDR_L2NORM, kVarlen = GDR_VARLEN, kVK = GDR_VK;
constexpr bool kAligned = GDR_ALIGNED;
#ifndef GDR_BESIDE
#define GDR_BESIDE 0
#endif
constexpr bool kBeside = GDR_BESIDE;
constexpr bool kHasInitial = kInitial >= 0, kHasFinal = kFinal >= 0;
using Op = Operand<GDR_WIDE>;

struct TokenStrides {
    i64 batch, token, head;
};

struct StateStrides {
    i64 slot, head, row;
};

struct Params {
    const void *q, *k, *v;
    void* out;
    const void *A_log, *dt_bias;
    const void *a, *b;  // g and beta where the gates are given
    const void *initial_state, *initial_slots;
    void* final_state;
    const void *final_slots, *cu_seqlens;
    char *key_tiles, *head_tiles;  // the workspace
    // States between launches over parts of the chunks. Only one sequence lies on both sides of a boundary.
    const float4* carried_in;
    float4* carried_out;
    // Of each segment and value head in float32: N by columns of V, which chunk_combine replaces by the state after
    // the segment, then M by columns; with kKeys keys each.
    float* maps;
    float scale, softplus_beta, softplus_threshold;
    int first_chunk, last_chunk;  // this launch does chunks [first, last)
    TokenStrides q_strides, k_strides, v_strides, out_strides, a_strides, b_strides;
    StateStrides initial_strides, final_strides;
    i64 A_log_stride, dt_bias_stride;
    i64 initial_rows, final_rows;
    i64 T;
    int N, H, group;      // group: value heads of a key head
    int heads_per_block;  // value heads of one key head that a block of chunk_prepare does, 4 at most
    int segment_chunks;   // 0 for sequences as they are
    int A_log_type, dt_bias_type, a_type, b_type;
    int initial_slots_wide, final_slots_wide, cu_seqlens_wide;  // int64, else int32
};

// ---- The workspace, in the order in which it lies in shared memory later.

// Everything is made of 8 x 8 matrices with rows of 16 bytes, as ldmatrix and wgmma read them.
constexpr int kMatrixBytes = 128;

// K and Q of a chunk and key head: matrices of 8 tokens x 8 keys, those of the same keys side by side; or, with
// GDR_TOKENS_TOGETHER, those of the same tokens.
#ifndef GDR_TOKENS_TOGETHER
#define GDR_TOKENS_TOGETHER 0
#endif
constexpr int kKeyTileBytes = kC * kKeys * 2;
constexpr int kKeyStep = GDR_TOKENS_TOGETHER ? kMatrixBytes : kC / 8 * kMatrixBytes;  // from 8 keys to the next 8
constexpr int kTokenStep =
    GDR_TOKENS_TOGETHER ? kKeys / 8 * kMatrixBytes : kMatrixBytes;  // from 8 tokens to the next 8
constexpr __host__ __device__ int key_block(int token_block, int key_block) {
    return key_block * 2 * kKeyStep + token_block * 2 * kTokenStep;
}
// A lane's offset in a block of 16 tokens x 16 keys whose matrices are read by tokens or by keys first.
__device__ __forceinline__ u32 by_tokens(int lane) {
    return (lane & 8) * (kTokenStep / 8) + (lane & 16) * (kKeyStep / 16) + (lane & 7) * 16;
}
__device__ __forceinline__ u32 by_keys(int lane) {
    return (lane & 8) * (kKeyStep / 8) + (lane & 16) * (kTokenStep / 16) + (lane & 7) * 16;
}

// T, P and decays of a chunk and value head. Of T and P, blocks (i, j) with j <= i, column after column: rows are
// tokens t of block i, columns tokens s of block j. The matrices of a block of P: (t 0-7, s 0-7), (t 0-7, s 8-15),
// (t 8-15, s 0-7), (t 8-15, s 8-15). T's are in the same order, transposed.
constexpr int kLowerBlocks = kRows * (kRows + 1) / 2;
constexpr __host__ __device__ int lower_block(int i, int j) {
    return (j * (2 * kRows + 1 - j) / 2 + i - j) * kBlockBytes;
}

struct alignas(128) HeadTile {
    char T[kLowerBlocks * kBlockBytes], P[kLowerBlocks * kBlockBytes];
    float d[kC], scaled_d[kC], e[kC];

    static __device__ __forceinline__ int place(int t) { return t; }  // of a token's decays
};

// ---- Sequences and their chunks.

__device__ __forceinline__ i64 load_index(const void* base, i64 i, bool wide) {
    return wide ? static_cast<const i64*>(base)[i] : static_cast<const int*>(base)[i];
}

// Tokens [first, first + length) of one batch row. Its chunks have the numbers [chunk, chunk + chunks).
struct Sequence {
    i64 batch, first, length;
    int chunk, chunks;
};

// With packed sequences, chunk numbers leave gaps of at most one a sequence: that of a sequence's first chunk follows
// from its own offset alone.
__device__ __forceinline__ i64 packed_first(const Params& p, int n) {
    return min(max(load_index(p.cu_seqlens, n, p.cu_seqlens_wide), 0ll), p.T);
}

__device__ __forceinline__ Sequence find_sequence(const Params& p, int n) {
    Sequence s;
    if constexpr (kVarlen) {
        s.batch = 0;
        s.first = packed_first(p, n);
        s.length = max(packed_first(p, n + 1) - s.first, 0ll);  // whatever the offsets are, no token out of bounds
        s.chunk = static_cast<int>(s.first / kC) + n;
        s.chunks = static_cast<int>((s.length + kC - 1) / kC);
    } else {
        s.batch = n, s.first = 0, s.length = p.T;
        s.chunks = static_cast<int>((p.T + kC - 1) / kC);
        s.chunk = n * s.chunks;
    }
    return s;
}

// The last of N sequences whose key, which grows from one to the next, is at most `number`; -1 if none. Every lane of
// a warp calls it.
template <class Key>
__device__ __forceinline__ int find_last(int N, int number, Key&& key) {
    const int lane = threadIdx.x % 32;
    int low = 0, high = N;  // the answer is in [low, high), or there is none
    while (high > low) {
        const int step = (high - low + 31) / 32;
        const int n = low + lane * step;
        const unsigned votes = __ballot_sync(0xffffffffu, n < high && key(n) <= number);
        if (votes == 0) return -1;
        low += (31 - __clz(votes)) * step;
        high = min(low + step, high);
        if (step == 1) break;
    }
    return high > low ? low : -1;
}

// The sequence of a chunk number, or -1: the last one that starts at it or before.
__device__ __forceinline__ int find_owner(const Params& p, int chunk) {
    if constexpr (!kVarlen) {
        return chunk / static_cast<int>((p.T + kC - 1) / kC);
    } else {
        if (p.N == 1) return 0;
        return find_last(p.N, chunk, [&](int n) { return static_cast<int>(packed_first(p, n) / kC) + n; });
    }
}

// Chunks [first, last) of sequence n, or of what this launch does of it.
struct Segment {
    int n;
    Sequence seq;
    int first, last;
};

// Segments end at chunk numbers that are multiples of segment_chunks. A sequence's are numbered from that of its first
// chunk plus n on, which leaves gaps but makes no two the same. The launch's first has row 0.
__device__ __forceinline__ Segment find_segment(const Params& p, int row) {
    Segment s;
    if (p.segment_chunks == 0) {
        s.n = row, s.seq = find_sequence(p, row), s.first = 0, s.last = s.seq.chunks;
        return s;
    }
    const int number = p.first_chunk / p.segment_chunks + row;
    s.n =
        p.N == 1 ? 0 : find_last(p.N, number, [&](int n) { return find_sequence(p, n).chunk / p.segment_chunks + n; });
    if (s.n < 0) return s;
    s.seq = find_sequence(p, s.n);
    s.first = (number - s.n) * p.segment_chunks - s.seq.chunk, s.last = s.first + p.segment_chunks;
    return s;
}

// Of every 32 sequences the one with a number, counted from the longest. What blocks that run in this order leave to the
// end is short. Every lane of a warp calls it.
__device__ __forceinline__ Segment find_longest(const Params& p, int number) {
    if constexpr (!kVarlen) return find_segment(p, number);
    const int lane = threadIdx.x % 32, first = number / 32 * 32, count = min(p.N - first, 32);
    Sequence seq = {0, 0, 0, 0, -1};
    if (lane < count) seq = find_sequence(p, first + lane);
    int before = 0;
    for (int other = 0; other < count; ++other) {
        const int chunks = __shfl_sync(0xffffffffu, seq.chunks, other);
        before += chunks > seq.chunks || chunks == seq.chunks && other < lane;
    }
    const int found = __ffs(__ballot_sync(0xffffffffu, lane < count && before == number % 32)) - 1;
    const auto of_found = [&](auto x) { return __shfl_sync(0xffffffffu, x, found); };
    seq = {0, of_found(seq.first), of_found(seq.length), of_found(seq.chunk), of_found(seq.chunks)};
    return {first + found, seq, 0, seq.chunks};
}

__device__ __forceinline__ const char* token_row(const void* base, const TokenStrides& s, const Sequence& seq, i64 t,
                                                 int head) {
    return at(base, kQkv, seq.batch * s.batch + (seq.first + t) * s.token + head * s.head);
}

}  // namespace gdr
