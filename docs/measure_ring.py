"""Time deferred write-back and drafts on a GPU, beside steps in place: writes docs/data/performance-GPU-ring.json.

    python docs/measure_ring.py NAME

A pool of 512 MiB is stepped through batch by batch by the replay of one CUDA graph, so that states and pending tokens
leave the L2 cache between two steps of a sequence.  The sequences of a batch are at different places of their period of
16 tokens, as evenly as the batch allows.  `us` is the mean of a step over whole periods, `worst` the slowest step of a
period, each the median of several.  Drafts are all committed, which makes slots fold as often as they can.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gdr import _cuda_fused_recurrent as in_place
from gdr import _cuda_ring as cuda_ring
from gdr import _inputs
from gdr._arrays import numpy_dtype
from gdr._spec import OPERANDS, RAW_GATES, TOKENS, Form
from provenance import provenance, write
from replays import Replays

H, HV, D, CAPACITY, ROOM = 16, 32, 128, 16, 16
POOL_BYTES = 512 << 20
FORM = Form("fused_recurrent", (*TOKENS, *RAW_GATES))
TITLE = "deferred write-back and drafts"
NOTE = (
    "Microseconds of a step, the mean over a period of 16 tokens, from replays of a CUDA graph over a pool of 512 MiB; "
    "H=16 HV=32, K=V=128, layout vk, bfloat16 q, k, v, a, b. Drafts are all committed, and the commit is in the time. "
    "In place, the same tokens are steps that count at once."
)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    return cupy.asarray(rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype)))


def make_pool(dtype: str) -> Any:
    rng = np.random.default_rng(0)
    slots = POOL_BYTES // (HV * D * D * numpy_dtype(dtype).itemsize)
    block = (rng.standard_normal((4, HV, D, D)) * 0.1).astype(numpy_dtype(dtype))
    return cupy.concatenate([cupy.asarray(block)] * (slots // 4))


def calls_of(pool: Any, B: int, T: int, kind: str) -> tuple[list[Callable[[], None]], int]:
    """One call for each batch of the pool's slots, and after how many rounds everything is as before."""
    rng = np.random.default_rng(1)
    slots = len(pool)
    order = rng.permutation(slots).astype(np.int32)
    ring = cuda_ring.Ring(pool, "vk", H, CAPACITY, False)
    head = {"A_log": cupy.asarray(rng.uniform(0, 2, HV).astype(np.float32)), "dt_bias": normal(rng, (HV,), "float32")}
    shapes = {"q": (B, T, H, D), "k": (B, T, H, D), "v": (B, T, HV, D), "a": (B, T, HV), "b": (B, T, HV)}
    batches = slots // B
    inputs = [{name: normal(rng, shape, "bfloat16") for name, shape in shapes.items()} for _ in range(min(batches, 64))]
    accepted = cupy.full(B, T, np.int32)

    def call_of(i: int) -> Callable[[], None]:
        x, named = inputs[i % len(inputs)], cupy.asarray(order[i * B : (i + 1) * B])
        state = {"initial_state": pool, "initial_slots": named, "final_state": pool, "final_slots": named}
        operands = {**head, **x, **state, "out": cupy.empty_like(x["v"])}
        call = _inputs.prepare(FORM, tuple(map(operands.get, OPERANDS)), l2norm=True, layout="vk")
        if kind == "in place":
            return lambda: in_place.run(call)
        call.ring, call.draft = ring, kind == "verify"
        if kind == "step":
            return lambda: cuda_ring.run(call)

        def verify_and_commit() -> None:
            cuda_ring.verify(call)
            cuda_ring.commit(ring, named, accepted)

        return verify_and_commit

    calls = [call_of(i) for i in range(batches)]
    if kind == "in place":
        return calls, 1
    # Pending tokens of each sequence to begin with, and the limit of all; see ring.cuh.
    period = CAPACITY if kind == "step" else max(1, ROOM // T)
    place = np.arange(B) * period // B if period > B else np.arange(B) % period
    fills = np.zeros((slots, 2), np.uint32)
    fills[order[: batches * B], 0] = np.tile(place if kind == "step" else place * T, batches) | CAPACITY << 8
    ring.fills[...] = cupy.asarray(fills)
    return calls, period


def measure(calls: list[Callable[[], None]], period: int, seconds: float = 0.06) -> tuple[float, float]:
    """Mean time of a call over whole periods, and that of the slowest round of a period, in microseconds."""
    replays = Replays(calls, calls)
    replays.mean(2 * period - 1)
    once = replays.mean(period) * 1e-6 * len(calls) * period
    count = max(1, int(seconds / 5 / once)) * period
    mean = float(np.median([replays.mean(count) for _ in range(5)]))
    took = replays.each(4 * period)
    return mean, max(float(np.median(took[i::period])) for i in range(period))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help='of the GPU in the file\'s name, "h100"')
    name = parser.parse_args().name
    cases = [(dtype, B, 1, "step") for dtype in ("float32", "bfloat16") for B in (1, 8, 32, 128, 256)]
    cases += [("float32", B, T, "verify") for T in (2, 4, 8) for B in (1, 8, 64)]
    rows: list[dict[str, Any]] = []
    pool = make_pool(cases[0][0])
    for dtype, B, T, kind in cases:
        if pool.dtype != numpy_dtype(dtype):
            pool = make_pool(dtype)
        tokens = "" if T == 1 else f" T={T}"
        for impl in (kind, "in place"):
            mean, worst = measure(*calls_of(pool, B, T, impl))
            rows.append(
                {
                    "suite": "deferral" if kind == "step" else "drafts",
                    "case": f"qwen3-next B={B}{tokens} {dtype}",
                    "impl": "gdr in place" if impl == "in place" else f"gdr ring={CAPACITY}",
                    "us": round(mean, 2),
                    "worst": round(worst, 2),
                }
            )
            print(rows[-1], flush=True)
    write(f"performance-{name}-ring", provenance("cuda") | {"title": TITLE, "note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
