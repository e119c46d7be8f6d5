"""Launches the chunkwise rule on a CUDA device as one kernel, for batches whose sequences and heads fill it.

cuda/chunk_fused_sm90.cu says how.  It needs no workspace, and its blocks share nothing but operands: a sequence's bits
follow from the sequence alone.
"""

from __future__ import annotations

from gdr import _cuda_chunk_call, _cuda_loader, _cuda_tiles
from gdr._cuda_chunk_call import CHUNK, REST, align, count_chunks, definitions, fix
from gdr._inputs import Call
from gdr._spec import Spec

# The C struct TileParams of chunk_fused.cuh: maps of k, q, v and out, then Params.
HEAD = f"{4 * _cuda_tiles.BYTES}s {_cuda_chunk_call.HEAD}"
PARAMS = _cuda_loader.Params(HEAD + REST)

_STAGES, _SLOTS = 4, 2  # chunks in shared memory: K and Q; values, T and P
_LARGEST_STEP = 1 << 24  # elements from a token to the next: the bytes of 64 fit 32 bits


class Plan(_cuda_chunk_call.Plan):
    """What the calls with one signature share."""

    def __init__(self, call: Call, columns: int) -> None:
        super().__init__(call)
        spec, self.columns = self.spec, columns
        self.grid, self.block = (spec.N * spec.HV * (spec.V // columns), 1, 1), (2 * columns + 256, 1, 1)
        self.shared = _shared(spec.K, columns)
        fixed = fix(spec, spec.HV // spec.H, 0)
        self.arguments = _cuda_loader.Arguments(HEAD, REST, fixed.values)
        self.tail = 0, 0, 0, 0, 0, *self.scalars, 0, count_chunks(spec)  # of the arguments' head
        self.mappable = (
            fixed.aligned
            and _cuda_tiles.available()
            and all(_cuda_tiles.can_map(spec.shapes[name], spec.strides[name]) for name in ("q", "k", "v", "out"))
        )
        keys, values = (CHUNK // _cluster(spec, columns), align(spec.K, 64)), (CHUNK, 64)
        boxes = {"k": (keys, False), "q": (keys, False), "v": (values, True), "out": (values, True)}
        self.maps = [_cuda_tiles.TileMaps(spec.shapes[name], spec.strides[name], *box) for name, box in boxes.items()]
        self.encoded: tuple[tuple[int, ...], bytes] = (), b""

    def specialize(self, aligned: bool) -> list[_cuda_loader.Specialization]:
        """The one kernel."""
        return [specialize(self.spec, self.columns, aligned, self.wide)]

    def start(self, pointers: tuple[int, ...], scratch: int, stream: int) -> None:
        """Launch the kernel."""
        q, k, v, out = pointers[:4]
        aligned = self.mappable and not (q | k | v | out) & 15
        maps = b""
        if aligned:
            addresses, maps = self.encoded
            if addresses != pointers[:4]:
                maps = b"".join(tiles.encode(address) for tiles, address in zip(self.maps, (k, q, v, out)))
                self.encoded = pointers[:4], maps
        (kernel,) = self.kernels.get(aligned) or self.load(aligned)
        self.arguments.pack_head(maps, *pointers, *self.tail)
        kernel.launch(self.grid, self.block, self.arguments, stream, self.shared)


def takes(spec: Spec) -> bool:
    """Whether the kernel can run a call; its sizes and dtypes aside."""
    gates = ("a", "b") if spec.gates == "raw" else ("g", "beta")
    return all(0 <= spec.strides[name][1] < _LARGEST_STEP for name in ("q", "k", "v", "out", *gates))


def specialize(spec: Spec, columns: int, aligned: bool, wide: bool = False) -> _cuda_loader.Specialization:
    """Stem and definitions of a call's kernel."""
    shared, state, _, gates = definitions(spec, aligned, wide)
    return "chunk_fused_sm90", shared | state | gates | {
        "GDR_COLUMNS": columns,
        "GDR_CLUSTER": _cluster(spec, columns),
    }


def _cluster(spec: Spec, columns: int) -> int:
    """Blocks of a cluster: two that have the same K and Q, unless one would be left over."""
    return 1 if spec.HV // spec.H * (spec.V // columns) % 2 else 2


def _shared(K: int, columns: int) -> int:
    """Bytes of shared memory of a block: the struct Shared of chunk_fused.cuh."""
    keys, values = 2 * CHUNK * align(K, 64) * 2, CHUNK * columns * 2
    decays = CHUNK * (24 + 3 * 4)
    triangle = 10 * 512 + 4 * 324 * 4
    shared = _STAGES * (keys + decays) + _SLOTS * (values + 16 * 1024) + 2 * triangle
    return shared + (5 * _STAGES + 4 * _SLOTS + 1) * 8
