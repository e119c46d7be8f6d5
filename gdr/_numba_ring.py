"""Steps with deferred write-back, and drafts, with Numba; what else is done with a ring is NumPy's."""

from __future__ import annotations

import numpy as np

from gdr._inputs import Call
from gdr._numba_kernels import run_apart, run_apart_parallel
from gdr._numba_launch import THREADING_THRESHOLD, assign, contiguous, flat, launch
from gdr._numpy_ring import fold_due, rollback
from gdr._ring import Entries


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
        lambda workers: np.arange(workers + 1) * units // workers,
        arguments,
    )
    if out is not call.out:
        assign(call.out, out)
