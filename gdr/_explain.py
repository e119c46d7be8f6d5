"""`gdr.explain`: which kernels a call would run, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gdr import _backends, _cuda_loader
from gdr._inputs import Call
from gdr._spec import Spec


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> str:
    """Say which kernels a call would run, and why; nothing is computed or changed.

    Parameters
    ----------
    function : callable
        An operation, or a method of a `DeltaRuleState`: `step` or `prefill`.
    *args, **kwargs
        The arguments of the call.

    Returns
    -------
    str
        A few lines: the problem, the form of the rule and on CUDA why that one, the backend, its kernels as they are
        for arrays at multiples of 16 bytes, and the scratch that a call by chunks needs.

    Raises
    ------
    TypeError
        `function` is none of these.
    Exception
        Whatever the call itself would raise for these arguments.

    Examples
    --------
    >>> import os, gdr
    >>> os.environ["GDR_CPU"] = "numpy"
    >>> x = gdr.testing.make_inputs(B=2, T=100, H=2, HV=4, K=16, V=16, dtype="float32")
    >>> print(gdr.explain(gdr.chunk_gated_delta_rule, x.q, x.k, x.v, x.g, x.beta))
    2 sequences, 200 tokens, H=2 HV=4 K=16 V=16, float32, no state read or written
    form: chunkwise, 64 tokens a chunk
    backend: numpy, because GDR_CPU says so
    """
    try:
        with _backends.planning():
            function(*args, **kwargs)
    except _backends.Planned as planned:
        return "\n".join(_lines(planned.call))
    raise TypeError(f"function: expected an operation of gdr or a method that runs one, got {function!r}")


def _lines(call: Call) -> list[str]:
    spec = call.spec
    backend = _backends.backend(spec)
    kernels: list[_cuda_loader.Specialization] = []
    scratch = []
    if backend == "cuda":
        kernels = _kernels(call, _cuda_loader.describe_gpu(int(spec.device)))
        if spec.op == "chunk":
            scratch = [f"scratch: {_backends.module(spec).scratch(call)} bytes"]
    return [
        _problem(spec),
        f"form: {_form(call)}",
        *(["first: what is pending in the ring is written into the states"] if call.folds else []),
        f"backend: {backend}, because {_reason(spec, backend)}",
        *(
            " ".join([f"kernel: {stem}", *(f"{name.removeprefix('GDR_')}={int(x)}" for name, x in defines.items())])
            for stem, defines in kernels
        ),
        *scratch,
    ]


def _kernels(call: Call, gpu: _cuda_loader.Gpu) -> list[_cuda_loader.Specialization]:
    """The kernels of a call on a GPU, in order."""
    spec, rings = call.spec, _backends.ring_module(call.spec.device)
    if call.ring is not None:
        return [rings.kernel_of(call, gpu)]
    before = [rings.fold_of(call)] if call.folds else []
    flags = (call.batch_invariant, call.wide_range) if spec.op == "chunk" else ()
    return [*before, *_backends.module(spec).specializations(spec, gpu, *flags)]


def _reason(spec: Spec, backend: str) -> str:
    if backend == "cuda":
        return f"the arrays are on CUDA device {spec.device}"
    if spec.op == "gate":
        return "the gates of the host are NumPy's"
    if os.environ.get("GDR_CPU"):
        return "GDR_CPU says so"
    return f"Numba is {'installed' if backend == 'numba' else 'not installed'}"


def _problem(spec: Spec) -> str:
    if spec.op == "gate":
        return f"{spec.B * spec.T} tokens, HV={spec.HV}"
    states = {
        name.partition("_")[0]: spec.dtypes[name] for name in ("initial_state", "final_state") if name in spec.dtypes
    }
    verbs = {"initial": "read", "final": "written"}
    said = ", ".join(f"{dtype} state {verbs[name]}" for name, dtype in states.items()) or "no state read or written"
    return (
        f"{spec.N} sequences, {spec.B * spec.T} tokens, H={spec.H} HV={spec.HV} K={spec.K} V={spec.V}, "
        f"{spec.dtype}, {said}"
    )


def _form(call: Call) -> str:
    spec = call.spec
    if spec.op == "gate":
        return "one pass over the logits"
    if call.draft:
        return "drafts, each after its parents; no state is written"
    if call.ring is not None:
        return f"one token; a state is written after {call.ring.capacity}"
    if spec.op == "fused_recurrent":
        return "recurrent, token by token"
    if _backends.backend(spec) != "cuda":
        return f"chunkwise, {call.chunk_size} tokens a chunk"
    from gdr import _cuda_chunk
    from gdr._cuda_chunk_call import chunk_size

    gpu = _cuda_loader.describe_gpu(int(spec.device))
    chosen = _cuda_chunk.choose(spec, gpu, call.batch_invariant)
    if isinstance(chosen, str):
        return f"recurrent, token by token: {chosen}"
    form = f"chunkwise, {chunk_size(spec)} tokens a chunk"
    return f"{form}: {_cuda_chunk.why(spec, chosen, gpu)}" if isinstance(chosen, _cuda_chunk.Cut) else form
