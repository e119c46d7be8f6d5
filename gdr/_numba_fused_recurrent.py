"""The fused recurrence with Numba."""

from __future__ import annotations

from gdr import _numba_launch
from gdr._inputs import Call
from gdr._numba_kernels import TILE


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    _numba_launch.run(call, TILE)
