"""Chunkwise gated delta rule in NumPy: the WY form, batched over heads, chunks and sequences.

A *tile* is one chunk of one sequence for one key head and its ``r = HV / H`` value heads.  With G the log
decay summed from the tile's start through each token, and ``i >= j``::

    M    = [k; q] k^T                         D_ij = exp(G_i - G_j)
    T    = (I + tril(beta_i M_k * D, -1))^-1 diag(beta)
    u    = T (v - e^G (k h))                  the values that the tile really writes
    o    = e^G (q h) + (M_q * D) u
    h'   = e^(G_C) h + k^T (e^(G_C - G) u)

The first two lines need no state, so they are computed for a group of tiles at once; the last three go
through the chunks of a sequence in order, for all heads and sequences of a job together.  T is applied to one
right-hand side: forming the W and U of the papers would cost another product of its size.

Every product is one BLAS call a tile, of a shape and memory order that depend on the tile's own sequence
alone, with BLAS on one thread.  A sequence's result is therefore the same in every batch, and
``batch_invariant`` changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gdr import _threads
from gdr._inputs import Call, Spec
from gdr._numpy_gate import gates
from gdr._rows import Piece, Row, live_rows, pieces_of

L2_EPS = 1e-6

# Tokens of a tile at most: its matrices grow with the square of it, and larger ones are slower anyway.
MAX_CHUNK = 256
# Rows that the inverse of a tile's triangle takes one by one, before it goes on by doubling.
INVERSE_BASE = 16
# Scratch of a job, in bytes: enough tiles to amortise NumPy's calls, few enough to stay in the caches.
JOB_BYTES = 4 << 20
MAX_CHUNKS_PER_GROUP = 8
# Below this many multiplications threads cost more than they bring.
THREADING_THRESHOLD = 10_000_000
# BLAS libraries may split products of more multiplications than this over threads.
BLAS_THREADING_THRESHOLD = 100_000
# exp of less is 0: such a token forgets everything, as g = -inf does.
FORGETS_ALL = {"float32": -104.0, "float64": -746.0}


class _Job(NamedTuple):
    """Some sequences (longest first) and some neighbouring key heads."""

    rows: list[Row]
    tile: int  # rows of a tile: a power of two
    tokens: int  # tokens of a tile, at most `tile`
    group: int  # chunks prepared at a time
    first_head: int
    heads: int


class _Tiles(NamedTuple):
    """What a group of tiles has computed without the state; axes: sequence, chunk, key head, ..."""

    keys: np.ndarray  # [S, m, n, C, K]
    keys_queries: np.ndarray  # [S, m, n, 2C, K]
    values: np.ndarray  # [S, m, n, r, C, V], replaced by the outputs
    solve: np.ndarray  # T, [S, m, n, r, C, C]
    attend: np.ndarray  # M_q * D, [S, m, n, r, C, C]
    decay_in: np.ndarray  # e^G, [S, m, n, r, C]
    decay_out: np.ndarray  # e^(G_C - G), [S, m, n, r, C]


class _Scratch:
    """Named buffers that grow to the largest request and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised contiguous array; the last one taken under this name becomes invalid."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name, dtype] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    rows = live_rows(call)
    if rows:
        g, beta = gates(call) if call.spec.gates == "raw" else (call.g, call.beta)
        run_rows(call, rows, g, beta, min(call.chunk_size, MAX_CHUNK))


def run_rows(call: Call, rows: list[Row], g: np.ndarray, beta: np.ndarray, chunk: int) -> None:
    """Run some sequences, up to `chunk` tokens at a time, and write their states."""
    spec = call.spec
    jobs, threads = _plan(call, rows, chunk)

    def work(jobs: Iterator[_Job]) -> None:
        scratch = _Scratch()
        with np.errstate(all="ignore"):
            for job in jobs:
                _run_job(call, g, beta, job, scratch)

    if 2 * jobs[0].tile * spec.K * spec.V < BLAS_THREADING_THRESHOLD:
        _threads.for_each(work, jobs, threads)
    else:
        with _threads.one_blas_thread:
            _threads.for_each(work, jobs, threads)


def _plan(call: Call, rows: list[Row], chunk: int) -> tuple[list[_Job], int]:
    """Split the call into jobs, largest tiles first; return them and the number of threads to use."""
    spec = call.spec
    by_tile: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.eos - row.bos, reverse=True):
        by_tile.setdefault(_power_of_two(min(row.eos - row.bos, chunk)), []).append(row)
    work = sum(len(_chunks(row, chunk)) * tile for tile, members in by_tile.items() for row in members)
    work *= 3 * spec.HV * spec.K * spec.V
    threads = _threads.thread_count() if work >= THREADING_THRESHOLD else 1

    jobs = []
    for tile, members in by_tile.items():
        tokens = min(tile, chunk)
        chunks = len(_chunks(members[0], tokens))
        group = min(chunks, MAX_CHUNKS_PER_GROUP)
        # A unit is one sequence of one key head.
        most = max(1, JOB_BYTES // (_tile_bytes(spec, tile) * group))
        units = min(most, math.ceil(len(members) * spec.H / threads))
        heads = math.ceil(spec.H / math.ceil(spec.H / min(units, spec.H)))
        together = max(1, units // spec.H)
        jobs += [
            _Job(members[first : first + together], tile, tokens, group, head, min(heads, spec.H - head))
            for first in range(0, len(members), together)
            for head in range(0, spec.H, heads)
        ]
    return jobs, threads


def _chunks(row: Row, tokens: int) -> range:
    return range(row.bos, row.eos, tokens)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile_bytes(spec: Spec, C: int) -> int:
    r = spec.HV // spec.H
    elements = 2 * C * spec.K + r * C * spec.V + (2 + 3 * r) * C * C
    return elements * np.dtype(spec.compute).itemsize


def _run_job(call: Call, g: np.ndarray, beta: np.ndarray, job: _Job, scratch: _Scratch) -> None:
    chunks = [len(_chunks(row, job.tokens)) for row in job.rows]
    pieces = pieces_of(job.rows)
    h = _load_states(call, job, scratch)
    for first in range(0, chunks[0], job.group):
        last = min(first + job.group, chunks[0])
        active = sum(count > first for count in chunks)
        tiles = _prepare(call, g, beta, job, pieces, active, first, last, scratch)
        for chunk in range(first, last):
            _advance(tiles, chunk - first, h[: sum(count > chunk for count in chunks)], scratch)
        _store_outputs(call, job, pieces, active, first, tiles.values)
    _store_states(call, job, h)


def _spread(tiles: np.ndarray, tokens: np.ndarray, per_tile: int) -> None:
    """Copy ``tokens [s, L, ...]`` into ``tiles [s, m, C, ...]``, `per_tile` to each, zeros elsewhere."""
    full, rest = divmod(tokens.shape[1], per_tile)
    if full:
        whole = tokens[:, : full * per_tile]
        tiles[:, :full, :per_tile] = whole.reshape(whole.shape[0], full, per_tile, *whole.shape[2:])
        if per_tile < tiles.shape[2]:
            tiles[:, :full, per_tile:] = 0
    if rest:
        tiles[:, full, :rest] = tokens[:, full * per_tile :]
        tiles[:, full, rest:] = 0
        full += 1
    if full < tiles.shape[1]:
        tiles[:, full:] = 0


def _collect(tokens: np.ndarray, tiles: np.ndarray, per_tile: int) -> None:
    """Copy the tokens back out of their tiles: the inverse of `_spread`."""
    full, rest = divmod(tokens.shape[1], per_tile)
    if full:
        whole = tokens[:, : full * per_tile]
        whole.reshape(whole.shape[0], full, per_tile, *whole.shape[2:])[...] = tiles[:, :full, :per_tile]
    if rest:
        tokens[:, full * per_tile :] = tiles[:, full, :rest]


def _prepare(
    call: Call,
    g: np.ndarray,
    beta: np.ndarray,
    job: _Job,
    pieces: list[Piece],
    active: int,
    first: int,
    last: int,
    scratch: _Scratch,
) -> _Tiles:
    """Gather the chunks [first, last) of the active sequences and compute all that needs no state."""
    spec = call.spec
    dtype = np.dtype(spec.compute)
    r, C, n = spec.HV // spec.H, job.tile, job.heads
    S, m = active, last - first
    x = scratch.take("keys_queries", (S, m, n, 2, C, spec.K), dtype)
    v = scratch.take("values", (S, m, n, r, C, spec.V), dtype)
    G = scratch.take("log_decay", (S, m, n, r, C), np.dtype(np.float64))
    b = scratch.take("beta", (S, m, n, r, C), dtype)

    key_heads = slice(job.first_head, job.first_head + n)
    value_heads = slice(key_heads.start * r, key_heads.stop * r)
    by_token = [
        (x[:, :, :, 0].transpose(0, 1, 3, 2, 4), call.k[:, :, key_heads]),
        (x[:, :, :, 1].transpose(0, 1, 3, 2, 4), call.q[:, :, key_heads]),
        (v.transpose(0, 1, 4, 2, 3, 5), _by_key_head(call.v[:, :, value_heads], r)),
        (G.transpose(0, 1, 4, 2, 3), _by_key_head(g[:, :, value_heads], r)),
        (b.transpose(0, 1, 4, 2, 3), _by_key_head(beta[:, :, value_heads], r)),
    ]
    for piece in pieces:
        if piece.start < active:
            begin, end = first * job.tokens, min(last * job.tokens, piece.row.length)
            for tiles, tokens in by_token:
                _spread(tiles[piece.start : piece.stop], piece.tokens(tokens, begin, end), job.tokens)

    _normalise(x, spec.l2norm, call.scale)
    k = x[:, :, :, 0]
    stacked = x.reshape(S, m, n, 2 * C, spec.K)
    products = scratch.take("products", (S, m, n, 2 * C, C), dtype)
    np.matmul(stacked, k.swapaxes(-1, -2), out=products)

    D = scratch.take("decay", (S, m, n, r, C, C), dtype)
    decay_in, decay_out = _decays(G, D, FORGETS_ALL[spec.compute])
    A = scratch.take("triangle", D.shape, dtype)
    np.multiply(products[:, :, :, None, :C], D, out=A)
    A *= b[..., None]
    D *= products[:, :, :, None, C:]
    T = scratch.take("solve", D.shape, dtype)
    _invert_unit_lower(A.reshape(-1, C, C), T.reshape(-1, C, C), scratch)
    T *= b[..., None, :]
    return _Tiles(k, stacked, v, T, D, decay_in, decay_out)


def _by_key_head(x: np.ndarray, r: int) -> np.ndarray:
    """``[B, T, n r, ...]`` as ``[B, T, n, r, ...]``, a view."""
    return x.reshape(*x.shape[:2], -1, r, *x.shape[3:])


def _normalise(x: np.ndarray, l2norm: bool, scale: float) -> None:
    """Divide keys and queries ``x [S, m, n, 2, C, K]`` by their norms if asked; scale the queries."""
    if l2norm:
        weight = np.matmul(x[..., None, :], x[..., None])[..., 0]
        weight += x.dtype.type(L2_EPS)
        np.sqrt(weight, out=weight)
        np.divide(1, weight, out=weight)
        weight[:, :, :, 1] *= x.dtype.type(scale)
        x *= weight
    elif scale != 1.0:
        x[:, :, :, 1] *= x.dtype.type(scale)


def _decays(g: np.ndarray, D: np.ndarray, forgets_all: float) -> tuple[np.ndarray, np.ndarray]:
    """Fill ``D[..., i, j] = exp(G_i - G_j)`` (0 above the diagonal) and return e^G and e^(G_C - G).

    G is the running sum of `g` (float64, overwritten) over a tile.  It is a large number next to the
    differences that matter, so its float32 value alone would lose their digits: what rounding leaves is added
    back.  A token that forgets everything does not enter the sum, where -inf - -inf would be NaN; it starts a
    new era instead, and nothing decays from one era to a later one.
    """
    forgets = g <= forgets_all
    era = None
    if forgets.any():
        era = np.cumsum(forgets, axis=-1)
        g[forgets] = 0
    G = np.cumsum(g, axis=-1, out=g)
    decay_in = np.exp(G)
    decay_out = np.exp(G[..., -1:] - G)
    high = G.astype(D.dtype)
    np.subtract(high[..., :, None], high[..., None, :], out=D)
    if D.dtype != G.dtype:
        low = np.subtract(G, high, dtype=np.float64).astype(D.dtype)
        D += low[..., :, None]
        D -= low[..., None, :]
    D += _minus_infinity_above(D.shape[-1], D.dtype)
    if era is not None:
        D[era[..., :, None] != era[..., None, :]] = -np.inf
        decay_in[era > 0] = 0
        decay_out[era != era[..., -1:]] = 0
    np.exp(D, out=D)
    return decay_in.astype(D.dtype, copy=False), decay_out.astype(D.dtype, copy=False)


@lru_cache(maxsize=64)
def _minus_infinity_above(n: int, dtype: np.dtype) -> np.ndarray:
    mask = np.triu(np.full((n, n), -np.inf, dtype), 1)
    mask.setflags(write=False)
    return mask


def _invert_unit_lower(A: np.ndarray, T: np.ndarray, scratch: _Scratch) -> None:
    """``T = (I + strictly lower part of A)^-1`` for matrices ``[N, C, C]``; C is a power of two.

    Substitution row by row inside the diagonal blocks, then doubling: ``T21 = -T22 A21 T11``.  Both are as
    stable as solving with the triangle itself, also where keys repeat; a Neumann product is not.
    """
    N, C, _ = A.shape
    base = min(C, INVERSE_BASE)
    negated = scratch.take("blocks", (N, C // base, base, base), A.dtype)
    inverse = scratch.take("block_inverses", negated.shape, A.dtype)
    for i in range(C // base):
        block = slice(i * base, (i + 1) * base)
        np.negative(A[:, block, block], out=negated[:, i])
    inverse[...] = np.eye(base, dtype=A.dtype)
    for i in range(1, base):
        np.matmul(negated[:, :, i : i + 1, :i], inverse[:, :, :i, :i], out=inverse[:, :, i : i + 1, :i])
    for i in range(C // base):
        block = slice(i * base, (i + 1) * base)
        T[:, block, block] = inverse[:, i]
    size = base
    while size < C:
        for start in range(0, C, 2 * size):
            one, two = slice(start, start + size), slice(start + size, start + 2 * size)
            product = scratch.take("doubling", (N, size, size), A.dtype)
            np.matmul(A[:, two, one], T[:, one, one], out=product)
            np.negative(product, out=product)
            np.matmul(T[:, two, two], product, out=T[:, two, one])
            T[:, one, two] = 0
        size *= 2


def _advance(tiles: _Tiles, chunk: int, h: np.ndarray, scratch: _Scratch) -> None:
    """Run one chunk of the sequences that still have one: values become outputs, and `h` goes on."""
    S, n, r, _, V = h.shape
    C = tiles.solve.shape[-1]
    read = scratch.take("read", (S, n, r, 2 * C, V), h.dtype)
    u = scratch.take("u", (S, n, r, C, V), h.dtype)
    written = scratch.take("written", h.shape, h.dtype)
    values = tiles.values[:S, chunk]
    decay_in = tiles.decay_in[:S, chunk]

    np.matmul(tiles.keys_queries[:S, chunk, :, None], h, out=read)
    both = read.reshape(S, n, r, 2, C, V)
    both *= decay_in[:, :, :, None, :, None]
    values -= both[:, :, :, 0]
    np.matmul(tiles.solve[:S, chunk], values, out=u)
    np.matmul(tiles.attend[:S, chunk], u, out=values)
    values += both[:, :, :, 1]

    u *= tiles.decay_out[:S, chunk][..., None]
    np.matmul(tiles.keys[:S, chunk, :, None].swapaxes(-1, -2), u, out=written)
    h *= decay_in[..., -1:, None]
    h += written


def _load_states(call: Call, job: _Job, scratch: _Scratch) -> np.ndarray:
    spec = call.spec
    r = spec.HV // spec.H
    h = scratch.take("h", (len(job.rows), job.heads * r, spec.K, spec.V), np.dtype(spec.compute))
    if call.initial_state is None:
        h[...] = 0
    else:
        states = call.initial_state if spec.layout == "kv" else call.initial_state.swapaxes(-1, -2)
        first = job.first_head * r
        for i, row in enumerate(job.rows):
            h[i] = states[row.read, first : first + h.shape[1]]
    return h.reshape(len(job.rows), job.heads, r, spec.K, spec.V)


def _store_states(call: Call, job: _Job, h: np.ndarray) -> None:
    if call.final_state is None:
        return
    spec = call.spec
    r = spec.HV // spec.H
    states = call.final_state if spec.layout == "kv" else call.final_state.swapaxes(-1, -2)
    value_heads = slice(job.first_head * r, (job.first_head + job.heads) * r)
    for i, row in enumerate(job.rows):
        states[row.write, value_heads] = h[i].reshape(-1, spec.K, spec.V)


def _store_outputs(call: Call, job: _Job, pieces: list[Piece], active: int, first: int, outputs: np.ndarray) -> None:
    r = call.spec.HV // call.spec.H
    value_heads = slice(job.first_head * r, (job.first_head + job.heads) * r)
    out = call.out[:, :, value_heads]
    out = _by_key_head(out, r)
    by_token = outputs.transpose(0, 1, 4, 2, 3, 5)
    begin = first * job.tokens
    for piece in pieces:
        if piece.start < active:
            end = min(begin + outputs.shape[1] * job.tokens, piece.row.length)
            _collect(piece.tokens(out, begin, end), by_token[piece.start : piece.stop], job.tokens)
