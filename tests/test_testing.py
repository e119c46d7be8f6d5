from __future__ import annotations

import numpy as np
import pytest

from gdr.testing import assert_close, make_inputs, relative_rms, to_library, to_numpy

ARRAYS = ["q", "k", "v", "a", "b", "A_log", "dt_bias", "g", "beta", "state", "slots"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_shapes_and_dtypes(dtype):
    x = make_inputs(B=3, T=5, H=2, HV=4, K=8, V=6, dtype=dtype)
    assert x.q.shape == x.k.shape == (3, 5, 2, 8)
    assert x.v.shape == (3, 5, 4, 6)
    assert x.a.shape == x.b.shape == x.g.shape == x.beta.shape == (3, 5, 4)
    assert x.A_log.shape == x.dt_bias.shape == (4,)
    assert x.state.shape == (6, 4, 8, 6)
    assert x.slots.shape == (3,)
    assert x.slots.dtype == np.int32
    assert x.cu_seqlens is None
    assert x.q.dtype == x.k.dtype == x.v.dtype
    assert x.q.dtype.name == dtype
    wide = "float64" if dtype == "float64" else "float32"
    assert {getattr(x, name).dtype.name for name in ("a", "b", "g", "beta", "A_log", "dt_bias", "state")} == {wide}


def test_packed_lengths_and_layout():
    x = make_inputs(lengths=[3, 0, 4], K=8, V=6, layout="vk", num_slots=3, state_dtype="bfloat16", gate_dtype="float16")
    assert x.q.shape[:2] == (1, 7)
    assert x.cu_seqlens.tolist() == [0, 3, 3, 7]
    assert x.state.shape == (3, 2, 6, 8)
    assert sorted(x.slots) == [0, 1, 2]
    assert x.state.dtype.name == "bfloat16"
    assert x.g.dtype == np.float16
    np.testing.assert_array_equal(x.initial_state, x.state[x.slots])


def test_seed_decides_everything_and_arrays_are_fresh():
    x, y, z = make_inputs(seed=1), make_inputs(seed=1), make_inputs(seed=2)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
    assert not np.array_equal(x.q, z.q)
    arrays = [getattr(x, name) for name in ARRAYS]
    assert not any(np.shares_memory(p, r) for i, p in enumerate(arrays) for r in arrays[:i])
    assert all(p.flags.c_contiguous and p.flags.writeable for p in arrays)


def test_gate_regimes():
    per_regime = {gates: make_inputs(T=200, HV=8, gates=gates).g for gates in ("none", "slow", "ordinary", "fast")}
    assert not per_regime["none"].any()
    assert all((g <= 0).all() and np.isfinite(g).all() for g in per_regime.values())
    medians = [-np.median(g) for g in per_regime.values()]
    assert medians == sorted(medians)
    assert medians[1] < 0.02
    assert medians[3] > 3


def test_keys():
    unit = make_inputs(K=32, normalize=True, dtype="float64")
    np.testing.assert_allclose(np.linalg.norm(unit.k, axis=-1), 1.0, rtol=1e-5)
    assert np.linalg.norm(make_inputs(K=32, normalize=False).k, axis=-1).mean() > 4
    close = make_inputs(B=1, T=50, K=32, keys="correlated", dtype="float64").k[0, :, 0]
    assert (close @ close.T).min() > 0.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": "medium"}, "gates"),
        ({"keys": "equal"}, "keys"),
        ({"layout": "hkv"}, "layout"),
        ({"H": 2, "HV": 3}, "HV"),
        ({"B": 4, "num_slots": 3}, "num_slots"),
        ({"dtype": "int8"}, "dtype"),
        ({"xp": "tensorflow"}, "xp"),
        ({"device": "tpu"}, "device"),
        ({"xp": "numpy", "device": "cuda"}, "numpy"),
        ({"xp": "cupy", "device": "cpu"}, "cupy"),
    ],
)
def test_make_inputs_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(**wrong)


def test_relative_rms():
    want = np.array([3.0, 4.0])
    assert relative_rms(want, want) == 0.0
    assert relative_rms(want + [0.3, 0.4], want) == pytest.approx(0.1)
    assert relative_rms(1e200 * (want + [0.3, 0.4]), 1e200 * want) == pytest.approx(0.1)
    assert relative_rms(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_rms(np.array([0.0, 1e-30]), np.zeros(2)) == np.inf
    assert relative_rms(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
    assert np.isnan(relative_rms(np.array([np.nan, 4.0]), want))
    assert np.isnan(relative_rms(np.array([np.inf, 4.0]), np.array([np.inf, 4.0])))
    with pytest.raises(ValueError, match="shape"):
        relative_rms(want, want[:1])


def test_assert_close_passes_and_fails_at_the_tolerance():
    want = np.ones((2, 3))
    got = want.copy()
    got[1, 2] += 1e-3
    error = relative_rms(got, want)
    assert_close(got, want, rtol=error)
    with pytest.raises(AssertionError, match=r"o: relative RMS error .* at \(1, 2\): got 1.001, expected 1"):
        assert_close(got, want, rtol=0.99 * error, name="o")
    assert_close(np.zeros((0, 4)), np.zeros((0, 4)), rtol=0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_passes(bad):
    want = np.ones((2, 3))
    got = want.copy()
    got[0, 1] = bad
    for pair in ((got, want), (want, got), (got, got)):
        with pytest.raises(AssertionError, match=r"\(0, 1\)"):
            assert_close(*pair, rtol=np.inf)


def test_shapes_must_be_equal():
    with pytest.raises(AssertionError, match=r"h: shape \(3,\), expected \(1, 3\)"):
        assert_close(np.ones(3), np.ones((1, 3)), rtol=1.0, name="h")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("xp", ["numpy", "torch", "jax"])
def test_round_trip_through_a_library(xp, dtype):
    if xp != "numpy":
        pytest.importorskip(xp)
    x = make_inputs(lengths=[2, 1], dtype=dtype, xp=xp)
    want = make_inputs(lengths=[2, 1], dtype=dtype)
    assert type(x.q).__module__.partition(".")[0] in (xp, xp + "lib")
    for name in [*ARRAYS, "cu_seqlens"]:
        got = to_numpy(getattr(x, name))
        assert got.dtype == getattr(want, name).dtype
        np.testing.assert_array_equal(got, getattr(want, name))
    assert to_numpy(None) is to_library(None, xp) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_through_the_gpu(dtype):
    x = make_inputs(dtype=dtype, xp="cupy", device="cuda")
    want = make_inputs(dtype=dtype)
    for name in ARRAYS:
        np.testing.assert_array_equal(to_numpy(getattr(x, name)), getattr(want, name))
