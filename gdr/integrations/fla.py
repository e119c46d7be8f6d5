"""flash-linear-attention: the two functions of ``fla.ops.gated_delta_rule`` with its own signatures, forward only.

Follows fla-core 0.6.0.  Tensors may be on the host, where flash-linear-attention does not run, or on a CUDA device.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gdr import chunk as _chunk
from gdr import fused_recurrent as _fused_recurrent
from gdr.gate import gated_delta_rule_gate
from gdr.integrations._torch import refuse_grad, with_unit_rows

FLA_VERSION = "0.6.0"

__all__ = ["FLA_VERSION", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: Any | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule by chunks of tokens.

    Parameters
    ----------
    q, k : tensor, shape [B, T, H, K]
    v : tensor, shape [B, T, HV, V]
        Of q's dtype.
    g : tensor, shape [B, T, HV]
        Log decay; raw logits with `use_gate_in_kernel`.
    beta : tensor, shape [B, T, HV]
        Write strength; raw logits with `use_beta_sigmoid_in_kernel`.
    scale : float, optional
        ``K ** -0.5`` by default.
    initial_state : tensor, shape [N, HV, K, V], optional
    output_final_state : bool, default False
    use_qk_l2norm_in_kernel : bool, default False
    use_beta_sigmoid_in_kernel : bool, default False
        Take the sigmoid of `beta` first.
    allow_neg_eigval : bool, default False
        Twice that sigmoid; needs `use_beta_sigmoid_in_kernel`.
    state_v_first : bool, default False
        States are ``[N, HV, V, K]``.
    cu_seqlens : tensor of int32 or int64, shape [N + 1], optional
        Offsets of packed sequences along T; B is then 1.
    cu_seqlens_cpu, chunk_indices
        Refused: they only repeat what `cu_seqlens` says.
    cp_context
        Refused: gdr has no context parallelism.
    use_gate_in_kernel : bool, default False
        Take ``-exp(A_log) * softplus(g + dt_bias)`` for the log decay.
    A_log, dt_bias : tensor, shape [HV], optional
        Of `use_gate_in_kernel`, and refused without it; `dt_bias` is 0 by default.
    chunk_size : {16, 32, 64}, default 64
    transpose_state_layout : bool, optional
        The old name of `state_v_first`.

    Returns
    -------
    o : tensor, shape [B, T, HV, V]
    final_state : tensor of float32, shape [N, HV, K, V], or None

    Raises
    ------
    TypeError
        A tensor requires grad while torch records gradients, or as `gdr.chunk_gated_delta_rule`.
    NotImplementedError
        An argument that is refused; it is named.
    ValueError
        As `gdr.chunk_gated_delta_rule`, by the argument's name.

    Examples
    --------
    >>> import torch
    >>> from gdr.integrations.fla import chunk_gated_delta_rule
    >>> q, k, v = torch.randn(3, 2, 100, 4, 16)
    >>> o, h = chunk_gated_delta_rule(q, k, v, -torch.rand(2, 100, 4), torch.rand(2, 100, 4),
    ...                               output_final_state=True, use_qk_l2norm_in_kernel=True)
    >>> o.shape, h.shape
    (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))
    """
    _refuse(cu_seqlens_cpu=cu_seqlens_cpu, chunk_indices=chunk_indices, cp_context=cp_context)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"chunk_size: expected 16, 32 or 64, got {chunk_size}")
    refuse_grad(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    g, beta = _gates(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _chunk.chunk_gated_delta_rule(
        with_unit_rows(q),
        with_unit_rows(k),
        with_unit_rows(v),
        g,
        beta,
        scale,
        None if initial_state is None else with_unit_rows(initial_state),
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_layout=_layout(state_v_first, transpose_state_layout),
        chunk_size=chunk_size,
    )


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule, token by token.

    Parameters
    ----------
    q, k : tensor, shape [B, T, H, K]
    v : tensor, shape [B, T, HV, V]
        Of q's dtype.
    g : tensor, shape [B, T, HV], optional
        Log decay, none by default; raw logits with `use_gate_in_kernel`.
    gk, gv
        Decays of every key or value dimension: refused.
    beta : tensor, shape [B, T, HV], optional
        Write strength, 1 by default; raw logits with `use_beta_sigmoid_in_kernel`.
    scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias
        As in `chunk_gated_delta_rule`.
    use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, transpose_state_layout
        As in `chunk_gated_delta_rule`.

    Returns
    -------
    o : tensor, shape [B, T, HV, V]
    final_state : tensor of float32, shape [N, HV, K, V], or None

    Raises
    ------
    TypeError, NotImplementedError, ValueError
        As `chunk_gated_delta_rule`.
    """
    _refuse(gk=gk, gv=gv)
    refuse_grad(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    if g is None:
        if use_gate_in_kernel:
            raise ValueError("g: needed with use_gate_in_kernel=True")
        g = v.new_zeros(v.shape[:3], dtype=torch.float32)
    if beta is None:
        if use_beta_sigmoid_in_kernel:
            raise ValueError("beta: needed with use_beta_sigmoid_in_kernel=True")
        beta = v.new_ones(v.shape[:3], dtype=torch.float32)
    g, beta = _gates(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _fused_recurrent.fused_recurrent_gated_delta_rule(
        with_unit_rows(q),
        with_unit_rows(k),
        with_unit_rows(v),
        g,
        beta,
        scale,
        None if initial_state is None else with_unit_rows(initial_state),
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_layout=_layout(state_v_first, transpose_state_layout),
    )


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(
                f"{name}: gdr does not take this argument of flash-linear-attention's; leave it out"
            )


def _layout(state_v_first: bool, transpose_state_layout: bool | None) -> str:
    if transpose_state_layout is not None:
        if state_v_first:
            raise ValueError("transpose_state_layout: the old name of state_v_first, which is given as well")
        warnings.warn("transpose_state_layout is the old name of state_v_first", DeprecationWarning, stacklevel=3)
        state_v_first = transpose_state_layout
    return "vk" if state_v_first else "kv"


def _gates(
    g: torch.Tensor,
    beta: torch.Tensor,
    use_gate: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    use_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log decay and the write strength from what the caller gave for them."""
    if use_gate:
        if A_log is None:
            raise ValueError("A_log: needed with use_gate_in_kernel=True")
        dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
        g, _ = gated_delta_rule_gate(A_log, g, dt_bias, g)
    else:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
            if value is not None:
                raise ValueError(f"{name}: given without use_gate_in_kernel=True")
    if use_sigmoid:
        beta = beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()
        beta = 2 * beta if allow_neg_eigval else beta
    elif allow_neg_eigval:
        raise ValueError("allow_neg_eigval: needs use_beta_sigmoid_in_kernel=True")
    return g, beta
