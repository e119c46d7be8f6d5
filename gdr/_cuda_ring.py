"""Deferred write-back on a CUDA device: the pending tokens of a pool's slots, and the kernels that keep them.

How many tokens a slot has pending only the device knows: nothing on the host decides when they are folded into the
state, so every function here can be captured in a graph.  See ``cuda/include/gdr/ring.cuh`` for what an entry is.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from gdr import _arrays, _cuda_loader, _cuda_state
from gdr import _cuda_fused_recurrent as recurrent
from gdr._cuda_fused_recurrent import SIZES, TYPES
from gdr._inputs import Call, refuse_misaligned
from gdr._ring import MAX_DRAFTS
from gdr._spec import Spec

MAX_CAPACITY = 32

# The C struct RingParams of ring.cuh: Params, then RingArrays, which begins at a multiple of 8 bytes.
_ARRAYS = struct.Struct("8Q 5I")
_LAYOUT = recurrent.LAYOUT + "0Q" + _ARRAYS.format
_ARRAYS_AT = struct.calcsize(recurrent.LAYOUT + "0Q")
_COMMIT = "8Q q 5I"
PARAMS = {
    **dict.fromkeys(
        ("ring_step", "ring_step_mma", "ring_verify", "ring_verify_mma", "ring_fold"), _cuda_loader.Params(_LAYOUT)
    ),
    "ring_commit": _cuda_loader.Params(_COMMIT),
    "ring_reset": _cuda_loader.Params("4Q q 2I"),
}


class Ring:
    """The pending tokens and the drafts of every slot of a pool.

    Parameters
    ----------
    pool : cupy.ndarray
        The states, ``[num_slots, HV, K, V]`` or ``[num_slots, HV, V, K]``.
    layout : {"kv", "vk"}
    num_k_heads : int
    capacity : int
        Tokens after which a slot is folded; 0 for a pool whose steps write the states, which then has drafts only.
    stagger : bool
        Whether the first period of a slot has ``1 + slot % capacity`` tokens.

    Attributes
    ----------
    keys, updates : cupy.ndarray of the pool's dtype, [num_slots, H, entries, K] and [num_slots, HV, entries, V]
    gates, key_scales : cupy.ndarray of float32, [num_slots, 2, HV, entries] and [num_slots, 2, H, entries]
        Each entry's log decay, and what normalises its key; of the two sets a slot uses one at a time.
    fills : cupy.ndarray of uint32, [num_slots, 2]
        How many entries a slot has (see ring.cuh), and how many blocks of a launch have read that.
    arrivals : cupy.ndarray of uint32, [num_slots, H]
        How many blocks of a launch have read a key head's entries.
    parents : cupy.ndarray of int8, [num_slots, 16]
        The draft that each draft follows.
    """

    def __init__(self, pool: Any, layout: str, num_k_heads: int, capacity: int, stagger: bool) -> None:
        import cupy

        if capacity > MAX_CAPACITY:
            raise ValueError(f"ring: expected at most {MAX_CAPACITY} tokens on a CUDA device, got {capacity}")
        self.pool, self.layout, self.capacity, self.stagger = pool, layout, capacity, stagger
        num_slots, HV, *last = pool.shape
        K, V = last if layout == "kv" else last[::-1]
        self.H, self.HV, self.K, self.V = num_k_heads, HV, K, V
        self.entries = 16 if capacity <= 16 else 32
        self.device = int(_arrays.library_of(pool).meta(pool).device)  # the current one as well
        self.keys = cupy.zeros((num_slots, num_k_heads, self.entries, K), pool.dtype)
        self.updates = cupy.zeros((num_slots, HV, self.entries, V), pool.dtype)
        self.gates = cupy.zeros((num_slots, 2, HV, self.entries), "float32")
        self.key_scales = cupy.zeros((num_slots, 2, num_k_heads, self.entries), "float32")
        self.fills = cupy.zeros((num_slots, 2), "uint32")
        self.arrivals = cupy.zeros((num_slots, num_k_heads), "uint32")
        self.parents = cupy.zeros((num_slots, MAX_DRAFTS), "int8")
        entries = (self.keys, self.updates, self.gates, self.key_scales)
        self._arrays = (*entries, self.fills, self.arrivals, self.parents)
        self.pointers = tuple(map(_pointer, self._arrays))
        self.scalars = (capacity, int(stagger), num_k_heads, HV)
        self.folds: dict[tuple[int, bool], Fold] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the ring takes."""
        return sum(x.nbytes for x in self._arrays)


class Arguments(_cuda_loader.Params):
    """RingParams of which everything but the head and the arrays is filled in once (in every thread)."""

    def __init__(self, fixed: tuple[int, ...]) -> None:
        super().__init__(_LAYOUT)
        self.pack(*[0] * 18, *fixed, *[0] * 13)

    def pack_call(self, head: tuple[float, ...], ring: Ring, parents: int = 0, parent_bytes: int = 0) -> None:
        """Fill in what differs from call to call."""
        recurrent.HEAD.pack_into(self.buffer, 0, *head)
        _ARRAYS.pack_into(self.buffer, _ARRAYS_AT, *ring.pointers, parents, *ring.scalars, parent_bytes)


class Shape(NamedTuple):
    """What of a pool decides its kernels."""

    H: int
    HV: int
    K: int
    V: int
    layout: str
    state_dtype: str
    entries: int


class Plan:
    """What every step, or every verification, of one `Spec` shares."""

    def __init__(self, call: Call) -> None:
        self.spec, self.draft = call.spec, bool(call.draft)
        self.pointer = recurrent.pointer_of(call)
        self.arguments = Arguments(recurrent.fixed(self.spec))
        self.launches: dict[tuple[bool, int], tuple[recurrent.Launch, int]] = {}

    def launch(self, aligned: bool, entries: int) -> tuple[recurrent.Launch, int]:
        """Compile a kernel, once; with it the dynamic shared memory that it needs."""
        spec, device = self.spec, int(self.spec.device)
        shape = _shape_of(spec, entries)
        stem, tile, defines = _specialize(spec, shape, self.draft, aligned, _cuda_loader.describe_gpu(device))
        kernel = _cuda_loader.load(stem, defines, device)
        launch = recurrent.Launch(kernel, _blocks(shape, tile), (tile.threads, 1, 1))
        made = self.launches[aligned, entries] = launch, _shared(shape, tile, stem, spec.T)
        return made


def run(call: Call) -> None:
    """Run one token of each sequence."""
    _run(call)


def verify(call: Call) -> None:
    """Run the drafts of each sequence and keep what they would write."""
    _run(call)


def _run(call: Call) -> None:
    spec, ring = call.spec, call.ring
    name = "ring_verify" if call.draft else "ring_step"
    plan = spec.plan.get(name)
    if plan is None:
        plan = spec.plan[name] = Plan(call)
    pointer = plan.pointer
    q, k, v, out = pointer(call.q), pointer(call.k), pointer(call.v), pointer(call.out)
    state, slots = pointer(call.initial_state), pointer(call.initial_slots)
    A_log, dt_bias, a, b = pointer(call.A_log), pointer(call.dt_bias), pointer(call.a), pointer(call.b)
    if (q | k | v | out | A_log | dt_bias | a | b | state | slots) & 7:
        refuse_misaligned(call)
    operands = (q, k, v, out, A_log, dt_bias, a, b, state, slots, state, slots, 0)
    scalars = (call.scale, call.softplus_beta, 1 / call.softplus_beta, call.softplus_threshold)
    parents = None if call.parents is None else _dense(call.parents)
    tree = (0, 0) if parents is None else (_pointer(parents), parents.dtype.itemsize)
    aligned = not (q | k | v) & 15
    launch, shared = plan.launches.get((aligned, ring.entries)) or plan.launch(aligned, ring.entries)
    stream = call.stream
    for first in range(0, spec.N, recurrent.LARGEST_GRID):
        plan.arguments.pack_call((*operands, *scalars, first), ring, *tree)
        grid = (launch.blocks, spec.H, min(spec.N - first, recurrent.LARGEST_GRID))
        launch.kernel.launch(grid, launch.block, plan.arguments, stream, shared)


def commit(ring: Ring, slots: Any, accepted: Any) -> None:
    """Keep of each slot the drafts from the state to number ``accepted - 1``, and drop the others."""
    _commit(ring, slots, accepted)


def rollback(ring: Ring, slots: Any) -> None:
    """Drop the drafts."""
    _commit(ring, slots, None)


def _commit(ring: Ring, slots: Any, accepted: Any) -> None:
    slots, accepted = _dense(slots), None if accepted is None else _dense(accepted)
    defines: dict[str, _cuda_loader.Define] = {
        "GDR_SLOTS": slots.dtype.itemsize,
        "GDR_ACCEPTED": 0 if accepted is None else accepted.dtype.itemsize,
    }
    kernel = _cuda_loader.load("ring_commit", defines, ring.device)
    arguments = PARAMS["ring_commit"]
    size = ring.pool.dtype.itemsize
    keys, updates, gates, key_scales, fills, _, parents = ring.pointers
    arguments.pack(
        _pointer(slots),
        0 if accepted is None else _pointer(accepted),
        *(keys, updates, gates, key_scales, fills, parents),
        ring.pool.shape[0],
        *(ring.H, ring.HV, ring.entries, ring.K * size, ring.V * size),
    )
    kernel.launch((len(slots), 1, 1), (128, 1, 1), arguments, _stream(ring, slots))


def fold(ring: Ring, slots: Any = None) -> None:
    """Fold the pending tokens of slots (of all without) into their states, and drop their drafts."""
    _fold(ring, slots, None)


def read(ring: Ring, slots: Any) -> Any:
    """Copies of the states of slots with their pending tokens in them; zeros where a slot lies outside the pool."""
    import cupy

    states = cupy.empty((len(slots), *ring.pool.shape[1:]), ring.pool.dtype)
    _fold(ring, slots, states)
    return states


def _fold(ring: Ring, slots: Any, into: Any) -> None:
    slots = None if slots is None else _dense(slots)
    N = ring.pool.shape[0] if slots is None else len(slots)
    key = 0 if slots is None else slots.dtype.itemsize, into is None
    launch, arguments, shared = ring.folds.get(key) or _make_fold(ring, *key)
    target = ring.pool if into is None else into
    named = 0 if slots is None else _pointer(slots)
    rows = target.shape[0]
    for first in range(0, N, recurrent.LARGEST_GRID):
        pointers = (*[0] * 8, _pointer(ring.pool), named, _pointer(target), 0, 0)
        arguments.pack_call((*pointers, *[0.0] * 4, first), ring)
        arguments.set_rows(ring.pool.shape[0], rows)
        grid = (launch.blocks, ring.H, min(N - first, recurrent.LARGEST_GRID))
        launch.kernel.launch(grid, launch.block, arguments, _stream(ring, slots), shared)


class FoldArguments(Arguments):
    """RingParams of a fold, which has no tokens."""

    # Where initial_rows and final_rows are in Params.
    _ROWS = struct.Struct("2q")
    _ROWS_AT = struct.calcsize(recurrent.HEAD.format + "0Q 26q")

    def set_rows(self, initial: int, final: int) -> None:
        """Fill in the extents of the two state arrays."""
        self._ROWS.pack_into(self.buffer, self._ROWS_AT, initial, final)


class Fold(NamedTuple):
    """A compiled fold, its arguments, and the dynamic shared memory that it needs."""

    launch: recurrent.Launch
    arguments: FoldArguments
    shared: int


def _make_fold(ring: Ring, slot_bytes: int, in_place: bool) -> Fold:
    shape, tile, defines = _fold_kernel(ring, slot_bytes, in_place)
    kernel = _cuda_loader.load("ring_fold", defines, ring.device)
    size = SIZES[shape.state_dtype]
    rows = shape.V if shape.layout == "vk" else shape.K
    strides = [shape.HV * shape.K * shape.V * size, shape.K * shape.V * size, shape.K * shape.V // rows * size]
    arguments = FoldArguments((*[0] * 18, *strides, *strides, *[0] * 5, shape.HV // shape.H, *[0] * 4))
    launch = recurrent.Launch(kernel, _blocks(shape, tile), (tile.threads, 1, 1))
    fold = ring.folds[slot_bytes, in_place] = Fold(launch, arguments, _shared(shape, tile, "ring_fold", 0))
    return fold


def _fold_kernel(
    ring: Ring, slot_bytes: int, in_place: bool
) -> tuple[Shape, recurrent.Tile, dict[str, _cuda_loader.Define]]:
    shape = Shape(ring.H, ring.HV, ring.K, ring.V, ring.layout, ring.pool.dtype.name, ring.entries)
    tile = pick_tile(shape, "ring_fold", 1 << 20, 1)
    return shape, tile, _fold_defines(shape, tile, slot_bytes, in_place)


def forget(ring: Ring, slots: Any) -> None:
    """Drop the pending tokens and the drafts of slots, whose states are about to be overwritten."""
    _reset(ring, slots, None)


def copy(ring: Ring, sources: Any, targets: Any) -> None:
    """Copy states and pending tokens from slots to slots, bit for bit; the targets have no drafts."""
    for array in (ring.pool, ring.keys, ring.updates, ring.gates, ring.key_scales):
        _cuda_state.scatter(array, targets, _cuda_state.gather(array, sources))
    _reset(ring, targets, sources)


def _reset(ring: Ring, slots: Any, sources: Any) -> None:
    slots, sources = _dense(slots), None if sources is None else _dense(sources)
    defines: dict[str, _cuda_loader.Define] = {
        "GDR_SLOTS": slots.dtype.itemsize,
        "GDR_SOURCES": 0 if sources is None else sources.dtype.itemsize,
    }
    kernel = _cuda_loader.load("ring_reset", defines, ring.device)
    arguments, N = PARAMS["ring_reset"], len(slots)
    *_, fills, arrivals, _ = ring.pointers
    named = _pointer(slots), 0 if sources is None else _pointer(sources)
    arguments.pack(*named, fills, arrivals, ring.pool.shape[0], N, ring.H)
    kernel.launch((-(-N // 128), 1, 1), (128, 1, 1), arguments, _stream(ring, slots))


def specializations(spec: Spec, gpu: _cuda_loader.Gpu) -> list[_cuda_loader.Specialization]:
    """List the kernels of a pool with a ring that aligned steps (T = 1) or verifications use."""
    shape = _shape_of(spec, 16)
    slots = recurrent.index_bytes(spec, "initial_slots")
    jobs = []
    for draft in (False, True) if spec.T == 1 else (True,):
        stem, _, defines = _specialize(spec, shape, draft, True, gpu)
        jobs.append((stem, defines))
    tile = pick_tile(shape, "ring_fold", 1 << 20, 1)
    for slot_bytes, in_place in ((slots, True), (slots, False), (0, True)):
        jobs.append(("ring_fold", _fold_defines(shape, tile, slot_bytes, in_place)))
    jobs += [("ring_commit", {"GDR_SLOTS": slots, "GDR_ACCEPTED": accepted}) for accepted in (0, 4, 8)]
    jobs += [("ring_reset", {"GDR_SLOTS": slots, "GDR_SOURCES": sources}) for sources in (0, slots)]
    return jobs


def kernel_of(call: Call, gpu: _cuda_loader.Gpu) -> _cuda_loader.Specialization:
    """The kernel that a call on a ring runs where its arrays are aligned."""
    shape = _shape_of(call.spec, call.ring.entries)
    stem, _, defines = _specialize(call.spec, shape, bool(call.draft), True, gpu)
    return stem, defines


def fold_of(call: Call) -> _cuda_loader.Specialization:
    """The kernel that folds what is pending before a call that goes on from the states."""
    return "ring_fold", _fold_kernel(call.folds, recurrent.index_bytes(call.spec, "initial_slots"), True)[2]


def _specialize(
    spec: Spec, shape: Shape, draft: bool, aligned: bool, gpu: _cuda_loader.Gpu
) -> tuple[str, recurrent.Tile, dict[str, _cuda_loader.Define]]:
    """Kernel, tile and definitions of a step or a verification."""
    stem = "ring_verify" if draft else "ring_step"
    if _on_tensor_cores(spec, shape, draft, gpu):
        stem += "_mma"
        tile = _pick_mma_tile(shape, spec, draft, gpu.multiprocessors)
        whole = all(recurrent.whole_chunks(spec, name, 8) for name in ("v", "out"))
        tile.defines["GDR_ALIGNED_VALUES"] = aligned and whole
    else:
        tile = pick_tile(shape, stem, spec.N, gpu.multiprocessors)
    defines = _defines(spec, shape, tile, not draft, aligned)
    # While they wait for what is ahead: as long as all blocks are on the multiprocessors at once.
    blocks = spec.N * spec.H * _blocks(shape, tile)
    return stem, tile, {**defines, "GDR_PREFETCH": gpu.capability >= 90 and blocks <= 4 * gpu.multiprocessors}


def _on_tensor_cores(spec: Spec, shape: Shape, draft: bool, gpu: _cuda_loader.Gpu) -> bool:
    """Whether tensor cores do a call.  A step of float32 states is not left to them: its sums would be less exact."""
    wide = shape.state_dtype == "float32"
    return (
        gpu.capability >= 80
        and shape.layout == "vk"
        and shape.entries == 16
        and spec.dtype != "float32"
        and (draft if wide else shape.state_dtype == spec.dtype)
        and shape.K % 32 == 0
        and (not wide or shape.K <= 128)
        and shape.V % 16 == 0
    )


def _pick_mma_tile(shape: Shape, spec: Spec, draft: bool, multiprocessors: int) -> recurrent.Tile:
    """Choose how many value columns each of the four warps of a block owns: few where the batch is small."""
    columns = 16 if draft or shape.K > 128 or shape.V < 128 else 32
    blocks = spec.N * shape.HV * -(-shape.V // (2 * columns))  # with half as many, which is twice as many blocks
    least, room = (8, multiprocessors) if draft else (16, 4 * multiprocessors)
    if columns > least and blocks <= room:
        columns //= 2
    wide = shape.state_dtype == "float32"
    defines: dict[str, _cuda_loader.Define] = {
        "GDR_ROWS": columns // (32 // _lanes(shape)),
        "GDR_WARPS": 4,
        "GDR_MIN_BLOCKS": 2 if wide and spec.T > 8 else 4 if shape.K <= 128 and spec.T <= 8 else 3,
    }
    if draft:
        defines["GDR_DRAFTS"] = 8 if spec.T <= 8 else 16
    return recurrent.Tile(defines, 128, 4 * columns)


def pick_tile(shape: Shape, stem: str, sequences: int, multiprocessors: int) -> recurrent.Tile:
    """Choose how many value columns a block owns: few where the batch is small, to use every multiprocessor."""
    chunk, lanes = _chunk(shape), _lanes(shape)
    share = -(-shape.K // (lanes * chunk)) * chunk  # elements of a row that a lane holds
    warps, warp_rows = 4, 32 // lanes
    rows = min(lanes, 1 << ((64 // share).bit_length() - 1))  # a power of two
    least = max(1, chunk // (warps * warp_rows))  # a block's updates are whole chunks
    heads = sequences * shape.HV
    while rows > least and (
        warps * rows * warp_rows >= 2 * shape.V
        or (rows > 2 and heads * -(-shape.V // (warps * rows * warp_rows)) < 3 * multiprocessors)
    ):
        rows //= 2
    held = (rows + 2) * share  # the state's elements, and k and q
    light = stem == "ring_step" and shape.layout == "vk"
    min_blocks = (5 if light else 4) if held <= 48 else (4 if light else 3)
    defines: dict[str, _cuda_loader.Define] = {"GDR_ROWS": rows, "GDR_WARPS": warps, "GDR_MIN_BLOCKS": min_blocks}
    return recurrent.Tile(defines, 32 * warps, warps * rows * warp_rows)


def _chunk(shape: Shape) -> int:
    """Elements of a state that move at once."""
    return 16 // SIZES[shape.state_dtype]


def _lanes(shape: Shape) -> int:
    """Lanes that share a row of K elements."""
    return min(16, 1 << (-(-shape.K // _chunk(shape)) - 1).bit_length())


def _shape_of(spec: Spec, entries: int) -> Shape:
    return Shape(spec.H, spec.HV, spec.K, spec.V, spec.layout, str(spec.initial_dtype), entries)


def _blocks(shape: Shape, tile: recurrent.Tile) -> int:
    return -(-shape.V // tile.columns) * (shape.HV // shape.H)


def _shared(shape: Shape, tile: recurrent.Tile, stem: str, T: int) -> int:
    """Bytes of dynamic shared memory: where a "kv" state changes its order, and what each draft needs."""
    chunk, lanes = _chunk(shape), _lanes(shape)
    exchange = 0 if shape.layout == "vk" else shape.K * (tile.columns + chunk) * SIZES[shape.state_dtype]
    if stem != "ring_verify":
        return exchange
    vector = -(-shape.K // (lanes * chunk)) * lanes * chunk * 4
    return exchange + T * (2 * vector + 8 * tile.columns + 8 * (shape.entries + MAX_DRAFTS))


def _defines(
    spec: Spec, shape: Shape, tile: recurrent.Tile, one_token: bool, aligned: bool
) -> dict[str, _cuda_loader.Define]:
    return {
        **_state_defines(shape, tile),
        "GDR_QKV": TYPES[spec.dtype],
        "GDR_RAW_GATES": spec.gates == "raw",
        "GDR_L2NORM": spec.l2norm,
        "GDR_ONE_TOKEN": one_token,
        "GDR_INITIAL_SLOTS": recurrent.index_bytes(spec, "initial_slots"),
        "GDR_IN_PLACE": True,
        "GDR_ALIGNED_TOKENS": aligned and all(recurrent.whole_chunks(spec, name, _chunk(shape)) for name in ("q", "k")),
    }


def _fold_defines(
    shape: Shape, tile: recurrent.Tile, slot_bytes: int, in_place: bool
) -> dict[str, _cuda_loader.Define]:
    return {
        **_state_defines(shape, tile),
        "GDR_QKV": TYPES[shape.state_dtype],
        "GDR_RAW_GATES": False,
        "GDR_L2NORM": False,
        "GDR_ONE_TOKEN": False,
        "GDR_INITIAL_SLOTS": slot_bytes,
        "GDR_IN_PLACE": in_place,
        "GDR_ALIGNED_TOKENS": True,
    }


def _state_defines(shape: Shape, tile: recurrent.Tile) -> dict[str, _cuda_loader.Define]:
    chunk = _chunk(shape)
    return {
        "GDR_INITIAL": TYPES[shape.state_dtype],
        "GDR_FINAL": TYPES[shape.state_dtype],
        "GDR_K": shape.K,
        "GDR_V": shape.V,
        "GDR_CU_SEQLENS": 0,
        "GDR_FINAL_SLOTS": 0,
        # Pools are contiguous; keys are rows of K, updates (and rows of layout "kv") rows of V.
        "GDR_ALIGNED_STATES": shape.K % chunk == 0 and shape.V % chunk == 0,
        "GDR_DENSE_STATES": True,
        "GDR_LAYOUT_VK": shape.layout == "vk",
        "GDR_ENTRIES": shape.entries,
        "GDR_PREFETCH": False,
        **tile.defines,
    }


def _pointer(x: Any) -> int:
    return _arrays.library_of(x).pointer(x)


def _dense(x: Any) -> Any:
    """`x`, or a copy of it without gaps."""
    import cupy

    return x.contiguous() if _arrays.library_of(x).name == "torch" else cupy.ascontiguousarray(x)


def _stream(ring: Ring, slots: Any) -> int:
    """The current stream of the library that the slots come from."""
    return _arrays.library_of(ring.pool if slots is None else slots).stream(ring.device)
