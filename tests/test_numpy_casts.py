"""Float16 by its bits: the very numbers that NumPy's own conversion gives."""

from __future__ import annotations

import numpy as np
import pytest

from gdr._numpy_casts import LEAST, widen

SINGLE = np.dtype(np.float32)
EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_finite_number():
    finite = EVERY[np.isfinite(EVERY)]
    got = widen(finite, SINGLE)
    np.testing.assert_array_equal(got.view(np.uint32), finite.astype(SINGLE).view(np.uint32))


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan(special):
    x = np.ones(LEAST, np.float16)
    x[7] = special
    np.testing.assert_array_equal(widen(x, SINGLE), x.astype(SINGLE))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_strides_other_dtypes_and_out(dtype):
    x = np.random.default_rng(1).standard_normal((128, 128)).astype(dtype)
    want = x.T[::2].astype(SINGLE)
    np.testing.assert_array_equal(widen(x.T[::2], SINGLE), want)
    out = np.full(want.shape, np.nan, SINGLE)
    assert widen(x.T[::2], SINGLE, out) is out
    np.testing.assert_array_equal(out, want)
    assert widen(x, x.dtype) is x
