"""The oracles themselves: against numbers worked by hand, exact rational arithmetic and each other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdr import reference
from gdr.testing import assert_close, make_inputs


def test_two_tokens_worked_by_hand():
    q = np.array([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
    k = np.array([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
    v = np.array([3.0, 5.0]).reshape(1, 2, 1, 1)
    g = np.log([0.5, 0.25]).reshape(1, 2, 1)
    beta = np.array([1.0, 0.5]).reshape(1, 2, 1)
    h = np.array([4.0, 2.0]).reshape(1, 1, 2, 1)
    # t = 0: forget h = (2, 1); error 3 - 2 = 1; write h = (3, 1); read 3.
    # t = 1: forget h = (0.75, 0.25); error 5 - 1 = 4, times 0.5; write h = (2.75, 2.25); read 5.
    for operation in (reference.fused_recurrent_gated_delta_rule, reference.chunk_gated_delta_rule):
        o, final = operation(q, k, v, g, beta, scale=1.0, initial_state=h, output_final_state=True)
        np.testing.assert_allclose(o.ravel(), [3.0, 5.0], rtol=1e-15)
        np.testing.assert_allclose(final.ravel(), [2.75, 2.25], rtol=1e-15)


def test_agrees_with_exact_rational_arithmetic():
    rng = np.random.default_rng(0)
    T, K, V = 12, 3, 2
    q, k, v = (rng.integers(-4, 5, size=(T, n)) / 4 for n in (K, K, V))
    beta = rng.integers(1, 4, size=T) / 4
    halvings = rng.integers(0, 3, size=T)  # decays of 1, 1/2 and 1/4
    h = [[Fraction(0)] * V for _ in range(K)]
    want = []
    for t in range(T):
        kt, vt, qt = ([Fraction(float(x)) for x in row[t]] for row in (k, v, q))
        decay = Fraction(1, 2 ** int(halvings[t]))
        h = [[x * decay for x in row] for row in h]
        u = [Fraction(float(beta[t])) * (vt[j] - sum(h[i][j] * kt[i] for i in range(K))) for j in range(V)]
        h = [[h[i][j] + kt[i] * u[j] for j in range(V)] for i in range(K)]
        want.append([float(sum(h[i][j] * qt[i] for i in range(K))) for j in range(V)])
    o, _ = reference.fused_recurrent_gated_delta_rule(
        *(x[None, :, None] for x in (q, k, v, np.log(0.5) * halvings, beta)), 1.0
    )
    np.testing.assert_allclose(o[0, :, 0], want, rtol=1e-12, atol=1e-12)


def test_value_head_uses_its_key_head():
    x = make_inputs(B=1, T=5, H=2, HV=6, K=4, V=3, dtype="float64")
    o, _ = reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    for hv, h in enumerate([0, 0, 0, 1, 1, 1]):
        alone, _ = reference.fused_recurrent_gated_delta_rule(
            x.q[:, :, h : h + 1], x.k[:, :, h : h + 1], *(y[:, :, hv : hv + 1] for y in (x.v, x.g, x.beta))
        )
        np.testing.assert_array_equal(o[:, :, hv], alone[:, :, 0])


def test_scale_defaults_to_the_root_of_the_key_size():
    x = make_inputs(K=16, dtype="float64")
    default, _ = reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    quarter, _ = reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, 0.25)
    np.testing.assert_array_equal(default, quarter)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    chunk_size=st.sampled_from([1, 2, 5, 16, 64]),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 4)]),
    gates=st.sampled_from(["ordinary", "slow", "fast", "none"]),
    layout=st.sampled_from(["kv", "vk"]),
    use_l2norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_chunk_form_is_the_recurrence(lengths, chunk_size, heads, gates, layout, use_l2norm, seed):
    H, HV = heads
    x = make_inputs(
        H=H,
        HV=HV,
        K=5,
        V=3,
        lengths=lengths,
        gates=gates,
        layout=layout,
        normalize=not use_l2norm,
        dtype="float64",
        seed=seed,
    )
    call = {
        "initial_state": x.initial_state,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": use_l2norm,
        "cu_seqlens": x.cu_seqlens,
        "state_layout": layout,
    }
    o, h = reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, **call)
    o_chunk, h_chunk = reference.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, chunk_size=chunk_size, **call)
    assert_close(o_chunk, o, rtol=1e-13, name="o")
    assert_close(h_chunk, h, rtol=1e-13, name="h")


@pytest.mark.parametrize("operation", ["fused_recurrent_gated_delta_rule", "chunk_gated_delta_rule"])
def test_minus_infinity_forgets_everything(operation):
    x = make_inputs(B=1, T=9, K=4, V=3, dtype="float64")
    x.g[:, 4] = -np.inf
    run = getattr(reference, operation)
    o, h = run(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state[:1], output_final_state=True)
    late = [y[:, 4:] for y in (x.q, x.k, x.v, x.g, x.beta)]
    o_late, h_late = run(*late, output_final_state=True)
    assert_close(o[:, 4:], o_late, rtol=1e-14)
    assert_close(h, h_late, rtol=1e-14)


def test_drop_in_is_the_gate_and_the_recurrence():
    x = make_inputs(B=3, T=6, H=2, HV=4, K=5, V=7, dtype="float64", layout="vk")
    g, beta = reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b, softplus_beta=0.7, softplus_threshold=2.0)
    want, h = reference.fused_recurrent_gated_delta_rule(
        x.q, x.k, x.v, g, beta, 0.3, x.initial_state, True, True, state_layout="vk"
    )
    before = x.state.copy()
    o, pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 0.7, 2.0, x.q, x.k, x.v, x.b, x.state, x.slots, 0.3, True, state_layout="vk"
    )
    np.testing.assert_array_equal(o, want)
    np.testing.assert_array_equal(pool[x.slots], h)
    others = np.setdiff1d(np.arange(len(pool)), x.slots)
    np.testing.assert_array_equal(pool[others], before[others])
    np.testing.assert_array_equal(x.state, before)


def test_rows_padding_output_slots_and_empty_sequences():
    x = make_inputs(lengths=[3, 0, 2, 4, 0], num_slots=9, K=4, V=3, dtype="float64")
    args = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state)
    initial, final = np.array([2, 4, -1, 0, 5]), np.array([7, 8, 1, -5, 5])
    o, pool = reference.fused_sigmoid_gating_delta_rule_update(
        *args, initial, cu_seqlens=x.cu_seqlens, output_state_indices=final
    )
    alone, alone_pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a[:, :3], x.dt_bias, 1.0, 20.0, *(y[:, :3] for y in (x.q, x.k, x.v, x.b)), x.state, [2]
    )
    np.testing.assert_array_equal(o[:, :3], alone)
    assert not o[:, 3:].any()  # both other sequences with tokens are padding
    want = x.state.copy()
    want[7], want[8] = alone_pool[2], x.state[4]
    np.testing.assert_array_equal(pool, want)
    o_again, unchanged = reference.fused_sigmoid_gating_delta_rule_update(
        *args, initial, cu_seqlens=x.cu_seqlens, output_state_indices=final, disable_state_update=True
    )
    np.testing.assert_array_equal(o_again, o)
    np.testing.assert_array_equal(unchanged, x.state)


def test_without_a_pool():
    x = make_inputs(dtype="float64")
    o, pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a.reshape(-1, 2), x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b.reshape(-1, 2)
    )
    assert pool is None
    want, _ = reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    assert_close(o, want, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_dtype_in_float64_out(dtype):
    x = make_inputs(dtype=dtype, gate_dtype=dtype, state_dtype=dtype)
    o, pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, x.slots
    )
    assert o.dtype == pool.dtype == np.float64
    g, beta = reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    assert g.dtype == beta.dtype == np.float64


def test_gate_at_points_known_in_closed_form():
    # softplus(0) = ln 2; log1p(exp(-30)) = 9.3576e-14, which 1 + exp(-30) would lose.
    g, beta = reference.gated_delta_rule_gate([0.0], [[0.0], [-30.0], [20.0], [20.1], [1e4]], [0.0], [[0.0], [-800.0], [800.0], [1.0], [-1.0]])  # fmt: skip  # noqa: E501
    np.testing.assert_allclose(
        -g.ravel(), [np.log(2.0), 9.357622968839737e-14, 20.000000002061153, 20.1, 1e4], rtol=1e-15
    )
    np.testing.assert_allclose(beta.ravel(), [0.5, 0.0, 1.0, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-15)
    g, _ = reference.gated_delta_rule_gate([np.log(3.0)], [[1.0]], [0.5], [[0.0]], softplus_beta=2.0)
    np.testing.assert_allclose(g, [[-3.0 * np.log(1 + np.exp(3.0)) / 2.0]], rtol=1e-15)


def test_unknown_layout_is_refused():
    x = make_inputs()
    with pytest.raises(ValueError, match="state_layout"):
        reference.fused_recurrent_gated_delta_rule(
            x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial_state, state_layout="hkv"
        )
