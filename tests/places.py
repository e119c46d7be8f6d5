"""Where a test runs: a backend, and how arrays get there and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gdr import _backends
from gdr.testing import Inputs, to_library, to_numpy

# Relative RMS error that an output or a state of each dtype may have: that of the arithmetic, and for 16 bits
# half a unit in the last place, which a single number may be off by.
RTOL = {"float64": 1e-12, "float32": 2e-6, "float16": 2**-11 + 2e-6, "bfloat16": 2**-8 + 2e-6}
RTOL_CHUNK = RTOL | {"float32": 3e-6}


class Place:
    """One of "numpy" and "numba" (NumPy arrays on the host) or "cuda" (CuPy arrays)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_host = name != "cuda"

    def put(self, x: np.ndarray | None) -> Any:
        """A copy of x here, contiguous."""
        return to_library(x, "numpy", "cpu") if self.on_host else to_library(x, "cupy", "cuda")

    def get(self, x: Any) -> np.ndarray:
        """A copy of x in NumPy."""
        return np.array(to_numpy(x))

    def stream(self) -> AbstractContextManager[Any]:
        """A context whose work goes to a stream of its own, where there are streams."""
        if self.on_host:
            return nullcontext()
        import cupy

        return cupy.cuda.Stream(non_blocking=True)

    def device_mib(self) -> float:
        """What arrays take of a device's memory; 0 on the host."""
        if self.on_host:
            return 0.0
        import cupy

        return cupy.get_default_memory_pool().used_bytes() / 2**20

    def inputs(self, x: Inputs) -> Inputs:
        return x.to("numpy") if self.on_host else x.to("cupy", "cuda")

    def strided(self, x: np.ndarray, *, gap: int = 3, offset: int = 1) -> Any:
        """x inside a larger array of NaN: every axis has a gap but the last, which has stride 1."""
        shape = (*(2 * n for n in x.shape[:-1]), x.shape[-1] + gap)
        base = self.put(
            np.full(shape, np.nan).astype(x.dtype) if x.dtype.kind not in "iu" else np.zeros(shape, x.dtype)
        )
        view = base[(*(slice(0, 2 * n, 2) for n in x.shape[:-1]), slice(offset, offset + x.shape[-1]))]
        view[...] = self.put(x)
        return view

    def poisoned(self, x: np.ndarray) -> Any:
        """An array like x, full of NaN."""
        return self.put(np.full(x.shape, np.nan).astype(x.dtype))


def sequence(x: Inputs, n: int) -> Inputs:
    """Sequence n of a problem as a batch of one; its slot is 0 of a pool of one."""
    if x.cu_seqlens is None:
        rows, tokens = slice(n, n + 1), slice(None)
    else:
        rows, tokens = slice(None), slice(int(x.cu_seqlens[n]), int(x.cu_seqlens[n + 1]))
    per_token = {name: getattr(x, name)[rows, tokens].copy() for name in ("q", "k", "v", "a", "b", "g", "beta")}
    state = x.state[x.slots[n] : x.slots[n] + 1].copy()
    return replace(x, **per_token, state=state, slots=np.zeros(1, np.int32), cu_seqlens=None)


def raw(x: Inputs) -> tuple[Any, ...]:
    """The drop-in's positional arguments up to b."""
    return (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b)


def given(x: Inputs) -> tuple[Any, ...]:
    """The positional arguments of the operations with given gates."""
    return (x.q, x.k, x.v, x.g, x.beta)


def assert_same_bits(got: Any, want: Any, name: str = "result") -> None:
    """Check that two arrays have equal dtypes, shapes and bytes."""
    got, want = np.ascontiguousarray(to_numpy(got)), np.ascontiguousarray(to_numpy(want))
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    same = got.view(np.uint8) == want.view(np.uint8) if got.size else np.ones(1, bool)
    assert same.all(), f"{name}: {np.count_nonzero(~same)} of {same.size} bytes differ"


def fail_runs(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    """Put a function that fails in place of every way in which a state pool runs its calls."""
    patch.setattr(_backends, "run", fail)
    for name, module in list(sys.modules.items()):
        if name.startswith("gdr._numpy_") and hasattr(module, "step"):
            patch.setattr(module, "step", fail)
