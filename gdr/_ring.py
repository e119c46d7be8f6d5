"""Deferred write-back: the last tokens of each slot, kept beside its state until they are written in one go.

Writing a state at every token costs as much memory traffic as reading it.  So a step only appends what it would write,
the key k and the value u of the rank-one update and the decay since, and the state after n tokens is::

    h_n = d_0 h_0 + sum_j d_j k_j u_j^T            d_j: the decay from after token j through token n

A step reads h_0 and a few short vectors; every `capacity` tokens they are folded into the state by one product.  A
state of 16 bits is so rounded once every `capacity` tokens, too, and not at each.

Draft tokens of speculative decoding are kept the same way, apart from the pending ones, until some are accepted.

Here is what is done with the ring of a pool on the host but arithmetic: `run`, `verify` and `write` are the backends'.
"""

from __future__ import annotations

import importlib
import threading
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from gdr import _backends, _threads

# Draft tokens that a slot can have.
MAX_DRAFTS = 16

# Some slots of a pool: neighbours as a slice, so that what is read of them is a view, or any of them.
Slots: TypeAlias = "slice | np.ndarray"


class Entries:
    """Tokens of each row, of a slot or of a sequence, that are not in its state.

    Parameters
    ----------
    rows, num_k_heads, num_v_heads, head_k_dim, head_v_dim : int
        Rows, H, HV, K and V.
    dtype : numpy.dtype
        What keys and updates are kept in.
    depth : int
        Tokens that a row has room for.

    Attributes
    ----------
    keys : ndarray, [rows, H, depth, K]
    updates : ndarray, [rows, HV, depth, V]
    decays : ndarray of float64, [rows, HV, 1 + depth]
        What is left of the state (first) and of each token.
    fill : ndarray of int64, [rows]
        How many tokens each row has.
    """

    def __init__(
        self,
        rows: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        dtype: np.dtype,
        depth: int,
    ) -> None:
        self.keys = np.zeros((rows, num_k_heads, depth, head_k_dim), dtype)
        self.updates = np.zeros((rows, num_v_heads, depth, head_v_dim), dtype)
        self.decays = np.ones((rows, num_v_heads, 1 + depth))
        self.fill = np.zeros(rows, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries take."""
        return self.keys.nbytes + self.updates.nbytes + self.decays.nbytes + self.fill.nbytes

    def clear(self, rows: np.ndarray) -> None:
        """Forget the tokens of rows."""
        self.fill[rows] = 0
        self.decays[rows, :, 0] = 1

    def neutralise(self, rows: Slots, heads: slice) -> None:
        """Let the tokens of some value heads of rows change nothing when they are written."""
        self.decays[rows, heads] = 1
        self.updates[rows, heads] = 0

    def advance(self, rows: Slots, count: int, decays: np.ndarray) -> None:
        """Let a token count whose key and update have been put in place number `count` of rows.

        Parameters
        ----------
        rows : slice or ndarray of int, [n]
        count : int
        decays : ndarray, [n, HV]
            The token's own decay, which all that came before it undergoes.
        """
        decays = decays[..., None]
        # No call from here on: CPython lets a signal's handler raise only after a call, or where a loop turns.
        self.decays[rows, :, : 1 + count] *= decays
        self.decays[rows, :, 1 + count] = 1
        self.fill[rows] = count + 1

    def append(self, rows: np.ndarray, more: Entries) -> None:
        """Add to each of `rows` the tokens of the row of `more` with the same place in it."""
        at, token = np.nonzero(np.arange(more.keys.shape[2]) < more.fill[:, None])
        to, position = rows[at], self.fill[rows[at]] + token
        decays = self.decays[rows] * more.decays[..., :1]
        self.keys[to, :, position] = more.keys[at, :, token]
        self.updates[to, :, position] = more.updates[at, :, token]
        decays[at, :, 1 + position] = more.decays[at, :, 1 + token]
        self.decays[rows] = decays
        self.fill[rows] += more.fill

    def take(self, rows: np.ndarray, paths: np.ndarray) -> Entries:
        """Take tokens of rows whose decays are each token's own (the state's is not looked at).

        Parameters
        ----------
        rows : ndarray of int, [n]
        paths : ndarray of int, [n, L]
            Which tokens of a row, in order; all after the first negative one are negative.

        Returns
        -------
        Entries
            Of n rows, with the decays from after each token through the last one.
        """
        (n, L), (H, _, K), (HV, _, V) = paths.shape, self.keys.shape[1:], self.updates.shape[1:]
        taken = Entries(n, H, HV, K, V, self.keys.dtype, L)
        at, place = np.nonzero(paths >= 0)
        row, token = rows[at], paths[at, place]
        taken.keys[at, :, place] = self.keys[row, :, token]
        taken.updates[at, :, place] = self.updates[row, :, token]
        taken.decays[at, :, place] = self.decays[row, :, 1 + token]
        taken.decays[...] = np.cumprod(taken.decays[..., ::-1], axis=-1)[..., ::-1]
        taken.fill = np.count_nonzero(paths >= 0, axis=1)
        return taken


class Ring:
    """The pending and the draft tokens of every slot of a pool.

    Parameters
    ----------
    pool : ndarray, [num_slots, HV, K, V] or [num_slots, HV, V, K]
        The states, which are as they were before the pending tokens.
    layout : {"kv", "vk"}
        Order of the pool's last axes.
    num_k_heads : int
    capacity : int
        Tokens that a slot can have pending; 0 for none but drafts.
    stagger : bool
        Fold slots that started together at different times: the first period of a slot is shorter by its number.

    Attributes
    ----------
    pending : Entries
    limit : ndarray of int64, [num_slots]
        Pending tokens at which each slot's are folded.
    drafts : Entries or None
        Tokens that may be accepted, with each token's own decay; None before the first.
    parents : ndarray of int64, [num_slots, MAX_DRAFTS]
        The draft before each draft, -1 for none.
    """

    def __init__(self, pool: np.ndarray, layout: str, num_k_heads: int, capacity: int, stagger: bool) -> None:
        self.pool, self.layout, self.capacity, self.stagger = pool, layout, capacity, stagger
        num_slots, HV, K, V = pool.shape if layout == "kv" else (*pool.shape[:2], pool.shape[3], pool.shape[2])
        # Not the dtype of a 16-bit pool: NumPy computes with these numbers as they are.
        self.dtype = np.dtype("float64" if pool.dtype == np.float64 else "float32")
        self._sizes = (num_slots, num_k_heads, HV, K, V, self.dtype)
        self.pending = Entries(*self._sizes, capacity)
        self.limit = np.empty(num_slots, np.int64)
        self.restart(np.arange(num_slots))
        self.drafts: Entries | None = None
        self.parents = np.full((num_slots, MAX_DRAFTS), -1)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the ring takes."""
        drafts = self.drafts.nbytes if self.drafts is not None else 0
        return self.pending.nbytes + self.limit.nbytes + self.parents.nbytes + drafts

    def restart(self, slots: np.ndarray) -> None:
        """Begin the first period of slots that have nothing pending."""
        self.limit[slots] = 1 + slots % self.capacity if self.stagger and self.capacity else self.capacity

    def paths_to(self, slots: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The drafts of slots from the state to one of them, or to none for -1: ``[n, L]`` padded by -1."""
        paths = np.full((slots.size, 1 + last.max(initial=-1)), -1)
        place = np.zeros(slots.size, np.int64)
        # The parents of a draft are earlier drafts: from the last one up, in reverse.
        at = last
        while (at >= 0).any():
            on = at >= 0
            paths[on, place[on]] = at[on]
            place += on
            at = np.where(on, self.parents[slots, at], -1)
        order = np.arange(paths.shape[1])
        reverse = np.where(order < place[:, None], place[:, None] - 1 - order, order)
        return np.take_along_axis(paths, reverse, axis=1)

    def check_accepted(self, slots: np.ndarray, accepted: np.ndarray) -> None:
        """Refuse to accept what is no draft of its slot, or no path from the state to one.

        Parameters
        ----------
        slots : ndarray of int, [n]
        accepted : ndarray of int, [n] or [n, L]
            How many drafts, or a path.

        Raises
        ------
        ValueError
        """
        accepted, slots = accepted[slots >= 0], slots[slots >= 0]
        count = self.drafts.fill[slots] if self.drafts is not None else np.zeros(slots.size, np.int64)
        most = accepted if accepted.ndim == 1 else 1 + accepted.max(axis=1, initial=-1)
        for n in np.flatnonzero((most < 0) | (most > count)):
            raise ValueError(f"accepted: slot {slots[n]} has {count[n]} drafts to accept, got {accepted[n]}")
        if accepted.ndim == 1:
            return
        paths = self.paths_to(slots, most - 1)
        for given, path, slot in zip(accepted.tolist(), paths.tolist(), slots):
            whole = [draft for draft in path if draft >= 0]
            if [draft if draft >= 0 else -1 for draft in given] != whole + [-1] * (len(given) - len(whole)):
                raise ValueError(f"accepted: expected the path {whole} to a draft of slot {slot}, got {given}")

    def room_for_drafts(self) -> Entries:
        """The drafts; memory for them is taken the first time."""
        with self._lock:
            if self.drafts is None:
                self.drafts = Entries(*self._sizes, MAX_DRAFTS)
        return self.drafts


def commit(ring: Ring, slots: np.ndarray, accepted: np.ndarray) -> None:
    """Keep of each slot the drafts from the state to number ``accepted - 1``, and drop the others."""
    accepted = accepted[slots >= 0]
    slots = slots[slots >= 0]
    if ring.drafts is None or not slots.size:
        return
    _threads.uninterrupted(partial(_commit, ring, slots, ring.paths_to(slots, accepted - 1)))


def _commit(ring: Ring, slots: np.ndarray, paths: np.ndarray) -> None:
    assert ring.drafts is not None
    taken = ring.drafts.take(slots, paths)
    fill = ring.pending.fill[slots]
    due = (fill > 0) & (fill + taken.fill > ring.limit[slots])
    if due.any():
        _fold(ring, slots[due])
        ring.limit[slots[due]] = ring.capacity
    large = taken.fill > ring.capacity
    if large.any():
        _writer()(ring, ring.pool, slots[large], taken, np.flatnonzero(large), written=ring.drafts)
        taken.clear(np.flatnonzero(large))
    if ring.capacity:
        ring.pending.append(slots, taken)
    rollback(ring, slots)


def rollback(ring: Ring, slots: np.ndarray) -> None:
    """Drop the drafts of slots."""
    if ring.drafts is not None:
        ring.drafts.fill[slots[slots >= 0]] = 0


def fold(ring: Ring, slots: np.ndarray | None = None) -> None:
    """Write the pending tokens of slots (of all without) into their states, and drop their drafts."""
    slots = np.arange(ring.limit.size) if slots is None else slots[slots >= 0]
    rollback(ring, slots)
    pending = slots[ring.pending.fill[slots] > 0]
    if pending.size:
        _threads.uninterrupted(partial(_fold, ring, pending))
        ring.restart(pending)


def forget(ring: Ring, slots: np.ndarray) -> None:
    """Drop the pending tokens and the drafts of slots, whose states are overwritten."""
    rollback(ring, slots)
    ring.pending.clear(slots)
    ring.restart(slots)


def read(ring: Ring, slots: np.ndarray) -> np.ndarray:
    """Copy of the states of slots with their pending tokens."""
    states = ring.pool[slots]
    at = np.flatnonzero(ring.pending.fill[slots])
    if at.size:
        _writer()(ring, states, at, ring.pending, slots[at])
    return states


def copy(ring: Ring, sources: np.ndarray, targets: np.ndarray) -> None:
    """Copy the states of slots with their pending tokens, as they are, to other slots."""
    rollback(ring, targets)
    pending = ring.pending
    count = pending.fill[sources].max(initial=0)
    ring.pool[targets] = ring.pool[sources]
    pending.keys[targets, :, :count] = pending.keys[sources, :, :count]
    pending.updates[targets, :, :count] = pending.updates[sources, :, :count]
    pending.decays[targets, :, : 1 + count] = pending.decays[sources, :, : 1 + count]
    pending.fill[targets] = pending.fill[sources]
    ring.limit[targets] = ring.limit[sources]


def fold_due(ring: Ring, slots: np.ndarray) -> None:
    """Make room for a token of each of some slots."""
    due = slots[ring.pending.fill[slots] >= ring.limit[slots]]
    if due.size:
        _threads.uninterrupted(partial(_fold, ring, due))
        ring.limit[due] = ring.capacity


def _fold(ring: Ring, slots: np.ndarray) -> None:
    """Write the pending tokens of slots into their states."""
    _writer()(ring, ring.pool, slots, ring.pending, slots, written=ring.pending)
    ring.pending.clear(slots)


def _writer() -> Any:
    """What writes tokens into states: `write` of the host's backend."""
    return importlib.import_module(f"gdr._{_backends.cpu_backend()}_ring").write
