"""Reading and writing slots of a state pool on a CUDA device, by slots that only the device knows."""

from __future__ import annotations

from functools import cache
from typing import Any


def gather(pool: Any, slots: Any) -> Any:
    """Copy of ``pool[slots]``; zeros where a slot lies outside the pool."""
    import cupy

    states = cupy.empty((len(slots), *pool.shape[1:]), pool.dtype)
    if states.size:
        _kernels()["gather"](slots, _bits(pool), pool.shape[0], pool[0].size, _bits(states))
    return states


def scatter(pool: Any, slots: Any, states: Any) -> None:
    """Set ``pool[slots] = states``; a slot outside the pool is passed over."""
    import cupy

    states = cupy.ascontiguousarray(cupy.broadcast_to(cupy.asarray(states), (len(slots), *pool.shape[1:])), pool.dtype)
    if states.size:
        _kernels()["scatter"](slots, _bits(states), pool.shape[0], pool[0].size, _bits(pool))


def _bits(x: Any) -> Any:
    """`x` as unsigned integers of its width: the copies move bits and know no bfloat16."""
    return x.view(f"uint{8 * x.itemsize}")


@cache
def _kernels() -> dict[str, Any]:
    import cupy

    at = "const long long n = i / per_slot, slot = slots[n], at = slot * per_slot + i % per_slot;"
    live = "slot >= 0 && slot < num_slots"
    return {
        "gather": cupy.ElementwiseKernel(
            "raw S slots, raw T pool, int64 num_slots, int64 per_slot",
            "T state",
            f"{at} state = {live} ? pool[at] : T(0);",
            "gdr_gather_states",
        ),
        "scatter": cupy.ElementwiseKernel(
            "raw S slots, T state, int64 num_slots, int64 per_slot",
            "raw T pool",
            f"{at} if ({live}) pool[at] = state;",
            "gdr_scatter_states",
        ),
    }
