"""Maps of arrays for the copy engine, as the driver is asked for them."""

from __future__ import annotations

from typing import Any

import pytest

from gdr import _cuda_tiles as cuda_tiles

SHAPE, STRIDES = (2, 1000, 4, 96), (1000 * 4 * 128, 4 * 128, 128, 1)


def test_a_map_is_asked_for_by_bytes_and_the_fastest_dimension_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def encode(*arguments: Any) -> int:
        asked.append(arguments)
        return 0

    monkeypatch.setattr(cuda_tiles, "_encoder", lambda: encode)
    maps = cuda_tiles.TileMaps(SHAPE, STRIDES, (32, 128), turned=False)
    assert len(maps.encode(1 << 40)) == cuda_tiles.BYTES
    _, dtype, rank, address, extents, strides, box, steps, interleave, swizzle, _, fill = asked[0]
    assert (dtype, rank, address.value, interleave, swizzle, fill) == (1, 4, 1 << 40, 0, 0, 0)
    assert list(extents) == [96, 1000, 4, 2]
    assert list(strides) == [4 * 128 * 2, 128 * 2, 1000 * 4 * 128 * 2]
    assert list(box) == [128, 32, 1, 1]
    assert list(steps) == [1, 1, 1, 1]


def test_a_refusal_of_the_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "_encoder", lambda: lambda *arguments: 1)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled failed with error 1"):
        cuda_tiles.TileMaps(SHAPE, STRIDES, (64, 64), turned=True).encode(1 << 40)


@pytest.mark.parametrize(
    ("shape", "strides", "can"),
    [
        (SHAPE, STRIDES, True),
        (SHAPE, (STRIDES[0], 0, 128, 1), False),
        (SHAPE, (STRIDES[0], -512, 128, 1), False),
        ((1, 1000, 4, 96), (0, 512, 128, 1), True),
        ((1, 1 << 31, 4, 96), (0, 512, 128, 1), False),
        ((1, 0, 4, 96), (0, 512, 128, 1), False),
        ((2, 1000, 4, 96), (1 << 39, 512, 128, 1), False),
    ],
)
def test_what_can_be_mapped(shape: tuple[int, ...], strides: tuple[int, ...], can: bool) -> None:
    assert cuda_tiles.can_map(shape, strides) is can
