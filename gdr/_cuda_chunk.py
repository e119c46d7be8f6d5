"""Launches the chunkwise rule on a CUDA device: a kernel for what belongs to each chunk alone, one that walks them.

How a call is cut up follows from shapes, dtypes and the device, never from data.  What the kernels do not take runs on
the fused recurrence, which gives the same answer: float32 q, k and v; V that is no multiple of 16; devices before
compute capability 8.0; and tiles that do not fit a block's shared memory (K above 128 needs 176 KiB).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gdr import _arrays, _cuda_fused_recurrent, _cuda_loader
from gdr._cuda_fused_recurrent import TYPES
from gdr._cuda_loader import Gpu, describe_gpu
from gdr._inputs import Call
from gdr._spec import Spec

CHUNK = 64
# Scratch of one call; a call that would need more does its chunks in parts, one after another.
MAX_WORKSPACE = 512 << 20

# The C struct Params of chunk.cuh: pointers; scalars and the chunks of this launch; then what a Spec fixes.
_params = _cuda_loader.Params("17Q 3f2i 18q 6q 2q 2q q 4i 4i 3i")
PARAMS = {"chunk_prepare": _params, "chunk_state": _params, "chunk_state_sm90": _params}

_HEAD_TILE = 2 * 10 * 512 + 3 * CHUNK * 4  # bytes of T, P and the decays of a chunk and value head
_captured: list[Any] = []  # workspaces of CUDA graphs, which live as long as the process


class Tile(NamedTuple):
    """How chunk_state divides a state: value columns of a block, splits of the keys, chunks in shared memory."""

    columns: int
    split: int
    stages: int
    warpgroups: bool = False  # chunk_state_sm90

    @property
    def threads(self) -> int:
        """Threads of a block."""
        bringing = 0 if not self.warpgroups else 128 if self.columns == 128 else 32
        return 2 * self.columns * self.split + bringing

    def shared(self, K: int) -> int:
        """Bytes of shared memory of a block: the struct Shared of chunk_state.cu."""
        head_tile = 2 * 16 * 512 + 3 * CHUNK * 4 if self.warpgroups else _HEAD_TILE
        stage = _align(2 * _key_tile(K) + head_tile + CHUNK * self.columns * 2, 128)
        exchange = self.threads // 32 * 2 * 6144 if self.split == 2 else 0
        return _align(self.stages * (stage + (16 if self.warpgroups else 8)), 16) + exchange


class Plan:
    """What every call with one `Spec` shares."""

    def __init__(self, spec: Spec, tile: Tile) -> None:
        self.spec, self.tile = spec, tile
        self.raw = spec.gates == "raw"
        device = describe_gpu(int(spec.device))
        self.chunks = count_chunks(spec)
        self.key_tiles = spec.H * 2 * _key_tile(spec.K)
        per_chunk = self.key_tiles + spec.HV * _HEAD_TILE
        self.at_once = min(self.chunks, max(1, MAX_WORKSPACE // per_chunk))
        # Beside the tiles: states between parts, those that one launch reads and those that it writes.
        self.carried = 0 if self.at_once == self.chunks else spec.HV * _align(spec.K, 64) * spec.V * 4
        self.workspace = self.at_once * per_chunk + 2 * self.carried
        group = spec.HV // spec.H
        self.heads_per_block = min(group, 4)
        while self.heads_per_block > 1 and (
            self.at_once * spec.H * -(-group // self.heads_per_block) < 0.75 * device.multiprocessors
        ):
            self.heads_per_block = -(-self.heads_per_block // 2)
        self.prepare_parts = -(-group // self.heads_per_block)
        self.state_blocks = spec.N * spec.HV * (spec.V // tile.columns)
        self.state_block = (tile.threads, 1, 1)
        self.shared = tile.shared(spec.K)
        self.prepare_shared = max(2 * _key_tile(spec.K), 2 * (10 * 512 + 4 * 324 * 4)) + 4 * CHUNK * 24
        self.fixed = _fixed(spec, self.heads_per_block)
        self.kernels: dict[bool, tuple[_cuda_loader.Kernel, _cuda_loader.Kernel]] = {}

    def load(self, aligned: bool) -> tuple[_cuda_loader.Kernel, _cuda_loader.Kernel]:
        """Compile both kernels, once."""
        (prepare, state) = (
            _cuda_loader.load(stem, defines, int(self.spec.device))
            for stem, defines in _specialize(self.spec, self.tile, aligned)
        )
        self.kernels[aligned] = prepare, state
        return prepare, state


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    spec = call.spec
    key = "chunk, batch invariant" if call.batch_invariant else "chunk"
    plan = spec.plan.get(key)
    if plan is None:
        tile = pick_tile(spec, call.batch_invariant, describe_gpu(int(spec.device)))
        plan = spec.plan[key] = _cuda_fused_recurrent if tile is None else Plan(spec, tile)
    if isinstance(plan, Plan):
        _run(call, plan)
    else:
        _cuda_fused_recurrent.run(call)


def _run(call: Call, plan: Plan) -> None:
    spec = call.spec
    pointer = _arrays.pointer
    q, k, v, out = pointer(call.q), pointer(call.k), pointer(call.v), pointer(call.out)
    aligned = not (q | k | v) & 15 and not out & 3 and plan.fixed.aligned
    prepare, state = plan.kernels.get(aligned) or plan.load(aligned)
    stream = call.stream
    workspace = call.library.empty((plan.workspace,), "uint8", spec.device)
    if call.library.name != "torch" and _capturing(stream):
        _captured.append(workspace)
    tiles = pointer(workspace)
    head_tiles = tiles + plan.at_once * plan.key_tiles
    carried = tiles + plan.workspace - 2 * plan.carried
    a, b = (call.a, call.b) if plan.raw else (call.g, call.beta)
    pointers = (
        q,
        k,
        v,
        out,
        pointer(call.A_log) if plan.raw else 0,
        pointer(call.dt_bias) if plan.raw else 0,
        pointer(a),
        pointer(b),
        0 if call.initial_state is None else pointer(call.initial_state),
        0 if call.initial_slots is None else pointer(call.initial_slots),
        0 if call.final_state is None else pointer(call.final_state),
        0 if call.final_slots is None else pointer(call.final_slots),
        0 if call.cu_seqlens is None else pointer(call.cu_seqlens),
        tiles,
        head_tiles,
    )
    scalars = call.scale, call.softplus_beta, call.softplus_threshold
    for part, first in enumerate(range(0, plan.chunks, plan.at_once)):
        last = min(first + plan.at_once, plan.chunks)
        read, written = carried + part % 2 * plan.carried, carried + (part + 1) % 2 * plan.carried
        _params.pack(*pointers, read, written, *scalars, first, last, *plan.fixed.values)
        if spec.T:
            grid = spec.H, last - first, plan.prepare_parts
            prepare.launch(grid, (128, 1, 1), _params, stream, plan.prepare_shared)
        state.launch((plan.state_blocks, 1, 1), plan.state_block, _params, stream, plan.shared)


def count_chunks(spec: Spec) -> int:
    """Chunk numbers of a call, known without reading cu_seqlens: packed sequences may leave one out each."""
    if spec.varlen:
        return spec.T // CHUNK + spec.N
    return max(1, spec.N * -(-spec.T // CHUNK))


def pick_tile(spec: Spec, batch_invariant: bool, device: Gpu) -> Tile | None:
    """Choose how a block divides a state, or None where the fused recurrence runs instead.

    Columns never show in the bits of a result; the number of splits does, so `batch_invariant` fixes it.
    """
    if device.capability < 80 or spec.dtype == "float32" or spec.V % 16 or not spec.N * spec.HV:
        return None
    tiles = [
        tile
        for warpgroups in (True, False)
        for columns in (128, 64, 32, 16)
        for split in (2, 1)
        for stages in (3, 2)
        if spec.V % columns == 0
        and _fits(tile := Tile(columns, split, stages, warpgroups), spec.K, batch_invariant, device)
    ]
    if not tiles:
        return None
    states = spec.N * spec.HV
    # By warpgroups 64 columns cost as much as 16 do otherwise: for few blocks, the other way has more of them.
    if any(tile.warpgroups for tile in tiles):
        wide = batch_invariant or 3 * states * (spec.V // 64) >= device.multiprocessors
        tiles = [tile for tile in tiles if tile.warpgroups == wide]
    # The fewest blocks that still use the device; if none do, the most.
    enough = [tile for tile in tiles if states * (spec.V // tile.columns) >= 0.75 * device.multiprocessors]
    return enough[0] if enough else next(tile for tile in tiles if tile.columns == tiles[-1].columns)


def _fits(tile: Tile, K: int, batch_invariant: bool, device: Gpu) -> bool:
    if tile.shared(K) > device.shared:
        return False
    if tile.warpgroups:
        return device.capability == 90 and tile.split == 1 and tile.columns >= 64 and K <= 128
    if K > 128 or batch_invariant:  # registers; bits
        return tile.split == 2 and tile.columns <= 64
    return tile.split == (2 if tile.columns <= 32 else 1) or device.shared < 128 << 10


def specializations(spec: Spec, gpu: Gpu) -> list[tuple[str, dict[str, _cuda_loader.Define]]]:
    """List the kernels that aligned calls with this `Spec` use on a GPU."""
    tile = pick_tile(spec, False, gpu)
    if tile is None:
        return _cuda_fused_recurrent.specializations(spec, gpu)
    return _specialize(spec, tile, True)


def _specialize(spec: Spec, tile: Tile, aligned: bool) -> list[tuple[str, dict[str, _cuda_loader.Define]]]:
    """Stems and definitions of the two kernels."""
    shared: dict[str, _cuda_loader.Define] = {
        "GDR_QKV": TYPES[spec.dtype],
        "GDR_K": spec.K,
        "GDR_VARLEN": spec.varlen,
        "GDR_WIDE": False,
        "GDR_ALIGNED": aligned,
    }
    none: dict[str, _cuda_loader.Define] = {"GDR_INITIAL": -1, "GDR_FINAL": -1, "GDR_V": 16, "GDR_VK": False}
    return [
        ("chunk_prepare", shared | none | {"GDR_RAW_GATES": spec.gates == "raw", "GDR_L2NORM": spec.l2norm}),
        (
            "chunk_state_sm90" if tile.warpgroups else "chunk_state",
            shared
            | {
                "GDR_INITIAL": TYPES[spec.initial_dtype],
                "GDR_FINAL": TYPES[spec.final_dtype],
                "GDR_V": spec.V,
                "GDR_VK": spec.layout == "vk",
                "GDR_RAW_GATES": False,
                "GDR_L2NORM": False,
                "GDR_COLUMNS": tile.columns,
                "GDR_SPLIT": tile.split,
                "GDR_STAGES": tile.stages,
            },
        ),
    ]


class _Fixed(NamedTuple):
    aligned: bool  # whether q, k, v and out are, wherever their first elements are
    values: tuple[int, ...]  # the fields of Params that a Spec fixes, in order


def _fixed(spec: Spec, heads_per_block: int) -> _Fixed:
    a, b = ("a", "b") if spec.gates == "raw" else ("g", "beta")
    strides = [spec.strides[name][:3] for name in ("q", "k", "v", "out", a, b)]
    strides += [spec.strides.get(name, (0, 0, 0))[:3] for name in ("initial_state", "final_state")]
    values = (
        *(step for steps in strides for step in steps),
        *(spec.strides.get(name, (0,))[0] for name in ("A_log", "dt_bias")),
        *(spec.shapes.get(name, (spec.N,))[0] for name in ("initial_state", "final_state")),
        spec.T,
        spec.N,
        spec.H,
        spec.HV // spec.H,
        heads_per_block,
        *(TYPES[spec.dtypes.get(name)] for name in ("A_log", "dt_bias", a, b)),
        *(spec.dtypes.get(name) == "int64" for name in ("initial_slots", "final_slots", "cu_seqlens")),
    )
    aligned = spec.K % 8 == 0 and all(
        not step % (2 if name == "out" else 8)
        for name in ("q", "k", "v", "out")
        for step, extent in zip(spec.strides[name][:3], spec.shapes[name])
        if extent > 1
    )
    return _Fixed(aligned, values)


def _key_tile(K: int) -> int:
    return CHUNK * _align(K, 64) * 2


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def _capturing(stream: int) -> bool:
    import cupy

    return bool(cupy.cuda.runtime.streamIsCapturing(stream))
