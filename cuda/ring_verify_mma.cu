// Drafts of each sequence of a pool with deferred write-back, on tensor cores: ring_verify says what is worked out. For
// tokens of 16 bits and states [slots, HV, V, K] of the same type or of float32.
// requires: sm_80
// options: -fmad=false
// launch: dependent
//
// A warp owns rows (value columns) of the state, in registers from their one read to the fold, if there is one. What does
// not depend on rows is worked out once a block, while the state and the entries are on their way: the first warp
// multiplies the drafts with one another, the second finds their decays, the third what is left of the entries.
//
// Eight drafts are the rows of a left operand: their keys, then their queries. The state's rows are the columns of the
// right operand, eight at a time, and where a lane's share of K lies is free as long as it is the same in both: 16 bytes
// side by side, as they are loaded. Lane 4 g + t then has the products of draft g's key and query with some neighbouring
// rows. What an operand of the next product takes from the last one's result is in the same lane already, for which rows
// and entries lie in an order that suits.
//
// Numbers of 16 bits are multiplied as they are; a float32 number is the sum of two of 11 bits each, which loses what
// float32 would round away.
//
// How many rows a block takes may depend on the batch: the sums are the same for every choice.
//
//   GDR_DRAFTS           most tokens of a sequence: 8 or 16
//   GDR_ALIGNED_VALUES   as GDR_ALIGNED_TOKENS, of v and out
#include "gdr/mma.cuh"
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

constexpr int kDrafts = GDR_DRAFTS, kGroups = kDrafts / 8;
constexpr bool kNarrow = kState != kFloat32, kAlignedValues = GDR_ALIGNED_VALUES;
constexpr int kLaneElements = kChunk;                     // neighbours in a row, in 16 bytes
constexpr int kLaneChunks = kK / (4 * kLaneElements);     // of them in a row
constexpr int kTiles = kRows / (8 * kWarps);              // of eight rows, of a warp
constexpr int kOwn = 2 * kTiles;                          // neighbouring rows whose products a lane has
constexpr int kTokenStride = kK * 2 + 8 * kLaneElements;  // bytes; lanes read different banks
static_assert(kK % 32 == 0 && kV % 16 == 0 && kEntries == 16 && kVk && kWarps == 4 && (kTiles == 1 || kTiles == 2));
static_assert(kQkv != kFloat32 && (!kNarrow || kState == kQkv) && StoredKey::kExact);

using Narrow = Operand<kQkv == kBFloat16>;

struct Shared {
    alignas(16) char tokens[2 * kDrafts][kTokenStride];  // keys, then queries
    alignas(16) u16 values[kDrafts][kRows + 8];
    SharedKey keys[kEntries];
    SharedUpdates updates[kEntries];
    // Products of entries' keys with drafts, by halves of K and eights of entries, as lanes have them.
    float4 products[2][2][kGroups][32];
    // Of draft s (first index) in what draft i reads, with its key and with its query: products, then coefficients.
    float2 coefficients[kDrafts][kDrafts];
    float after[kDrafts][kDrafts];  // what is left of draft s after draft i; -1: it is not on its path
    float k_scale[kDrafts], q_scale[kDrafts], decay[kDrafts], beta[kDrafts];
    float left[kEntries], state_decay;
    bool last;
};

// c += a b with both of float32: 16 rows, 8 of K.
__device__ __forceinline__ void multiply_split(float (&c)[4], const Split (&a)[4], const Split& b0, const Split& b1) {
    const u32 high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const u32 low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    mma_tf32(c, high, b0.high, b1.high);
    mma_tf32(c, high, b0.low, b1.low);
    mma_tf32(c, low, b0.high, b1.high);
}

// Eight drafts as the left operand, for one chunk of a lane's part of K: key g, then query g.
struct DraftChunk {
    static constexpr int kTokenWords = kLaneElements / 2;
    u32 words[2][kTokenWords];

    __device__ __forceinline__ DraftChunk(const Shared& shared, int group, int j, int g, int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const char* const from = shared.tokens[i * kDrafts + group * 8 + g] + (4 * j + t) * kLaneElements * 2;
            if constexpr (kNarrow) {
                const uint4 four = *reinterpret_cast<const uint4*>(from);
                words[i][0] = four.x, words[i][1] = four.y;
                words[i][kTokenWords - 2] = four.z, words[i][kTokenWords - 1] = four.w;
            } else {
                const uint2 two = *reinterpret_cast<const uint2*>(from);
                words[i][0] = two.x, words[i][1] = two.y;
            }
        }
    }
    // With rows of 16-bit tokens: 16 of K at a time.
    __device__ __forceinline__ void multiply_tokens(float (&c)[4], const u32* b) const {
#pragma unroll
        for (int i = 0; i < kTokenWords; i += 2) {
            const u32 a[4] = {words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]};
            Narrow::mma(c, a, b[i], b[i + 1]);
        }
    }
    // With rows of the states' type; two sums that depend on one another less than one would.
    __device__ __forceinline__ void multiply(float (&c)[2][4], const u32 (&b)[4]) const {
        if constexpr (kNarrow) {
            multiply_tokens(c[0], b);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float key[2], query[2];
                unpack<kQkv>(&words[0][i], key);
                unpack<kQkv>(&words[1][i], query);
                const u32 a[4] = {__float_as_uint(key[0]), __float_as_uint(query[0]), __float_as_uint(key[1]),
                                  __float_as_uint(query[1])};
                const Split b0(__uint_as_float(b[2 * i])), b1(__uint_as_float(b[2 * i + 1]));
                mma_tf32(c[0], a, b0.high, b1.high);
                mma_tf32(c[1], a, b0.low, b1.low);
            }
        }
    }
};

// Starts to copy eight elements of a token, of which `valid` exist, to shared memory.
template <bool kAligned>
__device__ __forceinline__ void copy_token_chunk(void* to, const char* row, int first, int valid) {
    if constexpr (kAligned) {
        ptx::copy16(to, at(row, kQkv, first), valid > 0);
    } else {
        u32 four[4];
        load_chunk<kQkv, 8, false>(row, first, valid, four);
        *reinterpret_cast<uint4*>(to) = make_uint4(four[0], four[1], four[2], four[3]);
    }
}

// Stores a lane's neighbouring rows.
template <int kType, bool kAligned>
__device__ __forceinline__ void store_rows(char* to, int first, const float (&x)[kOwn]) {
    constexpr int kWords = words_of(kType, kOwn);
    u32 words[kWords];
    pack<kType>(x, words);
    if constexpr (!kAligned) store_chunk<kType, kOwn, false>(to, first, kOwn, words);
    else if constexpr (kWords == 4)
        *reinterpret_cast<uint4*>(at(to, kType, first)) = make_uint4(words[0], words[1], words[2], words[3]);
    else if constexpr (kWords == 2) *reinterpret_cast<uint2*>(at(to, kType, first)) = make_uint2(words[0], words[1]);
    else *reinterpret_cast<u32*>(at(to, kType, first)) = words[0];
}

template <class T>
__device__ __forceinline__ T from_lane(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

// What lanes 4 (i % 8) + t have of draft i, in every lane.
template <class T>
__device__ __forceinline__ T of_draft(const T (&x)[kGroups], int i) {
    T y = from_lane(x[0], i % 8 * 4);
    if constexpr (kGroups == 2) {
        const T second = from_lane(x[1], i % 8 * 4);
        if (i >= 8) y = second;
    }
    return y;
}

// The products of the drafts with one another, and what normalises them, by one warp.
__device__ __forceinline__ void multiply_drafts(const Params& p, Shared& shared, int g, int t) {
    float gram[kGroups][kGroups][4] = {}, queries[kGroups][4] = {};
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j) {
        const DraftChunk first(shared, 0, j, g, t), second(shared, kGroups - 1, j, g, t);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const DraftChunk& own = i ? second : first;
            own.multiply_tokens(gram[i][0], first.words[0]);
            if (i) own.multiply_tokens(gram[i][kGroups - 1], second.words[0]);
            own.multiply_tokens(queries[i], own.words[1]);
        }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int s = 0; s <= i; ++s)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                shared.coefficients[s * 8 + 2 * t + x][i * 8 + g] = make_float2(gram[i][s][x], gram[i][s][2 + x]);
        // The norms are on the diagonal: row g, column 2 t + g % 2.
        const float kk = g % 2 ? gram[i][i][1] : gram[i][i][0], qq = g % 2 ? queries[i][3] : queries[i][2];
        if (t == g / 2) {
            shared.k_scale[i * 8 + g] = kL2Norm ? rsqrtf(kk + 1e-6f) : 1.f;
            shared.q_scale[i * 8 + g] = (kL2Norm ? rsqrtf(qq + 1e-6f) : 1.f) * p.scale;
        }
    }
}

// The gates of drafts and where they are in their tree, by one warp: lane 4 g + t has those of drafts g and g + 8.
struct DraftGates {
    GateBits bits[kGroups];
    int parent[kGroups];
    float log_decay[kGroups];

    __device__ __forceinline__ void load(const RingParams& p, const Span& span, const Block<kBlocks>& block, int T,
                                         int g) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int draft = min(i * 8 + g, T - 1);
            bits[i].load(p.call, span, draft, block.hv);
            parent[i] = parent_of(p.ring, block.n, T, draft);
        }
    }

    // The drafts on the path to each, it among them; a bit each.
    __device__ __forceinline__ void find_paths(bool chain, int T, int g, u32 (&path)[kGroups]) const {
        int up[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            path[i] = i * 8 + g >= T ? 0 : chain ? (2u << (i * 8 + g)) - 1 : 1u << (i * 8 + g);
            up[i] = parent[i];
        }
        if (chain) return;
#pragma unroll
        for (int steps = 1; steps < kDrafts; steps *= 2) {
            u32 above[kGroups];
            int next[kGroups];
#pragma unroll
            for (int i = 0; i < kGroups; ++i) above[i] = of_draft(path, up[i] & 15), next[i] = of_draft(up, up[i] & 15);
#pragma unroll
            for (int i = 0; i < kGroups; ++i)
                if (up[i] >= 0) path[i] |= above[i], up[i] = next[i];
        }
    }

    __device__ __forceinline__ void open(const RingParams& p, int T, int g, int t, Shared& shared) {
        u32 path[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) log_decay[i] = i * 8 + g < T ? log_decay_of(p.call, bits[i]) : 0.f;
        find_paths(p.ring.parents == nullptr, T, g, path);
        float total[kGroups] = {}, after[kGroups][kGroups][2] = {};
#pragma unroll
        for (int j = 0; j < kDrafts; ++j) {
            if (j >= T) break;
            const float log = from_lane(log_decay[j / 8], j % 8 * 4);
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                if (!(path[i] >> j & 1)) continue;
                total[i] += log;
#pragma unroll
                for (int s = 0; s <= i; ++s)
#pragma unroll
                    for (int x = 0; x < 2; ++x)
                        if (j > s * 8 + 2 * t + x) after[i][s][x] += log;
            }
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
            for (int s = 0; s <= i; ++s)
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    const int draft = s * 8 + 2 * t + x;
                    shared.after[draft][i * 8 + g] = path[i] >> draft & 1 ? exp_unbiased(after[i][s][x]) : -1.f;
                }
            if (t == 0) {
                shared.decay[i * 8 + g] = exp_unbiased(total[i]);
                shared.beta[i * 8 + g] = bits[i].beta(p.call);
            }
        }
    }
};

// Makes coefficients of the products of drafts s and i.
__device__ __forceinline__ void make_coefficients(Shared& shared, int s, int i) {
    // What is not on its path does not touch a draft, not even as 0 times NaN.
    const float after = shared.after[s][i], scale = after * shared.k_scale[s];
    const float2 product = shared.coefficients[s][i];
    shared.coefficients[s][i] = make_float2(after >= 0.f && s != i ? scale * shared.k_scale[i] * product.x : 0.f,
                                            after >= 0.f ? scale * shared.q_scale[i] * product.y : 0.f);
}

// A lane's rows of the state in one load each: row kTiles g + m of its warp's.
struct StateRows {
    u32 words[kLaneChunks][kTiles][4];

    static __device__ __forceinline__ i64 offset(i64 row, int m, int j, int g, int t) {
        return (row + kTiles * g + m) * kK + (4 * j + t) * kLaneElements;
    }
    __device__ __forceinline__ void load(const char* state, i64 row, bool exists, int g, int t) {
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j)
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
                load_chunk<kState, kLaneElements, kAlignedStates, Cache::kStreaming>(
                    state, offset(row, m, j, g, t), exists ? kLaneElements : 0, words[j][m]);
    }
    __device__ __forceinline__ void store(char* state, i64 row, int j, int g, int t) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
            store_chunk<kState, kLaneElements, kAlignedStates>(state, offset(row, m, j, g, t), kLaneElements,
                                                               words[j][m]);
    }
};

// The updates of an entry in the lane's rows, times what is left of it.
__device__ __forceinline__ void get_updates(const Shared& shared, int entry, int row, float (&u)[kTiles]) {
    if constexpr (kTiles == 1) {
        u[0] = shared.updates[entry].get(row);
    } else if constexpr (kNarrow) {
        unpack<kState>(reinterpret_cast<const u32*>(shared.updates[entry].chunks) + row / 2, u);
    } else {
        const float2 two = *reinterpret_cast<const float2*>(at(shared.updates[entry].chunks, kState, row));
        u[0] = two.x, u[kTiles - 1] = two.y;
    }
}

// Adds the products of entries' keys with drafts times the entries' updates. Column 2 t + x of eight is entry 4 x + t.
__device__ __forceinline__ void add_entries(float (&sums)[kGroups][kTiles][4], const Shared& shared, int pending,
                                            int row, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
        if (8 * eight >= pending) break;
        float u[2][kTiles], left[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            get_updates(shared, 8 * eight + 4 * i + t, row, u[i]);
            left[i] = shared.left[8 * eight + 4 * i + t];
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const float4 first = shared.products[0][eight][i][lane], second = shared.products[1][eight][i][lane];
            const Split a[4] = {Split((first.x + second.x) * left[0]), Split((first.z + second.z) * left[0]),
                                Split((first.y + second.y) * left[1]), Split((first.w + second.w) * left[1])};
#pragma unroll
            for (int m = 0; m < kTiles; ++m) multiply_split(sums[i][m], a, Split(u[0][m]), Split(u[1][m]));
        }
    }
}

// The pending entries' part of a folded state.
struct Folded {
    Split updates[kNarrow ? 1 : 2][4];  // times what is left of them; 16-bit states: two parts of 16 bits

    __device__ __forceinline__ Folded(const Shared& shared, int row, int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (kNarrow) {
                float u[2][kTiles], y[2];
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    const int entry = 8 * i + 2 * t + b;
                    get_updates(shared, entry, row, u[b]);
#pragma unroll
                    for (int m = 0; m < kTiles; ++m) u[b][m] *= shared.left[entry];
                }
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    Split& two = updates[0][2 * i + m];
                    two.high = Narrow::pack(u[0][m], u[1][m]);
                    unpack<kQkv>(&two.high, y);
                    two.low = Narrow::pack(u[0][m] - y[0], u[1][m] - y[1]);
                }
            } else {
#pragma unroll
                for (int eight = 0; eight < 2; ++eight) {
                    const int entry = 8 * eight + 4 * i + t;
                    float u[kTiles];
                    get_updates(shared, entry, row, u);
#pragma unroll
                    for (int m = 0; m < kTiles; ++m) updates[eight][2 * i + m] = Split(u[m] * shared.left[entry]);
                }
            }
        }
    }

    // h = decay h + keys^T updates, for chunk j.
    __device__ __forceinline__ void fold(float (&h)[kTiles][kLaneElements], const Shared& shared, float decay,
                                         int pending, int j, int g, int t) const {
        if constexpr (kNarrow) {
            const u32 high[4] = {updates[0][0].high, updates[0][1].high, updates[0][2].high, updates[0][3].high};
            const u32 low[4] = {updates[0][0].low, updates[0][1].low, updates[0][2].low, updates[0][3].low};
            // Column n of eight is element 8 (n / 2) + n % 2 of the row, and two more for each x: lane t gets its own.
#pragma unroll
            for (int x = 0; x < kLaneElements; x += 2) {
                const auto key = [&](int entry) {
                    return reinterpret_cast<const u16*>(shared.keys[entry].chunks[4 * j + g / 2])[x + g % 2];
                };
                float sums[4] = {};
#pragma unroll
                for (int i = 0; i < kOwn; ++i) sums[i] = decay * h[i / 2][x + i % 2];
                const u32 b0 = key(2 * t) | u32{key(2 * t + 1)} << 16, b1 = key(2 * t + 8) | u32{key(2 * t + 9)} << 16;
                Narrow::mma(sums, high, b0, b1);
                Narrow::mma(sums, low, b0, b1);
#pragma unroll
                for (int i = 0; i < kOwn; ++i) h[i / 2][x + i % 2] = sums[i];
            }
        } else {
            // Column n of the y-th eight is element 2 n + y. The entries are added up first: a state that products were
            // added to would not be rounded to nearest.
            float sums[2][4] = {};
#pragma unroll
            for (int eight = 0; eight < 2; ++eight) {
                if (8 * eight >= pending) break;
                const auto key = [&](int entry) {
                    return *reinterpret_cast<const float2*>(&shared.keys[entry].chunks[4 * j + g / 2][g % 2 * 2]);
                };
                const float2 k0 = key(8 * eight + t), k1 = key(8 * eight + 4 + t);
                multiply_split(sums[0], updates[eight], Split(k0.x), Split(k1.x));
                multiply_split(sums[1], updates[eight], Split(k0.y), Split(k1.y));
            }
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x) h[m][x] = fmaf(decay, h[m][x], sums[x % 2][2 * m + x / 2]);
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS)
    ring_verify_mma(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = block.slice * kRows, own = warp * (8 * kTiles), row = first_row + own;
    const bool exists = kV % kRows == 0 || row < kV;
    take_turn(p, block);
    const Span span = find_span(p.call, block.n);
    const int T = static_cast<int>(span.length);

    // Every load is issued before anything waits for one.
    const Rows rows(p.call, block.n);
    DraftGates gates;
    if (warp == 1) gates.load(p, span, block, T, g);
    constexpr int kTokenChunks = kK / 8, kValueChunks = kRows / 8;
#pragma unroll
    for (int i = 0; i < ceil_div(2 * kDrafts * kTokenChunks, kThreads); ++i) {
        const int at = threadIdx.x + i * kThreads, column = at / kTokenChunks, chunk = at % kTokenChunks;
        if (at >= 2 * kDrafts * kTokenChunks) break;
        const int draft = column % kDrafts;
        const char* const from = column < kDrafts ? row_of(p.call.k, p.call.k_strides, span, draft, block.h)
                                                  : row_of(p.call.q, p.call.q_strides, span, draft, block.h);
        copy_token_chunk<kAlignedTokens>(shared.tokens[column] + chunk * 16, from, chunk * 8, draft < T ? 8 : 0);
    }
    static_assert(kDrafts * kValueChunks <= kThreads);
    if (threadIdx.x < kDrafts * kValueChunks) {
        const int draft = threadIdx.x / kValueChunks, column = threadIdx.x % kValueChunks * 8;
        copy_token_chunk<kAlignedValues>(&shared.values[draft][column],
                                         row_of(p.call.v, p.call.v_strides, span, draft, block.hv), first_row + column,
                                         draft < T ? kV - first_row - column : 0);
    }
    const Work work(p.call, rows, block.hv);
    if (work.padding) return write_zeros(p.call, span, block.hv, first_row, min(first_row + kRows, kV));
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    // The tokens are waited for before the state is asked for: a wait for copies is one for the loads before it, too.
    ptx::wait_copies();
    const Fill fill(ptx::load4(counts));
    StateRows state;
    state.load(work.read, row, exists, g, t);
    __syncthreads();
    if (warp == 0) multiply_drafts(p.call, shared, g, t);
    if (warp == 1) gates.open(p, T, g, t, shared);

    const int pending = fill.pending();
    const bool folds = pending + T > kEntries;
    const int base = folds ? 0 : pending;
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    constexpr int kKeyChunks = kK / kChunk, kUpdateChunks = kRows / kChunk;
#pragma unroll
    for (int i = 0; i < ceil_div(kEntries * kKeyChunks, kThreads); ++i) {
        const int at = threadIdx.x + i * kThreads, entry = at / kKeyChunks, chunk = at % kKeyChunks;
        if (at < kEntries * kKeyChunks)
            copy_chunk(shared.keys[entry].chunks[chunk], entries.key(entry), chunk * kChunk,
                       entry < pending ? kChunk : 0);
    }
#pragma unroll
    for (int i = 0; i < ceil_div(kEntries * kUpdateChunks, kThreads); ++i) {
        const int at = threadIdx.x + i * kThreads, entry = at / kUpdateChunks, chunk = at % kUpdateChunks;
        if (at < kEntries * kUpdateChunks)
            copy_chunk(shared.updates[entry].chunks[chunk], entries.update(entry, 0), first_row + chunk * kChunk,
                       entry < pending ? kV - first_row - chunk * kChunk : 0);
    }
    if (warp == 2) {
        Remains remains(entries, pending, lane);
        remains.scan(lane);
        if (lane < kEntries) shared.left[lane] = exp_unbiased(remains.log_entry) * remains.key_scale;
        if (lane == 0) shared.state_decay = exp_unbiased(remains.log_state);
    }
    if (warp == 1 && block.slice == 0 && t == 0) {
        // Where a fold puts the drafts' scalars nobody reads any.
        const Entries written(p.ring, slot, folds ? fill.half() ^ 1 : fill.half(), block.h, block.hv);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int draft = i * 8 + g;
            if (draft >= T) continue;
            written.gates[base + draft] = gates.log_decay[i];
            if (block.hv == 0)
                p.ring.draft_parents[slot * kMostDrafts + draft] = static_cast<signed char>(gates.parent[i]);
        }
    }

    float parts[kGroups][kTiles][2][4] = {};
#pragma unroll
    for (int j = 0; j < kLaneChunks; ++j)
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const DraftChunk chunk(shared, i, j, g, t);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) chunk.multiply(parts[i][m], state.words[j][m]);
        }
    ptx::wait_copies();
    __syncthreads();

    // Every thread of this block has the entries by now.
    u32 arrived = 0, read_keys = 0;
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counts + 1, 1u);
        if (folds) read_keys = atomicAdd(p.ring.arrivals + slot * p.ring.H + block.h, 1u);
    }
    const int eight = warp % 2, half = warp / 2;
    if (8 * eight < pending) {
        float products[kGroups][2][4] = {};
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j) {
            if (j % 2 != half) continue;
            const uint4 four =
                *reinterpret_cast<const uint4*>(shared.keys[8 * eight + g % 2 * 4 + g / 2].chunks[4 * j + t]);
            const u32 key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < kGroups; ++i) DraftChunk(shared, i, j, g, t).multiply(products[i], key);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const auto& x = products[i];
            shared.products[half][eight][i][lane] =
                make_float4(x[0][0] + x[1][0], x[0][1] + x[1][1], x[0][2] + x[1][2], x[0][3] + x[1][3]);
        }
    }
#pragma unroll
    for (int i = 0; i < ceil_div(kDrafts * kDrafts, kThreads); ++i) {
        const int s = (threadIdx.x + i * kThreads) / kDrafts, reader = threadIdx.x % kDrafts;
        if (s < kDrafts && s <= reader) make_coefficients(shared, s, reader);
    }
    __syncthreads();

    // From here on addresses are formed anew: they would take registers on the way.
    u32 same_slot = static_cast<u32>(slot);
    ptx::forget(same_slot);
    const Entries drafts(p.ring, same_slot, folds ? fill.half() ^ 1 : fill.half(), block.h, block.hv);
    const float state_decay = shared.state_decay;
    float sums[kGroups][kTiles][4], value[kGroups][kOwn], beta[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int x = 0; x < 4; ++x) sums[i][m][x] = state_decay * (parts[i][m][0][x] + parts[i][m][1][x]);
    add_entries(sums, shared, pending, own + kTiles * g, lane);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int draft = i * 8 + g;
        beta[i] = shared.beta[draft];
        unpack<kQkv>(reinterpret_cast<const u32*>(&shared.values[draft][own + kOwn * t]), value[i]);
        const float k_scale = shared.decay[draft] * shared.k_scale[draft];
        const float q_scale = shared.decay[draft] * shared.q_scale[draft];
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int x = 0; x < 4; ++x) sums[i][m][x] *= x < 2 ? k_scale : q_scale;
    }

    // Column 2 t + x of the m-th eight is row kOwn t + kTiles x + m.
    const auto update = [&](int i, int r) { return beta[i] * (value[i][r] - sums[i][r % kTiles][r / kTiles]); };
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            if (group * 8 + s >= T) break;
            float u[kOwn];
#pragma unroll
            for (int r = 0; r < kOwn; ++r) u[r] = from_lane(update(group, r), s * 4 + t);
#pragma unroll
            for (int i = group; i < kGroups; ++i) {
                const float2 c = shared.coefficients[group * 8 + s][i * 8 + g];
#pragma unroll
                for (int r = 0; r < kOwn; ++r) {
                    float (&sum)[4] = sums[i][r % kTiles];
                    if (i * 8 + g > group * 8 + s && c.x != 0.f) sum[r / kTiles] = fmaf(c.x, u[r], sum[r / kTiles]);
                    if (i * 8 + g >= group * 8 + s && c.y != 0.f)
                        sum[2 + r / kTiles] = fmaf(c.y, u[r], sum[2 + r / kTiles]);
                }
            }
        }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int draft = i * 8 + g;
        if (draft >= T || !exists) continue;
        float u[kOwn], o[kOwn];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) u[r] = update(i, r), o[r] = sums[i][r % kTiles][2 + r / kTiles];
        store_rows<kState, true>(drafts.update(base + draft, 0), row + kOwn * t, u);
        store_rows<kQkv, kAlignedValues>(row_of(p.call.out, p.call.out_strides, span, draft, block.hv), row + kOwn * t,
                                         o);
    }

    if (folds && exists) {
        const Folded folded(shared, own + kTiles * g, t);
        char* const write =
            p.call.final_state + same_slot * p.call.initial_strides.slot + block.hv * p.call.initial_strides.head;
#pragma unroll
        for (int j = 0; j < kLaneChunks; ++j) {
            float h[kTiles][kLaneElements];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                for (u32& word : state.words[j][m]) ptx::forget(word);
                unpack<kState>(state.words[j][m], h[m]);
            }
            folded.fold(h, shared, state_decay, pending, j, g, t);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) pack<kState>(h[m], state.words[j][m]);
            state.store(write, row, j, g, t);
        }
    }

    // Keys that others may still read are replaced by who knows that all have been read.
    bool writes_keys = block.slice == 0 && block.hv % p.call.group == 0;
    if (folds) {
        if (threadIdx.x == 0) {
            shared.last = read_keys == gridDim.x - 1;
            if (shared.last) p.ring.arrivals[i64{same_slot} * p.ring.H + block.h] = 0;
        }
        __syncthreads();
        writes_keys = shared.last;
    }
    if (writes_keys) {
        for (int at = threadIdx.x; at < T * kKeyChunks; at += kThreads) {
            const int draft = at / kKeyChunks, chunk = at % kKeyChunks;
            float key[kChunk];
            u32 words[4];
            unpack<kQkv>(reinterpret_cast<const u32*>(shared.tokens[draft] + chunk * kChunk * 2), key);
            pack<kState>(key, words);
            *reinterpret_cast<uint4*>(drafts.key(base + draft) + chunk * 16) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
        if (threadIdx.x < T) drafts.key_scales[base + threadIdx.x] = StoredKey::scale(shared.k_scale[threadIdx.x]);
    }
    if (threadIdx.x == 0 && arrived == gridDim.x * gridDim.y - 1) {
        u32* const counts = p.ring.fills + i64{same_slot} * 2;
        counts[1] = 0;
        counts[0] = Fill(base, folds ? p.ring.capacity : fill.limit(), T, folds ? fill.half() ^ 1 : fill.half()).word;
    }
}
