"""Thousands of random calls, most of them malformed: a clear refusal that writes nothing, or the right
answer.

On the host every array that a call may write lies between canaries; on a device, and on an emulated one, every
array lies between guards of NaN, so that what is read outside an array shows in the answer.  GDR_FUZZ_CALLS sets the
number of calls an operation, GDR_FUZZ_SEED the first seed, and GDR_FUZZ_GUARD the bytes of a guard; a failure names
the seed of its call.  Under compute-sanitizer no guard and no pool of memory should lie between it and the ends of
the arrays::

    GDR_FUZZ_GUARD=0 GDR_FUZZ_CALLS=100 compute-sanitizer python tests/test_fuzz.py
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import partial

import emulated
import ml_dtypes
import numpy as np
import pytest
from places import RTOL_CHUNK, assert_same_bits

import gdr
from gdr import reference
from gdr.testing import make_inputs, relative_rms, to_numpy

CALLS = int(os.environ.get("GDR_FUZZ_CALLS", "3400"))
DEVICE_CALLS = int(os.environ.get("GDR_FUZZ_CALLS", "150"))  # new dtypes and sizes cost a compilation
EMULATED_CALLS = int(os.environ.get("GDR_FUZZ_CALLS", "12"))
FIRST_SEED = int(os.environ.get("GDR_FUZZ_SEED", "0"))
GUARD = int(os.environ.get("GDR_FUZZ_GUARD", "4096"))
REFUSALS = (TypeError, ValueError, IndexError)
CANARY = 0x5A
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
WRONG_DTYPES = [np.int32, np.int64, np.uint8, np.bool_, np.complex64, ">f4", "S3", object, np.longdouble]
NO_ARRAYS = [None, 0, 1.5, "x", [], [[0.0]], (), {}, b"", float("nan"), True, ..., np.float32(1), type]
SCALARS = [0, 1, -1, 2.5, -0.3, 1e-30, np.float32(0.5), np.int64(2), True, None, "1", 1j, [], np.nan, np.inf, 10**400]
TENSORS = ("q", "k", "v", "a", "b", "g", "beta", "A_log", "dt_bias", "initial_state_source", "initial_state", "out")


class Memory:
    """Arrays with canaries around them."""

    def __init__(self):
        self.blocks = []

    def guarded(self, x: np.ndarray, rng: np.random.Generator, pitch: int = 0) -> np.ndarray:
        """A copy of x between canaries; `pitch` extra elements lie between the entries of the first axis."""
        row = int(np.prod(x.shape[1:], dtype=int))
        count = x.shape[0] * (row + pitch)
        edge = int(rng.integers(1, 9)) * 8
        block = np.full(2 * edge + count * x.itemsize, CANARY, np.uint8)
        body = block[edge : edge + count * x.itemsize].view(x.dtype)
        view = body.reshape(x.shape[0], row + pitch)[:, :row].reshape(x.shape)
        view[...] = x
        assert view.size == 0 or np.shares_memory(view, block)
        self.blocks.append((block, view))
        return view


class DeviceMemory:
    """Copies of host arrays on a device, between guards whose every element is NaN, with the same strides."""

    def __init__(self):
        self.blocks = []
        self._copies = {}

    def moved(self, x):
        """A copy of an array that a device can hold; one array that is given twice stays one."""
        if not isinstance(x, np.ndarray) or not x.dtype.isnative or x.dtype.char not in "?bhilqBHILQefdFDE":
            return x
        if id(x) not in self._copies:
            self._copies[id(x)] = x, self._copy(x)
        return self._copies[id(x)][1]

    def _copy(self, x):
        reach = [step * (n - 1) for n, step in zip(x.shape, x.strides)] if x.size else []
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + x.itemsize * bool(x.size)
        first = GUARD + -(low // 16) * 16 + x.__array_interface__["data"][0] % 16  # as aligned as it was
        image = np.full(first + high + GUARD, 0xFF, np.uint8)
        np.ndarray(x.shape, x.dtype, image, first, x.strides)[...] = x
        block = self.bring(image)
        self.blocks.append((block, image, first, x))
        return self.array(block, first, x)

    def bring(self, image):
        import cupy

        return cupy.asarray(image)

    def array(self, block, first, x):
        """The array like x that begins at byte `first` of a block."""
        import cupy

        return cupy.ndarray(x.shape, x.dtype, block.data + first, x.strides)

    def fetch(self, x):
        return to_numpy(x)

    def assert_untouched(self, written=()):
        """Check that nothing changed but elements of the arrays in `written` (host arrays)."""
        for block, image, first, x in self.blocks:
            after, before = self.fetch(block).copy(), image.copy()
            if any(x is y for y in written):
                for bytes_ in (after, before):
                    elements = np.ndarray((*x.shape, x.itemsize), np.uint8, bytes_, first, (*x.strides, 1))
                    elements[...] = 0
            assert_same_bits(after, before, "memory that the call does not name")


class EmulatedMemory(DeviceMemory):
    """The same for the kernels on the host."""

    def bring(self, image):
        memory = np.empty(image.size + 512, np.uint8)
        first = -memory.ctypes.data % 512  # where a device's allocator begins
        memory[first : first + image.size] = image
        return memory[first : first + image.size]

    def array(self, block, first, x):
        return emulated.on_device(np.ndarray(x.shape, x.dtype, block, first, x.strides))

    def fetch(self, x):
        return x.view(np.ndarray)


HEAD_DIMS = [(K, V) for K in (1, 2, 3, 8, 17) for V in (1, 2, 5, 8)]


def random_call(operation, rng, memory, head_dims=HEAD_DIMS, stretch=1):
    """A good call: arguments by name.  `stretch` multiplies its lengths."""
    K, V = head_dims[rng.integers(len(head_dims))]
    H, group = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    sizes = {
        "H": H,
        "HV": H * group,
        "K": K,
        "V": V,
        "dtype": np.dtype(DTYPES[rng.integers(4)]).name,
        "layout": str(rng.choice(["kv", "vk"])),
        "seed": int(rng.integers(1 << 30)),
    }
    packed = rng.random() < 0.5
    if packed:
        sizes["lengths"] = (stretch * rng.integers(0, 5, size=rng.integers(0, 4))).tolist()
    else:
        sizes |= {"B": int(rng.integers(0, 4)), "T": stretch * int(rng.integers(0, 5))}
    x = make_inputs(**sizes)
    call = {name: getattr(x, name) for name in ("q", "k", "v")}
    if packed:
        call["cu_seqlens"] = x.cu_seqlens
    if rng.random() < 0.5:
        call["use_qk_l2norm_in_kernel"] = bool(rng.random() < 0.5)
    if rng.random() < 0.3:
        call["scale"] = float(rng.normal())
    if rng.random() < 0.4:
        call["out"] = memory.guarded(np.full_like(x.v, np.nan), rng)
    if operation is gdr.fused_sigmoid_gating_delta_rule_update:
        call |= {name: getattr(x, name) for name in ("A_log", "a", "dt_bias", "b")}
        call |= {"softplus_beta": 1.0, "softplus_threshold": 20.0}
        if rng.random() < 0.8:
            call["initial_state_source"] = memory.guarded(x.state, rng, int(rng.integers(0, 4)))
            call["initial_state_indices"] = x.slots
            call["state_layout"] = sizes["layout"]
            if rng.random() < 0.3:
                call["output_state_indices"] = rng.permutation(len(x.state))[: len(x.slots)].astype(np.int64)
            elif rng.random() < 0.2:
                call["disable_state_update"] = True
    else:
        call |= {"g": x.g, "beta": x.beta}
        if rng.random() < 0.6:
            call |= {"initial_state": x.initial_state, "state_layout": sizes["layout"]}
        call["output_final_state"] = bool(rng.random() < 0.6)
        if operation is gdr.chunk_gated_delta_rule and rng.random() < 0.5:
            call |= {"chunk_size": int(rng.choice([1, 16, 64, 100])), "batch_invariant": bool(rng.random() < 0.5)}
    return call


def mutate_array(x: np.ndarray, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts
        return mutated_array(x, rng)


def mutated_array(x: np.ndarray, rng):
    choice = rng.integers(14)
    axis = int(rng.integers(x.ndim)) if x.ndim else 0
    if choice == 0 and x.ndim:  # one more or one less along an axis
        if not x.shape[axis]:
            return np.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
        return np.concatenate([x, x.take([0], axis)], axis)
    if choice == 1 and x.ndim:
        return x.take(range(max(0, x.shape[axis] - 1)), axis)
    if choice == 2:
        return x[None]
    if choice == 3 and x.ndim and x.shape[0]:
        return x[0]
    if choice == 4:
        return x.astype(np.float32).astype(DTYPES[rng.integers(4)])
    if choice == 5:
        kind = WRONG_DTYPES[rng.integers(len(WRONG_DTYPES))]
        return x.astype(np.float32).astype(kind)
    if choice == 6:
        return NO_ARRAYS[rng.integers(len(NO_ARRAYS))]
    if choice == 7:
        return x.swapaxes(axis, -1) if x.ndim else x
    if choice == 8:
        return x[::-1].copy()[::-1] if x.ndim else x
    if choice == 9:
        return np.broadcast_to(x.take([0], axis), x.shape) if x.size else x
    if choice == 10:
        return x.reshape(-1)
    if choice == 11:  # at an odd address
        memory = np.zeros(x.nbytes + 1, np.uint8)
        view = memory[1:].view(x.dtype).reshape(x.shape) if x.dtype != object else x
        view[...] = x
        return view
    if choice == 12:
        return np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x
    y = x.copy()
    y.flags.writeable = False
    return y


def mutate_indices(x: np.ndarray, rng):
    choice = rng.integers(8)
    if choice == 0:
        return NO_ARRAYS[rng.integers(len(NO_ARRAYS))]
    if choice == 1:
        return x.tolist()
    if choice == 2:
        return x.astype([np.float32, np.int16, np.uint32, np.bool_, np.int64, np.uint64, ">i4"][rng.integers(7)])
    if choice == 3:
        return np.append(x, x[:1]).astype(x.dtype)
    if choice == 4:
        return x[:-1]
    if choice == 5:
        return x[None]
    y = x.astype(np.int64)
    for at in range(len(y)):
        if rng.random() < 0.5:
            y[at] = rng.choice([-1, -2, 0, 1, 2, 3, 5, 7, 100, -(2**31), 2**31, 2**32, -(2**32), 2**62, -(2**63)])
    return y if rng.random() < 0.7 else np.repeat(y, 2)[::2]


def mutate(call: dict, operation, rng) -> None:
    names = list(inspect.signature(operation).parameters)
    name = names[rng.integers(len(names))]
    value = call.get(name)
    choice = rng.random()
    if choice < 0.04:
        call.pop(name, None)
    elif choice < 0.06:
        call[str(rng.choice(["head_first", "Q", "state", "kwargs"]))] = 1
    elif choice < 0.12:
        other = names[rng.integers(len(names))]
        if name in call and other in call:
            call[name], call[other] = call[other], call[name]
    elif choice < 0.16:
        other = names[rng.integers(len(names))]
        if other in call:
            call[name] = call[other]
    elif isinstance(value, np.ndarray):
        call[name] = (mutate_indices if value.dtype.kind in "iu" and value.ndim == 1 else mutate_array)(value, rng)
    elif name in ("initial_state_indices", "output_state_indices", "cu_seqlens"):
        call[name] = mutate_indices(np.arange(rng.integers(0, 5)), rng)
    elif name in ("state_layout",):
        call[name] = ["kv", "vk", "hkv", None, 3, b"kv"][rng.integers(6)]
    elif name not in TENSORS:
        call[name] = SCALARS[rng.integers(len(SCALARS))]
    elif rng.random() < 0.3:
        call[name] = NO_ARRAYS[rng.integers(len(NO_ARRAYS))]


def oracle(operation, call):
    run = getattr(reference, operation.__name__)
    wanted = inspect.signature(run).parameters
    with np.errstate(all="ignore"):
        return run(**{name: value for name, value in call.items() if name in wanted})


def check_answer(operation, call, before, o, state):
    """Compare an output, and the pool or the final states, with what the reference says of the call."""
    want_o, want_state = oracle(operation, call | before)
    assert o.shape == np.shape(call["v"])
    assert o.dtype == call["v"].dtype
    assert_near(o, want_o, 5 * RTOL_CHUNK[o.dtype.name], "o")
    if state is not None:
        rtol = max(RTOL_CHUNK[o.dtype.name], RTOL_CHUNK[state.dtype.name])
        assert_near(state, want_state, 5 * rtol, "the state")


def assert_near(got, want, rtol, name):
    """Check a result, unless the right one is out of its dtype's range."""
    limits = ml_dtypes.finfo(got.dtype)
    if not np.isfinite(want).all() or np.abs(want).max(initial=0) > min(float(limits.max), 1e30):
        return
    error = relative_rms(got, want)
    tiny = np.abs(got.astype(np.float64) - want).max(initial=0) <= float(limits.smallest_normal)
    assert error <= rtol or tiny, f"{name} is off by {error}"


def run_one(operation, seed):
    """One call; returns whether it was refused."""
    rng = np.random.default_rng(seed)
    memory = Memory()
    call = random_call(operation, rng, memory)
    for _ in range(rng.choice(4, p=[0.1, 0.5, 0.25, 0.15])):
        mutate(call, operation, rng)
    arrays = {name: value for name, value in call.items() if isinstance(value, np.ndarray)}
    blocks = [block.copy() for block, _ in memory.blocks]
    before = {name: value.copy() for name, value in arrays.items()}
    try:
        result = operation(**call)
    except REFUSALS:
        for (block, _), was in zip(memory.blocks, blocks, strict=True):
            assert_same_bits(block, was, "memory after a refusal")
        for name, value in arrays.items():
            if value.dtype != object:
                assert_same_bits(value, before[name], name)
        return True
    writable = [call.get("out")]
    if operation is gdr.fused_sigmoid_gating_delta_rule_update and not call.get("disable_state_update", False):
        writable.append(call.get("initial_state_source"))
    for name, value in arrays.items():
        if not any(value is y for y in writable):
            assert_same_bits(value, before[name], name)
    for (block, view), was in zip(memory.blocks, blocks, strict=True):
        # All bytes that are no element of the view are as they were.
        elements = np.zeros(block.size, bool)
        mask = np.lib.stride_tricks.as_strided(
            elements[view.__array_interface__["data"][0] - block.__array_interface__["data"][0] :],
            (*view.shape, view.itemsize),
            (*view.strides, 1),
        ) if view.size else elements[:0]  # fmt: skip
        mask[...] = True
        assert_same_bits(block[~elements], was[~elements], "canaries")
    if operation is gdr.fused_sigmoid_gating_delta_rule_update:
        check_answer(operation, call, before, result, call.get("initial_state_source"))
    else:
        check_answer(operation, call, before, *result)
    return False


def run_one_on_a_device(operation, seed, memory=DeviceMemory):
    """As `run_one`, with arrays of a device; now and then one of them stays on the host."""
    rng = np.random.default_rng(seed)
    # Two sizes, for each is many a compilation; 16 columns and long sequences are what the chunk kernels take.
    stretch = 35 if operation is gdr.chunk_gated_delta_rule and rng.random() < 0.3 else 1
    call = random_call(operation, rng, Memory(), head_dims=[(3, 5), (16, 16)], stretch=stretch)
    for _ in range(rng.choice(4, p=[0.1, 0.5, 0.25, 0.15])):
        mutate(call, operation, rng)
    if "check" not in call and rng.random() < 0.5:
        call["check"] = True
    arrays = [name for name, value in call.items() if isinstance(value, np.ndarray)]
    stays = arrays[rng.integers(len(arrays))] if arrays and rng.random() < 0.05 else None
    before = {name: call[name].copy() for name in arrays}
    memory = memory()
    moved = {name: value if name == stays else memory.moved(value) for name, value in call.items()}
    try:
        result = operation(**moved)
    except REFUSALS:
        memory.assert_untouched()
        return True
    is_update = operation is gdr.fused_sigmoid_gating_delta_rule_update
    pool = call.get("initial_state_source") if is_update and not call.get("disable_state_update") else None
    written = [y for y in (call.get("out"), pool) if y is not None]
    memory.assert_untouched(written)
    if any(sum(x is y for x in call.values()) > 1 for y in written):  # read as well, in no order
        return False
    o = result if is_update else result[0]
    state = (moved.get("initial_state_source") if pool is not None else None) if is_update else result[1]
    o, state = memory.fetch(o), None if state is None else memory.fetch(state)
    rows = described_rows(call, is_update)
    if call.get("check") is True:
        assert rows is not None, "slots or offsets that should have been refused"
    if rows is None:  # two rows race, or offsets lie: nothing outside was written, and there is no right answer
        return False
    if pool is not None:
        others = np.setdiff1d(np.arange(len(pool)), rows["writes"])
        assert_same_bits(state[others], before["initial_state_source"][others], "slots that no row names")
    if is_update:
        before |= {name: rows[name] for name in ("initial_state_indices", "output_state_indices") if name in before}
    check_answer(operation, call, before, o, state)
    return False


def described_rows(call, is_update):
    """The slots as a device takes them, where one past the pool is padding; None where no answer is the right one."""
    cu_seqlens, v = call.get("cu_seqlens"), call["v"]
    lengths = np.full(len(v), v.shape[1])
    if cu_seqlens is not None:
        lengths = np.diff(cu_seqlens.astype(object))
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != v.shape[1] or (lengths < 0).any():
            return None
    pool = call.get("initial_state_source") if is_update else None
    if pool is None:
        return {"writes": []}
    given = call.get("initial_state_indices")
    reads = list(range(len(lengths))) if given is None else [n if 0 <= n < len(pool) else -1 for n in given.tolist()]
    given = call.get("output_state_indices")
    writes = reads if given is None else [n if 0 <= n < len(pool) else -1 for n in given.tolist()]
    rows = [(r, w) for r, w, n in zip(reads, writes, lengths) if min(r, w) >= 0 and (n or r != w)]
    if not call.get("disable_state_update"):
        written = [w for _, w in rows]
        crossed = any(r in written and written.index(r) != i for i, (r, _) in enumerate(rows))
        if len(set(written)) < len(written) or crossed:
            return None
    return {
        "writes": [w for _, w in rows],
        "initial_state_indices": np.array(reads, np.int64),
        "output_state_indices": np.array(writes, np.int64),
    }


OPERATIONS = (
    gdr.fused_sigmoid_gating_delta_rule_update,
    gdr.fused_recurrent_gated_delta_rule,
    gdr.chunk_gated_delta_rule,
)


def search(operation, seeds, run=run_one):
    """Run the calls of some seeds; returns how many were refused."""
    refused, failures = 0, []
    for seed in seeds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                refused += run(operation, seed)
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
    assert not failures, "\n".join([f"{len(failures)} of {len(seeds)} calls of {operation.__name__}:", *failures[:9]])
    # Both kinds must be there in numbers, or the search has gone astray.
    assert 0.2 * len(seeds) < refused < 0.95 * len(seeds)
    return refused


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_or_right(host, operation):
    search(operation, range(FIRST_SEED, FIRST_SEED + CALLS))


def random_pool(rng):
    """A pool of float32 to 16 bits with a few tokens pending, and slots of some sequences in it."""
    H, group = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    sizes = {"H": H, "HV": H * group, "K": int(rng.choice([1, 3, 8])), "V": int(rng.choice([1, 5, 8]))}
    dtype = str(rng.choice(["float32", "float32", "float16", "bfloat16", "float64"]))
    x = make_inputs(B=5, T=1, num_slots=5, gates="slow", seed=int(rng.integers(1 << 30)), **sizes)
    state = gdr.DeltaRuleState(
        6,
        sizes["HV"],
        sizes["K"],
        sizes["V"],
        num_k_heads=H,
        A_log=x.A_log,
        dt_bias=x.dt_bias,
        dtype=dtype,
        layout=str(rng.choice(["kv", "vk"])),
        ring=[None, 0, 1, 3, 16][rng.integers(5)],
        stagger=bool(rng.random() < 0.5),
    )
    slots = state.alloc(5)
    for _ in range(rng.integers(0, 4)):
        some = np.flatnonzero(rng.random(5) < 0.7)
        state.step(*(y[some] for y in (x.q, x.k, x.v, x.a, x.b)), slots[some])
    return state, rng.permutation(slots), sizes


def path_to(parents, t):
    path = []
    while t >= 0:
        path.insert(0, int(t))
        t = parents[t]
    return path


def states_along(state, h, call, n, path):
    """Output of the last of some drafts of sequence n, and the state after them, by the reference."""
    q, k, v = (np.asarray(call[name], np.float64) for name in "qkv")
    a, b = (np.asarray(call[name], np.float64).reshape(v.shape[:3]) for name in "ab")
    a, q, k, v, b = (y[n : n + 1, path] for y in (a, q, k, v, b))
    with np.errstate(all="ignore"):
        o, h = reference.fused_sigmoid_gating_delta_rule_update(
            state.A_log, a, state.dt_bias, 1.0, 20.0, q, k, v, b, h.astype(np.float64), np.zeros(1, int),
            use_qk_l2norm_in_kernel=True, state_layout=state.layout,
        )  # fmt: skip
    return o[0, -1], h


def run_drafts(seed):
    """`verify` and `commit`, one of them malformed or none; returns whether one was refused."""
    rng = np.random.default_rng(seed)
    state, slots, sizes = random_pool(rng)
    memory = Memory()
    N, T = int(rng.integers(0, 4)), int(rng.integers(1, 6))
    x = make_inputs(B=N, T=T, dtype=np.dtype(DTYPES[rng.integers(4)]).name, seed=seed, gates="slow", **sizes)
    call = {name: getattr(x, name) for name in ("q", "k", "v", "a", "b")} | {"slots": slots[:N].astype(np.int64)}
    if N and rng.random() < 0.3:
        call["slots"][rng.integers(N)] = -1
    if rng.random() < 0.6:
        call["parents"] = rng.integers(-1, np.arange(T), size=(N, T))
    if rng.random() < 0.3:
        call["out"] = memory.guarded(np.full_like(x.v, np.nan), rng)
    if rng.random() < 0.6:
        mutate(call, state.verify, rng)
    before, blocks = state.read(slots), [block.copy() for block, _ in memory.blocks]
    try:
        o = state.verify(**call)
    except REFUSALS:
        assert_same_bits(state.read(slots), before, "states after a refusal")
        for (block, _), was in zip(memory.blocks, blocks, strict=True):
            assert_same_bits(block, was, "memory after a refusal")
        return True
    assert_same_bits(state.read(slots), before, "states after verify")
    rows = np.asarray(call["slots"]).reshape(-1)
    T = o.shape[1]
    parents = (
        np.tile(np.arange(-1, T - 1), (len(rows), 1)) if call.get("parents") is None else np.asarray(call["parents"])
    )
    rtol = 5 * max(RTOL_CHUNK[o.dtype.name], RTOL_CHUNK[state.dtype])
    for n, slot in enumerate(rows):
        for t in range(T):
            want = 0 * o[n, t].astype(np.float64)
            if slot >= 0:
                want, _ = states_along(state, state.read([slot]), call, n, path_to(parents[n], t))
            assert_near(o[n, t], want, rtol, f"o of draft {t} of row {n}")

    ends = rng.integers(-1, T, size=len(rows))
    paths = [path_to(parents[n], end) for n, end in enumerate(ends)]
    accepted = 1 + ends
    if rng.random() < 0.5:
        accepted = np.full((len(rows), T), -1)
        for row, path in zip(accepted, paths):
            row[: len(path)] = path
    commit = {"slots": rows.copy(), "accepted": accepted}
    if rng.random() < 0.6:
        mutate(commit, state.commit, rng)
    try:
        state.commit(**commit)
    except REFUSALS:
        assert_same_bits(state.read(slots), before, "states after a refusal")
        state.commit(rows, accepted)  # the drafts are there still
        refused = True
    else:
        refused = False
        # What was committed instead, if anything else was.
        order = {int(slot): n for n, slot in enumerate(rows) if slot >= 0}
        taken = dict.fromkeys(order, -1)
        for slot, row in zip(np.asarray(commit["slots"]).reshape(-1), np.asarray(commit["accepted"])):
            if slot >= 0:
                taken[int(slot)] = int(np.max(row, initial=-1) if np.ndim(row) else row - 1)
        paths = [path_to(parents[n], taken[int(slot)]) if slot >= 0 else [] for n, slot in enumerate(rows)]
    for n, slot in enumerate(rows):
        if slot >= 0 and paths[n]:
            at = int(np.flatnonzero(slots == slot)[0])
            _, want = states_along(state, before[at : at + 1], call, n, paths[n])
            assert_near(state.read([slot]), want, rtol, f"state of row {n}")
    others = ~np.isin(slots, rows)
    assert_same_bits(state.read(slots[others]), before[others], "states of others")
    return refused


def test_drafts_are_refused_or_right(host):
    calls = max(20, CALLS // 8)
    refused = 0
    for seed in range(FIRST_SEED, FIRST_SEED + calls):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                refused += run_drafts(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert 0.2 * calls < refused < 0.9 * calls


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_or_right_on_a_device(operation):
    search(operation, range(FIRST_SEED, FIRST_SEED + DEVICE_CALLS), run_one_on_a_device)


@pytest.mark.slow
@pytest.mark.skipif(emulated.COMPILER is None, reason="no g++")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_or_right_on_an_emulated_device(operation, monkeypatch, tmp_path):
    with emulated.gpu(monkeypatch, tmp_path):
        search(
            operation,
            range(FIRST_SEED, FIRST_SEED + EMULATED_CALLS),
            partial(run_one_on_a_device, memory=EmulatedMemory),
        )


@pytest.mark.gpu
def test_no_slot_on_a_device_writes_outside_the_pool():
    import cupy

    rng = np.random.default_rng(FIRST_SEED)
    for _ in range(200):
        N, slots = int(rng.integers(1, 6)), int(rng.integers(1, 7))
        sizes = {"H": 1, "HV": 2, "K": int(rng.choice([16, 64])), "V": int(rng.choice([8, 32]))}
        x = make_inputs(B=N, T=int(rng.integers(1, 4)), num_slots=max(slots, N), xp="cupy", device="cuda", **sizes)
        base = cupy.full((slots + 8, 2, sizes["K"], sizes["V"]), cupy.nan, np.float32)
        pool = base[4 : 4 + slots]
        pool[...] = x.state[:slots]
        names = np.array([-1, 0, slots - 1, slots, slots + 1, slots + 3, 2**31 - 1, -(2**31), 2**30], np.int32)
        indices = rng.choice(names, size=N, replace=False)
        before = base.copy()
        o = gdr.fused_sigmoid_gating_delta_rule_update(
            x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, cupy.asarray(indices)
        )
        inside = (indices >= 0) & (indices < slots)
        assert not o.get()[~inside].any()
        assert np.isfinite(o.get()).all()
        touched = np.zeros(slots + 8, bool)
        touched[4 + indices[inside]] = True
        assert_same_bits(base.get()[~touched], before.get()[~touched], "slots that no row names")


if __name__ == "__main__":
    import cupy

    cupy.cuda.set_allocator(None)  # one allocation an array
    for operation in OPERATIONS:
        refused = search(operation, range(FIRST_SEED, FIRST_SEED + DEVICE_CALLS), run_one_on_a_device)
        print(f"{operation.__name__}: {DEVICE_CALLS} calls, {refused} refused")
