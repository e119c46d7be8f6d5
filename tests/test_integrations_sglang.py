"""SGLang's fused decode function on gdr.

Without a GPU it is compared with the float64 reference.  With one it is compared with SGLang's Triton kernel as well,
where GDR_SGLANG_KERNEL is the path of its file ``fused_sigmoid_gating_recurrent.py``, out of the wheel of the version
that `gdr.integrations.sglang` names.  The file is loaded alone, so nothing else of SGLang need be installed.
"""

from __future__ import annotations

import doctest
import os
import types
from pathlib import Path

import numpy as np
import pytest
import sglang_kernel
from signatures import NO_DEFAULT, positional, positional_of

torch = pytest.importorskip("torch")

import gdr  # noqa: E402
from gdr import reference  # noqa: E402
from gdr.integrations import sglang  # noqa: E402
from gdr.integrations.sglang import draft_parents  # noqa: E402
from gdr.integrations.sglang import fused_sigmoid_gating_delta_rule_update as update  # noqa: E402
from gdr.testing import assert_close, make_inputs, to_numpy  # noqa: E402

KERNEL = os.environ.get("GDR_SGLANG_KERNEL", "")
# Relative RMS error that an output or a state of each dtype may have.
RTOL = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# SGLang takes log(1 + exp(x)) in float32, which loses digits of a small softplus.
RTOL_SGLANG = RTOL | {torch.float32: 2e-5}
REFUSED = {
    "is_kda": True,
    "lower_bound": -5.0,
    "cache_ring": True,
    "replayssm_rawv": torch.zeros(1),
    "replayssm_rawk": torch.zeros(1),
    "replayssm_g": torch.zeros(1),
    "replayssm_beta": torch.zeros(1),
    "match_cutedsl_decode": True,
}


def problem(device="cpu", **shape):
    """Inputs as SGLang's callers have them: a and b of shape [tokens, HV], the pool [slots, HV, V, K]."""
    x = make_inputs(**{"H": 2, "HV": 4, "K": 16, "V": 24, "layout": "vk", "normalize": False} | shape)
    x = x.to("torch", device)
    x.a, x.b = x.a.flatten(0, 1), x.b.flatten(0, 1)
    return x


def call(function, x, pool, **rest):
    args = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, x.slots)
    return function(*args, **{"use_qk_l2norm_in_kernel": True, "cu_seqlens": x.cu_seqlens} | rest)


def as_slices(x):
    """Make q, k and v slices of one tensor, and b and a of another, as the projections of a model leave them."""
    packed = torch.cat([t.flatten(2) for t in (x.q, x.k, x.v)], -1)
    widths = [t.shape[2] * t.shape[3] for t in (x.q, x.k, x.v)]
    x.q, x.k, x.v = (
        part.unflatten(-1, t.shape[2:]) for part, t in zip(packed.split(widths, -1), (x.q, x.k, x.v), strict=True)
    )
    x.b, x.a = torch.cat([x.b, x.a], -1).chunk(2, -1)


def expected(x, **rest):
    """The float64 output and pool."""
    arrays = {name: to_numpy(value) for name, value in vars(x).items()}
    return call(reference.fused_sigmoid_gating_delta_rule_update, types.SimpleNamespace(**arrays), arrays["state"],
                state_layout="vk", **rest)  # fmt: skip


SHAPES = {
    "decode": {"B": 5, "T": 1},
    "verify": {"B": 3, "T": 4},
    "packed": {"lengths": [3, 0, 1, 7]},
    "bfloat16": {"B": 4, "T": 2, "dtype": "bfloat16", "gate_dtype": "bfloat16"},
    "bfloat16 pool": {"B": 4, "T": 2, "dtype": "bfloat16", "state_dtype": "bfloat16"},
    "float16": {"B": 2, "T": 1, "dtype": "float16"},
    "slow gates": {"B": 2, "T": 64, "gates": "slow"},
    "fast gates": {"B": 2, "T": 8, "gates": "fast"},
    "correlated keys": {"B": 2, "T": 32, "gates": "none", "keys": "correlated"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_against_the_reference(shape, device):
    x = problem(device, **shape)
    want, pool = expected(x)
    got = call(update, x, x.state)
    assert got.shape == x.v.shape
    assert got.dtype == x.v.dtype
    assert_close(got, want, rtol=RTOL[got.dtype], name="o")
    assert_close(x.state, pool, rtol=RTOL[x.state.dtype], name="pool")


def test_a_pool_whose_slots_lie_apart():
    x = problem(B=3, T=2)
    pages = torch.full((*x.state.shape[:1], 3, *x.state.shape[1:]), torch.nan)
    pool = pages[:, 1]
    pool.copy_(x.state)
    want, after = expected(x)
    assert_close(call(update, x, pool), want, rtol=5e-6)
    assert_close(pool, after, rtol=5e-6)
    assert pages[:, ::2].isnan().all()


def test_strided_queries_keys_and_values():
    x = problem(B=3, T=2)
    want = call(update, x, x.state.clone())
    as_slices(x)
    assert not x.v.is_contiguous()
    assert torch.equal(call(update, x, x.state), want)


def test_rows_of_a_batch_lie_where_their_own_axis_says():
    # The axis of T == 1 of these slices has a stride of its own: H * K, not the width of a packed row.
    x = problem(B=4, T=1)
    want, pool = expected(x)
    as_slices(x)
    assert x.q.stride()[:2] == (x.q.stride(0), 2 * 16)
    assert x.q.stride(0) > 2 * 16
    assert_close(call(update, x, x.state), want, rtol=5e-6, name="o")
    assert_close(x.state, pool, rtol=5e-6, name="pool")


def test_without_a_pool():
    x = problem(B=2, T=3)
    got = update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, None, None, scale=0.5, use_qk_l2norm_in_kernel=True
    )
    x.state.zero_()
    want, _ = expected(x, scale=0.5)
    assert_close(got, want, rtol=5e-6)


def test_the_pool_stays_with_disable_state_update():
    x = problem(B=2, T=3)
    before = x.state.clone()
    want, _ = expected(x)
    assert_close(call(update, x, x.state, disable_state_update=True), want, rtol=5e-6)
    assert torch.equal(x.state, before)


def test_negative_slots_are_padding():
    x = problem(B=3, T=2)
    x.slots[1] = -1
    before = x.state.clone()
    got = call(update, x, x.state)
    assert not got[1].any()
    assert got[0].any()
    untouched = [s for s in range(len(before)) if s not in x.slots.tolist()]
    assert torch.equal(x.state[untouched], before[untouched])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused(name):
    x = problem(B=2, T=1)
    before = x.state.clone()
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        call(update, x, x.state, **{name: REFUSED[name]})
    assert torch.equal(x.state, before)
    call(update, x, x.state, **{name: False if REFUSED[name] is True else None})


def test_every_argument_is_implemented_or_refused():
    implemented = [name for name, _ in positional_of(update) if name not in REFUSED]
    assert implemented == [
        *("A_log", "a", "dt_bias", "softplus_beta", "softplus_threshold", "q", "k", "v", "b"),
        *("initial_state_source", "initial_state_indices", "scale", "use_qk_l2norm_in_kernel", "cu_seqlens"),
        *("disable_state_update", "intermediate_states_buffer", "intermediate_state_indices", "cache_steps"),
        "retrieve_parent_token",
    ]


# -- states after every token, and trees

DRAFTS = {
    "batch": {"B": 3, "T": 5},
    "packed": {"lengths": [5, 5, 5]},
    "ragged": {"lengths": [2, 0, 5]},
    "bfloat16": {"lengths": [4, 4, 4], "dtype": "bfloat16", "state_dtype": "bfloat16"},
}
CACHED = {torch.float32: 5e-6, torch.bfloat16: 4e-3}


def buffer_for(x, rows=6, steps=5, room=2):
    """A buffer of NaN whose rows have room for more steps, and rows of it for three sequences."""
    _, HV, V, K = x.state.shape
    whole = torch.full((rows, steps + room, HV, V, K), torch.nan, dtype=x.state.dtype, device=x.state.device)
    return whole[:, :steps], torch.tensor([4, 0, 3], dtype=torch.int32, device=x.state.device), whole


def drafts_of(x):
    """The tokens of each sequence, in float64, as a batch of one."""
    arrays = {name: to_numpy(getattr(x, name)).astype(np.float64) for name in ("q", "k", "v", "a", "b")}
    if x.cu_seqlens is None:
        B, T = arrays["v"].shape[:2]
        spans = [(n, slice(None)) for n in range(B)]
        arrays |= {name: arrays[name].reshape(B, T, -1) for name in "ab"}
    else:
        spans = [(0, slice(*pair)) for pair in zip(x.cu_seqlens.tolist(), x.cu_seqlens.tolist()[1:])]
        arrays |= {name: arrays[name][None] for name in "ab"}
    return [{name: y[row, part][None] for name, y in arrays.items()} for row, part in spans]


def along_paths(x, parents=None):
    """Outputs and states in float64 after every token of each sequence and those that it follows."""
    heads = [to_numpy(y).astype(np.float64) for y in (x.A_log, x.dt_bias)]
    outs, states = [], []
    for n, tokens in enumerate(drafts_of(x)):
        T = tokens["v"].shape[1]
        start = to_numpy(x.state[int(x.slots[n])]).astype(np.float64)[None]
        for t in range(T):
            path = [t]
            while path[0] > 0:
                path.insert(0, path[0] - 1 if parents is None else int(parents[n, path[0]]))
            part = {name: y[:, path] for name, y in tokens.items()}
            pool = start.copy()
            o, after = reference.fused_sigmoid_gating_delta_rule_update(
                heads[0], part["a"], heads[1], 1.0, 20.0, part["q"], part["k"], part["v"], part["b"], pool,
                np.array([0]), use_qk_l2norm_in_kernel=True, state_layout="vk",
            )  # fmt: skip
            outs.append(o[0, -1])
            states.append((n, t, after[0]))
    return np.array(outs), states


@pytest.mark.parametrize("shape", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_states_after_every_token(shape, tree, device):
    x = problem(device, num_slots=5, **shape)
    buffer, rows, whole = buffer_for(x)
    before, rest = x.state.clone(), {}
    # What the first token's parent is does not matter.
    parents = torch.tensor([[7, 0, 0, 1, 1], [0, 0, 1, 1, 3], [-9, 0, 1, 2, 0]], device=device) if tree else None
    if tree:
        rest["retrieve_parent_token"] = parents
    want, states = along_paths(x, parents)
    got = call(update, x, x.state, disable_state_update=True, intermediate_states_buffer=buffer,
               intermediate_state_indices=rows, cache_steps=5, **rest)  # fmt: skip
    assert got.shape == x.v.shape
    assert got.is_contiguous()
    assert_close(got.reshape(want.shape), want, rtol=RTOL[got.dtype], name="o")
    assert torch.equal(x.state, before)
    for n, t, state in states:
        assert_close(buffer[rows[n], t], state, rtol=CACHED[buffer.dtype] * (1 + t * tree), name=f"state {n}, {t}")
    touched = torch.zeros(whole.shape[:2], dtype=torch.bool)
    for n, t, _ in states:
        touched[rows[n], t] = True
    assert whole.cpu()[~touched].isnan().all()


def test_a_chain_may_also_update_the_pool():
    x = problem(lengths=[5, 2, 4])
    buffer, rows, _ = buffer_for(x)
    want, pool = expected(x)
    got = call(update, x, x.state, intermediate_states_buffer=buffer, intermediate_state_indices=rows)
    assert_close(got, want, rtol=5e-6, name="o")
    assert_close(x.state, pool, rtol=5e-6, name="pool")
    assert_close(buffer[rows[0], 4], pool[x.slots[0]], rtol=5e-6, name="the last state")


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_rows_without_a_place_keep_no_states(tree):
    x = problem(B=3, T=5)
    buffer, rows, whole = buffer_for(x)
    rows[1], x.slots[2] = -1, -1
    rest = {"retrieve_parent_token": torch.tensor([[0, 0, 0, 1, 1]] * 3)} if tree else {}
    got = call(update, x, x.state, disable_state_update=True, intermediate_states_buffer=buffer,
               intermediate_state_indices=rows, **rest)  # fmt: skip
    assert got[0].any()
    assert got[1].any() != tree  # a row of a tree finds its states in the buffer alone
    assert not got[2].any()
    assert not whole[4, :5].isnan().any()
    assert whole[[0, 1, 2, 3, 5]].isnan().all()


def test_wrong_drafts_are_named():
    x = problem(lengths=[5, 3, 5])
    buffer, rows, _ = buffer_for(x)
    given = {"intermediate_states_buffer": buffer, "intermediate_state_indices": rows, "disable_state_update": True}
    parents = torch.tensor([[0, 0, 0, 1, 1]] * 3)
    buffers, indices = "intermediate_states_buffer", "intermediate_state_indices"
    for rest, error, message in (
        ({"cache_steps": 5}, ValueError, "cache_steps: given without intermediate_states_buffer"),
        ({"retrieve_parent_token": parents}, ValueError, "retrieve_parent_token: given without"),
        ({buffers: buffer}, ValueError, f"{buffers}: given without"),
        (given | {"cache_steps": 6}, ValueError, "cache_steps: expected from 1 to 5, got 6"),
        (given | {buffers: buffer[:, :4]}, ValueError, f"{buffers}: expected room"),
        (given | {buffers: buffer[..., 1:]}, ValueError, f"{buffers}: expected a"),
        (given | {buffers: buffer[:, ::2]}, ValueError, f"{buffers}: expected con"),
        (given | {indices: rows[:2]}, ValueError, f"{indices}: expected shape"),
        (given | {indices: rows.float()}, TypeError, f"{indices}: expected a torch"),
        (given | {"retrieve_parent_token": parents[:2]}, ValueError, "retrieve_parent_token: expected shape"),
        (given | {"retrieve_parent_token": parents + 3}, ValueError, "retrieve_parent_token: expected one before"),
        (given | {"retrieve_parent_token": parents, "disable_state_update": False}, NotImplementedError,
         "retrieve_parent_token: gdr does not write"),
        (given | {"cu_seqlens": torch.tensor([0, 6, 9, 13])}, ValueError, f"{buffers}: expected room for 6"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            call(update, x, x.state, **rest)
        assert buffer.isnan().all()


def test_trees_of_sglang_are_trees_of_pools():
    children = torch.tensor([[1, 3, -1, -1, -1], [1, 2, 3, 4, -1], [1, -1, 3, -1, -1]], dtype=torch.int32)
    siblings = torch.tensor([[-1, 2, -1, 4, -1], [-1, -1, -1, -1, -1], [-1, 2, 4, -1, -1]], dtype=torch.int32)
    parents = torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 1, 2, 3], [-1, 0, 0, 2, 0]])
    assert torch.equal(draft_parents(retrieve_next_token=children, retrieve_next_sibling=siblings), parents)
    theirs = parents.int()
    theirs[:, 0] = 0
    assert torch.equal(draft_parents(theirs), parents)
    assert theirs[0, 0] == 0
    for rest, message in (
        ({"retrieve_next_token": children}, "retrieve_next_sibling: expected a tensor"),
        ({"retrieve_next_sibling": children}, "retrieve_next_token: expected a tensor"),
        ({"retrieve_next_token": children, "retrieve_next_sibling": siblings[:2]}, "retrieve_next_sibling: expected"),
        ({"retrieve_parent_token": theirs, "retrieve_next_token": children}, "retrieve_next_token: given beside"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            draft_parents(**rest)
    x = problem(B=3, T=5, num_slots=3)
    state = gdr.DeltaRuleState(3, 4, 16, 24, num_k_heads=2, A_log=x.A_log, dt_bias=x.dt_bias, layout="vk")
    slots = state.alloc(3)
    state.write(slots, x.state[x.slots.long()])
    a, b = (y.reshape(3, 5, 4) for y in (x.a, x.b))
    o = state.verify(x.q, x.k, x.v, a, b, slots, draft_parents(theirs))
    want, _ = along_paths(x, theirs)
    assert_close(o.reshape(want.shape), want, rtol=5e-6, name="o")


def test_wrong_arguments_are_named():
    x = problem(B=2, T=1)
    with pytest.raises(ValueError, match=r"^scale: expected a positive number, got 0"):
        call(update, x, x.state, scale=0.0)
    with pytest.raises(ValueError, match=r"^initial_state_source: "):
        call(update, x, x.state.transpose(-1, -2))
    with pytest.raises(TypeError, match="no_such_argument"):
        call(update, x, x.state, no_such_argument=None)


def test_the_example_runs():
    tried = doctest.testmod(sglang)
    assert tried.attempted
    assert not tried.failed


@pytest.mark.skipif(not KERNEL, reason="GDR_SGLANG_KERNEL is not set")
def test_signature_is_sglangs():
    theirs = positional(Path(KERNEL), update.__name__)
    assert positional_of(update) == theirs
    assert dict(theirs)["initial_state_source"] is NO_DEFAULT


@pytest.fixture(scope="module")
def triton_update():
    """SGLang's own function."""
    if not KERNEL:
        pytest.skip("GDR_SGLANG_KERNEL is not set")
    pytest.importorskip("triton")
    return sglang_kernel.load(KERNEL)


def assert_both(triton_update, x, **rest):
    """Check that both functions give the same output and the same pool, and nothing that is not finite."""
    mine, theirs = x.state.clone(), x.state.clone()
    got, want = call(update, x, mine, **rest), call(triton_update, x, theirs, **rest)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert_close(got, want, rtol=RTOL_SGLANG[got.dtype], name="o")
    assert_close(mine, theirs, rtol=RTOL_SGLANG[mine.dtype], name="pool")


QWEN3_NEXT = {"H": 16, "HV": 32, "K": 128, "V": 128}
GPU_SHAPES = SHAPES | {
    "Qwen3-Next decode": {"B": 16, "T": 1, "dtype": "bfloat16", **QWEN3_NEXT},
    "Qwen3-Next verify": {"B": 4, "T": 4, "dtype": "bfloat16", **QWEN3_NEXT},
    "Qwen3-Next packed": {"lengths": [1, 17, 0, 5], "dtype": "bfloat16", "state_dtype": "bfloat16", **QWEN3_NEXT},
    "no power of two": {"B": 3, "T": 2, "H": 3, "HV": 6, "K": 80, "V": 48},
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_against_sglang(triton_update, shape, seed):
    assert_both(triton_update, problem("cuda", **shape, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rest",
    [
        {"scale": 1.7},
        {"use_qk_l2norm_in_kernel": False, "scale": 1e-3},
        {"disable_state_update": True},
    ],
    ids=str,
)
def test_options_against_sglang(triton_update, rest):
    assert_both(triton_update, problem("cuda", B=3, T=2, normalize=True), **rest)


def _constant(name, value):
    def change(x):
        getattr(x, name).fill_(value)

    return change


def _one_token(name, value):
    def change(x):
        getattr(x, name)[:, 1] = value

    return change


def _spread_logits(x):
    # Through the softplus' threshold of 20 and far beyond, for both signs.
    for t in (x.a, x.b):
        t.copy_(torch.linspace(-100, 100, t.numel()).reshape(t.shape))


def _repeated_key(x):
    x.k[:] = x.k[:, :1]
    x.b.fill_(20.0)


def _huge_values(x):
    x.v *= 1e15
    x.state *= 1e15


ADVERSARIAL = {
    "forget everything": _constant("a", 1e4),
    "forget nothing": _constant("a", -1e4),
    "at the threshold": lambda x: x.a.copy_((20.0 - x.dt_bias).expand_as(x.a)),
    "write nothing": _constant("b", -200.0),
    "write everything": _constant("b", 200.0),
    "logits of all sizes": _spread_logits,
    "strong decay": _constant("A_log", 8.0),
    "faint decay": _constant("A_log", -30.0),
    "keys of zero": _constant("k", 0.0),
    "one key of zero": _one_token("k", 0.0),
    "one query of zero": _one_token("q", 0.0),
    "tiny keys": _constant("k", 1e-20),
    "huge keys": _constant("k", 1e15),
    "one key again and again": _repeated_key,
    "huge values": _huge_values,
    "a state of zero": _constant("state", 0.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("change", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_inputs_against_sglang(triton_update, change):
    x = problem("cuda", B=4, T=6)
    change(x)
    assert_both(triton_update, x)


@pytest.mark.parametrize("change", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_inputs_against_the_reference(change):
    x = problem(B=4, T=6)
    change(x)
    want, pool = expected(x)
    assert_close(call(update, x, x.state), want, rtol=1e-5, name="o")
    assert_close(x.state, pool, rtol=1e-5, name="pool")


@pytest.mark.gpu
def test_strided_operands_against_sglang(triton_update):
    # As SGLang's layers call it: sequences of one token, packed along T.
    x = problem("cuda", **QWEN3_NEXT, lengths=[1, 1, 1, 1], dtype="bfloat16")
    as_slices(x)
    assert_both(triton_update, x)


@pytest.mark.gpu
def test_padding_differs_from_sglang_as_documented(triton_update):
    x = problem("cuda", B=4, T=2)
    x.slots[1:3] = -1
    mine, theirs = x.state.clone(), x.state.clone()
    got, want = call(update, x, mine), call(triton_update, x, theirs)
    live = [0, 3]
    assert_close(got[live], want[live], rtol=2e-5, name="o")
    assert_close(mine, theirs, rtol=2e-5, name="pool")
    assert not got[1:3].any()
    assert want[1:3].any()  # a state of zero, run and returned
    x.state.zero_()
    x.slots = torch.arange(4, device="cuda", dtype=torch.int32)
    from_zero, _ = expected(x)
    assert_close(want[1:3], from_zero[1:3], rtol=2e-5, name="SGLang's padding")
    assert np.isfinite(from_zero).all()
