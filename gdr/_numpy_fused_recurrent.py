"""The fused recurrence in NumPy.

Sequences run side by side, longest first, a group at a time so that the states of a group stay in cache between the
one read and the one write of the pool.  Every product is one small matrix product a head on contiguous memory: that,
and not the batch around it, fixes the bits of a sequence's result.
"""

from __future__ import annotations

import numpy as np

from gdr._inputs import Call
from gdr._numpy_gate import gates

GROUP_BYTES = 4 << 20


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    spec = call.spec
    dtype = np.dtype(spec.compute)
    starts, lengths, live = rows(call)
    out = call.out.reshape(-1, spec.HV, spec.V) if call.out.flags.c_contiguous else None
    tokens = _tokens(call, dtype)
    order = np.argsort(-lengths[live], kind="stable")
    live = live[order]
    o = np.zeros((spec.B * spec.T, spec.HV, spec.V), dtype)
    group = max(1, GROUP_BYTES // (spec.HV * spec.K * spec.V * dtype.itemsize))
    for first in range(0, live.size, group):
        members = live[first : first + group]
        h = read_states(call, members, dtype)
        _recur(call, h, starts[members], lengths[members], tokens, o)
        write_states(call, members, lengths, h)
    if out is not None:
        out[...] = o
    else:
        call.out[...] = o.reshape(spec.B, spec.T, spec.HV, spec.V)


def rows(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token and length of every sequence, and which rows are no padding."""
    spec = call.spec
    if call.cu_seqlens is not None:
        starts, lengths = call.cu_seqlens[:-1], np.diff(call.cu_seqlens)
    else:
        starts, lengths = np.arange(spec.N) * spec.T, np.full(spec.N, spec.T)
    live = np.ones(spec.N, bool)
    for slots in (call.initial_slots, call.final_slots):
        if slots is not None:
            live &= slots >= 0
    return starts, lengths, np.flatnonzero(live)


def read_states(call: Call, members: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The states of some rows as a new contiguous [n, HV, K, V] array of `dtype`."""
    spec = call.spec
    h = np.zeros((members.size, spec.HV, spec.K, spec.V), dtype)
    if call.initial_state is not None:
        slots = members if call.initial_slots is None else call.initial_slots[members]
        source = call.initial_state if spec.layout == "kv" else call.initial_state.swapaxes(-1, -2)
        for i, slot in enumerate(slots):
            h[i] = source[slot]
    return h


def write_states(call: Call, members: np.ndarray, lengths: np.ndarray, h: np.ndarray) -> None:
    """Write the last states of some rows; a sequence of no tokens leaves the slot that it read alone."""
    if call.final_state is None:
        return
    target = call.final_state if call.spec.layout == "kv" else call.final_state.swapaxes(-1, -2)
    in_place = call.final_state is call.initial_state
    slots = members if call.final_slots is None else call.final_slots[members]
    sources = members if call.initial_slots is None else call.initial_slots[members]
    for i, (row, slot) in enumerate(zip(members, slots, strict=True)):
        if lengths[row] or not (in_place and sources[i] == slot):
            target[slot] = h[i]


def _tokens(call: Call, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Per token: [k; q] [n, H, 2, K], k.q [n, H, 1, 1], v [n, H, R, V], exp(g) and beta [n, H, R, 1]."""
    spec = call.spec
    n, repeat = spec.B * spec.T, spec.HV // spec.H
    kq = np.empty((n, spec.H, 2, spec.K), dtype)
    for i, x in enumerate((call.k, call.q)):
        x = np.ascontiguousarray(x, dtype).reshape(n, spec.H, spec.K)
        if spec.l2norm:
            x = x / np.sqrt((x * x).sum(-1, keepdims=True) + dtype.type(1e-6))
        kq[:, :, i] = x
    kq[:, :, 1] *= dtype.type(call.scale)
    dot = (kq[:, :, 0] * kq[:, :, 1]).sum(-1)[..., None, None]
    g, beta = gates(call)
    heads = (n, spec.H, repeat, 1)
    v = np.ascontiguousarray(call.v, dtype).reshape(n, spec.H, repeat, spec.V)
    return kq, dot, v, np.exp(g).reshape(heads), beta.reshape(heads)


def _recur(
    call: Call,
    h: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    tokens: tuple[np.ndarray, ...],
    o: np.ndarray,
) -> None:
    """Run `h` [n, HV, K, V] through its sequences, which are sorted longest first."""
    spec = call.spec
    heads = h.reshape(len(h), spec.H, spec.HV // spec.H, spec.K, spec.V)
    write = np.empty_like(heads)
    for t in range(lengths[0] if lengths.size else 0):
        active = np.searchsorted(-lengths, -t)
        at = starts[:active] + t
        kq, dot, v, decay, beta = (x[at] for x in tokens)
        state = heads[:active]
        # One pass over the state serves both products: o = e^g h^T q + (k.q) u.
        products = np.matmul(kq[:, :, None, :, None, :], state[:, :, :, None])[..., 0, :]
        products *= decay[..., None]
        u = beta * (v - products[..., 0, :])
        o[at] = (products[..., 1, :] + dot * u).reshape(active, spec.HV, spec.V)
        state *= decay[..., None]
        np.multiply(kq[:, :, None, 0, :, None], u[..., None, :], out=write[:active])
        state += write[:active]
