"""Decoding in NumPy with deferred write-back: a step reads the states of a pool, and a `Ring` takes the writes.

A product of a vector with a state is bound by reading the state from memory, and the second product with the same
state, of the query after the key, finds it in the cache.  So the old state serves both::

    r_k, r_q = e^g h^T k, e^g h^T q        u = beta (v - r_k)        o = r_q + (q . k) u

The rank-one update ``h = e^g h + k u^T`` is what NumPy is slow at; the ring puts it off until one matrix product
does it for many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from gdr import _threads
from gdr._inputs import Call
from gdr._numpy_gate import gates
from gdr._numpy_scratch import Scratch, scratch_of_its_own
from gdr._numpy_states import (
    Block,
    Shape,
    blocks_of,
    by_key_head,
    for_each,
    heads_a_block,
    is_view,
    put_states,
    states_of,
)
from gdr._numpy_states import read as products
from gdr._ring import Entries, Ring, fold_due, rollback

L2_EPS = 1e-6


class _Tokens(NamedTuple):
    """One token of each of n sequences, normalised and scaled; axes: sequence, key head, (value head,) ..."""

    keys_queries: np.ndarray  # [n, H, 2, K]
    query_on_key: np.ndarray  # q . k, [n, H, 1, 1]
    values: np.ndarray  # [n, H, r, V]
    decays: np.ndarray  # e^g in float64, [n, H, r]
    betas: np.ndarray  # [n, H, r, 1]
    outputs: np.ndarray  # [n, H, r, V], to be filled


class _Drafts(NamedTuple):
    """The draft tokens of each of n sequences, normalised and scaled."""

    keys_queries: np.ndarray  # the keys, then the queries, [n, H, 2 T, K]
    values: np.ndarray  # [n, H, r, T, V]
    decays: np.ndarray  # e^g in float64, [n, H, r, T]
    left: np.ndarray  # what is left at a draft of the state and of each draft, 0 off its path; [n, H, r, T, 1 + T]
    betas: np.ndarray  # [n, H, r, T]
    parents: np.ndarray  # [n, T]
    outputs: np.ndarray  # [n, H, r, T, V], to be filled


def run(call: Call) -> None:
    """Run one token of each sequence of a pool; its ring takes what is to be written into the states."""
    spec, ring = call.spec, call.ring
    slots, live = _live(call)
    fold_due(ring, slots)
    tokens = _load(call, live)
    states = by_key_head(ring.pool, spec)
    # Stored numbers that are computed with as they are need no scratch, however many.
    heads = spec.H if states.dtype == tokens.values.dtype else heads_a_block(spec)
    blocks = blocks_of(spec, slots, slots, ring.pending.fill[slots], heads)

    def work(blocks: Iterator[Block]) -> None:
        with scratch_of_its_own() as scratch, np.errstate(all="ignore"):
            for block in blocks:
                _step(tokens, states, ring.pending, block, spec, scratch)

    for_each(work, blocks, live.size, spec)
    # Until here nothing has changed that a step of these slots would not overwrite.
    rollback(ring, slots)
    advance = [
        partial(ring.pending.advance, block.read, block.pending, tokens.decays[block.rows].reshape(-1, spec.HV))
        for block in blocks
        if block.heads.start == 0
    ]
    if len(advance) == 1:
        advance[0]()
    else:
        _threads.uninterrupted(partial(_call_all, advance))
    _store(call, tokens.outputs, live)


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def verify(call: Call) -> None:
    """Run the draft tokens of each sequence of a pool, and keep what they would write for `commit`."""
    spec, ring = call.spec, call.ring
    slots, live = _live(call)
    drafts = ring.room_for_drafts()
    tokens = _load_drafts(call, live)
    states = by_key_head(ring.pool, spec)
    # Stored numbers that are computed with as they are need no scratch, however many.
    heads = spec.H if states.dtype == tokens.values.dtype else heads_a_block(spec)
    blocks = blocks_of(spec, slots, slots, ring.pending.fill[slots], heads)
    rollback(ring, slots)

    def work(blocks: Iterator[Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _verify(tokens, states, ring, block, spec)

    for_each(work, blocks, live.size, spec)
    drafts.decays[slots, :, 1 : 1 + spec.T] = tokens.decays.reshape(live.size, spec.HV, spec.T)
    ring.parents[slots, : spec.T] = tokens.parents
    drafts.fill[slots] = spec.T
    _store(call, tokens.outputs.reshape(live.size, spec.HV, spec.T, spec.V).swapaxes(1, 2), live)


def _live(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The slots of a call that are no padding, and their rows; the others' outputs are set to 0."""
    live = np.flatnonzero(call.initial_slots >= 0)
    if live.size == call.spec.N:
        return call.initial_slots, live
    call.out[call.initial_slots < 0] = 0
    return call.initial_slots[live], live


def _step(tokens: _Tokens, states: np.ndarray, pending: Entries, block: Block, spec: Shape, scratch: Scratch) -> None:
    """One token of a block of slots, from their states and their pending tokens."""
    kq = tokens.keys_queries[block.rows, block.heads]
    n, heads = kq.shape[:2]
    count = block.pending
    value_heads = _value_heads(block, states)
    decays = pending.decays[block.read, value_heads].reshape(n, heads, states.shape[2], -1)
    decays = (decays * tokens.decays[block.rows, block.heads, :, None]).astype(kq.dtype, copy=False)
    reads = products(kq, states_of(states, block.read, block.heads, kq.dtype, spec, scratch))
    reads *= decays[..., 0, None, None]
    if count:
        reads += _read_entries(kq, pending, block, decays)
    updates = _answer(tokens, block, reads)
    pending.keys[block.read, block.heads, count] = kq[:, :, 0]
    pending.updates[block.read, value_heads, count] = updates.reshape(n, -1, updates.shape[-1])


def _read_entries(x: np.ndarray, pending: Entries, block: Block, decays: np.ndarray) -> np.ndarray:
    """The product of vectors ``[n, H, m, K]`` with what the pending tokens of a block add to the states."""
    n, heads, r = decays.shape[:3]
    count = block.pending
    value_heads = slice(block.heads.start * r, block.heads.stop * r)
    keys = pending.keys[block.read, block.heads, :count]
    updates = pending.updates[block.read, value_heads, :count].reshape(n, heads, r, count, -1)
    weights = np.matmul(x, keys.swapaxes(-1, -2))[:, :, None] * decays[..., None, 1 : 1 + count]
    return np.matmul(weights.astype(x.dtype, copy=False), updates)


def _answer(tokens: _Tokens, block: Block, reads: np.ndarray) -> np.ndarray:
    """What a token writes, from the decayed state's products with key and query; the outputs on the way."""
    updates = tokens.values[block.rows, block.heads] - reads[..., 0, :]
    updates *= tokens.betas[block.rows, block.heads]
    outputs = tokens.query_on_key[block.rows, block.heads] * updates
    outputs += reads[..., 1, :]
    tokens.outputs[block.rows, block.heads] = outputs
    return updates


def _verify(tokens: _Drafts, states: np.ndarray, ring: Ring, block: Block, spec: Shape) -> None:
    """The drafts of a block of slots: all products with the states at once, then what drafts owe to one another.

    A draft sees the state and its ancestors, each with what the decays on the way have left of it.
    """
    kq = tokens.keys_queries[block.rows, block.heads]
    n, heads, T = *kq.shape[:2], kq.shape[2] // 2
    value_heads = _value_heads(block, states)
    reads = np.matmul(kq[:, :, None], states_of(states, block.read, block.heads, kq.dtype, spec))
    decays = ring.pending.decays[block.read, value_heads].reshape(n, heads, states.shape[2], -1)
    reads *= decays[..., 0, None, None]
    if block.pending:
        reads += _read_entries(kq, ring.pending, block, decays)
    left = tokens.left[block.rows, block.heads]
    reads.reshape(n, heads, -1, 2, T, reads.shape[-1])[...] *= left[..., None, :, :1]
    keys = kq[:, :, :T]
    weights = np.matmul(kq, keys.swapaxes(-1, -2)).reshape(n, heads, 1, 2, T, T) * left[..., None, :, 1:]
    weights = weights.astype(kq.dtype, copy=False)
    values, betas = tokens.values[block.rows, block.heads], tokens.betas[block.rows, block.heads]
    reads = reads.reshape(n, heads, -1, 2, T, reads.shape[-1])
    updates = np.matmul(_inverse(weights[..., 0, :, :], betas), (values - reads[..., 0, :, :]) * betas[..., None])
    outputs = np.matmul(weights[..., 1, :, :], updates)
    outputs += reads[..., 1, :, :]
    bad = ~np.isfinite(updates).all(axis=(-2, -1))
    if bad.any():
        # A product of matrices carries what is not finite from a draft to others that do not follow it.
        seen = np.where(left[..., None, :, 1:] != 0, weights, 0)
        updates[bad], outputs[bad] = _one_by_one(reads[bad], seen[bad], values[bad], betas[bad])
    tokens.outputs[block.rows, block.heads] = outputs
    drafts = ring.room_for_drafts()
    drafts.keys[block.read, block.heads, :T] = keys
    drafts.updates[block.read, value_heads, :T] = updates.reshape(n, -1, T, updates.shape[-1])


def _inverse(weights: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """``(I + beta * strictly lower part of weights)^-1`` for ``[..., T, T]``, by substitution."""
    T = weights.shape[-1]
    inverse = np.zeros_like(weights)
    inverse[..., np.arange(T), np.arange(T)] = 1
    weights = weights * -betas[..., None]
    for t in range(1, T):
        np.matmul(weights[..., t : t + 1, :t], inverse[..., :t, :t], out=inverse[..., t : t + 1, :t])
    return inverse


def _one_by_one(
    reads: np.ndarray, weights: np.ndarray, values: np.ndarray, betas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Updates and outputs of the drafts of heads ``[m, T, V]``, each from drafts of weight other than 0 alone."""
    updates, outputs = np.empty_like(values), np.empty_like(values)
    for t in range(values.shape[-2]):
        seen = weights[..., t, :t, None]
        seen = reads[..., t, :] + np.where(seen != 0, seen * updates[..., None, :t, :], 0).sum(axis=-2)
        updates[..., t, :] = (values[..., t, :] - seen[..., 0, :]) * betas[..., t, None]
        outputs[..., t, :] = seen[..., 1, :] + weights[..., 1, t, t, None] * updates[..., t, :]
    return updates, outputs


def _value_heads(block: Block, states: np.ndarray) -> slice:
    return slice(block.heads.start * states.shape[2], block.heads.stop * states.shape[2])


class _Pool(NamedTuple):
    """How the states of a pool are stored: a `Shape`."""

    H: int
    HV: int
    K: int
    V: int
    layout: str
    compute: str


def write(
    ring: Ring,
    pool: np.ndarray,
    targets: np.ndarray,
    entries: Entries,
    rows: np.ndarray,
    written: Entries | None = None,
) -> None:
    """Write tokens, rows of `entries`, into states, `targets` of an array like the ring's pool.

    The rows `targets` of `written` add nothing any more where they have been written: should a later block fail, all
    can be done again.
    """
    H, _, K = entries.keys.shape[1:]
    HV, _, V = entries.updates.shape[1:]
    spec = _Pool(H, HV, K, V, ring.layout, ring.dtype.name)
    states = by_key_head(pool, spec)

    def work(blocks: Iterator[Block]) -> None:
        with scratch_of_its_own() as scratch, np.errstate(all="ignore"):
            for block in blocks:
                _write_block(states, entries, block, ring.dtype, spec, scratch)
                if written is not None:
                    written.neutralise(block.write, _value_heads(block, states))

    blocks = blocks_of(spec, rows, targets, entries.fill[rows], heads_a_block(spec))
    for_each(work, blocks, rows.size, spec)


def _write_block(
    states: np.ndarray, entries: Entries, block: Block, dtype: np.dtype, spec: Shape, scratch: Scratch
) -> None:
    n = block.pending
    value_heads = _value_heads(block, states)
    h = states_of(states, block.write, block.heads, dtype, spec, scratch)
    keys = entries.keys[block.read, block.heads, None, :n]
    decays = entries.decays[block.read, value_heads].reshape(*h.shape[:3], -1, 1).astype(dtype)
    updates = entries.updates[block.read, value_heads, :n].reshape(*h.shape[:3], n, -1)
    written = scratch.take("written", h.shape, dtype)
    np.matmul(keys.swapaxes(-1, -2), updates * decays[..., 1 : 1 + n, :], out=written)
    if is_view(states, block._replace(read=block.write), dtype):
        h *= decays[..., :1, :]
        h += written
    else:
        h *= decays[..., :1, :]  # a copy
        written += h
        put_states(states, block.write, block.heads, written, spec)


def _load(call: Call, rows: np.ndarray) -> _Tokens:
    """The tokens of some rows of a call."""
    spec = call.spec
    n, r = rows.size, spec.HV // spec.H
    g, beta = gates(call)
    kq = _keys_queries(call, rows)
    with np.errstate(all="ignore"):
        query_on_key = np.matmul(kq[:, :, :1], kq[:, :, 1, :, None])
        decays = np.exp(_take(call, g, rows)[:, 0].astype(np.float64))
    values = _take(call, call.v, rows).reshape(n, spec.H, r, spec.V)
    direct = n == spec.N and call.out.dtype == values.dtype and call.out.flags.c_contiguous
    outputs = call.out.reshape(values.shape) if direct else np.empty_like(values)
    betas = _take(call, beta, rows).reshape(n, spec.H, r, 1)
    return _Tokens(kq, query_on_key, values, decays.reshape(n, spec.H, r), betas, outputs)


def _load_drafts(call: Call, rows: np.ndarray) -> _Drafts:
    """The draft tokens of some rows of a call."""
    spec = call.spec
    n, T, r = rows.size, spec.T, spec.HV // spec.H
    g, beta = gates(call)
    parents = np.broadcast_to(np.arange(-1, T - 1), (n, T)) if call.parents is None else call.parents[rows]

    def by_head(x: np.ndarray) -> np.ndarray:
        """``[n, T, HV, ...]`` as ``[n, H, r, T, ...]``, contiguous."""
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(n, spec.H, r, T, *x.shape[3:])

    with np.errstate(all="ignore"):
        kq = _keys_queries(call, rows)
        decays = by_head(np.exp(_take(call, g, rows).astype(np.float64)))
        # Row 0 is the state itself, and row 1 + t what draft t sees; what it sees last is itself.
        left = np.zeros((n, spec.H, r, 1 + T, 1 + T))
        left[..., 0, 0] = 1
        for t in range(T):
            before = left[np.arange(n), :, :, 1 + parents[:, t]]
            left[..., 1 + t, :] = before * decays[..., t, None]
            left[..., 1 + t, 1 + t] = 1
    values = by_head(_take(call, call.v, rows))
    betas = by_head(_take(call, beta, rows))
    return _Drafts(kq, values, decays, left[..., 1:, :], betas, parents, np.empty_like(values))


def _take(call: Call, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an operand, in the dtype of the arithmetic."""
    # Always contiguous: neither strides nor the place in a batch may decide which loop computes a sequence.
    return np.ascontiguousarray(x if rows.size == call.spec.N else x[rows], call.spec.compute)


def _keys_queries(call: Call, rows: np.ndarray) -> np.ndarray:
    """The keys of some rows, then their queries, normalised and scaled: ``[n, H, 2 T, K]``."""
    spec = call.spec
    T, dtype = spec.T, np.dtype(spec.compute)
    whole = rows.size == spec.N
    kq = np.empty((rows.size, spec.H, 2 * T, spec.K), dtype)
    kq[:, :, :T] = (call.k if whole else call.k[rows]).swapaxes(1, 2)
    kq[:, :, T:] = (call.q if whole else call.q[rows]).swapaxes(1, 2)
    with np.errstate(all="ignore"):
        if spec.l2norm:
            weights = np.matmul(kq[..., None, :], kq[..., None])[..., 0]
            weights += dtype.type(L2_EPS)
            np.sqrt(weights, out=weights)
            np.reciprocal(weights, out=weights)
            weights[:, :, T:] *= dtype.type(call.scale)
            kq *= weights
        else:
            kq[:, :, T:] *= dtype.type(call.scale)
    return kq


def _store(call: Call, outputs: np.ndarray, rows: np.ndarray) -> None:
    """Put outputs, ``[n, T, HV, V]`` in some grouping of heads, where they belong."""
    if not np.may_share_memory(outputs, call.out):
        with np.errstate(all="ignore"):
            call.out[rows] = outputs.reshape(rows.size, *call.out.shape[1:])
