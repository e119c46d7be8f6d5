"""What the launchers of the chunkwise rule share: plans, arguments and definitions of kernels, chunks, and scratch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from gdr import _arrays, _cuda_loader
from gdr._cuda_fused_recurrent import SIZES, TYPES, Pointers
from gdr._inputs import Call, Checked, describe_call, refuse_misaligned
from gdr._spec import Form, Spec

CHUNK, CHUNK_F32 = 64, 32  # tokens
# Scratch of one call; a call that would need more does its chunks in parts, one after another.
MAX_WORKSPACE = 512 << 20

# The C struct Params of chunk.cuh: pointers; scalars and the chunks of this launch; then what a Spec fixes.
HEAD, REST = "18Q 3f2i", " 18q 6q 2q 2q q 5i 4i 3i"
PARAMS = _cuda_loader.Params(HEAD + REST)

_captured: list[Any] = []  # workspaces of CUDA graphs, which live as long as the process


def chunk_size(spec: Spec) -> int:
    """Tokens of a chunk."""
    return CHUNK_F32 if spec.dtype == "float32" else CHUNK


def count_chunks(spec: Spec) -> int:
    """Chunk numbers of a call, known without reading cu_seqlens: packed sequences may leave one out each."""
    chunk = chunk_size(spec)
    if spec.varlen:
        return spec.T // chunk + spec.N
    return max(1, spec.N * -(-spec.T // chunk))


def definitions(spec: Spec, aligned: bool, wide: bool = False) -> tuple[dict[str, _cuda_loader.Define], ...]:
    """Definitions of all kernels of a call; of those that have states, and of those that have none; of gates."""
    shared: dict[str, _cuda_loader.Define] = {
        "GDR_QKV": TYPES[spec.dtype],
        "GDR_K": spec.K,
        "GDR_VARLEN": spec.varlen,
        "GDR_WIDE": wide,
        "GDR_ALIGNED": aligned,
    }
    state: dict[str, _cuda_loader.Define] = {
        "GDR_INITIAL": TYPES[spec.initial_dtype],
        "GDR_FINAL": TYPES[spec.final_dtype],
        "GDR_V": spec.V,
        "GDR_VK": spec.layout == "vk",
        "GDR_RAW_GATES": False,
        "GDR_L2NORM": False,
    }
    none: dict[str, _cuda_loader.Define] = {"GDR_INITIAL": -1, "GDR_FINAL": -1, "GDR_V": 16, "GDR_VK": False}
    gates: dict[str, _cuda_loader.Define] = {"GDR_RAW_GATES": spec.gates == "raw", "GDR_L2NORM": spec.l2norm}
    return shared, state, none, gates


class Fixed(NamedTuple):
    """What a `Spec` fixes of a launch."""

    aligned: bool  # whether q, k, v and out are, wherever their first elements are
    values: tuple[int, ...]  # the fields of Params that a Spec fixes, in order


def fix(spec: Spec, heads_per_block: int, segment: int) -> Fixed:
    """Find what the launches with a `Spec` have in common."""
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
        segment,
        *(TYPES[spec.dtypes.get(name)] for name in ("A_log", "dt_bias", a, b)),
        *(spec.dtypes.get(name) == "int64" for name in ("initial_slots", "final_slots", "cu_seqlens")),
    )
    together = 16 // SIZES[spec.dtype]
    aligned = spec.K % together == 0 and all(
        not step % together
        for name in ("q", "k", "v", "out")
        for step, extent in zip(spec.strides[name][:3], spec.shapes[name])
        if extent > 1
    )
    return Fixed(aligned, values)


class Plan(ABC):
    """What the calls with one signature share.

    Attributes
    ----------
    workspace : int
        Bytes of scratch that a call needs.
    """

    workspace = 0

    def __init__(self, call: Call) -> None:
        self.spec, self.wide = call.spec, call.wide_range
        self.pointers = Pointers(call)
        self.scalars = call.scale, call.softplus_beta, call.softplus_threshold  # the signature has them in it
        self.kernels: dict[bool, list[_cuda_loader.Kernel]] = {}

    @abstractmethod
    def specialize(self, aligned: bool) -> list[_cuda_loader.Specialization]:
        """Stems and definitions of the kernels that `start` launches, in order."""

    def load(self, aligned: bool) -> list[_cuda_loader.Kernel]:
        """Compile the kernels, once."""
        kernels = [_cuda_loader.load(*job, int(self.spec.device)) for job in self.specialize(aligned)]
        self.kernels[aligned] = kernels
        return kernels

    @abstractmethod
    def start(self, pointers: tuple[int, ...], scratch: int, stream: int) -> None:
        """Launch all kernels; `scratch` is the workspace's address."""

    def run(self, call: Call) -> None:
        """Fill ``call.out`` and ``call.final_state``."""
        pointers = self.pointers(call)
        if reduce(or_, pointers) & 7:
            refuse_misaligned(call)
        stream = call.stream
        workspace = self._borrow(call.workspace, call.library, stream)  # a reference until all is launched
        self.start(pointers, 0 if workspace is None else _arrays.pointer(workspace), stream)

    def launcher(self, checked: Checked, form: Form) -> Callable[[tuple[Any, ...]], tuple[Any, Any]]:
        """What runs the calls that are like one that ran, from their operands in the order of `OPERANDS`."""
        spec, library, device = self.spec, checked.head[1], int(self.spec.device)
        pick, pointers_of, stream_of = self.pointers.pick, self.pointers.of, library.stream
        empty, empty_like, pointer = library.empty, library.empty_like, _arrays.pointer
        state_shape = spec.shapes["final_state"] if checked.allocates_state else None

        def launch(operands: tuple[Any, ...]) -> tuple[Any, Any]:
            out, state = operands[3], None
            if out is None:
                out = empty_like(operands[2])
            if state_shape:
                state = empty(state_shape, spec.final_dtype, device)
            pointers = pointers_of(pick((*operands[:3], out, *operands[4:12], state, *operands[13:])))
            if reduce(or_, pointers) & 7:
                refuse_misaligned(describe_call(checked, form, operands))
            stream = stream_of(device)
            workspace = self._borrow(None, library, stream)
            self.start(pointers, 0 if workspace is None else pointer(workspace), stream)
            return out, state

        return launch

    def _borrow(self, lent: Any, library: Any, stream: int) -> Any:
        """Scratch of a call, lent by the caller or allocated; None where it needs none."""
        if lent is not None:
            if lent.shape[0] < self.workspace:
                raise ValueError(f"workspace: expected at least {self.workspace} bytes, got {lent.shape[0]}")
            if _arrays.pointer(lent) % 128:
                raise ValueError("workspace: expected an address that is a multiple of 128")
            return lent
        if not self.workspace:
            return None
        workspace = library.empty((self.workspace,), "uint8", self.spec.device)
        if library.name != "torch" and _capturing(stream):
            _captured.append(workspace)
        return workspace


class Part(NamedTuple):
    """Chunks of a call that are done at once."""

    first: int
    last: int
    read: int  # where in the workspace are the states before them
    written: int  # and those after them
    launches: list[tuple[tuple[int, int, int], tuple[int, int, int], int]]  # grid, block, shared memory


def align(n: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-n // to) * to


def _capturing(stream: int) -> bool:
    import cupy

    return bool(cupy.cuda.runtime.streamIsCapturing(stream))
