"""Float16 numbers in NumPy: to and from float32 by operations on their bits.

NumPy converts float16 one number at a time, unlike bfloat16 and everything else: ten times slower than whole arrays
of bits are shifted.
"""

from __future__ import annotations

import numpy as np

# Below this many numbers NumPy's conversion takes no longer than a few operations on arrays.
LEAST = 4096
# What a float32 with the exponent bits of a float16 is too small by.
_BIAS = np.float32(2.0**112)


def widen(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` as a contiguous array of `dtype`: itself if it is one, else a copy."""
    if x.dtype != np.float16 or dtype != np.float32 or x.size < LEAST:
        return np.ascontiguousarray(x, dtype)
    half = np.ascontiguousarray(x).view(np.int16)
    if np.bitwise_and(half, np.int16(0x7C00)).max() == 0x7C00:  # infinity or NaN
        return half.view(np.float16).astype(dtype)
    bits = half.astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, 3 zeros, 5 bits of exponent and 10 of mantissa, zeros
    single = bits.view(np.float32)
    single *= _BIAS
    return single


def store(target: np.ndarray, x: np.ndarray) -> None:
    """``target[...] = x``, rounded to nearest even."""
    if target.dtype != np.float16 or x.dtype != np.float32 or x.size < LEAST or np.isnan(x).any():
        target[...] = x
        return
    size = np.abs(x)
    bits = (size * (1 / _BIAS)).view(np.uint32)
    odd = bits >> 13
    odd &= 1
    bits += odd
    bits += 0xFFF
    bits >>= 13
    np.minimum(bits, 0x7C00, out=bits)  # infinity
    # Below the normal numbers a sum with 1/2, whose last bit is a float16's last one there, rounds.
    tiny = size < np.float32(2.0**-14)
    size += np.float32(0.5)
    np.copyto(bits, size.view(np.uint32) - np.uint32(0x3F000000), where=tiny)
    np.bitwise_or(bits, np.uint32(0x8000), out=bits, where=np.signbit(x))
    target.view(np.uint16)[...] = bits
