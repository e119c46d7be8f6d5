"""Packed sequences of different lengths: `cu_seqlens` and the arrays that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def cu_seqlens_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Offsets of packed sequences from their lengths.

    Parameters
    ----------
    lengths : sequence of int, shape [N]
        Tokens of each sequence; 0 is allowed.

    Returns
    -------
    cu_seqlens : ndarray of int32, shape [N + 1]
        Sequence n is tokens ``cu_seqlens[n]`` up to ``cu_seqlens[n + 1]``.

    Raises
    ------
    TypeError
        A length is no integer.
    ValueError
        A length is negative, or their sum does not fit int32.

    Examples
    --------
    >>> cu_seqlens_of([3, 0, 2])
    array([0, 3, 3, 5], dtype=int32)
    """
    counts = np.asarray(lengths)
    if counts.size == 0:
        return np.zeros(1, np.int32)
    if counts.dtype.kind not in "iu" or counts.ndim != 1:
        raise TypeError(f"lengths: expected a sequence of integers, got dtype {counts.dtype}, shape {counts.shape}")
    if counts.min() < 0:
        raise ValueError(f"lengths: expected lengths of at least 0, got {counts.min()}")
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"lengths: expected at most {np.iinfo(np.int32).max} tokens in all, got {offsets[-1]}")
    return offsets.astype(np.int32)


def pack(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join sequences ``[T_n, ...]`` along T.

    Parameters
    ----------
    sequences : sequence of ndarray, shapes [T_n, ...]
        At least one; all with the same trailing axes and dtype.

    Returns
    -------
    packed : ndarray, shape [1, sum(T_n), ...]
    cu_seqlens : ndarray of int32, shape [N + 1]

    Raises
    ------
    ValueError
        No sequence, or trailing axes or dtypes that differ.

    Examples
    --------
    >>> packed, cu_seqlens = pack([np.ones((3, 2)), np.zeros((1, 2))])
    >>> packed.shape, cu_seqlens.tolist()
    ((1, 4, 2), [0, 3, 4])
    """
    if not len(sequences):
        raise ValueError("sequences: expected at least one")
    first = sequences[0]
    for n, x in enumerate(sequences):
        if x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            raise ValueError(
                f"sequences: expected trailing axes {first.shape[1:]} and dtype {first.dtype} throughout, "
                f"got {x.shape[1:]} and {x.dtype} in sequence {n}"
            )
    return np.concatenate(sequences)[None], cu_seqlens_of([len(x) for x in sequences])


def unpack(packed: np.ndarray, cu_seqlens: np.ndarray) -> list[np.ndarray]:
    """Views ``[T_n, ...]`` of the sequences in `packed`; the inverse of `pack`.

    Parameters
    ----------
    packed : array, shape [1, T, ...]
    cu_seqlens : array of integers, shape [N + 1]

    Returns
    -------
    list of arrays, shapes [T_n, ...]
        Views, not copies.

    Raises
    ------
    ValueError
        `packed` does not begin with an axis of 1, or `cu_seqlens` does not end at T.

    Examples
    --------
    >>> [x.shape for x in unpack(np.zeros((1, 4, 2)), np.array([0, 3, 4]))]
    [(3, 2), (1, 2)]
    """
    offsets = [int(x) for x in cu_seqlens]
    if packed.ndim < 2 or packed.shape[0] != 1:
        raise ValueError(f"packed: expected shape [1, T, ...], got {tuple(packed.shape)}")
    if not offsets or offsets[0] != 0 or offsets[-1] != packed.shape[1] or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens: expected non-decreasing offsets from 0 to T = {packed.shape[1]}")
    return [packed[0, bos:eos] for bos, eos in pairwise(offsets)]
