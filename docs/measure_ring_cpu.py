"""Time deferred write-back and drafts on the CPU: writes docs/data/performance-cpu-ring-BACKEND.json.

    python docs/measure_ring_cpu.py [--backend numpy|numba]

Pools with rings of several sizes take turns, step by step; `us` is the mean of a step over whole periods, `worst` the
slowest step of a period, each from the median of several periods.  Of the drafts half are committed; in place the same
number of tokens are verified by the recurrence, which then runs the accepted ones again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gdr
from gdr._threads import thread_count
from gdr.testing import make_inputs
from provenance import provenance, write

SHAPE = {"H": 16, "HV": 32, "K": 128, "V": 128}
RINGS = (0, 4, 16, 64)
PERIOD, PERIODS = 64, 5
IMPLS = ("gdr verify, commit", "gdr recurrence")
NOTE = (
    "Microseconds of a step, the mean over a period, implementations taking turns in one process; H=16 HV=32, K=V=128, "
    "float32 q, k, v, a, b. Sequences start at different places of their period (stagger=True). Half of the drafts are "
    "committed, and the commit is in the time."
)


def make_pool(x: Any, dtype: str, ring: int) -> tuple[gdr.DeltaRuleState, np.ndarray]:
    B, HV, V = x.v.shape[0], SHAPE["HV"], SHAPE["V"]
    gates = {"A_log": x.A_log, "dt_bias": x.dt_bias}
    state = gdr.DeltaRuleState(
        B, HV, SHAPE["K"], V, num_k_heads=SHAPE["H"], dtype=dtype, ring=ring, stagger=True, **gates
    )
    return state, state.alloc(B)


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def steps(B: int, dtype: str) -> list[dict[str, Any]]:
    x = make_inputs(B=B, T=1, gates="slow", **SHAPE)
    pools = {ring: make_pool(x, dtype, ring) for ring in RINGS}
    took = np.zeros((len(RINGS), 1 + PERIODS, PERIOD))
    for period in range(1 + PERIODS):
        for t in range(PERIOD):
            for i, (state, slots) in enumerate(pools.values()):
                took[i, period, t] = clock(lambda: state.step(x.q, x.k, x.v, x.a, x.b, slots))  # noqa: B023
    rows = []
    for ring, times in zip(RINGS, np.median(took[:, 1:], axis=1)):
        # Each place of the ring's own period several times, where it is shorter.
        places = np.median(times.reshape(-1, max(1, ring)), axis=0)
        impl = f"gdr ring={ring}" if ring else "gdr in place"
        row = {"suite": "deferral", "case": f"B={B} {dtype}", "impl": impl}
        rows.append(row | {"us": round(places.mean(), 1), "worst": round(places.max(), 1)})
    return rows


def drafts(B: int, T: int) -> list[dict[str, Any]]:
    x = make_inputs(B=B, T=T, gates="slow", **SHAPE)
    (state, slots), (plain, _) = make_pool(x, "float32", 16), make_pool(x, "float32", 0)
    accepted = np.full(B, T // 2)
    tokens = (x.q, x.k, x.v, x.a, x.b)
    first = [y[:, : T // 2] for y in tokens]

    def speculate() -> None:
        state.verify(*tokens, slots)
        state.commit(slots, accepted)

    def again() -> None:
        gdr.fused_sigmoid_gating_delta_rule_update(
            x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, plain.pool, slots, use_qk_l2norm_in_kernel=True,
            disable_state_update=True,
        )  # fmt: skip
        plain.prefill(*first, slots)

    took = np.array([[clock(speculate), clock(again)] for _ in range(25)])[5:]
    row = {"suite": "drafts", "case": f"B={B} T={T} float32"}
    return [row | {"impl": impl, "us": round(us, 1)} for impl, us in zip(IMPLS, np.median(took, axis=0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="numpy", choices=("numpy", "numba"))
    backend = parser.parse_args().backend
    os.environ["GDR_CPU"] = backend
    rows = [row for dtype in ("float32", "bfloat16") for B in (1, 8) for row in steps(B, dtype)]
    rows += [row for B in (1, 8) for T in (2, 4, 8) for row in drafts(B, T)]
    named = {"numpy": "NumPy", "numba": "Numba"}[backend]
    device = {"device": f"{thread_count()} cores of {platform.machine()}, a ring with gdr on {named}"}
    write(f"performance-cpu-ring-{backend}", provenance(backend) | device | {"note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
