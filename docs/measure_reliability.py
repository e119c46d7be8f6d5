"""Run the searches of the test suite at length and count what they tried: writes
docs/data/reliability-BACKEND.json.

    python docs/measure_reliability.py [--backend numpy|numba|cuda] [--seconds 120] [--calls 10000]
    [--examples 300]

A run that finds a fault raises and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]

from provenance import provenance, write

PARTS = 12  # of the random calls of an operation, for as many processes


def load(backend: str, seconds: float, threads: int) -> dict[str, Any]:
    """Continuous batching: what was done, and the largest error of the sequences that were run again."""
    import test_load
    from places import Place

    return {"seconds": seconds} | test_load.serve(Place(backend), seconds, threads)


def model(backend: str, examples: int) -> dict[str, int]:
    """Random sequences of operations on a pool, each compared with the model after every operation."""
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test
    from places import Place
    from test_state_model import StatePool

    machine = type("Machine", (StatePool,), {"place": Place(backend)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=100, deadline=None, database=None)
    )
    return {"examples": examples, "operations": machine.operations}


def fuzz(backend: str, operation: str, seeds: range) -> int:
    """Random calls, most of them malformed: how many were refused; the others were answered rightly."""
    import test_fuzz

    import gdr

    run = test_fuzz.run_one_on_a_device if backend == "cuda" else test_fuzz.run_one
    return test_fuzz.search(getattr(gdr, operation), seeds, run)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["numpy", "numba", "cuda"], default="numpy")
    parser.add_argument("--seconds", type=float, default=120.0, help="of load")
    parser.add_argument("--threads", type=int, default=2, help="with a pool each, under load")
    parser.add_argument("--calls", type=int, default=10_000, help="random calls of each operation")
    parser.add_argument("--examples", type=int, default=300, help="random sequences of operations on a pool")
    options = parser.parse_args()
    if options.backend != "cuda":
        os.environ["GDR_CPU"] = options.backend

    import test_fuzz

    backend, calls = options.backend, options.calls
    result = provenance(backend)
    # The host's cores are for one search at a time; on a device most of the time goes to the compiler.
    with ProcessPoolExecutor(os.cpu_count() if backend == "cuda" else 1, get_context("spawn")) as pool:
        parts = {"load": pool.submit(load, backend, options.seconds, options.threads)}
        parts["model"] = pool.submit(model, backend, options.examples)
        refusals = {
            operation.__name__: [
                pool.submit(fuzz, backend, operation.__name__, range(n, calls, PARTS)) for n in range(PARTS)
            ]
            for operation in test_fuzz.OPERATIONS
        }
        result |= {name: part.result() for name, part in parts.items()}
        refused = {name: sum(part.result() for part in parts) for name, parts in refusals.items()}
    result["fuzz"] = {
        name: {"calls": calls, "refused": count, "answered": calls - count} for name, count in refused.items()
    }
    write(f"reliability-{options.backend}", result)


if __name__ == "__main__":
    main()
