"""The fused recurrence: one read and one write of the state a call, token by token in between."""

from __future__ import annotations

from typing import Any

from gdr import _backends, _inputs
from gdr._spec import GIVEN_GATES, RAW_GATES, TOKENS, Form

_UPDATE = Form(
    "fused_recurrent",
    (*TOKENS, *RAW_GATES),
    {
        "initial_state": "initial_state_source",
        "initial_slots": "initial_state_indices",
        "final_state": "initial_state_source",
        "final_slots": "output_state_indices",
    },
)
_RECURRENT = Form("fused_recurrent", (*TOKENS, *GIVEN_GATES))


def fused_sigmoid_gating_delta_rule_update(
    A_log: Any,
    a: Any,
    dt_bias: Any,
    softplus_beta: float,
    softplus_threshold: float,
    q: Any,
    k: Any,
    v: Any,
    b: Any,
    initial_state_source: Any | None = None,
    initial_state_indices: Any | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
    *,
    output_state_indices: Any | None = None,
    state_layout: str = "kv",
    disable_state_update: bool = False,
    out: Any | None = None,
    check: bool | None = None,
) -> Any:
    """Gated delta rule from raw gate logits over a pool of states, which is updated in place.

    For every token, with ``g, beta`` from `gated_delta_rule_gate` and per value head the state ``h [K, V]``::

        h *= exp(g);  u = beta * (v - h^T k);  h += k u^T;  o = h^T (q * scale)

    Parameters
    ----------
    A_log, dt_bias : array, shape [HV]
        Decay rate (as a logarithm) and step bias of each value head.
    a, b : array, shape [B, T, HV] or [B * T, HV]
        Raw logits of the decay and of the write strength.
    softplus_beta, softplus_threshold : float
        The softplus of the gate; SGLang passes 1.0 and 20.0.
    q, k : array, shape [B, T, H, K]
        Queries and keys; K from 1 to 256.
    v : array, shape [B, T, HV, V]
        Values; HV is a multiple of H, and value head hv uses key head ``hv // (HV // H)``.
    initial_state_source : array, shape [slots, HV, K, V], optional
        The state pool, ``[slots, HV, V, K]`` with ``state_layout="vk"``.  None: every sequence starts from zero and
        its last state is dropped.
    initial_state_indices : array of int32 or int64, shape [N], optional
        Each sequence's slot, which it reads and, unless `output_state_indices` is given, writes.  A negative slot is
        padding: nothing is read or written and the output rows are 0.  None: sequence n uses slot n of N.
    scale : float, optional
        Factor of the queries; ``K ** -0.5`` by default.
    use_qk_l2norm_in_kernel : bool, default False
        Divide q and k by ``sqrt(sum(x ** 2) + 1e-6)`` first.
    cu_seqlens : array of int32 or int64, shape [N + 1], optional
        Offsets of packed sequences along T; B is then 1.  None: N = B sequences of T tokens.
    output_state_indices : array of int32 or int64, shape [N], optional
        Slots to write instead of those read.  A row with a negative slot in either is padding.
    state_layout : {"kv", "vk"}, default "kv"
        Order of the last two axes of the pool.
    disable_state_update : bool, default False
        Leave the pool as it is.
    out : array, v's shape and dtype, optional
        Where the output goes; must not overlap an input.
    check : bool, optional
        Check the values of slots and cu_seqlens.  None: on the host yes; on a device no, where it would synchronise.

    Returns
    -------
    o : array, shape [B, T, HV, V]
        The outputs, of v's dtype and library; `out` itself where it was given.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays on different devices.
    ValueError
        A shape, layout or scalar that does not fit; offsets that are not sorted; two rows that write one slot.
    IndexError
        A slot past the pool (on a device, without ``check=True``, such a row is padding).

    Notes
    -----
    The names and their order are SGLang's; the formula is Gated DeltaNet's (Yang et al. 2024, arXiv:2412.06464).
    Arithmetic is float32 (float64 for float64 arrays on the host) whatever the dtypes of the arrays.

    Examples
    --------
    >>> import numpy as np, gdr
    >>> x = gdr.testing.make_inputs(B=2, T=1, H=2, HV=4, K=8, V=8)
    >>> pool = np.zeros((16, 4, 8, 8), np.float32)
    >>> o = gdr.fused_sigmoid_gating_delta_rule_update(
    ...     x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, np.array([3, 7]),
    ...     use_qk_l2norm_in_kernel=True)
    >>> o.shape, np.flatnonzero(pool.any((1, 2, 3))).tolist()
    ((2, 1, 4, 8), [3, 7])
    """
    if disable_state_update is not False:
        _inputs.check_flag("disable_state_update", disable_state_update)
    final_state = None if disable_state_update else initial_state_source
    if output_state_indices is not None and final_state is None:
        raise ValueError("output_state_indices: given, but no state is written")
    if final_state is None:
        final_slots = None
    else:
        final_slots = initial_state_indices if output_state_indices is None else output_state_indices
    o, _ = _backends.perform(
        _UPDATE,
        (
            *(q, k, v, out, A_log, dt_bias, a, b, None, None),
            *(initial_state_source, initial_state_indices, final_state, final_slots, cu_seqlens),
        ),
        _inputs.options(
            scale,
            use_qk_l2norm_in_kernel,
            state_layout,
            softplus_beta,
            softplus_threshold,
            check=check,
        ),
    )
    return o


def fused_recurrent_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
    *,
    state_layout: str = "kv",
    out: Any | None = None,
    check: bool | None = None,
) -> tuple[Any, Any | None]:
    """Gated delta rule, token by token, from ready gates.

    Parameters
    ----------
    q, k : array, shape [B, T, H, K]
        Queries and keys; K from 1 to 256.
    v : array, shape [B, T, HV, V]
        Values; HV is a multiple of H, and value head hv uses key head ``hv // (HV // H)``.
    g : array, shape [B, T, HV]
        Log decay of each token, at most 0; ``-inf`` forgets everything.
    beta : array, shape [B, T, HV]
        Write strength.
    scale : float, optional
        Factor of the queries; ``K ** -0.5`` by default.
    initial_state : array, shape [N, HV, K, V], optional
        State before the first token of each sequence, ``[N, HV, V, K]`` with ``state_layout="vk"``; zero by default.
    output_final_state : bool, default False
        Return the state after the last token as well.
    use_qk_l2norm_in_kernel : bool, default False
        Divide q and k by ``sqrt(sum(x ** 2) + 1e-6)`` first.
    cu_seqlens : array of int32 or int64, shape [N + 1], optional
        Offsets of packed sequences along T; B is then 1.  None: N = B sequences of T tokens.
    state_layout : {"kv", "vk"}, default "kv"
        Order of the last two axes of the states.
    out : array, v's shape and dtype, optional
        Where the output goes; must not overlap an input.
    check : bool, optional
        Check the values of cu_seqlens.  None: on the host yes; on a device no, where it would synchronise.

    Returns
    -------
    o : array, shape [B, T, HV, V]
        The outputs, of v's dtype and library; `out` itself where it was given.
    final_state : array, shape [N, HV, K, V], or None
        float32 (float64 where the arithmetic is), in `state_layout`; None without `output_final_state`.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays on different devices.
    ValueError
        A shape, layout or scalar that does not fit; offsets that are not sorted.

    Notes
    -----
    The keywords are flash-linear-attention's; the formula is Gated DeltaNet's (Yang et al. 2024, arXiv:2412.06464).

    Examples
    --------
    >>> import gdr
    >>> x = gdr.testing.make_inputs(B=2, T=5, H=2, HV=4, K=8, V=8)
    >>> o, h = gdr.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, output_final_state=True)
    >>> o.shape, h.shape
    ((2, 5, 4, 8), (2, 4, 8, 8))
    """
    return _backends.perform(
        _RECURRENT,
        (q, k, v, out, None, None, None, None, g, beta, initial_state, None, None, None, cu_seqlens),
        _inputs.options(
            scale,
            use_qk_l2norm_in_kernel,
            state_layout,
            output_final_state=output_final_state,
            check=check,
        ),
    )
