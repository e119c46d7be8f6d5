"""Launches the chunkwise rule on a CUDA device for float32 q, k and v: products of three on tensor cores.

Two kernels, as for 16 bits, with chunks of 32 tokens: cuda/include/gdr/chunk_f32.cuh says what differs.  Neither the
columns of a block nor how chunks are done in parts shows in the bits of a result, and what does, the splits of the
keys, follows from K and V alone: a sequence's bits never depend on the rest of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from gdr import _cuda_chunk_call, _cuda_loader
from gdr._cuda_chunk_call import CHUNK_F32 as CHUNK
from gdr._cuda_chunk_call import Part, align, count_chunks, definitions, fix
from gdr._cuda_fused_recurrent import LARGEST_GRID
from gdr._cuda_loader import Gpu
from gdr._inputs import Call
from gdr._spec import Spec

_TILES = CHUNK // 8  # of tokens
_HEAD_TILE = 5632  # bytes of T, P and factors of a chunk and value head


class Tile(NamedTuple):
    """How chunk_state_f32 divides a state: value columns of a block, splits of the keys, chunks in shared memory."""

    columns: int
    split: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, and a warp that brings chunks."""
        return 2 * self.columns * self.split + 32

    def shared(self, K: int) -> int:
        """Bytes of shared memory of a block: the struct Shared of chunk_state_f32.cu."""
        stage = 2 * _key_tile(K) + _HEAD_TILE + CHUNK * (self.columns + 4) * 4
        exchange = self.columns // 16 * self.split * 2 * (2 * _TILES - _TILES // self.split) * 512
        return self.stages * (stage + 16) + exchange


class Plan(_cuda_chunk_call.Plan):
    """What the calls with one signature share."""

    def __init__(self, call: Call, tile: Tile) -> None:
        super().__init__(call)
        spec, self.tile = self.spec, tile
        chunks = count_chunks(spec)
        per_chunk = spec.HV * _HEAD_TILE
        at_once = min(chunks, max(1, _cuda_chunk_call.MAX_WORKSPACE // per_chunk), LARGEST_GRID)
        # States between parts, those that one launch reads and those it writes.
        carried = 0 if at_once == chunks else spec.HV * align(spec.K, 64) * spec.V * 4
        tiles = at_once * per_chunk
        self.workspace = tiles + 2 * carried
        keys = 2 * max(_key_tile(spec.K), 2 * CHUNK * (CHUNK + 4) * 4)
        prepare_shared = keys + 2 * CHUNK * (CHUNK + 8) * 4 + 2 * CHUNK * 4 + 4 * CHUNK * 16
        blocks = spec.N * spec.HV * (spec.V // tile.columns)
        walk = (blocks, 1, 1), (tile.threads, 1, 1), tile.shared(spec.K)
        self.parts = []
        for part, first in enumerate(range(0, chunks, at_once)):
            last = min(first + at_once, chunks)
            prepare = (spec.H, last - first, 1), (128, 1, 1), prepare_shared
            states = tiles + part % 2 * carried, tiles + (part + 1) % 2 * carried
            self.parts.append(Part(first, last, *states, [prepare, walk] if spec.T else [walk]))
        fixed = fix(spec, spec.HV // spec.H, 0)
        self.aligned = fixed.aligned
        self.arguments = _cuda_loader.Arguments(_cuda_chunk_call.HEAD, _cuda_chunk_call.REST, fixed.values)

    def specialize(self, aligned: bool) -> list[_cuda_loader.Specialization]:
        """Without chunk_prepare_f32 where there are no tokens."""
        return specialize(self.spec, self.tile, aligned)[0 if self.spec.T else 1 :]

    def start(self, pointers: tuple[int, ...], scratch: int, stream: int) -> None:
        """Launch all kernels."""
        q, k, v = pointers[:3]
        aligned = not (q | k | v) & 15 and self.aligned
        kernels = self.kernels.get(aligned) or self.load(aligned)
        arguments, scalars = self.arguments, self.scalars
        for first, last, read, written, launches in self.parts:
            states = scratch + read, scratch + written
            arguments.pack_head(*pointers, 0, scratch, *states, 0, *scalars, first, last)
            for kernel, (grid, block, shared) in zip(kernels, launches):
                kernel.launch(grid, block, arguments, stream, shared)


def pick_tile(spec: Spec, gpu: Gpu) -> Tile | None:
    """Choose how to divide a call that chunks can do, or None where nothing fits into shared memory."""
    tiles = [
        tile
        for split in (4, 2)
        for columns in (32, 16)
        for stages in (3, 2)
        if spec.V % columns == 0 and (tile := Tile(columns, split, stages)).shared(spec.K) <= gpu.shared
    ]
    if not tiles:
        return None
    blocks = spec.N * spec.HV * spec.V
    # The fewest blocks that still use the device; if none do, the most.
    tiles = [tile for tile in tiles if tile.split == tiles[0].split]
    return next(
        (tile for tile in tiles if blocks // tile.columns >= 0.75 * gpu.multiprocessors),
        next(tile for tile in tiles if tile.columns == tiles[-1].columns),
    )


def specialize(spec: Spec, tile: Tile, aligned: bool) -> list[_cuda_loader.Specialization]:
    """Stems and definitions of a call's kernels, in order."""
    shared, state, none, gates = definitions(spec, aligned)
    return [
        ("chunk_prepare_f32", shared | none | gates),
        (
            "chunk_state_f32",
            shared | state | {"GDR_COLUMNS": tile.columns, "GDR_SPLIT": tile.split, "GDR_STAGES": tile.stages},
        ),
    ]


def _key_tile(K: int) -> int:
    return CHUNK * align(K, 64) * 4
