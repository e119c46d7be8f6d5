"""Both recurrent operations against the reference; states, slots, layouts, strides, and what must not
change."""

from __future__ import annotations

import sys
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import example
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from places import RTOL, assert_same_bits, given, raw, sequence

import gdr
from gdr import reference
from gdr.testing import assert_close, make_inputs

DTYPES = ["float32", "float16", "bfloat16"]


def update(place, x, pool=None, slots=None, **options):
    """Run the drop-in on copies; return the outputs and the pool after it."""
    there = place.inputs(x)
    pool = there.state if pool is None else pool
    slots = there.slots if slots is None else place.put(np.asarray(slots, np.int32))
    options = {k: place.put(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), pool, slots, cu_seqlens=there.cu_seqlens, **options)
    assert o.shape == x.v.shape
    return place.get(o), place.get(pool)


def recurrent(place, x, **options):
    """Run the operation with given gates on copies; return the outputs and the final states."""
    there = place.inputs(x)
    options = {k: place.put(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, h = gdr.fused_recurrent_gated_delta_rule(*given(there), cu_seqlens=there.cu_seqlens, **options)
    return place.get(o), None if h is None else place.get(h)


def assert_update(place, x, rtol, **options):
    """Check the outputs, the pool, and that slots that no sequence writes keep their bits."""
    slots = options.pop("slots", x.slots)
    o, pool = update(place, x, slots=slots, **options)
    want_o, want_pool = reference.fused_sigmoid_gating_delta_rule_update(
        *raw(x), x.state, slots, cu_seqlens=x.cu_seqlens, **options
    )
    assert o.dtype == x.v.dtype
    assert pool.dtype == x.state.dtype
    assert_close(o, want_o, rtol=RTOL[x.v.dtype.name] if rtol is None else rtol, name="o")
    written = np.asarray(options.get("output_state_indices", slots))
    written = [] if options.get("disable_state_update") else written[written >= 0]
    others = np.setdiff1d(np.arange(len(pool)), written)
    assert_same_bits(pool[others], x.state[others], "slots that no sequence writes")
    assert_close(pool, want_pool, rtol=RTOL[x.state.dtype.name] if rtol is None else rtol, name="pool")


# The scenarios of the first version of this code, in double precision and in single.
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({}, {"pool": None}, id="no state"),
        pytest.param({}, {}, id="initial state"),
        pytest.param({"normalize": False}, {"use_qk_l2norm_in_kernel": True}, id="l2norm"),
        pytest.param({}, {"scale": 0.37}, id="scale"),
        pytest.param({"B": 8, "T": 64, "H": 8, "HV": 8, "K": 64, "V": 64}, {}, id="larger"),
        pytest.param({"H": 2, "HV": 8, "K": 32, "V": 16}, {}, id="grouped value heads"),
    ],
)
def test_scenarios(host, sizes, options, dtype):
    x = make_inputs(**({"B": 4, "T": 8, "H": 4, "K": 16, "V": 16} | sizes), dtype=dtype)
    options = dict(options)
    if "pool" in options:
        del options["pool"]
        o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(x), **options)
        want, _ = reference.fused_sigmoid_gating_delta_rule_update(*raw(x), **options)
        assert_close(o, want, rtol=RTOL[dtype])
    else:
        assert_update(host, x, RTOL[dtype], **options)
    o, h = recurrent(host, x, output_final_state=True, **options)
    want, want_h = reference.fused_recurrent_gated_delta_rule(*given(x), output_final_state=True, **options)
    assert_close(o, want, rtol=RTOL[dtype], name="o")
    assert_close(h, want_h, rtol=RTOL[dtype], name="h")


@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
@pytest.mark.parametrize("keys", ["random", "correlated"])
def test_long_sequences(place, gates, keys):
    x = make_inputs(B=1, T=1000, H=1, HV=2, K=32, V=16, gates=gates, keys=keys)
    assert_update(place, x, 3e-6)


def test_long_sequences_in_float64(host):
    assert_update(host, make_inputs(B=1, T=500, H=1, HV=2, gates="slow", dtype="float64"), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_dtypes_and_layouts(place, dtype, state_dtype, layout):
    x = make_inputs(
        B=3, T=5, H=2, HV=4, K=24, V=20, dtype=dtype, state_dtype=state_dtype, layout=layout, normalize=False
    )
    assert_update(place, x, None, use_qk_l2norm_in_kernel=True, state_layout=layout)


@pytest.mark.parametrize("gate_dtype", DTYPES)
def test_gate_dtypes(place, gate_dtype):
    x = make_inputs(gate_dtype=gate_dtype)
    assert_update(place, x, None)
    o, _ = recurrent(place, x)
    want, _ = reference.fused_recurrent_gated_delta_rule(*given(x))
    assert_close(o, want, rtol=RTOL["float32"])


@pytest.mark.parametrize("K", [1, 2, 3, 7, 16, 33, 64, 100, 128, 129, 255, 256])
@pytest.mark.parametrize("V", [1, 5, 64, 256])
def test_head_sizes(place, K, V):
    assert_update(place, make_inputs(B=2, T=3, H=1, HV=2, K=K, V=V, seed=K), None)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_final_state_is_float32_in_the_layout(place, layout, dtype):
    x = make_inputs(lengths=[3, 0, 5], K=6, V=10, layout=layout, dtype=dtype, state_dtype=dtype)
    o, h = recurrent(place, x, initial_state=x.initial_state, output_final_state=True, state_layout=layout, scale=0.5)
    want, want_h = reference.fused_recurrent_gated_delta_rule(
        *given(x), 0.5, x.initial_state, True, cu_seqlens=x.cu_seqlens, state_layout=layout
    )
    assert_close(o, want, rtol=RTOL[dtype], name="o")
    assert h.dtype == np.float32
    assert_close(h, want_h, rtol=RTOL["float32"], name="h")
    assert_same_bits(h[1], x.initial_state[1].astype(np.float32), "state of the empty sequence")


def test_no_final_state_unless_asked_for(place):
    assert recurrent(place, make_inputs())[1] is None
    x = make_inputs(lengths=[2, 0])
    _, h = recurrent(place, x, output_final_state=True)
    assert not h[1].any()


def test_initial_state_is_not_modified(place):
    x = make_inputs(B=2)
    initial = place.put(x.initial_state)
    there = place.inputs(x)
    gdr.fused_recurrent_gated_delta_rule(*given(there), initial_state=initial, output_final_state=True)
    assert_same_bits(place.get(initial), x.initial_state)
    for name in ("q", "k", "v", "g", "beta"):
        assert_same_bits(place.get(getattr(there, name)), getattr(x, name), name)


def test_raw_gates_are_the_gate_operation(place):
    x = make_inputs(B=2, T=20, H=2, HV=4, seed=3)
    there = place.inputs(x)
    x.g, x.beta = (place.get(y) for y in gdr.gated_delta_rule_gate(there.A_log, there.a, there.dt_bias, there.b))
    o, pool = update(place, x)
    want, h = recurrent(place, x, initial_state=x.initial_state, output_final_state=True)
    assert_close(o, want, rtol=3e-7)
    assert_close(pool[x.slots], h, rtol=3e-7)


def test_softplus_parameters_reach_the_gate(place):
    x = make_inputs(B=2, T=20, H=2, gates="slow")
    for beta, threshold in ((0.5, 20.0), (1.0, -4.0), (2.0, -8.0)):
        there = place.inputs(x)
        o = gdr.fused_sigmoid_gating_delta_rule_update(
            there.A_log, there.a, there.dt_bias, beta, threshold, *raw(there)[5:], there.state, there.slots
        )
        want, _ = reference.fused_sigmoid_gating_delta_rule_update(
            x.A_log, x.a, x.dt_bias, beta, threshold, *raw(x)[5:], x.state, x.slots
        )
        # Beyond the threshold softplus(x) = x < 0 here, and the state grows: the formula is the formula.
        assert_close(place.get(o), want, rtol=RTOL["float32"])


def test_gate_logits_as_rows_of_tokens(place):
    x = make_inputs(B=3, T=4, HV=4)
    want, want_pool = update(place, x)
    there = place.inputs(x)
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        there.A_log, there.a.reshape(12, 4), there.dt_bias, 1.0, 20.0, there.q, there.k, there.v,
        there.b.reshape(12, 4), there.state, there.slots,
    )  # fmt: skip
    assert_same_bits(place.get(o), want)
    assert_same_bits(place.get(there.state), want_pool)


def test_small_decays_of_raw_gates_are_exact(host):
    # At a = -30 softplus is 1e-13: a thousand such tokens must forget 1e-10 of the state, not nothing at all.
    x = make_inputs(B=1, T=1000, H=1, K=2, V=2, dtype="float64")
    x.a[:] = -30.0
    x.dt_bias[:] = 0.0
    x.A_log[:] = 0.0
    x.b[:] = -1e4  # writes nothing
    _, pool = update(host, x)
    slot = int(x.slots[0])
    np.testing.assert_allclose(1 - pool[slot] / x.state[slot], 9.3576e-11, rtol=1e-2)


# -- slots
# ------------------------------------------------------------------------------------------------------------


def test_slots_in_any_order_first_and_last_included(place):
    x = make_inputs(B=5, num_slots=7)
    for slots in ([6, 0, 3, 1, 5], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        assert_update(place, x, None, slots=np.array(slots, np.int32))


@pytest.mark.parametrize("padding", [-1, -2, -(2**31)])
def test_negative_slots_are_padding(place, padding):
    x = make_inputs(B=4, T=3)
    slots = x.slots.copy()
    slots[1] = slots[3] = padding
    for y in (x.q, x.k, x.v, x.a, x.b):
        y[1] = np.nan  # nothing of such a row is read
    o, pool = update(place, x, slots=slots)
    assert_same_bits(o[[1, 3]], np.zeros_like(o[[1, 3]]))
    clean = make_inputs(B=4, T=3)
    want_o, want_pool = update(place, clean)
    assert_same_bits(o[[0, 2]], want_o[[0, 2]])
    assert_same_bits(pool[slots[[0, 2]]], want_pool[slots[[0, 2]]])
    others = np.setdiff1d(np.arange(len(pool)), slots)
    assert_same_bits(pool[others], x.state[others])


def test_all_rows_padding(place):
    x = make_inputs(B=3)
    o, pool = update(place, x, slots=[-1, -1, -1])
    assert not o.any()
    assert_same_bits(pool, x.state)


def test_padding_among_packed_sequences(place):
    x = make_inputs(lengths=[3, 2, 0, 4], num_slots=6)
    slots = np.array([5, -1, -1, 0], np.int32)
    assert_update(place, x, None, slots=slots)
    o, _ = update(place, x, slots=slots)
    assert not o[:, 3:5].any()


def test_separate_output_slots(place):
    x = make_inputs(B=3, num_slots=8)
    initial, final = np.array([7, 2, 2], np.int32), np.array([0, 5, 6], np.int32)
    assert_update(place, x, None, slots=initial, output_state_indices=final)


def test_output_slots_equal_to_input_slots_are_in_place(place):
    x = make_inputs(B=3, num_slots=8)
    want = update(place, x)
    got = update(place, x, output_state_indices=x.slots.copy())
    for y, z in zip(got, want, strict=True):
        assert_same_bits(y, z)


@pytest.mark.parametrize(("initial", "final"), [([-1, 1], [4, 5]), ([0, 1], [-1, 5]), ([0, -1], [-1, 5])])
def test_padding_on_either_side(place, initial, final):
    x = make_inputs(B=2, num_slots=6)
    initial, final = np.array(initial, np.int32), np.array(final, np.int32)
    o, pool = update(place, x, slots=initial, output_state_indices=final)
    padding = (initial < 0) | (final < 0)
    assert not o[padding].any()
    assert o[~padding].all(axis=None) or padding.all()
    others = np.setdiff1d(np.arange(6), final[~padding])
    assert_same_bits(pool[others], x.state[others])
    assert_update(place, x, None, slots=initial, output_state_indices=np.where(padding, -1, final).astype(np.int32))


def test_empty_sequences(place):
    x = make_inputs(lengths=[0, 3, 0, 0, 2, 0], num_slots=10, state_dtype="bfloat16")
    assert_update(place, x, None)
    # An empty sequence hands its state on where it reads one slot and writes another.
    final = np.setdiff1d(np.arange(10), x.slots)[:4]
    output = np.array([final[0], x.slots[1], final[1], final[2], x.slots[4], x.slots[5]], np.int32)
    _o, pool = update(place, x, output_state_indices=output)
    for n in (0, 2, 3, 5):
        assert_same_bits(pool[output[n]], x.state[x.slots[n]])
    assert_update(place, x, None, output_state_indices=output)


def test_an_empty_sequence_may_share_a_slot_that_nobody_else_writes(host):
    x = make_inputs(lengths=[0, 3, 0], num_slots=3)
    o, pool = update(host, x, slots=[1, 0, 1])
    assert_same_bits(pool[1], x.state[1])
    assert np.isfinite(o).all()


def test_an_empty_sequence_may_share_a_slot_that_another_one_writes(place):
    x = make_inputs(lengths=[0, 3, 0], num_slots=3)
    o, pool = update(place, x, slots=[1, 1, 1])
    x.cu_seqlens, x.slots = np.array([0, 3], np.int32), np.array([1], np.int32)
    want, want_pool = update(place, x)
    assert_same_bits(o, want)
    assert_same_bits(pool, want_pool)
    exact = reference.fused_sigmoid_gating_delta_rule_update(*raw(x), x.state, [1, 1, 1], None, False, [0, 0, 3, 3])[1]
    assert_close(pool, exact, rtol=RTOL["float32"])


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"lengths": []}, {"lengths": [0, 0]}])
def test_nothing_to_do(place, sizes):
    x = make_inputs(**sizes)
    o, pool = update(place, x)
    assert o.shape == x.v.shape
    assert_same_bits(pool, x.state)
    o, h = recurrent(place, x, initial_state=x.initial_state, output_final_state=True)
    assert o.shape == x.v.shape
    assert_same_bits(h, x.initial_state)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_disable_state_update(place, T, layout):
    x = make_inputs(B=3, T=T, K=24, layout=layout)
    want, _ = update(place, x, state_layout=layout)
    o, pool = update(place, x, state_layout=layout, disable_state_update=True)
    assert_same_bits(o, want)
    assert_same_bits(pool, x.state)


def test_disable_state_update_takes_shared_slots_and_a_read_only_pool(host):
    x = make_inputs(B=3)
    x.state.flags.writeable = False
    slots = np.array([2, 2, 2])
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(x), x.state, slots, disable_state_update=True)
    want, _ = reference.fused_sigmoid_gating_delta_rule_update(*raw(x), x.state, slots, disable_state_update=True)
    assert_close(o, want, rtol=RTOL["float32"])


def test_without_indices_sequence_n_has_slot_n(place):
    x = make_inputs(B=3, num_slots=3)
    there = place.inputs(x)
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), there.state)
    want_o, want_pool = update(place, x, slots=[0, 1, 2])
    assert_same_bits(place.get(o), want_o)
    assert_same_bits(place.get(there.state), want_pool)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_index_dtypes(place, dtype):
    x = make_inputs(lengths=[2, 3])
    want = update(place, x)
    there = place.inputs(x)
    there.cu_seqlens, slots = there.cu_seqlens.astype(dtype), there.slots.astype(dtype)
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        *raw(there), there.state, slots, cu_seqlens=there.cu_seqlens, output_state_indices=slots
    )
    assert_same_bits(place.get(o), want[0])
    assert_same_bits(place.get(there.state), want[1])


def test_garbage_in_other_slots_is_never_read(place):
    x = make_inputs(B=3, num_slots=9)
    want_o, want_pool = update(place, x)
    x.state[np.setdiff1d(np.arange(9), x.slots)] = np.nan
    o, pool = update(place, x)
    assert_same_bits(o, want_o)
    assert_same_bits(pool[x.slots], want_pool[x.slots])


# -- outputs
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_returned(place, dtype):
    x = make_inputs(lengths=[3, 0, 4, 2], dtype=dtype, num_slots=6)
    slots = np.array([1, 0, -1, 5], np.int32)
    want, _ = update(place, x, slots=slots)
    there = place.inputs(x)
    out = place.poisoned(x.v)
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        *raw(there), there.state, place.put(slots), cu_seqlens=there.cu_seqlens, out=out
    )
    assert o is out
    assert_same_bits(place.get(out), want)
    out = place.poisoned(x.v)
    o, _ = gdr.fused_recurrent_gated_delta_rule(*given(there), cu_seqlens=there.cu_seqlens, out=out)
    assert o is out
    assert_same_bits(place.get(out), recurrent(place, x)[0])


def test_a_strided_out_is_filled_and_nothing_beside_it(place):
    x = make_inputs(B=3, T=5, H=2, HV=4, V=6)
    want, _ = update(place, x)
    there = place.inputs(x)
    base = place.put(np.full((3, 5, 4, 9), 7.0, np.float32))
    out = base[..., 1:7]
    gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), there.state, there.slots, out=out)
    got = place.get(base)
    assert_same_bits(got[..., 1:7], want)
    assert (got[..., [0, 7, 8]] == 7).all()


def test_no_output_shares_memory_with_anything(host):
    x = make_inputs(B=2)
    results = [y for _ in range(2) for y in gdr.fused_recurrent_gated_delta_rule(*given(x), output_final_state=True)]
    results += [gdr.fused_sigmoid_gating_delta_rule_update(*raw(x), x.state, x.slots) for _ in range(2)]
    arrays = [*results, x.q, x.k, x.v, x.a, x.b, x.g, x.beta, x.state]
    assert not any(np.shares_memory(p, r) for i, p in enumerate(arrays) for r in arrays[:i])


# -- strides
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_l2norm", [False, True])
def test_packed_qkv(place, dtype, use_l2norm):
    x = make_inputs(B=2, T=5, H=2, HV=4, K=16, V=8, dtype=dtype)
    want = update(place, x, use_qk_l2norm_in_kernel=use_l2norm)
    qkv = place.put(np.concatenate([y.reshape(2, 5, -1) for y in (x.q, x.k, x.v)], axis=-1))
    there = place.inputs(x)
    there.q, there.k, there.v = (
        y.reshape(2, 5, -1, size) for y, size in ((qkv[..., :32], 16), (qkv[..., 32:64], 16), (qkv[..., 64:], 8))
    )
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        *raw(there), there.state, there.slots, use_qk_l2norm_in_kernel=use_l2norm
    )
    assert_same_bits(place.get(o), want[0])
    assert_same_bits(place.get(there.state), want[1])


@pytest.mark.parametrize("state_dtype", DTYPES)
def test_pool_with_padded_slots(place, state_dtype):
    x = make_inputs(B=3, T=4, K=6, V=10, num_slots=5, state_dtype=state_dtype)
    want_o, want_pool = update(place, x)
    base = place.put(np.full((5, 2 * 6 * 10 + 7), 7.0).astype(x.state.dtype))
    pool = base[:, 3:123].reshape(5, 2, 6, 10)
    pool[...] = place.put(x.state)
    there = place.inputs(x)
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), pool, there.slots)
    got = place.get(base).astype(np.float32)
    assert_same_bits(place.get(o), want_o)
    assert_same_bits(place.get(pool), want_pool)
    assert (got[:, :3] == 7).all()
    assert (got[:, 123:] == 7).all()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_every_operand_strided(place, T, layout, state_dtype):
    x = make_inputs(B=3, T=T, H=2, HV=4, K=12, V=8, layout=layout, state_dtype=state_dtype)
    want_o, want_pool = update(place, x, state_layout=layout)
    there = place.inputs(x)
    for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias"):
        setattr(there, name, place.strided(getattr(x, name)))
    pool = place.strided(x.state)
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), pool, there.slots, state_layout=layout)
    assert_same_bits(place.get(o), want_o)
    assert_same_bits(place.get(pool), want_pool)


def test_strides_that_only_the_host_takes(host):
    x = make_inputs(B=3, T=5, H=2, HV=4, K=12, V=8)
    want_o, want_pool = update(host, x)
    views = {
        "heads before tokens": lambda y: np.ascontiguousarray(y.swapaxes(1, 2)).swapaxes(1, 2),
        "last axis first": lambda y: np.moveaxis(np.ascontiguousarray(np.moveaxis(y, -1, 0)), 0, -1),
        "backwards": lambda y: np.ascontiguousarray(y[::-1, ..., ::-1])[::-1, ..., ::-1],
        "every other": lambda y: np.repeat(y, 2, axis=-1)[..., ::2],
    }
    for words, view in views.items():
        q, k, v, a, b, pool = (view(y.copy()) for y in (x.q, x.k, x.v, x.a, x.b, x.state))
        out = view(np.full_like(x.v, np.nan))
        o = gdr.fused_sigmoid_gating_delta_rule_update(
            x.A_log, a, x.dt_bias, 1.0, 20.0, q, k, v, b, pool, x.slots, out=out
        )
        assert_same_bits(o, want_o, words)
        assert_same_bits(pool, want_pool, words)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_strides_that_end_within_an_element(host, T, state_dtype):
    x = make_inputs(B=3, T=T, H=2, HV=4, K=12, V=8, num_slots=5, state_dtype=state_dtype)
    want_o, want_pool = update(host, x)
    records = np.zeros(5, [("tag", np.uint8), ("state", x.state.dtype, x.state.shape[1:])])
    records["state"] = x.state
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(x), records["state"], x.slots)
    assert_same_bits(o, want_o)
    assert_same_bits(np.ascontiguousarray(records["state"]), want_pool)
    assert not records["tag"].any()


def test_broadcast_inputs(host):
    x = make_inputs(B=3, T=5, H=2, HV=4)
    for name in ("q", "k", "v", "a", "b"):
        setattr(x, name, np.broadcast_to(getattr(x, name)[:1], getattr(x, name).shape))
    o, pool = update(host, x)  # contiguous copies
    got_pool = x.state.copy()
    assert_same_bits(gdr.fused_sigmoid_gating_delta_rule_update(*raw(x), got_pool, x.slots), o)
    assert_same_bits(got_pool, pool)


def test_read_only_inputs(host):
    x = make_inputs(B=2)
    want, _ = recurrent(host, x)
    for name in ("q", "k", "v", "g", "beta"):
        getattr(x, name).flags.writeable = False
    assert_same_bits(gdr.fused_recurrent_gated_delta_rule(*given(x))[0], want)


# -- special values
# ---------------------------------------------------------------------------------------------------


def test_minus_infinity_forgets_everything(place):
    x = make_inputs(B=2, T=7, H=1, HV=2)
    x.g[0, 3] = -np.inf
    x.g[1, 0, 1] = -np.inf
    o, h = recurrent(place, x, initial_state=x.initial_state, output_final_state=True)
    want, want_h = reference.fused_recurrent_gated_delta_rule(*given(x), None, x.initial_state, True)
    assert_close(o, want, rtol=RTOL["float32"])
    assert_close(h, want_h, rtol=RTOL["float32"])
    x.g[:] = -np.inf
    o, h = recurrent(place, x, initial_state=x.initial_state, output_final_state=True)
    want, want_h = reference.fused_recurrent_gated_delta_rule(*given(x), None, x.initial_state, True)
    assert_close(o, want, rtol=RTOL["float32"])
    assert_close(h, want_h, rtol=RTOL["float32"])


def test_an_infinite_raw_logit_forgets_everything(place):
    x = make_inputs(B=2, T=7)
    x.a[0, 3] = np.inf
    x.a[1, 2] = 3e38
    assert_update(place, x, None)


def test_huge_and_tiny_decays(place):
    x = make_inputs(B=1, T=6, H=1)
    x.g[0, :, 0] = [-1e-30, -1e30, -80.0, -110.0, -1e-7, -0.0]
    o, h = recurrent(place, x, initial_state=x.initial_state[:1], output_final_state=True)
    want, want_h = reference.fused_recurrent_gated_delta_rule(*given(x), None, x.initial_state[:1], True)
    assert_close(o, want, rtol=RTOL["float32"])
    assert_close(h, want_h, rtol=RTOL["float32"])


def test_zero_keys_have_a_norm(place):
    x = make_inputs(B=1, T=4)
    x.q[0, 1] = x.k[0, 2] = 0.0
    assert_update(place, x, None, use_qk_l2norm_in_kernel=True)


def test_large_keys_are_normalised_without_overflow(host):
    x = make_inputs(B=1, T=4, normalize=False)
    x.q *= 1e17
    x.k *= 1e17
    assert_update(host, x, None, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_stay_in_their_sequence(place, bad):
    clean = make_inputs(lengths=[4, 5, 3], num_slots=5)
    want_o, want_pool = update(place, clean)
    for name in ("q", "k", "v", "a", "b"):
        x = make_inputs(lengths=[4, 5, 3], num_slots=5)
        getattr(x, name)[0, 6] = bad
        there = place.inputs(x)
        o = gdr.fused_sigmoid_gating_delta_rule_update(
            *raw(there), there.state, there.slots, cu_seqlens=there.cu_seqlens
        )
        o, pool = place.get(o), place.get(there.state)
        assert_same_bits(o[:, :6], want_o[:, :6], name)
        assert_same_bits(o[:, 9:], want_o[:, 9:], name)
        others = np.setdiff1d(np.arange(5), x.slots[1])
        assert_same_bits(pool[others], want_pool[others], name)
    state = clean.state.copy()
    state[clean.slots[1]] = bad
    there = place.inputs(clean)
    pool = place.put(state)
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), pool, there.slots, cu_seqlens=there.cu_seqlens)
    assert_same_bits(place.get(o)[:, :4], want_o[:, :4])
    assert_same_bits(place.get(o)[:, 9:], want_o[:, 9:])


# -- what must not change a sequence's bits
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 5, "T": 4, "H": 2, "HV": 4},
        {"B": 3, "T": 1, "H": 2, "HV": 2, "K": 64, "V": 64},
        {"lengths": [3, 1, 7, 2], "H": 1, "HV": 3, "K": 5, "V": 9},
        {"lengths": [1] * 9, "K": 128, "V": 128},
        {"lengths": [2, 40], "K": 17, "V": 33, "dtype": "bfloat16", "state_dtype": "float16"},
    ],
)
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_a_sequence_does_not_know_its_batch(place, sizes, layout):
    x = make_inputs(**sizes, layout=layout, normalize=False)
    options = {"use_qk_l2norm_in_kernel": True, "state_layout": layout}
    o, pool = update(place, x, **options)
    N = len(x.slots)
    for n in range(N):
        alone, alone_pool = update(place, sequence(x, n), **options)
        if x.cu_seqlens is None:
            assert_same_bits(o[n : n + 1], alone, f"o of sequence {n}")
        else:
            assert_same_bits(o[:, x.cu_seqlens[n] : x.cu_seqlens[n + 1]], alone, f"o of sequence {n}")
        assert_same_bits(pool[x.slots[n]], alone_pool[0], f"state of sequence {n}")


def test_permuting_the_batch_permutes_the_results(place):
    x = make_inputs(B=6, T=5, num_slots=6)
    o, pool = update(place, x)
    order, slots = np.array([3, 0, 5, 1, 4, 2]), np.array([1, 4, 0, 5, 3, 2], np.int32)
    y = make_inputs(B=6, T=5, num_slots=6)
    for name in ("q", "k", "v", "a", "b"):
        setattr(y, name, getattr(x, name)[order])
    y.state[slots] = x.state[x.slots[order]]
    o_permuted, pool_permuted = update(place, y, slots=slots)
    assert_same_bits(o_permuted, o[order])
    assert_same_bits(pool_permuted[slots], pool[x.slots[order]])


def test_same_inputs_same_bits(place):
    x = make_inputs(B=4, T=30, H=4, HV=8, K=64, V=64)
    first = update(place, x)
    for _ in range(3):
        for y, z in zip(update(place, x), first, strict=True):
            assert_same_bits(y, z)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_splitting_a_sequence_anywhere(place, cut):
    x = make_inputs(B=2, T=20, H=2, HV=4)
    o, pool = update(place, x)
    first, second = make_inputs(B=2, T=20, H=2, HV=4), make_inputs(B=2, T=20, H=2, HV=4)
    for name in ("q", "k", "v", "a", "b", "g", "beta"):
        setattr(first, name, getattr(x, name)[:, :cut])
        setattr(second, name, getattr(x, name)[:, cut:])
    o_first, second.state = update(place, first)
    o_second, pool_second = update(place, second)
    # What comes before the cut cannot know of it; what comes after starts from a state that was rounded once.
    assert_same_bits(o_first, o[:, :cut])
    assert_close(np.concatenate([o_first, o_second], axis=1), o, rtol=5e-7)
    assert_close(pool_second, pool, rtol=5e-7)


def test_later_tokens_never_change_earlier_outputs(place):
    x = make_inputs(B=2, T=20, H=2, HV=4)
    o, _ = update(place, x)
    y = make_inputs(B=2, T=20, H=2, HV=4)
    for name in ("q", "k", "v", "a", "b"):
        getattr(y, name)[:, 11:] = np.nan
    there = place.inputs(y)
    late = gdr.fused_sigmoid_gating_delta_rule_update(*raw(there), there.state, there.slots)
    assert_same_bits(place.get(late)[:, :11], o[:, :11])


@pytest.mark.parametrize("T", [1, 2, 7, 16, 19])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_appending_tokens_never_changes_earlier_outputs(place, T, layout):
    x = make_inputs(B=2, T=20, H=2, HV=4, K=24, layout=layout)
    o, _ = update(place, x, state_layout=layout)
    for name in ("q", "k", "v", "a", "b"):
        setattr(x, name, getattr(x, name)[:, :T])
    assert_same_bits(update(place, x, state_layout=layout)[0], o[:, :T])


@pytest.mark.parametrize("factor", [2.0, -0.25])
def test_scaling_values_and_state_scales_outputs(place, factor):
    # Powers of two scale every intermediate exactly.
    x = make_inputs(B=2, T=12)
    o, pool = update(place, x)
    y = make_inputs(B=2, T=12)
    y.v *= np.float32(factor)
    y.state *= np.float32(factor)
    o_scaled, pool_scaled = update(place, y)
    assert_same_bits(o_scaled, o * np.float32(factor))
    assert_same_bits(pool_scaled, pool * np.float32(factor))


def test_zero_values_and_no_state_give_zeros(place):
    x = make_inputs(B=2, T=12)
    x.v[:] = 0
    o, _ = recurrent(place, x)
    assert not o.any()


def test_orthonormal_keys_store_and_return_values_exactly(place):
    # No decay, beta = 1: token t writes v_t under the key e_t, and reading e_t returns v_t itself.
    K, V = 16, 8
    x = make_inputs(B=1, T=2 * K, H=1, K=K, V=V, gates="none")
    x.k[0, :, 0] = np.concatenate([np.eye(K), np.eye(K)[::-1]])
    x.q[0, :K, 0], x.q[0, K:, 0] = np.eye(K), np.eye(K)
    x.beta[0, :K], x.beta[0, K:] = 1.0, 0.0
    o, h = recurrent(place, x, scale=1.0, output_final_state=True)
    np.testing.assert_array_equal(o[0, :K, 0], x.v[0, :K, 0])
    np.testing.assert_array_equal(o[0, K:, 0], x.v[0, :K, 0])
    np.testing.assert_array_equal(h[0, 0], x.v[0, :K, 0])
    # Writing again under the same key replaces the value, to rounding.
    x.beta[:] = 1.0
    _, h = recurrent(place, x, scale=1.0, output_final_state=True)
    np.testing.assert_allclose(h[0, 0], x.v[0, K:, 0][::-1], rtol=1e-6, atol=1e-6)


# -- any shape
# --------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    H, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = {
        "H": H,
        "HV": H * group,
        "K": draw(st.integers(1, 40)),
        "V": draw(st.integers(1, 40)),
        "layout": draw(st.sampled_from(["kv", "vk"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "state_dtype": draw(st.sampled_from(DTYPES)),
        "gate_dtype": draw(st.sampled_from(DTYPES)),
        "gates": draw(st.sampled_from(["ordinary", "slow", "fast", "none"])),
        "keys": draw(st.sampled_from(["random", "correlated"])),
        "seed": draw(st.integers(0, 2**20)),
    }
    if draw(st.booleans()):
        sizes["lengths"] = draw(st.lists(st.integers(0, 9), max_size=6))
        N = len(sizes["lengths"])
    else:
        N = sizes["B"] = draw(st.integers(0, 5))
        sizes["T"] = draw(st.integers(0, 9))
    sizes["num_slots"] = 2 * N + draw(st.integers(0, 3))
    x = make_inputs(**sizes)
    options = {"use_qk_l2norm_in_kernel": draw(st.booleans()), "state_layout": sizes["layout"]}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 1.0]) | st.floats(0.01, 2) | st.floats(-2, -0.01))
    every = draw(st.permutations(range(2 * N)))
    slots = np.array(every[:N], np.int32)
    padding = np.array(draw(st.lists(st.booleans(), min_size=N, max_size=N)), bool)
    slots[padding] = -1
    choice = draw(st.sampled_from(["in place", "elsewhere", "nowhere"]))
    if choice == "elsewhere":
        options["output_state_indices"] = np.array(every[N:], np.int32)
    elif choice == "nowhere":
        options["disable_state_update"] = True
    return x, slots, options, draw(st.booleans())


@hypothesis_given(problem=problems())
@example(problem=(make_inputs(), np.array([4, 0], np.int32), {}, True))
def test_any_problem(place, problem):
    x, slots, options, strided = problem
    if options.get("output_state_indices") is not None:
        padding = slots < 0
        options = options | {
            "output_state_indices": np.where(padding, -1, options["output_state_indices"]).astype(np.int32)
        }
    assert_update(place, x, None, slots=slots, **options)
    if strided:
        want_o, want_pool = update(place, x, slots=slots, **options)
        there = place.inputs(x)
        for name in ("q", "k", "v", "a", "b"):
            setattr(there, name, place.strided(getattr(x, name)))
        pool, out = place.strided(x.state), place.strided(np.zeros_like(x.v))
        gdr.fused_sigmoid_gating_delta_rule_update(
            *raw(there), pool, place.put(slots), cu_seqlens=there.cu_seqlens, out=out,
            **{k: place.put(v) if isinstance(v, np.ndarray) else v for k, v in options.items()},
        )  # fmt: skip
        assert_same_bits(place.get(out), want_o)
        assert_same_bits(place.get(pool), want_pool)


# -- speed
# ------------------------------------------------------------------------------------------------------------


def lines_run(call) -> int:
    """How many lines of this package's Python a call runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_globals.get("__name__", "").partition(".")[0] != "gdr":
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def lines_a_token(operation, **sizes) -> float:
    def lines(T: int) -> int:
        x = make_inputs(T=T, K=16, V=16, **sizes)
        run = partial(operation, *raw(x), x.state, x.slots)
        run()
        return lines_run(run)

    return (lines(40) - lines(8)) / 32


def test_python_runs_as_few_lines_a_token_for_many_heads_and_sequences(host):
    one, many = {"B": 1, "H": 1, "HV": 1}, {"B": 4, "H": 4, "HV": 8}
    update = "fused_sigmoid_gating_delta_rule_update"
    loops = getattr(reference, update)
    assert lines_a_token(loops, **many) > 10 * lines_a_token(loops, **one) > 0
    assert lines_a_token(getattr(gdr, update), **many) < lines_a_token(getattr(gdr, update), **one) + 1
