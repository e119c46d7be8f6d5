"""Scratch memory of the NumPy backend.

Fresh memory costs a page fault every 4 KiB, as much time as a short call needs for its arithmetic: scratch is kept for
the next call, what was used last, and is so in the cache, first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

# What is kept: so many, each of up to so much memory, which remembers so many arrays made of it.
MAX_KEPT = 8
KEPT_BYTES = 32 << 20
MAX_MADE = 64

Made = TypeVar("Made")


class Scratch:
    """Named buffers that grow to the largest request and are used again, and the arrays made of them."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}
        self._made: dict[tuple, Any] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised contiguous array; the last one taken under this name becomes invalid."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.size < size:
            self.nbytes += (size - (buffer.size if buffer is not None else 0)) * dtype.itemsize
            buffer = self._buffers[name, dtype] = np.empty(size, dtype)
            self._made.clear()
        return buffer[:size].reshape(shape)

    def make(self, kind: Callable[..., Made], *sizes: Any) -> Made:
        """``kind(self, *sizes)``, the one of the last time where its buffers are still the same."""
        key = kind, sizes
        made = self._made.get(key)
        if made is None:
            made = kind(self, *sizes)
            if len(self._made) >= MAX_MADE:
                self._made.clear()
            self._made[key] = made
        return made


_kept: list[Scratch] = []


@contextmanager
def scratch_of_its_own() -> Iterator[Scratch]:
    """Scratch that nobody else uses meanwhile."""
    try:
        scratch = _kept.pop()
    except IndexError:
        scratch = Scratch()
    yield scratch
    if scratch.nbytes <= KEPT_BYTES and len(_kept) < MAX_KEPT:
        _kept.append(scratch)
