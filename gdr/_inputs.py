"""The one place where a call is checked, normalised and described.

`prepare` turns the arguments of any operation into a `Call`: a `Spec`, made from metadata alone (by `gdr._spec`) and
cached by the signature of the arguments, and the operands themselves.  A backend gets the `Call` and checks nothing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gdr import _arrays
from gdr._spec import LAYOUTS, OPERANDS, Form, Spec, describe

# Operands that no call writes.
READ = ("q", "k", "v", "A_log", "dt_bias", "a", "b", "g", "beta")


@dataclass(slots=True, eq=False)
class Call:
    """One checked call: its `Spec`, its scalars and its operands (native arrays of one device).

    Shapes: q, k ``[B, T, H, K]``; v, out ``[B, T, HV, V]``; a, b, g, beta ``[B, T, HV]``; A_log, dt_bias ``[HV]``;
    states ``[slots, HV, K, V]`` or ``[slots, HV, V, K]``; slots ``[N]``; cu_seqlens ``[N + 1]``.
    Sequence n reads row ``initial_slots[n]`` of `initial_state` and writes row ``final_slots[n]`` of `final_state`
    (row n where the slots are None).  A row with a negative slot is padding.
    """

    spec: Spec
    library: Any
    scale: float
    softplus_beta: float
    softplus_threshold: float
    chunk_size: int = 64
    batch_invariant: bool = False
    wide_range: bool = False
    q: Any = None
    k: Any = None
    v: Any = None
    out: Any = None
    A_log: Any = None
    dt_bias: Any = None
    a: Any = None
    b: Any = None
    g: Any = None
    beta: Any = None
    initial_state: Any = None
    initial_slots: Any = None
    final_state: Any = None
    final_slots: Any = None
    cu_seqlens: Any = None
    ring: Any = None  # the pool's `Ring`, where the writes are left to it
    folds: Any = None  # the `Ring` whose pending tokens are written into the states first
    draft: Any = False  # nothing is committed: what the tokens would write is kept as drafts
    workspace: Any = None  # scratch that the caller lends
    parents: Any = None  # the draft before each draft, [N, T]; None for a chain
    whole: Any = False  # an interrupt must find all states written, or none
    names: Any = None  # what the caller calls an operand where that differs

    @property
    def stream(self) -> int:
        """Handle of the caller's current CUDA stream on the call's device."""
        return self.library.stream(self.spec.device)


@dataclass(slots=True, eq=False)
class _Signer:
    """What makes the signatures of the calls of one form whose arguments have the same types."""

    number: int  # one for each
    parts: list[tuple[Callable[[Any], tuple], Callable[[tuple], Any]]]  # for each library; what picks its operands
    recent: Checked | None = None  # the last call's, if what is like it can be recognised


class Checked(NamedTuple):
    """What is known of all calls with one signature."""

    head: tuple  # the fields of a Call before the operands
    spec: Spec
    checks_values: bool
    allocates_state: bool
    options: tuple
    recognizes: Any  # says of operands whether they are like this call's, sooner than a signature does; or None


_signers: dict[tuple, _Signer] = {}
_numbers = count()
_specs: dict[tuple, Checked] = {}
_MAX_SPECS = 1024


def options(
    scale: float | None = None,
    l2norm: bool = False,
    layout: str = "kv",
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    chunk_size: int = 64,
    batch_invariant: bool = False,
    wide_range: bool = False,
    output_final_state: bool = False,
    check: bool | None = None,
) -> tuple[Any, ...]:
    """What a call has beside its operands, as it was given.

    Parameters
    ----------
    output_final_state : bool
        Allocate `final_state` for N sequences (float32, or float64 where the arithmetic is).
    check : bool, optional
        Check the values of slots and cu_seqlens.  None: on the host, not on a device, where it must synchronise.
    """
    rule = scale, l2norm, layout, softplus_beta, softplus_threshold
    return rule + (chunk_size, batch_invariant, wide_range, output_final_state, check)


def recognize(form: Form, operands: tuple[Any, ...], options: tuple[Any, ...]) -> Checked:
    """Check all of a call but values; what is found is remembered.

    Parameters
    ----------
    form : Form
        What is called.
    operands : tuple
        The arrays of the call in the order of `OPERANDS`; None where there is none.
    options : tuple
        What the function of that name returns.
    """
    # A state that is updated in place, and its slots, come twice: they are signed once.
    once = operands[12] is operands[10], operands[13] is operands[11]
    kinds = (form, once, *map(type, operands), *map(type, options))
    signer = _signers.get(kinds) or _make_signer(kinds, form, operands, options)
    checked = signer.recent
    if checked is None or options != checked.options or not checked.recognizes(*signer.parts[0][1](operands)):
        signature = (signer.number, options, *[sign(pick(operands)) for sign, pick in signer.parts])
        checked = _specs.get(signature) or _check(signature, signer, form, operands, options)
        if checked.recognizes is not None:
            arrays = signer.parts[0][1](operands)
            if not checked.recognizes(*arrays):  # a thread's modes count too, such as torch.inference_mode
                recognizes = checked.head[1].recognizer(arrays)
                checked = _specs[signature] = checked._replace(recognizes=recognizes)
            signer.recent = checked if checked.recognizes else None
    return checked


def prepare(form: Form, operands: tuple[Any, ...], **named: Any) -> Call:
    """Check a call and describe it; see the module's docstring, and `recognize` and `options` for the arguments."""
    return describe_call(recognize(form, operands, options(**named)), form, operands)


def describe_call(checked: Checked, form: Form, operands: tuple[Any, ...]) -> Call:
    """Make the call of operands that were recognised."""
    head, spec, *_ = checked
    call = Call(*head, *operands)
    call.names = form.names
    if not spec.native:
        _adopt(call, operands, form.names)
    if form.op == "gate":
        call.g = call.library.empty(spec.shapes["g"], spec.compute, spec.device)
        call.beta = call.library.empty(spec.shapes["beta"], spec.compute, spec.device)
        return call
    if checked.checks_values:
        _check_values(call, form.names)
    if call.out is None:
        call.out = call.library.empty(spec.shapes["out"], spec.dtype, spec.device)
    if checked.allocates_state:
        call.final_state = call.library.empty(spec.shapes["final_state"], spec.final_dtype, spec.device)
    return call


def _make_signer(kinds: tuple, form: Form, operands: tuple[Any, ...], options: tuple[Any, ...]) -> _Signer:
    """Refuse arguments of wrong types, and say how to sign the others."""
    _check_options(*options)
    places: dict[Any, list[int]] = {}
    for i, (name, x) in enumerate(zip(OPERANDS, operands, strict=True)):
        if x is None or (i == 12 and x is operands[10]) or (i == 13 and x is operands[11]):
            continue
        library = _arrays.library_of(x)
        if library is None:
            said = form.names.get(name, name)
            raise TypeError(f"{said}: expected a NumPy, CuPy, torch or JAX array, got {type(x).__name__}")
        places.setdefault(library, []).append(i)
    parts = [(library.signature, _picker(found)) for library, found in places.items()]
    signer = _signers[kinds] = _Signer(next(_numbers), parts)
    return signer


def _picker(places: list[int]) -> Callable[[tuple], Any]:
    """What takes the elements at `places` out of a tuple."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _check(
    signature: tuple, signer: _Signer, form: Form, operands: tuple[Any, ...], options: tuple[Any, ...]
) -> Checked:
    """Check everything that a signature says of a call, and remember it."""
    scale, l2norm, layout, *softplus_and_chunks, output_final_state, check = _check_options(*options)
    spec = describe(form, operands, l2norm, layout, output_final_state)
    library = _arrays.library_of(operands[OPERANDS.index("a" if form.op == "gate" else "v")])
    head = spec, library, spec.K**-0.5 if scale is None else scale, *softplus_and_chunks
    checks_values = bool(check or (check is None and spec.device == "cpu"))
    recognizes = library.recognizer(signer.parts[0][1](operands)) if len(signer.parts) == 1 else None
    checked = Checked(head, spec, checks_values, output_final_state, options, recognizes)
    if len(_specs) >= _MAX_SPECS:
        forget()
    _specs[signature] = checked
    return checked


def forget() -> None:
    """Describe every call anew."""
    _specs.clear()
    _signers.clear()


def _check_options(
    scale: Any,
    l2norm: Any,
    layout: Any,
    softplus_beta: Any,
    softplus_threshold: Any,
    chunk_size: Any,
    batch_invariant: Any,
    wide_range: Any,
    output_final_state: Any,
    check: Any,
) -> tuple[Any, ...]:
    """The options of a call in the same order, as Python's own types; those of wrong types or values are refused."""
    check_flag("use_qk_l2norm_in_kernel", l2norm)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"state_layout: expected 'kv' or 'vk', got {layout!r}")
    check_whole_number("chunk_size", chunk_size)
    check_flag("batch_invariant", batch_invariant)
    check_flag("wide_range", wide_range)
    check_flag("output_final_state", output_final_state)
    if check is not None:
        check_flag("check", check)
    return (
        None if scale is None else number("scale", scale),
        bool(l2norm),
        layout,
        positive("softplus_beta", softplus_beta),
        number("softplus_threshold", softplus_threshold),
        int(chunk_size),
        bool(batch_invariant),
        bool(wide_range),
        bool(output_final_state),
        check,
    )


def _adopt(call: Call, operands: tuple[Any, ...], names: dict[str, str]) -> None:
    """Replace operands that are no native arrays of their device by views that are."""
    for name in ("out", "final_state"):
        x = getattr(call, name)
        if x is not None and not _arrays.library_of(x).writable(x):
            raise ValueError(f"{names.get(name, name)}: is written in place, and this {type(x).__name__} is read-only")
    one_state, one_slots = call.final_state is call.initial_state, call.final_slots is call.initial_slots
    for name, x in zip(OPERANDS, operands):
        if x is not None and type(x) is not np.ndarray:
            try:
                setattr(call, name, _arrays.library_of(x).adopt(x))
            except (TypeError, RuntimeError) as error:  # what no signature tells: tensors without data, deleted arrays
                raise TypeError(f"{names.get(name, name)}: {error}") from None
    if one_state:
        call.final_state = call.initial_state
    if one_slots:
        call.final_slots = call.initial_slots
    if call.spec.device == "cpu" and call.spec.op != "gate":
        _check_memory(call, names)


def refuse_misaligned(call: Call) -> None:
    """Refuse arrays whose elements lie where no GPU can read them, such as views of bytes at odd addresses.

    The launchers ask for this where any address is no multiple of 8.
    """
    for name, dtype in call.spec.dtypes.items():
        x, size = getattr(call, name), _arrays.numpy_dtype(dtype).itemsize
        if x is not None and _arrays.pointer(x) % size:
            raise ValueError(
                f"{call.names.get(name, name)}: expected elements at multiples of {size} bytes, "
                f"got an array that begins at {_arrays.pointer(x):#x}"
            )


def check_workspace(call: Call, workspace: Any) -> None:
    """Let a call use scratch that the caller lends."""
    if call.spec.device == "cpu":
        raise ValueError("workspace: is for arrays on a CUDA device; on the host scratch is kept from call to call")
    library = _arrays.library_of(workspace)
    if library is None:
        raise TypeError(f"workspace: expected an array of uint8, got {type(workspace).__name__}")
    shape, strides, dtype, device = library.meta(workspace)
    if device != call.spec.device:
        raise TypeError(f"workspace: expected an array on CUDA device {call.spec.device}, got one on {device}")
    if dtype != "uint8" or len(shape) != 1 or strides != (1,):
        raise TypeError(f"workspace: expected a dense uint8 array of one axis, got {dtype} of shape {list(shape)}")
    call.workspace = library.adopt(workspace)


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if type(value) is float and value - value == 0.0:
        return value  # at once: inf - inf is NaN
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating, np.integer)):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not math.isfinite(real):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return real


def positive(name: str, value: Any) -> float:
    """`value` as a finite float above 0."""
    real = number(name, value)
    if real <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return real


def check_whole_number(name: str, value: Any, most: int | None = None, least: int = 1) -> None:
    """Refuse anything but an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def _check_memory(call: Call, names: dict[str, str]) -> None:
    """Give a and b three axes, and refuse outputs that overlap other operands."""
    spec = call.spec
    for name in ("a", "b", "g", "beta"):
        x = getattr(call, name)
        if x is not None and x.ndim == 2:
            setattr(call, name, x.reshape(spec.B, spec.T, spec.HV))
    if call.out is not None:
        _check_apart(call, "out", (*READ, "initial_state", "final_state"), names)
    if call.final_state is not None:
        _check_apart(call, "final_state", READ, names)


def _check_apart(call: Call, written: str, others: tuple[str, ...], names: dict[str, str]) -> None:
    """Refuse memory that is both read and written: the answer would depend on the order of the two."""
    target = getattr(call, written)
    for name in others:
        x = getattr(call, name)
        # Nearly always the addresses alone tell.
        if x is not None and np.may_share_memory(target, x) and _overlap(target, x):
            raise ValueError(
                f"{names.get(written, written)}: is written, so it needs memory of its own; "
                f"it overlaps {names.get(name, name)}"
            )


def _overlap(x: np.ndarray, y: np.ndarray) -> bool:
    try:
        return np.shares_memory(x, y, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _check_values(call: Call, names: dict[str, str]) -> None:
    """Check the values of cu_seqlens and slots; on the host they become int64 arrays on the way."""
    spec = call.spec
    on_host = spec.device == "cpu"

    def values(name: str) -> np.ndarray | None:
        x = getattr(call, name)
        if x is None:
            return None
        host = x if on_host else _arrays.library_of(x).to_host(x)
        return np.ascontiguousarray(host, np.int64)

    cu_seqlens = values("cu_seqlens")
    read = values("initial_slots")
    written = read if call.final_slots is call.initial_slots else values("final_slots")
    if on_host:
        call.cu_seqlens, call.initial_slots, call.final_slots = cu_seqlens, read, written
    lengths = [spec.T] * spec.N
    if cu_seqlens is not None:
        lengths = np.diff(cu_seqlens).tolist()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != spec.T or min(lengths, default=0) < 0:
            raise ValueError(
                f"{names.get('cu_seqlens', 'cu_seqlens')}: expected non-decreasing offsets from 0 to T = {spec.T}, "
                f"got {np.array2string(cu_seqlens, threshold=8, edgeitems=3)}"
            )
    # Plain integers: for the few rows of most calls NumPy's own overhead would be larger than the work.
    sources = list(range(spec.N)) if read is None else read.tolist()
    targets = sources if written is read else list(range(spec.N)) if written is None else written.tolist()
    for name, slots, given in (("initial", sources, read), ("final", targets, written)):
        state = spec.shapes.get(f"{name}_state")
        if given is not None and state is not None and slots and max(slots) >= state[0]:
            said = names.get(f"{name}_slots", f"{name}_slots")
            raise IndexError(f"{said}: expected slots below {state[0]}, got {max(slots)}")
    if call.final_state is not None and written is not None:
        _check_conflicts(call, sources, targets, lengths, names)


def _check_conflicts(
    call: Call, sources: list[int], targets: list[int], lengths: list[int], names: dict[str, str]
) -> None:
    """Refuse a slot that two rows write, or that one row writes and another one reads."""
    said = names.get("final_slots", "final_slots")
    if call.final_slots is call.initial_slots:
        said = names.get("initial_slots", said)
    writers: dict[int, int] = {}
    for row, (source, target, length) in enumerate(zip(sources, targets, lengths, strict=True)):
        if source < 0 or target < 0 or (length == 0 and source == target):
            continue
        if target in writers:
            raise ValueError(
                f"{said}: expected every slot written once, got slot {target} in rows {[writers[target], row]}"
            )
        writers[target] = row
    if call.final_state is call.initial_state and targets is not sources:
        # The answer would depend on which of the two rows comes first.
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if source >= 0 and target >= 0 and writers.get(source, row) != row:
                raise ValueError(
                    f"{said}: slot {source} is written by row {writers[source]} and read by row {row} of the same call"
                )
