"""The gates of the gated delta rule: log decay and write strength from raw logits."""

from __future__ import annotations

from typing import Any

from gdr import _backends, _inputs
from gdr._spec import RAW_GATES, Form

_GATE = Form("gate", RAW_GATES)


def gated_delta_rule_gate(
    A_log: Any,
    a: Any,
    dt_bias: Any,
    b: Any,
    *,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> tuple[Any, Any]:
    """Log decay and write strength of the gated delta rule.

    ``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``, with
    ``softplus(x) = log1p(exp(softplus_beta * x)) / softplus_beta`` where
    ``softplus_beta * x <= softplus_threshold`` and ``x`` above it.

    Parameters
    ----------
    A_log : array, shape [HV]
        Logarithm of the decay rate of each value head.
    a : array, shape [B, T, HV] or [tokens, HV]
        Raw logits of the step size.
    dt_bias : array, shape [HV]
        Bias added to `a`.
    b : array, a's shape
        Raw logits of the write strength.
    softplus_beta : float, default 1.0
        Sharpness of the softplus; positive.
    softplus_threshold : float, default 20.0
        Above it the softplus is the identity.

    Returns
    -------
    g : array, a's shape
        Log decay, at most 0; float32 (float64 for float64 logits on the host).
    beta : array, a's shape
        Write strength, from 0 to 1; g's dtype.

    Raises
    ------
    TypeError
        An argument is no array, has a dtype that is not taken, or lies on another device than the others.
    ValueError
        A shape does not fit, or a scalar is out of range.

    Notes
    -----
    The gate of Mamba-2 and of Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464); `softplus` is torch's.

    Examples
    --------
    >>> import numpy as np, gdr
    >>> g, beta = gdr.gated_delta_rule_gate(np.zeros(1), np.zeros((1, 1, 1)), np.zeros(1), np.zeros((1, 1, 1)))
    >>> float(g[0, 0, 0]), float(beta[0, 0, 0])
    (-0.6931471805599453, 0.5)
    """
    call = _inputs.prepare(
        _GATE,
        (None, None, None, None, A_log, dt_bias, a, b, None, None, None, None, None, None, None),
        softplus_beta=softplus_beta,
        softplus_threshold=softplus_threshold,
    )
    _backends.run(call)
    release = call.library.release
    return release(call.g), release(call.beta)
