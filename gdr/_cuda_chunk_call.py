"""What the launchers of the chunkwise rule share: its kernels' arguments and definitions, chunks, and scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

from gdr import _arrays, _cuda_loader
from gdr._cuda_fused_recurrent import SIZES, TYPES
from gdr._inputs import Call
from gdr._spec import Spec

CHUNK, CHUNK_F32 = 64, 32  # tokens
# Scratch of one call; a call that would need more does its chunks in parts, one after another.
MAX_WORKSPACE = 512 << 20

# The C struct Params of chunk.cuh: pointers; scalars and the chunks of this launch; then what a Spec fixes.
LAYOUT = "18Q 3f2i 18q 6q 2q 2q q 5i 4i 3i"
params = _cuda_loader.Params(LAYOUT)

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


def borrow_workspace(call: Call, size: int, stream: int) -> Any:
    """Scratch of a call, lent by the caller or allocated."""
    lent = call.workspace
    if lent is None:
        workspace = call.library.empty((size,), "uint8", call.spec.device)
        if call.library.name != "torch" and _capturing(stream):
            _captured.append(workspace)
        return workspace
    if lent.shape[0] < size:
        raise ValueError(f"workspace: expected at least {size} bytes, got {lent.shape[0]}")
    if _arrays.pointer(lent) % 128:
        raise ValueError("workspace: expected an address that is a multiple of 128")
    return lent


def align(n: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-n // to) * to


def _capturing(stream: int) -> bool:
    import cupy

    return bool(cupy.cuda.runtime.streamIsCapturing(stream))
