"""Time the kernels of calls of the chunkwise form on a GPU, each alone: writes docs/data/kernels-GPU.json.

    python docs/measure_kernels.py NAME

Times are medians of replays of a CUDA graph.  A kernel alone is the same calls with the others left out, on the tiles
and maps that whole calls have left in the workspace.  Where `chunk_prepare` runs beside the walk it waits for what it
prepares to be read, so there the walk alone is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gdr
from gdr import _cuda_chunk_call, _cuda_loader
from measure_prefill import COLD_BYTES, D, measure, normal
from provenance import provenance, write

HEADS = {"qwen3-next": (16, 32), "tp8-397b": (2, 8), "397b": (16, 64)}
CASES = [
    *((heads, [T]) for heads in HEADS for T in (2048, 8192, 32768)),
    *((heads, lengths) for heads in HEADS for lengths in ([2048] * 4, [1024] * 8)),
]
NOTE = (
    "Microseconds of a call and of its kernels alone; K=V=128, bfloat16, states of float32 in the layout vk are read "
    "and written. qwen3-next has H=16 HV=32, tp8-397b H=2 HV=8, 397b H=16 HV=64. The floor is what q, k, v, o and "
    "states take at the bandwidth of a copy."
)


def bytes_of(H: int, HV: int, lengths: list[int]) -> int:
    """What a call cannot but move."""
    return sum(lengths) * (H + HV) * 2 * D * 2 + 2 * len(lengths) * HV * D * D * 4


def draw(H: int, HV: int, lengths: list[int], workspace: Any) -> list[Callable[[], None]]:
    """Calls on different inputs, which together are larger than the cache."""
    T, N = sum(lengths), len(lengths)
    cu_seqlens = cupy.asarray(np.cumsum([0, *lengths]), "int32") if N > 1 else None
    calls = []
    for _ in range(min(16, 1 + COLD_BYTES // bytes_of(H, HV, lengths))):
        q, k, v = (normal((1, T, heads, D), "bfloat16") for heads in (H, H, HV))
        g = -cupy.log1p(cupy.exp(-normal((1, T, HV), "float32"))) / 16
        beta = 1 / (1 + cupy.exp(-normal((1, T, HV), "float32")))
        state = normal((N, HV, D, D), "float32")
        options = {"initial_state": state, "cu_seqlens": cu_seqlens, "out": cupy.empty_like(v), "workspace": workspace}

        def call(operands: Any = (q, k, v, g, beta), options: Any = options) -> None:
            gdr.chunk_gated_delta_rule(
                *operands, output_final_state=True, use_qk_l2norm_in_kernel=True, state_layout="vk", **options
            )

        calls.append(call)
    return calls


def name_of(kernel: _cuda_loader.Kernel) -> str:
    return f"{kernel.stem}, composing" if kernel.defines.get("GDR_COMPOSE") else kernel.stem


@contextmanager
def launching(wanted: str | None, seen: dict[str, _cuda_loader.Kernel]) -> Iterator[None]:
    """Launch one kernel of all, or all; each that was to be launched is in `seen` then."""
    launch = _cuda_loader.Kernel.launch

    def choose(kernel: _cuda_loader.Kernel, *args: Any) -> None:
        name = name_of(kernel)
        seen[name] = kernel
        if wanted in (None, name):
            launch(kernel, *args)

    _cuda_loader.Kernel.launch = choose  # type: ignore[method-assign]
    try:
        yield
    finally:
        _cuda_loader.Kernel.launch = launch  # type: ignore[method-assign]


def bandwidth() -> float:
    """Bytes a microsecond of a large copy, what is read and what is written."""
    x = cupy.empty(1 << 30, "uint8")
    y = cupy.empty_like(x)
    return 2 * x.nbytes / measure([lambda: cupy.copyto(y, x)])


def rows_of(heads: str, lengths: list[int], rate: float, workspace: Any) -> Iterator[dict[str, Any]]:
    H, HV = HEADS[heads]
    case = f"{heads} {lengths[0]}x{len(lengths)}" if len(lengths) > 1 else f"{heads} 1x{lengths[0]}"
    seen: dict[str, _cuda_loader.Kernel] = {}
    calls = draw(H, HV, lengths, workspace)
    with launching(None, seen):
        for call in calls:
            call()
        whole = measure(calls)
    yield {"case": case, "us": round(whole, 1), "floor_us": round(bytes_of(H, HV, lengths) / rate, 1)}
    for name, kernel in seen.items():
        if kernel.stem == "chunk_prepare" and kernel.defines.get("GDR_BESIDE"):
            yield {"case": case, "kernel": name}
            continue
        if len(seen) == 1:
            us = whole
        else:
            with launching(name, {}):
                us = measure(calls)
        yield {"case": case, "kernel": name, "us": round(us, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help='of the GPU in the file\'s name, "h100"')
    name = parser.parse_args().name
    rate = bandwidth()
    workspace = cupy.empty(_cuda_chunk_call.MAX_WORKSPACE + (256 << 20), "uint8")  # and what is beside the tiles
    rows: list[dict[str, Any]] = []
    for heads, lengths in CASES:
        found = list(rows_of(heads, lengths, rate, workspace))
        rows += found
        print(*found, sep="\n", flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
    more = {"note": NOTE, "copy_GBps": round(rate / 1e3, 1), "rows": rows}
    write(f"kernels-{name}", provenance("cuda") | more)


if __name__ == "__main__":
    main()
