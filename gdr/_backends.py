"""Which module runs a call: the operation's stem on the call's device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache

from gdr._inputs import Call

_runners: dict[tuple[str, str], Callable[[Call], None]] = {}


def run(call: Call) -> None:
    """Run a checked call on its backend; fills the call's outputs."""
    if call.spec.device != "cpu":
        backend = "cuda"
    elif call.spec.op == "gate":
        backend = "numpy"
    else:
        backend = cpu_backend()
    runner = _runners.get((backend, call.spec.op))
    if runner is None:
        runner = importlib.import_module(f"gdr._{backend}_{call.spec.op}").run
        _runners[backend, call.spec.op] = runner
    runner(call)


def cpu_backend() -> str:
    """Name of the CPU's backend, "numpy" or "numba": what GDR_CPU says, else numba where it is installed."""
    chosen = os.environ.get("GDR_CPU", "")
    if chosen not in ("", "numpy", "numba"):
        raise ValueError(f"GDR_CPU: expected 'numpy' or 'numba', got {chosen!r}")
    if chosen == "numpy":
        return "numpy"
    return "numba" if chosen == "numba" or _numba_installed() else "numpy"


@lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None
