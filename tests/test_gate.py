from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import Place

import gdr
from gdr import reference
from gdr.testing import assert_close, make_inputs


def gate(place: Place, A_log, a, dt_bias, b, **scalars):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g, beta = gdr.gated_delta_rule_gate(*(place.put(x) for x in (A_log, a, dt_bias, b)), **scalars)
    return place.get(g), place.get(beta)


@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_agrees_with_the_reference(place, gates, dtype):
    x = make_inputs(B=3, T=40, H=4, gates=gates, gate_dtype=dtype)
    got = gate(place, x.A_log, x.a, x.dt_bias, x.b)
    want = reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    for name, y, z in zip(("g", "beta"), got, want, strict=True):
        assert y.dtype == np.float32
        assert_close(y, z, rtol=2e-7, name=name)
        np.testing.assert_allclose(y, z, rtol=2e-6, atol=1e-37)


def test_float64_on_the_host(host):
    x = make_inputs(B=3, T=40, H=4, dtype="float64")
    for y, z in zip(
        gate(host, x.A_log, x.a, x.dt_bias, x.b),
        reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b),
        strict=True,
    ):
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, z, rtol=1e-13, atol=0)


def test_small_decays_are_exact(place):
    # log(1 + exp(-30)) is 0 in float32, and has half its digits in float64; log1p(exp(-30)) has them all.
    a = np.array([[[-30.0]], [[-80.0]], [[-16.7]], [[-5.0]]], np.float32)
    g, _ = gate(place, np.zeros(1, np.float32), a, np.zeros(1, np.float32), a)
    np.testing.assert_allclose(g, -np.log1p(np.exp(a.astype(np.float64))), rtol=5e-7)
    assert g.max() < 0


@pytest.mark.parametrize("softplus_beta", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.5, 20.0, 60.0])
def test_softplus_parameters(place, softplus_beta, threshold):
    # Values whose product with softplus_beta is exactly at the threshold belong to the curve.
    a = np.append(np.linspace(-50, 90, 141), threshold / softplus_beta).astype(np.float32).reshape(1, -1, 1)
    zero = np.zeros(1, np.float32)
    scalars = {"softplus_beta": softplus_beta, "softplus_threshold": threshold}
    if threshold != 1.5 or softplus_beta != 3.0:  # 0.5 is exact, and so is 6
        assert (a * softplus_beta == threshold).any()
    g, _ = gate(place, zero, a, zero, a, **scalars)
    want, _ = reference.gated_delta_rule_gate(zero, a, zero, a, **scalars)
    np.testing.assert_allclose(g, want, rtol=1e-6, atol=1e-37)


def test_extremes_are_limits(place):
    a = np.array([-np.inf, -1e30, -1e4, 1e4, 1e30, np.inf], np.float32).reshape(1, -1, 1)
    zero = np.zeros(1, np.float32)
    g, beta = gate(place, zero, a, zero, a)
    np.testing.assert_array_equal(g.ravel(), [0, 0, 0, -1e4, np.float32(-1e30), -np.inf])
    np.testing.assert_array_equal(beta.ravel(), [0, 0, 0, 1, 1, 1])


def test_a_nan_stays_where_it_is(place):
    x = make_inputs(B=2, T=3, H=4)
    x.a[1, 2, 3] = x.b[0, 1, 2] = np.nan
    g, beta = gate(place, x.A_log, x.a, x.dt_bias, x.b)
    assert np.isnan(g[1, 2, 3])
    assert np.isnan(beta[0, 1, 2])
    assert np.isnan(g).sum() == np.isnan(beta).sum() == 1


@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5)),
        st.tuples(st.integers(0, 7), st.integers(1, 5)),
    ),
    dtypes=st.lists(st.sampled_from(["float32", "float16", "bfloat16"]), min_size=4, max_size=4),
    strided=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_dtype_and_stride(place, shape, dtypes, strided, seed):
    x = make_inputs(B=1, T=1, H=shape[-1], seed=seed)
    rng = np.random.default_rng(seed)
    arrays = [x.A_log, 5 * rng.normal(size=shape), x.dt_bias, 5 * rng.normal(size=shape)]
    A_log, a, dt_bias, b = (
        y.astype(np.float32).astype(make_inputs(dtype=dtype).q.dtype) for y, dtype in zip(arrays, dtypes, strict=True)
    )
    want = reference.gated_delta_rule_gate(A_log, a, dt_bias, b)
    if strided:
        got = gdr.gated_delta_rule_gate(place.put(A_log), place.strided(a), place.put(dt_bias), place.strided(b))
    else:
        got = gdr.gated_delta_rule_gate(*(place.put(y) for y in (A_log, a, dt_bias, b)))
    for y, z in zip(got, want, strict=True):
        assert y.shape == shape
        assert_close(y, z, rtol=1e-6)


def test_results_share_no_memory_with_anything(host):
    x = make_inputs()
    first = gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    second = gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    arrays = [*first, *second, x.a, x.b, x.A_log, x.dt_bias]
    assert not any(np.shares_memory(p, r) for i, p in enumerate(arrays) for r in arrays[:i])


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("A_log", np.zeros(3, np.float32), ValueError),
        ("A_log", np.zeros(2, np.int32), TypeError),
        ("A_log", None, TypeError),
        ("dt_bias", np.zeros((1, 2), np.float32), ValueError),
        ("dt_bias", [0.0, 0.0], TypeError),
        ("a", np.zeros((2, 7, 2), np.float32), ValueError),
        ("a", np.zeros(2, np.float32), ValueError),
        ("a", 0.0, TypeError),
        ("b", np.zeros((2, 8, 3), np.float32), ValueError),
        ("b", np.zeros((2, 8, 2), np.complex64), TypeError),
        ("softplus_beta", 0.0, ValueError),
        ("softplus_beta", -1.0, ValueError),
        ("softplus_beta", np.nan, ValueError),
        ("softplus_beta", "1", TypeError),
        ("softplus_threshold", np.nan, ValueError),
        ("softplus_threshold", None, TypeError),
    ],
)
def test_refusals_name_the_argument(argument, value, error):
    x = make_inputs(B=2, T=8, H=2)
    call = {"A_log": x.A_log, "a": x.a, "dt_bias": x.dt_bias, "b": x.b} | {argument: value}
    # Where a and b disagree, either may be named.
    with pytest.raises(error, match=r"\b(a|b)\b" if argument in "ab" else rf"\b{argument}\b"):
        gdr.gated_delta_rule_gate(**call)


def test_unknown_keywords_are_refused():
    x = make_inputs()
    with pytest.raises(TypeError, match="threshold"):
        gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b, threshold=20.0)
