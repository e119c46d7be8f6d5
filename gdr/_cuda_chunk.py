"""Launches the chunkwise rule on a CUDA device: a kernel for what belongs to each chunk alone, one that walks them.

Where few states leave the device idle, long sequences are cut into segments that are walked at the same time, once two
more kernels have found the states between them; cuda/include/gdr/chunk.cuh says how.  Where states take about half of
the device, both kernels run at the same time on parts of it.  Where the states fill half of the device or more,
_cuda_chunk_fused may launch one kernel that does it all.

How a call is cut up follows from shapes, dtypes and the device, never from data.  What the kernels do not take runs on
the fused recurrence, which gives the same answer: V that is no multiple of 16; devices before compute capability 8.0;
and tiles that do not fit a block's shared memory (K above 128 needs 176 KiB).  Those of float32 q, k and v are launched
by _cuda_chunk_f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

from gdr import _cuda_chunk_call, _cuda_chunk_f32, _cuda_chunk_fused, _cuda_fused_recurrent, _cuda_loader
from gdr._backends import CHUNK_FROM
from gdr._cuda_chunk_call import CHUNK, Part, align, count_chunks, definitions, fix
from gdr._cuda_loader import Gpu, describe_gpu
from gdr._inputs import Call, Checked
from gdr._spec import Form, Spec

_STEMS = ("chunk_prepare", "chunk_state", "chunk_state_sm90", "chunk_combine", "chunk_prepare_f32", "chunk_state_f32")
PARAMS = dict.fromkeys(_STEMS, _cuda_chunk_call.PARAMS) | {"chunk_fused_sm90": _cuda_chunk_fused.PARAMS}

# Beside the walk: groups of a block of chunk_prepare, and the most sequences that it can order; bytes of the structs
# PieceOrder and PieceFlags of chunk_beside.cuh.
_GROUPS, _MOST_BESIDE = 3, 32
_ORDER, _FLAGS = _MOST_BESIDE * (3 * 8 + 4 * 4) + 8, 8
# So many states take half as long by chunks as CHUNK_FROM tokens of one sequence take token by token, on an H100.
_OTHERS = 80
_HEAD_TILE = 2 * 10 * 512 + 3 * CHUNK * 4  # bytes of T, P and the decays of a chunk and value head


class Tile(NamedTuple):
    """How chunk_state divides a state: value columns of a block, splits of the keys, chunks in shared memory."""

    columns: int
    split: int
    stages: int
    warpgroups: bool = False  # chunk_state_sm90
    compose: bool = False  # the walk that finds the maps of segments

    @property
    def threads(self) -> int:
        """Threads of a block."""
        moving = 0 if not self.warpgroups else 128 if self.columns == 128 else 96  # tiles in, outputs out
        return 2 * self.columns * self.split + moving

    def shared(self, K: int) -> int:
        """Bytes of shared memory of a block: the struct Shared of chunk_state.cu."""
        if self.warpgroups:
            tiles = 1 if self.compose else 2
            stage = tiles * (_key_tile(K) + 16 * 512) + 3 * CHUNK * 4 + CHUNK * (self.columns * 2 + 16)
            outputs = 16 if self.compose else self.columns // 8 * (CHUNK * 16 + 16)
            return self.stages * (align(stage, 128) + 16) + outputs + 16
        stage = align(2 * _key_tile(K) + _HEAD_TILE + CHUNK * self.columns * 2, 128)
        exchange = self.threads // 32 * 2 * 6144 if self.split == 2 else 0
        return align(self.stages * (stage + 8), 128) + exchange


class Cut(NamedTuple):
    """How a call is divided."""

    tile: Tile
    segment: int = 0  # chunks of a segment; 0 for sequences as they are
    map_columns: int = 0  # of a block of the walk that finds the maps of segments
    fused: bool = False  # one kernel does all: chunk_fused_sm90
    beside: int = 0  # blocks of chunk_prepare that run beside the walk; 0 where it runs ahead

    @property
    def compose(self) -> Tile:
        """How the walk that finds the maps of segments divides them."""
        return self.tile._replace(columns=self.map_columns, compose=True)


def why(spec: Spec, cut: Cut, gpu: Gpu) -> str:
    """Say what the kernels of a call are, and why those."""
    blocks, all_of = spec.N * spec.HV * (spec.V // cut.tile.columns), gpu.multiprocessors
    if cut.fused:
        return f"one kernel, whose {blocks} blocks use the {all_of} processors well"
    if cut.segment:
        return (
            f"in segments of {cut.segment} chunks, as {blocks} blocks for whole sequences leave most of {all_of} idle"
        )
    if cut.beside:
        return f"{cut.beside} blocks prepare chunks beside the {blocks} that walk, on {all_of} processors"
    return f"a kernel that prepares all chunks, then {blocks} blocks that walk, on {all_of} processors"


class Plan(_cuda_chunk_call.Plan):
    """What the calls with one signature share."""

    def __init__(self, call: Call, cut: Cut) -> None:
        super().__init__(call)
        spec, self.cut = self.spec, cut
        gpu = describe_gpu(int(spec.device))
        chunks, keys = count_chunks(spec), align(spec.K, 64)
        per_chunk = _tile_bytes(spec) + (spec.HV * _FLAGS if cut.beside else 0)
        map_bytes = spec.HV * (spec.V + keys) * keys * 4
        if cut.segment:
            per_chunk += -(-map_bytes // cut.segment)
        at_once = max(1, _cuda_chunk_call.MAX_WORKSPACE // per_chunk)
        if cut.segment:  # no segment lies on both sides of a part's end
            at_once = max(1, at_once // cut.segment) * cut.segment
        at_once = min(chunks, at_once)
        group = spec.HV // spec.H
        heads = min(group, 4)  # of a block of chunk_prepare
        while heads > 1 and at_once * spec.H * -(-group // heads) < 0.75 * gpu.multiprocessors:
            heads = -(-heads // 2)
        prepare_parts = -(-group // heads)
        # The workspace: tiles of keys, of value heads, flags, maps of segments, and states between parts, those that
        # one launch reads and those it writes.
        rows = spec.N + (-(-at_once // cut.segment) if cut.segment else 0)
        self.head_tiles = at_once * spec.H * 2 * _key_tile(spec.K)
        self.maps = at_once * _tile_bytes(spec)
        if cut.beside:
            self.maps += align(_FLAGS * at_once * spec.H * prepare_parts, 128)
        states = self.maps + (rows * map_bytes if cut.segment else 0)
        carried = 0 if at_once == chunks else spec.HV * keys * spec.V * 4
        self.workspace = states + 2 * carried

        tile, compose, shared = cut.tile, cut.compose, _prepare_shared(spec.K)
        walks = [((rows * spec.HV * (spec.V // tile.columns), 1, 1), (tile.threads, 1, 1), tile.shared(spec.K))]
        if cut.segment:
            blocks = rows * spec.HV * ((spec.V + keys) // compose.columns)
            walks[:0] = [
                ((blocks, 1, 1), (compose.threads, 1, 1), compose.shared(spec.K)),
                ((spec.N * spec.HV * (spec.V // 8), 1, 1), (keys * 2, 1, 1), 0),
            ]
        self.parts = []
        for part, first in enumerate(range(0, chunks, at_once)):
            last = min(first + at_once, chunks)
            prepare = (spec.H, last - first, prepare_parts), (128, 1, 1), shared
            if cut.beside:
                prepare = (cut.beside, 1, 1), (_GROUPS * 128, 1, 1), _GROUPS * shared + _ORDER
            ends = states + part % 2 * carried, states + (part + 1) % 2 * carried
            self.parts.append(Part(first, last, *ends, [prepare, *walks] if spec.T else walks))
        fixed = fix(spec, heads, cut.segment)
        self.aligned = fixed.aligned
        self.arguments = _cuda_loader.Arguments(_cuda_chunk_call.HEAD, _cuda_chunk_call.REST, fixed.values)

    def specialize(self, aligned: bool) -> list[_cuda_loader.Specialization]:
        """Without chunk_prepare where there are no tokens."""
        return _specialize(self.spec, self.cut, aligned, self.wide)[0 if self.spec.T else 1 :]

    def start(self, pointers: tuple[int, ...], scratch: int, stream: int) -> None:
        """Launch all kernels."""
        q, k, v, out = pointers[:4]
        aligned = not (q | k | v | out) & 15 and self.aligned
        kernels = self.kernels.get(aligned) or self.load(aligned)
        arguments, scalars = self.arguments, self.scalars
        head_tiles, maps = scratch + self.head_tiles, scratch + self.maps
        for first, last, read, written, launches in self.parts:
            states = scratch + read, scratch + written
            arguments.pack_head(*pointers, scratch, head_tiles, *states, maps, *scalars, first, last)
            for kernel, (grid, block, shared) in zip(kernels, launches):
                kernel.launch(grid, block, arguments, stream, shared)


def run(call: Call) -> None:
    """Fill ``call.out`` and ``call.final_state``."""
    plans = call.spec.plan
    if "chunk" not in plans:
        plans["chunk"] = make_plan(call)
    plan = plans["chunk"]
    if plan is None:
        _cuda_fused_recurrent.run(call)
    else:
        plan.run(call)


def launcher(checked: Checked, form: Form) -> Callable[[tuple[Any, ...]], tuple[Any, Any]]:
    """What runs the calls that are like one that ran, from their operands in the order of `OPERANDS`."""
    plan = checked.spec.plan["chunk"]
    return (_cuda_fused_recurrent if plan is None else plan).launcher(checked, form)


def make_plan(call: Call) -> _cuda_chunk_call.Plan | None:
    """Plan a call; None where the fused recurrence runs instead."""
    chosen = choose(call.spec, describe_gpu(int(call.spec.device)), call.batch_invariant)
    if isinstance(chosen, Cut):
        return _cuda_chunk_fused.Plan(call, chosen.tile.columns) if chosen.fused else Plan(call, chosen)
    return None if isinstance(chosen, str) else _cuda_chunk_f32.Plan(call, chosen)


def choose(spec: Spec, gpu: Gpu, batch_invariant: bool) -> Cut | _cuda_chunk_f32.Tile | str:
    """Choose how to divide a call, or say why the fused recurrence runs instead."""
    if gpu.capability < 80:
        return f"chunks need compute capability 8.0, and this GPU has {gpu.capability / 10}"
    if spec.V % 16:
        return f"chunks need V to be a multiple of 16, and it is {spec.V}"
    if not spec.N * spec.HV:
        return "there are no states"
    # The two forms round differently, and the mean length is the batch's. Chunks of float32 take longer, even more so
    # where states take three quarters of the processors.
    states, fewest = spec.N * spec.HV, CHUNK_FROM["cuda"]
    if spec.dtype == "float32":
        fewest = fewest * 3 // (2 if 0.75 * gpu.multiprocessors > states else 1)
    if fewest * spec.N > spec.B * spec.T and not batch_invariant:
        # One of the packed sequences may be long. Short ones take up to 1.8 times as long by chunks, a long one among
        # them up to 14 times as long token by token: what counts is how long the others take.
        longest = spec.T - spec.N + 1 if spec.varlen else spec.T
        if longest <= max(fewest, states * fewest // _OTHERS):
            return f"sequences of fewer than {fewest} tokens are done sooner so"
    chosen = _cuda_chunk_f32.pick_tile(spec, gpu) if spec.dtype == "float32" else pick_cut(spec, batch_invariant, gpu)
    return chosen or f"chunks of K={spec.K} need more shared memory than a block of this GPU has"


def scratch(call: Call) -> int:
    """Bytes of scratch that a call needs."""
    plan = make_plan(call)
    return 0 if plan is None else plan.workspace


def pick_cut(spec: Spec, batch_invariant: bool, gpu: Gpu) -> Cut | None:
    """Choose how to divide a call that chunks can do, or None where nothing fits into shared memory.

    Columns never show in the bits of a result; splits of keys, segments and whether one kernel does all do, so
    `batch_invariant` fixes them.
    """
    if gpu.capability == 90 and spec.K <= 128 and spec.V % 64 == 0:
        cuts = _cuts_by_warpgroups(spec, batch_invariant, gpu)
        return min(cuts, key=lambda cut: _estimate(spec, cut, gpu))
    tiles = [
        tile
        for columns in (128, 64, 32, 16)
        for split in (2, 1)
        for stages in (3, 2)
        if spec.V % columns == 0 and _fits(tile := Tile(columns, split, stages), spec.K, batch_invariant, gpu)
    ]
    if not tiles:
        return None
    if batch_invariant:
        most = max(tile.split for tile in tiles)
        tiles = [tile for tile in tiles if tile.split == most]
    states = spec.N * spec.HV
    # The fewest blocks that still use the device; if none do, the most.
    enough = [tile for tile in tiles if states * (spec.V // tile.columns) >= 0.75 * gpu.multiprocessors]
    return Cut(enough[0] if enough else next(tile for tile in tiles if tile.columns == tiles[-1].columns))


def _fits(tile: Tile, K: int, batch_invariant: bool, gpu: Gpu) -> bool:
    if tile.shared(K) > gpu.shared:
        return False
    if K > 128:  # registers
        return tile.split == 2 and tile.columns <= 64
    if batch_invariant:  # whatever the batch, as the splits show in the bits
        return tile.split == 1 or tile.columns <= 64
    return tile.split == (2 if tile.columns <= 32 else 1) or gpu.shared < 128 << 10


def _cuts_by_warpgroups(spec: Spec, batch_invariant: bool, gpu: Gpu) -> Iterator[Cut]:
    chunks = count_chunks(spec)
    widest = 64 if spec.V % 128 else 128
    for columns in (64, 128)[: widest // 64]:
        tile = Tile(columns, 1, 3, warpgroups=True)
        yield Cut(tile)
        # With fewer blocks the one kernel would leave a long sequence to a few of them.
        filled = spec.N * spec.HV * (spec.V // columns) >= 0.45 * gpu.multiprocessors
        if filled and not batch_invariant and _cuda_chunk_fused.takes(spec):
            yield Cut(tile, fused=True)
        beside = _blocks_beside(spec, columns, gpu)
        if beside:
            yield Cut(tile, beside=beside)
        if batch_invariant:
            continue
        map_columns = 64 if (spec.V + align(spec.K, 64)) % widest else widest
        at_once = min(chunks, _cuda_chunk_call.MAX_WORKSPACE // _tile_bytes(spec))
        for count in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128):
            segment = -(-at_once // (count * spec.N))
            if segment >= 4:
                yield Cut(tile, segment, map_columns)


# Measured on an H100, by columns: microseconds a chunk of walks that few blocks do, and of composing ones; bytes a
# microsecond of walks on all processors.
_WALK_LATENCY, _COMPOSE_LATENCY, _BANDWIDTH = {64: 0.95, 128: 1.5}, {64: 0.8, 128: 1.0}, {64: 2.5e6, 128: 2.6e6}
# Bytes that chunk_prepare moves in a microsecond.
_PREPARE_BANDWIDTH = 2.4e6


# The same of the one kernel, where two blocks share a head's work and where not: microseconds of a chunk, and of a
# block besides; by columns, how much of a round of blocks the last one adds. By how much the longest of two packed
# sequences is longer than their mean.
_FUSED_LATENCY, _FUSED_START = {True: 1.62, False: 2.58}, {True: 8, False: 11.5}
_FUSED_REST, _UNEVEN = {64: 0.23, 128: 0.45}, 0.4


# Of both beside each other: microseconds of a call besides its chunks, of a chunk's walk by blocks of 64 columns, and
# of what a group of chunk_prepare does at a time, besides and for each of its value heads; bytes a microsecond.
_BESIDE_START, _BESIDE_LATENCY, _PIECE, _PIECE_HEAD, _BESIDE_BANDWIDTH = 18, 1.02, 8, 1.55, 2.15e6


def _estimate(spec: Spec, cut: Cut, gpu: Gpu) -> float:
    """Microseconds of a call, as if all sequences were of one length; packed ones somewhat uneven."""
    if cut.fused:
        return _estimate_fused(spec, cut.tile.columns, gpu)
    chunks = -(-count_chunks(spec) // spec.N)
    if cut.beside:
        prepared = count_chunks(spec) * _prepare_time(spec) / cut.beside
        return _BESIDE_START + max(chunks * _time_beside(spec), prepared)
    steps, without_map = cut.segment or chunks, float(spec.N)  # the last segment of each sequence
    segments = without_map * (-(-chunks // cut.segment) if cut.segment else 1)
    if cut.segment and spec.varlen and spec.N > 1:
        # Packed ones begin and end within segments. Counted by their chunks, the last is half of one.
        segments, without_map = count_chunks(spec) / cut.segment, spec.N / 2
    key_tile = _key_tile(spec.K) / (spec.HV // spec.H)
    values = 2 * CHUNK * spec.V

    def walk(segments: float, all_columns: int, columns: int, latency: float, bytes_a_chunk: float) -> float:
        if spec.N > 1 and columns == 128:
            latency *= 1.1  # with few blocks a sequence, one longer than the others takes longer
        blocks = segments * spec.HV * (all_columns // columns)
        waves = ceil(blocks / gpu.multiprocessors)
        heads = min(blocks, gpu.multiprocessors) * columns / all_columns
        return 6.5 + waves * steps * max(latency, heads * bytes_a_chunk / _BANDWIDTH[columns])

    prepared = 4 * CHUNK * spec.K * spec.H + 2 * _key_tile(spec.K) * spec.H + _HEAD_TILE * spec.HV
    total = 1 + count_chunks(spec) * prepared / _PREPARE_BANDWIDTH
    columns = cut.tile.columns
    total += walk(segments, spec.V, columns, _WALK_LATENCY[columns], 2 * key_tile + _HEAD_TILE + 2 * values)
    if cut.segment:
        columns = cut.map_columns
        all_columns, bytes_a_chunk = spec.V + align(spec.K, 64), key_tile + _HEAD_TILE / 2 + values
        total += walk(segments - without_map, all_columns, columns, _COMPOSE_LATENCY[columns], bytes_a_chunk)
        total += 1.75 * segments / spec.N
    return total


def _estimate_fused(spec: Spec, columns: int, gpu: Gpu) -> float:
    """Microseconds of a call of the one kernel."""
    shared = spec.V // columns % 2 == 0
    start, latency = _FUSED_START[shared], _FUSED_LATENCY[shared]
    waves = spec.N * spec.HV * (spec.V // columns) / gpu.multiprocessors
    chunks = count_chunks(spec) / spec.N
    if not spec.varlen or spec.N == 1:
        return ceil(waves) * (start + chunks * latency)
    chunks -= 0.5  # mean of what the lengths may be
    longest = start + chunks * (1 + _UNEVEN / (spec.N - 1)) * latency
    # It comes first, and blocks of the others where some have ended.
    return max(longest, (waves + _FUSED_REST[columns]) * (start + chunks * latency) if waves > 1 else 0)


def _blocks_beside(spec: Spec, columns: int, gpu: Gpu) -> int:
    """Blocks of chunk_prepare that keep ahead of a walk beside them; 0 where they cannot run so."""
    if columns != 64 or not (gpu.early and spec.T and spec.N <= _MOST_BESIDE):
        return 0
    wanted = ceil(1.03 * spec.N * _prepare_time(spec) / _time_beside(spec))
    return max(0, min(wanted, gpu.multiprocessors - spec.N * spec.HV * (spec.V // columns)))


def _time_beside(spec: Spec) -> float:
    """Microseconds of a chunk of all sequences where chunk_prepare keeps ahead of the walk."""
    tokens = 4 * CHUNK * (spec.K * spec.H + spec.V * spec.HV)
    moved = tokens + 2 * _key_tile(spec.K) * spec.H + _HEAD_TILE * spec.HV  # tiles are read from L2
    return max(_BESIDE_LATENCY, spec.N * moved / _BESIDE_BANDWIDTH)


def _prepare_time(spec: Spec) -> float:
    """Microseconds of a chunk on one processor, in chunk_prepare beside a walk."""
    group = spec.HV // spec.H
    return spec.H * (-(-group // 4) * _PIECE + group * _PIECE_HEAD) / _GROUPS


def specializations(
    spec: Spec, gpu: Gpu, batch_invariant: bool = False, wide: bool = False
) -> list[_cuda_loader.Specialization]:
    """List the kernels that aligned calls with this `Spec` use on a GPU."""
    chosen = choose(spec, gpu, batch_invariant)
    if isinstance(chosen, str):
        return _cuda_fused_recurrent.specializations(spec, gpu)
    if isinstance(chosen, Cut):
        return _specialize(spec, chosen, True, wide)
    return _cuda_chunk_f32.specialize(spec, chosen, True)


def _specialize(spec: Spec, cut: Cut, aligned: bool, wide: bool = False) -> list[_cuda_loader.Specialization]:
    """Stems and definitions of a call's kernels, in order."""
    if cut.fused:
        return [_cuda_chunk_fused.specialize(spec, cut.tile.columns, aligned, wide)]
    shared, state, none, gates = definitions(spec, aligned, wide)

    def walk(tile: Tile) -> _cuda_loader.Specialization:
        defines = shared | state | {"GDR_COLUMNS": tile.columns, "GDR_STAGES": tile.stages}
        if tile.warpgroups:
            return "chunk_state_sm90", defines | {"GDR_COMPOSE": tile.compose}
        return "chunk_state", defines | {"GDR_SPLIT": tile.split}

    if cut.beside:
        shared |= {"GDR_BESIDE": True}
    kernels = [("chunk_prepare", shared | none | gates), walk(cut.tile)]
    if cut.segment:
        kernels[1:1] = [walk(cut.compose), ("chunk_combine", shared | none | gates | {"GDR_V": spec.V})]
    return kernels


def _key_tile(K: int) -> int:
    return CHUNK * align(K, 64) * 2


def _tile_bytes(spec: Spec) -> int:
    """Bytes that chunk_prepare leaves of a chunk."""
    return spec.H * 2 * _key_tile(spec.K) + spec.HV * _HEAD_TILE


def _prepare_shared(K: int) -> int:
    """Bytes of shared memory of a group of chunk_prepare: its struct Shared."""
    return max(2 * _key_tile(K), 2 * (10 * 512 + 4 * 324 * 4)) + 4 * CHUNK * 24
