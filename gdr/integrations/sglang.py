"""SGLang: its fused decode function, with its signature, on torch tensors of the host or of a CUDA device.

Follows ``sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent`` of SGLang 0.5.23, whose pool is
``[slots, HV, V, K]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdr import _backends, _inputs
from gdr.fused_recurrent import _UPDATE
from gdr.fused_recurrent import fused_sigmoid_gating_delta_rule_update as _update

SGLANG_VERSION = "0.5.23"

__all__ = ["SGLANG_VERSION", "draft_parents", "fused_sigmoid_gating_delta_rule_update"]


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
    intermediate_states_buffer : tensor, shape [rows, steps, HV, V, K], optional
        Takes the state after every token; `cache_steps`, where it is given, is at most its ``steps``.
    intermediate_state_indices : tensor of int32 or int64, shape [N]
        Each sequence's row of that buffer; a negative one keeps no states.
    retrieve_parent_token : tensor of int32 or int64, shape [N, steps], optional
        The token of its sequence, an earlier one, that each token follows; of the first one nothing is read.  Needs
        `intermediate_states_buffer` and `disable_state_update`.
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
    The states after every token are those of as many calls, each a token longer; those of a tree come from a call for
    each of its tokens.  `gdr.DeltaRuleState.verify` needs neither calls nor copies of states: see `draft_parents`.

    Three answers differ from SGLang's.  Rows with a negative slot are padding, whose output is 0: SGLang runs them
    from a state of zero and returns what comes out.  On the host a slot outside the pool and a slot that two rows
    write are errors; on a device a slot outside the pool is padding.  Tokens outside every sequence of `cu_seqlens`
    are an error on the host; SGLang leaves their output uninitialised.  Rows of a tree that keep no states are padding;
    SGLang runs them as a chain.

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
    if intermediate_states_buffer is None:
        for name, value in (
            ("intermediate_state_indices", intermediate_state_indices),
            ("cache_steps", cache_steps),
            ("retrieve_parent_token", retrieve_parent_token),
        ):
            if value is not None:
                raise ValueError(f"{name}: given without intermediate_states_buffer")
    else:
        if intermediate_state_indices is None:
            raise ValueError("intermediate_states_buffer: given without intermediate_state_indices")
        if retrieve_parent_token is not None and not disable_state_update:
            raise NotImplementedError(
                "retrieve_parent_token: gdr does not write the state of a tree's last token into the pool; "
                "pass disable_state_update=True"
            )
        options = _inputs.options(scale, use_qk_l2norm_in_kernel, "vk", softplus_beta, softplus_threshold, check=None)

        def run(tokens: tuple[Any, ...], states: tuple[Any, ...]) -> Any:
            q, k, v, a, b = tokens
            operands = (q, k, v, None, A_log, dt_bias, a, b, None, None, *states, None)
            return _backends.perform(_UPDATE, operands, options)[0]

        tokens, rows = (q, k, v, a, b), intermediate_state_indices
        drafts = _Drafts(tokens, cu_seqlens, intermediate_states_buffer, rows, cache_steps)
        if retrieve_parent_token is not None:
            return drafts.run_tree(run, initial_state_source, initial_state_indices, retrieve_parent_token)
        drafts.run_chain(run, initial_state_source, initial_state_indices)
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


def draft_parents(
    retrieve_parent_token: Any | None = None,
    *,
    retrieve_next_token: Any | None = None,
    retrieve_next_sibling: Any | None = None,
) -> Any:
    """Trees of draft tokens as `gdr.DeltaRuleState.verify` takes them, from SGLang's description of them.

    Parameters
    ----------
    retrieve_parent_token : tensor of int32 or int64, shape [N, T], optional
        The token that each token follows; of the first token nothing is read.
    retrieve_next_token, retrieve_next_sibling : tensor of int32 or int64, shape [N, T], optional
        Instead: each token's first child, and the next child of its parent; negative for none.

    Returns
    -------
    parents : tensor of int64, shape [N, T]
        The token that each token follows; -1 for the first one, which follows the state.

    Examples
    --------
    >>> import torch
    >>> from gdr.integrations.sglang import draft_parents
    >>> draft_parents(
    ...     retrieve_next_token=torch.tensor([[1, 3, -1, -1]]), retrieve_next_sibling=torch.tensor([[-1, 2, -1, -1]]))
    tensor([[-1,  0,  0,  1]])
    """
    links = {"retrieve_next_token": retrieve_next_token, "retrieve_next_sibling": retrieve_next_sibling}
    if retrieve_parent_token is not None:
        for name, value in links.items():
            if value is not None:
                raise ValueError(f"{name}: given beside retrieve_parent_token")
        parents = _whole_numbers("retrieve_parent_token", retrieve_parent_token, 2).long().clone()
    else:
        for name, value in links.items():
            if value is None:
                raise ValueError(f"{name}: expected a tensor, as retrieve_parent_token is not given")
        children, siblings = (_whole_numbers(name, value, 2).long() for name, value in links.items())
        if children.shape != siblings.shape:
            raise ValueError(
                f"retrieve_next_sibling: expected shape {list(children.shape)}, got {list(siblings.shape)}"
            )
        N, T = children.shape
        # A token that nobody names follows the first one, as SGLang has it. The last column is for links to nowhere.
        parents = children.new_zeros((N, T + 1))
        for t in range(T):
            for links_of_t, parent in ((children[:, t], t), (siblings[:, t], parents[:, t].clone())):
                nowhere = (links_of_t < 0) | (links_of_t >= T)
                at = torch.where(nowhere, T, links_of_t)[:, None]
                parents.scatter_(1, at, torch.as_tensor(parent, device=at.device).expand(N)[:, None])
        parents = parents[:, :T].clone()
    parents[:, :1] = -1
    return parents


def _whole_numbers(name: str, x: Any, axes: int) -> Any:
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: expected a torch tensor of int32 or int64, got {got}")
    if x.ndim != axes:
        raise ValueError(f"{name}: expected {axes} {'axis' if axes == 1 else 'axes'}, got shape {list(x.shape)}")
    return x


class _Drafts:
    """The tokens of sequences of at most a few, each beside the others', and where the states after them go.

    Parameters
    ----------
    tokens : tuple of tensor
        q, k, v, a and b as the function takes them.
    cu_seqlens : tensor, optional
    buffer : tensor, shape [rows, steps, HV, V, K]
    rows : tensor, shape [N]
    cache_steps : int, optional
    """

    def __init__(self, tokens: tuple[Any, ...], cu_seqlens: Any, buffer: Any, rows: Any, cache_steps: Any) -> None:
        rows = _whole_numbers("intermediate_state_indices", rows, 1)
        for name, x in zip("qkv", tokens):
            if len(getattr(x, "shape", ())) != 4:
                raise ValueError(f"{name}: expected a tensor of four axes, got {list(getattr(x, 'shape', ()))}")
        q, _, v, a, b = tokens
        for name, x in (("a", a), ("b", b)):
            if x.numel() != v.numel() // max(v.shape[3], 1) or x.shape[-1] != v.shape[2]:
                raise ValueError(f"{name}: expected shape {list(v.shape[:3])}, got {list(x.shape)}")
        HV, V, K = v.shape[2], v.shape[3], q.shape[3]
        if not isinstance(buffer, torch.Tensor) or buffer.ndim != 5 or tuple(buffer.shape[2:]) != (HV, V, K):
            raise ValueError(
                f"intermediate_states_buffer: expected a tensor of shape [rows, steps, {HV}, {V}, {K}], "
                f"got {list(getattr(buffer, 'shape', ()))}"
            )
        size, steps = HV * V * K, buffer.shape[1]
        if buffer.stride()[1:] != (size, V * K, K, 1) or buffer.stride(0) % size:
            raise ValueError("intermediate_states_buffer: expected contiguous rows, whole states apart")
        if cache_steps is not None and not 0 < cache_steps <= steps:
            raise ValueError(f"cache_steps: expected from 1 to {steps}, got {cache_steps}")
        self._pitch = buffer.stride(0) // size
        states = (len(buffer) - 1) * self._pitch + steps if len(buffer) else 0
        self._states = buffer.as_strided((states, *buffer.shape[2:]), buffer.stride()[1:])
        total, self._shape = v.shape[1], v.shape
        if cu_seqlens is None:
            self._tokens = (*tokens[:3], a.reshape(*v.shape[:3]), b.reshape(*v.shape[:3]))
            self._at = None
            live = torch.ones((v.shape[0], total), dtype=torch.bool, device=rows.device)
            if total > steps:
                raise ValueError(f"intermediate_states_buffer: expected room for {total} steps, got {steps}")
        else:
            first, last = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
            at = first + torch.arange(min(total, steps), device=first.device)
            live = (at >= 0) & (at < last) & (at < total)
            longest = int((last - first).max()) if not cu_seqlens.is_cuda and len(first) else 0
            if longest > steps:
                raise ValueError(f"intermediate_states_buffer: expected room for {longest} steps, got {steps}")
            # What is no token of its sequence goes to a row past the end.
            self._at = torch.where(live, at, total)
            found = at.clamp(0, max(total - 1, 0))
            a, b = a.reshape(total, HV), b.reshape(total, HV)
            self._tokens = (*(x[0][found] for x in tokens[:3]), a[found], b[found])
        if len(rows) != len(live):
            raise ValueError(f"intermediate_state_indices: expected shape [{len(live)}], got {list(rows.shape)}")
        place = rows.long()[:, None] * self._pitch + torch.arange(live.shape[1], device=rows.device)
        self._places = torch.where(live & (rows >= 0)[:, None], place, -1)

    def run_chain(self, run: Callable[..., Any], pool: Any, slots: Any) -> None:
        """Fill the buffer with the states after each token, which follow one another."""
        for t in range(self._places.shape[1]):
            states = pool, slots, self._states, self._places[:, t].contiguous()
            run(tuple(x[:, : t + 1] for x in self._tokens), states)

    def run_tree(self, run: Callable[..., Any], pool: Any, slots: Any, parents: Any) -> Any:
        """Fill the buffer with the states after each token of a tree, and return the outputs."""
        N, T = self._places.shape
        parents = _whole_numbers("retrieve_parent_token", parents, 2)
        if parents.shape[0] != N or parents.shape[1] < T:
            raise ValueError(f"retrieve_parent_token: expected shape [{N}, {T}], got {list(parents.shape)}")
        parents, order = parents[:, :T].long(), torch.arange(T, device=parents.device)
        exists = (parents >= 0) & (parents < order)
        if not parents.is_cuda:
            for n, t in (~exists & (order > 0) & (self._places >= 0)).nonzero()[:1].tolist():
                raise ValueError(f"retrieve_parent_token: expected one before token {t}, got {parents[n, t]}")
        v, total = self._tokens[2], self._shape[1]
        out = v.new_zeros((N, T, *v.shape[2:])) if self._at is None else v.new_zeros((total + 1, *v.shape[2:]))
        for t in range(T):
            here, source, read = self._places[:, t].contiguous(), pool, slots
            if t:
                source, read = self._states, torch.where(exists[:, t], here - t + parents[:, t], -1)
            if slots is not None:
                here = torch.where(slots < 0, -1, here)
            o = run(tuple(x[:, t : t + 1].contiguous() for x in self._tokens), (source, read, self._states, here))
            if self._at is None:
                out[:, t] = o[:, 0]
            else:
                out[self._at[:, t]] = o[:, 0]
        return out if self._at is None else out[:total].unsqueeze(0)
