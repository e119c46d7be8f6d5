"""Gates on the host."""

from __future__ import annotations

import numpy as np

from gdr._inputs import Call


def run(call: Call) -> None:
    """Fill ``call.g`` and ``call.beta`` from the raw logits."""
    g, beta = gates(call)
    call.g[...] = g.reshape(call.g.shape)
    call.beta[...] = beta.reshape(call.beta.shape)


def gates(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Log decay and write strength of a call, contiguous [B, T, HV] arrays of the call's compute dtype."""
    dtype = np.dtype(call.spec.compute)
    if call.spec.gates == "given" and call.a is None:
        return np.ascontiguousarray(call.g, dtype), np.ascontiguousarray(call.beta, dtype)
    # Contiguous copies first: NumPy's vector loops and its strided ones may differ in the last bit.
    x = np.ascontiguousarray(call.a, dtype) + np.asarray(call.dt_bias, dtype)
    with np.errstate(all="ignore"):  # exp overflows to inf, whose reciprocal is the right limit; NaN goes through
        beta = 1 / (1 + np.exp(-np.ascontiguousarray(call.b, dtype)))
        softplus = np.logaddexp(dtype.type(0), x * dtype.type(call.softplus_beta)) / dtype.type(call.softplus_beta)
        softplus = np.where(x * call.softplus_beta <= call.softplus_threshold, softplus, x)
        g = -np.exp(np.asarray(call.A_log, dtype)) * softplus
    shape = (call.spec.B, call.spec.T, call.spec.HV)
    return np.ascontiguousarray(g.reshape(shape)), np.ascontiguousarray(beta.reshape(shape))
