"""The ring of pending tokens, and that no reader of a pool sees a state without them."""

from __future__ import annotations

import numpy as np
import pytest
from places import Place, assert_same_bits

import gdr
from gdr import reference
from gdr._ring import Entries, Ring, commit, copy, fold, forget, read, rollback
from gdr.state import RING
from gdr.testing import assert_close, make_inputs, relative_rms

N, H, HV, K, V = 3, 2, 4, 16, 24
CAPACITY = RING["numpy"]


def problem(T, **kwargs):
    return make_inputs(**({"B": N, "T": T, "H": H, "HV": HV, "K": K, "V": V, "num_slots": N} | kwargs))


def pool_of(place, x, num_slots=N + 3, **options):
    """A pool with a ring and the states of a problem; the first of its slots are theirs."""
    state = gdr.DeltaRuleState(
        num_slots,
        x.v.shape[2],
        x.q.shape[3],
        x.v.shape[3],
        num_k_heads=x.q.shape[2],
        A_log=place.put(x.A_log),
        dt_bias=place.put(x.dt_bias),
        device="cpu" if place.on_host else "cuda",
        **({"ring": CAPACITY} | options),
    )
    slots = state.alloc(len(x.state))
    state.write(slots, place.put(x.state))
    return state, slots


def step(place, state, x, t, slots, rows=slice(None)):
    """Token t of some rows: their outputs."""
    token = [place.put(np.ascontiguousarray(y[rows, t])) for y in (x.q, x.k, x.v, x.a, x.b)]
    return place.get(state.step(*token, slots[rows]))


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


def test_append_and_fold_by_hand(host):
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


def test_forget_drops_what_is_pending(host):
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
def test_commit_by_hand(host, capacity):
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


def test_copy_and_rollback_by_hand(host):
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
def test_steps_agree_with_the_oracle(place, T, layout):
    x = problem(T, layout=layout)
    state, slots = pool_of(place, x, layout=layout)
    o = np.stack([step(place, state, x, t, slots) for t in range(T)], axis=1)
    want, pool = states_after(x, T, layout)
    assert_close(o, want, rtol=1e-6)
    assert_close(place.get(state.read(slots)), pool, rtol=1e-6)


@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
@pytest.mark.parametrize("keys", ["random", "correlated"])
def test_a_thousand_steps_stay_accurate(place, gates, keys):
    x = make_inputs(B=2, T=1000, H=1, HV=2, K=64, V=64, gates=gates, keys=keys, num_slots=2)
    state, slots = pool_of(place, x)
    o = np.stack([step(place, state, x, t, slots) for t in range(1000)], axis=1)
    want, pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, np.arange(2), use_qk_l2norm_in_kernel=True
    )
    assert_close(o, want, rtol=1e-6)
    assert_close(place.get(state.read(slots)), pool, rtol=1e-6)


@pytest.mark.parametrize("T", [1, 5, CAPACITY])
@pytest.mark.parametrize(
    "reader", ["read", "pool", "flush", "fork", "save", "to", "prefill", "prefill by chunks", "drop-in"]
)
@pytest.mark.parametrize("stagger", [False, True])
def test_every_reader_sees_the_pending_tokens(place, reader, T, stagger, tmp_path):
    more = 40 if reader == "prefill by chunks" else 1
    x = problem(T + more)
    state, slots = pool_of(place, x, stagger=stagger)
    for t in range(T):
        step(place, state, x, t, slots)
    _, want = states_after(x, T)
    if reader == "read":
        got = place.get(state.read(slots))
    elif reader == "pool":
        got = place.get(state.pool)[slots]
    elif reader == "flush":
        state.flush(slots)
        got = place.get(state._pool)[slots]
    elif reader == "fork":
        got = place.get(state.read(state.fork(slots)))
    elif reader == "to":
        got = state.to("cpu").read(slots)
    elif reader == "save":
        state.save(tmp_path / "pool")
        got = gdr.DeltaRuleState.load(tmp_path / "pool").read(slots)
    else:
        q, k, v, a, b = (place.put(np.ascontiguousarray(y[:, T:])) for y in (x.q, x.k, x.v, x.a, x.b))
        if reader == "drop-in":
            gdr.fused_sigmoid_gating_delta_rule_update(
                place.put(x.A_log), a, place.put(x.dt_bias), 1.0, 20.0, q, k, v, b, state.pool,
                place.put(slots), use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
        else:
            state.prefill(q, k, v, a, b, slots)
        _, want = states_after(x, T + more)
        got = place.get(state.read(slots))
    assert_close(got, want, rtol=2e-6)


@pytest.mark.parametrize("writer", ["write", "reset", "free and alloc"])
def test_what_was_pending_does_not_outlive_the_state(place, writer):
    x = problem(3)
    state, slots = pool_of(place, x)
    for t in range(3):
        step(place, state, x, t, slots)
    if writer == "write":
        state.write(slots, place.put(x.state))
        assert_same_bits(place.get(state.read(slots)), x.state)
        return
    if writer == "reset":
        state.reset(slots)
    else:
        state.free(slots)
        slots = np.concatenate([state.alloc(N), state.alloc(3)])
    assert not place.get(state.read(slots)).any()
    assert not place.get(state.pool).any()


def test_a_slot_with_nan_leaves_nothing_to_its_successor(place):
    x = problem(2)
    state, slots = pool_of(place, x)
    x.v[:, 0] = np.nan
    step(place, state, x, 0, slots)
    state.free(slots)
    again = state.alloc(N)
    clean = problem(2, seed=1)
    o = step(place, state, clean, 1, again)
    assert np.isfinite(o).all()


def test_sequences_of_a_batch_may_be_at_different_fill_levels(place):
    T = 2 * CAPACITY + 3
    x = problem(T)
    together, slots = pool_of(place, x)
    rng = np.random.default_rng(0)
    done = np.zeros(N, int)
    outputs = np.zeros_like(x.v)
    while (done < T).any():
        rows = np.flatnonzero((done < T) & (rng.random(N) < 0.6))
        rng.shuffle(rows)
        if rows.size:
            token = [place.put(y[rows, done[rows]]) for y in (x.q, x.k, x.v, x.a, x.b)]
            outputs[rows, done[rows]] = place.get(together.step(*token, slots[rows]))
            done[rows] += 1
    want, _ = states_after(x, T)
    assert_close(outputs, want, rtol=1e-6)
    # And no bit depends on who else was in the batch.
    alone, slots_alone = pool_of(place, x)
    for n in range(N):
        for t in range(T):
            assert_same_bits(step(place, alone, x, t, slots_alone, slice(n, n + 1))[0], outputs[n, t])
    assert_same_bits(place.get(alone.read(slots_alone)), place.get(together.read(slots)))


def test_padding_and_other_slots_are_left_alone(place):
    x = problem(2)
    state, slots = pool_of(place, x)
    before = place.get(state.read(slots))
    padded = slots.copy()
    padded[1] = -1
    for t in range(2):
        o = step(place, state, x, t, padded)
        assert not o[1].any()
    assert_same_bits(place.get(state.read(slots))[1], before[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_state_is_rounded_once_a_ring(place, dtype):
    x = problem(CAPACITY, state_dtype=dtype)
    state, slots = pool_of(place, x, dtype=dtype)
    start = place.get(state.read(slots)).copy()
    for t in range(CAPACITY):
        step(place, state, x, t, slots)
        if t < CAPACITY - 1:
            assert_same_bits(place.get(state._pool)[slots], start)  # nothing is written before the ring is full
    _, want = states_after(x, CAPACITY)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert_close(place.get(state.read(slots)), want, rtol=rounding)


def test_nbytes_and_repr_account_for_the_ring(place):
    x = problem(4)
    state, slots = pool_of(place, x)
    without, _ = pool_of(place, x, ring=0)
    assert without.nbytes == (N + 3) * HV * K * V * 4
    a_ring = state.nbytes - without.nbytes
    assert a_ring >= (N + 3) * CAPACITY * (H * K + HV * V) * 4
    for t in range(4):
        step(place, state, x, t, slots)
    state.flush()
    assert state.nbytes == without.nbytes + a_ring  # memory is taken once
    drafts = [place.put(y) for y in (x.q, x.k, x.v, x.a, x.b)]
    state.verify(*drafts, slots)
    with_drafts = state.nbytes
    assert with_drafts >= without.nbytes + a_ring
    state.verify(*drafts, slots)
    assert state.nbytes == with_drafts
    assert f"ring={CAPACITY}" in repr(state)
    assert "ring=0" in repr(without)
    assert "stagger=True" in repr(pool_of(place, x, stagger=True)[0])
    assert f"{with_drafts / 2**20:.1f} MiB" in repr(state)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"ring": 0}, {"ring": 5, "stagger": True}])
def test_copies_of_a_pool_have_its_ring(host, tmp_path, options):
    x = problem(1)
    state = gdr.DeltaRuleState(4, HV, K, V, num_k_heads=H, A_log=x.A_log, **options)
    sixteen = options.get("dtype") in ("float16", "bfloat16")
    assert state.ring == options.get("ring", RING["numpy" if sixteen else host.name])
    state.save(tmp_path / "pool")
    loaded = gdr.DeltaRuleState.load(tmp_path / "pool")
    assert repr(loaded) == repr(state)
    assert (loaded.ring, loaded.stagger) == (state.ring, options.get("stagger", False))


def test_a_pool_that_cannot_step_needs_no_ring(host):
    without = gdr.DeltaRuleState(4, HV, K, V, ring=16)
    assert without.nbytes == 4 * HV * K * V * 4
    slots = without.alloc(2)
    without.flush(slots)
    without.rollback(slots)
    without.commit(slots, [0, 0])
    assert not without.read(slots).any()


def written_by_step(place, state, x, slots):
    """Which slots' stored states each of some steps changed, ``[T, num_slots]``."""
    changed, before = [], place.get(state._pool)
    for t in range(x.q.shape[1]):
        step(place, state, x, t, slots)
        after = place.get(state._pool)
        changed.append((after != before).any(axis=(1, 2, 3)))
        before = after
    return np.array(changed)


@pytest.mark.parametrize("stagger", [False, True])
def test_every_slot_is_folded_once_a_period_and_staggered_ones_apart(place, stagger):
    B, ring = 12, 4
    x = problem(4 * ring + 1, B=B, num_slots=B)
    state, slots = pool_of(place, x, num_slots=B, ring=ring, stagger=stagger)
    written = written_by_step(place, state, x, slots)[1:]
    assert (written.sum(axis=0) == 4).all()
    assert set(written.sum(axis=1)) == ({B // ring} if stagger else {0, B})
    # Flushed together, they are folded apart again.
    state.flush()
    written = written_by_step(place, state, x, slots)
    assert set(written[1:].sum(axis=1)) == ({B // ring} if stagger else {0, B})


def test_no_bit_depends_on_the_slot_unless_staggered(place):
    x = problem(2 * CAPACITY + 5)
    results = []
    for order in (slice(None), slice(None, None, -1)):
        state, slots = pool_of(place, x)
        slots = slots[order]
        state.write(slots, place.put(x.state))
        o = np.stack([step(place, state, x, t, slots) for t in range(x.q.shape[1])], axis=1)
        results.append((o, place.get(state.read(slots))))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fork_goes_on_with_the_bits_of_the_original(place, dtype):
    x = problem(3 * CAPACITY, state_dtype=dtype)
    state, slots = pool_of(place, x, dtype=dtype)
    for t in range(5):
        step(place, state, x, t, slots)
    forks = state.fork(slots)
    for t in range(5, x.q.shape[1]):
        assert_same_bits(step(place, state, x, t, slots), step(place, state, x, t, forks))
    assert_same_bits(place.get(state.read(slots)), place.get(state.read(forks)))


def test_reading_changes_no_bit_of_what_follows(place):
    x = problem(2 * CAPACITY)
    state, slots = pool_of(place, x)
    read_often, _ = pool_of(place, x)
    for t in range(x.q.shape[1]):
        want = step(place, state, x, t, slots)
        assert_same_bits(step(place, read_often, x, t, slots), want)
        read_often.read(slots)
    assert_same_bits(place.get(read_often.read(slots)), place.get(state.read(slots)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deferral_makes_16_bit_states_more_accurate(place, dtype):
    x = problem(400, gates="slow", state_dtype=dtype)
    _, want = states_after(x, 400)
    errors = []
    for ring in (0, CAPACITY):
        state, slots = pool_of(place, x, dtype=dtype, ring=ring)
        for t in range(400):
            step(place, state, x, t, slots)
        errors.append(relative_rms(place.get(state.read(slots)), want))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.gpu
def test_steps_with_a_ring_in_a_graph():
    import cupy

    place = Place("cuda")
    x = problem(3 * CAPACITY)
    state, slots = pool_of(place, x)
    on_device = cupy.asarray(slots)
    token = [place.put(y[:, 0].copy()) for y in (x.q, x.k, x.v, x.a, x.b)]
    out = cupy.empty_like(token[2])
    state.step(*token, on_device, out=out)  # compiles
    state.write(slots, place.put(x.state))
    stream = cupy.cuda.Stream(non_blocking=True)
    outputs = []
    with stream:
        stream.begin_capture()
        state.step(*token, on_device, out=out)
        graph = stream.end_capture()
        for t in range(x.q.shape[1]):
            for to, y in zip(token, (x.q, x.k, x.v, x.a, x.b)):
                to.set(np.ascontiguousarray(y[:, t]))
            graph.launch()
            stream.synchronize()
            outputs.append(out.get())
    want, pool = states_after(x, x.q.shape[1])
    assert_close(np.stack(outputs, axis=1), want, rtol=1e-6)
    assert_close(place.get(state.read(slots)), pool, rtol=1e-6)


def test_changing_the_backend_between_steps_loses_nothing(host, monkeypatch):
    pytest.importorskip("numba")
    x = problem(4)
    state, slots = pool_of(host, x)
    outputs = []
    for t in range(4):
        monkeypatch.setenv("GDR_CPU", "numba" if t % 2 else "numpy")
        outputs.append(step(host, state, x, t, slots))
    want, pool = states_after(x, 4)
    assert_close(np.stack(outputs, axis=1), want, rtol=1e-6)
    assert_close(state.read(slots), pool, rtol=1e-6)


def test_forgetting_everything_gives_no_nan(place):
    x = problem(6)
    state, slots = pool_of(place, x)
    x.a[0, [2, 4]] = 1e30  # g = -inf
    o = np.stack([step(place, state, x, t, slots) for t in range(6)], axis=1)
    want, pool = states_after(x, 6)
    assert_close(o, want, rtol=1e-6)
    assert_close(place.get(state.read(slots)), pool, rtol=1e-6)
