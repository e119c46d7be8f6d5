// What the kernels that walk from chunk to chunk share: which chunks a block walks, states, outputs.
// The including file defines kColumns, kSplit and kStages: value columns of a block, splits of the keys, chunks in
// shared memory; and kCompose, for a walk that finds the maps of segments (see chunk.cuh) instead of outputs.
#pragma once

#include "gdr/chunk.cuh"

namespace gdr {

constexpr int kWarps = kColumns / 16 * kSplit, kThreads = 32 * kWarps;
constexpr int kWarpKeys = kKeys / kSplit, kWarpKeyBlocks = kWarpKeys / 16;
constexpr int kValueBytes = bytes_of(kQkv);
// Columns of a walk: a state's, then with kCompose those of the map that the segment applies to a state.
constexpr int kAllColumns = kCompose ? kV + kKeys : kV, kBlocks = kAllColumns / kColumns;
static_assert(kColumns % 16 == 0 && kV % kColumns == 0 && kAllColumns % kColumns == 0 && kKeys % (16 * kSplit) == 0);

struct Work {
    Sequence seq;
    int n, hv, first_column;  // of the block
    int first, last;          // its chunks
    int row;                  // its segment in `maps`
    bool begins, ends;        // whether they are the launch's first and last of the sequence
    // Where this thread's first piece of the first chunk's values comes from, and where the first token that it
    // stores goes; bytes from a token to the next.
    const char* values;
    char* outputs;
    i64 value_step, output_step;

    __device__ __forceinline__ int tokens(int chunk) const {  // of a chunk and all that follow
        return static_cast<int>(min(seq.length - static_cast<i64>(chunk) * kC, static_cast<i64>(kC)));
    }
};

// ---- States. S[j][i]: column 8 (i / 2) + lane / 4 of the warp's 16, key_of(j, i) of its keys.

using State = float[kWarpKeys / 8][4];

__device__ __forceinline__ int key_of(int j, int i) {
    const int t = threadIdx.x % 4;
    return kQkv == kFloat32 ? j / 2 * 16 * kSplit + t * 4 + i % 2 * 2 + j % 2 : j * 8 + t * 2 + i % 2;
}

// Four neighbours in memory, which a lane loads and stores for itself and the lane beside it. (Across keys, with lanes that
// are further away, they would be exchanged for longer than the single elements of whole sectors take.)
struct Neighbours {
    static constexpr bool kExist = kVK && kQkv != kFloat32 && kK % 4 == 0;
    static constexpr int kCount = kWarpKeys / 8;

    int v, key;  // the first

    __device__ __forceinline__ Neighbours(int i, int column, int first_key) {
        const int lane = threadIdx.x % 32;
        v = column + lane / 4 + i % 2 * 8, key = first_key + (i / 2 * 2 + lane % 2) * 8 + lane / 2 % 2 * 4;
    }
    static __device__ __forceinline__ float& element(State& S, int i, int n) {
        return S[i / 2 * 2 + n / 2][i % 2 * 2 + n % 2];
    }
    // From what two lanes have in memory to what they have of the state, and back.
    static __device__ __forceinline__ void exchange(float (&x)[4]) {
        const bool second = threadIdx.x % 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float got = __shfl_xor_sync(0xffffffffu, second ? x[n] : x[n + 2], 1);
            x[n] = second ? got : x[n], x[n + 2] = second ? x[n + 2] : got;
        }
    }
};

// Where a value head's state lies.
template <int kType, class Byte>
struct StatePlace {
    Byte* head;
    i64 step;
    bool whole;  // neighbours can be read at once

    __device__ __forceinline__ StatePlace(Byte* base, const StateStrides& strides, i64 slot, int hv)
        : head(at(base, kType, slot * strides.slot + hv * strides.head)), step(strides.row * bytes_of(kType)) {
        whole = Neighbours::kExist && !((reinterpret_cast<size_t>(head) | step) & (4 * bytes_of(kType) - 1));
    }
    __device__ __forceinline__ Byte* element(int v, int key) const {
        return head + (kVK ? v : key) * step + (kVK ? key : v) * bytes_of(kType);
    }
    // Brings the columns of a block near, where they lie side by side.
    __device__ __forceinline__ void prefetch(int first_column) const {
        constexpr int kBytes = kColumns * kK * bytes_of(kType);
        const Byte* from = element(first_column, 0);
        const bool together = kVK ? step == kK * bytes_of(kType) : kColumns == kV && step == kV * bytes_of(kType);
        if (together && !((reinterpret_cast<size_t>(from) | kBytes) & 15)) ptx::prefetch_bulk(from, kBytes);
    }
    // An element of S.
    __device__ __forceinline__ Byte* element(int j, int i, int column, int first_key) const {
        return element(column + threadIdx.x % 32 / 4 + i / 2 * 8, first_key + key_of(j, i));
    }
};

template <int kType>
__device__ __forceinline__ void read_state(State& S, const StatePlace<kType, const char>& from, int column,
                                           int first_key) {
    u32 bits[kWarpKeys / 8][4] = {};  // all are on their way before the first is needed
    if (from.whole) {
#pragma unroll
        for (int i = 0; i < Neighbours::kCount; ++i) {
            const Neighbours n(i, column, first_key);
            if (kK != kKeys && n.key >= kK) continue;
            if constexpr (kType == kFloat32) ptx::load_streaming(from.element(n.v, n.key), bits[i]);
            else ptx::load8(from.element(n.v, n.key), bits[i]);
        }
#pragma unroll
        for (int i = 0; i < Neighbours::kCount; ++i) {
            float x[4];
            unpack<kType>(bits[i], x);
            Neighbours::exchange(x);
#pragma unroll
            for (int k = 0; k < 4; ++k) Neighbours::element(S, i, k) = x[k];
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (kK == kKeys || first_key + key_of(j, i) < kK)
                bits[j][i] = load_bits(kType, from.element(j, i, column, first_key), 0);
    }
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) S[j][i] = value_of(kType, bits[j][i]);
    }
}

template <int kType>
__device__ __forceinline__ void write_state(State& S, const StatePlace<kType, char>& to, int column, int first_key) {
    if (to.whole) {
#pragma unroll
        for (int i = 0; i < Neighbours::kCount; ++i) {
            const Neighbours n(i, column, first_key);
            float x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = Neighbours::element(S, i, k);
            Neighbours::exchange(x);
            u32 words[4];
            pack<kType>(x, words);
            if (kK != kKeys && n.key >= kK) continue;
            char* const there = to.element(n.v, n.key);
            if constexpr (kType == kFloat32)
                *reinterpret_cast<uint4*>(there) = make_uint4(words[0], words[1], words[2], words[3]);
            else *reinterpret_cast<uint2*>(there) = make_uint2(words[0], words[1]);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (kK == kKeys || first_key + key_of(j, i) < kK)
                store<kType>(to.element(j, i, column, first_key), 0, S[j][i]);
    }
}

// Where this thread's part of a state lies between launches.
__device__ __forceinline__ i64 carried_index(const Work& work, int j) {
    const i64 warp =
        (static_cast<i64>(work.hv) * (kV / kColumns) + work.first_column / kColumns) * kWarps + threadIdx.x / 32;
    return (warp * (kWarpKeys / 8) + j) * 32 + threadIdx.x % 32;
}

// ---- Values and outputs.

__device__ __forceinline__ float2 values_of(u32 pair) {
    float x[2];
    unpack<kQkv>(&pair, x);
    return make_float2(x[0], x[1]);
}

// An accumulator's 16 columns x 8 tokens as pairs of tokens of one column, in the outputs' type.
__device__ __forceinline__ void pack_pairs(const float (&o)[4], u32 (&pairs)[2]) {
    pairs[0] = Operand < kQkv == kBFloat16 > ::pack(o[0], o[1]),
    pairs[1] = Operand < kQkv == kBFloat16 > ::pack(o[2], o[3]);
}

// Stores them, transposed to pairs of columns of one token; `to` is this thread's place in its token's row.
__device__ __forceinline__ void store_pairs(char* to, const u32 (&pairs)[2], bool exists) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 pair = transpose(pairs[i]);
        char* at = to + i * 8 * kValueBytes;
        if constexpr (kAligned) {
            if (exists) *reinterpret_cast<u32*>(at) = pair;
        } else if (exists) {
            reinterpret_cast<u16*>(at)[0] = static_cast<u16>(pair),
            reinterpret_cast<u16*>(at)[1] = static_cast<u16>(pair >> 16);
        }
    }
}

__device__ __forceinline__ void zero_output(const Params& p, const Work& work) {
    for (i64 t = 0; t < work.seq.length; ++t) {
        const i64 row = work.seq.batch * p.out_strides.batch + (work.seq.first + t) * p.out_strides.token +
                        work.hv * p.out_strides.head;
        for (int i = threadIdx.x; i < kColumns; i += kThreads) store<kQkv>(p.out, row + work.first_column + i, 0.f);
    }
}

// The slot of sequence n in a state array, or -1 where it lies outside.
__device__ __forceinline__ i64 find_slot(const void* slots, bool wide, i64 rows, int n) {
    const i64 slot = slots == nullptr ? n : load_index(slots, n, wide);
    return slot < rows ? max(slot, -1ll) : -1;
}

// ---- The walk.

// The slots of a sequence's states before and after, -1 where one lies outside its array.
__device__ __forceinline__ i64 slot_before(const Params& p, int n) {
    if (!kHasInitial && p.initial_slots == nullptr) return n;
    return find_slot(p.initial_slots, p.initial_slots_wide, p.initial_rows, n);
}
__device__ __forceinline__ i64 slot_after(const Params& p, int n) {
    return kHasFinal ? find_slot(p.final_slots, p.final_slots_wide, p.final_rows, n) : n;
}

// Which columns and value head a block has, and the row of its segment: blocks go by these, in this order.
__device__ __forceinline__ void find_block(const Params& p, Work& work) {
    const int heads = p.H * p.group;
    work.hv = blockIdx.x / kBlocks % heads, work.first_column = blockIdx.x % kBlocks * kColumns;
    work.row = blockIdx.x / (kBlocks * heads);
}

// The rest. False where nothing is left to do.
__device__ __forceinline__ bool find_work(const Params& p, Work& work, const Segment& segment) {
    if (segment.n < 0) return false;
    work.n = segment.n;
    work.seq = segment.seq;
    const Sequence& seq = work.seq;
    const int first = max(0, p.first_chunk - seq.chunk), last = min(seq.chunks, p.last_chunk - seq.chunk);
    work.first = max(first, segment.first), work.last = min(last, segment.last);
    work.begins = work.first == first, work.ends = work.last == last;
    const bool starts = segment.first <= 0 && p.first_chunk <= seq.chunk && seq.chunk < p.last_chunk;
    if (work.first >= work.last && !(starts && seq.chunks == 0)) return false;
    if (slot_before(p, work.n) < 0 || slot_after(p, work.n) < 0) {
        if (!kCompose && starts) zero_output(p, work);
        return false;
    }
    if (kCompose && work.ends) return false;
    work.value_step = p.v_strides.token * kValueBytes, work.output_step = p.out_strides.token * kValueBytes;
    return true;
}
__device__ __forceinline__ bool find_work(const Params& p, Work& work) {
    find_block(p, work);
    return find_work(p, work, find_segment(p, work.row));
}

// Where this thread's piece of the first chunk's values begins, and where it stores its first outputs.
__device__ __forceinline__ void find_tokens(const Params& p, Work& work, int token, int column8, int out_token,
                                            int out_column) {
    const Sequence& seq = work.seq;
    work.values = token_row(p.v, p.v_strides, seq, token < seq.length ? token : 0, work.hv) +
                  (work.first_column + column8 * 8) * kValueBytes;
    work.outputs = at(p.out, kQkv,
                      seq.batch * p.out_strides.batch + (seq.first + out_token) * p.out_strides.token +
                          work.hv * p.out_strides.head + out_column);
}

// Of a segment's states and maps, this thread's: pairs of keys of one column.
__device__ __forceinline__ float* map_of(const Params& p, const Work& work, int row, int column, int first_key) {
    const i64 head = static_cast<i64>(row) * (p.H * p.group) + work.hv;
    const int lane = threadIdx.x % 32;
    return p.maps + (head * (kV + kKeys) + column + lane / 4) * kKeys + first_key + lane % 4 * 2;
}

__device__ __forceinline__ StatePlace<kInitial, const char> initial_place(const Params& p, const Work& work) {
    return {static_cast<const char*>(p.initial_state), p.initial_strides, slot_before(p, work.n), work.hv};
}

__device__ __forceinline__ void load_state(const Params& p, const Work& work, State& S, int column, int first_key) {
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) S[j][i] = 0.f;
    }
    if (column >= kV) {  // the identity
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first_key + j * 8 + lane % 4 * 2 + i % 2;
                if (column - kV + lane / 4 + i / 2 * 8 == key) S[j][i] = 1.f;
            }
        }
    } else if (!work.begins) {
        if constexpr (kCompose) return;  // what a segment adds to a state of zero
        const float* from = map_of(p, work, work.row - 1, column, first_key);
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const float2 x = *reinterpret_cast<const float2*>(from + i / 2 * 8 * kKeys + j * 8);
                S[j][i] = x.x, S[j][i + 1] = x.y;
            }
        }
    } else if (work.first > 0) {
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
            const float4 x = p.carried_in[carried_index(work, j)];
            S[j][0] = x.x, S[j][1] = x.y, S[j][2] = x.z, S[j][3] = x.w;
        }
    } else if constexpr (kHasInitial) {
        read_state<kInitial>(S, initial_place(p, work), column, first_key);
    }
}

__device__ __forceinline__ void save_state(const Params& p, const Work& work, State& S, int column, int first_key) {
    if constexpr (kCompose) {
        float* to = map_of(p, work, work.row, column, first_key);
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                *reinterpret_cast<float2*>(to + i / 2 * 8 * kKeys + j * 8) = make_float2(S[j][i], S[j][i + 1]);
        }
    } else if (!work.ends) {
        return;
    } else if (work.last < work.seq.chunks) {
#pragma unroll
        for (int j = 0; j < kWarpKeys / 8; ++j)
            p.carried_out[carried_index(work, j)] = make_float4(S[j][0], S[j][1], S[j][2], S[j][3]);
    } else if constexpr (kHasFinal) {
        // Without tokens a state moves only where it is read and written in different places.
        const i64 from = slot_before(p, work.n), to = slot_after(p, work.n);
        const void* read = kHasInitial
                               ? at(p.initial_state, kInitial < 0 ? kFloat32 : kInitial, from * p.initial_strides.slot)
                               : nullptr;
        if (work.seq.chunks > 0 || read != at(p.final_state, kFinal, to * p.final_strides.slot))
            write_state<kFinal>(S, {static_cast<char*>(p.final_state), p.final_strides, to, work.hv}, column,
                                first_key);
    }
}

}  // namespace gdr
