// What the fused recurrences over the two state layouts share: arguments, sequences, tokens, and one token's formulas.
//
// One specialisation is chosen by macros (types are of the enum DType, -1 for "no such array"):
//   GDR_QKV, GDR_INITIAL, GDR_FINAL      types of q, k, v and out; of the state that is read; of the one written
//   GDR_K, GDR_V                         head dimensions
//   GDR_RAW_GATES                        a and b are logits, else log decay and write strength
//   GDR_L2NORM                           q and k are divided by their lengths
//   GDR_VARLEN                           packed sequences, else every sequence has T tokens
//   GDR_ONE_TOKEN                        T is 1
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
constexpr bool kRawGates = GDR_RAW_GATES, kL2Norm = GDR_L2NORM, kVarlen = GDR_VARLEN, kOneToken = GDR_ONE_TOKEN;
constexpr bool kAlignedTokens = GDR_ALIGNED_TOKENS, kAlignedStates = GDR_ALIGNED_STATES;
constexpr bool kDenseStates = GDR_DENSE_STATES;
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
    const void *q, *k, *v;
    void* out;
    const void *A_log, *dt_bias;
    const void *a, *b;  // g and beta where the gates are given
    const void *initial_state, *initial_slots;
    void* final_state;
    const void *final_slots, *cu_seqlens;
    float scale, softplus_beta, softplus_threshold;
    int first_sequence;  // of this launch
    // What follows depends on the arrays' shapes and strides alone (strides count elements).
    TokenStrides q_strides, k_strides, v_strides, out_strides, a_strides, b_strides;
    StateStrides initial_strides, final_strides;
    i64 A_log_stride, dt_bias_stride;
    i64 initial_rows, final_rows;  // extents of the state arrays
    i64 T;
    int group;  // value heads of a key head
    int A_log_type, dt_bias_type, a_type, b_type;
    int initial_slots_wide, final_slots_wide, cu_seqlens_wide;  // int64, else int32
};

// An index that is being loaded: nothing waits for it before value() is asked for.
struct Index {
    u32 low = 0, high = 0;
    bool wide = true;

    __device__ __forceinline__ void load(const void* base, i64 i, bool is_wide) {
        wide = is_wide;
        const char* from = static_cast<const char*>(base) + i * (wide ? 8 : 4);
        low = ptx::load4(from);
        if (wide) high = ptx::load4(from + 4);
    }
    __device__ __forceinline__ i64 value() const {
        return wide ? static_cast<i64>(static_cast<unsigned long long>(high) << 32 | low) : static_cast<int>(low);
    }
};

// Tokens [first, first + length) of one batch row.
struct Span {
    i64 batch, first, length;
};

__device__ __forceinline__ Span find_span(const Params& p, i64 n) {
    if constexpr (!kVarlen) return {n, 0, kOneToken ? 1 : p.T};
    Index begin, end;
    begin.load(p.cu_seqlens, n, p.cu_seqlens_wide);
    end.load(p.cu_seqlens, n + 1, p.cu_seqlens_wide);
    // Whatever the offsets are, no token outside the arrays is touched.
    const i64 first = max(begin.value(), 0ll), last = min(end.value(), p.T);
    return {0, first, max(last - first, 0ll)};
}

// The rows of the state arrays that sequence n reads and writes.
class Rows {
  public:
    __device__ __forceinline__ Rows(const Params& p, i64 n)
        : read_slots_(p.initial_slots != nullptr),
          write_slots_(p.final_slots != nullptr && p.final_slots != p.initial_slots),
          n_(n) {
        if (read_slots_) read_.load(p.initial_slots, n, p.initial_slots_wide);
        if (write_slots_) write_.load(p.final_slots, n, p.final_slots_wide);
        same_slots_ = p.final_slots != nullptr && p.final_slots == p.initial_slots;
    }
    __device__ __forceinline__ i64 read() const { return read_slots_ ? read_.value() : n_; }
    __device__ __forceinline__ i64 write() const {
        return same_slots_ ? read() : write_slots_ ? write_.value() : n_;
    }

  private:
    Index read_, write_;
    bool read_slots_, write_slots_, same_slots_;
    i64 n_;
};

__device__ __forceinline__ bool inside(i64 row, i64 rows) { return row >= 0 && row < rows; }

// A padded row's outputs are 0; its columns [first, last) belong to this block.
__device__ __forceinline__ void write_zeros(const Params& p, const Span& span, int hv, int first, int last) {
    for (i64 t = 0; t < span.length; ++t) {
        const i64 row = span.batch * p.out_strides.batch + (span.first + t) * p.out_strides.token + hv * p.out_strides.head;
        for (int i = first + threadIdx.x; i < last; i += blockDim.x) store<kQkv>(p.out, row + i, 0.f);
    }
}

__device__ __forceinline__ i64 offset_of(const TokenStrides& s, const Span& span, i64 t, int head) {
    return span.batch * s.batch + (span.first + t) * s.token + head * s.head;
}

// Logits of a token, or its ready gates.
struct Gates {
    float A_log, dt_bias, a, b;

    __device__ __forceinline__ void load(const Params& p, const Span& span, i64 t, int hv) {
        if constexpr (kRawGates) {
            A_log = gdr::load(p.A_log_type, p.A_log, hv * p.A_log_stride);
            dt_bias = gdr::load(p.dt_bias_type, p.dt_bias, hv * p.dt_bias_stride);
        }
        a = gdr::load(p.a_type, p.a, offset_of(p.a_strides, span, t, hv));
        b = gdr::load(p.b_type, p.b, offset_of(p.b_strides, span, t, hv));
    }
    __device__ __forceinline__ float decay(const Params& p) const {
        if constexpr (kRawGates) return expf(log_decay(A_log, a, dt_bias, p.softplus_beta, p.softplus_threshold));
        return expf(a);
    }
    __device__ __forceinline__ float beta() const { return kRawGates ? sigmoid(b) : b; }
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
    static constexpr int kChunks = ceil_div(kK, kLanes * kSize);
    static constexpr bool kWhole = kK % (kLanes * kSize) == 0;
    float k[kChunks * kSize], q[kChunks * kSize];

    __device__ __forceinline__ void load(const Params& p, const Span& span, i64 t, int h, int part) {
        load_vector(p.k, offset_of(p.k_strides, span, t, h), part, k);
        load_vector(p.q, offset_of(p.q_strides, span, t, h), part, q);
    }

    __device__ __forceinline__ Scalars scalars(float scale, float decay, float beta) const {
        float kk = 0.f, qq = 0.f, kq = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks * kSize; ++i) {
            kk = fmaf(k[i], k[i], kk);
            qq = fmaf(q[i], q[i], qq);
            kq = fmaf(k[i], q[i], kq);
        }
        kq = sum_lanes<kLanes>(kq);
        float k_scale = 1.f, q_scale = scale;
        if constexpr (kL2Norm) {
            k_scale = __frsqrt_rn(sum_lanes<kLanes>(kk) + 1e-6f);
            q_scale = __frsqrt_rn(sum_lanes<kLanes>(qq) + 1e-6f) * scale;
        }
        return {decay, beta, k_scale, decay * k_scale, decay * q_scale, k_scale * q_scale * kq};
    }

  private:
    static __device__ __forceinline__ void load_vector(const void* base, i64 index, int part, float* x) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
            const int first = (j * kLanes + part) * kSize;
            u32 words[words_of(kQkv, kSize)];
            load_chunk<kQkv, kSize, kAlignedTokens>(base, index + first, kWhole ? kSize : kK - first, words);
            unpack<kQkv>(words, *reinterpret_cast<float(*)[kSize]>(x + j * kSize));
        }
    }
};

// Tokens made ready in shared memory: k and q as float32, values of the block's columns, and scalars.
template <int kLanes, int kSize, int kColumns>
struct TokenBlock {
    using OneToken = Token<kLanes, kSize>;
    static constexpr int kQuads = OneToken::kChunks * kSize / 4;

    // Four elements a lane at a time: quad i of lane `part` is elements 4 i .. 4 i + 3 of its share. With kSize == 4
    // that is the order in memory.
    float4 k[kTokens][kQuads][kLanes], q[kTokens][kQuads][kLanes];
    float v[kTokens][kColumns];
    Scalars scalars[kTokens];

    // Lane `part`'s share of token t.
    __device__ __forceinline__ void read(int t, int part, OneToken& token) const {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float4 x = k[t][i][part], y = q[t][i][part];
            token.k[4 * i] = x.x, token.k[4 * i + 1] = x.y, token.k[4 * i + 2] = x.z, token.k[4 * i + 3] = x.w;
            token.q[4 * i] = y.x, token.q[4 * i + 1] = y.y, token.q[4 * i + 2] = y.z, token.q[4 * i + 3] = y.w;
        }
    }

    // kCount elements of k or q from a multiple of kCount on, where they lie in order (kSize == 4).
    template <int kCount>
    static __device__ __forceinline__ void read_rows(const float4 (&from)[kQuads][kLanes], int first, float (&x)[kCount]) {
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

    // Called by every thread of the block, with barriers around it. The columns start at `first_column`.
    template <int kThreads>
    __device__ __forceinline__ void fill(const Params& p, const Span& span, i64 first, int hv, int first_column) {
        const int part = threadIdx.x % kLanes, h = hv / p.group;
        constexpr int kAtOnce = kThreads / kLanes;
#pragma unroll 1
        for (int i = threadIdx.x / kLanes; i < ceil_div(kTokens, kAtOnce) * kAtOnce; i += kAtOnce) {
            // Every lane takes part in the sums; one without a token repeats the last one.
            const i64 t = min(first + min(i, kTokens - 1), span.length - 1);
            OneToken token;
            Gates gates;
            token.load(p, span, t, h, part);
            gates.load(p, span, t, hv);
            const Scalars s = token.scalars(p.scale, gates.decay(p), gates.beta());
            if (i < kTokens && first + i < span.length) {
#pragma unroll
                for (int j = 0; j < kQuads; ++j) {
                    k[i][j][part] = make_float4(token.k[4 * j], token.k[4 * j + 1], token.k[4 * j + 2], token.k[4 * j + 3]);
                    q[i][j][part] = make_float4(token.q[4 * j], token.q[4 * j + 1], token.q[4 * j + 2], token.q[4 * j + 3]);
                }
                if (part == 0) scalars[i] = s;
            }
        }
        for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
            const int t = i / kColumns, column = i % kColumns;
            if (first + t < span.length && first_column + column < kV)
                v[t][column] = load<kQkv>(p.v, offset_of(p.v_strides, span, first + t, hv) + first_column + column);
        }
    }
};

// kChunk neighbouring elements of the state in registers. A single token needs each element only twice: a 16-bit
// state then stays packed, which takes half the registers.
class StateChunk {
    static constexpr bool kPacked = kOneToken && kHasInitial && kInitial == kFinal && kInitial != kFloat32;
    u32 words_[words_of(kStateType, kChunk)];
    float x_[kChunk];

  public:
    // Issues the load; `valid` of the elements from `index` on exist.
    __device__ __forceinline__ void load(const void* state, i64 index, int valid) {
        if constexpr (kHasInitial)
            load_chunk<kInitial, kChunk, kAlignedStates, Cache::kStreaming>(state, index, valid, words_);
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
    __device__ __forceinline__ void store(void* state, i64 index, int valid) {
        if constexpr (kPacked) {
            store_chunk<kFinal, kChunk, kAlignedStates>(state, index, valid, words_);
        } else if constexpr (kHasFinal) {
            u32 words[words_of(kFinal, kChunk)];
            pack<kFinal>(x_, words);
            store_chunk<kFinal, kChunk, kAlignedStates>(state, index, valid, words);
        }
    }
};

// Where a sequence's states of one head begin, and whether anything is to be done for it.
struct Work {
    const char* read = nullptr;
    char* write = nullptr;
    bool padding;

    __device__ __forceinline__ Work(const Params& p, const Rows& rows, int hv) {
        const i64 from = rows.read(), to = rows.write();
        padding = kHasInitial && !inside(from, p.initial_rows);
        if constexpr (kHasInitial) read = at(p.initial_state, kInitial, from * p.initial_strides.slot + hv * p.initial_strides.head);
        if constexpr (kHasFinal) {
            padding |= !inside(to, p.final_rows);
            write = at(p.final_state, kFinal, to * p.final_strides.slot + hv * p.final_strides.head);
        }
    }
    // Without tokens a state moves only where it is read and written in different places.
    __device__ __forceinline__ bool nothing_to_do(const Span& span) const {
        return span.length == 0 && (!kHasFinal || read == write);
    }
};

}  // namespace gdr
