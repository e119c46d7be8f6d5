// Runs KERNEL of SOURCE, block after block.
#include "cuda.h"
#include SOURCE
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr int kStack = 1 << 19;
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
constexpr int kStack = 1 << 16;
#endif

template <class Argument>
Argument argument_of(void (*)(Argument));
static decltype(argument_of(KERNEL)) params;

static void run_thread() {
    KERNEL(params);
    fibers[current].done = true, --live;
    swapcontext(&fibers[current].context, &scheduler);
}

extern "C" int size_of_params() { return sizeof params; }
extern "C" void lie(bool whether) { lies = whether; }

// 0; 1 where threads wait for each other for ever.
extern "C" int run(const void* arguments, int blocks_x, int blocks_y, int blocks_z, int threads_of_block) {
    memcpy(&params, arguments, sizeof params);
    threads = threads_of_block;
    gridDim = {static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y), static_cast<unsigned>(blocks_z)};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                std::fill_n(reinterpret_cast<unsigned*>(shared), kSharedBytes / 4, 0x7fff7fffu);  // NaN in every type
                live = threads, of_block = {};
                for (auto& meeting : of_warps) meeting = {};
                for (auto& meeting : of_some) meeting = {};
                for (int i = 0; i < threads; ++i) {
                    Fiber& f = fibers[i];
                    f.stack.resize(kStack), f.done = f.waited = false;
                    ASAN_UNPOISON_MEMORY_REGION(f.stack.data(), kStack);  // a thread ends without leaving its frames
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
                    makecontext(&f.context, run_thread, 0);
                }
                for (long round = 0; live > 0; ++round) {
                    if (round > 1'000'000) return 1;
                    for (current = 0; current < threads; ++current)
                        if (!fibers[current].done) swapcontext(&scheduler, &fibers[current].context);
                }
            }
        }
    }
    return 0;
}
