"""Run the searches of the test suite at length and count what they tried: writes
docs/data/reliability-BACKEND.json.

    python docs/measure_reliability.py [--backend numpy|numba|cuda] [--seconds 120] [--calls 10000]
    [--examples 300]

A run that finds a fault raises and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]


def fuzz(calls: int) -> dict[str, Any]:
    """Random calls, most of them malformed: how many were refused, and how many answered rightly."""
    import warnings

    import test_fuzz

    import gdr

    done = {}
    for operation in (
        gdr.fused_sigmoid_gating_delta_rule_update,
        gdr.fused_recurrent_gated_delta_rule,
        gdr.chunk_gated_delta_rule,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused = sum(test_fuzz.run_one(operation, seed) for seed in range(calls))
        done[operation.__name__] = {"calls": calls, "refused": refused, "answered": calls - refused}
    return done


def model(place: Any, examples: int) -> dict[str, int]:
    """Random sequences of operations on a pool, each compared with the model after every operation."""
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test
    from test_state_model import StatePool

    machine = type("Machine", (StatePool,), {"place": place})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=100, deadline=None, database=None)
    )
    return {"examples": examples, "operations": machine.operations}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["numpy", "numba", "cuda"], default="numpy")
    parser.add_argument("--seconds", type=float, default=120.0, help="of load")
    parser.add_argument("--threads", type=int, default=2, help="with a pool each, under load")
    parser.add_argument("--calls", type=int, default=10_000, help="random calls of each operation (on the host)")
    parser.add_argument("--examples", type=int, default=300, help="random sequences of operations on a pool")
    options = parser.parse_args()
    if options.backend != "cuda":
        os.environ["GDR_CPU"] = options.backend

    import test_load
    from places import Place

    import gdr

    place = Place(options.backend)
    result: dict[str, Any] = {"version": gdr.__version__, "machine": platform.machine(), "backend": options.backend}
    result["load"] = {"seconds": options.seconds} | test_load.serve(place, options.seconds, options.threads)
    result["model"] = model(place, options.examples)
    if place.on_host:
        result["fuzz"] = fuzz(options.calls)
    path = HERE / "data" / f"reliability-{options.backend}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
