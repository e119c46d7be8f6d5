"""What a call is, from the metadata of its operands alone: shapes, strides, dtypes and devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gdr import _arrays
from gdr._arrays import FLOATS, INTEGERS, Meta

MAX_HEAD_DIM = 256
DEVICE_FLOATS = ("float32", "float16", "bfloat16")
LAYOUTS = ("kv", "vk")

# Operands in the order in which they enter a signature.
OPERANDS = (
    "q",
    "k",
    "v",
    "out",
    "A_log",
    "dt_bias",
    "a",
    "b",
    "g",
    "beta",
    "initial_state",
    "initial_slots",
    "final_state",
    "final_slots",
    "cu_seqlens",
)
# What a call must have, by how its gates come.
RAW_GATES = ("A_log", "dt_bias", "a", "b")
GIVEN_GATES = ("g", "beta")
TOKENS = ("q", "k", "v")


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One way to call an operation."""

    op: str  # "fused_recurrent", "chunk" or "gate"
    required: tuple[str, ...]  # operands that every such call has
    names: dict[str, str] = field(default_factory=dict)  # what the caller calls an argument where that differs


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """What a call is, from metadata alone; made once a signature.

    `strides` count elements.  `native`: every operand is a CUDA array that kernels take as it is.  `plan` is the
    backend's own: whatever it derives from the rest, and from the scalars, which are a part of the signature.
    """

    op: str
    device: str | int
    compute: str
    B: int
    T: int
    N: int
    HV: int
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    strides: dict[str, tuple[int, ...]]
    H: int = 1
    K: int = 1
    V: int = 1
    gates: str = "raw"
    l2norm: bool = False
    varlen: bool = False
    layout: str = "kv"
    native: bool = False
    plan: dict[Any, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Dtype of q, k, v and out."""
        return self.dtypes["q"]

    @property
    def initial_dtype(self) -> str | None:
        """Dtype of the state that is read, None where it is zero."""
        return self.dtypes.get("initial_state")

    @property
    def final_dtype(self) -> str | None:
        """Dtype of the state that is written, None where it is dropped."""
        return self.dtypes.get("final_state")


def describe(form: Form, operands: tuple[Any, ...], l2norm: bool, layout: str, output_final_state: bool) -> Spec:
    """Check the operands of a call against one another and describe it.

    Parameters
    ----------
    form : Form
        What is called.
    operands : tuple
        Arrays in the order of `OPERANDS`, or None.

    Raises
    ------
    TypeError, ValueError
        By the caller's name of the argument.
    """
    found = _Operands(form, operands)
    if form.op == "gate":
        return _describe_gate(found)
    return _describe_rule(form.op, found, l2norm, layout, output_final_state)


class _Operands:
    """The metadata of a call's operands, and the caller's names for them."""

    def __init__(self, form: Form, operands: tuple[Any, ...]) -> None:
        self.names = form.names
        self.meta: dict[str, Meta] = {}
        libraries = {_arrays.library_of(x).name for x in operands if x is not None}
        for name, x in zip(OPERANDS, operands):
            if x is not None:
                try:
                    self.meta[name] = _arrays.library_of(x).meta(x)
                except TypeError as error:
                    raise TypeError(f"{self.said(name)}: {error}") from None
            elif name in form.required:
                raise TypeError(f"{self.said(name)}: expected an array, got None")
        first, self.device = next((name, m.device) for name, m in self.meta.items())
        for name, m in self.meta.items():
            if m.device != self.device:
                raise TypeError(
                    f"{self.said(name)}: expected an array on the same device as {self.said(first)} "
                    f"({_place(self.device)}), got one on {_place(m.device)}; nothing is copied silently"
                )
        self.on_host = self.device == "cpu"
        for name, x in zip(OPERANDS, operands):
            if x is not None and not self.on_host and not _arrays.of_whole_elements(x):
                raise ValueError(
                    f"{self.said(name)}: expected strides of whole elements on a CUDA device, got {x.strides} in bytes"
                )
        self.native = not self.on_host and libraries <= {"cupy", "torch"}

    def __contains__(self, name: str) -> bool:
        return name in self.meta

    def said(self, name: str) -> str:
        return self.names.get(name, name)

    def check_axes(self, name: str, axes: str, count: int) -> tuple[int, ...]:
        shape = self.meta[name].shape
        if len(shape) != count:
            raise ValueError(f"{self.said(name)}: expected shape {axes}, got {list(shape)}")
        return shape

    def check_shape(self, name: str, want: tuple[int, ...], words: str) -> None:
        got = self.meta[name].shape
        if got != want:
            raise ValueError(f"{self.said(name)}: expected {words} = {list(want)}, got {list(got)}")

    def check_float(self, name: str) -> str:
        dtype = self.meta[name].dtype
        allowed = FLOATS if self.on_host else DEVICE_FLOATS
        if dtype not in allowed:
            raise TypeError(
                f"{self.said(name)}: expected dtype {', '.join(allowed)} on {_place(self.device)}, got {dtype}"
            )
        return dtype

    def check_indices(self, name: str, axes: str) -> int:
        meta = self.meta[name]
        if meta.dtype not in INTEGERS:
            raise TypeError(f"{self.said(name)}: expected dtype int32 or int64, got {meta.dtype}")
        (count,) = self.check_axes(name, axes, 1)
        if not self.on_host and count > 1 and meta.strides[0] != 1:
            raise ValueError(
                f"{self.said(name)}: expected a contiguous array on a CUDA device, got stride {meta.strides[0]}"
            )
        return count

    def check_per_token(self, name: str, B: int, T: int, HV: int) -> None:
        """Take [B, T, HV]; or [B * T, HV], which SGLang's callers pass: the same memory read as 3-D."""
        self.check_float(name)
        meta = self.meta[name]
        if meta.shape == (B * T, HV):
            token, head = meta.strides
            self.meta[name] = meta._replace(shape=(B, T, HV), strides=(T * token, token, head))
        else:
            self.check_shape(name, (B, T, HV), "[B, T, HV]")

    def check_per_head(self, name: str, HV: int) -> None:
        self.check_float(name)
        self.check_shape(name, (HV,), "[HV]")

    def check_written(self, name: str) -> None:
        """Refuse to write an array whose elements overlap one another."""
        meta = self.meta[name]
        if 0 in meta.shape:
            return
        reach = 1
        for stride, extent in sorted((abs(s), n) for s, n in zip(meta.strides, meta.shape, strict=True) if n > 1):
            if stride < reach:
                raise ValueError(
                    f"{self.said(name)}: is written, so its elements must not overlap; got strides {meta.strides}"
                )
            reach += stride * (extent - 1)

    def check_rows_contiguous(self, name: str) -> None:
        meta = self.meta[name]
        if 0 not in meta.shape and meta.shape[-1] > 1 and meta.strides[-1] != 1:
            raise ValueError(
                f"{self.said(name)}: expected a last axis of stride 1 on a CUDA device, "
                f"got strides {list(meta.strides)} (in elements)"
            )

    def spec(self, op: str, **rest: Any) -> Spec:
        return Spec(
            op,
            self.device,
            native=self.native,
            dtypes={name: m.dtype for name, m in self.meta.items()},
            shapes={name: m.shape for name, m in self.meta.items()},
            strides={name: m.strides for name, m in self.meta.items()},
            **rest,
        )


def _describe_gate(found: _Operands) -> Spec:
    for name in ("a", "b"):
        found.check_float(name)
    shape = found.meta["a"].shape
    if len(shape) not in (2, 3):
        raise ValueError(f"{found.said('a')}: expected shape [B, T, HV] or [tokens, HV], got {list(shape)}")
    found.check_shape("b", shape, "a's shape")
    B, T, HV = (1, *shape) if len(shape) == 2 else shape
    for name in ("A_log", "dt_bias"):
        found.check_per_head(name, HV)
    for name in ("a", "b"):
        found.check_per_token(name, B, T, HV)
    wide = "float64" in (found.meta["a"].dtype, found.meta["b"].dtype)
    for name in ("g", "beta"):
        found.meta[name] = _contiguous(shape, "float64" if wide else "float32", found.device)
    return found.spec("gate", compute=found.meta["g"].dtype, B=B, T=T, N=B, HV=HV)


def _describe_rule(op: str, found: _Operands, l2norm: bool, layout: str, output_final_state: bool) -> Spec:
    B, T, H, K, HV, V = _check_tokens(found)
    gates = "raw" if "A_log" in found else "given"
    for name in ("a", "b") if gates == "raw" else ("g", "beta"):
        found.check_per_token(name, B, T, HV)
    for name in ("A_log", "dt_bias") if gates == "raw" else ():
        found.check_per_head(name, HV)
    N = _check_sequences(found, B)
    slot_shape = (HV, K, V) if layout == "kv" else (HV, V, K)
    _check_states(found, N, slot_shape, layout)

    wide = any(name in found and found.meta[name].dtype == "float64" for name in ("q", "initial_state"))
    compute = "float64" if wide else "float32"
    if "out" not in found:
        found.meta["out"] = _contiguous((B, T, HV, V), found.meta["v"].dtype, found.device)
    if output_final_state:
        found.meta["final_state"] = _contiguous((N, *slot_shape), compute, found.device)
    if not found.on_host:
        for name in ("q", "k", "v", "out", "initial_state", "final_state"):
            if name in found:
                found.check_rows_contiguous(name)
    return found.spec(
        op,
        compute=compute,
        B=B,
        T=T,
        N=N,
        H=H,
        HV=HV,
        K=K,
        V=V,
        gates=gates,
        l2norm=l2norm,
        varlen="cu_seqlens" in found,
        layout=layout,
    )


def _check_tokens(found: _Operands) -> tuple[int, int, int, int, int, int]:
    B, T, H, K = found.check_axes("q", "[B, T, H, K]", 4)
    found.check_shape("k", (B, T, H, K), "q's shape [B, T, H, K]")
    HV, V = found.check_axes("v", "[B, T, HV, V]", 4)[2:]
    found.check_shape("v", (B, T, HV, V), "[B, T, HV, V] with q's B and T")
    if H < 1 or HV < 1 or HV % H:
        raise ValueError(
            f"{found.said('v')}: expected a number of value heads HV that is a multiple of q's H = {H}, got HV = {HV}"
        )
    for name, what, extent in (("q", "K", K), ("v", "V", V)):
        if not 1 <= extent <= MAX_HEAD_DIM:
            raise ValueError(
                f"{found.said(name)}: expected a head dimension {what} from 1 to {MAX_HEAD_DIM}, got {extent}"
            )
    dtype = found.check_float("q")
    for name in ("k", "v", "out"):
        if name in found and found.meta[name].dtype != dtype:
            raise TypeError(f"{found.said(name)}: expected q's dtype {dtype}, got {found.meta[name].dtype}")
    if "out" in found:
        found.check_shape("out", (B, T, HV, V), "v's shape [B, T, HV, V]")
        found.check_written("out")
    return B, T, H, K, HV, V


def _check_sequences(found: _Operands, B: int) -> int:
    """The number of sequences."""
    if "cu_seqlens" not in found:
        return B
    N = found.check_indices("cu_seqlens", "[N + 1]") - 1
    if N < 0:
        raise ValueError(f"{found.said('cu_seqlens')}: expected shape [N + 1], got no element")
    if B != 1:
        raise ValueError(f"{found.said('cu_seqlens')}: packed sequences need B == 1 in q, k and v, got B = {B}")
    return N


def _check_states(found: _Operands, N: int, slot_shape: tuple[int, ...], layout: str) -> None:
    axes = "[slots, HV, K, V]" if layout == "kv" else "[slots, HV, V, K]"
    for name, slots in (("initial_state", "initial_slots"), ("final_state", "final_slots")):
        if name not in found:
            if slots in found:
                raise ValueError(f"{found.said(slots)}: given without {found.said(name)}")
            continue
        found.check_float(name)
        shape = found.check_axes(name, axes, 4)
        found.check_shape(name, (shape[0], *slot_shape), f"{axes} for layout {layout!r}")
        if slots in found:
            if found.check_indices(slots, "[N]") != N:
                raise ValueError(
                    f"{found.said(slots)}: expected shape [N] = [{N}], got {list(found.meta[slots].shape)}"
                )
        elif shape[0] != N:
            raise ValueError(
                f"{found.said(name)}: expected one state for each of the N = {N} sequences, got {shape[0]}"
            )
    if "final_state" in found:
        found.check_written("final_state")


def _place(device: str | int) -> str:
    return "the host" if device == "cpu" else f"CUDA device {device}"


def _contiguous(shape: tuple[int, ...], dtype: str, device: str | int) -> Meta:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return Meta(shape, tuple(reversed(strides)), dtype, device)
