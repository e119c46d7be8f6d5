// The walk of gdr/chunk_walk.cuh, of what chunk_prepare has left in the workspace.
//
// Beside the warps that compute, two bring tiles and values, up to kStages chunks ahead, and others store outputs.
//
//   GDR_COLUMNS, GDR_STAGES    value columns of a block (a multiple of 64), chunks in shared memory
//   GDR_COMPOSE                the walk that finds the maps of segments
//
// With GDR_BESIDE it starts while chunk_prepare runs, which was launched just ahead of it and has waited for all else: what
// is in memory is the caller's, but for the workspace, where a flag says what is there.
// requires: sm_90
// options: -arch=sm_90a
// launch: dependent
namespace gdr {
constexpr int kColumns = GDR_COLUMNS, kSplit = 1, kStages = GDR_STAGES, kFirstWarp = 0;
constexpr bool kCompose = GDR_COMPOSE, kLean = false;
}  // namespace gdr

#include "gdr/chunk_beside.cuh"
#include "gdr/chunk_walk.cuh"

using namespace gdr;

namespace {

constexpr int kDecayBytes = 3 * kC * 4;
// A chunk in shared memory. Composing needs neither Q nor P.
struct alignas(128) Stage {
    static constexpr int kWith = kCompose ? 1 : 2;
    static constexpr int kSquaresAt = kWith * kKeyTileBytes, kDecaysAt = kSquaresAt + kWith * kSquareBytes;
    char keys[kWith * kKeyTileBytes];    // K, Q
    char squares[kWith * kSquareBytes];  // T, P
    float d[kC], scaled_d[kC], e[kC];
    char V[kC * kValueRow];
};

struct Shared {
    Stage stages[kStages];
    Outputs outputs;
    Barrier full[kStages], empty[kStages];
};

struct Feed {
    Shared& sm;
    int at = 0, before = 0;
    u32 parity = 0;

    __device__ __forceinline__ void wait() const { sm.full[at].wait(parity); }
    __device__ __forceinline__ const Stage& stage() const { return sm.stages[at]; }
    __device__ __forceinline__ u32 squares() const { return shared_address(sm.stages[at].squares); }
    __device__ __forceinline__ Outputs& outputs() { return sm.outputs; }
    __device__ __forceinline__ void next() {
        before = at;
        if (++at == kStages) at = 0, parity ^= 1;
    }
    __device__ __forceinline__ void release() {
        if (threadIdx.x % 32 == 0) sm.empty[before].arrive();
    }
};

// ---- The warps that bring a chunk's tiles and values.

// Of the pieces of work of chunk_prepare, a chunk's keys come with the first part of their value heads, the rest with its
// own.
struct Arrivals {
    static constexpr int kAtOnce = 16;  // chunks: a look at a flag takes as long as a chunk
    PieceFlags* first;                  // this lane's
    i64 step;
    int chunks, ready = 0;
    bool reports;  // for all blocks that read a piece

    __device__ __forceinline__ Arrivals(const Params& p, const Work& work) : chunks(work.last - work.first) {
        if constexpr (!kBeside) return;
        const int lane = threadIdx.x % 32, head = work.hv % p.group;
        const int part = lane < kAtOnce ? 0 : head / p.heads_per_block;
        reports = lane == kAtOnce && work.first_column == 0 && head % p.heads_per_block == 0;
        step = p.H * parts_of_heads(p);
        first = flags_of(p) + (work.seq.chunk + work.first - p.first_chunk) * step + part * p.H + work.hv / p.group;
    }
    __device__ __forceinline__ void wait(int chunk) {
        if (!kBeside || chunk < ready) return;
        do {
            const int mine = min(ready + static_cast<int>(threadIdx.x % kAtOnce), chunks - 1);
            const u32 up = __ballot_sync(0xffffffffu, ptx::flag_is_up(&first[mine * step].ready));
            ready += __ffs((~(up & up >> kAtOnce) & 0xffff) | 0x10000) - 1;
        } while (chunk >= ready);
        order_with_engines();
    }
    __device__ __forceinline__ void report(int chunk) const {
        if (kBeside && reports) ptx::set_mark(&first[chunk * step].read);
    }
};

// What the copy engine brings, a piece a lane.
__device__ __forceinline__ void bring_tiles(const Params& p, const Work& work, Shared& sm) {
    constexpr int kKeyBytes = sizeof(sm.stages[0].keys), kSquares = Stage::kWith;
    constexpr int kBytes = kKeyBytes + kSquares * kLowerBlocks * kBlockBytes + kDecayBytes;
    // Columns of T and P from the diagonal down, decays, keys.
    constexpr int kDecays = kSquares * kRows, kKeysLane = kDecays + 1;
    const int lane = threadIdx.x % 32;
    const i64 slot = work.seq.chunk + work.first - p.first_chunk;
    const i64 key_step = static_cast<i64>(p.H) * (2 * kKeyTileBytes);
    const i64 head_step = static_cast<i64>(p.H * p.group) * sizeof(HeadTile);
    const char* from;
    i64 step;
    u32 to, bytes;
    if (lane < kDecays) {
        const int j = lane % kRows;
        from = p.head_tiles + lane / kRows * (kLowerBlocks * kBlockBytes) + lower_block(j, j);
        to = Stage::kSquaresAt + lane / kRows * kSquareBytes + j * (kColumnBytes + kBlockBytes);
        bytes = (kRows - j) * kBlockBytes;
    } else if (lane == kDecays) {
        from = p.head_tiles + 2 * kLowerBlocks * kBlockBytes, to = Stage::kDecaysAt, bytes = kDecayBytes;
    } else {
        from = p.key_tiles, to = 0, bytes = kKeyBytes;
    }
    if (lane < kKeysLane) {
        from += slot * head_step + work.hv * static_cast<i64>(sizeof(HeadTile)), step = head_step;
    } else {
        from += slot * key_step + work.hv / p.group * (2 * kKeyTileBytes), step = key_step;
    }
    Arrivals arrivals(p, work);
    int stage = 0;
    u32 parity = 1;  // the first round finds every stage empty
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        arrivals.wait(chunk - work.first);
        Barrier& full = sm.full[stage];
        sm.empty[stage].wait(parity);
        if (lane == 0) full.arrive_expect(kBytes);
        __syncwarp();
        if (lane <= kKeysLane) full.copy_bulk(shared_address(&sm.stages[stage]) + to, from, bytes);
        arrivals.report(chunk - work.first);
        from += step;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
}

// Lane l copies 16 bytes of token l / 8 of every 4: whole lines of memory to whole rows.
__device__ __forceinline__ void bring_values(const Work& work, Shared& sm) {
    const int lane = threadIdx.x % 32;
    const char* from = work.values + work.first * (kC * work.value_step);
    int stage = 0;
    u32 parity = 1;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; ++chunk) {
        const int tokens = work.tokens(chunk);
        sm.empty[stage].wait(parity);
        char* to = sm.stages[stage].V + lane / 8 * kValueRow + lane % 8 * 16;
        if (!kCompose || work.first_column < kV) {
#pragma unroll 4
            for (int token = 0; token < kC; token += 4) {
                const bool exists = token + lane / 8 < tokens;
#pragma unroll
                for (int i = 0; i < kColumns / 64; ++i) {
                    char* there = to + token * kValueRow + i * 128;
                    if constexpr (kAligned) {
                        const char* here = exists ? from + i * 128 : work.values;
                        if constexpr (kBeside) copy16_once(shared_address(there), here, exists);
                        else copy16(shared_address(there), here, exists);
                    } else {
                        u32 words[4];
                        load_chunk<kQkv, 8, false>(from, i * 64, exists ? 8 : 0, words);
                        *reinterpret_cast<uint4*>(there) = make_uint4(words[0], words[1], words[2], words[3]);
                    }
                }
                from += 4 * work.value_step;
            }
        }
        if constexpr (!kAligned) __threadfence_block();
        sm.full[stage].arrive_after_copies();
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_copies();
}

__device__ __forceinline__ void zero(char* to, int bytes) {
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
}

// The end of the walk is that of chunk_prepare too, for all that comes behind it.
__device__ __forceinline__ void end_both() {
    if (kBeside && blockIdx.x == gridDim.x - 1) ptx::wait_for_kernels_ahead();
}

}  // namespace

// Warps that compute, two that bring tiles and values, some that store outputs. With two warpgroups that compute, registers are
// too few to go round evenly: a third gives some of its own to them.
constexpr bool kTwo = kColumns == 128;
constexpr int kBlockThreads = kThreads + (kTwo ? 128 : 96);

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1) chunk_state_sm90(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, storer = warp - kWarps - 2;
    // Zeros for what no copy fills: above the diagonals, and the values of a map's columns.
    for (int i = 0; i < kStages; ++i) zero(sm.stages[i].squares, sizeof(sm.stages[i].squares));
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) sm.full[i].init(33), sm.empty[i].init(kWarps);
        sm.outputs.init();
        Barrier::publish_inits();
    }
    if constexpr (kBeside) ptx::run_beside_kernel_ahead();
    else ptx::wait_for_kernels_ahead();
    if constexpr (kCompose) ptx::let_kernel_behind_start();
    Work work;
    if (!find_work(p, work)) {
        end_both();
        return;
    }
    find_tokens(p, work, lane / 8, lane % 8, lane / 8, work.first_column + max(storer, 0) * 64 + lane % 8 * 8);
    work.outputs += work.first * (kC * work.output_step);
    if (kCompose && work.first_column >= kV)
        for (int i = 0; i < kStages; ++i) zero(sm.stages[i].V, sizeof(sm.stages[i].V));
    publish_to_engines();
    __syncthreads();
    if (warp >= kWarps) {
        if constexpr (kTwo) keep_registers<40>();
        if (storer == -2) bring_tiles(p, work, sm);
        else if (storer == -1) bring_values(work, sm);
        else if (!kCompose && storer < kStorers) store_outputs(work, sm.outputs, storer);
    } else {
        if constexpr (kTwo) take_registers<232>();
        const int column = work.first_column + warp * 16;
        State S;
        load_state(p, work, S, column, 0);
        Feed feed{sm};
        compute(work, feed, S);
        save_state(p, work, S, column, 0);
    }
    end_both();
}
