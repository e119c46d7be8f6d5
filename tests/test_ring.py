"""The ring of pending tokens, and that no reader of a pool sees a state without them."""

from __future__ import annotations

import numpy as np
import pytest
from places import assert_same_bits

import gdr
from gdr import reference
from gdr._numpy_ring import Ring, commit, copy, fold, forget, read, rollback
from gdr._ring import Entries
from gdr.state import RING
from gdr.testing import assert_close, make_inputs

N, H, HV, K, V = 3, 2, 4, 16, 24
CAPACITY = RING["numpy"]


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    monkeypatch.setenv("GDR_CPU", "numpy")


def problem(T, **kwargs):
    return make_inputs(B=N, T=T, H=H, HV=HV, K=K, V=V, num_slots=N, **kwargs)


def pool_of(x, **kwargs):
    shape = {"num_k_heads": H, "A_log": x.A_log, "dt_bias": x.dt_bias, "use_qk_l2norm": True}
    state = gdr.DeltaRuleState(N + 3, HV, K, V, **shape, **kwargs)
    slots = state.alloc(N)
    state.write(slots, x.state.astype(x.state.dtype))
    return state, slots


def step(state, x, t, slots, rows=slice(None)):
    return state.step(x.q[rows, t], x.k[rows, t], x.v[rows, t], x.a[rows, t], x.b[rows, t], slots[rows])


def states_after(x, T, layout="kv"):
    """Each sequence's state after T tokens, by the oracle."""
    tokens = [z[:, :T] for z in (x.q, x.k, x.v)]
    return reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a[:, :T], x.dt_bias, 1.0, 20.0, *tokens, x.b[:, :T], x.state, np.arange(N),
        use_qk_l2norm_in_kernel=True, state_layout=layout,
    )  # fmt: skip


# -- the entries and the ring by hand
# ------------------------------------------------------------------------------------------------------


def hand_made(capacity=16, dtype=np.float64, **options):
    """A ring over a pool of four slots of one head, K = 2, V = 3."""
    return Ring(np.zeros((4, 1, 2, 3), dtype), "kv", 1, capacity, options.get("stagger", False))


def add(entries, row, count, rng):
    """Put a random token into a row by hand; return it."""
    k, u, d = rng.normal(size=2), rng.normal(size=3), rng.uniform(0.5, 1)
    entries.keys[row, 0, count], entries.updates[row, 0, count] = k, u
    return k, u, d


def test_append_and_fold_by_hand():
    ring = hand_made()
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 3))
    ring.pool[2, 0] = h
    for count in range(5):
        k, u, d = add(ring.pending, 2, count, rng)
        ring.pending.advance(np.array([2]), count, np.array([[d]]))
        h = d * h + np.outer(k, u)
    assert ring.pending.fill.tolist() == [0, 0, 5, 0]
    np.testing.assert_allclose(read(ring, np.array([2, 0, 2]))[[0, 2], 0], [h, h], rtol=1e-14)
    assert ring.pending.fill.tolist() == [0, 0, 5, 0]
    fold(ring, np.array([-1, 2]))
    np.testing.assert_allclose(ring.pool[2, 0], h, rtol=1e-14)
    assert not ring.pool[[0, 1, 3]].any()
    assert not ring.pending.fill.any()
    assert ring.pending.decays[2, 0, 0] == 1


def test_forget_drops_what_is_pending():
    ring = hand_made()
    rng = np.random.default_rng(0)
    for slot in (0, 1):
        _, _, d = add(ring.pending, slot, 0, rng)
        ring.pending.advance(np.array([slot]), 0, np.array([[d]]))
    forget(ring, np.array([0]))
    assert ring.pending.fill.tolist() == [0, 1, 0, 0]
    fold(ring)
    assert not ring.pool[0].any()
    assert ring.pool[1].any()


def test_take_and_append_by_hand():
    rng = np.random.default_rng(0)
    drafts, pending = Entries(2, 1, 1, 2, 3, np.dtype(float), 5), Entries(4, 1, 1, 2, 3, np.dtype(float), 7)
    tokens = {(row, t): add(drafts, row, t, rng) for row in range(2) for t in range(5)}
    for (row, t), (_, _, d) in tokens.items():
        drafts.decays[row, 0, 1 + t] = d
    paths = np.array([[0, 3, -1, -1], [1, 2, 4, -1]])
    before = add(pending, 3, 0, rng)
    pending.advance(np.array([3]), 0, np.array([[before[2]]]))
    pending.append(np.array([1, 3]), drafts.take(np.arange(2), paths))
    assert pending.fill.tolist() == [0, 2, 0, 4]
    for slot, chain in ((1, [tokens[0, 0], tokens[0, 3]]), (3, [before, *(tokens[1, t] for t in (1, 2, 4))])):
        own = [d for _, _, d in chain]
        for t, (k, u, _) in enumerate(chain):
            assert pending.keys[slot, 0, t].tolist() == k.tolist()
            assert pending.updates[slot, 0, t].tolist() == u.tolist()
            np.testing.assert_allclose(pending.decays[slot, 0, 1 + t], np.prod(own[t + 1 :]), rtol=1e-14)
        np.testing.assert_allclose(pending.decays[slot, 0, 0], np.prod(own), rtol=1e-14)


@pytest.mark.parametrize("capacity", [0, 1, 3, 16])
def test_commit_by_hand(capacity):
    ring = hand_made(capacity)
    rng = np.random.default_rng(0)
    states = ring.pool[:, 0] = rng.normal(size=(4, 2, 3))
    ring.parents[:, :4] = np.arange(-1, 3)
    for _ in range(5):
        drafts = ring.room_for_drafts()
        for slot in (1, 2):
            for t in range(4):
                k, u, d = add(drafts, slot, t, rng)
                drafts.decays[slot, 0, 1 + t] = d
                if t < slot:
                    states[slot] = d * states[slot] + np.outer(k, u)
            drafts.fill[slot] = 4
        commit(ring, np.array([2, -1, 1]), np.array([2, 4, 1]))
        assert not drafts.fill.any()
        np.testing.assert_allclose(read(ring, np.arange(4))[:, 0], states, rtol=1e-13)
        assert (ring.pending.fill <= capacity).all()


def test_copy_and_rollback_by_hand():
    ring = hand_made(stagger=True)
    rng = np.random.default_rng(0)
    ring.pool[...] = rng.normal(size=ring.pool.shape)
    add(ring.pending, 2, 0, rng)
    ring.pending.advance(np.array([2]), 0, np.array([[0.5]]))
    ring.room_for_drafts().fill[:] = 3
    rollback(ring, np.array([0, -1]))
    assert ring.drafts.fill.tolist() == [0, 3, 3, 3]
    copy(ring, np.array([2, 1]), np.array([3, 0]))
    assert ring.drafts.fill.tolist() == [0, 3, 3, 0]
    assert ring.limit.tolist() == [2, 2, 3, 3]
    states = read(ring, np.arange(4))
    assert_same_bits(states[[3, 0]], states[[2, 1]])
    assert ring.pending.fill.tolist() == [0, 0, 1, 1]


# -- a pool with a ring
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("T", [1, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 5])
def test_steps_agree_with_the_oracle(T, layout):
    x = problem(T, layout=layout)
    state, slots = pool_of(x, layout=layout)
    o = np.stack([step(state, x, t, slots) for t in range(T)], axis=1)
    want, pool = states_after(x, T, layout)
    assert_close(o, want, rtol=1e-6)
    assert_close(state.read(slots), pool, rtol=1e-6)


@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
@pytest.mark.parametrize("keys", ["random", "correlated"])
def test_a_thousand_steps_stay_accurate(gates, keys):
    x = make_inputs(B=2, T=1000, H=1, HV=2, K=64, V=64, gates=gates, keys=keys, num_slots=2)
    state = gdr.DeltaRuleState(2, 2, 64, 64, num_k_heads=1, A_log=x.A_log, dt_bias=x.dt_bias, use_qk_l2norm=True)
    slots = state.alloc(2)
    state.write(slots, x.state)
    o = np.stack([step(state, x, t, slots) for t in range(1000)], axis=1)
    want, pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, np.arange(2), use_qk_l2norm_in_kernel=True
    )
    assert_close(o, want, rtol=5e-7)
    assert_close(state.read(slots), pool, rtol=5e-7)


@pytest.mark.parametrize("T", [1, 5, CAPACITY])
@pytest.mark.parametrize("reader", ["read", "pool", "fork", "save", "prefill", "drop-in"])
def test_every_reader_sees_the_pending_tokens(reader, T, tmp_path):
    x = problem(T + 1)
    state, slots = pool_of(x)
    for t in range(T):
        step(state, x, t, slots)
    _, want = states_after(x, T)
    if reader == "read":
        got = state.read(slots)
    elif reader == "pool":
        got = state.pool[slots]
    elif reader == "fork":
        got = state.read(state.fork(slots))
    elif reader == "save":
        state.save(tmp_path / "pool")
        got = gdr.DeltaRuleState.load(tmp_path / "pool").read(slots)
    else:
        last = [z[:, T:] for z in (x.q, x.k, x.v, x.a, x.b)]
        if reader == "prefill":
            state.prefill(*last, slots)
        else:
            gdr.fused_sigmoid_gating_delta_rule_update(
                x.A_log, last[3], x.dt_bias, 1.0, 20.0, *last[:3], last[4], state.pool, slots,
                use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
        _, want = states_after(x, T + 1)
        got = state.read(slots)
    assert_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("writer", ["write", "reset", "free and alloc"])
def test_what_was_pending_does_not_outlive_the_state(writer):
    x = problem(3)
    state, slots = pool_of(x)
    for t in range(3):
        step(state, x, t, slots)
    if writer == "write":
        state.write(slots, x.state)
        assert_same_bits(state.read(slots), x.state)
        return
    if writer == "reset":
        state.reset(slots)
    else:
        state.free(slots)
        slots = np.concatenate([state.alloc(N), state.alloc(3)])
    assert not state.read(slots).any()
    assert not state.pool.any()


def test_a_slot_with_nan_leaves_nothing_to_its_successor():
    x = problem(2)
    state, slots = pool_of(x)
    x.v[:, 0] = np.nan
    step(state, x, 0, slots)
    state.free(slots)
    again = state.alloc(N)
    clean = problem(2, seed=1)
    o = step(state, clean, 1, again)
    assert np.isfinite(o).all()


def test_sequences_of_a_batch_may_be_at_different_fill_levels():
    T = 2 * CAPACITY + 3
    x = problem(T)
    together, slots = pool_of(x)
    rng = np.random.default_rng(0)
    done = np.zeros(N, int)
    outputs = np.zeros_like(x.v)
    while (done < T).any():
        rows = np.flatnonzero((done < T) & (rng.random(N) < 0.6))
        rng.shuffle(rows)
        if rows.size:
            args = [z[rows, done[rows]] for z in (x.q, x.k, x.v, x.a, x.b)]
            outputs[rows, done[rows]] = together.step(*args, slots[rows])
            done[rows] += 1
    want, _ = states_after(x, T)
    assert_close(outputs, want, rtol=1e-6)
    # And no bit depends on who else was in the batch.
    alone, slots_alone = pool_of(x)
    for n in range(N):
        for t in range(T):
            assert_same_bits(step(alone, x, t, slots_alone, slice(n, n + 1))[0], outputs[n, t])
    assert_same_bits(alone.read(slots_alone), together.read(slots))


def test_padding_and_other_slots_are_left_alone():
    x = problem(2)
    state, slots = pool_of(x)
    before = state.read(slots)
    padded = slots.copy()
    padded[1] = -1
    for t in range(2):
        o = step(state, x, t, padded)
        assert not o[1].any()
    assert_same_bits(state.read(slots)[1], before[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_state_is_rounded_once_a_ring(dtype):
    x = problem(CAPACITY, state_dtype=dtype)
    state, slots = pool_of(x, dtype=dtype)
    start = state.read(slots).copy()
    for t in range(CAPACITY):
        step(state, x, t, slots)
    assert_same_bits(state._pool[slots], start)  # nothing is written before the ring is full
    _, want = states_after(x, CAPACITY)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert_close(state.read(slots), want, rtol=rounding)


def test_nbytes_and_repr_account_for_the_ring():
    x = problem(4)
    state, slots = pool_of(x)
    without, _ = pool_of(x, ring=0)
    assert without.nbytes == (N + 3) * HV * K * V * 4
    a_ring = state.nbytes - without.nbytes
    assert a_ring >= (N + 3) * CAPACITY * (H * K + HV * V) * 4
    assert pool_of(x, ring=2 * CAPACITY)[0].nbytes - without.nbytes > 1.8 * a_ring
    for t in range(4):
        step(state, x, t, slots)
    assert state.nbytes == without.nbytes + a_ring  # memory is taken once
    state.verify(x.q, x.k, x.v, x.a, x.b, slots)
    with_drafts = state.nbytes
    assert with_drafts > without.nbytes + a_ring
    state.verify(x.q, x.k, x.v, x.a, x.b, slots)
    assert state.nbytes == with_drafts
    assert f"ring={CAPACITY}" in repr(state)
    assert "ring=0" in repr(without)
    assert "stagger=True" in repr(pool_of(x, stagger=True)[0])
    assert f"{with_drafts / 2**20:.1f} MiB" in repr(state)


def test_changing_the_backend_between_steps_loses_nothing(monkeypatch):
    pytest.importorskip("numba")
    x = problem(4)
    state, slots = pool_of(x)
    outputs = []
    for t in range(4):
        monkeypatch.setenv("GDR_CPU", "numba" if t % 2 else "numpy")
        outputs.append(step(state, x, t, slots))
    want, pool = states_after(x, 4)
    assert_close(np.stack(outputs, axis=1), want, rtol=1e-6)
    assert_close(state.read(slots), pool, rtol=1e-6)


def test_forgetting_everything_gives_no_nan():
    x = problem(6)
    state, slots = pool_of(x)
    x.a[0, [2, 4]] = 1e30  # g = -inf
    o = np.stack([step(state, x, t, slots) for t in range(6)], axis=1)
    want, pool = states_after(x, 6)
    assert_close(o, want, rtol=1e-6)
    assert_close(state.read(slots), pool, rtol=1e-6)
