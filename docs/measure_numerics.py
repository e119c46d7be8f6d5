"""Measure the error of every operation against float64, by dtype and length: writes docs/data/numerics-BACKEND.json.

    python docs/measure_numerics.py [--backend numpy|numba|cuda]

The inputs of each dtype are rounded to it first, so that the error is the computation's and not the inputs'.
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
from gdr.testing import make_inputs, relative_rms, to_numpy
from provenance import provenance, write

LENGTHS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = ("float32", "float16", "bfloat16")
SHAPE = {"B": 1, "H": 1, "HV": 2, "K": 128, "V": 128}
OPERATIONS = {
    "fused_recurrent": gdr.fused_recurrent_gated_delta_rule,
    "chunk": gdr.chunk_gated_delta_rule,
}


def measure(backend: str) -> dict[str, Any]:
    """Relative RMS errors of o and of the final state for every operation, dtype, gate regime and length."""
    xp = "cupy" if backend == "cuda" else "numpy"
    rows = []
    for gates in ("ordinary", "none"):
        for dtype in DTYPES:
            longest = make_inputs(T=max(LENGTHS), dtype=dtype, gates=gates, seed=1, xp=xp, **SHAPE)
            for length in LENGTHS:
                x = [getattr(longest, name)[:, :length] for name in ("q", "k", "v", "g", "beta")]
                exact = [to_numpy(array).astype(np.float64) for array in x]
                want, want_h = gdr.reference.fused_recurrent_gated_delta_rule(
                    *exact, use_qk_l2norm_in_kernel=True, output_final_state=True
                )
                for name, operation in OPERATIONS.items():
                    o, h = operation(*x, use_qk_l2norm_in_kernel=True, output_final_state=True)
                    rows.append(
                        {
                            "operation": name,
                            "dtype": dtype,
                            "gates": gates,
                            "length": length,
                            "o": relative_rms(to_numpy(o), want),
                            "h": relative_rms(to_numpy(h), want_h),
                        }
                    )
    return provenance(backend) | {"shape": SHAPE, "rows": rows}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="numpy", choices=("numpy", "numba", "cuda"))
    args = parser.parse_args()
    if args.backend != "cuda":
        os.environ["GDR_CPU"] = args.backend
    write(f"numerics-{args.backend}", measure(args.backend))


if __name__ == "__main__":
    main()
