"""Launches the chunkwise rule on a CUDA device as one kernel, for batches whose sequences and heads fill it.

cuda/chunk_fused_sm90.cu says how.  It needs no workspace, and its blocks know nothing of each other: a sequence's bits
follow from the sequence alone.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from gdr import _cuda_loader
from gdr._cuda_chunk_call import CHUNK, align, count_chunks, definitions, fix, params
from gdr._cuda_fused_recurrent import Pointers
from gdr._inputs import Call, refuse_misaligned
from gdr._spec import Spec

_STAGES, _SLOTS = 4, 2  # chunks in shared memory: K and Q; values, T and P
_LARGEST_STEP = 1 << 24  # elements from a token to the next: the bytes of 64 fit 32 bits


class Plan:
    """What the calls with one signature share."""

    workspace = 0

    def __init__(self, call: Call, columns: int) -> None:
        spec = self.spec = call.spec
        self.columns, self.wide = columns, call.wide_range
        self.pointers = Pointers(call)
        self.blocks = spec.N * spec.HV * (spec.V // columns)
        self.threads, self.shared = 2 * columns + 256, _shared(spec.K, columns)
        self.chunks = count_chunks(spec)
        self.fixed = fix(spec, spec.HV // spec.H, 0)
        self.kernels: dict[bool, _cuda_loader.Kernel] = {}

    def load(self, aligned: bool) -> _cuda_loader.Kernel:
        """Compile the kernel, once."""
        stem, defines = specialize(self.spec, self.columns, aligned, self.wide)
        kernel = self.kernels[aligned] = _cuda_loader.load(stem, defines, int(self.spec.device))
        return kernel

    def run(self, call: Call) -> None:
        """Fill ``call.out`` and ``call.final_state``."""
        pointers = self.pointers(call)
        if reduce(or_, pointers) & 7:
            refuse_misaligned(call)
        q, k, v, out = pointers[:4]
        aligned = not (q | k | v | out) & 15 and self.fixed.aligned
        kernel = self.kernels.get(aligned) or self.load(aligned)
        scalars = call.scale, call.softplus_beta, call.softplus_threshold
        params.pack(*pointers, 0, 0, 0, 0, 0, *scalars, 0, self.chunks, *self.fixed.values)
        kernel.launch((self.blocks, 1, 1), (self.threads, 1, 1), params, call.stream, self.shared)


def takes(spec: Spec) -> bool:
    """Whether the kernel can run a call; its sizes and dtypes aside."""
    gates = ("a", "b") if spec.gates == "raw" else ("g", "beta")
    return all(0 <= spec.strides[name][1] < _LARGEST_STEP for name in ("q", "k", "v", "out", *gates))


def specialize(
    spec: Spec, columns: int, aligned: bool, wide: bool = False
) -> tuple[str, dict[str, _cuda_loader.Define]]:
    """Stem and definitions of a call's kernel."""
    shared, state, _, gates = definitions(spec, aligned, wide)
    return "chunk_fused_sm90", shared | state | gates | {"GDR_COLUMNS": columns}


def _shared(K: int, columns: int) -> int:
    """Bytes of shared memory of a block: the struct Shared of chunk_fused_sm90.cu."""
    keys, values = 2 * CHUNK * align(K, 64) * 2, CHUNK * (columns * 2 + 16)
    decays = CHUNK * (24 + 3 * 4)
    triangle = 10 * 512 + 4 * 324 * 4
    shared = _STAGES * (keys + decays) + _SLOTS * (values + 16 * 1024) + 2 * triangle
    return shared + 2 * (_STAGES + _SLOTS) * 8
