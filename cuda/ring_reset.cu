// What slots have pending: nothing, for states that are about to be overwritten, or as much as the slots they are copies
// of. They have no drafts then, and no block of a launch counts as having read them, whatever was before.
// launch: dependent
//
//   GDR_SLOTS, GDR_SOURCES   bytes of an index (0: nothing is pending)
#include "gdr/ptx.cuh"

using namespace gdr;

namespace {

struct ResetParams {
    const char *slots, *sources;  // [N]
    u32 *fills, *arrivals;
    i64 num_slots;
    u32 N, H;
};

template <int kBytes>
__device__ __forceinline__ i64 number(const char* from, i64 i) {
    if constexpr (kBytes == 8) return reinterpret_cast<const i64*>(from)[i];
    else return reinterpret_cast<const int*>(from)[i];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) ring_reset(const __grid_constant__ ResetParams p) {
    ptx::let_kernel_behind_start();
    ptx::wait_for_kernels_ahead();
    const u32 n = blockIdx.x * 128 + threadIdx.x;
    if (n >= p.N) return;
    const i64 slot = number<GDR_SLOTS>(p.slots, n);
    if (slot < 0 || slot >= p.num_slots) return;
    u32 fill = 0;
    if constexpr (GDR_SOURCES != 0) {
        const i64 source = number<GDR_SOURCES>(p.sources, n);
        if (source < 0 || source >= p.num_slots) return;
        fill = p.fills[source * 2] & 0xff00ffffu;
    }
    p.fills[slot * 2] = fill, p.fills[slot * 2 + 1] = 0;
    for (u32 h = 0; h < p.H; ++h) p.arrivals[slot * p.H + h] = 0;
}
