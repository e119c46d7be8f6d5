// Several tokens of each sequence of a pool with deferred write-back, as drafts: the state is read once and they become
// entries that a commit may keep. Drafts form a tree; a draft sees the pending entries and the drafts on its path.
// options: -fmad=false
// launch: dependent
//
// With h the state with all pending entries, and D_t the decay along the path to draft t:
//     u_t = beta_t (v_t - D_t h^T k_t - sum_s D_st (k_s . k_t) u_s)      over the drafts s before t on its path
//     o_t = D_t h^T q_t + sum_s D_st (k_s . q_t) u_s                     over these and t itself
//     h^T x = d h_0^T x + sum_j w_j (k_j . x) u_j                        over the pending entries
// Where there is no room for the drafts beside the pending entries, these are folded into the state; the last block of a
// key head to read its keys then writes the drafts' in their place.
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

constexpr int kMost = kMostDrafts;
constexpr int kDots = kLanes < 8 ? kLanes : 8;  // products with keys that lanes of a row form at once
constexpr int kTokenPasses = ceil_div(kMost, kAtOnce);
constexpr int kValues = ceil_div(kMost * kRows, kThreads);  // that a thread carries
static_assert(kEntries % kDots == 0 && kMost % kDots == 0 && kEntries >= kMost);

struct Draft {
    float decay, beta, k_scale, q_scale, from_u, log_decay;
    int parent;
};

struct Shared {
    SharedKey keys[kEntries];
    SharedUpdates updates[kEntries];
    // By place_of:
    alignas(
        16) float weighted[kEntries + kMost]
                          [kRows];  // updates of entries, times what is left of them; values, then updates of drafts
    float left[kEntries], log_state;
    Draft drafts[kMost];
    bool last;
};

// What depends on the number of drafts, in dynamic shared memory.
struct Drafts {
    SharedVector *k, *q;
    float2 (*products)[kRows];                 // of the block's rows with k and q, by draft
    float2 (*coefficients)[kEntries + kMost];  // of updates of entries and drafts, in what a draft reads

    __device__ __forceinline__ explicit Drafts(int count) {
        constexpr int kExchange = kVk ? 0 : kK * Exchange::kStride * bytes_of(kState);
        char* next = ptx::dynamic_shared() + kExchange;
        k = reinterpret_cast<SharedVector*>(next), next += count * sizeof(SharedVector);
        q = reinterpret_cast<SharedVector*>(next), next += count * sizeof(SharedVector);
        products = reinterpret_cast<float2(*)[kRows]>(next), next += count * sizeof(float2[kRows]);
        coefficients = reinterpret_cast<float2(*)[kEntries + kMost]>(next);
    }
};

// The sum of log decays from after draft s (-1: from the beginning) through draft t; false where s is not on t's path.
__device__ __forceinline__ bool path_decay(const Draft* drafts, int s, int t, float& sum) {
    sum = 0.f;
    for (; t > s; t = drafts[t].parent) sum += drafts[t].log_decay;
    return t == s;
}

// Products of keys, of entries and drafts, with k and q of drafts; lanes of a row take kDots keys and a draft at a time.
__device__ __forceinline__ void multiply_keys(const Shared& shared, const Drafts& at, int pending, int T, int part) {
    const int lane = threadIdx.x % 32, entry_blocks = ceil_div(pending, kDots);
    const int tasks = (entry_blocks + ceil_div(T, kDots)) * T;
    for (int first = threadIdx.x / 32 * kWarpRows; first < tasks; first += kAtOnce) {
        const int task = min(first + lane / kLanes, tasks - 1), t = task % T, keys = task / T;
        LaneToken token;
        take(at.k[t], part, token.k);
        take(at.q[t], part, token.q);
        float with_k[kDots], with_q[kDots];
#pragma unroll
        for (int i = 0; i < kDots; ++i) {
            const int entry = keys * kDots + i, draft = (keys - entry_blocks) * kDots + i;
            float key[LaneToken::kCount] = {};
            if (keys < entry_blocks) {
                if (entry < pending) shared.keys[entry].get(part, key);
            } else if (draft < T) {
                take(at.k[draft], part, key);
            }
            with_k[i] = with_q[i] = 0.f;
#pragma unroll
            for (int x = 0; x < LaneToken::kCount; ++x) {
                with_k[i] = fmaf(key[x], token.k[x], with_k[i]);
                with_q[i] = fmaf(key[x], token.q[x], with_q[i]);
            }
        }
        const int own = sum_transposed<kDots, kLanes / 2, 1>(with_k, lane);
        sum_transposed<kDots, kLanes / 2, 1>(with_q, lane);
        if (first + lane / kLanes >= tasks || part % (kLanes / kDots) != 0) continue;
        if (keys < entry_blocks) {
            at.coefficients[t][keys * kDots + own] = make_float2(with_k[0], with_q[0]);
        } else {
            const int s = (keys - entry_blocks) * kDots + own;
            float sum;
            if (s > t) continue;
            // What is not on its path does not touch a draft, not even as 0 times NaN.
            float2 coefficients = make_float2(0.f, 0.f);
            if (path_decay(shared.drafts, s, t, sum)) {
                const float left = exp_unbiased(sum) * shared.drafts[s].k_scale;
                coefficients = make_float2(left * shared.drafts[t].k_scale * with_k[0],
                                           left * shared.drafts[t].q_scale * with_q[0]);
            }
            at.coefficients[t][kEntries + s] = coefficients;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS)
    ring_verify(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = block.slice * kRows;
    const Span span = find_span(p.call, block.n);
    const int T = span.length;
    const Drafts at(T);
    StateTile tile;
    const int own = tile.own(), place = place_of(own);

    take_turn(p, block);
    const Rows rows(p.call, block.n);
    LaneToken::Words words[kTokenPasses];
    GateBits gates[kTokenPasses];
    u32 values[kValues];
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
        if (i * kAtOnce + warp * kWarpRows >= T) continue;
        // Lanes without a draft of their own take the last one: all are needed for the sums.
        const int t = min(entry_of(i), T - 1);
        words[i].load(p.call, span, t, block.h, tile.part);
        gates[i].load(p.call, span, t, block.hv);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        const int t = (threadIdx.x + i * kThreads) / kRows, column = first_row + (threadIdx.x + i * kThreads) % kRows;
        if (t < T && column < kV)
            values[i] = load_bits(kQkv, row_of(p.call.v, p.call.v_strides, span, t, block.hv), column);
    }
    const Work work(p.call, rows, block.hv);
    if (work.padding) return write_zeros(p.call, span, block.hv, first_row, min(first_row + kRows, kV));
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    const Fill fill(ptx::load4(counts));
    if constexpr (kVk) tile.load(work.read, first_row);

    const int pending = fill.pending();
    const bool folds = pending + T > kEntries;
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    copy_keys(entries, pending, shared.keys);
    copy_updates(entries, pending, first_row, shared.updates);
    Remains remains(entries, pending, lane);
    if constexpr (!kVk) tile.load(work.read, first_row);

#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
        if (i * kAtOnce + warp * kWarpRows >= T) continue;
        const LaneToken token(words[i]);
        const Scalars s = token.scalars(p.call.scale, 1.f, gates[i].beta(p.call));
        const int t = entry_of(i);
        if (t >= T) continue;
        put(at.k[t], tile.part, token.k);
        put(at.q[t], tile.part, token.q);
        if (tile.part == 0)
            shared.drafts[t] = {0.f,
                                s.beta,
                                s.k_scale,
                                s.from_q,
                                s.from_u,
                                log_decay_of(p.call, gates[i]),
                                parent_of(p.ring, block.n, T, t)};
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
        const int t = (threadIdx.x + i * kThreads) / kRows, row = (threadIdx.x + i * kThreads) % kRows;
        if (t < T) shared.weighted[kEntries + t][place_of(row)] = value_of(kQkv, values[i]);
    }
    remains.scan(lane);
    const float state_decay = exp_unbiased(remains.log_state);
    const float left = exp_unbiased(remains.log_entry) * remains.key_scale;
    ptx::wait_copies();
    __syncthreads();

    // Every thread of this block has the entries by now.
    u32 arrived = 0;
    if (threadIdx.x == 0) {
        if (folds) {
            u32* const arrivals = p.ring.arrivals + slot * p.ring.H + block.h;
            const bool last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
            if (last) *arrivals = 0;
            shared.last = last;
        }
        arrived = atomicAdd(counts + 1, 1u);
    }
    if (threadIdx.x < T) {
        float sum;
        path_decay(shared.drafts, -1, threadIdx.x, sum);
        shared.drafts[threadIdx.x].decay = exp_unbiased(sum);
    }
    weigh(shared.updates, left, pending, shared.weighted);
    multiply_keys(shared, at, pending, T, tile.part);
    tile.open();
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
        LaneToken token;
        take(at.k[t], tile.part, token.k);
        take(at.q[t], tile.part, token.q);
        float hk, hq;
        multiply_rows(tile.chunks, token, lane, hk, hq);
        if (tile.part % kSharers == 0) at.products[t][own] = make_float2(hk, hq);
    }
    __syncthreads();

    // Two sums, over even and odd entries, by two lanes where a row has them.
    const bool writes = tile.writes(first_row);
    const int base = folds ? 0 : pending, first = kSharers > 1 ? tile.part % 2 : 0, last = kSharers > 1 ? first : 1;
    char* out = row_of(p.call.out, p.call.out_strides, span, 0, block.hv);
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
        const Draft draft = shared.drafts[t];
        float k_sums[2], q_sums[2];
        for (int x = first; x <= last; ++x) {
            float hk = 0.f, hq = 0.f, new_k = 0.f, new_q = 0.f;
#pragma unroll 4
            for (int j = x; j < pending; j += 2) {
                const float2 c = at.coefficients[t][j];
                hk = fmaf(c.x, shared.weighted[j][place], hk);
                hq = fmaf(c.y, shared.weighted[j][place], hq);
            }
#pragma unroll 4
            for (int j = x; j < t; j += 2) {
                const float2 c = at.coefficients[t][kEntries + j];
                if (c.x != 0.f) new_k = fmaf(c.x, shared.weighted[kEntries + j][place], new_k);
                if (c.y != 0.f) new_q = fmaf(c.y, shared.weighted[kEntries + j][place], new_q);
            }
            k_sums[x - first] = fmaf(draft.decay * draft.k_scale, hk, new_k);
            q_sums[x - first] = fmaf(draft.decay * draft.q_scale, hq, new_q);
        }
        if constexpr (kSharers > 1) {
            k_sums[1] = __shfl_xor_sync(0xffffffffu, k_sums[0], 1);
            q_sums[1] = __shfl_xor_sync(0xffffffffu, q_sums[0], 1);
        }
        const float2 product = at.products[t][own];
        const float decay = state_decay * draft.decay;
        const float hk = fmaf(decay * draft.k_scale, product.x, k_sums[0] + k_sums[1]);
        const float hq = fmaf(decay * draft.q_scale, product.y, q_sums[0] + q_sums[1]);
        const float u = draft.beta * (shared.weighted[kEntries + t][place] - hk);
        __syncwarp();
        if (tile.part % kSharers == 0) shared.weighted[kEntries + t][place] = u;
        if (writes) {
            store<kQkv>(out, first_row + own, fmaf(draft.from_u, u, hq));
            store<kState>(entries.update(base + t, first_row + own), 0, u);
        }
        out += p.call.out_strides.token;
        __syncwarp();
    }
    if (folds) {
        const float none[LaneToken::kCount] = {};
        tile.fold(state_decay, shared.keys, shared.weighted, pending, none, 0.f);
        tile.store(work.write, first_row);
    }
    const u32 half = folds ? fill.half() ^ 1 : fill.half();
    const Entries drafts(p.ring, slot, half, block.h, block.hv);
    if (block.slice == 0 && threadIdx.x < T) {
        const Draft& draft = shared.drafts[threadIdx.x];
        drafts.gates[base + threadIdx.x] = draft.log_decay;
        if (block.hv == 0) p.ring.draft_parents[slot * kMost + threadIdx.x] = static_cast<signed char>(draft.parent);
    }
    // Keys that others may still read are replaced by who knows that all have been read.
    if (folds ? shared.last : block.slice == 0 && block.hv % p.call.group == 0) {
        for (int t = threadIdx.x / kLanes; t < T; t += kAtOnce) {
            float k[LaneToken::kCount];
            take(at.k[t], tile.part, k);
            StoredKey::store(drafts.key(base + t), tile.part, k, shared.drafts[t].k_scale);
            if (tile.part == 0) drafts.key_scales[base + t] = StoredKey::scale(shared.drafts[t].k_scale);
        }
    }
    if (threadIdx.x == 0 && arrived == gridDim.x * gridDim.y - 1) {
        counts[1] = 0;
        counts[0] = Fill(folds ? 0 : pending, folds ? p.ring.capacity : fill.limit(), T, half).word;
    }
}
