"""DeltaRuleState against a model: a plain dict of float64 states, under any order of operations and
faults."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from places import assert_same_bits, fail_runs

from gdr import DeltaRuleState, reference
from gdr.testing import assert_close, make_inputs

NUM_SLOTS, H, HV, K, V = 7, 1, 2, 4, 3


class Fault(Exception):
    pass


def one_sequence(x, n):
    """Row n of a problem as a batch of one."""
    return replace(x, **{name: getattr(x, name)[n : n + 1] for name in ("q", "k", "v", "a", "b")})


def path_to(parents, t):
    """The drafts from the state to draft t."""
    path = []
    while t >= 0:
        path.insert(0, int(t))
        t = parents[t]
    return path


class StatePool(RuleBasedStateMachine):
    """Every operation, done to the pool and to the model; the pool may be off by rounding alone."""

    place = None
    operations = 0

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "pool"
        self.file = None

    def teardown(self):
        self.directory.cleanup()

    @initialize(
        layout=st.sampled_from(["kv", "vk"]),
        dtype=st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
        ring=st.sampled_from([None, 0, 1, 3, 16]),
        stagger=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(self, layout, dtype, ring, stagger, seed):
        x = make_inputs(H=H, HV=HV, K=K, V=V, seed=seed)
        self.layout, self.dtype = layout, dtype
        self.A_log, self.dt_bias = x.A_log, x.dt_bias
        self.state = DeltaRuleState(
            NUM_SLOTS,
            HV,
            K,
            V,
            num_k_heads=H,
            A_log=self.place.put(x.A_log),
            dt_bias=self.place.put(x.dt_bias),
            layout=layout,
            dtype=dtype,
            ring=ring,
            stagger=stagger,
            device="cpu" if self.place.on_host else "cuda",
        )
        self.model = {}
        self.drafts = {}  # by slot: tokens of one sequence, and the parent of each
        # A 16-bit state is rounded at every write, and the model is not: what may differ grows with each.
        self.rtol = {"float32": 2e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]

    def zeros(self):
        return np.zeros((HV, K, V) if self.layout == "kv" else (HV, V, K))

    def read(self, slot):
        return self.place.get(self.state.read([slot]))[0].astype(np.float64)

    def read_all(self):
        return np.stack([self.read(slot) for slot in sorted(self.model)] or [self.zeros()])

    def one_slot(self, data):
        return data.draw(st.sampled_from(sorted(self.model)))

    def drop_drafts(self, slots):
        for slot in slots:
            self.drafts.pop(int(slot), None)

    # -- bookkeeping

    @rule(n=st.integers(0, 3))
    def alloc(self, n):
        free = NUM_SLOTS - len(self.model)
        if n > free:
            with pytest.raises(ValueError, match=rf"{n}.*\b{free}\b"):
                self.state.alloc(n)
            return
        new = [int(slot) for slot in self.state.alloc(n)]
        assert len(set(new)) == n
        assert not set(new) & self.model.keys()
        for slot in new:
            assert not self.read(slot).any()
            self.model[slot] = self.zeros()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        slot = self.one_slot(data)
        self.state.free([slot])
        self.drop_drafts([slot])
        del self.model[slot]
        for method in (self.state.free, self.state.read, self.state.reset, self.state.fork):
            with pytest.raises(ValueError, match="slots"):
                method([slot])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reset(self, data):
        slot = self.one_slot(data)
        self.state.reset([slot])
        self.drop_drafts([slot])
        self.model[slot] = self.zeros()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        slot = self.one_slot(data)
        if len(self.model) == NUM_SLOTS:
            with pytest.raises(ValueError, match="free"):
                self.state.fork([slot])
            return
        (new,) = self.state.fork([slot])
        assert int(new) not in self.model
        assert_same_bits(self.read(new), self.read(slot))
        self.model[int(new)] = self.model[slot].copy()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def write(self, data, seed):
        slot = self.one_slot(data)
        h = np.random.default_rng(seed).normal(size=(1, *self.zeros().shape)).astype(np.float32)
        self.state.write([slot], self.place.put(h))
        self.drop_drafts([slot])
        self.model[slot] = self.read(slot)
        assert_close(self.model[slot], h[0], rtol=4e-3)

    # -- running

    def run_model(self, x, order, cu_seqlens=None):
        """Outputs of the reference; the model's states go on."""
        pool = np.stack([self.model.get(slot, self.zeros()) for slot in range(NUM_SLOTS)])
        o, pool = reference.fused_sigmoid_gating_delta_rule_update(
            self.A_log, x.a, self.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, order, None, True, cu_seqlens,
            state_layout=self.layout,
        )  # fmt: skip
        for slot in order:
            if slot >= 0:
                self.model[int(slot)] = pool[slot]
        return o

    def operands(self, x):
        return [self.place.put(y) for y in (x.q, x.k, x.v, x.a, x.b)]

    def some_slots(self, data):
        live = sorted(self.model)
        chosen = data.draw(st.permutations(live)) if live else []
        chosen = list(chosen)[: data.draw(st.integers(0, len(live)))]
        for at in data.draw(st.lists(st.integers(0, len(chosen)), max_size=2)):
            chosen.insert(at, -1)
        return np.array(chosen, np.int32)

    @rule(data=st.data(), seed=st.integers(0, 999), gates=st.sampled_from(["ordinary", "slow", "fast"]))
    def step(self, data, seed, gates):
        order = self.some_slots(data)
        x = make_inputs(B=len(order), T=1, H=H, HV=HV, K=K, V=V, gates=gates, normalize=False, seed=seed)
        o = self.state.step(*self.operands(x), order)
        assert_close(self.place.get(o), self.run_model(x, order), rtol=self.rtol, name="o of step")
        self.drop_drafts(order)

    @rule(data=st.data(), seed=st.integers(0, 999), scale=st.sampled_from([1, 1, 30]))
    def prefill(self, data, seed, scale):
        order = self.some_slots(data)
        lengths = [scale * data.draw(st.integers(0, 4)) for _ in order]
        x = make_inputs(lengths=lengths, H=H, HV=HV, K=K, V=V, normalize=False, seed=seed)
        o = self.state.prefill(*self.operands(x), order, self.place.put(x.cu_seqlens))
        want = self.run_model(x, order, x.cu_seqlens)
        assert_close(self.place.get(o), want, rtol=self.rtol, name="o of prefill")
        self.drop_drafts(order)

    @rule(data=st.data())
    def flush(self, data):
        chosen = data.draw(st.sampled_from(["some", "all", "by looking at the pool"]))
        if chosen == "some":
            order = self.some_slots(data)
            self.state.flush(order)
            self.drop_drafts(order)
            return
        if chosen == "all":
            self.state.flush()
        pool = self.place.get(self.state.pool)
        self.drafts = {}
        for slot in self.model:
            assert_same_bits(pool[slot], self.place.get(self.state.read([slot]))[0])

    @rule(data=st.data(), seed=st.integers(0, 999), T=st.sampled_from([1, 2, 3, 5, 16]), tree=st.booleans())
    def verify(self, data, seed, T, tree):
        order = self.some_slots(data)
        x = make_inputs(B=len(order), T=T, H=H, HV=HV, K=K, V=V, normalize=False, seed=seed)
        rng = np.random.default_rng(seed)
        parents = np.tile(np.arange(-1, T - 1), (len(order), 1))
        if tree:
            parents = rng.integers(-1, np.arange(T), size=parents.shape)
        o = self.place.get(self.state.verify(*self.operands(x), order, parents if tree else None))
        self.drop_drafts(order)
        for n, slot in enumerate(order):
            if slot < 0:
                assert not o[n].any()
                continue
            self.drafts[int(slot)] = one_sequence(x, n), parents[n]
            t = int(rng.integers(T))
            want, _ = self.run_path(int(slot), path_to(parents[n], t))
            assert_close(o[n, t], want[-1], rtol=self.rtol, name=f"o of draft {t}")

    def run_path(self, slot, path):
        """Outputs of the reference along a path of a slot's drafts, and the state after it."""
        x, _ = self.drafts[slot]
        tokens = [y[:, path] for y in (x.q, x.k, x.v)]
        o, h = reference.fused_sigmoid_gating_delta_rule_update(
            self.A_log, x.a[:, path], self.dt_bias, 1.0, 20.0, *tokens, x.b[:, path], self.model[slot][None],
            np.zeros(1, int), None, True, state_layout=self.layout,
        )  # fmt: skip
        return o[0], h[0]

    @rule(data=st.data(), as_counts=st.booleans())
    def commit(self, data, as_counts):
        order = self.some_slots(data)
        paths = []
        for slot in order.tolist():
            _, parents = self.drafts.get(slot, (None, np.zeros(0, int)))
            paths.append(path_to(parents, data.draw(st.integers(-1, len(parents) - 1))))
        accepted = np.full((len(order), max(map(len, paths), default=0)), -1)
        for row, path in zip(accepted, paths):
            row[: len(path)] = path
        self.state.commit(
            order, np.array([1 + max(path, default=-1) for path in paths], int) if as_counts else accepted
        )
        for slot, path in zip(order.tolist(), paths):
            if path:
                _, self.model[slot] = self.run_path(slot, path)
        self.drop_drafts(order)

    @rule(data=st.data())
    def rollback(self, data):
        order = self.some_slots(data)
        self.state.rollback(order)
        self.drop_drafts(order)

    @precondition(lambda self: self.model and self.place.on_host)
    @rule(data=st.data(), more=st.integers(1, 3))
    def commit_too_many(self, data, more):
        slot = self.one_slot(data)
        count = len(self.drafts.get(slot, (None, ()))[1])
        with pytest.raises(ValueError, match="accepted"):
            self.state.commit([slot], [count + more])
        with pytest.raises(ValueError, match="accepted"):
            self.state.commit([slot], [[count + more - 1]])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), seed=st.integers(0, 999))
    def refused(self, data, seed):
        live = sorted(self.model)
        order = data.draw(
            st.sampled_from(
                [
                    [*live, live[0]],
                    [live[0], NUM_SLOTS],
                    [next((s for s in range(NUM_SLOTS) if s not in self.model), NUM_SLOTS)],
                ]
            )
        )
        x = make_inputs(B=len(order), T=1, H=H, HV=HV, K=K, V=V, seed=seed)
        before = self.read_all()
        for method in (self.state.step, self.state.verify):
            with pytest.raises((ValueError, IndexError), match="slots"):
                method(*self.operands(x), np.array(order))
        assert_same_bits(self.read_all(), before)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), method=st.sampled_from(["step", "prefill", "verify"]))
    def fault_inside_a_run(self, data, method):
        order = self.some_slots(data)
        x = make_inputs(B=len(order), T=1, H=H, HV=HV, K=K, V=V)
        before = self.read_all()

        def fail(*args):
            raise Fault

        with pytest.MonkeyPatch.context() as patch:
            fail_runs(patch, fail)
            with pytest.raises(Fault):
                getattr(self.state, method)(*self.operands(x), order)
        got = self.read_all()
        if method == "prefill":  # what was pending may have been written, and is rounded then
            assert_close(got, before, rtol=self.rtol)
        else:
            assert_same_bits(got, before)
        self.state.rollback(order)  # whether the drafts are still there is not said
        self.drop_drafts(order)

    # -- files and devices

    @rule()
    def save(self):
        self.state.save(self.path)
        self.file = {slot: h.copy() for slot, h in self.model.items()}

    @rule(name=st.sampled_from(["os.replace", "os.fsync"]))
    def failing_save(self, name):
        before = self.path.read_bytes() if self.file is not None else None
        with pytest.MonkeyPatch.context() as patch:

            def fail(*args, **kwargs):
                raise OSError(28, "No space left on device")

            patch.setattr(name, fail)
            with pytest.raises(OSError, match="No space left"):
                self.state.save(self.path)
        files = list(self.path.parent.iterdir())
        assert files == ([] if before is None else [self.path])
        assert before is None or self.path.read_bytes() == before

    @precondition(lambda self: self.file is not None)
    @rule()
    def load(self):
        self.state = DeltaRuleState.load(self.path, device=self.state.device)
        self.model = {slot: h.copy() for slot, h in self.file.items()}
        self.drafts = {}

    @precondition(lambda self: self.file is not None)
    @rule(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def load_a_damaged_file(self, at, bit):
        content = bytearray(self.path.read_bytes())
        content[int(at * len(content))] ^= 1 << bit
        damaged = self.path.with_name("damaged")
        damaged.write_bytes(content)
        try:
            loaded = DeltaRuleState.load(damaged, device=self.state.device)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:
            assert loaded.num_free == NUM_SLOTS - len(self.file)
            for slot, h in self.file.items():
                assert_close(self.place.get(loaded.read([slot]))[0], h, rtol=self.rtol)
        finally:
            damaged.unlink()

    @rule()
    def move(self):
        self.state = self.state.to(self.state.device)

    # -- what holds after every operation

    @invariant()
    def the_pool_is_the_model(self):
        if not hasattr(self, "state"):
            return
        type(self).operations += 1
        assert self.state.num_free == NUM_SLOTS - len(self.model)
        assert f"{self.state.num_free} free" in repr(self.state)
        for slot, want in self.model.items():
            got = self.read(slot)
            assert np.abs(got - want).max() <= self.rtol * max(1.0, np.abs(want).max()), f"state of slot {slot}"


def test_any_sequence_of_operations(place):
    machine = type("Machine", (StatePool,), {"place": place})
    run_state_machine_as_test(machine, settings=settings())
