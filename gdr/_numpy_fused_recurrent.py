"""The fused recurrence in NumPy.

Sequences of one token read their state once and update it in place.  Longer ones go through the chunkwise form with
few tokens at a time, which is the same recurrence with the write-back put off to the end of a tile.
"""

from __future__ import annotations

from gdr import _numpy_chunk, _numpy_decode
from gdr._inputs import Call
from gdr._numpy_gate import gates
from gdr._rows import live_rows

TILE = 16


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    rows = live_rows(call)
    if not rows:
        return
    g, beta = gates(call)
    single = [row for row in rows if row.length == 1]
    longer = [row for row in rows if row.length > 1]
    if single:
        _numpy_decode.run(call, single, g, beta)
    if longer:
        _numpy_chunk.run_rows(call, longer, g, beta, TILE)
