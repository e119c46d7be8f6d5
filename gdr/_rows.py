"""The sequences of a call on the host, as plain integers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gdr._inputs import Call


class Row(NamedTuple):
    """One sequence: tokens ``[bos, eos)`` of batch row `batch`, and the state rows it reads and writes."""

    batch: int
    bos: int
    eos: int
    read: int
    write: int

    @property
    def length(self) -> int:
        return self.eos - self.bos


def live_rows(call: Call) -> list[Row]:
    """The sequences that have tokens to compute, in order.

    The others are settled here: the outputs of padding are set to 0, and the state of a sequence without
    tokens is handed on where it is read and written in different places.
    """
    spec = call.spec
    N = spec.N
    every = range(N)
    read = every if call.initial_slots is None else call.initial_slots.tolist()
    write = read if call.final_slots is None and call.final_state is None else every
    if call.final_slots is not None:
        write = read if call.final_slots is call.initial_slots else call.final_slots.tolist()
    if call.cu_seqlens is None:
        rows = [Row(n, 0, spec.T, read[n], write[n]) for n in every]
    else:
        bounds = call.cu_seqlens.tolist()
        rows = [Row(0, bounds[n], bounds[n + 1], read[n], write[n]) for n in every]

    live = []
    for row in rows:
        if row.read < 0 or row.write < 0:
            call.out[row.batch, row.bos : row.eos] = 0
        elif row.bos == row.eos:
            _hand_on(call, row)
        else:
            live.append(row)
    return live


def _hand_on(call: Call, row: Row) -> None:
    if call.final_state is None or (call.final_state is call.initial_state and row.read == row.write):
        return
    with np.errstate(all="ignore"):
        call.final_state[row.write] = 0 if call.initial_state is None else call.initial_state[row.read]


class Piece(NamedTuple):
    """Rows ``[start, stop)`` of a list, all of one length and one after another in memory."""

    start: int
    stop: int
    row: Row  # the first of them

    def tokens(self, x: np.ndarray, first: int, last: int) -> np.ndarray:
        """View of the tokens [first, last) of each of these sequences: ``[stop - start, tokens, ...]``."""
        row, count = self.row, self.stop - self.start
        if row.bos == 0 and row.eos == x.shape[1]:
            return x[row.batch : row.batch + count, first:last]
        packed = x[0, row.bos : row.bos + count * row.length]
        return packed.reshape(count, row.length, *x.shape[2:])[:, first:last]


def pieces_of(rows: list[Row]) -> list[Piece]:
    """Split rows into runs whose tokens one view covers."""
    pieces = []
    start = 0
    for stop in range(1, len(rows) + 1):
        before = rows[stop - 1]
        if stop == len(rows) or not (
            rows[stop].length == before.length
            and (rows[stop][:2] in ((before.batch, before.eos), (before.batch + 1, 0)))
        ):
            pieces.append(Piece(start, stop, rows[start]))
            start = stop
    return pieces
