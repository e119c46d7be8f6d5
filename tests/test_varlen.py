from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from places import assert_same_bits, given

import gdr
from gdr import varlen
from gdr.testing import make_inputs


@hypothesis_given(lengths=st.lists(st.integers(0, 9), max_size=8))
def test_offsets_of_lengths(lengths):
    cu_seqlens = varlen.cu_seqlens_of(lengths)
    assert cu_seqlens.dtype == np.int32
    assert cu_seqlens.shape == (len(lengths) + 1,)
    assert cu_seqlens[0] == 0
    assert np.diff(cu_seqlens).tolist() == lengths
    np.testing.assert_array_equal(varlen.cu_seqlens_of(np.array(lengths, np.int64)), cu_seqlens)


@pytest.mark.parametrize(
    ("lengths", "error"),
    [([1.0], TypeError), ([[1, 2]], TypeError), ([2, -1], ValueError), ([2**31 - 1, 1], ValueError)],
)
def test_wrong_lengths_are_refused(lengths, error):
    with pytest.raises(error, match="lengths"):
        varlen.cu_seqlens_of(lengths)


@hypothesis_given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(lengths, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.normal(size=(n, 2, 3)).astype(np.float32) for n in lengths]
    packed, cu_seqlens = varlen.pack(sequences)
    assert packed.shape == (1, sum(lengths), 2, 3)
    assert packed.dtype == np.float32
    views = varlen.unpack(packed, cu_seqlens)
    for view, sequence in zip(views, sequences, strict=True):
        np.testing.assert_array_equal(view, sequence)
        assert view.size == 0 or np.shares_memory(view, packed)


def test_wrong_sequences_are_refused():
    with pytest.raises(ValueError, match="sequences"):
        varlen.pack([])
    with pytest.raises(ValueError, match="sequence 1"):
        varlen.pack([np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match="sequence 1"):
        varlen.pack([np.zeros((2, 3)), np.zeros((2, 3), np.float32)])


@pytest.mark.parametrize("offsets", [[], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4]])
def test_wrong_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seqlens"):
        varlen.unpack(np.zeros((1, 4, 2)), np.array(offsets, np.int32))


def test_an_array_that_is_not_packed_is_refused():
    with pytest.raises(ValueError, match="packed"):
        varlen.unpack(np.zeros((2, 4, 2)), np.array([0, 4]))


@pytest.mark.parametrize("name", ["fused_recurrent_gated_delta_rule", "chunk_gated_delta_rule"])
def test_a_packed_call_is_its_sequences(place, name):
    run = getattr(gdr, name)
    options = {"batch_invariant": True} if name.startswith("chunk") else {}
    lengths = [5, 0, 70, 1]
    x = make_inputs(lengths=lengths, H=2, HV=4)
    there = place.inputs(x)
    o, h = run(*given(there), None, place.put(x.initial_state), True, cu_seqlens=there.cu_seqlens, **options)
    outputs = varlen.unpack(place.get(o), x.cu_seqlens)
    for n, want in enumerate(outputs):
        tokens = slice(*x.cu_seqlens[n : n + 2])
        alone = [place.put(np.ascontiguousarray(y[:, tokens])) for y in given(x)]
        y, state = run(*alone, None, place.put(x.initial_state[n : n + 1]), True, **options)
        assert_same_bits(place.get(y)[0], want)
        assert_same_bits(place.get(state)[0], place.get(h)[n])
