"""Float16 numbers in NumPy: to float32 by operations on their bits.

NumPy converts float16 to float32 one number at a time, unlike bfloat16: five times slower than whole arrays are
shifted.
"""

from __future__ import annotations

import numpy as np

# Below this many numbers NumPy's conversion takes no longer than a few operations on arrays.
LEAST = 4096
# What a float32 with the exponent bits of a float16 is too small by.
_BIAS = np.float32(2.0**112)


def widen(x: np.ndarray, dtype: np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """`x` as a contiguous array of `dtype`: itself if it is one and there is no `out`, else a copy, in `out`."""
    if out is None:
        if x.dtype == dtype:
            return np.ascontiguousarray(x)
        out = np.empty(x.shape, dtype)
    if x.dtype != np.float16 or dtype != np.float32 or x.size < LEAST:
        out[...] = x
        return out
    half = x.view(np.int16)
    if np.bitwise_and(half, np.int16(0x7C00)).max() == 0x7C00:  # infinity or NaN
        out[...] = x
        return out
    bits = out.view(np.int32)
    bits[...] = half
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, 3 zeros, 5 bits of exponent and 10 of mantissa, zeros
    out *= _BIAS
    return out
