"""Launches the fused recurrence on a CUDA device: picks a kernel from a call's `Spec`, and its tile from the batch.

The tile never shows in the bits of a result: the kernels add up in one order whatever it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from gdr import _arrays, _cuda_loader
from gdr._inputs import Call, Checked, describe_call, refuse_misaligned
from gdr._spec import OPERANDS, Form, Spec

TYPES = {None: -1, "float32": 0, "float16": 1, "bfloat16": 2}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
LARGEST_GRID = 65535  # along y and z

# The C struct Params of recurrent.cuh: pointers, scalars and the first sequence of a launch; then what a Spec fixes.
HEAD = struct.Struct("13Q 4f I")
_REST = "18q 6q 5q I 4i"
LAYOUT = HEAD.format + _REST
PARAMS = dict.fromkeys(("fused_recurrent_kv", "fused_recurrent_vk"), _cuda_loader.Params(LAYOUT))
# The operands in the order of their pointers; g and beta take the place of a and b where those are given.
_POINTERS = (
    *("q", "k", "v", "out", "A_log", "dt_bias", "a", "b"),
    *("initial_state", "initial_slots", "final_state", "final_slots", "cu_seqlens"),
)


class Tile(NamedTuple):
    """How a kernel divides a state: definitions, threads of a block, and value columns that a block owns."""

    defines: dict[str, _cuda_loader.Define]
    threads: int
    columns: int


class Variant(NamedTuple):
    """What a kernel is chosen by beside the `Spec`: what only the pointers tell."""

    tokens_aligned: bool  # q and k, to 16 bytes
    states_aligned: bool
    in_place: bool


class Launch(NamedTuple):
    """A compiled kernel with the shape of its blocks."""

    kernel: _cuda_loader.Kernel
    blocks: int  # for one key head of a sequence
    block: tuple[int, int, int]
    parts: tuple[tuple[int, tuple[int, int, int]], ...] = ()  # the first sequence of each launch, and its grid


class Pointers:
    """Takes the pointers out of the calls with one signature, in the order of the C structs; 0 for absent operands."""

    def __init__(self, call: Call) -> None:
        given = {} if call.spec.gates == "raw" else {"a": "g", "b": "beta"}
        names = [given.get(name, name) for name in _POINTERS]
        present = [name for name in names if getattr(call, name) is not None]
        self._operands, self._pointer = attrgetter(*present), pointer_of(call)
        self.pick = itemgetter(*map(OPERANDS.index, present))  # takes what `of` wants out of a call's operands
        # From a list that has the pointers of those that are present, and then a 0.
        self._spread = itemgetter(*(present.index(name) if name in present else -1 for name in names))

    def __call__(self, call: Call) -> tuple[int, ...]:
        return self.of(self._operands(call))

    def of(self, present: tuple[Any, ...]) -> tuple[int, ...]:
        """The pointers, from the operands that there are."""
        return self._spread([*map(self._pointer, present), 0])


class Plan:
    """What the calls with one signature share."""

    def __init__(self, call: Call) -> None:
        self.spec = call.spec
        self.pointers = Pointers(call)
        # The signature of a call has these in it.
        self.one_state = call.final_state is call.initial_state
        self.scalars = call.scale, call.softplus_beta, 1 / call.softplus_beta, call.softplus_threshold
        self.arguments = _cuda_loader.Arguments(HEAD.format, _REST, fixed(self.spec))
        self.launches: dict[tuple[bool, bool, bool], Launch] = {}

    def launch(self, variant: tuple[bool, bool, bool]) -> Launch:
        """Compile the kernel for a variant, once."""
        device = int(self.spec.device)
        tile = pick_tile(self.spec, _cuda_loader.describe_gpu(device).multiprocessors)
        kernel = _cuda_loader.load(*_specialize(self.spec, tile, Variant(*variant)), device)
        blocks = -(-self.spec.V // tile.columns) * (self.spec.HV // self.spec.H)
        N, H = self.spec.N, self.spec.H
        parts = [(first, (blocks, H, min(N - first, LARGEST_GRID))) for first in range(0, N, LARGEST_GRID)]
        launch = self.launches[variant] = Launch(kernel, blocks, (tile.threads, 1, 1), tuple(parts))
        return launch

    def start(self, pointers: tuple[int, ...], stream: int, misaligned: bool = False) -> bool:
        """Launch; but unless told to, do nothing and return False where an address is no multiple of 8."""
        q, k, v, out, A_log, dt_bias, a, b, initial, read, final, written, cu_seqlens = pointers
        tokens, states = q | k, initial | final
        if (tokens | states | v | out | A_log | dt_bias | a | b | read | written | cu_seqlens) & 7 and not misaligned:
            return False
        variant = (not tokens & 15, not states & 15, self.one_state and read == written)
        launch = self.launches.get(variant) or self.launch(variant)
        arguments = self.arguments
        for first, grid in launch.parts:
            arguments.pack_head(*pointers, *self.scalars, first)
            launch.kernel.launch(grid, launch.block, arguments, stream)
        return True


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    plan = call.spec.plan.get("fused_recurrent")
    if plan is None:
        plan = call.spec.plan["fused_recurrent"] = Plan(call)
    pointers, stream = plan.pointers(call), call.stream
    if not plan.start(pointers, stream):
        refuse_misaligned(call)
        plan.start(pointers, stream, misaligned=True)


def launcher(checked: Checked, form: Form) -> Callable[[tuple[Any, ...]], tuple[Any, Any]]:
    """What runs the calls that are like one that ran, from their operands in the order of `OPERANDS`.

    It returns `out`, and the state where that is allocated for the call.
    """
    spec, library, *_ = checked.head
    plan, device = spec.plan["fused_recurrent"], spec.device
    pick, pointers_of, start = plan.pointers.pick, plan.pointers.of, plan.start
    stream_of, empty, empty_like = library.stream, library.empty, library.empty_like
    state_shape = spec.shapes["final_state"] if checked.allocates_state else None

    def launch(operands: tuple[Any, ...]) -> tuple[Any, Any]:
        out, state = operands[3], None
        if out is None:
            out = empty_like(operands[2])
            operands = (*operands[:3], out, *operands[4:])
        if state_shape:
            state = empty(state_shape, spec.final_dtype, device)
            operands = (*operands[:12], state, *operands[13:])
        pointers, stream = pointers_of(pick(operands)), stream_of(device)
        if not start(pointers, stream):
            refuse_misaligned(describe_call(checked, form, operands))
            start(pointers, stream, misaligned=True)
        return out, state

    return launch


def specializations(spec: Spec, gpu: _cuda_loader.Gpu) -> list[_cuda_loader.Specialization]:
    """List the kernels that aligned calls with this `Spec` use, in place where it allows that."""
    states = ("initial_state", "final_state")
    one_array = all(
        spec.initial_dtype and values.get(states[0]) == values.get(states[1])
        for values in (spec.dtypes, spec.shapes, spec.strides)
    )
    return [_specialize(spec, pick_tile(spec, gpu.multiprocessors), Variant(True, True, one_array))]


def _specialize(spec: Spec, tile: Tile, variant: Variant) -> _cuda_loader.Specialization:
    """Stem and definitions of a kernel."""
    chunk = _chunk(spec)
    row = spec.K if spec.layout == "vk" else spec.V
    states = [name for name in ("initial_state", "final_state") if name in spec.strides]
    return f"fused_recurrent_{spec.layout}", {
        "GDR_QKV": TYPES[spec.dtype],
        "GDR_INITIAL": TYPES[spec.initial_dtype],
        "GDR_FINAL": TYPES[spec.final_dtype],
        "GDR_K": spec.K,
        "GDR_V": spec.V,
        "GDR_RAW_GATES": spec.gates == "raw",
        "GDR_L2NORM": spec.l2norm,
        "GDR_ONE_TOKEN": _one_token(spec),
        "GDR_CU_SEQLENS": index_bytes(spec, "cu_seqlens"),
        "GDR_INITIAL_SLOTS": index_bytes(spec, "initial_slots"),
        "GDR_FINAL_SLOTS": 0 if variant.in_place else index_bytes(spec, "final_slots"),
        "GDR_IN_PLACE": variant.in_place,
        "GDR_ALIGNED_TOKENS": variant.tokens_aligned
        and all(whole_chunks(spec, name, chunk if spec.layout == "vk" else 4) for name in ("q", "k")),
        "GDR_ALIGNED_STATES": variant.states_aligned and all(whole_chunks(spec, name, chunk) for name in states),
        "GDR_DENSE_STATES": all(spec.strides[name][2] == row for name in states),
        **tile.defines,
    }


def pick_tile(spec: Spec, multiprocessors: int) -> Tile:
    """Choose how many value columns a block owns: few where the batch is small, to use every multiprocessor."""
    pick = _pick_vk if spec.layout == "vk" else _pick_kv
    tile = pick(spec.K, spec.V, _chunk(spec), SIZES[spec.dtype], spec.N * spec.HV, multiprocessors)
    if spec.layout == "vk":
        blocks = spec.N * spec.HV * -(-spec.V // tile.columns)
        tile.defines["GDR_ALONE"] = _one_token(spec) and blocks <= multiprocessors
    return tile


def _pick_vk(K: int, V: int, chunk: int, size: int, heads: int, multiprocessors: int) -> Tile:
    lanes = min(16, _power_of_two(-(-K // chunk)))
    share = -(-K // (lanes * chunk)) * chunk  # elements of a row that a lane holds
    warps, warp_rows = 4, 32 // lanes
    rows = min(lanes, 1 << ((64 // share).bit_length() - 1))  # a power of two
    while rows > 1 and (
        warps * rows * warp_rows >= 2 * V
        or (rows > 2 and heads * -(-V // (warps * rows * warp_rows)) < 3 * multiprocessors)
    ):
        rows //= 2
    held = (rows + 2) * share  # the state's elements, and k and q
    min_blocks = (4 if size == 2 else 3) if held > 48 else 5 if held > 32 else 6
    defines: dict[str, _cuda_loader.Define] = {"GDR_ROWS": rows, "GDR_WARPS": warps, "GDR_MIN_BLOCKS": min_blocks}
    return Tile(defines, 32 * warps, warps * rows * warp_rows)


def _pick_kv(K: int, V: int, chunk: int, size: int, heads: int, multiprocessors: int) -> Tile:
    warps = 8 if K <= 128 else 16
    held = -(-K // 32) * 32 * chunk // warps  # elements of the state that a thread holds, times 32 / lanes
    lanes = 32
    while lanes > warps and (
        held * lanes // 32 > (64 if size == 2 else 32)
        or lanes * chunk >= 2 * V
        or heads * -(-V // (lanes * chunk)) < multiprocessors
    ):
        lanes //= 2
    held = held * lanes // 32
    min_blocks = (2 if held > 16 else 3) * 8 // warps
    defines: dict[str, _cuda_loader.Define] = {"GDR_LANES": lanes, "GDR_WARPS": warps, "GDR_MIN_BLOCKS": min_blocks}
    return Tile(defines, 32 * warps, lanes * chunk)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunk(spec: Spec) -> int:
    """Elements of a state that move at once."""
    return 16 // SIZES[spec.initial_dtype or spec.final_dtype or "float32"]


def _one_token(spec: Spec) -> bool:
    return spec.T == 1 and not spec.varlen


def index_bytes(spec: Spec, name: str) -> int:
    return {None: 0, "int32": 4, "int64": 8}[spec.dtypes.get(name)]


def whole_chunks(spec: Spec, name: str, chunk: int) -> bool:
    """Whether rows are whole chunks, and aligned to 16 bytes wherever the array itself is."""
    strides, shape = spec.strides[name], spec.shapes[name]
    steps = [stride for stride, extent in zip(strides[:-1], shape[:-1]) if extent > 1]
    return shape[-1] % chunk == 0 and not any(step * SIZES[spec.dtypes[name]] % 16 for step in steps)


def fixed(spec: Spec) -> tuple[int, ...]:
    """The fields of Params that a Spec fixes, in order; strides in bytes."""

    def strides(name: str, count: int) -> list[int]:
        steps = spec.strides.get(name, (0,) * count)[:count]
        return [step * SIZES.get(spec.dtypes.get(name, ""), 0) for step in steps]

    a, b = ("a", "b") if spec.gates == "raw" else ("g", "beta")
    states = ("initial_state", "final_state")
    return (
        *(step for name in ("q", "k", "v", "out", a, b, *states) for step in strides(name, 3)),
        *(step for name in ("A_log", "dt_bias") for step in strides(name, 1)),
        *(spec.shapes.get(name, (0,))[0] for name in states),
        spec.T,
        spec.HV // spec.H,
        *(TYPES[spec.dtypes.get(name)] for name in ("A_log", "dt_bias", a, b)),
    )


def pointer_of(call: Call) -> Callable[[Any], int]:
    """The quickest way to the pointers of a call's arrays, which all calls with its `Spec` can take."""
    operands = [getattr(call, name) for name in OPERANDS]
    libraries = {_arrays.library_of(x) for x in operands if x is not None}
    return libraries.pop().pointer if len(libraries) == 1 else _arrays.pointer
