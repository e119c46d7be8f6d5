"""Maps by which the copy engine of compute capability 9.0 and up finds tiles of an array (cuda/include/gdr/tiles.cuh).

The driver makes a map, 128 bytes that kernels take as an argument, of an array's address, shape and strides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from gdr import _cuda_loader

BYTES = 128
_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16: all types of 16 bits are the same to it
_L2_256B = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_TURNED = 3  # CU_TENSOR_MAP_SWIZZLE_128B: rows of 128 bytes, whose pieces of 16 are turned (turned_piece)


class TileMaps:
    """Maps of arrays of 16-bit elements with one shape, strides and size of tiles, of any address.

    Parameters
    ----------
    shape : sequence of int
        Batches, tokens, heads and columns of the array.
    strides : sequence of int
        Elements from one to the next of the first three; a column is next to the one before.
    box : tuple of int
        Tokens and columns of a tile.
    turned : bool
        Whether the pieces of a row of 64 columns are turned in shared memory.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int], box: tuple[int, int], turned: bool) -> None:
        batches, tokens, heads, columns = shape
        steps = [step * 2 if extent > 1 else 16 for step, extent in zip(strides[:3], shape)]
        self.extents = columns, tokens, heads, batches
        self.strides = steps[1], steps[2], steps[0]  # bytes
        self.box, self.turned = box, turned
        self._arguments = (
            (ctypes.c_uint64 * 4)(*self.extents),
            (ctypes.c_uint64 * 3)(*self.strides),
            (ctypes.c_uint32 * 4)(box[1], box[0], 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            0,
            _TURNED if turned else 0,
            _L2_256B,
            0,
        )

    def encode(self, address: int) -> bytes:
        """Make the map of the array that begins at an address."""
        memory = ctypes.create_string_buffer(BYTES + 63)
        start = -ctypes.addressof(memory) % 64
        status = _encoder()(ctypes.byref(memory, start), _UINT16, 4, ctypes.c_void_p(address), *self._arguments)
        if status:
            raise RuntimeError(f"cuTensorMapEncodeTiled failed with error {status}")
        return memory.raw[start : start + BYTES]


def can_map(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether there are maps of arrays with such a shape and such strides."""
    known = min(shape) > 0 and max(shape) < 1 << 31
    return known and all(extent == 1 or 0 < step < 1 << 39 for step, extent in zip(strides[:3], shape))


@cache
def _encoder() -> Any:
    """The driver's function that makes maps; None before CUDA 12."""
    return getattr(_cuda_loader._driver(), "cuTensorMapEncodeTiled", None)


def available() -> bool:
    """Whether the driver makes maps."""
    return _encoder() is not None
