"""The gated delta rule in float64, written to be read.

Each operation of the package has its oracle here, under the same name: loops over sequences, heads and
tokens, one formula a line, every intermediate in float64.  Nothing here is fast, and nothing is shared with
the code that is.

NumPy arrays of any dtype go in, new float64 arrays come out, and no argument is modified.  The first three
oracles are the recurrence itself, token by token; `chunk_gated_delta_rule` is the WY form, which reaches the
same numbers by another derivation (Yang et al. 2024, arXiv:2412.06464).

Rows of a batch follow these rules.

* Sequence ``n`` reads the state ``initial_slots[n]`` and writes the state ``final_slots[n]``.  Every row
  reads the pool as it was before the call.
* A row with a negative slot on either side is padding: nothing is read or written, and its outputs are
  exactly 0.
* A sequence without tokens leaves the state as it is: its final state is its initial state.
* Tokens that belong to no sequence have the output 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.special import expit

__all__ = [
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_sigmoid_gating_delta_rule_update",
    "gated_delta_rule_gate",
]

Array = NDArray[np.float64]
# One head of one sequence: (q, k [T, K], v [T, V], g, beta [T], h [K, V]) -> (o [T, V], h [K, V]).
Head = Callable[[Array, Array, Array, Array, Array, Array], "tuple[Array, Array]"]

L2_EPS = 1e-6


def softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """``log(1 + exp(beta x)) / beta`` up to the threshold, and x itself beyond it."""
    small = beta * x <= threshold
    # exp sees 0 where the result is not used, so that it cannot overflow.
    return np.where(small, np.log1p(np.exp(np.where(small, beta * x, 0.0))) / beta, x)


def l2norm(x: Array) -> Array:
    """Divide x by its Euclidean norm along the last axis, with 1e-6 under the square root."""
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + L2_EPS)


def gated_delta_rule_gate(
    A_log: ArrayLike,
    a: ArrayLike,
    dt_bias: ArrayLike,
    b: ArrayLike,
    *,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> tuple[Array, Array]:
    """Turn raw logits into the log decay and the write strength.

    Parameters
    ----------
    A_log, dt_bias : array_like, [HV]
        Log of the decay rate, and bias of the time step.
    a, b : array_like, [..., HV]
        Raw logits of the decay and of the write strength.
    softplus_beta, softplus_threshold : float
        Parameters of the softplus.

    Returns
    -------
    g : ndarray of float64, [..., HV]
        ``-exp(A_log) * softplus(a + dt_bias)``.
    beta : ndarray of float64, [..., HV]
        ``sigmoid(b)``.
    """
    A_log, a, dt_bias, b = _float64(A_log), _float64(a), _float64(dt_bias), _float64(b)
    g = -np.exp(A_log) * softplus(a + dt_bias, softplus_beta, softplus_threshold)
    beta = expit(b)
    return g, beta


def fused_sigmoid_gating_delta_rule_update(
    A_log: ArrayLike,
    a: ArrayLike,
    dt_bias: ArrayLike,
    softplus_beta: float,
    softplus_threshold: float,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    b: ArrayLike,
    initial_state_source: ArrayLike | None = None,
    initial_state_indices: ArrayLike | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: ArrayLike | None = None,
    *,
    output_state_indices: ArrayLike | None = None,
    state_layout: str = "kv",
    disable_state_update: bool = False,
) -> tuple[Array, Array | None]:
    """Run the recurrence from raw logits on a pool of states.

    Parameters
    ----------
    A_log, dt_bias : array_like, [HV]
        Log of the decay rate, and bias of the time step.
    a, b : array_like, [B, T, HV] or [B * T, HV]
        Raw logits of the decay and of the write strength.
    softplus_beta, softplus_threshold : float
        Parameters of the softplus.
    q, k : array_like, [B, T, H, K]
        Queries and keys.  Value head ``hv`` uses key head ``hv // (HV // H)``.
    v : array_like, [B, T, HV, V]
        Values.
    initial_state_source : array_like, [num_slots, HV, K, V], optional
        The pool.  Without it every sequence starts from 0.
    initial_state_indices : array_like of int, [N], optional
        The slot that each sequence reads and, without `output_state_indices`, writes.  By default slot ``n``.
    scale : float, optional
        Factor on q; ``K ** -0.5`` by default.
    use_qk_l2norm_in_kernel : bool
        Divide q and k by their norms first.
    cu_seqlens : array_like of int, [N + 1], optional
        Bounds of N sequences packed along T; B is 1 then.
    output_state_indices : array_like of int, [N], optional
        The slot that each sequence writes.
    state_layout : {"kv", "vk"}
        Whether the pool is ``[num_slots, HV, K, V]`` or ``[num_slots, HV, V, K]``.
    disable_state_update : bool
        Leave the pool as it is.

    Returns
    -------
    o : ndarray of float64, [B, T, HV, V]
        The outputs.
    pool : ndarray of float64 or None
        The pool after the call: a new array of the shape of `initial_state_source`.
    """
    q, k, v = _float64(q), _float64(k), _float64(v)
    a, b = _float64(a).reshape(v.shape[:3]), _float64(b).reshape(v.shape[:3])
    g, beta = gated_delta_rule_gate(
        A_log, a, dt_bias, b, softplus_beta=softplus_beta, softplus_threshold=softplus_threshold
    )
    spans = _spans(v, cu_seqlens)
    pool = None if initial_state_source is None else _to_kv(_float64(initial_state_source), state_layout)
    initial_slots = _slots(initial_state_indices, len(spans))
    final_slots = initial_slots if output_state_indices is None else _slots(output_state_indices, len(spans))
    o, states = _rows(
        _recurrent_head,
        q,
        k,
        v,
        g,
        beta,
        scale,
        use_qk_l2norm_in_kernel,
        spans,
        pool,
        initial_slots,
        final_slots,
    )
    if pool is None:
        return o, None
    new_pool = pool.copy()
    if not disable_state_update:
        for (_, bos, eos), read, written, h in zip(spans, initial_slots, final_slots, states, strict=True):
            # Without tokens a slot stays as it is: another sequence may be writing it.
            if h is not None and (bos < eos or read != written):
                new_pool[written] = h
    return o, _from_kv(new_pool, state_layout)


def fused_recurrent_gated_delta_rule(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    beta: ArrayLike,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: ArrayLike | None = None,
    *,
    state_layout: str = "kv",
) -> tuple[Array, Array | None]:
    """Run the recurrence from given gates, token by token.

    Parameters
    ----------
    q, k : array_like, [B, T, H, K]
        Queries and keys.  Value head ``hv`` uses key head ``hv // (HV // H)``.
    v : array_like, [B, T, HV, V]
        Values.
    g, beta : array_like, [B, T, HV] or [B * T, HV]
        Log decay and write strength.
    scale : float, optional
        Factor on q; ``K ** -0.5`` by default.
    initial_state : array_like, [N, HV, K, V], optional
        The state of each sequence before its first token; 0 by default.
    output_final_state : bool
        Return the states after the last tokens too.
    use_qk_l2norm_in_kernel : bool
        Divide q and k by their norms first.
    cu_seqlens : array_like of int, [N + 1], optional
        Bounds of N sequences packed along T; B is 1 then.
    state_layout : {"kv", "vk"}
        Whether a state is ``[K, V]`` or ``[V, K]``.

    Returns
    -------
    o : ndarray of float64, [B, T, HV, V]
        The outputs.
    h : ndarray of float64 or None, [N, HV, K, V]
        The final states, if asked for.
    """
    return _given(
        _recurrent_head, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        cu_seqlens, state_layout,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    beta: ArrayLike,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: ArrayLike | None = None,
    *,
    state_layout: str = "kv",
    chunk_size: int = 64,
) -> tuple[Array, Array | None]:
    """Run the same map in chunks of tokens: the WY form, one triangular system per head and chunk.

    Parameters
    ----------
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
    state_layout
        As in `fused_recurrent_gated_delta_rule`.
    chunk_size : int
        Tokens a chunk.  The result depends on it by rounding alone.

    Returns
    -------
    o, h
        As in `fused_recurrent_gated_delta_rule`.
    """

    def head(q: Array, k: Array, v: Array, g: Array, beta: Array, h: Array) -> tuple[Array, Array]:
        o = np.zeros_like(v)
        for start in range(0, len(v), chunk_size):
            c = slice(start, start + chunk_size)
            o[c], h = _chunk_head(q[c], k[c], v[c], g[c], beta[c], h)
        return o, h

    return _given(
        head, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        state_layout,
    )  # fmt: skip


def _recurrent_head(q: Array, k: Array, v: Array, g: Array, beta: Array, h: Array) -> tuple[Array, Array]:
    """Run one head of one sequence token by token: forget, error, write, read."""
    o = np.zeros_like(v)
    h = h.copy()
    for t in range(len(v)):
        h *= np.exp(g[t])
        u = beta[t] * (v[t] - h.T @ k[t])
        h += np.outer(k[t], u)
        o[t] = h.T @ q[t]
    return o, h


def _chunk_head(q: Array, k: Array, v: Array, g: Array, beta: Array, h: Array) -> tuple[Array, Array]:
    """Run one head over one chunk at once.

    With ``d_i`` the decay from the chunk's start through token i, and ``D_ij`` the decay from after token j
    through token i, the writes of all tokens solve one unit lower triangular system::

        u_i = beta_i (v_i - d_i h^T k_i - sum_{j < i} D_ij (k_i . k_j) u_j)
    """
    C = len(v)
    d = np.exp(np.cumsum(g))
    D = np.zeros((C, C))
    for j in range(C):
        # Sums of the g between j and i, never a difference of sums: -inf forgets all, and gives no NaN.
        D[j, j] = 1.0
        D[j + 1 :, j] = np.exp(np.cumsum(g[j + 1 :]))
    A = np.eye(C) + np.tril(beta[:, None] * (k @ k.T) * D, -1)
    rhs = beta[:, None] * (v - d[:, None] * (k @ h))
    U = solve_triangular(A, rhs, lower=True, unit_diagonal=True, check_finite=False)
    o = d[:, None] * (q @ h) + np.tril((q @ k.T) * D) @ U
    h = d[-1] * h + (D[-1][:, None] * k).T @ U
    return o, h


def _given(
    head: Head,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: float | None,
    initial_state: Any,
    output_final_state: bool,
    use_l2norm: bool,
    cu_seqlens: Any,
    state_layout: str,
) -> tuple[Array, Array | None]:
    """Run a call with given gates; sequence n has row n of the initial and of the final states."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    g, beta = _float64(g).reshape(v.shape[:3]), _float64(beta).reshape(v.shape[:3])
    spans = _spans(v, cu_seqlens)
    initial = None if initial_state is None else _to_kv(_float64(initial_state), state_layout)
    rows = list(range(len(spans)))
    o, states = _rows(head, q, k, v, g, beta, scale, use_l2norm, spans, initial, rows, rows)
    if not output_final_state:
        return o, None
    final = np.zeros((len(spans), v.shape[2], q.shape[3], v.shape[3]))
    for n, h in enumerate(states):
        final[n] = h
    return o, _from_kv(final, state_layout)


def _rows(
    head: Head,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float | None,
    use_l2norm: bool,
    spans: list[tuple[int, int, int]],
    initial: Array | None,
    initial_slots: list[int],
    final_slots: list[int],
) -> tuple[Array, list[Array | None]]:
    """Run all sequences and heads; return the outputs and each sequence's final state, None for padding."""
    H, K = q.shape[2:]
    HV, V = v.shape[2:]
    if use_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (K**-0.5 if scale is None else scale)
    o = np.zeros(v.shape)
    states: list[Array | None] = []
    for (i, bos, eos), initial_slot, final_slot in zip(spans, initial_slots, final_slots, strict=True):
        if initial_slot < 0 or final_slot < 0:
            states.append(None)
            continue
        h = np.zeros((HV, K, V)) if initial is None else initial[initial_slot].copy()
        for hv in range(HV):
            hk = hv // (HV // H)
            o[i, bos:eos, hv], h[hv] = head(
                q[i, bos:eos, hk],
                k[i, bos:eos, hk],
                v[i, bos:eos, hv],
                g[i, bos:eos, hv],
                beta[i, bos:eos, hv],
                h[hv],
            )
        states.append(h)
    return o, states


def _spans(v: Array, cu_seqlens: Any) -> list[tuple[int, int, int]]:
    """Each sequence's batch row, first token and last token plus one."""
    B, T = v.shape[:2]
    if cu_seqlens is None:
        return [(i, 0, T) for i in range(B)]
    bounds = [int(x) for x in np.asarray(cu_seqlens)]
    return [(0, bos, eos) for bos, eos in pairwise(bounds)]


def _slots(indices: Any, N: int) -> list[int]:
    return list(range(N)) if indices is None else [int(x) for x in np.asarray(indices)]


def _float64(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def _to_kv(h: Array, layout: str) -> Array:
    if layout not in ("kv", "vk"):
        raise ValueError(f"state_layout must be 'kv' or 'vk', got {layout!r}")
    return h if layout == "kv" else np.ascontiguousarray(h.swapaxes(-1, -2))


def _from_kv(h: Array, layout: str) -> Array:
    return h if layout == "kv" else np.ascontiguousarray(h.swapaxes(-1, -2))
