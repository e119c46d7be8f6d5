"""SGLang: its fused decode function, with its signature, on torch tensors of the host or of a CUDA device.

Follows ``sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent`` of SGLang 0.5.23, whose pool is
``[slots, HV, V, K]``.
"""

from __future__ import annotations

from typing import Any

from gdr.fused_recurrent import fused_sigmoid_gating_delta_rule_update as _update

SGLANG_VERSION = "0.5.23"

__all__ = ["SGLANG_VERSION", "fused_sigmoid_gating_delta_rule_update"]


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
    initial_state_source: Any | None,
    initial_state_indices: Any | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Any | None = None,
    intermediate_state_indices: Any | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Any | None = None,
    cache_ring: bool = False,
    replayssm_rawv: Any | None = None,
    replayssm_rawk: Any | None = None,
    replayssm_g: Any | None = None,
    replayssm_beta: Any | None = None,
    match_cutedsl_decode: bool = False,
) -> Any:
    """Gated delta rule from raw gate logits over SGLang's pool of states, which is updated in place.

    Parameters
    ----------
    A_log, dt_bias : tensor, shape [HV]
    a, b : tensor, shape [tokens, HV] or [B, T, HV]
        Raw logits of the decay and of the write strength.
    softplus_beta, softplus_threshold : float
    q, k : tensor, shape [B, T, H, K]
    v : tensor, shape [B, T, HV, V]
        Of q's dtype.
    initial_state_source : tensor, shape [slots, HV, V, K], or None
        The pool; its slots may lie apart.
    initial_state_indices : tensor of int32 or int64, shape [N], or None
        Each sequence's slot.
    scale : float, optional
        Above 0; ``K ** -0.5`` by default.
    use_qk_l2norm_in_kernel : bool, default False
    cu_seqlens : tensor of int32 or int64, shape [N + 1], optional
        Offsets of packed sequences along T; B is then 1.
    disable_state_update : bool, default False
        Leave the pool as it is.
    is_kda, lower_bound, match_cutedsl_decode
        Kimi Delta Attention: not implemented.
    intermediate_states_buffer, intermediate_state_indices, cache_steps, retrieve_parent_token
        The states after every draft token, and trees of drafts: not implemented.
    cache_ring, replayssm_rawv, replayssm_rawk, replayssm_g, replayssm_beta
        The ring of draft tokens: not implemented.

    Returns
    -------
    o : tensor, shape [B, T, HV, V]

    Raises
    ------
    NotImplementedError
        An argument that is not implemented is neither None nor False; it is named.
    TypeError, ValueError, IndexError
        As `gdr.fused_sigmoid_gating_delta_rule_update`, by the argument's name.

    Notes
    -----
    Three answers differ from SGLang's.  Rows with a negative slot are padding, whose output is 0: SGLang runs them
    from a state of zero and returns what comes out.  On the host a slot outside the pool and a slot that two rows
    write are errors; on a device a slot outside the pool is padding.  Tokens outside every sequence of `cu_seqlens`
    are an error on the host; SGLang leaves their output uninitialised.

    Examples
    --------
    >>> import torch
    >>> from gdr.integrations.sglang import fused_sigmoid_gating_delta_rule_update
    >>> pool = torch.zeros(16, 4, 8, 8)
    >>> o = fused_sigmoid_gating_delta_rule_update(
    ...     torch.zeros(4), torch.randn(3, 4), torch.zeros(4), 1.0, 20.0, torch.randn(1, 3, 2, 8),
    ...     torch.randn(1, 3, 2, 8), torch.randn(1, 3, 4, 8), torch.randn(3, 4), pool, torch.tensor([3, 7]),
    ...     use_qk_l2norm_in_kernel=True, cu_seqlens=torch.tensor([0, 2, 3]))
    >>> o.shape
    torch.Size([1, 3, 4, 8])
    """
    for name, value in (
        ("is_kda", is_kda),
        ("lower_bound", lower_bound),
        ("intermediate_states_buffer", intermediate_states_buffer),
        ("intermediate_state_indices", intermediate_state_indices),
        ("cache_steps", cache_steps),
        ("retrieve_parent_token", retrieve_parent_token),
        ("cache_ring", cache_ring),
        ("replayssm_rawv", replayssm_rawv),
        ("replayssm_rawk", replayssm_rawk),
        ("replayssm_g", replayssm_g),
        ("replayssm_beta", replayssm_beta),
        ("match_cutedsl_decode", match_cutedsl_decode),
    ):
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: gdr does not implement this argument of SGLang's; leave it out")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    return _update(
        A_log,
        a,
        dt_bias,
        softplus_beta,
        softplus_threshold,
        q,
        k,
        v,
        b,
        initial_state_source,
        initial_state_indices,
        scale,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_layout="vk",
        disable_state_update=disable_state_update,
    )
