"""Measure what rounding has made of a pool's states after many steps, in place and with write-back deferred.

    python docs/measure_deferral.py [--backend numpy|cuda]

Writes docs/data/deferral-BACKEND.json: relative RMS error of the states against float64, for every dtype of the states,
gate regime and number of steps.  The inputs are float32, the same for all pools: the error is that of keeping states.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gdr
from gdr.testing import make_inputs, relative_rms, to_library, to_numpy
from provenance import provenance, write

STEPS = (1, 10, 100, 1000, 10_000)
DTYPES = ("float32", "float16", "bfloat16")
GATES = ("none", "slow", "ordinary", "fast")
RINGS = (0, 16)
SHAPE = {"B": 2, "H": 1, "HV": 2, "K": 128, "V": 128}


def measure(backend: str) -> dict[str, Any]:
    """Errors of all pools, which take the same steps side by side."""
    rows = []
    for gates in GATES:
        x = make_inputs(T=max(STEPS), gates=gates, num_slots=SHAPE["B"], seed=1, **SHAPE)
        pools = {(dtype, ring): _pool(x, dtype, ring, backend) for dtype in DTYPES for ring in RINGS}
        slots = np.arange(SHAPE["B"])
        operands = [_place(y, backend) for y in (x.q, x.k, x.v, x.a, x.b)]
        want, done = np.zeros(x.state.shape), 0
        for t in range(max(STEPS)):
            for pool in pools.values():
                pool.step(*(y[:, t] for y in operands), slots)
            if t + 1 in STEPS:
                want, done = _exact(x, want, done, t + 1), t + 1
                for (dtype, ring), pool in pools.items():
                    error = relative_rms(to_numpy(pool.read(slots)), want)
                    rows.append({"gates": gates, "dtype": dtype, "ring": ring, "steps": done, "error": error})
    return provenance(backend) | {"shape": SHAPE, "rows": rows}


def _pool(x: Any, dtype: str, ring: int, backend: str) -> gdr.DeltaRuleState:
    pool = gdr.DeltaRuleState(
        SHAPE["B"],
        SHAPE["HV"],
        SHAPE["K"],
        SHAPE["V"],
        num_k_heads=SHAPE["H"],
        A_log=_place(x.A_log, backend),
        dt_bias=_place(x.dt_bias, backend),
        dtype=dtype,
        ring=ring,
        device="cuda" if backend == "cuda" else "cpu",
    )
    pool.alloc(SHAPE["B"])
    return pool


def _place(x: np.ndarray, backend: str) -> Any:
    return to_library(x, "cupy", "cuda") if backend == "cuda" else x


def _exact(x: Any, states: np.ndarray, first: int, last: int) -> np.ndarray:
    """States after the tokens [first, last), in float64."""
    tokens = [y[:, first:last].astype(np.float64) for y in (x.a, x.q, x.k, x.v, x.b)]
    a, q, k, v, b = tokens
    _, states = gdr.reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, a, x.dt_bias, 1.0, 20.0, q, k, v, b, states, np.arange(SHAPE["B"]), use_qk_l2norm_in_kernel=True
    )
    return states


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="numpy", choices=("numpy", "cuda"))
    args = parser.parse_args()
    if args.backend != "cuda":
        os.environ["GDR_CPU"] = args.backend
    write(f"deferral-{args.backend}", measure(args.backend))


if __name__ == "__main__":
    main()
