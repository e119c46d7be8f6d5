"""Which module runs a call: the operation's stem on the call's device."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from gdr import _inputs, _threads
from gdr._inputs import Call
from gdr._spec import OPERANDS, Form, Spec

# Mean number of tokens a sequence from which the chunkwise form is done sooner than the recurrent one.  On CUDA the
# launcher of chunks keeps to it, to more in float32 and to less where packed sequences may hide a long one; below it,
# `chunk_gated_delta_rule` runs the recurrence.
CHUNK_FROM = {"cpu": 16, "cuda": 20}

_runners: dict[tuple[str, str, str], Callable[[Call], None]] = {}


class _Thread(threading.local):
    planning = False


_thread = _Thread()


def run(call: Call) -> None:
    """Run a checked call on its backend; fills the call's outputs."""
    if call.ring is None:
        name = backend(call.spec)
        key = name, call.spec.op, "run"
    else:
        name = backend(call.spec)
        key = name, "ring", "verify" if call.draft else "run"
    if _thread.planning:
        raise Planned(call)
    runner = _runners.get(key)
    if runner is None:
        runner = _runners[key] = getattr(importlib.import_module("gdr._{}_{}".format(*key)), key[2])
    # A compiled kernel is not interrupted anyway, and the tokens of a ring count all at once.
    if call.whole and name == "numpy" and call.ring is None:
        _threads.uninterrupted(partial(runner, call))
    else:
        runner(call)


def perform(
    form: Form, operands: tuple[Any, ...], options: tuple[Any, ...], workspace: Any | None = None
) -> tuple[Any, Any]:
    """Check and run a call; see `_inputs.recognize` for the arguments.

    Returns
    -------
    out, final_state
        In the caller's kind; the state where it was allocated for the call, else None.
    """
    checked = _inputs.recognize(form, operands, options)
    # Calls that were seen before, and need nothing of a `Call`, go from their operands to the launch.
    launch = checked.spec.plan.get("launch")
    if launch is not None and workspace is None and not _thread.planning:
        return launch(operands)
    call = _inputs.describe_call(checked, form, operands)
    if workspace is not None:
        _inputs.check_workspace(call, workspace)
    run(call)
    if checked.spec.native and not checked.checks_values:
        launcher = getattr(module(checked.spec), "launcher", None)
        if launcher is not None:
            checked.spec.plan["launch"] = launcher(checked, form)
    release = call.library.release
    given = operands[OPERANDS.index("out")]
    out = release(call.out) if given is None else given
    return out, release(call.final_state) if checked.allocates_state else None


def backend(spec: Spec) -> str:
    """Name of the backend that runs calls with this `Spec`: "cuda", "numpy" or "numba"."""
    if spec.device != "cpu":
        return "cuda"
    return "numpy" if spec.op == "gate" else cpu_backend()


def ring_module(device: str | int) -> Any:
    """The module with `Ring` and all that is done with one but to run tokens, which the backend of a call does."""
    return importlib.import_module("gdr._ring" if device == "cpu" else "gdr._cuda_ring")


def module(spec: Spec) -> Any:
    """The module of the backend."""
    return importlib.import_module(f"gdr._{backend(spec)}_{spec.op}")


class Planned(Exception):
    """Carries the call that would have run, instead of running it."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.call = call


def is_planning() -> bool:
    """Whether calls of this thread only say what they would run."""
    return _thread.planning


@contextmanager
def planning() -> Iterator[None]:
    """Within it, calls of this thread raise `Planned` where they would run."""
    _thread.planning = True
    try:
        yield
    finally:
        _thread.planning = False


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
