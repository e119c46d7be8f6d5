"""One token of each sequence in NumPy, with the state written back at once or later.

A product of a vector with a state is bound by reading the state from memory, and the second product with the same
state, of the query after the key, finds it in the cache.  So the old state serves both::

    r_k, r_q = e^g h^T k, e^g h^T q        u = beta (v - r_k)        o = r_q + (q . k) u

The rank-one update ``h = e^g h + k u^T`` is what NumPy is slow at, and what a `Ring` puts off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gdr import _threads
from gdr._inputs import Call
from gdr._numpy_gate import gates
from gdr._ring import Ring, Slots
from gdr._rows import Row
from gdr._spec import Spec

L2_EPS = 1e-6

# Sequences with larger states are taken where they are, neighbouring slots together; smaller ones are gathered.
GATHER_BYTES = 1 << 17
# States that are updated in one go: they should stay in the cache from the read to the write.
UPDATE_BYTES = 1 << 19
# Below this much state a second thread costs more than it brings.
THREADING_BYTES = 4 << 20
# BLAS libraries may split products of more multiplications than this over threads.
BLAS_THREADING_THRESHOLD = 9_000


class _Tokens(NamedTuple):
    """One token of each of n sequences, normalised and scaled; axes: sequence, key head, (value head,) ..."""

    keys_queries: np.ndarray  # [n, H, 2, K]
    query_on_key: np.ndarray  # q . k, [n, H, 1, 1]
    values: np.ndarray  # [n, H, r, V]
    decays: np.ndarray  # e^g in float64, [n, H, r]
    betas: np.ndarray  # [n, H, r, 1]
    outputs: np.ndarray  # [n, H, r, V], to be filled


class _Block(NamedTuple):
    """Sequences and key heads that run together."""

    rows: Slots  # which of the tokens
    read: Slots
    write: Slots
    heads: slice
    pending: int  # tokens that each of the slots has in its ring


def step(call: Call, ring: Ring) -> None:
    """Run one token of each sequence of a pool; `ring` takes what is to be written into the states."""
    spec = call.spec
    slots = call.initial_slots
    live = np.flatnonzero(slots >= 0)
    if live.size < spec.N:
        call.out[slots < 0] = 0
        slots = slots[live]
    full = slots[ring.fill[slots] == ring.capacity]
    if full.size:
        fold(ring, call.initial_state, spec, full)
    tokens = _load(call, *gates(call), live, np.zeros_like(live))
    states = _by_key_head(call.initial_state, spec)
    # Stored numbers that are computed with as they are need no scratch, however many.
    heads = spec.H if states.dtype == ring.keys.dtype else _heads_a_block(spec)
    blocks = _blocks(spec, slots, slots, ring.fill[slots], heads)

    def work(blocks: Iterator[_Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _step(tokens, states, ring, block, spec)

    _for_each(work, blocks, live.size, spec)
    # Until here nothing has changed that a step of these slots would not overwrite.
    for block in (block for block in blocks if block.heads.start == 0):
        ring.advance(block.read, block.pending, tokens.decays[block.rows].reshape(-1, spec.HV))
    _store(call, tokens, live, np.zeros_like(live))


def run(call: Call, rows: Sequence[Row], g: np.ndarray, beta: np.ndarray) -> None:
    """Run `rows`, sequences of one token, and write their states."""
    spec = call.spec
    batch, token, read, write = np.array([(row.batch, row.bos, row.read, row.write) for row in rows]).T
    tokens = _load(call, g, beta, batch, token)
    initial = None if call.initial_state is None else _by_key_head(call.initial_state, spec)
    final = None if call.final_state is None else _by_key_head(call.final_state, spec)
    blocks = _blocks(spec, read, write, np.zeros_like(read), _heads_a_block(spec))
    in_place = call.initial_state is call.final_state

    def work(blocks: Iterator[_Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _update(tokens, initial, final, in_place, block, spec)

    _for_each(work, blocks, len(rows), spec)
    _store(call, tokens, batch, token)


def _step(tokens: _Tokens, states: np.ndarray, ring: Ring, block: _Block, spec: Spec) -> None:
    """One token of a block of slots, from their states and their rings."""
    kq = tokens.keys_queries[block.rows, block.heads]
    n, heads = kq.shape[:2]
    count = block.pending
    value_heads = slice(block.heads.start * states.shape[2], block.heads.stop * states.shape[2])
    decays = ring.decays[block.read, value_heads].reshape(n, heads, -1, 1 + ring.capacity)
    decays = decays * tokens.decays[block.rows, block.heads, :, None]
    reads = _read(kq, _states(states, block.read, block.heads, kq.dtype, spec))
    reads *= decays[..., 0, None, None]
    if count:
        keys = ring.keys[block.read, block.heads, :count]
        updates = ring.updates[block.read, value_heads, :count].reshape(*decays.shape[:3], count, -1)
        weights = np.matmul(kq, keys.swapaxes(-1, -2))[:, :, None] * decays[..., None, 1 : 1 + count]
        reads += np.matmul(weights.astype(kq.dtype, copy=False), updates)
    updates = _answer(tokens, block, reads)
    ring.keys[block.read, block.heads, count] = kq[:, :, 0]
    ring.updates[block.read, value_heads, count] = updates.reshape(n, -1, updates.shape[-1])


def _update(
    tokens: _Tokens,
    initial: np.ndarray | None,
    final: np.ndarray | None,
    in_place: bool,
    block: _Block,
    spec: Spec,
) -> None:
    """One token of a block of sequences, and the rank-one update of their states."""
    kq = tokens.keys_queries[block.rows, block.heads]
    decays = tokens.decays[block.rows, block.heads]
    if initial is None:
        h = np.zeros((*decays.shape, spec.K, spec.V), kq.dtype)
    else:
        h = _states(initial, block.read, block.heads, kq.dtype, spec)
    reads = _read(kq, h)
    decays = decays.astype(kq.dtype, copy=False)[..., None, None]
    reads *= decays
    updates = _answer(tokens, block, reads)
    if final is None:
        return
    if in_place and _is_view(initial, block, kq.dtype):
        h *= decays
    else:
        h = h * decays
    h += kq[:, :, None, 0, :, None] * updates[..., None, :]
    if not (in_place and _is_view(initial, block, kq.dtype)):
        final[block.write, block.heads] = h if spec.layout == "kv" else h.swapaxes(-1, -2)


def _read(kq: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Keys and queries ``[n, H, 2, K]`` times states ``[n, H, r, K, V]``: ``[n, H, r, 2, V]``."""
    # Two products of a vector each: for a matrix of two rows BLAS would copy the state first.
    return np.matmul(kq[:, :, None, :, None], h[:, :, :, None])[..., 0, :]


def _states(states: np.ndarray, slots: Slots, heads: slice, dtype: np.dtype, spec: Spec) -> np.ndarray:
    """Some states as ``[n, H, r, K, V]`` of `dtype`: a view where each head's is one block of memory, else a copy."""
    h = states[slots, heads]
    if h.dtype != dtype or not _has_dense_heads(h):
        h = np.ascontiguousarray(h, dtype)
    return h if spec.layout == "kv" else h.swapaxes(-1, -2)


def _has_dense_heads(states: np.ndarray) -> bool:
    return states.strides[-2:] == (states.shape[-1] * states.itemsize, states.itemsize)


def _is_view(states: np.ndarray | None, block: _Block, dtype: np.dtype) -> bool:
    """Whether `_states` of a block are the stored states themselves, those that the block writes."""
    return (
        states is not None
        and states.dtype == dtype
        and _has_dense_heads(states)
        and isinstance(block.read, slice)
        and block.read == block.write
    )


def _answer(tokens: _Tokens, block: _Block, reads: np.ndarray) -> np.ndarray:
    """What a token writes, from the decayed state's products with key and query; the outputs on the way."""
    updates = tokens.values[block.rows, block.heads] - reads[..., 0, :]
    updates *= tokens.betas[block.rows, block.heads]
    outputs = tokens.query_on_key[block.rows, block.heads] * updates
    outputs += reads[..., 1, :]
    tokens.outputs[block.rows, block.heads] = outputs
    return updates


def fold(ring: Ring, pool: np.ndarray, spec: Spec, slots: np.ndarray) -> None:
    """Write the pending tokens of slots into their states."""
    states = _by_key_head(pool, spec)

    def work(blocks: Iterator[_Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                _fold(ring, states, block, spec)

    blocks = _blocks(spec, slots, slots, ring.fill[slots], _heads_a_block(spec))
    _for_each(work, blocks, slots.size, spec)
    ring.discard(slots)


def _fold(ring: Ring, states: np.ndarray, block: _Block, spec: Spec) -> None:
    dtype = ring.keys.dtype
    n, r = block.pending, states.shape[2]
    value_heads = slice(block.heads.start * r, block.heads.stop * r)
    h = _states(states, block.read, block.heads, dtype, spec)
    keys = ring.keys[block.read, block.heads, None, :n]
    decays = ring.decays[block.read, value_heads].reshape(*h.shape[:3], -1, 1).astype(dtype)
    updates = ring.updates[block.read, value_heads, :n].reshape(*h.shape[:3], n, -1)
    written = np.matmul(keys.swapaxes(-1, -2), updates * decays[..., 1 : 1 + n, :])
    if _is_view(states, block, dtype):
        h *= decays[..., :1, :]
        h += written
    else:
        written += h * decays[..., :1, :]
        states[block.write, block.heads] = written if spec.layout == "kv" else written.swapaxes(-1, -2)


def _load(call: Call, g: np.ndarray, beta: np.ndarray, batch: np.ndarray, token: np.ndarray) -> _Tokens:
    """The tokens ``[batch, token]`` of a call."""
    spec = call.spec
    dtype = np.dtype(spec.compute)
    n, r = batch.size, spec.HV // spec.H
    whole = spec.T == 1 and n == spec.B

    def take(x: np.ndarray) -> np.ndarray:
        # Always contiguous: neither strides nor the place in a batch may decide which loop computes a sequence.
        return np.ascontiguousarray(x[:, 0] if whole else x[batch, token], dtype)

    kq = np.empty((n, spec.H, 2, spec.K), dtype)
    kq[:, :, 0] = call.k[:, 0] if whole else call.k[batch, token]
    kq[:, :, 1] = call.q[:, 0] if whole else call.q[batch, token]
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


def _store(call: Call, tokens: _Tokens, batch: np.ndarray, token: np.ndarray) -> None:
    if not np.may_share_memory(tokens.outputs, call.out):
        with np.errstate(all="ignore"):
            call.out[batch, token] = tokens.outputs.reshape(batch.size, call.spec.HV, call.spec.V)


def _by_key_head(states: np.ndarray, spec: Spec) -> np.ndarray:
    """A state array with its value heads by key head: ``[slots, H, r, K, V]``, or ``[..., V, K]``; a view."""
    return states.reshape(len(states), spec.H, -1, *states.shape[2:])


def _state_bytes(spec: Spec) -> int:
    return spec.HV * spec.K * spec.V * np.dtype(spec.compute).itemsize


def _heads_a_block(spec: Spec) -> int:
    """Key heads whose states stay in the cache from one pass to the next."""
    return min(spec.H, max(1, UPDATE_BYTES // (_state_bytes(spec) // spec.H)))


def _threads_for(count: int, spec: Spec) -> int:
    return _threads.thread_count() if count * _state_bytes(spec) >= THREADING_BYTES else 1


def _blocks(spec: Spec, read: np.ndarray, write: np.ndarray, counts: np.ndarray, heads: int) -> list[_Block]:
    """Split sequences into blocks: slots that are neighbours and have as much pending, and up to `heads` key heads."""
    groups: list[tuple[Slots, Slots, Slots, int]] = []
    n = read.size
    if _state_bytes(spec) < GATHER_BYTES:
        for count in np.unique(counts).tolist():
            rows = np.flatnonzero(counts == count)
            groups.append((rows, read[rows], write[rows], count))
    else:
        ends = np.flatnonzero((np.diff(read) != 1) | (np.diff(write) != 1) | (np.diff(counts) != 0)) + 1
        most = max(1, math.ceil(n / _threads_for(n, spec)))
        if heads < spec.H:
            most = 1
        for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), n], strict=True):
            for first in range(start, stop, most):
                size = min(most, stop - first)
                sources, targets = int(read[first]), int(write[first])
                groups.append(
                    (
                        slice(first, first + size),
                        slice(sources, sources + size),
                        slice(targets, targets + size),
                        int(counts[first]),
                    )
                )
    return [
        _Block(rows, sources, targets, slice(first, min(first + heads, spec.H)), count)
        for rows, sources, targets, count in groups
        for first in range(0, spec.H, heads)
    ]


def _for_each(work: Callable[[Iterator[_Block]], None], blocks: list[_Block], count: int, spec: Spec) -> None:
    threads = _threads_for(count, spec)
    if threads == 1 and spec.K * spec.V < BLAS_THREADING_THRESHOLD:
        work(iter(blocks))
        return
    with _threads.one_blas_thread:
        _threads.for_each(work, blocks, threads)
