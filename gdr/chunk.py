"""The chunkwise form: the same recurrence, a chunk of tokens at a time by matrix products."""

from __future__ import annotations

from typing import Any

from gdr import _backends, _inputs
from gdr._spec import GIVEN_GATES, TOKENS, Form

_CHUNK = Form("chunk", (*TOKENS, *GIVEN_GATES))


def chunk_gated_delta_rule(
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
    chunk_size: int = 64,
    batch_invariant: bool = False,
    wide_range: bool = False,
    workspace: Any | None = None,
) -> tuple[Any, Any | None]:
    """Gated delta rule by chunks of tokens, from ready gates: for long sequences.

    Same arguments, semantics and results (within rounding) as `fused_recurrent_gated_delta_rule`.

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
    chunk_size : int, default 64
        Most tokens a chunk; CPUs may take fewer (16), CUDA always takes 64, or 32 of float32.  Only rounding depends
        on it.
    batch_invariant : bool, default False
        Make the bits of a sequence's result independent of the rest of the batch.
    wide_range : bool, default False
        On CUDA, round what products multiply to bfloat16 instead of float16, which ends at 65504 and has fewer digits
        below 6e-5: for keys that are not normalised, and values or states that are huge or, on the whole, smaller than
        1e-4.  Errors grow from 2e-3 to 4e-3 of the outputs and from 5e-4 to 4e-3 of the states, more where keys
        resemble each other.  Nothing changes for float32 and on the host: their products are of float32.
    workspace : array of uint8 on the call's device, shape [bytes], optional
        Scratch memory that calls on one stream may share, for CUDA only, at an address that is a multiple of 128.
        `gdr.explain` says how much a call needs; by default it comes from the allocator of v's library.  Lend it to
        calls on CuPy arrays that are captured into a CUDA graph: what is allocated for them is kept for good.

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
        A shape, layout or scalar that does not fit; offsets that are not sorted; a workspace that is too small.

    Notes
    -----
    The WY form of Yang et al. (arXiv:2406.06484) with the decay of arXiv:2412.06464; keywords are
    flash-linear-attention's.  Decays enter as exponentials of differences, never of a positive number.

    On CUDA, sequences of fewer than 20 tokens on average (in float32 30, or 60 where states fill the GPU) run token by
    token, which is then faster, unless `batch_invariant` is set, or sequences are packed and one of them may be so long
    that all others would wait for it; `gdr.explain` tells.  So do calls that chunks on CUDA do not take: V that is no
    multiple of 16, devices before compute capability 8.0, and K above 128 where a block has less shared memory than
    176 KiB.

    Examples
    --------
    >>> import gdr
    >>> x = gdr.testing.make_inputs(B=1, T=200, H=2, HV=4, K=16, V=16)
    >>> o, h = gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, output_final_state=True,
    ...                                   use_qk_l2norm_in_kernel=True)
    >>> o.shape, h.shape
    ((1, 200, 4, 16), (1, 4, 16, 16))
    """
    return _backends.perform(
        _CHUNK,
        (q, k, v, out, None, None, None, None, g, beta, initial_state, None, None, None, cu_seqlens),
        _inputs.options(
            scale,
            use_qk_l2norm_in_kernel,
            state_layout,
            chunk_size=chunk_size,
            batch_invariant=batch_invariant,
            wide_range=wide_range,
            output_final_state=output_final_state,
            check=check,
        ),
        workspace,
    )
