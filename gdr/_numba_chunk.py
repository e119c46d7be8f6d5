"""The chunkwise form with Numba.

One kernel serves the recurrent and the chunkwise operation: on a CPU a chunk of a few tokens already turns
the memory traffic of the state into arithmetic in cache, and larger ones only add work.  Chunks are therefore
of `chunk_size` tokens up to the kernel's tile, and a sequence's result never depends on its batch.
"""

from __future__ import annotations

from gdr import _numba_launch
from gdr._inputs import Call
from gdr._numba_kernels import TILE


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    _numba_launch.run(call, min(call.chunk_size, TILE))
