"""Compiles ahead of time what a pool of states would compile at its first calls.

Each launcher of CUDA kernels has ``specializations(spec, gpu)``: the kernels, as stems and definitions, that a call
with this `Spec` and aligned arrays needs on this GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from gdr import _cuda_loader
from gdr._arrays import FLOATS
from gdr._spec import DEVICE_FLOATS, LAYOUTS, MAX_HEAD_DIM, Spec

LAUNCHERS = ("fused_recurrent", "chunk", "gate", "ring")


def warmup(
    *,
    device: str | None = None,
    H: int = 16,
    HV: int = 32,
    K: int = 128,
    V: int = 128,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    layout: str = "kv",
    use_qk_l2norm: bool = True,
    max_batch: int = 256,
) -> list[str]:
    """Compile the kernels that a state pool of this shape uses, so that no later call waits for a compiler.

    Decoding, verification of several tokens and packed sequences are covered, with raw gates, aligned arrays and
    states updated in place.  A kernel that a call needs beyond these is compiled when it is first called.

    Parameters
    ----------
    device : str, optional
        "cpu", "cuda" or "cuda:1"; by default CUDA where it is usable, else the CPU.
    H, HV, K, V : int
        Key heads, value heads and their dimensions.
    dtype : {"bfloat16", "float16", "float32"}
        Of q, k and v.
    state_dtype : {"float32", "bfloat16", "float16"}
        Of the pool.
    layout : {"kv", "vk"}
        Of the pool.
    use_qk_l2norm : bool, default True
        Whether q and k are normalised.
    max_batch : int, default 256
        The largest number of sequences; smaller batches may have kernels of their own.

    Returns
    -------
    list of str
        What was compiled or loaded from a cache; empty on a CPU without numba, where there is nothing to compile.

    Raises
    ------
    RuntimeError
        CUDA was asked for and is not usable, or a kernel does not compile.

    Examples
    --------
    >>> import gdr
    >>> done = gdr.warmup(device="cpu")
    """
    from gdr import _inputs

    for name, value, most in (("H", H, 2**15), ("HV", HV, 2**15), ("K", K, MAX_HEAD_DIM), ("V", V, MAX_HEAD_DIM)):
        _inputs.check_whole_number(name, value, most)
    _inputs.check_whole_number("max_batch", max_batch)
    if HV % H:
        raise ValueError(f"HV: expected a multiple of H = {H}, got {HV}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected 'kv' or 'vk', got {layout!r}")
    if device is None:
        device = "cuda" if _cuda_loader.cuda_status().usable else "cpu"
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (number and not number.isdigit())):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:<ordinal>', got {device!r}")
    allowed = FLOATS if device == "cpu" else DEVICE_FLOATS
    for name, wanted in (("dtype", dtype), ("state_dtype", state_dtype)):
        if wanted not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {wanted!r}")
    if device == "cpu":
        return _warm_up_cpu(H, HV, K, V, dtype, state_dtype, layout)
    pool: dict[str, Any] = {"dtype": dtype, "state_dtype": state_dtype, "layout": layout, "l2norm": use_qk_l2norm}
    return _warm_up_cuda(int(number or 0), list(pool_specs(H=H, HV=HV, K=K, V=V, **pool, max_batch=max_batch)))


def _warm_up_cuda(device: int, specs: list[Spec]) -> list[str]:
    _cuda_loader.require_device(device)
    wanted = dict(specializations(specs, _cuda_loader.describe_gpu(device)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        kernels = pool.map(lambda job: _cuda_loader.load(job[0], job[1], device), wanted.values())
        return [repr(kernel) for kernel in kernels]


def _warm_up_cpu(H: int, HV: int, K: int, V: int, dtype: str, state_dtype: str, layout: str) -> list[str]:
    """Numba compiles when a function meets new types: run one step and one prompt of a small pool."""
    from gdr import _backends
    from gdr.state import DeltaRuleState
    from gdr.testing import make_inputs

    if _backends.cpu_backend() != "numba":
        return []
    x = make_inputs(B=1, T=32, H=H, HV=HV, K=K, V=V, dtype=dtype)
    pool = {"num_k_heads": H, "A_log": x.A_log, "dt_bias": x.dt_bias, "dtype": state_dtype, "layout": layout}
    state = DeltaRuleState(1, HV, K, V, **pool)
    slots = state.alloc()
    state.prefill(x.q, x.k, x.v, x.a, x.b, slots)
    state.step(x.q[:, :1], x.k[:, :1], x.v[:, :1], x.a[:, :1], x.b[:, :1], slots)
    return [f"<numba {op}, {dtype}, state {state_dtype} {layout}>" for op in ("fused_recurrent", "chunk")]


def launchers() -> Iterator[tuple[str, ModuleType]]:
    """Each operation and the module that launches its CUDA kernels."""
    for op in LAUNCHERS:
        name = f"gdr._cuda_{op}"
        if importlib.util.find_spec(name) is not None:
            yield op, importlib.import_module(name)


def specializations(
    specs: list[Spec], gpu: _cuda_loader.Gpu
) -> Iterator[tuple[tuple[Any, ...], _cuda_loader.Specialization]]:
    """Yield the kernels of calls on a GPU, each with what identifies it; the same one may come more than once."""
    modules = dict(launchers())
    for spec in specs:
        if spec.op not in modules:
            continue
        for stem, defines in modules[spec.op].specializations(spec, gpu):
            if gpu.capability >= _cuda_loader.read_source(stem).requires:
                yield (stem, *sorted(defines.items())), (stem, defines)


def pool_specs(
    *,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: str,
    state_dtype: str,
    layout: str,
    l2norm: bool,
    max_batch: int,
    max_tokens: int = 4096,
) -> Iterator[Spec]:
    """Describe the calls that a pool makes, in every size that may choose another kernel."""
    shape: dict[str, Any] = {"H": H, "HV": HV, "K": K, "V": V}
    pool: dict[str, Any] = {"dtype": dtype, "state_dtype": state_dtype, "layout": layout, "l2norm": l2norm}
    for N in doubling(max_batch):
        yield make_spec("fused_recurrent", B=N, T=1, **shape, **pool)
        yield make_spec("fused_recurrent", B=N, T=4, **shape, **pool)
        yield make_spec("fused_recurrent", B=1, T=4 * N, sequences=N, **shape, **pool)
        yield make_spec("ring", B=N, T=1, **shape, **pool)
    for T in doubling(max_tokens):
        if T >= 64:
            yield make_spec("chunk", B=1, T=T, **shape, **pool)
        for N in doubling(max_batch):
            if T >= 64 * N:
                yield make_spec("chunk", B=1, T=T, sequences=N, **shape, **pool)
    yield make_spec("gate", B=1, T=max_tokens, **shape)


def doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`: kernels are chosen by comparing a size with powers of two of something."""
    return sorted({most, *(1 << i for i in range(most.bit_length()))})


def make_spec(
    op: str,
    *,
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    sequences: int | None = None,
    dtype: str = "bfloat16",
    gates: str = "raw",
    gate_dtype: str = "float32",
    state_dtype: str | None = "float32",
    final_dtype: str | None = "",
    layout: str = "kv",
    l2norm: bool = True,
    pad: int = 0,
) -> Spec:
    """Describe a call with contiguous arrays on a CUDA device, without any array.

    Parameters
    ----------
    sequences : int, optional
        Number of packed sequences.  None: B sequences of T tokens.
    state_dtype, final_dtype : str, optional
        Of the state that is read and the one that is written (by default the same one), None without it.
    pad : int
        Extra elements between one row of q, k and of the states and the next.
    """
    final_dtype = state_dtype if final_dtype == "" else final_dtype
    N = B if sequences is None else sequences
    slot = (HV, K, V) if layout == "kv" else (HV, V, K)
    tokens = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "out": (B, T, HV, V)}
    per_token = dict.fromkeys(("a", "b") if gates == "raw" else ("g", "beta"), (B, T, HV))
    per_head = dict.fromkeys(("A_log", "dt_bias") if gates == "raw" else (), (HV,))
    shapes: dict[str, tuple[int, ...]] = {**per_token, **per_head}
    dtypes: dict[str, str] = dict.fromkeys(shapes, gate_dtype)
    if op == "gate":
        outputs = {"g": (B, T, HV), "beta": (B, T, HV)}
        shapes |= outputs
        dtypes |= dict.fromkeys(outputs, "float32")
    else:
        shapes |= tokens
        dtypes |= dict.fromkeys(tokens, dtype)
    for name, kind in (("initial", state_dtype), ("final", final_dtype)):
        if op != "gate" and kind is not None:
            shapes |= {f"{name}_state": (N, *slot), f"{name}_slots": (N,)}
            dtypes |= {f"{name}_state": kind, f"{name}_slots": "int32"}
    if sequences is not None:
        shapes["cu_seqlens"], dtypes["cu_seqlens"] = (N + 1,), "int32"
    padded = ("q", "k", "initial_state", "final_state")
    return Spec(
        op,
        0,
        compute="float32",
        B=B,
        T=T,
        N=N,
        H=H,
        HV=HV,
        K=K,
        V=V,
        dtypes=dtypes,
        shapes=shapes,
        strides={name: _strides(shape, pad if name in padded else 0) for name, shape in shapes.items()},
        gates=gates,
        l2norm=l2norm,
        varlen=sequences is not None,
        layout=layout,
    )


def _strides(shape: tuple[int, ...], pad: int) -> tuple[int, ...]:
    strides, step = [1], shape[-1] + pad
    for extent in reversed(shape[1:-1] if len(shape) > 1 else ()):
        strides.append(step)
        step *= extent
    if len(shape) > 1:
        strides.append(step)
    return tuple(reversed(strides))
