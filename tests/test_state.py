"""DeltaRuleState: bookkeeping, stepping, files, threads and faults."""

from __future__ import annotations

import gc
import io
import signal
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
from places import RTOL, RTOL_CHUNK, Place, assert_same_bits, fail_runs, raw

from gdr import DeltaRuleState, _arrays, reference
from gdr.testing import assert_close, make_inputs

H, HV, K, V = 2, 4, 6, 5
# For what does not depend on the backend.
HOST = Place("numpy")


def make(place, x, num_slots=8, **options):
    """A pool for the heads and gate parameters of a problem."""
    return DeltaRuleState(
        num_slots,
        x.v.shape[2],
        x.q.shape[3],
        x.v.shape[3],
        num_k_heads=x.q.shape[2],
        A_log=place.put(x.A_log),
        dt_bias=place.put(x.dt_bias),
        device="cpu" if place.on_host else "cuda",
        **options,
    )


def problem(**sizes):
    return make_inputs(**({"B": 3, "T": 1, "H": H, "HV": HV, "K": K, "V": V} | sizes))


def tokens(place, x):
    return [place.put(y) for y in (x.q, x.k, x.v, x.a, x.b)]


def fill(place, state, slots, seed=0):
    """Write random states to slots; return them."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(len(slots), *state.pool.shape[1:])).astype(np.float32)
    h = h.astype(make_inputs(dtype=state.dtype).q.dtype)
    state.write(slots, place.put(h))
    return h


def random_tree(n, T, seed):
    """Parents of n sequences of drafts."""
    return np.random.default_rng(seed).integers(-1, np.arange(T), size=(n, T))


class Frozen:
    """Everything of a pool that a refused call must not change."""

    def __init__(self, place, state):
        self.place, self.state = place, state
        self.pool, self.num_free, self.text = place.get(state.pool), state.num_free, repr(state)

    def check(self):
        assert_same_bits(self.place.get(self.state.pool), self.pool, "pool")
        assert self.state.num_free == self.num_free
        assert repr(self.state) == self.text


@pytest.fixture
def pool(place):
    """A pool of eight with slots taken by three sequences."""
    state = make(place, problem())
    slots = state.alloc(3)
    fill(place, state, slots)
    return state, slots


# -- bookkeeping
# ------------------------------------------------------------------------------------------------------


def test_alloc_hands_out_different_slots_of_zeros(place):
    state = make(place, problem())
    one, many, none = state.alloc(), state.alloc(5), state.alloc(0)
    assert one.dtype == many.dtype == none.dtype == np.int32
    assert (one.shape, many.shape, none.shape) == ((1,), (5,), (0,))
    taken = [*one, *many]
    assert len(set(taken)) == 6
    assert all(0 <= slot < 8 for slot in taken)
    assert state.num_free == 2
    assert not place.get(state.read(taken)).any()


def test_a_slot_that_is_handed_out_again_starts_from_zero(place):
    state = make(place, problem(), num_slots=3)
    for use in ("write", "step", "prefill", "fork"):
        slots = state.alloc(3)
        assert not place.get(state.read(slots)).any()
        x = problem()
        if use == "write":
            fill(place, state, slots)
        elif use == "step":
            state.step(*tokens(place, x), slots)
        elif use == "prefill":
            state.prefill(*tokens(place, problem(T=30)), slots)
        else:
            fill(place, state, slots[:1])
            state.free(slots[1:])
            slots = np.append(slots[:1], state.fork(slots[:1]))
        assert place.get(state.read(slots)).any(axis=(1, 2, 3)).all()
        state.free(slots)
        assert state.num_free == 3


def test_an_exhausted_pool_says_what_was_asked_and_what_is_free(place, pool):
    state, slots = pool
    frozen = Frozen(place, state)
    for ask in (lambda: state.alloc(6), lambda: state.fork([*slots, *slots])):
        with pytest.raises(ValueError, match=r"6.*\b5\b"):
            ask()
        frozen.check()
    assert len(state.alloc(5)) == 5
    with pytest.raises(ValueError, match=r"1.*\b0\b"):
        state.alloc()


@pytest.mark.parametrize("n", [-1, 1.0, "2", None, True])
def test_wrong_counts_are_refused(host, n):
    state = make(host, problem())
    with pytest.raises((TypeError, ValueError), match=r"\bn\b"):
        state.alloc(n)
    assert state.num_free == 8


def bad_slots(slots):
    free = next(s for s in range(8) if s not in slots)
    return [
        ([free], ValueError),
        ([slots[0], free], ValueError),
        ([slots[0], 8], IndexError),
        ([slots[0], -9], IndexError),
        (np.array([slots[0], 2**40]), IndexError),
        ([0.5], TypeError),
        (np.array([True]), TypeError),
        ("0", TypeError),
        (None, TypeError),
        (np.array([[slots[0]]]), ValueError),
    ]


def test_wrong_slots_are_refused_and_nothing_changes(place, pool):
    state, slots = pool
    frozen = Frozen(place, state)
    for wrong, error in bad_slots(slots):
        n = np.size(wrong) if wrong is not None else 1
        h = place.put(np.zeros((n, *state.pool.shape[1:]), np.float32))
        for method in (state.free, state.reset, state.read, state.fork, lambda s, h=h: state.write(s, h)):
            with pytest.raises(error, match="slots"):
                method(wrong)
            frozen.check()


def test_double_free_is_refused(place, pool):
    state, slots = pool
    frozen = Frozen(place, state)
    with pytest.raises(ValueError, match="slots"):
        state.free([slots[0], slots[1], slots[0]])
    frozen.check()
    state.free(slots[:1])
    frozen = Frozen(place, state)
    for again in (slots[:1], slots):
        with pytest.raises(ValueError, match=rf"slots.*\b{slots[0]}\b"):
            state.free(again)
        frozen.check()


def test_slots_are_integers_sequences_or_arrays(host):
    state = make(host, problem())
    slots = state.alloc(2)
    h = fill(host, state, slots)
    for form in (slots, slots.tolist(), tuple(slots), slots.astype(np.int64), slots.astype(np.uint8)):
        assert_same_bits(state.read(form), h)
    assert_same_bits(state.read(int(slots[1])), h[1:])
    assert state.read([]).shape == (0, HV, K, V)
    state.free([])
    state.reset([])
    assert state.fork([]).shape == (0,)


def test_reset(place, pool):
    state, slots = pool
    h = place.get(state.read(slots))
    state.reset(slots[1:2])
    got = place.get(state.read(slots))
    assert not got[1].any()
    assert_same_bits(got[[0, 2]], h[[0, 2]])


def test_fork_copies(place, pool):
    state, slots = pool
    h = place.get(state.read(slots))
    new = state.fork([slots[2], slots[0], slots[2]])
    assert new.dtype == np.int32
    assert not set(new) & set(slots)
    assert_same_bits(place.get(state.read(new)), h[[2, 0, 2]])
    state.reset(new)
    assert_same_bits(place.get(state.read(slots)), h)
    assert state.num_free == 2


def test_read_is_a_copy_and_write_is_too(place, pool):
    state, slots = pool
    h = state.read(slots)
    before = place.get(h)
    h[...] = 7
    assert_same_bits(place.get(state.read(slots)), before)
    state.write(slots, h)
    h[...] = 9
    assert (place.get(state.read(slots)) == 7).all()


def test_read_may_repeat_slots_and_write_may_not(place, pool):
    state, slots = pool
    twice = [slots[0], slots[0]]
    h = state.read(twice)
    assert_same_bits(place.get(h)[0], place.get(h)[1])
    frozen = Frozen(place, state)
    with pytest.raises(ValueError, match="slots"):
        state.write(twice, h)
    frozen.check()


def test_write_refuses_what_does_not_fit(place, pool):
    state, slots = pool
    frozen = Frozen(place, state)
    shape = (3, HV, K, V)
    for h, error in [
        (np.zeros((3, HV, V, K), np.float32), ValueError),
        (np.zeros((2, HV, K, V), np.float32), ValueError),
        (np.zeros((1, HV, K, V), np.float32), ValueError),
        (np.zeros((HV, K, V), np.float32), ValueError),
        (np.zeros(shape, np.int32), TypeError),
        (np.zeros(shape, np.complex64), TypeError),
    ]:
        with pytest.raises(error, match=r"\bh\b"):
            state.write(slots, place.put(h))
        frozen.check()
    for h in (0.0, None, np.zeros(shape).tolist()):
        with pytest.raises(TypeError, match=r"\bh\b"):
            state.write(slots, h)
        frozen.check()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_properties(place, dtype, layout):
    state = make(place, problem(), dtype=dtype, layout=layout)
    shape = (8, HV, K, V) if layout == "kv" else (8, HV, V, K)
    assert state.pool.shape == shape
    assert state.pool.dtype.name == dtype == state.dtype
    assert state.nbytes >= state.pool.nbytes == 8 * HV * K * V * state.pool.dtype.itemsize
    assert state.num_free == 8
    text = repr(state)
    for part in ("8", "HV=4", "H=2", "K=6", "V=5", dtype, layout, "cpu" if place.on_host else "cuda"):
        assert part in text
    slots = state.alloc(2)
    h = fill(place, state, slots)
    assert_same_bits(place.get(state.pool)[slots], h)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("num_slots", 0, ValueError),
        ("num_slots", -1, ValueError),
        ("num_slots", 2.0, TypeError),
        ("num_v_heads", 0, ValueError),
        ("num_v_heads", "4", TypeError),
        ("head_k_dim", 257, ValueError),
        ("head_k_dim", 0, ValueError),
        ("head_v_dim", 257, ValueError),
        ("head_v_dim", None, TypeError),
        ("num_k_heads", 3, ValueError),
        ("num_k_heads", 0, ValueError),
        ("num_k_heads", 8, ValueError),
        ("A_log", np.zeros(3), ValueError),
        ("A_log", np.zeros(4, int), TypeError),
        ("A_log", "0", TypeError),
        ("dt_bias", np.zeros((4, 1)), ValueError),
        ("scale", np.nan, ValueError),
        ("scale", "1", TypeError),
        ("use_qk_l2norm", 1, TypeError),
        ("use_qk_l2norm", None, TypeError),
        ("softplus_beta", 0.0, ValueError),
        ("softplus_beta", None, TypeError),
        ("softplus_threshold", np.nan, ValueError),
        ("dtype", "int8", ValueError),
        ("dtype", "float8", (TypeError, ValueError)),
        ("dtype", None, (TypeError, ValueError)),
        ("layout", "hkv", ValueError),
        ("layout", None, ValueError),
        ("device", "tpu", ValueError),
        ("device", "cuda:x", ValueError),
        ("device", None, (TypeError, ValueError)),
        ("ring", -1, ValueError),
        ("ring", 257, ValueError),
        ("ring", 2.0, TypeError),
        ("ring", True, TypeError),
        ("ring", "16", TypeError),
        ("stagger", 1, TypeError),
        ("stagger", None, TypeError),
    ],
)
def test_wrong_parameters_are_refused(argument, value, error):
    parameters = {
        "num_slots": 8,
        "num_v_heads": HV,
        "head_k_dim": K,
        "head_v_dim": V,
        "A_log": np.zeros(HV),
        "dt_bias": np.zeros(HV),
    }
    with pytest.raises(error, match=rf"\b{argument}\b"):
        DeltaRuleState(**(parameters | {argument: value}))


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="num_heads"):
        DeltaRuleState(8, HV, K, V, num_heads=2)


# -- step and prefill
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_step_is_the_recurrence(place, dtype, state_dtype, layout):
    x = problem(B=4, dtype=dtype, normalize=False)
    state = make(place, x, dtype=state_dtype, layout=layout, scale=0.4)
    slots = state.alloc(6)[[5, 0, 3, 2]]
    fill(place, state, slots)
    pool = place.get(state.pool)
    o = state.step(*tokens(place, x), slots)
    want, want_pool = reference.fused_sigmoid_gating_delta_rule_update(
        *raw(x), pool, slots, 0.4, True, state_layout=layout
    )
    assert place.get(o).dtype == x.v.dtype
    assert_close(place.get(o), want, rtol=RTOL[dtype], name="o")
    assert_close(place.get(state.pool), want_pool, rtol=RTOL[state_dtype], name="pool")


def test_parameters_reach_the_recurrence(place):
    x = problem(normalize=True)
    x.A_log -= 4  # above the threshold g may be positive: large ones would magnify their own rounding
    state = make(place, x, use_qk_l2norm=False, softplus_beta=0.5, softplus_threshold=-3.0, scale=-2.0)
    slots = state.alloc(3)
    fill(place, state, slots)
    want, _ = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 0.5, -3.0, *raw(x)[5:], place.get(state.pool), slots, -2.0, False
    )
    assert_close(place.get(state.step(*tokens(place, x), slots)), want, rtol=RTOL["float32"])


def test_defaults_of_the_gate_parameters(host):
    x = problem()
    state = DeltaRuleState(8, HV, K, V, num_k_heads=H, A_log=x.A_log)
    slots = state.alloc(3)
    want, _ = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, np.zeros(HV), 1.0, 20.0, *raw(x)[5:], np.zeros((8, HV, K, V)), slots, None, True
    )
    assert_close(state.step(*tokens(host, x), slots), want, rtol=RTOL["float32"])
    without = DeltaRuleState(8, HV, K, V, num_k_heads=H)
    slots = without.alloc(3)
    for run in (without.step, without.prefill):
        with pytest.raises(ValueError, match="A_log"):
            run(*tokens(host, x), slots)
    fill(host, without, slots)


def test_gate_parameters_are_copied(host):
    x = problem()
    state = make(host, x)
    A_log = x.A_log.copy()
    own = DeltaRuleState(8, HV, K, V, num_k_heads=H, A_log=A_log, dt_bias=x.dt_bias)
    A_log[:] = np.nan
    slots = state.alloc(3)
    own.alloc(3)
    assert_same_bits(own.step(*tokens(host, x), slots), state.step(*tokens(host, x), slots))


def test_step_with_and_without_the_token_axis(place):
    x = problem()
    with_axis, without = make(place, x), make(place, x)
    slots = with_axis.alloc(3)
    without.alloc(3)
    want = with_axis.step(*tokens(place, x), slots)
    got = without.step(*(y[:, 0] for y in tokens(place, x)), slots)
    assert want.shape == (3, 1, HV, V)
    assert got.shape == (3, HV, V)
    assert_same_bits(place.get(got), place.get(want)[:, 0])
    assert_same_bits(place.get(without.pool), place.get(with_axis.pool))


def test_step_into_out(place):
    x = problem()
    state, other = make(place, x), make(place, x)
    slots = state.alloc(3)
    other.alloc(3)
    want = place.get(state.step(*tokens(place, x), slots))
    out = place.poisoned(x.v)
    got = other.step(*tokens(place, x), slots, out=out)
    assert_same_bits(place.get(out), want)
    assert_same_bits(place.get(got), want)


def test_a_step_is_a_prefill_of_one_token(place):
    x = problem()
    one, two = make(place, x), make(place, x)
    slots = one.alloc(3)
    two.alloc(3)
    assert_same_bits(place.get(one.step(*tokens(place, x), slots)), place.get(two.prefill(*tokens(place, x), slots)))
    assert_same_bits(place.get(one.pool), place.get(two.pool))


@pytest.mark.parametrize("length", [1, 7, 150])
def test_a_batch_invariant_prefill_does_not_know_its_batch(place, length):
    lengths = [length, 1, 90]
    x = problem(lengths=lengths)
    together, alone = make(place, x), make(place, x)
    slots = together.alloc(3)
    o = together.prefill(*tokens(place, x), slots, place.put(x.cu_seqlens), batch_invariant=True)
    alone.alloc(3)
    first = [y[:, :length] for y in tokens(place, x)]
    o1 = alone.prefill(*first, slots[:1], batch_invariant=True)
    assert_same_bits(place.get(o1), place.get(o)[:, :length])
    assert_same_bits(place.get(alone.read(slots[:1])), place.get(together.read(slots[:1])))


@pytest.mark.parametrize("flag", ["batch_invariant", "wide_range"])
def test_flags_of_a_prefill_are_flags(place, pool, flag):
    state, slots = pool
    with pytest.raises(TypeError, match=f"^{flag}: "):
        state.prefill(*tokens(place, problem(T=40)), slots, **{flag: "yes"})


def test_padding_in_step_and_prefill(place, pool):
    state, slots = pool
    x = problem()
    before = place.get(state.pool)
    some = np.array([slots[0], -1, slots[2]], np.int32)
    for run, y in ((state.step, x), (state.prefill, problem(T=40))):
        o = place.get(run(*tokens(place, y), some))
        assert not o[1].any()
        assert o[0].all()
    after = place.get(state.pool)
    others = np.setdiff1d(np.arange(8), some)
    assert_same_bits(after[others], before[others])


@pytest.mark.parametrize("padding", [-1, -(2**31), -(2**32), -(2**40), -(2**32) + 1, -(2**63)])
def test_any_negative_slot_is_padding(host, padding):
    x = problem(B=2)
    state = make(host, x)
    slots = state.alloc(8)
    fill(host, state, slots)
    before = state.pool.copy()
    o = state.step(*tokens(host, x), np.array([3, padding], np.int64))
    assert not o[1].any()
    others = np.setdiff1d(np.arange(8), [3])
    assert_same_bits(state.pool[others], before[others])


@pytest.mark.parametrize("lengths", [None, [5, 0, 9], [100, 3, 70], [1, 1, 1]])
@pytest.mark.parametrize("T", [3, 80])
def test_prefill_then_steps_are_the_whole_sequence(place, lengths, T):
    x = problem(T=T, lengths=lengths, normalize=False)
    state = make(place, x)
    slots = state.alloc(5)[[4, 1, 2]]
    fill(place, state, slots)
    pool = place.get(state.pool)
    cu_seqlens = None if lengths is None else place.put(x.cu_seqlens)
    o = state.prefill(*tokens(place, x), slots, cu_seqlens)
    want, want_pool = reference.fused_sigmoid_gating_delta_rule_update(*raw(x), pool, slots, None, True, x.cu_seqlens)
    assert_close(place.get(o), want, rtol=RTOL_CHUNK["float32"], name="o")
    assert_close(place.get(state.pool), want_pool, rtol=RTOL_CHUNK["float32"], name="pool")
    y = problem(seed=1)
    y.A_log, y.dt_bias = x.A_log, x.dt_bias
    want, want_pool = reference.fused_sigmoid_gating_delta_rule_update(*raw(y), want_pool, slots, None, True)
    assert_close(place.get(state.step(*tokens(place, y), slots)), want, rtol=RTOL_CHUNK["float32"])
    assert_close(place.get(state.pool), want_pool, rtol=RTOL_CHUNK["float32"])


def test_prefill_into_out(place):
    x = problem(T=70)
    state, other = make(place, x), make(place, x)
    slots = state.alloc(3)
    other.alloc(3)
    want = place.get(state.prefill(*tokens(place, x), slots))
    out = place.poisoned(x.v)
    other.prefill(*tokens(place, x), slots, out=out)
    assert_same_bits(place.get(out), want)


def test_float64_pool(host):
    x = problem(B=2, T=60, dtype="float64")
    state = make(host, x, dtype="float64")
    slots = state.alloc(2)
    fill(host, state, slots)
    want, want_pool = reference.fused_sigmoid_gating_delta_rule_update(*raw(x), state.pool, slots, None, True)
    assert_close(state.prefill(*tokens(host, x), slots), want, rtol=1e-12)
    assert_close(state.pool, want_pool, rtol=1e-12)


def refused_runs(slots):
    """Arguments of step by name, each wrong in one way."""
    zeros = lambda *shape, dtype=np.float32: np.zeros(shape, dtype)  # noqa: E731
    free = next(s for s in range(8) if s not in slots)
    return [
        ({"slots": np.array([slots[0], slots[1], free], np.int32)}, "slots", ValueError),
        ({"slots": np.array([slots[0], slots[1], slots[1]], np.int32)}, "slots", ValueError),
        ({"slots": np.array([slots[0], slots[1], 8], np.int32)}, "slots", IndexError),
        ({"slots": slots[:2]}, "slots", ValueError),
        ({"slots": np.append(slots, -1).astype(np.int32)}, "slots", ValueError),
        ({"slots": slots.astype(np.float32)}, "slots", TypeError),
        ({"slots": None}, "slots", TypeError),
        ({"q": zeros(3, 1, H, K + 1)}, "q", ValueError),
        ({"q": zeros(3, 1, H + 2, K)}, "q", ValueError),
        ({"q": zeros(2, 1, H, K)}, "[qkvab]", ValueError),
        ({"q": None}, "q", TypeError),
        ({"q": zeros(3, 1, H, K).tolist()}, "q", TypeError),
        ({"k": zeros(3, 1, H, K, dtype=np.float16)}, "k", TypeError),
        ({"k": zeros(3, 1, H, V)}, "k", ValueError),
        ({"v": zeros(3, 1, HV, V + 1)}, "v", ValueError),
        ({"v": zeros(3, 1, H, V)}, "v", ValueError),
        ({"v": zeros(3, 1, HV, V, dtype=int)}, "[qkv]", TypeError),
        ({"a": zeros(3, 1, H)}, "a", ValueError),
        ({"a": None}, "a", TypeError),
        ({"b": zeros(2, 1, HV)}, "b", ValueError),
        ({"b": zeros(3, 1, HV, dtype=bool)}, "b", TypeError),
        ({"out": zeros(3, 1, HV, V + 1)}, "out", ValueError),
        ({"out": zeros(3, 1, HV, V, dtype=np.float64)}, "out", TypeError),
        ({"out": "o"}, "out", TypeError),
    ]


def test_refused_steps_and_prefills_change_nothing(host):
    x = problem()
    state = make(host, x)
    slots = state.alloc(3)
    fill(host, state, slots)
    frozen = Frozen(host, state)
    good = {name: getattr(x, name) for name in "qkvab"} | {"slots": slots}
    for wrong, name, error in refused_runs(slots):
        for run in (state.step, state.prefill):
            with pytest.raises(error, match=rf"\b{name}\b"):
                run(**(good | wrong))
            frozen.check()
    long = {name: np.repeat(getattr(x, name), 2, axis=1) for name in "qkvab"}
    with pytest.raises(ValueError, match=r"\bq\b|token"):
        state.step(**long, slots=slots)
    for cu_seqlens, error in [
        (np.array([0, 3]), ValueError),
        ([0, 1, 2, 3], TypeError),
        (3, TypeError),
        (np.array([0.0, 1.0, 2.0, 3.0]), TypeError),
    ]:
        with pytest.raises(error, match="cu_seqlens"):
            state.prefill(**good, cu_seqlens=cu_seqlens)
    packed = {name: getattr(x, name).reshape(1, 3, *getattr(x, name).shape[2:]) for name in "qkvab"}
    for cu_seqlens in ([0, 1, 2, 4], [0, 2, 1, 3], [1, 2, 3, 3], [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            state.prefill(**packed, slots=slots, cu_seqlens=np.array(cu_seqlens))
    frozen.check()
    assert np.isfinite(state.step(**good)).all()


def test_a_freed_slot_is_refused_until_it_is_handed_out_again(place, pool):
    state, slots = pool
    x = problem()
    state.free(slots[1:2])
    frozen = Frozen(place, state)
    for run in (state.step, state.prefill):
        with pytest.raises(ValueError, match=rf"slots.*\b{slots[1]}\b"):
            run(*tokens(place, x), slots)
        frozen.check()


def test_no_output_shares_memory_with_the_pool(host):
    x = problem()
    state = make(host, x)
    slots = state.alloc(3)
    results = [state.step(*tokens(host, x), slots) for _ in range(2)]
    results += [state.prefill(*tokens(host, problem(T=40)), slots), state.read(slots), state.read(slots)]
    arrays = [*results, state.pool]
    assert not any(np.shares_memory(p, r) for i, p in enumerate(arrays) for r in arrays[:i])


# -- files
# ------------------------------------------------------------------------------------------------------------


def saved(host, tmp_path, **options):
    x = problem()
    state = make(host, x, **options)
    state.free(state.alloc(6)[[1, 3]])
    slots = np.array([s for s in range(8) if s not in (1, 3, 6, 7)])
    fill(host, state, [0, 2, 4, 5])
    path = tmp_path / "pool.gdr"
    state.save(path)
    return x, state, slots, path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_a_loaded_pool_goes_on_where_the_saved_one_was(host, tmp_path, dtype, layout):
    options = {"dtype": dtype, "layout": layout, "scale": 0.3, "use_qk_l2norm": False, "softplus_beta": 2.0}
    x, state, slots, path = saved(host, tmp_path, **options, softplus_threshold=7.0)
    for where in (path, str(path)):
        loaded = DeltaRuleState.load(where)
        assert repr(loaded) == repr(state)
        assert loaded.num_free == state.num_free == 4
        assert_same_bits(loaded.read(slots), state.read(slots))
    assert_same_bits(
        loaded.step(*tokens(host, x), slots[:3]), state.step(*tokens(host, x), slots[:3]), "o after loading"
    )
    assert_same_bits(loaded.read(slots), state.read(slots))
    with pytest.raises(ValueError, match="slots"):
        loaded.free([1])
    new = loaded.alloc(4)
    assert sorted(new) == [1, 3, 6, 7]
    assert not loaded.read(new).any()


def test_a_pool_without_gate_parameters_can_be_saved(host, tmp_path):
    state = DeltaRuleState(4, HV, K, V)
    state.save(tmp_path / "pool")
    loaded = DeltaRuleState.load(tmp_path / "pool")
    assert loaded.num_free == 4
    assert repr(loaded) == repr(state)


def test_save_replaces_a_file_and_leaves_no_other(tmp_path):
    _, state, slots, path = saved(HOST, tmp_path)
    state.reset(slots)
    state.save(path)
    assert not DeltaRuleState.load(path).read(slots).any()
    assert [p.name for p in tmp_path.iterdir()] == ["pool.gdr"]


def test_save_keeps_the_pool(host, tmp_path):
    _, state, _, path = saved(host, tmp_path)
    frozen = Frozen(host, state)
    state.save(path)
    frozen.check()


def test_save_honours_the_umask(tmp_path):
    _, _, _, path = saved(HOST, tmp_path)
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loading_a_missing_file_or_a_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        DeltaRuleState.load(tmp_path / "nothing")
    with pytest.raises(OSError, match=tmp_path.name):
        DeltaRuleState.load(tmp_path)


def foreign_files():
    npz, npy, archive, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, weights=np.ones(3))
    np.save(npy, np.ones(3))
    np.savez(pickled, header=np.array([{}], dtype=object))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("header.npy", b"not an array")
    return {
        "empty": b"",
        "text": b"To be, or not to be\n" * 50,
        "npz": npz.getvalue(),
        "npy": npy.getvalue(),
        "pickled": pickled.getvalue(),
        "zip": archive.getvalue(),
        "zeros": bytes(4096),
        "PK": b"PK\x03\x04" + bytes(100),
    }


@pytest.mark.parametrize("kind", list(foreign_files()))
def test_foreign_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "foreign.gdr"
    path.write_bytes(foreign_files()[kind])
    with pytest.raises(ValueError, match=r"foreign\.gdr"):
        DeltaRuleState.load(path)


def test_truncated_files_are_refused_by_name(tmp_path):
    _, _, _, path = saved(HOST, tmp_path)
    content = path.read_bytes()
    short = tmp_path / "short.gdr"
    for size in range(0, len(content), 7):
        short.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"short\.gdr"):
            DeltaRuleState.load(short)


def test_another_version_is_refused(tmp_path):
    _, _, _, path = saved(HOST, tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    name = next(n for n, y in arrays.items() if y.dtype.kind in "US" and "version" in str(y))
    arrays[name] = np.array(str(arrays[name]).replace('"version": 1', '"version": 999'))
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"pool\.gdr.*version.*999"):
        DeltaRuleState.load(path)


def test_a_damaged_byte_is_refused_or_harmless(tmp_path):
    _, state, slots, path = saved(HOST, tmp_path)
    content = path.read_bytes()
    want, text = state.read(slots), repr(state)
    damaged = tmp_path / "damaged.gdr"
    rng = np.random.default_rng(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile and NumPy, about headers
        for at in rng.permutation(len(content))[:1200]:
            broken = bytearray(content)
            broken[at] ^= 1 << rng.integers(8)
            damaged.write_bytes(broken)
            try:
                loaded = DeltaRuleState.load(damaged)
            except ValueError as error:
                assert "damaged.gdr" in str(error)  # noqa: PT017
                refused += 1
            else:  # a date, an unused field: whatever was loaded must be what was saved
                assert repr(loaded) == text
                assert_same_bits(loaded.read(slots), want)
    assert refused > 500


@pytest.mark.parametrize("fault", ["os.replace", "os.fsync", "numpy.savez", "numpy.lib.format.write_array"])
def test_a_failed_save_leaves_the_old_file(host, tmp_path, monkeypatch, fault):
    _, state, slots, path = saved(host, tmp_path)
    content = path.read_bytes()
    state.reset(slots)
    frozen = Frozen(host, state)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    module, _, name = fault.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, fail)
    try:
        state.save(path)
    except OSError:
        assert path.read_bytes() == content
    finally:
        monkeypatch.undo()
    frozen.check()
    assert [p.name for p in tmp_path.iterdir()] == ["pool.gdr"]
    state.save(path)
    assert not DeltaRuleState.load(path).read(slots).any()


def run_script(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    _, _state, _slots, path = saved(HOST, tmp_path)
    content = path.read_bytes()
    done = run_script(
        """
import resource, sys, gdr
state = gdr.DeltaRuleState.load(sys.argv[1])
state.reset([0, 2, 4, 5])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    state.save(sys.argv[1])
except OSError as error:
    print("OSError", state.num_free)
""",
        path,
    )
    assert done.stdout.split() == ["OSError", "4"], done.stderr
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["pool.gdr"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "numpy.lib.format.write_array"])
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path, where):
    _, _, _slots, path = saved(HOST, tmp_path)
    content = path.read_bytes()
    done = run_script(
        """
import os, signal, sys, numpy, gdr
state = gdr.DeltaRuleState.load(sys.argv[1])
state.reset([0, 2, 4, 5])
module, _, name = sys.argv[2].rpartition(".")
setattr(sys.modules[module], name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
state.save(sys.argv[1])
""",
        path,
        where,
    )
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    if done.returncode:
        assert path.read_bytes() == content
    loaded = DeltaRuleState.load(path)
    assert loaded.num_free == 4


# -- elsewhere
# --------------------------------------------------------------------------------------------------------


def test_to_the_same_device(host):
    x = problem()
    state = make(host, x)
    slots = state.alloc(3)
    h = fill(host, state, slots)
    there = state.to("cpu")
    assert_same_bits(there.read(slots), h)
    assert there.num_free == state.num_free
    for wrong in ("tpu", "cuda:-1", "", None, 0):
        with pytest.raises((TypeError, ValueError), match="device"):
            state.to(wrong)


@pytest.mark.gpu
def test_to_the_gpu_and_back(tmp_path):
    host, device = Place("numpy"), Place("cuda")
    x = problem()
    state = make(host, x)
    slots = state.alloc(3)
    fill(host, state, slots)
    there = state.to("cuda")
    assert_same_bits(device.get(there.read(slots)), state.read(slots))
    o, want = there.step(*tokens(device, x), slots), state.step(*tokens(host, x), slots)
    assert_close(device.get(o), want, rtol=RTOL["float32"])
    back = there.to("cpu")
    assert_close(back.read(slots), state.read(slots), rtol=RTOL["float32"])
    assert back.num_free == state.num_free
    there.save(tmp_path / "pool")
    loaded = DeltaRuleState.load(tmp_path / "pool", device="cuda")
    assert_same_bits(device.get(loaded.read(slots)), device.get(there.read(slots)))


# -- threads and faults
# -----------------------------------------------------------------------------------------------


def test_threads_never_get_the_same_slot(host):
    state = make(host, problem(), num_slots=50)
    owner = np.zeros(50, int)
    failures = []

    def work(me):
        rng = np.random.default_rng(me)
        mine = []
        try:
            for _ in range(300):
                if mine and rng.random() < 0.5:
                    slots = mine.pop(rng.integers(len(mine)))
                    assert (owner[slots] == me).all()
                    owner[slots] = 0
                    state.free(slots)
                else:
                    try:
                        slots = state.alloc(int(rng.integers(0, 6)))
                    except ValueError:
                        continue
                    assert not owner[slots].any()
                    owner[slots] = me
                    if rng.random() < 0.3:
                        assert not state.read(slots).any()
                        state.write(slots, np.full((len(slots), HV, K, V), me, np.float32))
                    mine.append(slots)
            for slots in mine:
                owner[slots] = 0
                state.free(slots)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert state.num_free == 50
    assert sorted(state.alloc(50)) == list(range(50))


def test_threads_with_pools_of_their_own_get_the_results_of_one_thread(host):
    x = problem(B=3, T=70, normalize=False)
    state = make(host, x)
    slots = state.alloc(3)
    want = state.prefill(*tokens(host, x), slots)
    want_pool = state.pool.copy()
    results = {}

    def work(n):
        mine = make(host, x)
        taken = mine.alloc(3)
        results[n] = (mine.prefill(*tokens(host, x), taken), mine.pool.copy())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for o, pool in results.values():
        assert_same_bits(o, want)
        assert_same_bits(pool, want_pool)


@pytest.mark.parametrize("method", ["step", "prefill", "verify", "fork", "alloc"])
def test_a_fault_inside_changes_nothing_and_leaks_no_slot(host, monkeypatch, method):
    x = problem()
    state = make(host, x)
    slots = state.alloc(3)
    fill(host, state, slots)
    state.free(state.alloc(2))
    frozen = Frozen(host, state)

    def fail(*args, **kwargs):
        raise MemoryError("injected")

    if method in ("step", "prefill", "verify"):
        fail_runs(monkeypatch, fail)
        with pytest.raises(MemoryError):
            getattr(state, method)(*tokens(host, x), slots)
    else:
        for helper in ("_get", "_set", "_place"):
            monkeypatch.setattr(state, helper, fail, raising=False)
        fill_free = {"fork": lambda: state.fork(slots), "alloc": lambda: state.alloc(4)}[method]
        with pytest.raises(MemoryError):
            fill_free()
    monkeypatch.undo()
    frozen.check()
    assert len(state.alloc(5)) == 5


@pytest.mark.parametrize("function", ["matmul", "multiply", "add", "exp", "empty", "zeros", "argsort", "unique"])
def test_a_fault_anywhere_in_the_arithmetic_can_be_repeated(host, monkeypatch, function):
    # The n-th call of a NumPy function fails, in the middle of whatever step and prefill do with it.  The
    # same call made again must go on as if nothing had been, also where earlier steps wait to be written into
    # the pool.
    problems = [problem(B=4, T=1 if n % 3 else 20, seed=n) for n in range(12)]
    for y in problems:
        y.A_log, y.dt_bias = problems[0].A_log, problems[0].dt_bias
    quiet, state = make(host, problems[0]), make(host, problems[0])
    slots = quiet.alloc(4)
    state.alloc(4)
    original = getattr(np, function)
    faults = 0

    def calls(pool, n, x):
        """What may fail and be made again."""
        if x.q.shape[1] == 1:
            return [lambda: pool.step(*tokens(host, x), slots)]
        if n % 2:
            return [lambda: pool.prefill(*tokens(host, x), slots)]
        drafts, parents = [y[:, :7].copy() for y in tokens(host, x)], random_tree(4, 7, n)
        return [
            lambda: pool.verify(*drafts, slots, parents),
            lambda: pool.commit(slots, [n % 8, 7, 3, 5]),
            lambda: pool.flush(slots[: n % 5]),
        ]

    steps = [(n, call) for n, x in enumerate(problems) for call in zip(calls(quiet, n, x), calls(state, n, x))]
    for n, (quietly, call) in steps:
        want = quietly()
        for nth in (0, 1, 2, 5, 11, 10**9):
            left = [nth]

            def sometimes(*args, left=left, **kwargs):
                left[0] -= 1
                if left[0] == -1:
                    raise MemoryError("injected")
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(np, function, sometimes)
                try:
                    got = call()
                except MemoryError:
                    faults += 1
                    continue
            break
        if want is not None:
            assert_close(got, want, rtol=1e-5, name=f"o of call {n}")
    assert_close(state.read(slots), quiet.read(slots), rtol=1e-5)
    assert state.num_free == quiet.num_free
    if host.name == "numpy" and function in ("matmul", "multiply", "exp", "empty"):
        assert faults


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("method", ["step", "prefill", "commit"])
def test_an_interrupted_call_writes_every_state_or_none(host, method):
    # A timer raises in the middle of calls that take a few milliseconds, later and later in them.
    x = problem(B=64, T=1 if method == "step" else 40, H=4, HV=8, K=64, V=64)
    state = make(host, x, num_slots=64, ring=None if method != "commit" else 5)
    slots = state.alloc(64)
    start = fill(host, state, slots)
    arguments = tokens(host, x)
    if method == "commit":

        def run(*arguments, out=None):
            state.commit(slots, accepted)

        drafts, accepted = [y[:, :16].copy() for y in arguments], np.full(64, 16)
        state.verify(*drafts, slots)
    else:
        run = getattr(state, method)
    run(*arguments, slots)
    done = state.read(slots)
    out = np.empty_like(x.v)

    armed = False

    def interrupt(signum, frame):
        if armed:
            raise Interrupted

    old = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # its callbacks would swallow the exception
    interrupted = 0
    try:
        for n in range(60):
            state.write(slots, start)
            if method == "commit":
                state.verify(*drafts, slots)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 2e-4 * (n + 1))
                run(*arguments, slots, out=out)
                armed = False
            except Interrupted:
                interrupted += 1
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            got = state.read(slots)
            before = (got == start).all(axis=(1, 2, 3))
            after = (got == done).all(axis=(1, 2, 3))
            assert before.all() or after.all(), f"{before.sum()} states before and {after.sum()} after the call"
            assert state.num_free == 0
    finally:
        armed = False
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted


# -- streams: what CuPy does for calls with tensors of torch, told by a CuPy that only writes down its stream


class _Stream:
    def __init__(self, current, handle):
        self.current, self.handle = current, handle

    def __enter__(self):
        self.current.append(self.handle)

    def __exit__(self, *error):
        self.current.pop()


class _Streams:
    """A CuPy with streams alone."""

    def __init__(self):
        self.current, self.placed = [0], []
        self.cuda = types.SimpleNamespace(
            get_current_stream=lambda device: types.SimpleNamespace(ptr=self.current[-1]),
            Stream=types.SimpleNamespace(from_external=lambda x: self.external(*x.__cuda_stream__())),
        )

    def external(self, version, stream):
        assert version == 0
        return _Stream(self.current, stream)

    def asarray(self, x):
        self.placed.append(self.current[-1])
        raise _Placed


class _Placed(Exception):
    pass


@pytest.mark.parametrize("stream", [0, 7])
def test_slots_go_to_the_device_in_the_order_of_torch(monkeypatch, stream):
    pytest.importorskip("torch")
    x = problem()
    state = make(HOST, x)
    slots, q = state.alloc(3), x.to("torch")
    monkeypatch.setattr(state, "_xp", _Streams())
    monkeypatch.setattr(state, "device", "cuda:0")
    monkeypatch.setattr(state, "_here", nullcontext)
    monkeypatch.setattr(_arrays.library_of(q.v), "stream", lambda device: stream)
    monkeypatch.setattr(type(q.v), "get_device", lambda self: 0)
    calls = [
        lambda: state.step(q.q, q.k, q.v, q.a, q.b, slots),
        lambda: state.prefill(q.q, q.k, q.v, q.a, q.b, slots),
        lambda: state.verify(q.q, q.k, q.v, q.a, q.b, slots, np.full((3, 1), -1)),
        lambda: state.commit(slots, q.v),
        lambda: state.write(slots, q.v),
    ]
    for call in calls:
        with pytest.raises(_Placed):
            call()
    assert state._xp.placed == [stream] * len(calls)
    assert state._xp.current == [0]
