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
from gdr._numpy_scratch import Scratch, scratch_of_its_own
from gdr._rows import Piece, Row, live_rows, pieces_of

L2_EPS = 1e-6

# Tokens of a tile at most: its matrices grow with the square of it, and larger ones are slower anyway.
MAX_CHUNK = 256
# Where BLAS multiplies few rows at its full speed, the work that a larger tile adds brings nothing.
MAX_THIN_CHUNK = 16
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
    pieces: list[Piece]
    read: slice | None  # their states, where they are neighbours
    write: slice | None
    tile: int  # rows of a tile: a power of two
    tokens: int  # tokens of a tile, at most `tile`
    group: int  # chunks prepared at a time
    first_head: int
    heads: int


class _Tiles:
    """The arrays of m chunks of S sequences; axes: sequence, chunk, key head, (value head,) ..."""

    def __init__(self, scratch: Scratch, S: int, m: int, n: int, r: int, C: int, K: int, V: int, dtype: np.dtype):
        take = scratch.take
        self.x = take("keys_queries", (S, m, n, 2, C, K), dtype)
        self.values = take("values", (S, m, n, r, C, V), dtype)  # replaced by the outputs
        self.log_decays = take("log_decays", (S, m, n, r, C), np.dtype(np.float64))
        self.betas = take("betas", (S, m, n, r, C), dtype)
        self.by_token = (
            self.x[:, :, :, 0].transpose(0, 1, 3, 2, 4),
            self.x[:, :, :, 1].transpose(0, 1, 3, 2, 4),
            self.values.transpose(0, 1, 4, 2, 3, 5),
            self.log_decays.transpose(0, 1, 4, 2, 3),
            self.betas.transpose(0, 1, 4, 2, 3),
        )
        self.keys = self.x[:, :, :, 0]
        self.keys_queries = self.x.reshape(S, m, n, 2 * C, K)
        self.products = take("products", (S, m, n, 2 * C, C), dtype)
        self.attend = take("attend", (S, m, n, r, C, C), dtype)  # M_q * D
        self.triangle = take("triangle", self.attend.shape, dtype)
        self.solve = take("solve", self.attend.shape, dtype)  # T
        self.decay_in = self.decay_out = self.betas  # e^G and e^(G_C - G), to be replaced


class _States:
    """The states of S sequences and what a chunk computes with them; axes: sequence, key head, value head, ..."""

    def __init__(self, scratch: Scratch, S: int, n: int, r: int, C: int, K: int, V: int, dtype: np.dtype):
        take = scratch.take
        self.h = take("h", (S, n, r, K, V), dtype)
        self.read = take("read", (S, n, r, 2 * C, V), dtype)
        self.both = self.read.reshape(S, n, r, 2, C, V)
        self.u = take("u", (S, n, r, C, V), dtype)
        self.written = take("written", self.h.shape, dtype)


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    spec, threads = call.spec, _threads.thread_count()
    chunk = min(call.chunk_size, MAX_THIN_CHUNK if _threads.thin_products() else MAX_CHUNK)
    plan = spec.plan.get((chunk, threads))
    if plan is None:
        rows = live_rows(call)
        plan = _plan(spec, rows, chunk, threads) if rows else ([], 1)
        if len(rows) == spec.N and call.cu_seqlens is None and call.initial_slots is None and call.final_slots is None:
            spec.plan[chunk, threads] = plan
    jobs, threads = plan
    if not jobs:
        return
    g, beta = gates(call) if spec.gates == "raw" else (call.g, call.beta)

    def work(jobs: Iterator[_Job]) -> None:
        with scratch_of_its_own() as scratch, np.errstate(all="ignore"):
            for job in jobs:
                _run_job(call, g, beta, job, scratch)

    if 2 * jobs[0].tile * spec.K * spec.V < BLAS_THREADING_THRESHOLD:
        _threads.for_each(work, jobs, threads)
    else:
        with _threads.one_blas_thread:
            _threads.for_each(work, jobs, threads)


def _plan(spec: Spec, rows: list[Row], chunk: int, threads: int) -> tuple[list[_Job], int]:
    """Split the call into jobs, largest tiles first; return them and the number of threads to use."""
    by_tile: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.eos - row.bos, reverse=True):
        by_tile.setdefault(_power_of_two(min(row.eos - row.bos, chunk)), []).append(row)
    work = sum(len(_chunks(row, chunk)) * tile for tile, members in by_tile.items() for row in members)
    work *= 3 * spec.HV * spec.K * spec.V
    threads = threads if work >= THREADING_THRESHOLD else 1

    jobs = []
    for tile, members in by_tile.items():
        tokens = min(tile, chunk)
        chunks = len(_chunks(members[0], tokens))
        group = min(chunks, MAX_CHUNKS_PER_GROUP)
        # A unit is one sequence of one key head.
        most = max(1, JOB_BYTES // (_tile_bytes(spec, tile) * group))
        # Twice as many jobs as threads, for other work may keep one of them.
        units = min(most, math.ceil(len(members) * spec.H / (1 if threads == 1 else 2 * threads)))
        heads = math.ceil(spec.H / math.ceil(spec.H / min(units, spec.H)))
        together = max(1, units // spec.H)
        for first in range(0, len(members), together):
            some = members[first : first + together]
            shared = (
                some,
                pieces_of(some),
                _neighbours([row.read for row in some]),
                _neighbours([row.write for row in some]),
            )
            jobs += [
                _Job(*shared, tile, tokens, group, head, min(heads, spec.H - head)) for head in range(0, spec.H, heads)
            ]
    return jobs, threads


def _neighbours(numbers: list[int]) -> slice | None:
    first, last = numbers[0], numbers[0] + len(numbers)
    return slice(first, last) if numbers == list(range(first, last)) else None


def _chunks(row: Row, tokens: int) -> range:
    return range(row.bos, row.eos, tokens)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile_bytes(spec: Spec, C: int) -> int:
    r = spec.HV // spec.H
    elements = 2 * C * spec.K + r * C * spec.V + (2 + 3 * r) * C * C
    return elements * np.dtype(spec.compute).itemsize


def _run_job(call: Call, g: np.ndarray, beta: np.ndarray, job: _Job, scratch: Scratch) -> None:
    spec = call.spec
    sizes = job.heads, spec.HV // spec.H, job.tile, spec.K, spec.V, np.dtype(spec.compute)
    chunks = [len(_chunks(row, job.tokens)) for row in job.rows]
    every = states = scratch.make(_States, len(chunks), *sizes)
    _load_states(call, job, every.h)
    for first in range(0, chunks[0], job.group):
        last = min(first + job.group, chunks[0])
        tiles = scratch.make(_Tiles, _count_above(chunks, first), last - first, *sizes)
        _prepare(call, g, beta, job, tiles, first, last, scratch)
        for chunk in range(first, last):
            active = _count_above(chunks, chunk)
            if active < len(states.h):
                states = scratch.make(_States, active, *sizes)
            _advance(tiles, chunk - first, states)
        _store_outputs(call, job, first, tiles)
    _store_states(call, job, every.h)


def _count_above(chunks: list[int], chunk: int) -> int:
    """How many of some sequences, the longest first, have more chunks."""
    return len(chunks) if chunks[-1] > chunk else sum(count > chunk for count in chunks)


def _spread(tiles: np.ndarray, tokens: np.ndarray, per_tile: int) -> None:
    """Copy ``tokens [s, L, ...]`` into ``tiles [s, m, C, ...]``, `per_tile` to each, zeros elsewhere."""
    if tokens.shape[1] == per_tile and tiles.shape[1:3] == (1, per_tile):
        tiles[:, 0] = tokens
        return
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
    tiles: _Tiles,
    first: int,
    last: int,
    scratch: Scratch,
) -> None:
    """Gather the chunks [first, last) of the active sequences and compute all that needs no state."""
    spec = call.spec
    r, C, active = spec.HV // spec.H, job.tile, len(tiles.x)
    key_heads = slice(job.first_head, job.first_head + job.heads)
    value_heads = slice(key_heads.start * r, key_heads.stop * r)
    operands = (
        call.k[:, :, key_heads],
        call.q[:, :, key_heads],
        *(_by_key_head(x[:, :, value_heads], r) for x in (call.v, g, beta)),
    )
    for piece in job.pieces:
        if piece.start < active:
            begin, end = first * job.tokens, min(last * job.tokens, piece.row.length)
            for tokens, target in zip(operands, tiles.by_token):
                _spread(target[piece.start : piece.stop], piece.tokens(tokens, begin, end), job.tokens)

    _normalise(tiles.x, spec.l2norm, call.scale)
    products, D, A, T = tiles.products, tiles.attend, tiles.triangle, tiles.solve
    np.matmul(tiles.keys_queries, tiles.keys.swapaxes(-1, -2), out=products)
    tiles.decay_in, tiles.decay_out = _decays(tiles.log_decays, D, FORGETS_ALL[spec.compute])
    np.multiply(products[:, :, :, None, :C], D, out=A)
    A *= tiles.betas[..., None]
    D *= products[:, :, :, None, C:]
    _invert_unit_lower(A.reshape(-1, C, C), T.reshape(-1, C, C), scratch)
    T *= tiles.betas[..., None, :]


def _by_key_head(x: np.ndarray, r: int) -> np.ndarray:
    """``[B, T, n r, ...]`` as ``[B, T, n, r, ...]``, a view."""
    return x.reshape(*x.shape[:2], -1, r, *x.shape[3:])


def _normalise(x: np.ndarray, l2norm: bool, scale: float) -> None:
    """Divide keys and queries ``x [S, m, n, 2, C, K]`` by their norms if asked; scale the queries."""
    if l2norm:
        weight = np.einsum("...k,...k->...", x, x)[..., None]
        weight += x.dtype.type(L2_EPS)
        np.sqrt(weight, out=weight)
        np.divide(1, weight, out=weight)
        weight[:, :, :, 1] *= x.dtype.type(scale)
        x *= weight
    elif scale != 1.0:
        x[:, :, :, 1] *= x.dtype.type(scale)


def _decays(g: np.ndarray, D: np.ndarray, forgets_all: float) -> tuple[np.ndarray, np.ndarray]:
    """Fill ``D[..., i, j] = exp(G_i - G_j)`` (0 above the diagonal) and return e^G and e^(G_C - G).

    G is the running sum of `g` (float64, overwritten) over a tile.  It is a large number next to the differences that
    matter, so they are taken before they are rounded.  A token that forgets everything does not enter the sum, where
    -inf - -inf would be NaN; it starts a new era instead, and nothing decays from one era to a later one.
    """
    forgets = g <= forgets_all
    era = None
    if forgets.any():
        era = np.cumsum(forgets, axis=-1)
        g[forgets] = 0
    G = np.cumsum(g, axis=-1, out=g)
    decay_in = np.exp(G)
    decay_out = np.exp(G[..., -1:] - G)
    np.subtract(G[..., :, None], G[..., None, :], out=D, dtype=G.dtype, casting="same_kind")
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


def _diagonal_blocks(A: np.ndarray, size: int) -> np.ndarray:
    """The blocks on the diagonals of matrices ``[N, C, C]``: ``[N, C / size, size, size]``, a view."""
    N, C, _ = A.shape
    matrix, row, column = A.strides
    return np.ndarray((N, C // size, size, size), A.dtype, A, 0, (matrix, size * (row + column), row, column))


@lru_cache(maxsize=64)
def _identity(n: int, dtype: np.dtype) -> np.ndarray:
    identity = np.eye(n, dtype=dtype)
    identity.setflags(write=False)
    return identity


def _invert_unit_lower(A: np.ndarray, T: np.ndarray, scratch: Scratch) -> None:
    """``T = (I + strictly lower part of A)^-1`` for matrices ``[N, C, C]``; C is a power of two.

    `A` is overwritten.  Substitution row by row inside the diagonal blocks, then doubling: ``T21 = -T22 A21 T11``.
    Both are as stable as solving with the triangle itself, also where keys repeat; a Neumann product is not.
    """
    N, C, _ = A.shape
    base = min(C, INVERSE_BASE)
    negated, inverse = _diagonal_blocks(A, base), _diagonal_blocks(T, base)
    np.negative(negated, out=negated)
    inverse[...] = _identity(base, A.dtype)
    for i in range(1, base):
        np.matmul(negated[:, :, i : i + 1, :i], inverse[:, :, :i, :i], out=inverse[:, :, i : i + 1, :i])
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


def _advance(tiles: _Tiles, chunk: int, states: _States) -> None:
    """Run one chunk of the sequences that still have one: values become outputs, and the states go on."""
    h, both, u, written = states.h, states.both, states.u, states.written
    S = len(h)
    values = tiles.values[:S, chunk]
    decay_in = tiles.decay_in[:S, chunk]

    np.matmul(tiles.keys_queries[:S, chunk, :, None], h, out=states.read)
    both *= decay_in[:, :, :, None, :, None]
    values -= both[:, :, :, 0]
    np.matmul(tiles.solve[:S, chunk], values, out=u)
    np.matmul(tiles.attend[:S, chunk], u, out=values)
    values += both[:, :, :, 1]

    u *= tiles.decay_out[:S, chunk][..., None]
    np.matmul(tiles.keys[:S, chunk, :, None].swapaxes(-1, -2), u, out=written)
    h *= decay_in[..., -1:, None]
    h += written


def _load_states(call: Call, job: _Job, h: np.ndarray) -> None:
    if call.initial_state is None:
        h[...] = 0
        return
    states = _stored(call.initial_state, call, job)
    if job.read is not None:
        h[...] = states[job.read]
    else:
        for i, row in enumerate(job.rows):
            h[i] = states[row.read]


def _store_states(call: Call, job: _Job, h: np.ndarray) -> None:
    if call.final_state is None:
        return
    states = _stored(call.final_state, call, job)
    if job.write is not None:
        states[job.write] = h
    else:
        for i, row in enumerate(job.rows):
            states[row.write] = h[i]


def _stored(states: np.ndarray, call: Call, job: _Job) -> np.ndarray:
    """The stored states of a job's heads: ``[slots, n, r, K, V]``, a view."""
    spec = call.spec
    heads = slice(job.first_head, job.first_head + job.heads)
    states = states if spec.layout == "kv" else states.swapaxes(-1, -2)
    return states.reshape(len(states), spec.H, -1, spec.K, spec.V)[:, heads]


def _store_outputs(call: Call, job: _Job, first: int, tiles: _Tiles) -> None:
    r = call.spec.HV // call.spec.H
    active, chunks = tiles.values.shape[:2]
    value_heads = slice(job.first_head * r, (job.first_head + job.heads) * r)
    out = _by_key_head(call.out[:, :, value_heads], r)
    begin = first * job.tokens
    for piece in job.pieces:
        if piece.start < active:
            end = min(begin + chunks * job.tokens, piece.row.length)
            _collect(piece.tokens(out, begin, end), tiles.by_token[2][piece.start : piece.stop], job.tokens)
