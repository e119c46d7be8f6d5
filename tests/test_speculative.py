"""Speculative decoding: drafts verified without being committed, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
from places import RTOL, Place, assert_same_bits

from gdr import DeltaRuleState, explain, reference
from gdr.testing import assert_close, make_inputs

N, H, HV, K, V = 3, 2, 4, 16, 24
RINGS = [0, 1, 5, 16]
# For what does not depend on the backend.
HOST = Place("numpy")


def problem(T, **options):
    return make_inputs(**({"B": N, "T": T, "H": H, "HV": HV, "K": K, "V": V, "num_slots": N} | options))


def tokens(place, x, rows=slice(None), at=slice(None)):
    """Operands of some rows and some tokens."""
    return [place.put(np.ascontiguousarray(y[rows, at])) for y in (x.q, x.k, x.v, x.a, x.b)]


def pool_of(place, x, **options):
    """A pool with the states of a problem in slots that are not in order, and those slots."""
    heads = {"num_k_heads": x.q.shape[2], "A_log": place.put(x.A_log), "dt_bias": place.put(x.dt_bias)}
    sizes = (x.v.shape[2], x.q.shape[3], x.v.shape[3])
    state = DeltaRuleState(2 * N, *sizes, **heads, device="cpu" if place.on_host else "cuda", **options)
    slots = state.alloc(2 * N)[[4, 1, 2]]
    state.write(slots, place.put(x.state))
    return state, slots


def step(place, state, x, t, slots):
    return place.get(state.step(*tokens(place, x, at=slice(t, t + 1)), slots))[:, 0]


def oracle(x, h, paths, layout="kv"):
    """Outputs of the last token of each sequence's path from its state, and the states after it; in float64."""
    outputs, states = np.zeros((len(paths), *x.v.shape[2:])), np.array(h, np.float64)
    for n, path in enumerate(paths):
        if len(path):
            row = [y[n : n + 1, path] for y in (x.q, x.k, x.v)]
            o, after = reference.fused_sigmoid_gating_delta_rule_update(
                x.A_log, x.a[n : n + 1, path], x.dt_bias, 1.0, 20.0, *row, x.b[n : n + 1, path], states[n : n + 1],
                np.zeros(1, int), use_qk_l2norm_in_kernel=True, state_layout=layout,
            )  # fmt: skip
            outputs[n], states[n] = o[0, -1], after[0]
    return outputs, states


def chain(T):
    return np.tile(np.arange(-1, T - 1), (N, 1))


def random_tree(T, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([[rng.integers(-1, t) if t else -1 for t in range(T)] for _ in range(N)])


def path_to(parents, t):
    path = []
    while t >= 0:
        path.insert(0, int(t))
        t = parents[t]
    return path


def padded(paths, length=None):
    """Paths as an array, padded by -1."""
    accepted = np.full((len(paths), max(map(len, paths)) if length is None else length), -1)
    for row, path in zip(accepted, paths):
        row[: len(path)] = path
    return accepted


# -- verify
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("T", [1, 2, 5, 16])
def test_verified_drafts_are_steps_that_are_not_committed(place, T, layout, ring):
    x, before = problem(T, layout=layout), problem(3, seed=1)
    state, slots = pool_of(place, x, layout=layout, ring=ring)
    for t in range(3):
        step(place, state, before, t, slots)
    h = place.get(state.read(slots))
    out = place.poisoned(x.v)
    o = state.verify(*tokens(place, x), slots, out=out)
    assert_same_bits(place.get(o), place.get(out))
    assert_same_bits(place.get(state.read(slots)), h)
    for t in range(T):
        want, _ = oracle(x, h, [range(t + 1)] * N, layout)
        assert_close(place.get(o)[:, t], want, rtol=RTOL["float32"], name=f"o of draft {t}")


@pytest.mark.parametrize("ring", [0, 16])
@pytest.mark.parametrize("seed", range(4))
def test_a_draft_of_a_tree_sees_its_ancestors_alone(place, seed, ring):
    T = 12
    x, parents = problem(T, seed=seed), random_tree(T, seed)
    state, slots = pool_of(place, x, ring=ring)
    o = place.get(state.verify(*tokens(place, x), slots, place.put(parents)))
    h = place.get(state.read(slots))
    for t in range(T):
        want, _ = oracle(x, h, [path_to(parents[n], t) for n in range(N)])
        assert_close(o[:, t], want, rtol=RTOL["float32"], name=f"o of draft {t}")


@pytest.mark.parametrize("kind", ["chain", "star"])
def test_chains_and_stars_as_trees(place, kind):
    T = 6
    x = problem(T)
    state, slots = pool_of(place, x)
    if kind == "chain":
        want = place.get(state.verify(*tokens(place, x), slots))
        got = place.get(state.verify(*tokens(place, x), slots, chain(T).astype(np.int32)))
        assert_close(got, want, rtol=1e-6)
    else:
        got = place.get(state.verify(*tokens(place, x), slots, np.full((N, T), -1)))
        for t in range(T):
            one = state.verify(*tokens(place, x, at=slice(t, t + 1)), slots)
            assert_close(got[:, t], place.get(one)[:, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(place, dtype, state_dtype):
    x = problem(5, dtype=dtype, state_dtype=state_dtype)
    state, slots = pool_of(place, x, dtype=state_dtype, ring=8)
    h = place.get(state.read(slots))
    o = place.get(state.verify(*tokens(place, x), slots))
    assert o.dtype == x.v.dtype
    for t in range(5):
        want, after = oracle(x, h, [range(t + 1)] * N)
        assert_close(o[:, t], want, rtol=max(RTOL[dtype], RTOL[state_dtype] if t else 0))
    state.commit(slots, [5, 5, 5])
    assert_close(place.get(state.read(slots)), after, rtol=2 * RTOL[state_dtype])


def test_padding(place):
    x = problem(4)
    state, slots = pool_of(place, x)
    some = slots.copy()
    some[1] = -3
    o = place.get(state.verify(*tokens(place, x), some))
    assert not o[1].any()
    assert o[[0, 2]].any(axis=(1, 2, 3)).all()
    h = place.get(state.read(slots))
    _, want = oracle(x, h, [range(2), range(0), range(1)])
    state.rollback([-1])
    state.commit(some, [2, 4, 1])
    got = place.get(state.read(slots))
    assert_same_bits(got[1], h[1])
    assert_close(got, want, rtol=RTOL["float32"])
    nobody = np.full(N, -1)
    assert not place.get(state.verify(*tokens(place, x), nobody)).any()
    state.commit(nobody, [1, 2, 3])
    assert_same_bits(place.get(state.read(slots)), got)


def test_no_sequence(place):
    x = problem(4, B=0)
    state, slots = pool_of(place, problem(1))
    assert state.verify(*tokens(place, x), slots[:0]).shape == (0, 4, HV, V)
    assert state.verify(*tokens(place, x), slots[:0], np.zeros((0, 4), int)).shape == (0, 4, HV, V)
    state.commit([], [])
    state.commit([], np.zeros((0, 3), int))
    state.rollback([])
    state.flush([])


@pytest.mark.parametrize("parents", [None, "tree"])
def test_a_sequence_does_not_know_its_batch(place, parents):
    T = 7
    x = problem(T)
    parents = None if parents is None else random_tree(T)
    together, slots = pool_of(place, x)
    alone, _ = pool_of(place, x)
    steps = problem(2, seed=1)
    paths = [path_to(parents[n] if parents is not None else chain(T)[n], T - 1) for n in range(N)]
    for t in range(2):
        step(place, together, steps, t, slots)
    o = place.get(together.verify(*tokens(place, x), slots, parents))
    together.commit(slots, padded(paths))
    for n in range(N):
        one = slice(n, n + 1)
        for t in range(2):
            alone.step(*tokens(place, steps, one, slice(t, t + 1)), slots[one])
        got = alone.verify(*tokens(place, x, one), slots[one], None if parents is None else parents[one])
        assert_same_bits(place.get(got)[0], o[n])
        alone.commit(slots[one], padded(paths[one]))
    assert_same_bits(place.get(alone.read(slots)), place.get(together.read(slots)))


def test_bad_values_stay_in_their_sequence(place):
    x = problem(4)
    state, slots = pool_of(place, x)
    clean = place.get(state.verify(*tokens(place, x), slots))
    x.v[1, 2, 0] = np.nan
    x.a[2, 1] = 1e30  # g = -inf
    o = place.get(state.verify(*tokens(place, x), slots))
    assert_same_bits(o[0], clean[0])
    assert_close(o[1, :2], clean[1, :2], rtol=1e-6)
    assert_same_bits(o[1, :, 1:], clean[1, :, 1:])
    assert np.isnan(o[1, 2:, 0]).all()
    assert np.isfinite(o[2]).all()
    h = place.get(state.read(slots))
    _, want = oracle(x, h, [range(4), range(2), range(4)])
    state.commit(slots, [4, 2, 4])
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


def test_bad_values_stay_on_their_path(place):
    parents = np.array([[-1, 0, 0, 1, 2, -1]] * N)
    x = problem(6)
    state, slots = pool_of(place, x)
    clean = place.get(state.verify(*tokens(place, x), slots, parents))
    x.v[0, 1, 0], x.k[0, 1, 1] = np.inf, np.nan
    o = place.get(state.verify(*tokens(place, x), slots, parents))
    assert_same_bits(o[1:], clean[1:])
    assert not np.isfinite(o[0, [1, 3], 0]).any()
    assert_close(o[0, [0, 2, 4, 5]], clean[0, [0, 2, 4, 5]], rtol=1e-6)
    h = place.get(state.read(slots))
    _, want = oracle(x, h, [[0, 2, 4], [5], []])
    state.commit(slots, padded([[0, 2, 4], [5], []]))
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


# -- commit and rollback
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("before", [0, 3, 14])
def test_verify_and_commit_is_as_many_steps(place, ring, before):
    # Every number of drafts, and different numbers in one batch, at every fill of the ring.
    T = 8
    x, earlier = problem(T), problem(before, seed=1)
    for counts in ([n, (n + 3) % (T + 1), (2 * n + 1) % (T + 1)] for n in range(T + 1)):
        state, slots = pool_of(place, x, ring=ring)
        plain, _ = pool_of(place, x, ring=ring)
        for t in range(before):
            step(place, state, earlier, t, slots)
            step(place, plain, earlier, t, slots)
        state.verify(*tokens(place, x), slots)
        state.commit(slots, np.array(counts))
        for t in range(T):
            going = np.flatnonzero(np.array(counts) > t)
            plain.step(*tokens(place, x, going, slice(t, t + 1)), slots[going])
        assert_close(place.get(state.read(slots)), place.get(plain.read(slots)), rtol=1e-6)
        # A following step needs no special call.
        after = problem(1, seed=2)
        got, want = step(place, state, after, 0, slots), step(place, plain, after, 0, slots)
        assert_close(got, want, rtol=1e-6)
        assert_close(place.get(state.read(slots)), place.get(plain.read(slots)), rtol=1e-6)


@pytest.mark.parametrize("ring", RINGS)
def test_committed_paths_of_trees(place, ring):
    T = 16
    rng = np.random.default_rng(0)
    start = problem(1)
    state, slots = pool_of(place, start, ring=ring)
    h = start.state.astype(np.float64)
    for seed in range(8):
        x, parents = problem(T, seed=seed), random_tree(T, seed)
        x.A_log, x.dt_bias = start.A_log, start.dt_bias
        state.verify(*tokens(place, x), slots, parents)
        paths = [path_to(parents[n], rng.integers(-1, T)) for n in range(N)]
        state.commit(slots, padded(paths, T))
        _, h = oracle(x, h, paths)
        assert_close(place.get(state.read(slots)), h, rtol=RTOL["float32"])


def test_a_path_along_a_chain_is_a_count(place):
    x = problem(5)
    one, slots = pool_of(place, x)
    two, _ = pool_of(place, x)
    for state, accepted in ((one, [2, 0, 5]), (two, padded([range(2), [], range(5)]))):
        state.verify(*tokens(place, x), slots)
        state.commit(slots, accepted)
    assert_same_bits(place.get(one.read(slots)), place.get(two.read(slots)))


@pytest.mark.parametrize("ring", [0, 16])
def test_a_number_names_a_draft_of_a_tree_and_its_ancestors(place, ring):
    x, parents = problem(12), random_tree(12)
    for number in range(13):
        one, slots = pool_of(place, x, ring=ring)
        two, _ = pool_of(place, x, ring=ring)
        numbers = np.array([number, 12 - number, (5 * number) % 13])
        paths = [path_to(parents[n], numbers[n] - 1) for n in range(N)]
        for state, accepted in ((one, numbers), (two, padded(paths, 12))):
            state.verify(*tokens(place, x), slots, parents)
            state.commit(slots, accepted)
        assert_same_bits(place.get(one.read(slots)), place.get(two.read(slots)))


def test_slots_may_be_committed_apart(place):
    x = problem(5)
    state, slots = pool_of(place, x)
    h = place.get(state.read(slots))
    state.verify(*tokens(place, x), slots)
    order = [2, 0]
    state.commit(slots[order], [1, 4])
    state.commit(slots[[1]], [3])
    _, want = oracle(x, h, [range(4), range(3), range(1)])
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(
    "ending", ["rollback", "commit none", "step", "prefill", "write", "reset", "flush", "flush all", "pool", "verify"]
)
def test_what_ends_drafts(place, ending, ring):
    x, other = problem(6), problem(1, seed=1)
    state, slots = pool_of(place, x, ring=ring)
    plain, _ = pool_of(place, x, ring=ring)
    for each in (state, plain):
        step(place, each, other, 0, slots)
    h = place.get(state.read(slots))
    state.verify(*tokens(place, x), slots)
    if ending == "rollback":
        state.rollback(slots)
    elif ending == "commit none":
        state.commit(slots, [0, 0, 0])
    elif ending == "verify":
        got = state.verify(*tokens(place, other), slots)
        assert_close(place.get(got), place.get(plain.verify(*tokens(place, other), slots)), rtol=1e-6)
    elif ending == "pool":
        assert_close(place.get(state.pool)[slots], h, rtol=1e-6)
    elif ending.startswith("flush"):
        state.flush(slots if ending == "flush" else None)
    else:
        for each in (state, plain):
            if ending == "step":
                step(place, each, other, 0, slots)
            elif ending == "prefill":
                each.prefill(*tokens(place, problem(20, seed=2)), slots)
            elif ending == "write":
                each.write(slots, place.put(x.state))
            else:
                each.reset(slots)
    assert_close(place.get(state.read(slots)), place.get(plain.read(slots)), rtol=1e-6)
    if place.on_host and ending != "verify":
        with pytest.raises(ValueError, match="accepted"):
            state.commit(slots, [0, 1, 0])
    state.commit(slots, [0, 0, 0])
    assert_close(place.get(state.read(slots)), place.get(plain.read(slots)), rtol=1e-6)
    assert_close(step(place, state, other, 0, slots), step(place, plain, other, 0, slots), rtol=1e-6)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("reader", ["read", "fork", "save", "to"])
def test_readers_leave_drafts_as_they_are_and_do_not_see_them(place, tmp_path, reader, ring):
    x, other = problem(6), problem(3, seed=1)
    state, slots = pool_of(place, x, ring=ring)
    for t in range(3):
        step(place, state, other, t, slots)
    h = place.get(state.read(slots))
    state.verify(*tokens(place, x), slots)
    if reader == "read":
        got = state.read(slots)
    elif reader == "fork":
        forks = state.alloc(0)
        state.free([s for s in range(2 * N) if s not in slots])
        forks = state.fork(slots)
        got = state.read(forks)
        if place.on_host:
            with pytest.raises(ValueError, match="accepted"):
                state.commit(forks, [1, 1, 1])
    elif reader == "save":
        state.save(tmp_path / "pool")
        got = DeltaRuleState.load(tmp_path / "pool", device=state.device).read(slots)
    else:
        got = state.to("cpu").read(slots)
    assert_same_bits(place.get(got) if reader != "to" else got, h)
    state.commit(slots, [6, 1, 3])
    _, want = oracle(x, h, [range(6), range(1), range(3)])
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


@pytest.mark.parametrize("ring", [0, 16])
def test_explaining_a_call_drops_no_drafts(host, ring):
    x = problem(6)
    state, slots = pool_of(host, x, ring=ring)
    h = state.read(slots)
    state.verify(*tokens(host, x), slots)
    for method in (state.prefill, state.verify):
        explain(method, *tokens(host, x), slots)
    explain(state.step, *tokens(host, x, at=slice(0, 1)), slots)
    state.commit(slots, [6, 1, 3])
    _, want = oracle(x, h, [range(6), range(1), range(3)])
    assert_close(state.read(slots), want, rtol=RTOL["float32"])


def test_freed_drafts_do_not_come_back(place):
    x = problem(4)
    state, slots = pool_of(place, x)
    state.verify(*tokens(place, x), slots)
    state.free(slots)
    again = state.alloc(3)
    assert sorted(again) == sorted(slots)
    if place.on_host:
        with pytest.raises(ValueError, match="accepted"):
            state.commit(again, [1, 1, 1])
    state.commit(again, [0, 0, 0])
    assert not place.get(state.read(again)).any()


# -- refusals
# ------------------------------------------------------------------------------------------------------


def drafted(place, T=4, parents=None):
    x = problem(T)
    state, slots = pool_of(place, x)
    state.verify(*tokens(place, x), slots, parents)
    return x, state, slots


@pytest.mark.parametrize(
    ("accepted", "error"),
    [
        ([1, 5, 0], ValueError),
        ([1, -1, 0], ValueError),
        ([1, 2], ValueError),
        ([[0], [0]], ValueError),
        (1, ValueError),
        (np.zeros((3, 1, 1), int), ValueError),
        ([1.0, 2.0, 0.0], TypeError),
        ([True, False, True], TypeError),
        (None, TypeError),
        ("123", TypeError),
        ([[0, 2], [-1, -1], [0, 1]], ValueError),  # 2 does not follow 0
        ([[1, -1], [-1, -1], [0, 1]], ValueError),  # 1 is no root
        ([[-1, 0], [-1, -1], [0, 1]], ValueError),
        ([[0, 0], [-1, -1], [0, 1]], ValueError),
        ([[0, 4], [-1, -1], [0, 1]], ValueError),
        ([[0, 2**40], [-1, -1], [0, 1]], ValueError),
    ],
)
def test_wrong_counts_and_paths_are_refused(host, accepted, error):
    x, state, slots = drafted(host)
    h = state.read(slots)
    with pytest.raises(error, match="accepted"):
        state.commit(slots, accepted)
    assert_same_bits(state.read(slots), h)
    state.commit(slots, [1, 4, 0])  # the drafts are still there
    _, want = oracle(x, h, [range(1), range(4), []])
    assert_close(state.read(slots), want, rtol=RTOL["float32"])


def test_the_path_must_be_one_of_the_tree(host):
    parents = np.array([[-1, 0, 0, 1]] * N)
    _, state, slots = drafted(host, 4, parents)
    for wrong in ([0, 1, 2], [1], [0, 3], [0, 2, 3], [2], [0, -1, 1]):
        with pytest.raises(ValueError, match=r"accepted.*path"):
            state.commit(slots, padded([wrong, [0], [0]]))
    state.commit(slots, padded([[0, 2], [0, 1, 3], []]))


@pytest.mark.parametrize(
    ("parents", "error"),
    [
        ([[-1, 1, 0]] * N, ValueError),
        ([[-1, 0, -2]] * N, ValueError),
        ([[0, 0, 0]] * N, ValueError),
        ([[-1, 0, 3]] * N, ValueError),
        ([[-1, 0]] * N, ValueError),
        ([[-1, 0, 0]] * (N - 1), ValueError),
        ([-1, 0, 0], ValueError),
        ([[-1.0, 0.0, 1.0]] * N, TypeError),
        ("tree", TypeError),
        (0, ValueError),
    ],
)
def test_wrong_parents_are_refused(host, parents, error):
    x = problem(3)
    state, slots = pool_of(host, x)
    h = state.read(slots)
    with pytest.raises(error, match="parents"):
        state.verify(*tokens(host, x), slots, parents)
    assert_same_bits(state.read(slots), h)


@pytest.mark.parametrize("T", [0, 17])
def test_from_1_to_16_drafts(place, T):
    x = problem(T)
    state, slots = pool_of(place, x)
    with pytest.raises(ValueError, match=r"\bq\b.*16"):
        state.verify(*tokens(place, x), slots)


def test_wrong_slots_and_operands_are_refused(place):
    x, state, slots = drafted(place)
    free = state.alloc(0)
    other = next(s for s in range(2 * N) if s not in slots)
    state.free([other])
    h = place.get(state.read(slots))
    arguments = tokens(place, x)
    for wrong, error in (
        ([slots[0], slots[0], slots[1]], ValueError),
        ([slots[0], other, slots[1]], ValueError),
        ([slots[0], slots[1], 2 * N], IndexError),
        ([0.5, 1, 2], TypeError),
    ):
        for call in (
            lambda s: state.verify(*arguments, s),
            lambda s: state.commit(s, [0, 0, 0]),
            state.rollback,
            state.flush,
        ):
            with pytest.raises(error, match="slots"):
                call(wrong)
    for at, name in enumerate("qkvab"):
        wrong = list(arguments)
        wrong[at] = wrong[at][:, :2]
        with pytest.raises(ValueError, match=rf"\b{'[vk]' if name == 'q' else name}\b"):
            state.verify(*wrong, slots)
    with pytest.raises(ValueError, match="A_log"):
        DeltaRuleState(8, HV, K, V, num_k_heads=H).verify(*tokens(HOST, x), slots)
    assert free.size == 0
    assert_same_bits(place.get(state.read(slots)), h)
    state.commit(slots, [4, 4, 4])
    _, want = oracle(x, h, [range(4)] * N)
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


# -- on a device
# ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nothing_on_a_device_goes_out_of_bounds():
    import cupy

    place = Place("cuda")
    x = problem(4)
    state, slots = pool_of(place, x)
    h = place.get(state.read(slots))
    on_device = cupy.asarray(slots)
    parents = cupy.asarray([[7, -5, 1, 2**30], [-1, 0, 1, 2], [-1, 0, 3, 1]])
    good = np.array([[-1, -1, 1, -1], [-1, 0, 1, 2], [-1, 0, -1, 1]])
    o = place.get(state.verify(*tokens(place, x), on_device, parents))
    for t in range(4):
        want, _ = oracle(x, h, [path_to(good[n], t) for n in range(N)])
        assert_close(o[:, t], want, rtol=RTOL["float32"])
    state.verify(*tokens(place, x), on_device)
    state.commit(cupy.asarray([slots[0], 2**30, slots[2]]), cupy.asarray([99, 1, -5]))
    _, want = oracle(x, h, [range(4), [], []])
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])
    state.commit(on_device, cupy.asarray([4, 4, 4]))  # slot 1 has its drafts still, the others have none
    _, want = oracle(x, h, [range(4), range(4), []])
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])
    state.verify(*tokens(place, x), on_device)
    h = place.get(state.read(slots))
    state.commit(on_device, cupy.asarray([[0, 1, 9], [-1, 0, 1], [0, 1, 2**30]]))
    _, want = oracle(x, h, [range(4), range(2), range(4)])  # the last of each row, cut
    assert_close(place.get(state.read(slots)), want, rtol=RTOL["float32"])


@pytest.mark.gpu
def test_speculation_in_a_graph():
    import cupy

    place = Place("cuda")
    x = problem(4)
    state, slots = pool_of(place, x, ring=8)
    plain, _ = pool_of(place, x, ring=0)
    arguments, on_device = tokens(place, x), cupy.asarray(slots)
    accepted, out = cupy.asarray([4, 1, 0]), place.poisoned(x.v)
    one = tokens(place, x, at=slice(0, 1))
    out_of_one = place.poisoned(x.v[:, :1])

    def run():
        state.verify(*arguments, on_device, out=out)
        state.commit(on_device, accepted)
        state.step(*one, on_device, out=out_of_one)

    run()  # compiles, and takes memory
    state.write(slots, place.put(x.state))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        for counts in ([4, 1, 0], [0, 2, 4], [3, 3, 3], [4, 4, 4]):
            accepted.set(np.array(counts))
            graph.launch()
            stream.synchronize()
            for t in range(4):
                going = np.flatnonzero(np.array(counts) > t)
                if going.size:
                    plain.step(*tokens(place, x, going, slice(t, t + 1)), slots[going])
            want = step(place, plain, x, 0, slots)
            assert_close(place.get(out_of_one)[:, 0], want, rtol=RTOL["float32"])
    assert_close(place.get(state.read(slots)), place.get(plain.read(slots)), rtol=RTOL["float32"])
