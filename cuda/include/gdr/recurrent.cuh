// What the fused recurrences over the two state layouts share: arguments, sequences, tokens, and one token's formulas.
//
// One specialisation is chosen by macros (types are of the enum DType, -1 for "no such array"):
//   GDR_QKV, GDR_INITIAL, GDR_FINAL      types of q, k, v and out; of the state that is read; of the one written
//   GDR_K, GDR_V                         head dimensions
//   GDR_RAW_GATES                        a and b are logits, else log decay and write strength
//   GDR_L2NORM                           q and k are divided by their lengths
//   GDR_ONE_TOKEN                        every sequence has one token
//   GDR_CU_SEQLENS, GDR_INITIAL_SLOTS, GDR_FINAL_SLOTS   bytes of an index, 0 for "no such array"; without cu_seqlens
//                                        every sequence has T tokens, without slots sequence n has row n
//   GDR_IN_PLACE                         a state is written where it was read; GDR_FINAL_SLOTS says nothing then
//   GDR_ALIGNED_TOKENS, GDR_ALIGNED_STATES   chunks can be moved whole
//   GDR_DENSE_STATES                     rows of a state follow one another without gaps
#pragma once

#include "gdr/gates.cuh"
#include "gdr/memory.cuh"
#include "gdr/reduce.cuh"
#include "gdr/types.cuh"

namespace gdr {

constexpr int kQkv = GDR_QKV, kInitial = GDR_INITIAL, kFinal = GDR_FINAL;
constexpr int kK = GDR_K, kV = GDR_V;
constexpr bool kRawGates = GDR_RAW_GATES, kL2Norm = GDR_L2NORM, kOneToken = GDR_ONE_TOKEN;
constexpr bool kAlignedTokens = GDR_ALIGNED_TOKENS, kAlignedStates = GDR_ALIGNED_STATES;
constexpr bool kDenseStates = GDR_DENSE_STATES;
constexpr int kCuSeqlens = GDR_CU_SEQLENS, kInitialSlots = GDR_INITIAL_SLOTS, kFinalSlots = GDR_FINAL_SLOTS;
constexpr bool kInPlace = GDR_IN_PLACE;
constexpr bool kHasInitial = kInitial >= 0, kHasFinal = kFinal >= 0;

// The state moves in chunks of 16 bytes of its stored type.
constexpr int kStateType = kHasInitial ? kInitial : kHasFinal ? kFinal : kFloat32;
constexpr int kChunk = 16 / bytes_of(kStateType);
// Tokens that are made ready together in shared memory.
constexpr int kTokens = kOneToken ? 1 : 8;

constexpr __host__ __device__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

struct TokenStrides {
    i64 batch, token, head;
};

struct StateStrides {
    i64 slot, head, row;
};

struct Params {
    const char *q, *k, *v;
    char* out;
    const char *A_log, *dt_bias;
    const char *a, *b;  // g and beta where the gates are given
    const char *initial_state, *initial_slots;
    char* final_state;
    const char *final_slots, *cu_seqlens;
    float scale, softplus_beta, one_over_softplus_beta, softplus_threshold;
    u32 first_sequence;  // of this launch
    // What follows depends on the arrays' shapes and strides alone. Strides are in bytes.
    TokenStrides q_strides, k_strides, v_strides, out_strides, a_strides, b_strides;
    StateStrides initial_strides, final_strides;
    i64 A_log_stride, dt_bias_stride;
    i64 initial_rows, final_rows;  // extents of the state arrays
    i64 T;
    u32 group;  // value heads of a key head
    int A_log_type, dt_bias_type, a_type, b_type;
};

// Element n of an array of indices of kBytes each, or n itself without an array. It is on its way until value().
template <int kBytes>
class Index {
    u32 n_, words_[2];

  public:
    __device__ __forceinline__ Index(const char* base, u32 n) : n_(n) {
        const char* from = base + i64{n} * kBytes;
        if constexpr (kBytes == 4) words_[0] = ptx::load4(from);
        if constexpr (kBytes == 8) words_[0] = ptx::load4(from), words_[1] = ptx::load4(from + 4);
    }
    __device__ __forceinline__ i64 value() const {
        if constexpr (kBytes == 4) return static_cast<int>(words_[0]);
        if constexpr (kBytes == 8)
            return static_cast<i64>(static_cast<unsigned long long>(words_[1]) << 32 | words_[0]);
        return n_;
    }
};

// Tokens [first, first + length) of one batch row.
struct Span {
    u32 batch, first, length;
};

__device__ __forceinline__ Span find_span(const Params& p, u32 n) {
    if constexpr (kCuSeqlens == 0) return {n, 0, kOneToken ? 1 : static_cast<u32>(p.T)};
    const Index<kCuSeqlens> begin(p.cu_seqlens, n), end(p.cu_seqlens, n + 1);
    // Whatever the offsets are, no token outside the arrays is touched.
    const i64 first = max(begin.value(), 0ll), last = min(end.value(), p.T);
    return {0, static_cast<u32>(first), static_cast<u32>(max(last - first, 0ll))};
}

// Where row `head` of token t of a span begins.
template <class Bytes>
__device__ __forceinline__ Bytes* row_of(Bytes* base, const TokenStrides& s, const Span& span, u32 t, u32 head) {
    return base + span.batch * s.batch + (span.first + t) * s.token + head * s.head;
}

// The rows of the state arrays that a sequence reads and writes. Made first: the state waits for them.
struct Rows {
    Index<kInitialSlots> read;
    Index<kInPlace ? 0 : kFinalSlots> write;

    __device__ __forceinline__ Rows(const Params& p, u32 n) : read(p.initial_slots, n), write(p.final_slots, n) {
        __syncwarp();  // keeps the compiler from putting other loads before these
    }
};

// Which part of the work a block does. Along x the grid has the blocks of one state, then the value heads of one key
// head; along y the key heads, along z the sequences.
template <u32 kBlocks>
struct Block {
    u32 n, h, hv, slice;

    __device__ __forceinline__ explicit Block(const Params& p)
        : n(p.first_sequence + blockIdx.z),
          h(blockIdx.y),
          hv(blockIdx.y * p.group + blockIdx.x / kBlocks),
          slice(blockIdx.x % kBlocks) {}
};

// A padded row's outputs are 0; its columns [first, last) belong to this block.
__device__ __forceinline__ void write_zeros(const Params& p, const Span& span, u32 hv, int first, int last) {
    for (u32 t = 0; t < span.length; ++t)
        for (int i = first + threadIdx.x; i < last; i += blockDim.x)
            store<kQkv>(row_of(p.out, p.out_strides, span, t, hv), i, 0.f);
}

// Logits of a token, or its ready gates, as they are loaded.
struct GateBits {
    u32 A_log, dt_bias, a, b;

    __device__ __forceinline__ void load(const Params& p, const Span& span, u32 t, u32 hv) {
        if constexpr (kRawGates) {
            A_log = load_bits(p.A_log_type, p.A_log + hv * p.A_log_stride, 0);
            dt_bias = load_bits(p.dt_bias_type, p.dt_bias + hv * p.dt_bias_stride, 0);
        }
        a = load_bits(p.a_type, row_of(p.a, p.a_strides, span, t, hv), 0);
        b = load_bits(p.b_type, row_of(p.b, p.b_strides, span, t, hv), 0);
    }
    __device__ __forceinline__ float decay(const Params& p) const {
        const float x = value_of(p.a_type, a);
        if constexpr (!kRawGates) return exp_unbiased(x);
        const float rate = value_of(p.A_log_type, A_log), bias = value_of(p.dt_bias_type, dt_bias);
        return exp_unbiased(log_decay(rate, x, bias, p.softplus_beta, p.one_over_softplus_beta, p.softplus_threshold));
    }
    __device__ __forceinline__ float beta(const Params& p) const {
        const float x = value_of(p.b_type, b);
        return kRawGates ? sigmoid(x) : x;
    }
};

// One token's scalars. With k and q as they are in memory, h the state before the token, and k_scale, q_scale what
// normalises (and scales) them:
//     u  = beta (v - decay k_scale h^T k)
//     o  = decay q_scale h^T q + k_scale q_scale (k . q) u          one pass over h serves both products
//     h' = decay h + k (k_scale u)^T
struct alignas(32) Scalars {
    float decay, beta, k_scale, from_k, from_q, from_u;

    __device__ __forceinline__ float u(float hk, float v) const { return beta * fmaf(-from_k, hk, v); }
    __device__ __forceinline__ float o(float hq, float u) const { return fmaf(from_q, hq, from_u * u); }
};

// A token's share of k and q in one of kLanes lanes: chunks of kSize elements, kLanes * kSize elements apart.
template <int kLanes, int kSize>
struct Token {
    static constexpr int kChunks = ceil_div(kK, kLanes* kSize), kCount = kChunks * kSize;
    static constexpr bool kWhole = kK % (kLanes * kSize) == 0;
    float k[kCount], q[kCount];

    // The same as it is loaded.
    class Words {
        static constexpr int kWords = words_of(kQkv, kSize);
        u32 k_[kChunks * kWords], q_[kChunks * kWords];
        friend Token;

      public:
        __device__ __forceinline__ void load(const Params& p, const Span& span, u32 t, u32 h, int part) {
            const char *k_row = row_of(p.k, p.k_strides, span, t, h), *q_row = row_of(p.q, p.q_strides, span, t, h);
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                const int first = (j * kLanes + part) * kSize, valid = kWhole ? kSize : kK - first;
                load_chunk<kQkv, kSize, kAlignedTokens>(k_row, first, valid, k_ + j * kWords);
                load_chunk<kQkv, kSize, kAlignedTokens>(q_row, first, valid, q_ + j * kWords);
            }
        }
    };

    __device__ __forceinline__ Token() {}
    __device__ __forceinline__ explicit Token(const Words& words) {
        unpack<kQkv>(words.k_, k);
        unpack<kQkv>(words.q_, q);
    }

    __device__ __forceinline__ Scalars scalars(float scale, float decay, float beta) const {
        float sums[3] = {0.f, 0.f, 0.f};  // k . q, k . k, q . q
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            sums[0] = fmaf(k[i], q[i], sums[0]);
            sums[1] = fmaf(k[i], k[i], sums[1]);
            sums[2] = fmaf(q[i], q[i], sums[2]);
        }
        sum_lanes<kLanes>(sums);
        float k_scale = 1.f, q_scale = scale;
        if constexpr (kL2Norm) {
            k_scale = rsqrtf(sums[1] + 1e-6f);
            q_scale = rsqrtf(sums[2] + 1e-6f) * scale;
        }
        return {decay, beta, k_scale, decay * k_scale, decay * q_scale, k_scale * q_scale * sums[0]};
    }
};

// Tokens made ready in shared memory: k and q as float32, values of the block's columns, and scalars.
template <int kThreads, int kLanes, int kSize, int kColumns>
struct TokenBlock {
    using LaneToken = Token<kLanes, kSize>;
    static constexpr int kQuads = LaneToken::kCount / 4;
    static constexpr int kPasses = ceil_div(kTokens * kLanes, kThreads);    // to make all tokens ready
    static constexpr int kValues = ceil_div(kTokens * kColumns, kThreads);  // that a thread carries
    static_assert(kThreads % kColumns == 0 && kThreads % kLanes == 0);

    // Four elements a lane at a time: quad i of lane `part` is elements 4 i .. 4 i + 3 of its share. With kSize == 4
    // that is the order in memory.
    float4 k[kTokens][kQuads][kLanes], q[kTokens][kQuads][kLanes];
    float v[kTokens][kColumns];
    Scalars scalars[kTokens];

    // Lane `part`'s share of token t.
    __device__ __forceinline__ LaneToken read(int t, int part) const {
        LaneToken token;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float4 x = k[t][i][part], y = q[t][i][part];
            token.k[4 * i] = x.x, token.k[4 * i + 1] = x.y, token.k[4 * i + 2] = x.z, token.k[4 * i + 3] = x.w;
            token.q[4 * i] = y.x, token.q[4 * i + 1] = y.y, token.q[4 * i + 2] = y.z, token.q[4 * i + 3] = y.w;
        }
        return token;
    }

    // kCount elements of k or q from a multiple of kCount on, where they lie in order (kSize == 4).
    template <int kCount>
    static __device__ __forceinline__ void read_rows(const float4 (&from)[kQuads][kLanes], int first,
                                                     float (&x)[kCount]) {
        static_assert(kSize == 4);
        const float* elements = reinterpret_cast<const float*>(from) + first;
        if constexpr (kCount % 4 == 0) {
#pragma unroll
            for (int i = 0; i < kCount; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(elements + i);
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] = elements[i];
        }
    }
};

// Carries tokens from memory to a TokenBlock: first every load is issued, so that they overlap with one another and
// with the loads of the state; then the tokens are made ready. Every thread of the block takes part.
template <int kThreads, int kLanes, int kSize, int kColumns>
class TokenLoader {
    using Tokens = TokenBlock<kThreads, kLanes, kSize, kColumns>;
    using LaneToken = Token<kLanes, kSize>;
    static constexpr int kAtOnce = kThreads / kLanes;        // tokens
    static constexpr int kRowsAtOnce = kThreads / kColumns;  // of values
    typename LaneToken::Words words_[Tokens::kPasses];
    GateBits gates_[Tokens::kPasses];
    u32 values_[Tokens::kValues];
    int count_;  // tokens

  public:
    // Up to kTokens tokens from `first` on; the block's columns begin at `column`.
    template <u32 kBlocks>
    __device__ __forceinline__ void load(const Params& p, const Block<kBlocks>& block, const Span& span, u32 first,
                                         int column) {
        count_ = min(span.length - first, static_cast<u32>(kTokens));
#pragma unroll
        for (int pass = 0; pass < Tokens::kPasses; ++pass) {
            if (warp_token(pass) >= count_) continue;
            // Lanes without a token of their own take the last one: all are needed for the sums.
            const u32 t = first + min(token(pass), count_ - 1);
            words_[pass].load(p, span, t, block.h, threadIdx.x % kLanes);
            gates_[pass].load(p, span, t, block.hv);
        }
        column += threadIdx.x % kColumns;
#pragma unroll
        for (int i = 0; i < Tokens::kValues; ++i) {
            const u32 t = first + value_row(i);
            if (value_row(i) < count_ && column < kV)
                values_[i] = load_bits(kQkv, row_of(p.v, p.v_strides, span, t, block.hv), column);
        }
    }

    __device__ __forceinline__ void store(const Params& p, Tokens& tokens) const {
        const int part = threadIdx.x % kLanes;
#pragma unroll
        for (int pass = 0; pass < Tokens::kPasses; ++pass) {
            if (warp_token(pass) >= count_) continue;
            const LaneToken x(words_[pass]);
            const Scalars s = x.scalars(p.scale, gates_[pass].decay(p), gates_[pass].beta(p));
            const int t = token(pass);
            if (t >= count_) continue;
#pragma unroll
            for (int j = 0; j < Tokens::kQuads; ++j) {
                tokens.k[t][j][part] = make_float4(x.k[4 * j], x.k[4 * j + 1], x.k[4 * j + 2], x.k[4 * j + 3]);
                tokens.q[t][j][part] = make_float4(x.q[4 * j], x.q[4 * j + 1], x.q[4 * j + 2], x.q[4 * j + 3]);
            }
            if (part == 0) tokens.scalars[t] = s;
        }
#pragma unroll
        for (int i = 0; i < Tokens::kValues; ++i)
            if (value_row(i) < count_) tokens.v[value_row(i)][threadIdx.x % kColumns] = value_of(kQkv, values_[i]);
    }

  private:
    static __device__ __forceinline__ int token(int pass) { return threadIdx.x / kLanes + pass * kAtOnce; }
    static __device__ __forceinline__ int warp_token(int pass) {
        return threadIdx.x / 32 * (32 / kLanes) + pass * kAtOnce;
    }
    static __device__ __forceinline__ int value_row(int i) { return threadIdx.x / kColumns + i * kRowsAtOnce; }
};

// kChunk neighbouring elements of the state in registers. A single token needs each element only twice: a 16-bit
// state then stays packed, which takes half the registers.
class StateChunk {
    static constexpr bool kPacked = kOneToken && kHasInitial && kInitial == kFinal && kInitial != kFloat32;
    u32 words_[words_of(kStateType, kChunk)];
    float x_[kChunk];

  public:
    // Issues the load; `valid` elements exist.
    __device__ __forceinline__ void load(const char* from, int valid) {
        if constexpr (kHasInitial)
            load_chunk<kInitial, kChunk, kAlignedStates, Cache::kStreaming>(from, 0, valid, words_);
    }
    // Once, after all loads are issued.
    __device__ __forceinline__ void open() {
        if constexpr (kPacked) return;
        if constexpr (kHasInitial) {
            unpack<kInitial>(words_, x_);
        } else {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) x_[i] = 0.f;
        }
    }
    __device__ __forceinline__ void get(float (&x)[kChunk]) {
        if constexpr (kPacked) {
#pragma unroll
            for (u32& word : words_) ptx::forget(word);
            unpack<kInitial>(words_, x);
        } else {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) x[i] = x_[i];
        }
    }
    __device__ __forceinline__ void set(const float (&x)[kChunk]) {
        if constexpr (kPacked) {
            pack<kFinal>(x, words_);
        } else {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) x_[i] = x[i];
        }
    }
    __device__ __forceinline__ void store(char* to, int valid) {
        if constexpr (kPacked) {
            store_chunk<kFinal, kChunk, kAlignedStates>(to, 0, valid, words_);
        } else if constexpr (kHasFinal) {
            u32 words[words_of(kFinal, kChunk)];
            pack<kFinal>(x_, words);
            store_chunk<kFinal, kChunk, kAlignedStates>(to, 0, valid, words);
        }
    }
};

// From one row of a state, which has kLength elements, to the next.
template <int kType, int kLength>
__device__ __forceinline__ i64 row_bytes(i64 row_stride) {
    return kDenseStates ? i64{kLength} * bytes_of(kType) : row_stride;
}

// Where an element of a state lies. (The indices are signed and wide so that what
// is constant in them becomes part of the instructions that use the offset.)
template <int kType, int kLength>
__device__ __forceinline__ i64 state_offset(i64 row_stride, i64 row, i64 column) {
    return row * row_bytes<kType, kLength>(row_stride) + column * bytes_of(kType);
}

// Whether a block fetches its kElements of a state into L2 before the kernels ahead have ended. The first blocks do, for
// 4 MiB; all do where there are 256 MiB or more. Between, to fetch more than that took longer than to fetch nothing
// (an H100, calls one right after the other): it leaves L2 again before it is used.
template <int kElements>
__device__ __forceinline__ bool fetches_early() {
    constexpr u32 kBytes = kElements * bytes_of(kStateType), kFirst = (4u << 20) / kBytes,
                  kMany = (256u << 20) / kBytes;
    const u32 rows = gridDim.y * blockIdx.z + blockIdx.y;
    return ptx::kStartsEarly && (rows * gridDim.x + blockIdx.x < kFirst || gridDim.z * gridDim.y * gridDim.x >= kMany);
}

// The state that a sequence will most likely read: a kernel ahead may yet change its slot, or the state. So nothing but
// L2 sees what is fetched.
struct Guess {
    const char* state = nullptr;  // null where there is none

    __device__ __forceinline__ Guess(const Params& p, u32 n, u32 hv) {
        if constexpr (kHasInitial) {
            // The low half of a slot of 64 bits will do.
            i64 row = n;
            if constexpr (kInitialSlots > 0)
                row = static_cast<int>(ptx::peek4(p.initial_slots + i64{n} * kInitialSlots));
            if (row >= 0 && row < p.initial_rows)
                state = p.initial_state + hv * p.initial_strides.head + row * p.initial_strides.slot;
        }
    }

    // Has a warp fetch kRows rows of kBytes from `offset` on; `rows` of them exist, with `bytes` each.
    template <int kRows, int kBytes>
    __device__ __forceinline__ void prefetch(i64 offset, i64 row_stride, int rows, int bytes, int lane) const {
        constexpr int kLine = 128, kLines = ceil_div(kBytes, kLine);
        if (state == nullptr) return;
#pragma unroll
        for (int i = 0; i < ceil_div(kRows * kLines, 32); ++i) {
            const int id = lane + i * 32, row = id / kLines, at = id % kLines * kLine;
            if (row < min(kRows, rows) && at < bytes) ptx::prefetch(state + offset + row * row_stride + at);
        }
    }
};

// Where a sequence's states of one head begin, and whether anything is to be done for it.
struct Work {
    const char* read = nullptr;
    char* write = nullptr;
    bool padding = false;

    __device__ __forceinline__ Work(const Params& p, const Rows& rows, u32 hv) {
        if constexpr (kHasInitial) {
            const char* head = p.initial_state + hv * p.initial_strides.head;
            const i64 row = rows.read.value();
            padding = row < 0 || row >= p.initial_rows;
            read = head + static_cast<u32>(row) * p.initial_strides.slot;
            if constexpr (kInPlace) write = const_cast<char*>(read);
        }
        if constexpr (kHasFinal && !kInPlace) {
            char* head = p.final_state + hv * p.final_strides.head;
            const i64 row = rows.write.value();
            padding |= row < 0 || row >= p.final_rows;
            write = head + static_cast<u32>(row) * p.final_strides.slot;
        }
    }
    // Without tokens a state moves only where it is read and written in different places.
    __device__ __forceinline__ bool nothing_to_do(const Span& span) const {
        return span.length == 0 && (!kHasFinal || read == write);
    }
};

// How many lanes share a row of so many chunks: a power of two, 16 at most.
constexpr int lanes_for(int chunks) {
    int lanes = 1;
    while (lanes < chunks && lanes < 16) lanes *= 2;
    return lanes;
}

// The products with k and q of rows that kLanes lanes share: each lane gets the sums of one row.
template <int kLanes, int kLaneRows, int kChunks>
__device__ __forceinline__ void multiply_rows(StateChunk (&chunks)[kLaneRows][kChunks],
                                              const Token<kLanes, kChunk>& token, int lane, float& own_k,
                                              float& own_q) {
    float hk[kLaneRows], hq[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        hk[r] = hq[r] = 0.f;
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
            float h[kChunk];
            chunks[r][j].get(h);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                hk[r] = fmaf(h[i], token.k[j * kChunk + i], hk[r]);
                hq[r] = fmaf(h[i], token.q[j * kChunk + i], hq[r]);
            }
        }
    }
    sum_transposed<kLaneRows, kLanes / 2, 1>(hk, lane);
    sum_transposed<kLaneRows, kLanes / 2, 1>(hq, lane);
    own_k = hk[0], own_q = hq[0];
}

}  // namespace gdr
