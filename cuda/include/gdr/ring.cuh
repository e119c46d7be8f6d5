// Deferred write-back: the last tokens of every slot, kept beside its state until they are folded into it together.
//
// Entry j of a slot is a key k_j, an update u_j and a log decay g_j. With n entries pending the state is
//     h = exp(g_0 + .. + g_{n-1}) h_0 + sum_j exp(g_{j+1} + .. + g_{n-1}) k_j u_j^T
// and the entries after the pending ones are drafts, if there are any: tokens that may be committed. Every entry keeps
// its own g. The sums over later ones are formed when they are needed: they lose no digits to what was before, and a
// token that forgets everything is -inf, never -inf - -inf.
//
// Macros beside those of recurrent.cuh, with GDR_INITIAL == GDR_FINAL the type of the states and of keys and updates:
//   GDR_LAYOUT_VK     states are [slots, HV, V, K], else [slots, HV, K, V]
//   GDR_ENTRIES       entries that a slot has room for
//   GDR_ROWS, GDR_WARPS, GDR_MIN_BLOCKS   see StateTile
//   GDR_PREFETCH      blocks fetch what they will read into L2 while kernels ahead still run
#pragma once

#include "gdr/recurrent.cuh"

namespace gdr {

constexpr bool kVk = GDR_LAYOUT_VK, kPrefetches = GDR_PREFETCH;
constexpr int kEntries = GDR_ENTRIES;
constexpr int kState = kInitial;
constexpr int kMostDrafts = 16;
static_assert(kEntries <= 32, "a warp holds a scalar of every entry");

// What a slot's entries are: how many are pending, after how many tokens they are folded (0: not decided yet), how
// many drafts follow, and which of its two sets of scalars is in use.
struct Fill {
    u32 word;

    __device__ __forceinline__ explicit Fill(u32 word) : word(word) {}
    __device__ __forceinline__ Fill(u32 pending, u32 limit, u32 drafts, u32 half)
        : word(pending | limit << 8 | drafts << 16 | half << 24) {}
    __device__ __forceinline__ int pending() const { return min(word & 0xff, static_cast<u32>(kEntries)); }
    __device__ __forceinline__ u32 limit() const { return word >> 8 & 0xff; }
    __device__ __forceinline__ int drafts() const { return min(word >> 16 & 0xff, kEntries - (word & 0xff)); }
    __device__ __forceinline__ u32 half() const { return word >> 24 & 1; }
};

struct RingArrays {
    char *keys, *updates;        // [slots, H, kEntries, K], [slots, HV, kEntries, V]
    float *gates, *key_scales;   // [slots, 2, HV, kEntries], [slots, 2, H, kEntries]
    u32* fills;                  // [slots, 2]: a Fill, and how many blocks (of key heads) have read it
    u32* arrivals;               // [slots, H]: how many blocks have read a key head's entries
    signed char* draft_parents;  // [slots, kMostDrafts]: the draft before each draft
    const char* parents;         // [N, T] of int32 or int64: those of this call; without, each follows the one before
    u32 capacity, stagger, H, HV, parent_bytes;
};

struct RingParams {
    Params call;
    RingArrays ring;
};

// The entries of one slot and head.
struct Entries {
    char *keys, *updates;
    float *gates, *key_scales;

    __device__ __forceinline__ Entries(const RingArrays& ring, i64 slot, u32 half, u32 h, u32 hv)
        : keys(ring.keys + (slot * ring.H + h) * (i64{kEntries} * kK * bytes_of(kState))),
          updates(ring.updates + (slot * ring.HV + hv) * (i64{kEntries} * kV * bytes_of(kState))),
          gates(ring.gates + ((slot * 2 + half) * ring.HV + hv) * kEntries),
          key_scales(ring.key_scales + ((slot * 2 + half) * ring.H + h) * kEntries) {}
    __device__ __forceinline__ char* key(int j) const { return keys + i64{j} * (kK * bytes_of(kState)); }
    __device__ __forceinline__ char* update(int j, int row) const {
        return updates + (i64{j} * kV + row) * bytes_of(kState);
    }
};

// After how many tokens a slot's entries are folded: its first period may be shorter, so that slots that start
// together do not fold together.
__device__ __forceinline__ u32 limit_of(const RingArrays& ring, Fill fill, i64 slot) {
    if (fill.limit() != 0) return fill.limit();
    return ring.stagger ? 1 + static_cast<u32>(slot) % ring.capacity : ring.capacity;
}

// The draft that draft t of sequence n follows, -1 for the state. Whatever parents say, it is one before t.
__device__ __forceinline__ int parent_of(const RingArrays& ring, u32 n, int T, int t) {
    if (ring.parents == nullptr) return t - 1;
    const i64 at = i64{n} * T + t;
    const i64 parent = ring.parent_bytes == 8 ? reinterpret_cast<const i64*>(ring.parents)[at]
                                              : reinterpret_cast<const int*>(ring.parents)[at];
    return parent >= 0 && parent < t ? static_cast<int>(parent) : -1;
}

// The log decay of a token.
__device__ __forceinline__ float log_decay_of(const Params& p, const GateBits& bits) {
    const float x = value_of(p.a_type, bits.a);
    if constexpr (!kRawGates) return x;
    const float rate = value_of(p.A_log_type, bits.A_log), bias = value_of(p.dt_bias_type, bits.dt_bias);
    return log_decay(rate, x, bias, p.softplus_beta, p.one_over_softplus_beta, p.softplus_threshold);
}

// Sums of x over this lane and those after it, by a warp.
__device__ __forceinline__ float sum_from(float x, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float later = __shfl_down_sync(0xffffffffu, x, step);
        if (lane + step < 32) x += later;
    }
    return x;
}

// What becomes of the pending entries after them: of the state (the decay over all of them), and of entry j, in lane j.
struct Remains {
    float log_state, log_entry, key_scale;  // log_entry: decay after the entry; key_scale 0 where there is no entry

    // The loads; then, when they are needed, the sums.
    __device__ __forceinline__ Remains(const Entries& entries, int pending, int lane)
        : log_state(0.f), log_entry(0.f), key_scale(0.f) {
        if (lane < pending) {
            log_entry = __uint_as_float(ptx::load4(entries.gates + lane));
            key_scale = __uint_as_float(ptx::load4(entries.key_scales + lane));
        }
    }
    __device__ __forceinline__ void scan(int lane) {
        const float from = sum_from(log_entry, lane), after = __shfl_down_sync(0xffffffffu, from, 1);
        log_state = __shfl_sync(0xffffffffu, from, 0);
        log_entry = lane == 31 ? 0.f : after;
    }
};

// A block owns kRows value columns of one head's state; kLanes lanes share a column ("row" below: it is one where the
// layout is "vk"), each with the same part of K of all of its rows.
constexpr int kLanes = lanes_for(ceil_div(kK, kChunk));
constexpr int kLaneRows = GDR_ROWS, kWarps = GDR_WARPS, kThreads = 32 * kWarps;
constexpr int kWarpRows = 32 / kLanes;                 // rows that a warp holds side by side
constexpr int kRows = kWarps * kLaneRows * kWarpRows;  // rows of a block
constexpr int kSharers = kLanes / kLaneRows;           // lanes that end up with the sums of the same row
constexpr int kBlocks = ceil_div(kV, kRows);           // of a head
static_assert(kLaneRows <= kLanes && kLanes % kLaneRows == 0);

using LaneToken = Token<kLanes, kChunk>;
constexpr int kChunks = LaneToken::kChunks, kQuads = LaneToken::kCount / 4;
constexpr int kWords = words_of(kState, kChunk);

// Vectors of K elements in shared memory, by lanes: quad i of lane `part` is elements 4 i .. 4 i + 3 of its part.
using SharedVector = float4[kQuads][kLanes];

__device__ __forceinline__ void put(SharedVector& to, int part, const float (&x)[LaneToken::kCount]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) to[i][part] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

__device__ __forceinline__ void take(const SharedVector& from, int part, float (&x)[LaneToken::kCount]) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const float4 four = from[i][part];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
}

// A lane's part of a vector of K elements of the states' type.
struct Part {
    u32 words[kChunks][kWords];

    static __device__ __forceinline__ int first(int j, int part) { return (j * kLanes + part) * kChunk; }
    static __device__ __forceinline__ int valid(int j, int part) {
        return LaneToken::kWhole ? kChunk : kK - first(j, part);
    }
    __device__ __forceinline__ void load(const char* from, int part, bool exists) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            load_chunk<kState, kChunk, kAlignedStates>(from, first(j, part), exists ? valid(j, part) : 0, words[j]);
    }
    __device__ __forceinline__ void store(char* to, int part) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            store_chunk<kState, kChunk, kAlignedStates>(to, first(j, part), valid(j, part), words[j]);
    }
    __device__ __forceinline__ void get(float (&x)[LaneToken::kCount]) const {
#pragma unroll
        for (int j = 0; j < kChunks; ++j) unpack<kState>(words[j], reinterpret_cast<float (&)[kChunk]>(x[j * kChunk]));
    }
    __device__ __forceinline__ void set(const float (&x)[LaneToken::kCount]) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            pack<kState>(reinterpret_cast<const float (&)[kChunk]>(x[j * kChunk]), words[j]);
    }
};

// Keys and updates of entries in shared memory, as they are in memory: in the states' type.
struct alignas(16) SharedKey {
    u32 chunks[kChunks * kLanes + 1][kWords];  // with a gap that keeps entries in different banks

    __device__ __forceinline__ void get(int part, float (&x)[LaneToken::kCount]) const {
#pragma unroll
        for (int j = 0; j < kChunks; ++j) get_chunk(j, part, reinterpret_cast<float (&)[kChunk]>(x[j * kChunk]));
    }
    __device__ __forceinline__ void get_chunk(int j, int part, float (&x)[kChunk]) const {
        const uint4 four = *reinterpret_cast<const uint4*>(chunks[j * kLanes + part]);
        const u32 words[kWords] = {four.x, four.y, four.z, four.w};
        unpack<kState>(words, x);
    }
};

struct alignas(16) SharedUpdates {
    u32 chunks[kRows / kChunk + 8 * bytes_of(kState) / 16][kWords];  // with a gap that keeps entries in different banks

    __device__ __forceinline__ float get(int row) const {
        if constexpr (kState == kFloat32) return reinterpret_cast<const float*>(chunks)[row];
        else return value_of(kState, reinterpret_cast<const u16*>(chunks)[row]);
    }
};
static_assert(kRows % kChunk == 0 && kWords == 4);

// Starts to copy a chunk, of which `valid` elements exist, to shared memory.
__device__ __forceinline__ void copy_chunk(u32 (&to)[kWords], const char* from, int first, int valid) {
    if constexpr (kAlignedStates) {
        ptx::copy16(to, at(from, kState, first), valid > 0);
    } else {
        u32 words[kWords];
        load_chunk<kState, kChunk, false>(from, first, valid, words);
#pragma unroll
        for (int i = 0; i < kWords; ++i) to[i] = words[i];
    }
}

// Which entry the lanes of a row look at, in a pass over all of them.
constexpr int kAtOnce = kWarps * kWarpRows, kPasses = ceil_div(kEntries, kAtOnce);
__device__ __forceinline__ int entry_of(int pass) { return pass * kAtOnce + threadIdx.x / kLanes; }

// Starts to copy the first `count` entries: keys, of which the lanes of a row get those that they look at, and the
// updates of the block's rows.
__device__ __forceinline__ void copy_keys(const Entries& entries, int count, SharedKey* keys) {
    const int part = threadIdx.x % kLanes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int entry = entry_of(pass);
        if (entry < count)
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
                copy_chunk(keys[entry].chunks[j * kLanes + part], entries.key(entry), Part::first(j, part),
                           Part::valid(j, part));
    }
}

__device__ __forceinline__ void copy_updates(const Entries& entries, int count, int first_row, SharedUpdates* updates) {
    constexpr int kRowChunks = kRows / kChunk;
#pragma unroll
    for (int i = 0; i < ceil_div(kEntries * kRowChunks, kThreads); ++i) {
        const int entry = (threadIdx.x + i * kThreads) / kRowChunks, chunk = (threadIdx.x + i * kThreads) % kRowChunks;
        if (entry < count)
            copy_chunk(updates[entry].chunks[chunk], entries.update(entry, 0), first_row + chunk * kChunk,
                       kV - first_row - chunk * kChunk);
    }
}

// Where a block's row is among the rows in shared memory: those of one lane lie side by side.
__device__ __forceinline__ int place_of(int row) {
    constexpr int kOwn = kLaneRows * kWarpRows;
    return row / kOwn * kOwn + row % kWarpRows * kLaneRows + row % kOwn / kWarpRows;
}

// Updates times what is left of them, which lane j of every warp brings for entry j. A warp does its own rows.
__device__ __forceinline__ void weigh(const SharedUpdates* updates, float left, int count, float (*weighted)[kRows]) {
    constexpr int kOwn = kLaneRows * kWarpRows;
    const int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * kOwn;
    for (int j = 0; j < count; ++j) {
        const float scale = __shfl_sync(0xffffffffu, left, j);
        for (int i = lane; i < kOwn; i += 32) weighted[j][place_of(begin + i)] = scale * updates[j].get(begin + i);
    }
    __syncwarp();
}

// A key as an entry has it, in the states' type. Where that has no room for it as it is, its direction is stored.
struct StoredKey {
    static constexpr bool kExact = kState == kFloat32 || kState == kQkv;

    static __device__ __forceinline__ float scale(float k_scale) { return kExact ? k_scale : 1.f; }
    static __device__ __forceinline__ void store(char* to, int part, const float (&k)[LaneToken::kCount],
                                                 float k_scale) {
        float x[LaneToken::kCount];
#pragma unroll
        for (int i = 0; i < LaneToken::kCount; ++i) x[i] = kExact ? k[i] : k[i] * k_scale;
        Part stored;
        stored.set(x);
        stored.store(to, part);
    }
};

// Where a state of layout "kv" changes from columns side by side, as it lies in memory, to the rows of a StateTile.
struct Exchange {
    static constexpr int kStride = kRows + kChunk, kCopies = ceil_div(kK * (kRows / kChunk), kThreads);
    static_assert(kVk || kRows % kChunk == 0);

    static __device__ __forceinline__ int k(int i) { return (threadIdx.x + i * kThreads) / (kRows / kChunk); }
    static __device__ __forceinline__ int column(int i) {
        return (threadIdx.x + i * kThreads) % (kRows / kChunk) * kChunk;
    }
    static __device__ __forceinline__ uint4* chunk(int i) {
        return reinterpret_cast<uint4*>(at(ptx::dynamic_shared(), kState, k(i) * kStride + column(i)));
    }
    static __device__ __forceinline__ int valid(int i, int first_row) {
        return k(i) < kK ? kV - first_row - column(i) : 0;
    }
    static __device__ __forceinline__ i64 offset(int i, int first_row) {
        return i64{k(i)} * kV + first_row + column(i);
    }
};

// The part of a state that a thread holds in registers.
struct StateTile {
    StateChunk chunks[kLaneRows][kChunks];
    int part, row;  // this lane's share of a row, and its first row in the block

    __device__ __forceinline__ StateTile()
        : part(threadIdx.x % kLanes), row(threadIdx.x / 32 * (kLaneRows * kWarpRows) + threadIdx.x % 32 / kLanes) {}

    // The row in the block whose sums this lane ends up with, and whether it is the one to write them.
    __device__ __forceinline__ int own() const { return row + part / kSharers * kWarpRows; }
    __device__ __forceinline__ bool writes(int first_row) const {
        return part % kSharers == 0 && (kV % kRows == 0 || first_row + own() < kV);
    }
    __device__ __forceinline__ int valid(int r, int j, int first_row) const {
        return kV % kRows == 0 || first_row + row + r * kWarpRows < kV ? Part::valid(j, part) : 0;
    }
    __device__ __forceinline__ i64 offset(int r, int j, int first_row) const {
        return (i64{first_row} + row + r * kWarpRows) * kK + Part::first(j, part);
    }

    // Issues the loads of a head's state; `open` ends them.
    __device__ __forceinline__ void load(const char* state, int first_row) {
        if constexpr (kVk) {
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j)
                    chunks[r][j].load(at(state, kState, offset(r, j, first_row)), valid(r, j, first_row));
        } else {
            u32 copies[Exchange::kCopies][kWords];
#pragma unroll
            for (int i = 0; i < Exchange::kCopies; ++i)
                load_chunk<kState, kChunk, kAlignedStates, Cache::kStreaming>(state, Exchange::offset(i, first_row),
                                                                              Exchange::valid(i, first_row), copies[i]);
#pragma unroll
            for (int i = 0; i < Exchange::kCopies; ++i)
                if (Exchange::k(i) < kK)
                    *Exchange::chunk(i) = make_uint4(copies[i][0], copies[i][1], copies[i][2], copies[i][3]);
            __syncthreads();
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j) {
                    float x[kChunk];
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) {
                        const int k = Part::first(j, part) + i;
                        x[i] =
                            k < kK ? value_of(kState, load_shared(k * Exchange::kStride + row + r * kWarpRows)) : 0.f;
                    }
                    chunks[r][j].set(x);
                }
        }
    }
    __device__ __forceinline__ void open() {
        if constexpr (kVk) {
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j) chunks[r][j].open();
        }
    }
    __device__ __forceinline__ void store(char* state, int first_row) {
        if constexpr (kVk) {
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j)
                    chunks[r][j].store(at(state, kState, offset(r, j, first_row)), valid(r, j, first_row));
        } else {
            __syncthreads();
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j) {
                    float x[kChunk];
                    chunks[r][j].get(x);
#pragma unroll
                    for (int i = 0; i < kChunk; ++i)
                        if (Part::first(j, part) + i < kK)
                            gdr::store<kState>(ptx::dynamic_shared(),
                                               (Part::first(j, part) + i) * Exchange::kStride + row + r * kWarpRows,
                                               x[i]);
                }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < Exchange::kCopies; ++i) {
                uint4 four = make_uint4(0, 0, 0, 0);
                if (Exchange::k(i) < kK) four = *Exchange::chunk(i);
                u32 words[kWords] = {four.x, four.y, four.z, four.w};
                store_chunk<kState, kChunk, kAlignedStates>(state, Exchange::offset(i, first_row),
                                                            Exchange::valid(i, first_row), words);
            }
        }
    }

    // h = decay h + k (scaled_u)^T + sum_j keys_j updates_j^T, updates by place_of(row); the lane brings what belongs to
    // its own row.
    __device__ __forceinline__ void fold(float decay, const SharedKey* keys, const float (*updates)[kRows], int count,
                                         const float (&k)[LaneToken::kCount], float scaled_u) {
        const int lane = threadIdx.x % 32, place = place_of(row);
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
            float h[kLaneRows][kChunk];
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) {
                const float row_u = __shfl_sync(0xffffffffu, scaled_u, lane - part + r * kSharers);
                chunks[r][j].get(h[r]);
#pragma unroll
                for (int i = 0; i < kChunk; ++i) h[r][i] = fmaf(k[j * kChunk + i], row_u, decay * h[r][i]);
            }
#pragma unroll 2
            for (int e = 0; e < count; ++e) {
                float key[kChunk];
                keys[e].get_chunk(j, part, key);
                float own[kLaneRows];
                take_row(&updates[e][place], own);
#pragma unroll
                for (int r = 0; r < kLaneRows; ++r) {
                    const float u = own[r];
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) h[r][i] = fmaf(key[i], u, h[r][i]);
                }
            }
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) chunks[r][j].set(h[r]);
        }
    }

  private:
    static __device__ __forceinline__ void take_row(const float* from, float (&x)[kLaneRows]) {
        if constexpr (kLaneRows % 4 == 0) {
#pragma unroll
            for (int i = 0; i < kLaneRows; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(from + i);
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) x[i] = from[i];
        }
    }
    static __device__ __forceinline__ u32 load_shared(int index) {
        if constexpr (kState == kFloat32) return reinterpret_cast<const u32*>(ptx::dynamic_shared())[index];
        else return reinterpret_cast<const u16*>(ptx::dynamic_shared())[index];
    }
};

// Fetches into L2 what a block will read of the slot that its sequence will most likely have, and of its tokens, while
// kernels ahead may still run: what is read here decides nothing but that. The state, which takes longest, comes first.
__device__ __forceinline__ void prefetch(const RingParams& p, const Block<kBlocks>& block) {
    constexpr int kLine = 128;  // bytes of a line of L2
    const int thread = threadIdx.x, first_row = block.slice * kRows, rows = min(kRows, kV - first_row);
    i64 slot = block.n;
    if constexpr (kInitialSlots != 0)  // of an index of 8 bytes the lower half is the whole of what is in bounds
        slot = ptx::peek4(p.call.initial_slots + i64{block.n} * kInitialSlots);
    if (slot < p.call.initial_rows) {
        const char* const state =
            p.call.initial_state + slot * p.call.initial_strides.slot + block.hv * p.call.initial_strides.head;
        const Entries entries(p.ring, slot, 0, block.h, block.hv);
        if constexpr (kAlignedStates) {
            if (kVk && thread == 0)
                ptx::prefetch_bulk(state + i64{first_row} * kK * bytes_of(kState), rows * kK * bytes_of(kState));
            if (thread == 0) ptx::prefetch_bulk(entries.keys, kEntries * kK * bytes_of(kState));
            if (thread < kEntries) ptx::prefetch_bulk(entries.update(thread, first_row), rows * bytes_of(kState));
        }
        if (thread == 0) {
            ptx::prefetch(p.ring.fills + slot * 2);
            ptx::prefetch(entries.gates);
            ptx::prefetch(entries.key_scales);
        }
    }

    const Span span = find_span(p.call, block.n);
    const int T = span.length;
    constexpr int kLines = ceil_div(kK * bytes_of(kQkv), kLine), kValueLines = ceil_div(kRows * bytes_of(kQkv), kLine);
    for (int i = thread; i < T * kLines; i += kThreads) {
        ptx::prefetch(row_of(p.call.k, p.call.k_strides, span, i / kLines, block.h) + i % kLines * kLine);
        ptx::prefetch(row_of(p.call.q, p.call.q_strides, span, i / kLines, block.h) + i % kLines * kLine);
    }
    for (int i = thread; i < T * kValueLines; i += kThreads) {
        const int row = i % kValueLines * (kLine / bytes_of(kQkv));
        if (row < rows)
            ptx::prefetch(
                at(row_of(p.call.v, p.call.v_strides, span, i / kValueLines, block.hv), kQkv, first_row + row));
    }
    if (thread < T) {
        ptx::prefetch(row_of(p.call.a, p.call.a_strides, span, thread, block.hv));
        ptx::prefetch(row_of(p.call.b, p.call.b_strides, span, thread, block.hv));
    }
}

// Waits for the kernels ahead, and lets the one behind start. Where a kernel leaves room for others, that is when it runs
// itself: else the blocks of a whole row of kernels would wait on the multiprocessors, and when one of these kernels came
// to run, several of its blocks would share a multiprocessor.
__device__ __forceinline__ void take_turn(const RingParams& p, const Block<kBlocks>& block) {
    if constexpr (kPrefetches) prefetch(p, block);
    else ptx::let_kernel_behind_start();
    ptx::wait_for_kernels_ahead();
    if constexpr (kPrefetches) ptx::let_kernel_behind_start();
}

}  // namespace gdr
