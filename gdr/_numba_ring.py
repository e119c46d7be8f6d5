"""Steps with deferred write-back, and drafts, with Numba."""

from __future__ import annotations

from functools import partial

import numpy as np

from gdr._inputs import Call
from gdr._numba_kernels import run_apart, run_apart_parallel, write_entries, write_entries_parallel
from gdr._numba_launch import THREADING_THRESHOLD, assign, contiguous, flat, launch
from gdr._ring import Entries, Ring, fold_due, rollback


def run(call: Call) -> None:
    """Run one token of each sequence of a pool; its ring takes what is to be written into the states."""
    ring, slots = call.ring, call.initial_slots[call.initial_slots >= 0]
    fold_due(ring, slots)
    rollback(ring, slots)
    _run(call, ring.pending)


def verify(call: Call) -> None:
    """Run the draft tokens of each sequence of a pool, and keep what they would write for `commit`."""
    ring, slots, T = call.ring, call.initial_slots, call.spec.T
    drafts = ring.room_for_drafts()
    live = slots >= 0
    rollback(ring, slots)
    parents = np.tile(np.arange(-1, T - 1), (slots.size, 1)) if call.parents is None else call.parents
    ring.parents[slots[live], :T] = parents[live]
    _run(call, drafts, parents)


def write(
    ring: Ring,
    pool: np.ndarray,
    targets: np.ndarray,
    entries: Entries,
    rows: np.ndarray,
    written: Entries | None = None,
) -> None:
    """Write tokens, rows of `entries`, into states, `targets` of an array like the ring's pool.

    Nothing can fail half-way, so that the tokens in `written` need not be marked one by one.
    """
    units = rows.size * pool.shape[1]
    launch(
        write_entries,
        write_entries_parallel,
        units,
        units * pool[0, 0].size >= THREADING_THRESHOLD,
        partial(_split, units),
        (targets, rows, flat(pool), ring.layout == "vk", entries.keys, entries.updates, entries.decays, entries.fill),
    )


def _split(units: int, workers: int) -> np.ndarray:
    return np.arange(workers + 1) * units // workers


def _run(call: Call, to: Entries, parents: np.ndarray | None = None) -> None:
    """Fill ``call.out``, and `to` with what the tokens would write; in one call, which nothing can interrupt."""
    spec, ring = call.spec, call.ring
    dtype, tokens = np.dtype(spec.compute), spec.N * spec.T
    q, k = (contiguous(x, dtype).reshape(tokens, spec.H, spec.K) for x in (call.q, call.k))
    v = contiguous(call.v, dtype).reshape(tokens, spec.HV, spec.V)
    a, b = (contiguous(x, dtype).reshape(tokens, spec.HV) for x in (call.a, call.b))
    out = call.out
    if out.dtype != dtype or not out.flags.c_contiguous:
        out = np.empty(out.shape, dtype)
    pending, units = ring.pending, spec.N * spec.HV
    draft = parents is not None
    arguments = (
        call.initial_slots, q, k, v, out.reshape(tokens, spec.HV, spec.V), contiguous(call.A_log, dtype),
        contiguous(call.dt_bias, dtype), a, b, call.scale, call.softplus_beta, call.softplus_threshold,
        spec.l2norm, flat(ring.pool), spec.layout == "vk", pending.fill[call.initial_slots], pending.keys,
        pending.updates, pending.decays, draft, np.zeros((spec.N, 1), np.int64) if parents is None else parents,
        call.parents is not None, to.keys, to.updates, to.decays,
        to.fill,
    )  # fmt: skip
    launch(
        run_apart,
        run_apart_parallel,
        units,
        tokens * spec.HV * spec.K * spec.V >= THREADING_THRESHOLD,
        partial(_split, units),
        arguments,
    )
    if out is not call.out:
        assign(call.out, out)
