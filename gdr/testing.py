"""Inputs and comparisons for tests of the gated delta rule, this package's own and anybody's kernel.

`make_inputs` draws a problem, `gdr.reference` solves it in float64, and `assert_close` compares::

    x = make_inputs(B=2, T=100, H=2, HV=4, K=64, V=64, gates="slow", seed=1)
    want, _ = gdr.reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    assert_close(my_kernel(x.q, x.k, x.v, x.g, x.beta), want, rtol=2e-6, name="o")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdr.reference import gated_delta_rule_gate, l2norm

__all__ = ["Inputs", "assert_close", "make_inputs", "relative_rms", "to_library", "to_numpy"]

# Bounds of the decay rate exp(A_log) and of the time step softplus(dt_bias) in each regime; g is about minus
# their product.  "ordinary" is how Gated DeltaNet initialises its layers.
_REGIMES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "ordinary": ((1.0, 16.0), (1e-3, 1e-1)),
    "slow": ((0.01, 0.1), (1e-3, 1e-1)),
    "fast": ((4.0, 16.0), (1.0, 4.0)),
    "none": ((1.0, 16.0), (1e-3, 1e-1)),
}
# A logit whose softplus is 0 in every dtype, so that g is exactly 0.
_NO_DECAY = -1e4


@dataclass
class Inputs:
    """One problem: all operands of every operation, and of a state pool.

    Attributes
    ----------
    q, k : array, [B, T, H, K]
    v : array, [B, T, HV, V]
    a, b : array, [B, T, HV]
        Raw logits.
    A_log, dt_bias : array, [HV]
    g, beta : array, [B, T, HV]
        What `a`, `b`, `A_log` and `dt_bias` amount to.
    state : array, [num_slots, HV, K, V] or [num_slots, HV, V, K]
        A pool with random contents in every slot.
    slots : array of int32, [N]
        A different slot for each sequence, in random order.
    cu_seqlens : array of int32, [N + 1], or None
        Bounds of the packed sequences.
    """

    q: Any
    k: Any
    v: Any
    a: Any
    b: Any
    A_log: Any
    dt_bias: Any
    g: Any
    beta: Any
    state: Any
    slots: Any
    cu_seqlens: Any

    @property
    def initial_state(self) -> Any:
        """The states that `slots` names, [N, HV, K, V]: a copy, in the order of the sequences."""
        return self.state[self.slots]

    def to(self, xp: str, device: str = "cpu") -> Inputs:
        """The same problem as arrays of another library; see `to_library`."""
        return replace(self, **{f.name: to_library(to_numpy(getattr(self, f.name)), xp, device) for f in fields(self)})


def make_inputs(
    B: int = 2,
    T: int = 8,
    H: int = 2,
    HV: int | None = None,
    K: int = 16,
    V: int = 16,
    *,
    lengths: Sequence[int] | None = None,
    num_slots: int | None = None,
    gates: str = "ordinary",
    keys: str = "random",
    dtype: str = "float32",
    gate_dtype: str | None = None,
    state_dtype: str | None = None,
    layout: str = "kv",
    normalize: bool = True,
    seed: int = 0,
    xp: str = "numpy",
    device: str | None = None,
) -> Inputs:
    """Draw a random problem.

    Parameters
    ----------
    B, T, H, HV, K, V : int
        Batch, tokens, key heads, value heads (by default as many as key heads) and head sizes.
    lengths : sequence of int, optional
        Lengths of sequences packed one after another, 0 included; B is then 1 and T their sum.
    num_slots : int, optional
        Slots of the pool; by default three more than there are sequences.
    gates : {"ordinary", "slow", "fast", "none"}
        How fast the state forgets: a layer's initialisation, half-lives of thousands of tokens, within a
        token or two, or never (g is exactly 0).
    keys : {"random", "correlated"}
        Independent keys, or keys that all lie close to one direction, which makes the chunkwise systems hard.
    dtype : str
        Of q, k and v: "float64", "float32", "float16" or "bfloat16".
    gate_dtype, state_dtype : str, optional
        Of a, b, g, beta, A_log and dt_bias, and of the pool; by default float64 with float64, and float32
        otherwise.
    layout : {"kv", "vk"}
        Order of the last two axes of the pool.
    normalize : bool
        Give keys and queries unit length.  Otherwise their norms are near ``sqrt(K)``, which the operations
        can take only with ``use_qk_l2norm_in_kernel``: the recurrence itself grows without bounds on such
        keys.
    seed : int
        Equal seeds give equal problems.
    xp : {"numpy", "cupy", "torch", "jax"}
        Library of the arrays.
    device : {"cpu", "cuda"}, optional
        Where the arrays live.

    Returns
    -------
    Inputs
        Fresh arrays, none of which shares memory with another.
    """
    HV = H if HV is None else HV
    if gates not in _REGIMES:
        raise ValueError(f"gates must be one of {', '.join(_REGIMES)}, got {gates!r}")
    if keys not in ("random", "correlated"):
        raise ValueError(f"keys must be 'random' or 'correlated', got {keys!r}")
    if layout not in ("kv", "vk"):
        raise ValueError(f"layout must be 'kv' or 'vk', got {layout!r}")
    if HV % H:
        raise ValueError(f"HV must be a multiple of H, got HV={HV}, H={H}")
    if lengths is not None:
        B, T = 1, int(sum(lengths))
    N = B if lengths is None else len(lengths)
    num_slots = N + 3 if num_slots is None else num_slots
    if num_slots < N:
        raise ValueError(f"num_slots must be at least the number of sequences, {N}, got {num_slots}")
    wide = "float64" if dtype == "float64" else "float32"
    gate_dtype = wide if gate_dtype is None else gate_dtype
    state_dtype = wide if state_dtype is None else state_dtype

    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, H, K)), rng.normal(size=(B, T, H, K))
    if keys == "correlated":
        k = rng.normal(size=(H, K)) + 0.1 * k
    if normalize:
        q, k = l2norm(q), l2norm(k)
    v = rng.normal(size=(B, T, HV, V))
    rates, steps = _REGIMES[gates]
    A_log = np.log(rng.uniform(*rates, size=HV))
    dt = np.exp(rng.uniform(math.log(steps[0]), math.log(steps[1]), size=HV))
    dt_bias = dt + np.log(-np.expm1(-dt))  # the inverse of the softplus
    a, b = rng.normal(size=(B, T, HV)), rng.normal(size=(B, T, HV))
    if gates == "none":
        a = np.full_like(a, _NO_DECAY)
    raw = [_cast(x, gate_dtype) for x in (A_log, a, dt_bias, b)]
    g, beta = gated_delta_rule_gate(*raw)
    state = rng.normal(size=(num_slots, HV, K, V))
    inputs = Inputs(
        q=_cast(q, dtype),
        k=_cast(k, dtype),
        v=_cast(v, dtype),
        A_log=raw[0],
        a=raw[1],
        dt_bias=raw[2],
        b=raw[3],
        g=_cast(g, gate_dtype),
        beta=_cast(beta, gate_dtype),
        state=_cast(np.ascontiguousarray(state if layout == "kv" else state.swapaxes(2, 3)), state_dtype),
        slots=rng.permutation(num_slots)[:N].astype(np.int32),
        cu_seqlens=None if lengths is None else np.cumsum([0, *lengths]).astype(np.int32),
    )
    device = device or ("cuda" if xp == "cupy" else "cpu")
    return inputs if (xp, device) == ("numpy", "cpu") else inputs.to(xp, device)


def relative_rms(got: Any, want: Any) -> float:
    """Root mean square of ``got - want`` over that of `want`.

    Parameters
    ----------
    got, want : array
        Arrays of one shape, of any library and dtype; compared in float64.

    Returns
    -------
    float
        0 for empty arrays and for two arrays of zeros, inf where only `want` is zero throughout, and NaN
        where either has a NaN or an infinity.
    """
    got, want = to_numpy(got).astype(np.float64), to_numpy(want).astype(np.float64)
    if got.shape != want.shape:
        raise ValueError(f"got and want must have one shape, got {got.shape} and {want.shape}")
    if got.size == 0:
        return 0.0
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("nan")
    # Scaled by the largest value first: squares must neither overflow nor vanish.
    largest = np.abs(want).max()
    if largest == 0.0:
        return 0.0 if not got.any() else float("inf")
    error, size = (got - want) / largest, want / largest
    return float(np.sqrt(np.mean(error * error) / np.mean(size * size)))


def assert_close(got: Any, want: Any, *, rtol: float, name: str = "result") -> None:
    """Check that an array is another one up to a relative RMS error.

    Parameters
    ----------
    got, want : array
        What was computed and what it should be, of any library and dtype.
    rtol : float
        Largest `relative_rms` that passes.
    name : str
        What the message calls the array.

    Raises
    ------
    AssertionError
        If the shapes differ, if either array has a NaN or an infinity, or if the error is larger than `rtol`.
         The message says where the largest deviation is.
    """
    got, want = to_numpy(got).astype(np.float64), to_numpy(want).astype(np.float64)
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {got.shape}, expected {want.shape}")
    for label, array in (("", got), ("expected ", want)):
        bad = ~np.isfinite(array)
        if bad.any():
            at = _index(bad, int(bad.argmax()))
            raise AssertionError(
                f"{name}: {label}{array[at]} at {at}; {int(bad.sum())} of {bad.size} values are not finite"
            )
    error = relative_rms(got, want)
    if not error <= rtol:
        at = _index(got, int(np.abs(got - want).argmax()))
        raise AssertionError(
            f"{name}: relative RMS error {error:.3g} exceeds {rtol:.3g}; "
            f"the largest deviation is at {at}: got {got[at]:.9g}, expected {want[at]:.9g}"
        )


def to_numpy(x: Any) -> Any:
    """Copy an array of any library to NumPy; bfloat16 becomes `ml_dtypes.bfloat16`, and None stays None."""
    if x is None or isinstance(x, np.ndarray):
        return x
    library = type(x).__module__.partition(".")[0]
    if library == "cupy":
        return x.get()
    if library == "torch":
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            import torch

            return x.view(torch.int16).numpy().view(_dtype("bfloat16"))
        return x.numpy()
    return np.asarray(x)


def to_library(x: NDArray[Any] | None, xp: str, device: str = "cpu") -> Any:
    """Copy a NumPy array to another library.

    Parameters
    ----------
    x : ndarray or None
        The array; None stays None.
    xp : {"numpy", "cupy", "torch", "jax"}
        The library.
    device : {"cpu", "cuda"}
        Where the copy lives: the library's current CUDA device for "cuda".

    Returns
    -------
    array
        A copy of x, with its shape and dtype.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if (xp, device) in (("numpy", "cuda"), ("cupy", "cpu")):
        raise ValueError(f"{xp} has no arrays on the device {device!r}")
    if x is None:
        return None
    if xp == "numpy":
        return x.copy()
    if xp == "cupy":
        import cupy

        return cupy.array(x)
    if xp == "torch":
        import torch

        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.copy().view(np.int16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)
    if xp == "jax":
        import jax

        return jax.device_put(x.copy(), jax.devices("cpu" if device == "cpu" else "gpu")[0])
    raise ValueError(f"xp must be 'numpy', 'cupy', 'torch' or 'jax', got {xp!r}")


def _cast(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    return x.astype(_dtype(dtype))


def _dtype(name: str) -> np.dtype[Any]:
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"a dtype must be 'float64', 'float32', 'float16' or 'bfloat16', got {name!r}")
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _index(x: NDArray[Any], flat: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, x.shape))
