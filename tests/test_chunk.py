"""The chunkwise operation against the reference: decays, keys, chunk sizes, tails, states, and what must not
change."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from places import RTOL_CHUNK, assert_same_bits, given, sequence

import gdr
from gdr import reference
from gdr.testing import assert_close, make_inputs

DTYPES = ["float32", "float16", "bfloat16"]
# A GPU rounds 16-bit operands of its matrix products, so its kernels may be off by a rounding of the inputs; those of
# float32 are products of three.
RTOL_CUDA = {"float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}


def chunk(place, x, **options):
    """Run the operation on copies; return the outputs and the final states."""
    there = place.inputs(x)
    options = {k: place.put(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, h = gdr.chunk_gated_delta_rule(*given(there), cu_seqlens=there.cu_seqlens, **options)
    assert o.shape == x.v.shape
    return place.get(o), None if h is None else place.get(h)


def assert_chunk(place, x, *, rtol=None, state=True, **options):
    """Check outputs and final states, in the dtypes that they should have."""
    if state:
        options["initial_state"] = x.initial_state
    o, h = chunk(place, x, output_final_state=True, **options)
    reference_options = {k: v for k, v in options.items() if k not in ("chunk_size", "batch_invariant")}
    want_o, want_h = reference.fused_recurrent_gated_delta_rule(
        *given(x), output_final_state=True, cu_seqlens=x.cu_seqlens, **reference_options
    )
    dtype = x.v.dtype.name
    table = RTOL_CHUNK if place.on_host else RTOL_CUDA
    assert o.dtype == x.v.dtype
    assert h.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_close(o, want_o, rtol=rtol or table[dtype], name="o")
    assert_close(h, want_h, rtol=rtol or table[dtype if not place.on_host else h.dtype.name], name="h")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({}, {"state": False}, id="no state"),
        pytest.param({}, {}, id="initial state"),
        pytest.param({"normalize": False}, {"use_qk_l2norm_in_kernel": True}, id="l2norm"),
        pytest.param({}, {"scale": 0.37}, id="scale"),
        pytest.param({"B": 8, "T": 64, "H": 8, "K": 64, "V": 64}, {}, id="larger"),
        pytest.param({"T": 100, "H": 2, "HV": 8, "K": 32, "V": 16}, {}, id="grouped value heads"),
    ],
)
def test_scenarios(host, sizes, options, dtype):
    x = make_inputs(**({"B": 4, "T": 8, "H": 4, "K": 16, "V": 16} | sizes), dtype=dtype)
    assert_chunk(host, x, **options)


@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
def test_a_thousand_tokens(place, gates, keys):
    assert_chunk(place, make_inputs(B=1, T=1000, H=2, HV=4, K=64, V=32, gates=gates, keys=keys))


@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
def test_a_thousand_tokens_in_float64(host, gates):
    assert_chunk(host, make_inputs(B=1, T=1000, H=1, HV=2, gates=gates, dtype="float64"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_dtypes_and_layouts(place, dtype, state_dtype, layout):
    x = make_inputs(
        B=2, T=75, H=2, HV=4, K=24, V=20, dtype=dtype, state_dtype=state_dtype, layout=layout, normalize=False
    )
    assert_chunk(place, x, use_qk_l2norm_in_kernel=True, state_layout=layout)


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_chunk_sizes(place, chunk_size):
    assert_chunk(place, make_inputs(B=1, T=150, gates="slow"), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 17, 48, 100, 1000])
def test_any_chunk_size_on_the_host(host, chunk_size):
    assert_chunk(host, make_inputs(B=1, T=150, gates="slow"), chunk_size=chunk_size)
    assert_chunk(host, make_inputs(B=1, T=150, dtype="float64"), chunk_size=chunk_size)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200])
def test_tails(place, T):
    assert_chunk(place, make_inputs(B=2, T=T, H=1, HV=2, seed=T))


@pytest.mark.parametrize("K", [1, 2, 7, 16, 33, 64, 100, 128, 255, 256])
@pytest.mark.parametrize("V", [1, 5, 64, 256])
def test_head_sizes(place, K, V):
    assert_chunk(place, make_inputs(B=1, T=70, H=1, HV=2, K=K, V=V, seed=K))


def test_packed_sequences_of_many_lengths(place):
    lengths = [0, 1, 64, 63, 0, 200, 2, 65, 128, 7, 0]
    x = make_inputs(lengths=lengths, H=2, HV=4)
    assert_chunk(place, x)
    assert_chunk(place, x, batch_invariant=True)
    _, h = chunk(place, x, initial_state=x.initial_state, output_final_state=True)
    for n in np.flatnonzero(np.array(lengths) == 0):
        assert_same_bits(h[n], x.initial_state[n])
    _, h = chunk(place, x, output_final_state=True)
    assert not h[0].any()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"lengths": []}, {"lengths": [0, 0]}])
def test_nothing_to_do(place, sizes):
    x = make_inputs(**sizes)
    o, h = chunk(place, x, initial_state=x.initial_state, output_final_state=True)
    assert o.shape == x.v.shape
    assert_same_bits(h, x.initial_state)
    assert chunk(place, x)[1] is None


def test_it_is_the_recurrence(place):
    x = make_inputs(B=2, T=300, H=2, HV=4, K=64, V=64)
    there = place.inputs(x)
    o, h = gdr.chunk_gated_delta_rule(*given(there), output_final_state=True)
    want, want_h = gdr.fused_recurrent_gated_delta_rule(*given(there), output_final_state=True)
    assert_close(place.get(o), place.get(want), rtol=3e-6)
    assert_close(place.get(h), place.get(want_h), rtol=3e-6)


# -- decays
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [[0], [1], [63], [64], [40, 41], [0, 63, 64, 127, 149], list(range(150))])
def test_minus_infinity_forgets_everything(place, where):
    x = make_inputs(B=1, T=150, H=1, HV=2)
    x.g[0, where, 0] = -np.inf
    assert_chunk(place, x)


@pytest.mark.parametrize("g", [-80.0, -90.0, -104.0, -300.0, -1e4, -1e30])
def test_enormous_decays(place, g):
    x = make_inputs(B=1, T=130, H=1, HV=2)
    x.g[0, ::7, 0] = g
    x.g[0, :, 1] = g
    assert_chunk(place, x)


def test_small_differences_after_large_decays(place):
    # The cumulated decay reaches -6000, where float32 steps are 5e-4: differences of neighbours must not feel
    # that.
    x = make_inputs(B=1, T=128, H=1, gates="slow")
    x.g[0, 3] = -6000.0
    assert_chunk(place, x)
    x.g[0, 60] = -60.0
    assert_chunk(place, x)


def test_decay_of_one_with_orthonormal_keys_stores_values(place):
    K = 16
    x = make_inputs(B=1, T=K, H=1, K=K, V=8, gates="none")
    x.k[0, :, 0] = x.q[0, :, 0] = np.eye(K)
    x.beta[:] = 1.0
    o, h = chunk(place, x, scale=1.0, output_final_state=True)
    np.testing.assert_array_equal(o, x.v)
    np.testing.assert_array_equal(h[0, 0], x.v[0, :, 0])


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_write_strengths_and_equal_keys(place, beta):
    # The hardest system: every key of a chunk the same, nothing forgotten.
    x = make_inputs(B=1, T=200, H=1, gates="none")
    x.k[:] = x.k[:, :1]
    x.beta[:] = beta
    assert_chunk(place, x)


def test_write_strengths_up_to_two(host):
    x = make_inputs(B=1, T=200, H=1, gates="slow")
    x.beta *= 2
    assert_chunk(host, x)


# -- outputs, strides, purity
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_returned(place, dtype):
    x = make_inputs(lengths=[70, 0, 4, 2], dtype=dtype)
    want, _ = chunk(place, x)
    there = place.inputs(x)
    out = place.poisoned(x.v)
    o, _ = gdr.chunk_gated_delta_rule(*given(there), cu_seqlens=there.cu_seqlens, out=out)
    assert o is out
    assert_same_bits(place.get(out), want)


def test_inputs_are_not_modified_and_not_shared(host):
    x = make_inputs(B=2, T=70)
    copy = x.to("numpy")
    results = [
        y
        for _ in range(2)
        for y in gdr.chunk_gated_delta_rule(*given(x), initial_state=x.state[:2], output_final_state=True)
    ]
    for name in ("q", "k", "v", "g", "beta", "state"):
        assert_same_bits(getattr(x, name), getattr(copy, name), name)
    arrays = [*results, x.q, x.k, x.v, x.g, x.beta, x.state]
    assert not any(np.shares_memory(p, r) for i, p in enumerate(arrays) for r in arrays[:i])


@pytest.mark.parametrize("lengths", [None, [40, 70, 0, 3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands(place, lengths, dtype):
    x = make_inputs(B=2, T=70, H=2, HV=4, K=12, V=8, lengths=lengths, dtype=dtype)
    want, want_h = chunk(place, x, initial_state=x.initial_state, output_final_state=True)
    there = place.inputs(x)
    for name in ("q", "k", "v", "g", "beta"):
        setattr(there, name, place.strided(getattr(x, name)))
    o, h = gdr.chunk_gated_delta_rule(
        *given(there), None, place.strided(x.initial_state), True, cu_seqlens=there.cu_seqlens,
        out=place.strided(x.v),
    )  # fmt: skip
    assert_same_bits(place.get(o), want)
    assert_same_bits(place.get(h), want_h)


def test_strides_that_only_the_host_takes(host):
    x = make_inputs(B=3, T=70, H=2, HV=4, K=12, V=8)
    want, want_h = chunk(host, x, initial_state=x.initial_state, output_final_state=True)
    views = {
        "heads before tokens": lambda y: np.ascontiguousarray(y.swapaxes(1, 2)).swapaxes(1, 2),
        "last axis first": lambda y: np.moveaxis(np.ascontiguousarray(np.moveaxis(y, -1, 0)), 0, -1),
        "backwards": lambda y: np.ascontiguousarray(y[::-1, ..., ::-1])[::-1, ..., ::-1],
        "every other": lambda y: np.repeat(y, 2, axis=-1)[..., ::2],
    }
    for words, view in views.items():
        q, k, v, g, beta, initial = (view(y) for y in (*given(x), x.initial_state))
        out = view(np.full_like(x.v, np.nan))
        o, h = gdr.chunk_gated_delta_rule(q, k, v, g, beta, None, initial, True, out=out)
        assert_same_bits(o, want, words)
        assert_same_bits(h, want_h, words)


# -- metamorphic
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_stay_in_their_sequence(place, bad):
    lengths = [70, 65, 3]
    clean = make_inputs(lengths=lengths)
    want, want_h = chunk(place, clean, initial_state=clean.initial_state, output_final_state=True)
    for name in ("q", "k", "v", "g", "beta", "state"):
        if name == "g" and bad == -np.inf:
            continue  # a decay like any other
        x = make_inputs(lengths=lengths)
        if name == "state":
            x.state[x.slots[1]] = bad
        else:
            getattr(x, name)[0, 100] = bad
        there = place.inputs(x)
        o, h = gdr.chunk_gated_delta_rule(
            *given(there), None, place.put(x.initial_state), True, cu_seqlens=there.cu_seqlens
        )
        o, h = place.get(o), place.get(h)
        assert_same_bits(o[:, :70], want[:, :70], name)
        assert_same_bits(o[:, 135:], want[:, 135:], name)
        assert_same_bits(h[[0, 2]], want_h[[0, 2]], name)
        if np.isnan(bad):
            assert np.isnan(o[:, 70:135]).any()


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 5, "T": 70, "H": 2, "HV": 4},
        {"lengths": [3, 64, 1, 0, 200, 65, 2], "H": 1, "HV": 3, "K": 5, "V": 9},
        {"lengths": [130, 40], "K": 64, "V": 128, "dtype": "bfloat16"},
    ],
)
def test_batch_invariant_sequences_do_not_know_their_batch(place, sizes):
    x = make_inputs(**sizes)
    options = {"output_final_state": True, "batch_invariant": True}
    o, h = chunk(place, x, initial_state=x.initial_state, **options)
    for n in range(len(x.slots)):
        one = sequence(x, n)
        alone, alone_h = chunk(place, one, initial_state=one.state, **options)
        bos, eos = (0, x.v.shape[1]) if x.cu_seqlens is None else x.cu_seqlens[n : n + 2]
        assert_same_bits(o[n : n + 1] if x.cu_seqlens is None else o[:, bos:eos], alone, f"o of sequence {n}")
        assert_same_bits(h[n], alone_h[0], f"state of sequence {n}")


def test_same_inputs_same_bits(place):
    x = make_inputs(B=2, T=500, H=4, HV=8, K=64, V=64)
    first = chunk(place, x, output_final_state=True)
    for _ in range(3):
        for y, z in zip(chunk(place, x, output_final_state=True), first, strict=True):
            assert_same_bits(y, z)


def test_same_bits_from_any_thread(host):
    # Large enough that a BLAS left to itself would split its products over threads.
    x = make_inputs(B=16, T=40, H=4, HV=8, K=64, V=64)
    first = chunk(host, x, output_final_state=True)
    results = []

    def work():
        results.extend(gdr.chunk_gated_delta_rule(*given(x), output_final_state=True) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 9
    for result in results:
        for y, z in zip(result, first, strict=True):
            assert_same_bits(y, z)


def test_permuting_the_batch_permutes_the_results(place):
    x = make_inputs(B=5, T=100)
    options = {"output_final_state": True, "batch_invariant": True}
    o, h = chunk(place, x, initial_state=x.initial_state, **options)
    order = np.array([3, 0, 4, 1, 2])
    initial = x.initial_state[order]
    for name in ("q", "k", "v", "g", "beta"):
        setattr(x, name, getattr(x, name)[order])
    o_permuted, h_permuted = chunk(place, x, initial_state=initial, **options)
    assert_same_bits(o_permuted, o[order])
    assert_same_bits(h_permuted, h[order])


@pytest.mark.parametrize("cut", [1, 30, 64, 100, 149])
def test_splitting_a_sequence_anywhere(place, cut):
    x = make_inputs(B=2, T=150, H=2, HV=4, gates="slow")
    o, h = chunk(place, x, initial_state=x.initial_state, output_final_state=True)
    parts, state = [], x.initial_state
    for tokens in (slice(None, cut), slice(cut, None)):
        part = make_inputs(B=2, T=150, H=2, HV=4, gates="slow")
        for name in ("q", "k", "v", "g", "beta"):
            setattr(part, name, getattr(x, name)[:, tokens])
        y, state = chunk(place, part, initial_state=state, output_final_state=True)
        parts.append(y)
    assert_close(np.concatenate(parts, axis=1), o, rtol=3e-6)
    assert_close(state, h, rtol=3e-6)
    if cut == 64 and place.on_host:
        assert_same_bits(parts[0], o[:, :64])


def test_later_chunks_never_change_earlier_outputs(place):
    x = make_inputs(B=2, T=200, H=2, HV=4)
    o, _ = chunk(place, x, batch_invariant=True)
    for name in ("q", "k", "v", "g", "beta"):
        getattr(x, name)[:, 128:] = np.nan
    there = place.inputs(x)
    late = place.get(gdr.chunk_gated_delta_rule(*given(there), batch_invariant=True)[0])
    assert_same_bits(late[:, :128], o[:, :128])


@pytest.mark.parametrize("T", [1, 63, 64, 100, 128, 199])
def test_appending_tokens_never_changes_earlier_chunks(place, T):
    x = make_inputs(B=2, T=200, H=2, HV=4)
    o, _ = chunk(place, x, batch_invariant=True)
    for name in ("q", "k", "v", "g", "beta"):
        setattr(x, name, getattr(x, name)[:, :T])
    got, _ = chunk(place, x, batch_invariant=True)
    whole = T // 64 * 64  # how the last chunk is split depends on its length
    assert_same_bits(got[:, :whole], o[:, :whole])
    assert_close(got, o[:, :T], rtol=1e-6)


def test_later_tokens_of_a_chunk_do_not_change_earlier_outputs(place):
    x = make_inputs(B=2, T=128, H=2, HV=4)
    o, _ = chunk(place, x)
    for name in ("q", "k", "v", "beta"):
        getattr(x, name)[:, 100:] *= np.float32(-0.5)
    x.g[:, 100:] *= 3
    assert_same_bits(chunk(place, x)[0][:, :100], o[:, :100])


@pytest.mark.parametrize("factor", [2.0, -0.25])
def test_scaling_values_scales_outputs(place, factor):
    x = make_inputs(B=2, T=100)
    o, h = chunk(place, x, output_final_state=True)
    x.v *= np.float32(factor)
    o_scaled, h_scaled = chunk(place, x, output_final_state=True)
    assert_same_bits(o_scaled, o * np.float32(factor))
    assert_same_bits(h_scaled, h * np.float32(factor))


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
        "gates": draw(st.sampled_from(["ordinary", "slow", "fast", "none"])),
        "keys": draw(st.sampled_from(["random", "correlated"])),
        "seed": draw(st.integers(0, 2**20)),
    }
    if draw(st.booleans()):
        sizes["lengths"] = draw(st.lists(st.integers(0, 90), max_size=5))
    else:
        sizes["B"], sizes["T"] = draw(st.integers(0, 3)), draw(st.integers(0, 90))
    options = {
        "use_qk_l2norm_in_kernel": draw(st.booleans()),
        "batch_invariant": draw(st.booleans()),
        "state": draw(st.booleans()),
        "state_layout": sizes["layout"],
        "chunk_size": draw(st.sampled_from([16, 32, 64])),
    }
    return make_inputs(**sizes), options


@hypothesis_given(problem=problems())
def test_any_problem(place, problem):
    x, options = problem
    assert_chunk(place, x, **options)


def test_scratch_is_lent_on_cuda_only() -> None:
    x = make_inputs(B=1, T=20, H=1, HV=1, K=8, V=8)
    with pytest.raises(ValueError, match="workspace: is for arrays on a CUDA device"):
        gdr.chunk_gated_delta_rule(*given(x), workspace=np.empty(1 << 20, np.uint8))


def test_wide_range_changes_nothing_on_the_host() -> None:
    x = make_inputs(B=1, T=70, H=1, HV=2, K=16, V=16)
    for got, want in zip(
        gdr.chunk_gated_delta_rule(*given(x), output_final_state=True, wide_range=True),
        gdr.chunk_gated_delta_rule(*given(x), output_final_state=True),
    ):
        assert_same_bits(got, want)
