"""Launches the fused recurrence on a CUDA device: picks a kernel from a call's `Spec`, and its tile from the batch.

The tile never shows in the bits of a result: the kernels add up in one order whatever it is.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from gdr import _arrays, _cuda_loader
from gdr._inputs import Call
from gdr._spec import Spec

TYPES = {None: -1, "float32": 0, "float16": 1, "bfloat16": 2}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LARGEST_GRID = 65535  # along y and z

# The C struct Params of recurrent.cuh: pointers; scalars and the first sequence; then what a Spec fixes.
_params = _cuda_loader.Params("13Q 3fi 18q 6q 5q 5i")
PARAMS = {"fused_recurrent_kv": _params, "fused_recurrent_vk": _params}


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


class Plan:
    """What every call with one `Spec` shares."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.raw = spec.gates == "raw"
        self.fixed = _fixed(spec)
        self.launches: dict[tuple[bool, bool, bool], Launch] = {}

    def launch(self, variant: tuple[bool, bool, bool]) -> Launch:
        """Compile the kernel for a variant, once."""
        device = int(self.spec.device)
        tile = pick_tile(self.spec, _multiprocessors(device))
        kernel = _cuda_loader.load(*_specialize(self.spec, tile, Variant(*variant)), device)
        blocks = -(-self.spec.V // tile.columns) * (self.spec.HV // self.spec.H)
        launch = self.launches[variant] = Launch(kernel, blocks, (tile.threads, 1, 1))
        return launch


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    spec = call.spec
    plan = spec.plan.get("fused_recurrent")
    if plan is None:
        plan = spec.plan["fused_recurrent"] = Plan(spec)
    pointer = _arrays.pointer
    q, k = pointer(call.q), pointer(call.k)
    initial = 0 if call.initial_state is None else pointer(call.initial_state)
    final = 0 if call.final_state is None else pointer(call.final_state)
    a, b = (call.a, call.b) if plan.raw else (call.g, call.beta)
    initial_slots = 0 if call.initial_slots is None else pointer(call.initial_slots)
    final_slots = 0 if call.final_slots is None else pointer(call.final_slots)
    in_place = call.final_state is call.initial_state and final_slots == initial_slots
    variant = (not (q | k) & 15, not (initial | final) & 15, in_place)
    launch = plan.launches.get(variant) or plan.launch(variant)
    stream = call.stream
    for first in range(0, spec.N, _LARGEST_GRID):
        _params.pack(
            q,
            k,
            pointer(call.v),
            pointer(call.out),
            pointer(call.A_log) if plan.raw else 0,
            pointer(call.dt_bias) if plan.raw else 0,
            pointer(a),
            pointer(b),
            initial,
            initial_slots,
            final,
            final_slots,
            0 if call.cu_seqlens is None else pointer(call.cu_seqlens),
            call.scale,
            call.softplus_beta,
            call.softplus_threshold,
            first,
            *plan.fixed,
        )
        grid = (launch.blocks, spec.H, min(spec.N - first, _LARGEST_GRID))
        launch.kernel.launch(grid, launch.block, _params, stream)


def specializations(spec: Spec, multiprocessors: int, shared: int) -> list[tuple[str, dict[str, _cuda_loader.Define]]]:
    """List the kernels that aligned calls with this `Spec` use, in place where it allows that."""
    states = ("initial_state", "final_state")
    one_array = all(
        spec.initial_dtype and values.get(states[0]) == values.get(states[1])
        for values in (spec.dtypes, spec.shapes, spec.strides)
    )
    return [_specialize(spec, pick_tile(spec, multiprocessors), Variant(True, True, one_array))]


def _specialize(spec: Spec, tile: Tile, variant: Variant) -> tuple[str, dict[str, _cuda_loader.Define]]:
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
        "GDR_ONE_TOKEN": spec.T == 1 and not spec.varlen,
        "GDR_CU_SEQLENS": _index_bytes(spec, "cu_seqlens"),
        "GDR_INITIAL_SLOTS": _index_bytes(spec, "initial_slots"),
        "GDR_FINAL_SLOTS": 0 if variant.in_place else _index_bytes(spec, "final_slots"),
        "GDR_IN_PLACE": variant.in_place,
        "GDR_ALIGNED_TOKENS": variant.tokens_aligned
        and all(_whole_chunks(spec, name, chunk if spec.layout == "vk" else 4) for name in ("q", "k")),
        "GDR_ALIGNED_STATES": variant.states_aligned and all(_whole_chunks(spec, name, chunk) for name in states),
        "GDR_DENSE_STATES": all(spec.strides[name][2] == row for name in states),
        **tile.defines,
    }


def pick_tile(spec: Spec, multiprocessors: int) -> Tile:
    """Choose how many value columns a block owns: few where the batch is small, to use every multiprocessor."""
    pick = _pick_vk if spec.layout == "vk" else _pick_kv
    return pick(spec.K, spec.V, _chunk(spec), spec.N * spec.HV, multiprocessors)


def _pick_vk(K: int, V: int, chunk: int, heads: int, multiprocessors: int) -> Tile:
    lanes = min(16, _power_of_two(-(-K // chunk)))
    share = -(-K // (lanes * chunk)) * chunk  # elements of a row that a lane holds
    warps, warp_rows = 4, 32 // lanes
    rows = min(lanes, 1 << ((64 // share).bit_length() - 1))  # a power of two
    while rows > 1 and (
        warps * rows * warp_rows >= 2 * V or heads * -(-V // (warps * rows * warp_rows)) < 3 * multiprocessors
    ):
        rows //= 2
    held = (rows + 2) * share  # the state's elements, and k and q
    min_blocks = 4 if held > 48 else 6 if held > 32 else 8
    defines: dict[str, _cuda_loader.Define] = {"GDR_ROWS": rows, "GDR_WARPS": warps, "GDR_MIN_BLOCKS": min_blocks}
    return Tile(defines, 32 * warps, warps * rows * warp_rows)


def _pick_kv(K: int, V: int, chunk: int, heads: int, multiprocessors: int) -> Tile:
    warps = 8 if K <= 128 else 16
    held = -(-K // 32) * 32 * chunk // warps  # elements of the state that a thread holds, times 32 / lanes
    lanes = 32
    while lanes > warps and (
        held * lanes // 32 > 64 or lanes * chunk >= 2 * V or heads * -(-V // (lanes * chunk)) < multiprocessors
    ):
        lanes //= 2
    held = held * lanes // 32
    min_blocks = (2 if held > 32 else 3 if held > 16 else 4) * 8 // warps
    defines: dict[str, _cuda_loader.Define] = {"GDR_LANES": lanes, "GDR_WARPS": warps, "GDR_MIN_BLOCKS": min_blocks}
    return Tile(defines, 32 * warps, lanes * chunk)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunk(spec: Spec) -> int:
    """Elements of a state that move at once."""
    return 16 // SIZES[spec.initial_dtype or spec.final_dtype or "float32"]


def _index_bytes(spec: Spec, name: str) -> int:
    return {None: 0, "int32": 4, "int64": 8}[spec.dtypes.get(name)]


def _whole_chunks(spec: Spec, name: str, chunk: int) -> bool:
    """Whether rows are whole chunks, and aligned to 16 bytes wherever the array itself is."""
    strides, shape = spec.strides[name], spec.shapes[name]
    steps = [stride for stride, extent in zip(strides[:-1], shape[:-1]) if extent > 1]
    return shape[-1] % chunk == 0 and not any(step * SIZES[spec.dtypes[name]] % 16 for step in steps)


def _fixed(spec: Spec) -> tuple[int, ...]:
    """The fields of Params that a Spec fixes, in order."""
    a, b = ("a", "b") if spec.gates == "raw" else ("g", "beta")
    strides = [spec.strides[name][:3] for name in ("q", "k", "v", "out", a, b)]
    strides += [spec.strides.get(name, (0, 0, 0))[:3] for name in ("initial_state", "final_state")]
    return (
        *(step for steps in strides for step in steps),
        *(spec.strides.get(name, (0,))[0] for name in ("A_log", "dt_bias")),
        *(spec.shapes.get(name, (0,))[0] for name in ("initial_state", "final_state")),
        spec.T,
        spec.HV // spec.H,
        *(TYPES[spec.dtypes.get(name)] for name in ("A_log", "dt_bias", a, b)),
    )


@cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
