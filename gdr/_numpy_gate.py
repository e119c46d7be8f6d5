"""Gates on the host."""

from __future__ import annotations

import numpy as np

from gdr._inputs import Call

# From here on log(1 + exp(x)) is x once it is rounded.
EXACT_FROM = {"float32": 20.0, "float64": 40.0}


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
    g = np.ascontiguousarray(call.a, dtype) + np.asarray(call.dt_bias, dtype)
    beta = np.negative(np.ascontiguousarray(call.b, dtype))
    softplus_beta, threshold = call.softplus_beta, call.softplus_threshold
    with np.errstate(all="ignore"):  # exp overflows to inf, whose reciprocal is the right limit; NaN goes through
        np.exp(beta, out=beta)
        beta += dtype.type(1)
        np.reciprocal(beta, out=beta)
        scaled = g if softplus_beta == 1 else g * dtype.type(softplus_beta)
        softplus = np.logaddexp(dtype.type(0), scaled)
        if softplus_beta != 1:
            softplus /= dtype.type(softplus_beta)
        if threshold < EXACT_FROM[call.spec.compute]:
            np.copyto(softplus, g, where=~(scaled <= threshold))
        g = np.multiply(softplus, -np.exp(np.asarray(call.A_log, dtype)), out=softplus)
    shape = (call.spec.B, call.spec.T, call.spec.HV)
    return g.reshape(shape), beta.reshape(shape)
