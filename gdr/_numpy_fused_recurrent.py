"""The fused recurrence in NumPy: token by token, for many sequences and heads at once.

With the decay and beta multiplied into what is short, a token is one product with the state it finds and one update::

    r_k, r_q = (e^g beta k) h, (e^g q) h       u = beta v - r_k       h = e^g h + k u^T       o = r_q + (q . k) u

The outputs follow for all tokens together afterwards.  All of a sequence's products are single rows times a head's
contiguous state: that, and not the batch around it, fixes the bits of its result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gdr import _threads
from gdr._inputs import Call
from gdr._numpy_gate import gates
from gdr._numpy_states import Block, blocks_of, by_key_head, for_each, heads_a_block, is_view, put_states, states_of
from gdr._rows import Piece, Row, live_rows, pieces_of

L2_EPS = 1e-6
# Tokens that are prepared at a time.
WINDOW = 64


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    spec = call.spec
    rows = sorted(live_rows(call), key=lambda row: row.eos - row.bos, reverse=True)
    if not rows:
        return
    g, beta = gates(call)
    sources, targets = np.array([(row.read, row.write) for row in rows]).T
    heads = heads_a_block(spec)
    blocks = blocks_of(spec, sources, targets, np.zeros_like(sources), heads)

    def work(blocks: Iterator[Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                chosen = rows[block.rows] if isinstance(block.rows, slice) else [rows[i] for i in block.rows]
                _run_block(call, g, beta, chosen, block)

    for_each(work, blocks, len(rows), spec)


def _run_block(call: Call, g: np.ndarray, beta: np.ndarray, rows: list[Row], block: Block) -> None:
    """Run some sequences, longest first, for some key heads."""
    spec = call.spec
    h, in_place = _initial_states(call, block, len(rows))
    pieces = pieces_of(rows)
    lengths = [row.length for row in rows]
    for first in range(0, lengths[0], WINDOW):
        last = min(first + WINDOW, lengths[0])
        _run_window(call, g, beta, pieces, lengths, block.heads, first, last, h)
    if call.final_state is not None and not in_place:
        final = by_key_head(call.final_state, spec)
        put_states(final, block.write, block.heads, h, spec)


def _initial_states(call: Call, block: Block, n: int) -> tuple[np.ndarray, bool]:
    """The states to run on, ``[n, H, r, K, V]``, and whether they are the stored ones themselves."""
    spec = call.spec
    dtype = np.dtype(spec.compute)
    heads = block.heads.stop - block.heads.start
    if call.initial_state is None:
        # In the memory order of the layout, like a copy of a stored state.
        shape = (spec.K, spec.V) if spec.layout == "kv" else (spec.V, spec.K)
        h = np.zeros((n, heads, spec.HV // spec.H, *shape), dtype)
        return (h if spec.layout == "kv" else h.swapaxes(-1, -2)), False
    stored = by_key_head(call.initial_state, spec)
    h = states_of(stored, block.read, block.heads, dtype, spec)
    in_place = call.initial_state is call.final_state and is_view(stored, block, dtype)
    if not in_place and h.base is not None:
        h = h.copy(order="K")
    return h, in_place


def _run_window(
    call: Call,
    g: np.ndarray,
    beta: np.ndarray,
    pieces: list[Piece],
    lengths: list[int],
    heads: slice,
    first: int,
    last: int,
    h: np.ndarray,
) -> None:
    """Run the tokens [first, last) of each sequence that has them."""
    n, H, r, K, V = h.shape
    T = last - first
    value_heads = slice(heads.start * r, heads.stop * r)
    kq = np.empty((T, n, H, 1, 2, K), h.dtype)
    values = np.empty((T, n, H, r, V), h.dtype)
    decays, betas = np.empty((T, n, H, r, 1), h.dtype), np.empty((T, n, H, r, 1), h.dtype)
    for piece in pieces:
        length = min(last, piece.row.length)
        if length <= first:
            break
        at = (slice(0, length - first), slice(piece.start, piece.stop))
        for target, x, chosen in (
            (kq[..., 0, 0, :], call.k, heads),
            (kq[..., 0, 1, :], call.q, heads),
            (values.reshape(T, n, H * r, V), call.v, value_heads),
            (decays.reshape(T, n, H * r), g, value_heads),
            (betas.reshape(T, n, H * r), beta, value_heads),
        ):
            target[at] = piece.tokens(x, first, length)[:, :, chosen].swapaxes(0, 1)

    _normalise(kq, call.spec.l2norm, call.scale)
    keys, updates = np.zeros((T, n, H, 1, K, 2), h.dtype), np.zeros((T, n, H, r, 2, V), h.dtype)
    keys[..., 0] = kq[..., 0, :]
    query_on_key = np.matmul(kq[..., 1, None, :], keys[..., :1])[..., 0]
    np.exp(decays, out=decays)
    kq = kq * decays[..., None]
    kq[..., 0, :] *= betas
    values *= betas
    decays, values = decays[..., None], values[..., None, :]
    reads, written = np.empty((T, n, H, r, 2, V), h.dtype), np.empty_like(h)
    ours, read_keys = updates[..., :1, :], reads[..., :1, :]
    thin = _threads.thin_products()
    outer: np.ufunc = np.matmul if thin else np.multiply
    if thin:
        # A column and a row of zeros, for a product of a column with a row would not reach BLAS.
        tokens, results, columns, rows = kq, reads, keys, updates
    else:
        # Two products of a vector each: for a matrix of two rows BLAS would copy the state first.
        tokens, results, columns, rows = kq[..., None, :], reads[..., None, :], keys[..., :1], ours
    for start, stop, active in _spans(lengths, first, last):
        state, change = h[:active], written[:active]
        matrices = state if thin else state[:, :, :, None]
        span = (slice(start - first, stop - first), slice(active))
        for token, result, read_key, value, update, decay, column, row in zip(
            *(x[span] for x in (tokens, results, read_keys, values, ours, decays, columns, rows))
        ):
            np.matmul(token, matrices, out=result)
            np.subtract(value, read_key, out=update)
            np.multiply(state, decay, out=state)
            outer(column, row, out=change)
            np.add(state, change, out=state)
    outputs = query_on_key * updates[..., 0, :]
    outputs += reads[..., 1, :]
    outputs = outputs.reshape(T, n, H * r, V)
    for piece in pieces:
        length = min(last, piece.row.length)
        if length > first:
            target = piece.tokens(call.out, first, length)[:, :, value_heads]
            target[...] = outputs[: length - first, piece.start : piece.stop].swapaxes(0, 1)


def _spans(lengths: list[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Spans of tokens in [first, last) during which the same number of sequences, the longest ones, goes on."""
    ends = sorted({length for length in lengths if first < length < last} | {last})
    for stop in ends:
        yield first, stop, sum(length >= stop for length in lengths)
        first = stop


def _normalise(kq: np.ndarray, l2norm: bool, scale: float) -> None:
    """Divide keys and queries ``[..., 2, K]`` by their norms if asked, and scale the queries; in place."""
    if l2norm:
        weights = np.einsum("...k,...k->...", kq, kq)[..., None]
        weights += kq.dtype.type(L2_EPS)
        np.sqrt(weights, out=weights)
        np.divide(1, weights, out=weights)
        weights[..., 1, :] *= kq.dtype.type(scale)
        kq *= weights
    else:
        kq[..., 1, :] *= kq.dtype.type(scale)
