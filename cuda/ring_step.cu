// One token of each sequence of a pool with deferred write-back.
// options: -fmad=false
// launch: dependent
//
// With h_0 the state in memory, d the decay over all pending entries and this token, and w_j what is left of entry j:
//     u = beta (v - d h_0^T k - sum_j w_j (k_j . k) u_j)
//     o = d h_0^T q + sum_j w_j (k_j . q) u_j + (k . q) u
// The state is only read, and k, u and g become the next entry; or, when that fills the slot, the state is written
// with all entries and this token in it, and nothing is appended. The last block of a sequence counts the token.
//
// How many rows a block takes may depend on the batch: the sums are the same trees for every choice.
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

// Lanes that share a row split the sum over entries in two, the even and the odd ones; a lane alone does both halves.
constexpr int kHalves = kSharers > 1 ? 1 : 2, kHalf = kEntries / 2;

struct TokenScalars {
    float decay, beta, k_scale, q_scale, from_u, log_decay;
};

struct Shared {
    SharedKey keys[kEntries];
    SharedUpdates updates[kEntries];
    alignas(16) float weighted[kEntries][kRows];  // updates times what is left of them, by place_of
    float2 products[kEntries];                    // of an entry's key with k and q, not normalised
    float left[kEntries];                         // of an entry, times its key's scale
    TokenScalars token;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS) ring_step(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = block.slice * kRows;
    const Span span{block.n, 0, 1};
    StateTile tile;
    const int own = tile.own(), place = place_of(own), half = tile.part % 2;
    const bool exists = kV % kRows == 0 || first_row + own < kV;

    take_turn(p, block);
    // Every load is issued before anything waits for one.
    const Rows rows(p.call, block.n);
    LaneToken::Words words;
    GateBits gates{};
    u32 value = 0;
    words.load(p.call, span, 0, block.h, tile.part);
    if (warp == 0) gates.load(p.call, span, 0, block.hv);
    if (exists) value = load_bits(kQkv, row_of(p.call.v, p.call.v_strides, span, 0, block.hv), first_row + own);
    const Work work(p.call, rows, block.hv);
    if (work.padding) return write_zeros(p.call, span, block.hv, first_row, min(first_row + kRows, kV));
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    const Fill fill(ptx::load4(counts));
    if constexpr (kVk) tile.load(work.read, first_row);

    const int pending = fill.pending();
    const bool folds = pending + 1 >= static_cast<int>(limit_of(p.ring, fill, slot));
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    copy_keys(entries, pending, shared.keys);
    copy_updates(entries, pending, first_row, shared.updates);
    if constexpr (!kVk) tile.load(work.read, first_row);
    Remains remains(entries, warp == 0 ? pending : 0, lane);

    const LaneToken token(words);
    if (warp == 0) {
        remains.scan(lane);
        const float g = log_decay_of(p.call, gates);
        const Scalars s = token.scalars(p.call.scale, 1.f, gates.beta(p.call));
        if (lane < kEntries) shared.left[lane] = exp_unbiased(remains.log_entry + g) * remains.key_scale;
        if (lane == 0) shared.token = {exp_unbiased(remains.log_state + g), s.beta, s.k_scale, s.from_q, s.from_u, g};
    }
    ptx::wait_copies();
    float products[2 * kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        float key[LaneToken::kCount] = {};
        if (entry_of(i) < pending) shared.keys[entry_of(i)].get(tile.part, key);
        products[i] = products[kPasses + i] = 0.f;
#pragma unroll
        for (int x = 0; x < LaneToken::kCount; ++x) {
            products[i] = fmaf(key[x], token.k[x], products[i]);
            products[kPasses + i] = fmaf(key[x], token.q[x], products[kPasses + i]);
        }
    }
    const int first = sum_transposed<2 * kPasses, kLanes / 2, 1>(products, lane);
#pragma unroll
    for (int i = 0; i < max(2 * kPasses / kLanes, 1); ++i) {
        const int j = entry_of((first + i) % kPasses);
        if (j < kEntries) reinterpret_cast<float*>(&shared.products[j])[(first + i) / kPasses] = products[i];
    }
    tile.open();
    float hk, hq;
    multiply_rows(tile.chunks, token, lane, hk, hq);
    __syncthreads();

    // Every thread of this block knows the fill by now.
    u32 arrived = 0;
    if (threadIdx.x == 0) arrived = atomicAdd(counts + 1, 1u);
    const TokenScalars s = shared.token;
    float from_k[2] = {0.f, 0.f}, from_q[2] = {0.f, 0.f};
#pragma unroll
    for (int x = 0; x < kHalves; ++x)
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const int j = 2 * i + (kHalves == 1 ? half : x);
            const float u = j < pending ? shared.updates[j].get(own) * shared.left[j] : 0.f;
            const float2 product = shared.products[j];
            from_k[x] = fmaf(u, product.x, from_k[x]);
            from_q[x] = fmaf(u, product.y, from_q[x]);
            if (folds) shared.weighted[j][place] = u;
        }
    if constexpr (kHalves == 1) {
        from_k[1] = __shfl_xor_sync(0xffffffffu, from_k[0], 1);
        from_q[1] = __shfl_xor_sync(0xffffffffu, from_q[0], 1);
    }
    const float old_k = fmaf(s.decay, hk, from_k[0] + from_k[1]), old_q = fmaf(s.decay, hq, from_q[0] + from_q[1]);
    const float u = s.beta * fmaf(-s.k_scale, old_k, value_of(kQkv, value));
    const bool writes = tile.writes(first_row);
    if (writes)
        store<kQkv>(row_of(p.call.out, p.call.out_strides, span, 0, block.hv), first_row + own,
                    fmaf(s.q_scale, old_q, s.from_u * u));
    if (folds) {
        __syncwarp();
        tile.fold(s.decay, shared.keys, shared.weighted, pending, token.k, s.k_scale * u);
        tile.store(work.write, first_row);
    } else {
        if (writes) store<kState>(entries.update(pending, first_row + own), 0, u);
        if (warp == 0 && block.slice == 0) {
            if (lane == 0) entries.gates[pending] = s.log_decay;
            if (block.hv % p.call.group == 0) {
                if (lane == 0) entries.key_scales[pending] = StoredKey::scale(s.k_scale);
                if (lane < kLanes) StoredKey::store(entries.key(pending), tile.part, token.k, s.k_scale);
            }
        }
    }
    if (threadIdx.x == 0 && arrived == gridDim.x * gridDim.y - 1) {
        counts[1] = 0;
        counts[0] =
            (folds ? Fill(0, p.ring.capacity, 0, fill.half()) : Fill(pending + 1, fill.limit(), 0, fill.half())).word;
    }
}
