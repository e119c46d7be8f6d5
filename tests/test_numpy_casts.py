"""Float16 by its bits: the very numbers that NumPy's own conversion gives."""

from __future__ import annotations

import numpy as np
import pytest

from gdr._numpy_casts import LEAST, store, widen

SINGLE = np.dtype(np.float32)
EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def stored(x: np.ndarray) -> np.ndarray:
    target = np.full(x.shape, np.nan, np.float16)
    store(target, x)
    return target


def assert_stored_as_numpy_does(x: np.ndarray) -> None:
    assert x.size >= LEAST
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(stored(x).view(np.uint16), want.view(np.uint16))


def test_every_finite_number_is_widened():
    finite = EVERY[np.isfinite(EVERY)]
    got = widen(finite, SINGLE)
    np.testing.assert_array_equal(got.view(np.uint32), finite.astype(SINGLE).view(np.uint32))


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_are_widened(special):
    x = np.ones(LEAST, np.float16)
    x[7] = special
    np.testing.assert_array_equal(widen(x, SINGLE), x.astype(SINGLE))
    x = x.astype(SINGLE)
    np.testing.assert_array_equal(stored(x), x.astype(np.float16))


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-5, 6e-8, 1e-30, 1e4, 3e5])
def test_random_numbers_are_stored(scale):
    assert_stored_as_numpy_does((np.random.default_rng(0).standard_normal(1 << 16) * scale).astype(SINGLE))


def test_ties_and_the_ends_are_stored():
    finite = np.sort(EVERY[np.isfinite(EVERY)].astype(np.float64))
    middles = ((finite[1:] + finite[:-1]) / 2).astype(SINGLE)
    for x in (middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))):
        assert_stored_as_numpy_does(x)
    assert_stored_as_numpy_does(np.tile(np.array([65519.996, 65520, 1e30, -1e30, np.inf, 0.0, -0.0], SINGLE), LEAST))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_strides_and_other_dtypes(dtype):
    x = np.random.default_rng(1).standard_normal((128, 128)).astype(dtype)
    np.testing.assert_array_equal(widen(x.T[::2], SINGLE), x.T[::2].astype(SINGLE))
    target = np.zeros((128, 256), dtype)
    store(target[:, ::2], x.T.astype(SINGLE))
    np.testing.assert_array_equal(target[:, ::2], x.T.astype(SINGLE).astype(dtype))
    assert not target[:, 1::2].any()
    assert widen(x, x.dtype) is x
