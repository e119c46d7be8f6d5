// Folds the pending entries of slots into their states: in place, and then none is pending; or into copies of them.
// options: -fmad=false
#include "gdr/ring.cuh"

using namespace gdr;

namespace {

struct Shared {
    SharedKey keys[kEntries];
    SharedUpdates updates[kEntries];
    alignas(16) float weighted[kEntries][kRows];  // updates times what is left of them, by place_of
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, GDR_MIN_BLOCKS) ring_fold(const __grid_constant__ RingParams p) {
    __shared__ Shared shared;
    const Block<kBlocks> block(p.call);
    const int lane = threadIdx.x % 32, first_row = block.slice * kRows;
    const Rows rows(p.call, block.n);
    const Work work(p.call, rows, block.hv);
    StateTile tile;
    if (work.padding) {
        if constexpr (!kInPlace) {
            char* const to =
                p.call.final_state + block.hv * p.call.final_strides.head + i64{block.n} * p.call.final_strides.slot;
            const float zeros[kChunk] = {};
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                for (int j = 0; j < kChunks; ++j) tile.chunks[r][j].set(zeros);
            tile.store(to, first_row);
        }
        return;
    }
    const i64 slot = rows.read.value();
    u32* const counts = p.ring.fills + slot * 2;
    const Fill fill(ptx::load4(counts));
    const int pending = fill.pending();
    const bool counts_blocks = threadIdx.x == 0;
    if (kInPlace && pending == 0) {
        // Other blocks find nothing pending either, whether they come before or after this.
        if (counts_blocks && blockIdx.x == 0 && blockIdx.y == 0) counts[0] = Fill(0, 0, 0, fill.half()).word;
        return;
    }
    tile.load(work.read, first_row);
    const Entries entries(p.ring, slot, fill.half(), block.h, block.hv);
    copy_keys(entries, pending, shared.keys);
    copy_updates(entries, pending, first_row, shared.updates);
    Remains remains(entries, pending, lane);
    remains.scan(lane);
    const float decay = exp_unbiased(remains.log_state);
    const float left = exp_unbiased(remains.log_entry) * remains.key_scale;
    tile.open();
    ptx::wait_copies();
    __syncthreads();
    weigh(shared.updates, left, pending, shared.weighted);
    u32 arrived = 0;
    if (kInPlace && counts_blocks) arrived = atomicAdd(counts + 1, 1u);
    const float none[LaneToken::kCount] = {};
    if (pending > 0) tile.fold(decay, shared.keys, shared.weighted, pending, none, 0.f);
    tile.store(work.write, first_row);
    if (kInPlace && counts_blocks && arrived == gridDim.x * gridDim.y - 1) {
        counts[1] = 0;
        counts[0] = Fill(0, 0, 0, fill.half()).word;
    }
}
