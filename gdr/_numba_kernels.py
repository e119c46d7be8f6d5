"""Numba kernels of the gated delta rule: a few tokens at a time, in registers and first-level cache.

The state of one sequence and value head is read once for a tile of up to `TILE` tokens, and written once.
With d_i the decay from the tile's start through token i, w_ij that from after token j through token i, and h
the state at the start::

    R_i  = [k_i; q_i] h                                                     one pass over h for the whole tile
    u_i  = beta_i (v_i - d_i R_ki - sum_{j < i} w_ij (k_i . k_j) u_j)
    o_i  = d_i R_qi + sum_{j <= i} w_ij (q_i . k_j) u_j
    h'   = d_C h + sum_j w_Cj k_j u_j^T                                     one pass

For one token this is the fused recurrence; for several it is the WY form of the chunkwise algorithm with a
chunk small enough that neither BLAS nor a matrix inverse is wanted.  It rounds the state once a tile, not
once a token.

What the compiler needs in order to use vector instructions decides the shape of the loops: rows of one flat
buffer at a constant `PITCH` (so that few overlap checks remain), slices instead of computed indices (so that
none can be negative), and eight rows of the state a pass.

A state in 16 bits is passed as its bits: uint16 stands for bfloat16, and int16 for float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, overload

TILE = 16
PITCH = 272  # of a row of up to 256 numbers; no power of two, so that rows share no cache sets
L2_EPS = 1e-6

# Sums may be reordered and fused; infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_OPTIONS = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}


def _cached(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """`numba.njit` with a cache on disk, or without where there is no place for one."""

    def decorate(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(cache=True, **options, **_OPTIONS)(function)
        except RuntimeError:
            return numba.njit(**options, **_OPTIONS)(function)

    return decorate


# --- 16-bit numbers
# ---------------------------------------------------------------------------------------------


@intrinsic
def _float_from_bits(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_from_float(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float_from_half(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _half_from_float(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def _widen(x):
    """A stored number as one to compute with."""
    raise NotImplementedError


@overload(_widen, inline="always")
def _overload_widen(x):
    if x == types.uint16:
        return lambda x: _float_from_bits(np.uint32(x) << np.uint32(16))
    if x == types.int16:
        return lambda x: _float_from_half(x)
    return lambda x: x


def _narrow(x, like):
    """A computed number, rounded to nearest even, as it is stored beside `like`."""
    raise NotImplementedError


@overload(_narrow, inline="always")
def _overload_narrow(x, like):
    if like == types.uint16:
        return lambda x, like: _bfloat16_bits(x)
    if like == types.int16:
        return lambda x, like: _half_from_float(x)
    return lambda x, like: x


@numba.njit(**_OPTIONS)
def _bfloat16_bits(x):
    bits = _bits_from_float(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded if x == x else np.uint32(0x7FC0))


@_cached()
def convert(source, target):
    """Copy a flat array into another one of another number format."""
    for i in range(target.size):
        target[i] = _narrow(_widen(source[i]), target[i])


# --- one value head of one sequence
# -----------------------------------------------------------------------------


@numba.njit(**_OPTIONS)
def _load_row(row, target, weight, l2norm):
    """Copy a key or query to ``target[:K]``, normalised if asked and times `weight`."""
    K = row.size
    factor = weight
    if l2norm:
        total = row[0] * 0
        for i in range(K):
            total += row[i] * row[i]
        factor = weight / math.sqrt(total + row.dtype.type(L2_EPS))
    for i in range(K):
        target[i] = row[i] * factor


@numba.njit(**_OPTIONS)
def _dot(x, y):
    total = x[0] * 0
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@numba.njit(**_OPTIONS)
def _read(x, count, h, r):
    """``r[m] = x[m] h`` for pairs of rows m of `x`; a row of `r` has PITCH numbers."""
    K, V = h.shape
    for m in range(count):
        one, two = x[2 * m], x[2 * m + 1]
        row = r[2 * m * PITCH : (2 * m + 2) * PITCH]
        for j in range(V):
            row[j] = 0
            row[j + PITCH] = 0
        for i in range(0, K - K % 8, 8):
            a0, a1, a2, a3, a4, a5, a6, a7 = (
                one[i], one[i + 1], one[i + 2], one[i + 3], one[i + 4], one[i + 5], one[i + 6], one[i + 7],
            )  # fmt: skip
            b0, b1, b2, b3, b4, b5, b6, b7 = (
                two[i], two[i + 1], two[i + 2], two[i + 3], two[i + 4], two[i + 5], two[i + 6], two[i + 7],
            )  # fmt: skip
            for j in range(V):
                s0, s1, s2, s3 = h[i, j], h[i + 1, j], h[i + 2, j], h[i + 3, j]
                s4, s5, s6, s7 = h[i + 4, j], h[i + 5, j], h[i + 6, j], h[i + 7, j]
                row[j] += a0 * s0 + a1 * s1 + a2 * s2 + a3 * s3 + a4 * s4 + a5 * s5 + a6 * s6 + a7 * s7
                row[j + PITCH] += b0 * s0 + b1 * s1 + b2 * s2 + b3 * s3 + b4 * s4 + b5 * s5 + b6 * s6 + b7 * s7
        for i in range(K - K % 8, K):
            a0, b0 = one[i], two[i]
            for j in range(V):
                row[j] += a0 * h[i, j]
                row[j + PITCH] += b0 * h[i, j]


@numba.njit(**_OPTIONS)
def _write(h, decay, rest, x, count, r):
    """``h = (decay + rest) h + sum_j k_j u_j^T``; k_j is row 2j of `x`, u_j row 2j of `r`.

    `rest` is what rounding took from `decay`: a rate that is off in the last bit is off alike for the whole
    state and adds up over thousands of tokens.
    """
    K, V = h.shape
    if count == 1:
        u = r[:PITCH]
        for i in range(K):
            c = x[0, i]
            for j in range(V):
                h[i, j] = decay * h[i, j] + (rest * h[i, j] + c * u[j])
        return
    # Four tokens a pass; those that are missing write nothing.
    for m in range(count, (count + 3) // 4 * 4):
        x[2 * m, :K] = 0
        r[2 * m * PITCH : 2 * m * PITCH + V] = 0
    for i in range(K):
        u = r[: 8 * PITCH]
        c0, c1, c2, c3 = x[0, i], x[2, i], x[4, i], x[6, i]
        for j in range(V):
            h[i, j] = decay * h[i, j] + (
                rest * h[i, j] + (c0 * u[j] + c1 * u[j + 2 * PITCH] + c2 * u[j + 4 * PITCH] + c3 * u[j + 6 * PITCH])
            )
        for m in range(4, count, 4):
            u = r[2 * m * PITCH : (2 * m + 8) * PITCH]
            c0, c1, c2, c3 = x[2 * m, i], x[2 * m + 2, i], x[2 * m + 4, i], x[2 * m + 6, i]
            for j in range(V):
                h[i, j] += c0 * u[j] + c1 * u[j + 2 * PITCH] + c2 * u[j + 4 * PITCH] + c3 * u[j + 6 * PITCH]


@numba.njit(**_OPTIONS)
def _solve(x, count, decays, betas, v, r, out, t0, hv, w):
    """Turn the reads `r` of a tile into what its tokens write (row 2i) and into its outputs.

    On return ``w[j]`` is the decay from after token j to the tile's end, and the returned number is that of
    the state.
    """
    V = v.shape[2]
    state_decay = 1.0
    for i in range(count):
        decay = decays[i]
        state_decay *= decay
        for j in range(i):
            w[j] *= decay
        w[i] = 1.0
        mine = r[2 * i * PITCH : (2 * i + 2) * PITCH]
        d = x.dtype.type(state_decay)
        for n in range(V):
            mine[n] *= d
            mine[n + PITCH] *= d
        key, query = x[2 * i], x[2 * i + 1]
        for j in range(0, i - i % 4, 4):
            u = r[2 * j * PITCH : (2 * j + 8) * PITCH]
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            k0, k1, k2, k3 = x[2 * j], x[2 * j + 2], x[2 * j + 4], x[2 * j + 6]
            a0 = x.dtype.type(w0 * _dot(key, k0))
            a1 = x.dtype.type(w1 * _dot(key, k1))
            a2 = x.dtype.type(w2 * _dot(key, k2))
            a3 = x.dtype.type(w3 * _dot(key, k3))
            b0 = x.dtype.type(w0 * _dot(query, k0))
            b1 = x.dtype.type(w1 * _dot(query, k1))
            b2 = x.dtype.type(w2 * _dot(query, k2))
            b3 = x.dtype.type(w3 * _dot(query, k3))
            for n in range(V):
                u0, u1, u2, u3 = u[n], u[n + 2 * PITCH], u[n + 4 * PITCH], u[n + 6 * PITCH]
                mine[n] += a0 * u0 + a1 * u1 + a2 * u2 + a3 * u3
                mine[n + PITCH] += b0 * u0 + b1 * u1 + b2 * u2 + b3 * u3
        for j in range(i - i % 4, i):
            u = r[2 * j * PITCH : (2 * j + 1) * PITCH]
            a0 = x.dtype.type(w[j] * _dot(key, x[2 * j]))
            b0 = x.dtype.type(w[j] * _dot(query, x[2 * j]))
            for n in range(V):
                mine[n] += a0 * u[n]
                mine[n + PITCH] += b0 * u[n]
        beta = x.dtype.type(betas[i])
        own = _dot(query, key)
        value, o = v[t0 + i, hv], out[t0 + i, hv]
        for n in range(V):
            u_n = beta * (value[n] - mine[n])
            mine[n] = u_n
            o[n] = mine[n + PITCH] + own * u_n
    return state_decay


@numba.njit(**_OPTIONS)
def _tile(h, q, k, v, decays, betas, out, t0, count, hk, hv, scale, l2norm, update, x, r, w):
    """Run `count` tokens of one head, from `t0` on; ``h [K, V]`` goes on in place."""
    one = x.dtype.type(1)
    for i in range(count):
        _load_row(k[t0 + i, hk], x[2 * i], one, l2norm)
        _load_row(q[t0 + i, hk], x[2 * i + 1], scale, l2norm)
    _read(x, count, h, r)
    state_decay = _solve(x, count, decays, betas, v, r, out, t0, hv, w)
    if update:
        if count > 1:
            for j in range(count):
                x[2 * j] *= x.dtype.type(w[j])
        decay = x.dtype.type(state_decay)
        rest = x.dtype.type(state_decay - np.float64(decay))
        _write(h, decay, rest, x, count, r)


@numba.njit(**_OPTIONS)
def _tile_transposed(h, q, k, v, decays, betas, out, t, hk, hv, scale, l2norm, update, x):
    """Run one token of one head on a state kept as ``h [V, K]``: a row of it is read and written at once."""
    V, K = h.shape
    _load_row(k[t, hk], x[0], x.dtype.type(1), l2norm)
    _load_row(q[t, hk], x[1], scale, l2norm)
    key, query = x[0], x[1]
    decay = x.dtype.type(decays[0])
    rest = x.dtype.type(decays[0] - np.float64(decay))
    beta = x.dtype.type(betas[0])
    own = _dot(query, key)
    for n in range(V):
        row = h[n]
        on_key, on_query = row[0] * 0, row[0] * 0
        for i in range(K):
            on_key += row[i] * key[i]
            on_query += row[i] * query[i]
        u = beta * (v[t, hv, n] - decay * on_key)
        out[t, hv, n] = decay * on_query + own * u
        if update:
            for i in range(K):
                row[i] = decay * row[i] + (rest * row[i] + u * key[i])


# --- all sequences and heads
# ------------------------------------------------------------------------------------


@numba.njit(**_OPTIONS)
def _gate(A_log, a, dt_bias, b, softplus_beta, softplus_threshold):
    """Decay and write strength of one token and head from the raw logits, in float64."""
    x = np.float64(a) + np.float64(dt_bias)
    softplus = x
    if softplus_beta * x <= softplus_threshold:
        softplus = math.log1p(math.exp(softplus_beta * x)) / softplus_beta
    g = -math.exp(np.float64(A_log)) * softplus
    return math.exp(g), 1.0 / (1.0 + math.exp(-np.float64(b)))


@numba.njit(**_OPTIONS)
def _copy_in(h, flat, start, transposed):
    """Fill ``h [K, V]`` from a stored state."""
    K, V = h.shape
    source = flat[start : start + K * V]
    if not transposed:
        target = h.reshape(K * V)
        for i in range(K * V):
            target[i] = _widen(source[i])
        return
    rows = source.reshape(V, K)
    # Small squares, so that neither side leaves the cache.
    for n0 in range(0, V, 16):
        for i0 in range(0, K, 16):
            for i in range(i0, min(i0 + 16, K)):
                for n in range(n0, min(n0 + 16, V)):
                    h[i, n] = _widen(rows[n, i])


@numba.njit(**_OPTIONS)
def _copy_out(flat, start, h, transposed):
    """Store ``h [K, V]``."""
    K, V = h.shape
    target = flat[start : start + K * V]
    if not transposed:
        source = h.reshape(K * V)
        for i in range(K * V):
            target[i] = _narrow(source[i], target[i])
        return
    rows = target.reshape(V, K)
    for n0 in range(0, V, 16):
        for i0 in range(0, K, 16):
            for n in range(n0, min(n0 + 16, V)):
                for i in range(i0, min(i0 + 16, K)):
                    rows[n, i] = _narrow(h[i, n], target[0])


def _viewable(flat, like):
    """Whether a stored state can be computed with where it is."""
    raise NotImplementedError


@overload(_viewable, inline="always")
def _overload_viewable(flat, like):
    same = flat.dtype == like.dtype
    return lambda flat, like: same


def _view(flat, like, start, rows, columns):
    """The stored state itself as a matrix; an empty one where it cannot be."""
    raise NotImplementedError


@overload(_view, inline="always")
def _overload_view(flat, like, start, rows, columns):
    if flat.dtype == like.dtype:
        return lambda flat, like, start, rows, columns: flat[start : start + rows * columns].reshape(rows, columns)
    return lambda flat, like, start, rows, columns: like[:0].reshape(0, columns)


@_cached()
def run_heads(
    first, last, rows, q, k, v, out, raw, A_log, dt_bias, a, b, scale, softplus_beta, softplus_threshold,
    l2norm, initial, initial_strides, final, final_strides, has_initial, has_final, in_place, transposed,
    tile,
):  # fmt: skip
    """Run the pairs of a sequence and a value head that are numbered from `first` to `last`.

    `q, k [tokens, H, K]`, `v, out [tokens, HV, V]`, `a, b [tokens, HV]` (raw logits, or g and beta); `rows
    [N, 4]` holds first token, last token plus one, and the state rows that are read and written.  `initial`
    and `final` are flat; their strides are those of a state row and of a head, followed by the number of
    state rows.
    """
    H, K = q.shape[1:]
    HV, V = v.shape[1:]
    number = q.dtype.type
    x = np.zeros((2 * TILE, K), q.dtype)
    r = np.empty(2 * TILE * PITCH, q.dtype)
    w = np.empty(TILE, np.float64)
    decays, betas = np.empty(TILE, np.float64), np.empty(TILE, np.float64)
    space = np.empty(K * V, q.dtype)
    columns = np.empty(K * V if transposed else 0, q.dtype)
    scale = number(scale)
    for unit in range(first, last):
        n, hv = unit // HV, unit % HV
        hk = hv // (HV // H)
        bos, eos, source, target = rows[n, 0], rows[n, 1], rows[n, 2], rows[n, 3]
        bos, eos = max(bos, 0), min(eos, v.shape[0])
        if not 0 <= source < max(initial_strides[2], 1) or not 0 <= target < max(final_strides[2], 1):
            out[bos:eos, hv] = 0
            continue
        start = source * initial_strides[0] + hv * initial_strides[1]
        end = target * final_strides[0] + hv * final_strides[1]
        same = in_place and start == end
        if bos == eos and (same or not has_final):
            continue
        # The first token of a transposed state is taken row by row, wherever the state lies and whatever
        # follows: neither may change its bits.
        by_rows = transposed and bos < eos
        direct = has_final and _viewable(final, q) and (not transposed or eos - bos == 1)
        if direct and has_initial and not same:
            final[end : end + K * V] = initial[start : start + K * V]
        elif direct and not has_initial:
            final[end : end + K * V] = 0
        if direct and transposed:
            h = _view(final, space, end, V, K)
        elif direct:
            h = _view(final, space, end, K, V)
        else:
            h = space.reshape(V, K) if by_rows else space.reshape(K, V)
            if has_initial:
                _copy_in(h, initial, start, transposed and not by_rows)
            else:
                h[:] = 0
        t0 = bos
        while t0 < eos:
            t1 = t0 + 1 if by_rows else min(t0 + tile, eos)
            for t in range(t0, t1):
                if raw:
                    decays[t - t0], betas[t - t0] = _gate(
                        A_log[hv], a[t, hv], dt_bias[hv], b[t, hv], softplus_beta, softplus_threshold
                    )
                else:
                    decays[t - t0], betas[t - t0] = math.exp(np.float64(a[t, hv])), b[t, hv]
            update = has_final or t1 < eos
            if by_rows:
                _tile_transposed(h, q, k, v, decays, betas, out, t0, hk, hv, scale, l2norm, update, x)
            else:
                _tile(h, q, k, v, decays, betas, out, t0, t1 - t0, hk, hv, scale, l2norm, update, x, r, w)
            t0 = t1
            if by_rows and t0 < eos:
                h = columns.reshape(K, V)
                _copy_in(h, space, 0, True)
                by_rows = False
        if has_final and not direct:
            _copy_out(final, end, h, transposed and not by_rows)


@_cached(parallel=True)
def run_heads_parallel(
    bounds, rows, q, k, v, out, raw, A_log, dt_bias, a, b, scale, softplus_beta, softplus_threshold, l2norm,
    initial, initial_strides, final, final_strides, has_initial, has_final, in_place, transposed, tile,
):  # fmt: skip
    """`run_heads` with a thread for each range between two `bounds`."""
    for i in numba.prange(bounds.size - 1):
        run_heads(
            bounds[i], bounds[i + 1], rows, q, k, v, out, raw, A_log, dt_bias, a, b, scale, softplus_beta,
            softplus_threshold, l2norm, initial, initial_strides, final, final_strides, has_initial,
            has_final, in_place, transposed, tile,
        )  # fmt: skip


# --- tokens that are not written into the state
# ------------------------------------------------------------------------------


@numba.njit(**_OPTIONS)
def _read_transposed(x, count, flat, start, r, row, V):
    """``r[m] = x[m] h`` for rows m of `x` and a stored ``h [V, K]``; `row` is room for one of its rows."""
    K = x.shape[1]
    for n in range(V):
        stored = flat[start + n * K : start + (n + 1) * K]
        for i in range(K):
            row[i] = _widen(stored[i])
        for m in range(2 * count):
            r[m * PITCH + n] = _dot(row, x[m])


@numba.njit(**_OPTIONS)
def _add_pending(x, count, keys, updates, decays, fill, r):
    """Add to the reads `r` of a state, which the pending tokens' decays have reached, what those have written."""
    number = x.dtype.type
    V = updates.shape[1]
    left = number(decays[0])
    for m in range(2 * count):
        row = r[m * PITCH : m * PITCH + V]
        for n in range(V):
            row[n] *= left
        for j in range(fill):
            weight = number(decays[1 + j] * _dot(x[m], keys[j]))
            u = updates[j]
            for n in range(V):
                row[n] += weight * u[n]


@numba.njit(**_OPTIONS)
def _solve_tree(x, count, parents, decays, betas, v, r, out, t0, hv, left, w):
    """`_solve` where token i follows the token ``parents[i]``, or the state (-1), and sees no others."""
    number = x.dtype.type
    V = v.shape[2]
    for i in range(count):
        parent = parents[i]
        left[i] = (left[parent] if parent >= 0 else 1.0) * decays[i]
        for j in range(count):
            w[i, j] = 0.0
        if parent >= 0:
            for j in range(parent + 1):
                w[i, j] = w[parent, j] * decays[i]
        w[i, i] = 1.0
        mine, reads = r[2 * i * PITCH : 2 * i * PITCH + V], r[(2 * i + 1) * PITCH : (2 * i + 1) * PITCH + V]
        d = number(left[i])
        for n in range(V):
            mine[n] *= d
            reads[n] *= d
        for j in range(i):
            if w[i, j] != 0:
                on_key, on_query = (
                    number(w[i, j] * _dot(x[2 * i], x[2 * j])),
                    number(w[i, j] * _dot(x[2 * i + 1], x[2 * j])),
                )
                u = r[2 * j * PITCH : 2 * j * PITCH + V]
                for n in range(V):
                    mine[n] += on_key * u[n]
                    reads[n] += on_query * u[n]
        beta, own = number(betas[i]), _dot(x[2 * i + 1], x[2 * i])
        value, o = v[t0 + i, hv], out[t0 + i, hv]
        for n in range(V):
            u_n = beta * (value[n] - mine[n])
            mine[n] = u_n
            o[n] = reads[n] + own * u_n


@_cached()
def run_apart(
    first, last, slots, q, k, v, out, A_log, dt_bias, a, b, scale, softplus_beta, softplus_threshold, l2norm,
    states, transposed, counts, keys, updates, decays, draft, parents, tree, new_keys, new_updates, new_decays,
    new_fill,
):  # fmt: skip
    """Run sequences of T tokens on states with pending tokens, and keep what they would write apart from the states.

    Units `first` to `last` are pairs of a sequence and a value head.  `states` is flat.  Sequence n has
    `counts[n]` pending tokens in `keys [slots, H, C, K]`, `updates [slots, HV, C, V]` and `decays [slots, HV,
    1 + C]`.  Drafts go to the arrays `new_...`, with their own decays; a token that is no draft, T is 1 then,
    to the pending ones, which these arrays are.
    """
    H, K = q.shape[1:]
    HV, V = v.shape[1:]
    T = parents.shape[1]
    number = q.dtype.type
    x = np.zeros((2 * TILE, K), q.dtype)
    r = np.empty(2 * TILE * PITCH, q.dtype)
    w, left = np.empty((TILE, TILE), np.float64), np.empty(TILE, np.float64)
    own_decays, betas = np.empty(TILE, np.float64), np.empty(TILE, np.float64)
    space = np.empty(K * V, q.dtype)
    scale = number(scale)
    for unit in range(first, last):
        n, hv = unit // HV, unit % HV
        slot, hk, t0 = slots[n], hv // (HV // H), n * T
        if slot < 0:
            out[t0 : t0 + T, hv] = 0
            continue
        for i in range(T):
            own_decays[i], betas[i] = _gate(
                A_log[hv], a[t0 + i, hv], dt_bias[hv], b[t0 + i, hv], softplus_beta, softplus_threshold
            )
            _load_row(k[t0 + i, hk], x[2 * i], number(1), l2norm)
            _load_row(q[t0 + i, hk], x[2 * i + 1], scale, l2norm)
        start = (slot * HV + hv) * K * V
        if transposed:
            _read_transposed(x, T, states, start, r, space[:K], V)
        elif _viewable(states, q):
            _read(x, T, _view(states, space, start, K, V), r)
        else:
            h = space.reshape(K, V)
            _copy_in(h, states, start, False)
            _read(x, T, h, r)
        count = counts[n]
        if count > 0:
            _add_pending(x, T, keys[slot, hk], updates[slot, hv], decays[slot, hv], count, r)
        if tree:
            _solve_tree(x, T, parents[n], own_decays, betas, v, r, out, t0, hv, left, w)
        else:
            _solve(x, T, own_decays, betas, v, r, out, t0, hv, left)
        at = 0 if draft else count
        for i in range(T):
            new_updates[slot, hv, at + i] = r[2 * i * PITCH : 2 * i * PITCH + V]
            if hv % (HV // H) == 0:
                new_keys[slot, hk, at + i] = x[2 * i]
            if draft:
                new_decays[slot, hv, 1 + i] = own_decays[i]
            else:
                for j in range(1 + at):
                    new_decays[slot, hv, j] *= own_decays[i]
                new_decays[slot, hv, 1 + at] = 1
        if hv == 0:
            new_fill[slot] = at + T


@_cached(parallel=True)
def run_apart_parallel(
    bounds, slots, q, k, v, out, A_log, dt_bias, a, b, scale, softplus_beta, softplus_threshold, l2norm, states,
    transposed, counts, keys, updates, decays, draft, parents, tree, new_keys, new_updates, new_decays, new_fill,
):  # fmt: skip
    """`run_apart` with a thread for each range between two `bounds`."""
    for i in numba.prange(bounds.size - 1):
        run_apart(
            bounds[i], bounds[i + 1], slots, q, k, v, out, A_log, dt_bias, a, b, scale, softplus_beta,
            softplus_threshold, l2norm, states, transposed, counts, keys, updates, decays, draft, parents, tree,
            new_keys, new_updates, new_decays, new_fill,
        )  # fmt: skip


@_cached()
def write_entries(first, last, targets, entries, states, transposed, keys, updates, decays, fill):
    """Write tokens kept apart from states into them: of row `entries[n]` of the arrays into state `targets[n]`.

    Units `first` to `last` are pairs of an n and a value head.  ``h = d_0 h + sum_j d_j k_j u_j^T``, by as many tokens
    at a time as a tile has.
    """
    H, K = keys.shape[1], keys.shape[3]
    HV, V = updates.shape[1], updates.shape[3]
    number = keys.dtype.type
    rows, columns = (V, K) if transposed else (K, V)
    x = np.zeros((2 * TILE, rows), keys.dtype)
    r = np.empty(2 * TILE * PITCH, keys.dtype)
    space = np.empty(K * V, keys.dtype)
    for unit in range(first, last):
        n, hv = unit // HV, unit % HV
        entry, hk = entries[n], hv // (HV // H)
        start = (targets[n] * HV + hv) * K * V
        direct = _viewable(states, space)
        if direct:
            h = _view(states, space, start, rows, columns)
        else:
            h = space.reshape(rows, columns)
            _copy_in(h, states, start, False)
        left = decays[entry, hv, 0]
        for t0 in range(0, fill[entry], TILE):
            count = min(TILE, fill[entry] - t0)
            for j in range(count):
                weight = number(decays[entry, hv, 1 + t0 + j])
                # What multiplies a row of the stored state, and what is added to it.
                if transposed:
                    r[2 * j * PITCH : 2 * j * PITCH + K] = keys[entry, hk, t0 + j]
                    for i in range(V):
                        x[2 * j, i] = weight * updates[entry, hv, t0 + j, i]
                else:
                    r[2 * j * PITCH : 2 * j * PITCH + V] = updates[entry, hv, t0 + j]
                    for i in range(K):
                        x[2 * j, i] = weight * keys[entry, hk, t0 + j, i]
            decay = number(left)
            _write(h, decay, number(left - np.float64(decay)), x, count, r)
            left = 1.0
        if not direct:
            _copy_out(states, start, h, False)


@_cached(parallel=True)
def write_entries_parallel(bounds, targets, entries, states, transposed, keys, updates, decays, fill):
    """`write_entries` with a thread for each range between two `bounds`."""
    for i in numba.prange(bounds.size - 1):
        write_entries(bounds[i], bounds[i + 1], targets, entries, states, transposed, keys, updates, decays, fill)
