// Runs KERNEL of SOURCE, block after block, or cluster after cluster where SOURCE has a GDR_CLUSTER of blocks.
#include <cuda.h>  // precompiled, where there is such a one ahead
#include SOURCE
#ifdef GDR_CLUSTER
constexpr int kBlocksTogether = GDR_CLUSTER;
#else
constexpr int kBlocksTogether = 1;
#endif
static_assert(kBlocksTogether <= cluster::kMost);
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr int kStack = 1 << 19;
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
constexpr int kStack = 1 << 16;
#endif

template <class Argument>
Argument argument_of(void (*)(Argument));
static decltype(argument_of(KERNEL)) params;

static void run_thread() {
    KERNEL(params);
    fibers[current].done = true, --live, --cluster::blocks[cluster::block].live;
    let_others();
}

extern "C" int size_of_params() { return sizeof params; }
extern "C" void lie(bool whether) { lies = whether; }

constexpr unsigned kUntouched = 0x7fff7fffu;  // NaN in every type

// Enters the current fiber on its stack, as far as the place from which it goes on.
static ucontext_t outside, inside;
static void first_steps() {
    if (!_setjmp(fibers[current].place)) setcontext(&outside);
    run_thread();
}
static void enter() {
    Fiber& f = fibers[current];
    getcontext(&inside);
    inside.uc_stack.ss_sp = f.stack.data(), inside.uc_stack.ss_size = f.stack.size();
    makecontext(&inside, first_steps, 0);
    swapcontext(&outside, &inside);
}

// Starts a block of the cluster, whose first fiber is `first`.
static void start(cluster::Block& block, char* memory, int first, int threads) {
    block = {threads};
    ASAN_UNPOISON_MEMORY_REGION(memory, kSharedBytes);
    std::fill_n(reinterpret_cast<unsigned*>(memory), kSharedBytes / 4, kUntouched);
    ASAN_POISON_MEMORY_REGION(memory + shared_bytes, cluster::kStep - shared_bytes);
    for (int i = first; i < first + threads; ++i) {
        Fiber& f = fibers[i];
        f.stack.resize(kStack), f.done = f.waited = false;
        ASAN_UNPOISON_MEMORY_REGION(f.stack.data(), kStack);  // a thread ends without leaving its frames
        current = i, enter();
    }
}

// Whether a block left what lies beyond its shared memory as it was.
static bool kept_within(const char* memory) {
    ASAN_UNPOISON_MEMORY_REGION(memory, kSharedBytes);
    const auto* words = reinterpret_cast<const unsigned*>(memory);
    return std::all_of(words + (shared_bytes + 3) / 4, words + kSharedBytes / 4,
                       [](unsigned x) { return x == kUntouched; });
}

// The cluster whose first block is blockIdx; whether it ends.
static bool run_cluster(int threads) {
    const int step = (threads + 31) / 32 * 32;  // each block has warps of its own
    const unsigned first_block = blockIdx.x;
    live = kBlocksTogether * threads, of_cluster = {};
    for (auto& meeting : of_warps) meeting = {};
    for (int b = 0; b < kBlocksTogether; ++b)
        start(cluster::blocks[b], cluster::memory + b * cluster::kStep, b * step, threads);
    for (long round = 0; live > 0; ++round) {
        if (round > 1'000'000) return false;
        for (int b = 0; b < kBlocksTogether; ++b) {
            cluster::block = b, blockIdx.x = first_block + b, shared = cluster::memory + b * cluster::kStep;
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
                current = b * step + threadIdx.x;
                if (!fibers[current].done) go_on(scheduler, fibers[current].place);
            }
        }
    }
    blockIdx.x = first_block;
    return true;
}

// What went wrong, or null.
extern "C" const char* run(const void* arguments, int blocks_x, int blocks_y, int blocks_z, int threads, int shared) {
    if (shared > kSharedBytes) return "more shared memory than a block has";
    shared_bytes = shared;
    if (blocks_x % kBlocksTogether) return "the grid's x is no multiple of the cluster's blocks";
    if ((threads + 31) / 32 * 32 * kBlocksTogether > kMostThreads) return "more threads than there are fibers";
    memcpy(&params, arguments, sizeof params);
    gridDim = {static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y), static_cast<unsigned>(blocks_z)};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    cluster::count = kBlocksTogether;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x += kBlocksTogether) {
                if (!run_cluster(threads)) return "threads wait for each other";
                for (int b = 0; b < kBlocksTogether; ++b)
                    if (!kept_within(cluster::memory + b * cluster::kStep)) return "writes beyond its shared memory";
            }
    return nullptr;
}
