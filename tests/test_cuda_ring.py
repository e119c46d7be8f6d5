"""Deferred write-back and drafts on a CUDA device, kernel by kernel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from gdr import _cuda_loader as loader
from gdr import _cuda_ring as cuda_ring
from gdr import _inputs
from gdr._arrays import numpy_dtype
from gdr._spec import OPERANDS, RAW_GATES, TOKENS, Form
from gdr.testing import relative_rms, to_library, to_numpy

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("kv", "vk")
# Relative RMS error of outputs by their dtype, and of states by theirs, within a few hundred tokens.
OUTPUT = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 2.5e-3}
STATE = {"float32": 5e-7, "float16": 1e-3, "bfloat16": 8e-3}


def device(x: Any) -> Any:
    return to_library(np.ascontiguousarray(x), "cupy", "cuda")


class Pool:
    """A pool with a ring, and beside it what float64 says of every slot.

    `put` brings an array to the device.
    """

    put = staticmethod(device)

    def __init__(
        self,
        num_slots: int = 9,
        H: int = 2,
        HV: int = 4,
        K: int = 128,
        V: int = 128,
        *,
        dtype: str = "bfloat16",
        state_dtype: str = "float32",
        layout: str = "vk",
        capacity: int = 16,
        stagger: bool = False,
        l2norm: bool = True,
        decay: tuple[float, float] = (-4.0, 0.0),
        seed: int = 0,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.H, self.HV, self.K, self.V, self.dtype, self.layout, self.l2norm = H, HV, K, V, dtype, layout, l2norm
        self.A_log = self.rng.uniform(*decay, HV).astype(np.float32)
        self.dt_bias = self.rng.standard_normal(HV).astype(np.float32)
        states = self.rng.standard_normal((num_slots, HV, K, V)) * 0.1
        pool = (states if layout == "kv" else states.swapaxes(-1, -2)).astype(numpy_dtype(state_dtype))
        self.states = self.as_kv(pool.astype(np.float64))
        self.drafts: dict[int, list[np.ndarray]] = {}
        self.pool = self.put(pool)
        self.gates = {"A_log": self.put(self.A_log), "dt_bias": self.put(self.dt_bias)}
        self.ring = cuda_ring.Ring(self.pool, layout, H, capacity, stagger)

    def as_kv(self, states: Any) -> np.ndarray:
        return np.array(states if self.layout == "kv" else states.swapaxes(-1, -2), np.float64)

    def tokens(self, N: int, T: int = 1) -> dict[str, np.ndarray]:
        shapes = dict.fromkeys("qk", (N, T, self.H, self.K)) | {"v": (N, T, self.HV, self.V)}
        x = {name: self.rng.standard_normal(shape).astype(numpy_dtype(self.dtype)) for name, shape in shapes.items()}
        if not self.l2norm:
            x["k"] = (x["k"] / self.K**0.5).astype(x["k"].dtype)
        x |= {name: self.rng.standard_normal((N, T, self.HV)).astype(np.float32) for name in "ab"}
        return x

    def call(self, x: dict[str, Any], slots: Any, parents: Any = None, draft: bool = False, out: Any = None) -> Any:
        """Run tokens that are on the device."""
        operands = {**self.gates, "out": out, **x}
        operands |= {"initial_state": self.pool, "initial_slots": slots, "final_state": self.pool, "final_slots": slots}
        form = Form("fused_recurrent", (*TOKENS, *RAW_GATES))
        call = _inputs.prepare(form, tuple(map(operands.get, OPERANDS)), l2norm=self.l2norm, layout=self.layout)
        call.ring, call.draft, call.parents = self.ring, draft, parents
        (cuda_ring.verify if draft else cuda_ring.run)(call)
        return call.out

    def one(self, h: np.ndarray, x: dict[str, np.ndarray], n: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """One token of sequence n from state h [HV, K, V], by the formulas."""
        q, k, v, a, b = (x[name][n, t].astype(np.float64) for name in "qkvab")
        if self.l2norm:
            q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        q, k = (np.repeat(y, self.HV // self.H, 0) for y in (q * self.K**-0.5, k))
        g = -np.exp(self.A_log.astype(np.float64)) * np.logaddexp(0, a + self.dt_bias)
        h = h * np.exp(g)[:, None, None]
        u = (v - np.einsum("hkv,hk->hv", h, k)) / (1 + np.exp(-b))[:, None]
        h = h + k[:, :, None] * u[:, None, :]
        return h, np.einsum("hkv,hk->hv", h, q)

    def run(self, slots: Any, T: int = 1, parents: Any = None, draft: bool = False) -> None:
        """Run fresh tokens on the device and in float64, and compare the outputs."""
        slots = np.asarray(slots, np.int32)
        x = self.tokens(len(slots), T)
        out = self.put(np.full_like(x["v"], np.nan))
        there = None if parents is None else self.put(parents)
        self.call({name: self.put(y) for name, y in x.items()}, self.put(slots), there, draft, out)
        want = np.zeros(x["v"].shape)
        for n, slot in enumerate(slots):
            if not 0 <= slot < len(self.states):
                continue
            made: list[np.ndarray] = []
            for t in range(T):
                parent = t - 1 if parents is None else int(parents[n, t])
                h, want[n, t] = self.one(self.states[slot] if parent < 0 else made[parent], x, n, t)
                made.append(h)
            self.drafts.pop(int(slot), None)
            if draft:
                self.drafts[int(slot)] = made
            else:
                self.states[slot] = made[0]
        got = to_numpy(out).astype(np.float64)
        live = (slots >= 0) & (slots < len(self.states))
        assert not got[~live].any()
        if live.any():
            assert relative_rms(got[live], want[live]) <= self.output_limit

    @property
    def output_limit(self) -> float:
        return max(OUTPUT[self.dtype], STATE[self.pool.dtype.name])

    def commit(self, slots: Any, accepted: Any) -> None:
        slots, accepted = np.asarray(slots, np.int32), np.asarray(accepted, np.int32)
        cuda_ring.commit(self.ring, self.put(slots), self.put(accepted))
        for slot, kept in zip(slots.tolist(), accepted):
            made = self.drafts.pop(slot, None)
            if made is None:
                continue
            if kept > 0:
                self.states[slot] = made[min(int(kept), len(made)) - 1]

    def check(self, limit: float | None = None) -> None:
        """Compare the states of all slots, as `read` sees them, which changes nothing."""
        before = [to_numpy(x) for x in (self.pool, self.ring.fills)]
        got = self.as_kv(to_numpy(cuda_ring.read(self.ring, self.put(np.arange(len(self.states))))).astype(np.float64))
        limit = STATE[self.pool.dtype.name] if limit is None else limit
        assert relative_rms(got, self.states) <= limit
        for slot in range(len(self.states)):
            assert relative_rms(got[slot], self.states[slot]) <= 2 * limit, slot
        for x, was in zip((self.pool, self.ring.fills), before):
            same_bits(x, was)


def same_bits(got: Any, want: Any) -> None:
    got, want = (np.ascontiguousarray(to_numpy(x)) for x in (got, want))
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


def different_fills(pool: Pool) -> None:
    """Leave every slot with another number of pending tokens."""
    slots = np.arange(len(pool.states))
    for i in range(len(slots)):
        pool.run(slots[i:])


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps(layout: str, dtype: str, state_dtype: str) -> None:
    pool = Pool(layout=layout, dtype=dtype, state_dtype=state_dtype)
    different_fills(pool)
    pool.check()
    for i in range(40):
        pool.run(pool.rng.permutation(9)[: 1 + i % 9])
    pool.check()
    cuda_ring.fold(pool.ring)
    assert not to_numpy(pool.ring.fills)[:, 0].any()
    pool.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (16, 16), (32, 8), (33, 130), (64, 64), (64, 128), (100, 36), (192, 256), (256, 256)]
)
def test_shapes(layout: str, shape: tuple[int, int]) -> None:
    for state_dtype, dtype, H, HV in (("float32", "bfloat16", 3, 9), ("bfloat16", "float32", 1, 2)):
        pool = Pool(5, H, HV, *shape, layout=layout, dtype=dtype, state_dtype=state_dtype)
        different_fills(pool)
        for T in (3, 16, 1, 7):
            slots = pool.rng.permutation(5)[:4]
            pool.run(slots, T, draft=True)
            pool.commit(slots, pool.rng.integers(0, T + 1, 4))
            for _ in range(5):
                pool.run(slots)
        pool.check()


@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 32])
@pytest.mark.parametrize("stagger", [False, True])
def test_capacities(capacity: int, stagger: bool) -> None:
    pool = Pool(7, capacity=capacity, stagger=stagger)
    folds = np.zeros(7, int)
    before = np.zeros(7, int)
    for i in range(2 * capacity):
        pool.run(pool.rng.permutation(7))
        fill = to_numpy(pool.ring.fills)[:, 0] & 0xFF
        folds += fill < before + 1
        before = fill
        first = 1 + np.arange(7) % capacity if stagger else np.full(7, capacity)
        assert (folds == (i + 1 >= first) * (1 + (i + 1 - first) // capacity)).all()
    pool.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding(layout: str) -> None:
    pool = Pool(layout=layout)
    for _ in range(20):
        pool.run([4, -1, 8, 9, 0, -7, 1 << 30])
    untouched = [1, 2, 3, 5, 6, 7]
    assert not to_numpy(pool.ring.fills)[untouched].any()
    pool.run([4, -1, 8, 9, 0], T=5, draft=True)
    pool.commit([4, -1, 8, 9, 0], [5, 5, 0, 1, 3])
    pool.check()
    states = to_numpy(cuda_ring.read(pool.ring, device(np.array([2, -1, 9, 4]))))
    assert not states[1:3].astype(np.float32).any()
    cuda_ring.fold(pool.ring, device(np.array([-1, 9, 4])))
    cuda_ring.forget(pool.ring, device(np.array([-3, 11])))
    cuda_ring.rollback(pool.ring, device(np.array([-3, 11])))
    pool.check()


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts(layout: str, dtype: str, state_dtype: str) -> None:
    pool = Pool(layout=layout, dtype=dtype, state_dtype=state_dtype)
    different_fills(pool)
    for T in range(1, 17):
        slots = pool.rng.permutation(9)
        pool.run(slots, T, draft=True)
        pool.check()  # nothing is committed, and readers leave the drafts alone
        pool.commit(slots, pool.rng.integers(0, T + 1, 9))
        if T % 3 == 0:
            pool.run(slots[:5])
    pool.check()


def test_every_fill_and_every_number_of_accepted_drafts() -> None:
    pool = Pool(17)
    different_fills(pool)
    for n in range(9):
        slots = pool.rng.permutation(17)
        pool.run(slots, 8, draft=True)
        pool.commit(slots, np.full(17, n))
        pool.check()
        pool.run(slots[: 3 * n % 17 + 1])
        pool.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_trees(layout: str, state_dtype: str) -> None:
    pool = Pool(layout=layout, state_dtype=state_dtype)
    different_fills(pool)
    for T in (2, 5, 8, 13, 16):
        slots = pool.rng.permutation(9)
        parents = np.array([[int(pool.rng.integers(-1, t)) if t else -1 for t in range(T)] for _ in slots])
        pool.run(slots, T, parents.astype(np.int32 if T % 2 else np.int64), draft=True)
        pool.commit(slots, pool.rng.integers(0, T + 1, 9))
        pool.check()
        pool.run(slots)
    pool.check()


def test_drafts_that_lie_touch_nothing_outside() -> None:
    pool = Pool(3)
    slots = device(np.array([0, 2]))
    x = {name: device(y) for name, y in pool.tokens(2, 4).items()}
    out = pool.call(x, slots, device(np.array([[-9, 7, 1, 1 << 30], [0, 1, 2, 3]], np.int64)), draft=True)
    assert np.isfinite(to_numpy(out).astype(np.float32)).all()
    for accepted in ([1 << 40, -5], [3, 5], [4, -(1 << 40)]):
        pool.call(x, slots, draft=True)
        cuda_ring.commit(pool.ring, slots, device(np.array(accepted)))
        fills = to_numpy(pool.ring.fills)
        assert (fills[:, 0] & 0xFF <= 16).all()
        assert not (fills[:, 0] >> 16 & 0xFF).any()
        assert not fills[1].any()
        cuda_ring.commit(pool.ring, slots, device(np.array([3, 3])))  # there are no drafts any more
        same_bits(pool.ring.fills, fills)
    assert np.isfinite(to_numpy(cuda_ring.read(pool.ring, slots))).all()


def test_what_ends_drafts() -> None:
    pool = Pool(6)
    slots = np.arange(6)
    pool.run(slots, 4, draft=True)
    cuda_ring.rollback(pool.ring, device(slots[:1]))
    pool.drafts.pop(0)
    pool.run([1])
    cuda_ring.fold(pool.ring, device(slots[2:3]))
    pool.drafts.pop(2)
    cuda_ring.forget(pool.ring, device(slots[3:4]))
    pool.drafts.pop(3)
    pool.run([4], 2, draft=True)
    pool.commit(slots, np.full(6, 2))
    pool.check()


def test_copies_go_on_with_the_same_bits() -> None:
    pool = Pool(6, state_dtype="bfloat16")
    pool.run([0, 1], 6, draft=True)
    pool.commit([0, 1], [5, 2])
    pool.run([0, 1], 3, draft=True)
    cuda_ring.copy(pool.ring, device(np.array([0, 1])), device(np.array([4, 2])))
    x = {name: device(np.repeat(y, 2, 0)) for name, y in pool.tokens(1).items()}
    for _ in range(20):
        out = pool.call(x, device(np.array([0, 4])))
        same_bits(out[0], out[1])
    same_bits(pool.pool[0], pool.pool[4])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 5])
def test_batch_strides_and_slots_do_not_show(layout: str, state_dtype: str, T: int) -> None:
    N, options = 72, {"layout": layout, "state_dtype": state_dtype, "seed": 3}
    pools = [Pool(N, **options) for _ in range(4)]
    for pool in pools[1:]:
        pool.pool[...] = pools[0].pool
    order = pools[0].rng.permutation(N)
    for _ in range(20):
        x = {name: device(y) for name, y in pools[0].tokens(N, T).items()}
        outs = []
        for pool, parts in zip(pools, ((0, N), (0, 1, 3, 30, N), (0, N), (0, N))):
            draft = T > 1
            if pool is pools[2]:  # rows in another order
                y = {name: z[device(order)] for name, z in x.items()}
                out = pool.call(y, device(order.astype(np.int64)), draft=draft)
                outs.append(out[device(np.argsort(order))])
            elif pool is pools[3]:  # with gaps, and off alignment
                y = {name: spread(z) for name, z in x.items()}
                outs.append(pool.call(y, device(np.arange(N)), draft=draft))
            else:
                made = [
                    pool.call({name: z[i:j] for name, z in x.items()}, device(np.arange(i, j)), draft=draft)
                    for i, j in itertools.pairwise(parts)
                ]
                outs.append(np.concatenate([to_numpy(z) for z in made]))
            if draft:
                cuda_ring.commit(pool.ring, device(np.arange(N)), device(np.arange(N) % (T + 1)))
        for out in outs[1:]:
            same_bits(out, outs[0])
    for pool in pools[1:]:
        same_bits(pool.pool, pools[0].pool)
        same_bits(pool.ring.fills, pools[0].ring.fills)


def spread(x: Any) -> Any:
    """The same array with gaps between rows, begun off alignment."""
    import cupy

    room = cupy.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    view = room[..., 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_give_the_same_bits(layout: str) -> None:
    want: list[Any] = []
    for _ in range(30):
        pool = Pool(layout=layout, dtype="float16", state_dtype="float16", seed=5)
        slots = device(np.arange(9))
        got: list[Any] = []
        for T in (1, 8, 1, 8, 1):
            out = pool.call({k: device(y) for k, y in pool.tokens(9, T).items()}, slots, draft=T > 1)
            got.append(to_numpy(out))
            if T > 1:
                cuda_ring.commit(pool.ring, slots, device(np.arange(9) % 9))
        got += [to_numpy(cuda_ring.read(pool.ring, slots)), to_numpy(pool.ring.fills), to_numpy(pool.ring.gates)]
        want = want or got
        for x, y in zip(got, want):
            same_bits(x, y)


@pytest.mark.parametrize("T", [1, 4])
def test_graphs(T: int) -> None:
    import cupy

    pools = [Pool(6, seed=7, capacity=5) for _ in range(2)]
    x = {name: device(y) for name, y in pools[0].tokens(5, T).items()}
    slots, accepted = device(np.array([3, -1, 0, 5, 1])), device(np.array([1, 2, 3, 4, 0]))
    outs = [cupy.zeros_like(x["v"]) for _ in pools]

    def work(pool: Pool, out: Any) -> None:
        pool.call(x, slots, draft=T > 1, out=out)
        if T > 1:
            cuda_ring.commit(pool.ring, slots, accepted)

    for pool, out in zip(pools, outs):
        work(pool, out)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        work(pools[1], outs[1])
        graph = stream.end_capture()
        for _ in range(23):
            graph.launch()
            work(pools[0], outs[0])
    stream.synchronize()
    same_bits(outs[0], outs[1])
    same_bits(pools[0].pool, pools[1].pool)
    same_bits(pools[0].ring.fills, pools[1].ring.fills)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_float32_state_keeps_its_accuracy(layout: str) -> None:
    pool = Pool(2, 4, 8, layout=layout)
    for _ in range(1000):
        x = pool.tokens(2)
        pool.call({name: device(y) for name, y in x.items()}, device(np.array([0, 1])))
        for n in range(2):
            pool.states[n] = pool.one(pool.states[n], x, n, 0)[0]
    pool.check(2e-7)


@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("decay", [(-20.0, -10.0), (2.0, 4.0), (40.0, 88.0)])
def test_extreme_gates(decay: tuple[float, float], l2norm: bool) -> None:
    for layout in LAYOUTS:
        pool = Pool(layout=layout, decay=decay, l2norm=l2norm, dtype="float32")
        different_fills(pool)
        for T in (4, 16):
            pool.run(np.arange(9), T, draft=True)
            pool.commit(np.arange(9), np.arange(9) % T)
        pool.check()


def test_a_token_that_forgets_everything() -> None:
    pool = Pool(1, 1, 1)
    x = {name: device(y) for name, y in pool.tokens(1, 8).items()}
    x["a"][0, 3] = np.inf  # its log decay is -inf
    one = Pool(1, 1, 1)
    one.pool[...] = 5
    for t in range(8):
        pool.call({name: y[:, t : t + 1] for name, y in x.items()}, device(np.array([0])))
        if t >= 3:  # what was before has no part in it
            one.call({name: y[:, t : t + 1] for name, y in x.items()}, device(np.array([0])))
    slot = device(np.array([0]))
    got, want = (to_numpy(cuda_ring.read(p.ring, slot)).astype(np.float64) for p in (pool, one))
    assert np.isfinite(got).all()
    assert relative_rms(got, want) <= 4e-7
    out = pool.call(x, slot, draft=True)
    assert np.isfinite(to_numpy(out).astype(np.float32)).all()


def test_no_kernel_of_the_usual_head_size_spills() -> None:
    for layout in LAYOUTS:
        for state_dtype in DTYPES:
            for N in (1, 30, 200):
                pool = Pool(N, layout=layout, state_dtype=state_dtype)
                slots = device(np.arange(N))
                for T in (1, 2):
                    pool.call({k: device(y) for k, y in pool.tokens(N, T).items()}, slots, draft=T > 1)
                cuda_ring.fold(pool.ring)
    kernels = [k for k in loader._kernels.values() if k.stem.startswith("ring") and k.defines.get("GDR_K") == 128]
    aligned = [k for k in kernels if k.defines["GDR_ALIGNED_STATES"] and k.defines["GDR_ALIGNED_TOKENS"]]
    assert len(aligned) >= 12
    assert [kernel for kernel in aligned if kernel.local_bytes] == []
