"""Stored states in NumPy: which of them run together, and where they can be computed with in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from gdr import _threads
from gdr._numpy_casts import widen
from gdr._numpy_scratch import Scratch
from gdr._ring import Slots

# Sequences with larger states are taken where they are, neighbouring slots together; smaller ones are gathered.
GATHER_BYTES = 1 << 17
# States that are updated in one go: they should stay in the cache from the read to the write.
UPDATE_BYTES = 1 << 20
# Below this much state a second thread costs more than it brings.
THREADING_BYTES = 4 << 20
# BLAS libraries may split products of more multiplications than this over threads.
BLAS_THREADING_THRESHOLD = 9_000

ITEMSIZE = {"float32": 4, "float64": 8}


class Shape(Protocol):
    """What of a call, or of a pool, says how its states are stored."""

    @property
    def H(self) -> int: ...
    @property
    def HV(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def V(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def compute(self) -> str: ...


class Block(NamedTuple):
    """Sequences and key heads that run together."""

    rows: Slots  # which of the tokens
    read: Slots
    write: Slots
    heads: slice
    pending: int  # tokens that each of the slots has in its ring


def by_key_head(states: np.ndarray, spec: Shape) -> np.ndarray:
    """A state array with its value heads by key head: ``[slots, H, r, K, V]``, or ``[..., V, K]``; a view."""
    return states.reshape(len(states), spec.H, -1, *states.shape[2:])


def states_of(
    states: np.ndarray, slots: Slots, heads: slice, dtype: np.dtype, spec: Shape, scratch: Scratch | None = None
) -> np.ndarray:
    """Some states as ``[n, H, r, K, V]`` of `dtype`: a view where each head's is one block of memory, else a copy."""
    h = states[slots, heads]
    if h.dtype != dtype or not _has_dense_heads(h):
        h = widen(h, dtype, None if scratch is None else scratch.take("states", h.shape, dtype))
    return h if spec.layout == "kv" else h.swapaxes(-1, -2)


def put_states(states: np.ndarray, slots: Slots, heads: slice, h: np.ndarray, spec: Shape) -> None:
    """Store some states ``[n, H, r, K, V]``."""
    states[slots, heads] = h if spec.layout == "kv" else h.swapaxes(-1, -2)


def _has_dense_heads(states: np.ndarray) -> bool:
    return states.strides[-2:] == (states.shape[-1] * states.itemsize, states.itemsize)


def is_view(states: np.ndarray | None, block: Block, dtype: np.dtype) -> bool:
    """Whether `_states` of a block are the stored states themselves, those that the block writes."""
    return (
        states is not None
        and states.dtype == dtype
        and _has_dense_heads(states)
        and isinstance(block.read, slice)
        and block.read == block.write
    )


def _state_bytes(spec: Shape) -> int:
    return spec.HV * spec.K * spec.V * ITEMSIZE[spec.compute]


def heads_a_block(spec: Shape) -> int:
    """Key heads whose states stay in the cache from one pass to the next."""
    return min(spec.H, max(1, UPDATE_BYTES // (_state_bytes(spec) // spec.H)))


def _threads_for(count: int, spec: Shape) -> int:
    return _threads.thread_count() if count * _state_bytes(spec) >= THREADING_BYTES else 1


def blocks_of(spec: Shape, read: np.ndarray, write: np.ndarray, counts: np.ndarray, heads: int) -> list[Block]:
    """Split sequences into blocks: slots that are neighbours and have as much pending, and up to `heads` key heads."""
    groups: list[tuple[Slots, Slots, Slots, int]] = []
    n = read.size
    if _state_bytes(spec) < GATHER_BYTES:
        for count in sorted(set(counts.tolist())):
            rows = np.flatnonzero(counts == count)
            groups.append((rows, read[rows], write[rows], count))
    else:
        ends = _ends(read, write, counts)
        most = max(1, math.ceil(n / _threads_for(n, spec)))
        if heads < spec.H:
            most = 1
        for start, stop in zip([0, *ends], [*ends, n], strict=True):
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
        Block(rows, sources, targets, slice(first, min(first + heads, spec.H)), count)
        for rows, sources, targets, count in groups
        for first in range(0, spec.H, heads)
    ]


def _ends(read: np.ndarray, write: np.ndarray, counts: np.ndarray) -> list[int]:
    """Where the next slot is no neighbour of the one before, or has not as much pending."""
    if read.size == 1:
        return []
    neighbours = (np.diff(read) == 1) & (np.diff(write) == 1) & (np.diff(counts) == 0)
    return (np.flatnonzero(~neighbours) + 1).tolist()


def read(kq: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Keys and queries ``[n, H, 2, K]`` times states ``[n, H, r, K, V]``: ``[n, H, r, 2, V]``."""
    if _threads.thin_products():
        return np.matmul(kq[:, :, None], h)
    # Two products of a vector each: for a matrix of two rows other kernels would copy the state first.
    return np.matmul(kq[:, :, None, :, None], h[:, :, :, None])[..., 0, :]


def for_each(work: Callable[[Iterator[Block]], None], blocks: list[Block], count: int, spec: Shape) -> None:
    threads = _threads_for(count, spec)
    if threads == 1 and spec.K * spec.V < BLAS_THREADING_THRESHOLD:
        work(iter(blocks))
        return
    with _threads.one_blas_thread:
        _threads.for_each(work, blocks, threads)
