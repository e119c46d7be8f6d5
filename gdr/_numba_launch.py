"""From a call to the Numba kernels: operands as contiguous arrays, states as flat ones, heads over threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from gdr import _arrays, _threads
from gdr._inputs import Call
from gdr._numba_kernels import convert, run_heads, run_heads_parallel
from gdr._spec import Spec

# Below this many multiplications a second thread costs more than it brings.
THREADING_THRESHOLD = 200_000
# What 16-bit numbers are passed as.
_BITS = {"bfloat16": np.uint16, "float16": np.int16}

# One parallel region at a time: not every threading layer of Numba takes calls from several threads.
_parallel = threading.Lock()
_forked = False


def _after_fork() -> None:
    # OpenMP ends a forked child that enters a parallel region after its parent had.
    global _parallel, _forked
    _parallel, _forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(call: Call, tile: int) -> None:
    """Fill ``call.out`` and ``call.final_state``, up to `tile` tokens at a time."""
    spec = call.spec
    plan = spec.plan.get("numba")
    if plan is None:
        plan = spec.plan["numba"] = _Plan(call)
    dtype, tokens = plan.dtype, plan.tokens
    q = contiguous(call.q, dtype).reshape(tokens, spec.H, spec.K)
    k = contiguous(call.k, dtype).reshape(tokens, spec.H, spec.K)
    v = contiguous(call.v, dtype).reshape(tokens, spec.HV, spec.V)
    if plan.raw:
        a, b, A_log, dt_bias = call.a, call.b, contiguous(call.A_log, dtype), contiguous(call.dt_bias, dtype)
    else:
        a, b, A_log, dt_bias = call.g, call.beta, plan.nothing, plan.nothing
    a = contiguous(a, dtype).reshape(tokens, spec.HV)
    b = contiguous(b, dtype).reshape(tokens, spec.HV)
    out = call.out
    if out.dtype != dtype or not out.flags.c_contiguous:
        out = np.empty(out.shape, dtype)
    rows = plan.rows
    if rows is None or call.initial_slots is not None or call.final_slots is not None:
        rows = _rows(call)
    if plan.as_stored:
        states = plan.stored_states(call)
    else:
        rows, copied_rows = _rows_of_copies(rows), rows
        states = plan.copied_states(call, copied_rows)
    initial, initial_strides, final, final_strides, in_place = states
    arguments = (
        rows, q, k, v, out.reshape(tokens, spec.HV, spec.V), plan.raw, A_log, dt_bias, a, b, call.scale,
        call.softplus_beta, call.softplus_threshold, plan.l2norm, initial, initial_strides, final,
        final_strides, plan.has_initial, plan.has_final, in_place, plan.transposed, tile,
    )  # fmt: skip
    launch(run_heads, run_heads_parallel, plan.units, plan.worth_threads, lambda n: plan.bounds(n, rows), arguments)
    if not plan.as_stored and plan.has_final:
        _store_copies(call, copied_rows, final)
    if out is not call.out:
        assign(call.out, out)


class _Plan:
    """What the calls with one signature share."""

    def __init__(self, call: Call) -> None:
        spec = call.spec
        self.dtype = np.dtype(spec.compute)
        self.tokens = spec.B * spec.T
        self.heads = spec.HV
        self.units = spec.N * spec.HV
        self.raw = spec.gates == "raw"
        self.l2norm = spec.l2norm
        self.transposed = spec.layout == "vk"
        self.has_initial = spec.initial_dtype is not None
        self.has_final = spec.final_dtype is not None
        self.nothing = np.zeros(0, self.dtype)
        head = spec.K * spec.V
        self.worth_threads = self.tokens * spec.HV * head >= THREADING_THRESHOLD
        self.copies_shape = (spec.N, spec.HV, *((spec.V, spec.K) if self.transposed else (spec.K, spec.V)))
        self.copies_strides = np.array([spec.HV * head, head, spec.N])
        self.uniform = not spec.varlen
        self.rows: np.ndarray | None = None
        if self.uniform:
            self.rows = np.empty((spec.N, 4), np.int64)
            self.rows[:] = np.arange(spec.N)[:, None]
            self.rows[:, :2] *= spec.T
            self.rows[:, 1] += spec.T
        self.strides = {}
        for name in ("initial_state", "final_state"):
            if name in spec.strides and (name == "initial_state") <= self.has_initial:
                slots, (row, head, *_) = spec.shapes[name][0], spec.strides[name]
                self.strides[name] = np.array([row, head, slots])
        self.as_stored = all(
            _has_dense_heads(spec, name) and _arrays.of_whole_elements(getattr(call, name)) for name in self.strides
        ) and (not (self.has_initial and self.has_final) or spec.initial_dtype == spec.final_dtype)
        self._bounds: dict[int, np.ndarray] = {}

    def stored_states(self, call: Call) -> tuple[Any, ...]:
        """The states where they are: flat arrays, their strides, and whether the two are one."""
        initial = flat(call.initial_state) if self.has_initial else None
        in_place = self.has_final and call.final_state is call.initial_state
        final = initial if in_place else flat(call.final_state) if self.has_final else None
        strides = self.strides
        if final is None and initial is None:
            return self.nothing, self.copies_strides, self.nothing, self.copies_strides, False
        if initial is None:
            return final, strides["final_state"], final, strides["final_state"], False
        if final is None:
            return initial, strides["initial_state"], initial, strides["initial_state"], False
        return initial, strides["initial_state"], final, strides["final_state"], in_place

    def copied_states(self, call: Call, rows: np.ndarray) -> tuple[Any, ...]:
        """Contiguous copies of the states that the rows read, as numbers to compute with."""
        final = np.empty(self.copies_shape, self.dtype)
        initial = final
        if self.has_initial:
            initial = np.empty(self.copies_shape, self.dtype)
            for n in np.flatnonzero(_is_live(rows)).tolist():
                initial[n] = call.initial_state[rows[n, 2]]
        return initial.reshape(-1), self.copies_strides, final.reshape(-1), self.copies_strides, False

    def bounds(self, workers: int, rows: np.ndarray) -> np.ndarray:
        """The units at which each worker starts, and their end."""
        if self.uniform:
            if workers not in self._bounds:
                self._bounds[workers] = np.arange(workers + 1) * self.units // workers
            return self._bounds[workers]
        costs = np.repeat(rows[:, 1] - rows[:, 0] + 1, self.heads).cumsum()
        return np.searchsorted(costs, np.arange(workers + 1) * costs[-1] // workers, "right")


def _has_dense_heads(spec: Spec, name: str) -> bool:
    """Whether each head's state is one block of memory, so that a flat view and two strides describe the array."""
    shape, strides = spec.shapes[name], spec.strides[name]
    inner = strides[3] in (1, shape[3] * 0 + 1) or shape[3] == 1
    return inner and (strides[2] == shape[3] or shape[2] == 1) and min(strides) >= 0


def launch(
    kernel: Callable[..., None],
    parallel: Callable[..., None],
    units: int,
    worth_threads: bool,
    bounds: Callable[[int], np.ndarray],
    arguments: tuple[Any, ...],
) -> None:
    """Call a kernel for all units, or its parallel form with the `bounds` of as many workers as there are."""
    if worth_threads and not _forked:
        workers = min(_threads.thread_count(), numba.config.NUMBA_NUM_THREADS, units)
        # A thread that finds the others busy with another call does all of its own work.
        if workers > 1 and _parallel.acquire(blocking=False):
            try:
                parallel(bounds(workers), *arguments)
            finally:
                _parallel.release()
            return
    kernel(0, units, *arguments)


def _rows(call: Call) -> np.ndarray:
    """First token, last token plus one, and the state rows read and written, ``[N, 4]``."""
    spec = call.spec
    rows = np.empty((spec.N, 4), np.int64)
    if call.cu_seqlens is None:
        rows[:, :2] = spec.plan["numba"].rows[:, :2]
    else:
        rows[:, 0], rows[:, 1] = call.cu_seqlens[:-1], call.cu_seqlens[1:]
    rows[:, 2] = np.arange(spec.N) if call.initial_slots is None else call.initial_slots
    rows[:, 3] = np.arange(spec.N) if call.final_slots is None else call.final_slots
    if call.final_slots is None and call.final_state is None:
        rows[:, 3] = rows[:, 2]
    return rows


def _is_live(rows: np.ndarray) -> np.ndarray:
    return (rows[:, 2] >= 0) & (rows[:, 3] >= 0)


def _rows_of_copies(rows: np.ndarray) -> np.ndarray:
    copied = rows.copy()
    copied[:, 2:] = np.where(_is_live(rows), np.arange(len(rows)), -1)[:, None]
    return copied


def _store_copies(call: Call, rows: np.ndarray, final: np.ndarray) -> None:
    """Put the final states where they belong; the slot of a sequence without tokens is left alone."""
    states = final.reshape(call.spec.plan["numba"].copies_shape)
    in_place = call.final_state is call.initial_state
    for n in np.flatnonzero(_is_live(rows)).tolist():
        bos, eos, read, write = rows[n].tolist()
        if bos < eos or not (in_place and read == write):
            call.final_state[write] = states[n]


def flat(x: np.ndarray) -> np.ndarray:
    """A flat view of a state array that starts where it starts and spans all of it; 16-bit numbers as bits."""
    bits = _BITS.get(x.dtype.name) if x.itemsize == 2 else None  # a dtype's name takes microseconds
    if bits is not None:
        x = x.view(bits)
    if not x.flags.writeable:
        x = _as_writable(x)
    if x.flags.c_contiguous:
        return x.reshape(-1)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides)) // x.itemsize if x.size else 0
    return np.lib.stride_tricks.as_strided(x, (span,), (x.itemsize,))


def _as_writable(x: np.ndarray) -> np.ndarray:
    """The same memory without the read-only flag, which Numba would compile another kernel for."""
    if not x.size:
        return np.empty(x.shape, x.dtype)
    span = x.itemsize + sum((n - 1) * s for n, s in zip(x.shape, x.strides))
    memory = (ctypes.c_char * span).from_address(x.ctypes.data)
    return np.ndarray(x.shape, x.dtype, memory, 0, x.strides)


def contiguous(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if x.dtype == dtype:
        flags = x.flags
        if flags.c_contiguous and flags.writeable:
            return x
    bits = _BITS.get(x.dtype.name) if x.dtype != dtype else None
    if bits is None or dtype != np.float32:
        x = np.ascontiguousarray(x, dtype)
        return x if x.flags.writeable else x.copy()
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = x.copy()
    target = np.empty(x.shape, dtype)
    convert(x.view(bits).reshape(-1), target.reshape(-1))
    return target


def assign(target: np.ndarray, x: np.ndarray) -> None:
    """Copy `x` into `target`, rounded to its dtype."""
    bits = _BITS.get(target.dtype.name)
    if bits is None or x.dtype != np.float32:
        target[...] = x
        return
    rounded = target.view(bits) if target.flags.c_contiguous else np.empty(x.shape, bits)
    convert(x.reshape(-1), rounded.reshape(-1))
    if not target.flags.c_contiguous:
        target.view(bits)[...] = rounded
