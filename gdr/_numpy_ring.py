"""Decoding in NumPy with deferred write-back: a step reads the states of a pool, and a `Ring` takes the writes.

A product of a vector with a state is bound by reading the state from memory, and the second product with the same
state, of the query after the key, finds it in the cache.  So the old state serves both::

    r_k, r_q = e^g h^T k, e^g h^T q        u = beta (v - r_k)        o = r_q + (q . k) u

The rank-one update ``h = e^g h + k u^T`` is what NumPy is slow at; the ring puts it off until one matrix product
does it for many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gdr._inputs import Call
from gdr._numpy_gate import gates
from gdr._numpy_states import (
    Block,
    Shape,
    blocks_of,
    by_key_head,
    for_each,
    heads_a_block,
    is_view,
    read,
    states_of,
)
from gdr._ring import Ring

L2_EPS = 1e-6


class _Tokens(NamedTuple):
    """One token of each of n sequences, normalised and scaled; axes: sequence, key head, (value head,) ..."""

    keys_queries: np.ndarray  # [n, H, 2, K]
    query_on_key: np.ndarray  # q . k, [n, H, 1, 1]
    values: np.ndarray  # [n, H, r, V]
    decays: np.ndarray  # e^g in float64, [n, H, r]
    betas: np.ndarray  # [n, H, r, 1]
    outputs: np.ndarray  # [n, H, r, V], to be filled


def run(call: Call) -> None:
    """Run one token of each sequence of a pool; its ring takes what is to be written into the states."""
    spec, ring = call.spec, call.ring
    slots = call.initial_slots
    live = np.flatnonzero(slots >= 0)
    if live.size < spec.N:
        call.out[slots < 0] = 0
        slots = slots[live]
    full = slots[ring.fill[slots] == ring.capacity]
    if full.size:
        fold(ring, call.initial_state, spec.layout, full)
    tokens = _load(call, live)
    states = by_key_head(call.initial_state, spec)
    # Stored numbers that are computed with as they are need no scratch, however many.
    heads = spec.H if states.dtype == ring.keys.dtype else heads_a_block(spec)
    blocks = blocks_of(spec, slots, slots, ring.fill[slots], heads)

    def work(blocks: Iterator[Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _step(tokens, states, ring, block, spec)

    for_each(work, blocks, live.size, spec)
    # Until here nothing has changed that a step of these slots would not overwrite.
    for block in (block for block in blocks if block.heads.start == 0):
        ring.advance(block.read, block.pending, tokens.decays[block.rows].reshape(-1, spec.HV))
    _store(call, tokens, live)


def _step(tokens: _Tokens, states: np.ndarray, ring: Ring, block: Block, spec: Shape) -> None:
    """One token of a block of slots, from their states and their rings."""
    kq = tokens.keys_queries[block.rows, block.heads]
    n, heads = kq.shape[:2]
    count = block.pending
    value_heads = slice(block.heads.start * states.shape[2], block.heads.stop * states.shape[2])
    decays = ring.decays[block.read, value_heads].reshape(n, heads, -1, 1 + ring.capacity)
    decays = decays * tokens.decays[block.rows, block.heads, :, None]
    reads = read(kq, states_of(states, block.read, block.heads, kq.dtype, spec))
    reads *= decays[..., 0, None, None]
    if count:
        keys = ring.keys[block.read, block.heads, :count]
        updates = ring.updates[block.read, value_heads, :count].reshape(*decays.shape[:3], count, -1)
        weights = np.matmul(kq, keys.swapaxes(-1, -2))[:, :, None] * decays[..., None, 1 : 1 + count]
        reads += np.matmul(weights.astype(kq.dtype, copy=False), updates)
    updates = _answer(tokens, block, reads)
    ring.keys[block.read, block.heads, count] = kq[:, :, 0]
    ring.updates[block.read, value_heads, count] = updates.reshape(n, -1, updates.shape[-1])


def _answer(tokens: _Tokens, block: Block, reads: np.ndarray) -> np.ndarray:
    """What a token writes, from the decayed state's products with key and query; the outputs on the way."""
    updates = tokens.values[block.rows, block.heads] - reads[..., 0, :]
    updates *= tokens.betas[block.rows, block.heads]
    outputs = tokens.query_on_key[block.rows, block.heads] * updates
    outputs += reads[..., 1, :]
    tokens.outputs[block.rows, block.heads] = outputs
    return updates


class _Pool(NamedTuple):
    """How the states of a pool are stored: a `Shape`."""

    H: int
    HV: int
    K: int
    V: int
    layout: str
    compute: str


def fold(ring: Ring, pool: np.ndarray, layout: str, slots: np.ndarray) -> None:
    """Write the pending tokens of slots into their states."""
    H, _, K = ring.keys.shape[1:]
    HV, _, V = ring.updates.shape[1:]
    spec = _Pool(H, HV, K, V, layout, ring.keys.dtype.name)
    states = by_key_head(pool, spec)

    def work(blocks: Iterator[Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _fold(ring, states, block, spec)

    blocks = blocks_of(spec, slots, slots, ring.fill[slots], heads_a_block(spec))
    for_each(work, blocks, slots.size, spec)
    ring.discard(slots)


def _fold(ring: Ring, states: np.ndarray, block: Block, spec: Shape) -> None:
    dtype = ring.keys.dtype
    n, r = block.pending, states.shape[2]
    value_heads = slice(block.heads.start * r, block.heads.stop * r)
    h = states_of(states, block.read, block.heads, dtype, spec)
    keys = ring.keys[block.read, block.heads, None, :n]
    decays = ring.decays[block.read, value_heads].reshape(*h.shape[:3], -1, 1).astype(dtype)
    updates = ring.updates[block.read, value_heads, :n].reshape(*h.shape[:3], n, -1)
    written = np.matmul(keys.swapaxes(-1, -2), updates * decays[..., 1 : 1 + n, :])
    if is_view(states, block, dtype):
        h *= decays[..., :1, :]
        h += written
    else:
        written += h * decays[..., :1, :]
        states[block.write, block.heads] = written if spec.layout == "kv" else written.swapaxes(-1, -2)


def _load(call: Call, rows: np.ndarray) -> _Tokens:
    """The tokens of some rows of a call."""
    spec = call.spec
    dtype = np.dtype(spec.compute)
    n, r = rows.size, spec.HV // spec.H
    whole = n == spec.N
    g, beta = gates(call)

    def take(x: np.ndarray) -> np.ndarray:
        # Always contiguous: neither strides nor the place in a batch may decide which loop computes a sequence.
        return np.ascontiguousarray(x[:, 0] if whole else x[rows, 0], dtype)

    kq = np.empty((n, spec.H, 2, spec.K), dtype)
    kq[:, :, 0] = call.k[:, 0] if whole else call.k[rows, 0]
    kq[:, :, 1] = call.q[:, 0] if whole else call.q[rows, 0]
    with np.errstate(all="ignore"):
        if spec.l2norm:
            weights = np.matmul(kq[..., None, :], kq[..., None])[..., 0]
            weights += dtype.type(L2_EPS)
            np.sqrt(weights, out=weights)
            np.divide(1, weights, out=weights)
            weights[:, :, 1] *= dtype.type(call.scale)
            kq *= weights
        else:
            kq[:, :, 1] *= dtype.type(call.scale)
        query_on_key = np.matmul(kq[:, :, :1], kq[:, :, 1, :, None])
        decays = np.exp(take(g).astype(np.float64))
    values = take(call.v).reshape(n, spec.H, r, spec.V)
    direct = whole and call.out.dtype == dtype and call.out.flags.c_contiguous
    outputs = call.out.reshape(values.shape) if direct else np.empty(values.shape, dtype)
    return _Tokens(kq, query_on_key, values, decays.reshape(n, spec.H, r), take(beta).reshape(n, spec.H, r, 1), outputs)


def _store(call: Call, tokens: _Tokens, rows: np.ndarray) -> None:
    if not np.may_share_memory(tokens.outputs, call.out):
        with np.errstate(all="ignore"):
            call.out[rows, 0] = tokens.outputs.reshape(rows.size, call.spec.HV, call.spec.V)
