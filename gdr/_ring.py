"""Deferred write-back: the last tokens of each slot, kept beside its state until they are written in one go.

Writing a state at every token costs as much memory traffic as reading it.  So a step only appends what it would write,
the key k and the value u of the rank-one update and the decay since, and the state after n tokens is::

    h_n = d_0 h_0 + sum_j d_j k_j u_j^T            d_j: the decay from after token j through token n

A step reads h_0 and a few short vectors; every `capacity` tokens they are folded into the state by one product.  A
state of 16 bits is so rounded once every `capacity` tokens, too, and not at each.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

CAPACITY = 16

# Some slots of a pool: neighbours as a slice, so that what is read of them is a view, or any of them.
Slots: TypeAlias = "slice | np.ndarray"


class Ring:
    """The pending tokens of every slot of a pool.

    Parameters
    ----------
    num_slots, num_k_heads, num_v_heads, head_k_dim, head_v_dim : int
        The pool: slots, H, HV, K and V.
    dtype : numpy.dtype
        What keys and updates are kept in: the dtype of the arithmetic.
    capacity : int
        Tokens that a slot can have pending.

    Attributes
    ----------
    keys : ndarray, [num_slots, H, capacity, K]
    updates : ndarray, [num_slots, HV, capacity, V]
    decays : ndarray of float64, [num_slots, HV, 1 + capacity]
        What is left of the state (first) and of each pending token.
    fill : ndarray of int64, [num_slots]
        How many tokens each slot has pending.
    """

    def __init__(
        self,
        num_slots: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        dtype: np.dtype,
        capacity: int = CAPACITY,
    ) -> None:
        self.capacity = capacity
        self.keys = np.zeros((num_slots, num_k_heads, capacity, head_k_dim), dtype)
        self.updates = np.zeros((num_slots, num_v_heads, capacity, head_v_dim), dtype)
        self.decays = np.ones((num_slots, num_v_heads, 1 + capacity))
        self.fill = np.zeros(num_slots, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the ring takes."""
        return self.keys.nbytes + self.updates.nbytes + self.decays.nbytes + self.fill.nbytes

    def pending(self, slots: np.ndarray | None = None) -> np.ndarray:
        """Those of `slots` (of all slots without) that have tokens pending."""
        if slots is None:
            return np.flatnonzero(self.fill)
        return slots[self.fill[slots] > 0]

    def discard(self, slots: np.ndarray) -> None:
        """Forget the pending tokens of slots, whose states are overwritten."""
        slots = self.pending(slots)
        if slots.size:
            self.fill[slots] = 0
            self.decays[slots, :, 0] = 1

    def append(self, slots: Slots, count: int, keys: np.ndarray, updates: np.ndarray, decays: np.ndarray) -> None:
        """Add a token to slots that have `count` pending already.

        Parameters
        ----------
        slots : slice or ndarray of int, [n]
        count : int
        keys : ndarray, [n, H, K]
        updates : ndarray, [n, HV, V]
        decays : ndarray, [n, HV]
            The token's own decay, which all that came before it undergoes.
        """
        self.keys[slots, :, count] = keys
        self.updates[slots, :, count] = updates
        self.advance(slots, count, decays)

    def advance(self, slots: Slots, count: int, decays: np.ndarray) -> None:
        """Let a token count whose key and update have been put in place number `count` of slots."""
        self.decays[slots, :, : 1 + count] *= decays[..., None]
        self.decays[slots, :, 1 + count] = 1
        self.fill[slots] = count + 1
