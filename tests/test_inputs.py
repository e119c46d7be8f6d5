"""Every refusal: the type of the error, that it names the argument, and that nothing was written."""

from __future__ import annotations

import inspect
import re
import types

import ml_dtypes
import numpy as np
import pytest
from places import assert_same_bits, given, raw

import gdr
from gdr import _arrays, _cuda_fused_recurrent, _cuda_ring, _inputs
from gdr._spec import OPERANDS, RAW_GATES, TOKENS, Form
from gdr.testing import make_inputs

UPDATE = gdr.fused_sigmoid_gating_delta_rule_update
GIVEN = [gdr.fused_recurrent_gated_delta_rule, gdr.chunk_gated_delta_rule]

B, T, H, HV, K, V, SLOTS = 2, 3, 2, 4, 5, 7, 6


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def overlapping(*shape):
    """An array whose rows share memory."""
    base = np.zeros(int(np.prod(shape)) + 16, np.float32)
    strides = list(zeros(*shape).strides)
    strides[0] //= 2
    return np.lib.stride_tricks.as_strided(base, shape, strides)


def read_only(x):
    x.flags.writeable = False
    return x


def slots(*values, dtype=np.int32):
    return np.array(values, dtype)


# argument, value, error: for every operation that has the argument
TENSORS = [
    ("q", None, TypeError),
    ("q", 1.0, TypeError),
    ("q", [[1.0]], TypeError),
    ("q", "q", TypeError),
    ("q", np.float32(1.0), TypeError),
    ("q", zeros(B, T, H), ValueError),
    ("q", zeros(B, T, H, K, 1), ValueError),
    ("q", zeros(B, T, H, K, dtype=np.int32), TypeError),
    ("q", zeros(B, T, H, K, dtype=bool), TypeError),
    ("q", zeros(B, T, H, K, dtype=np.complex64), TypeError),
    ("q", zeros(B, T, H, K, dtype=object), TypeError),
    ("q", zeros(B, T, H, K, dtype="S4"), TypeError),
    ("q", zeros(B, T, H, K, dtype=ml_dtypes.float8_e4m3fn), TypeError),
    ("q", zeros(B, T, H, K, dtype=np.longdouble), TypeError),
    ("q", zeros(B, T, H, K, dtype=">f4"), TypeError),
    ("q", np.ma.masked_array(zeros(B, T, H, K), mask=True), TypeError),
    ("k", None, TypeError),
    ("k", zeros(B, T, H, K + 1), ValueError),
    ("k", zeros(B, T, H + 1, K), ValueError),
    ("k", zeros(B, T + 1, H, K), ValueError),
    ("k", zeros(B + 1, T, H, K), ValueError),
    ("k", zeros(1, T, H, K), ValueError),
    ("k", zeros(B, T, H, K, dtype=np.float16), TypeError),
    ("v", None, TypeError),
    ("v", zeros(B, T, HV), ValueError),
    ("v", zeros(B, T, 3, V), ValueError),
    ("v", zeros(B, T, 1, V), ValueError),
    ("v", zeros(B, T, 0, V), ValueError),
    ("v", zeros(B, T, HV, 0), ValueError),
    ("v", zeros(B, T, HV, 257), ValueError),
    ("v", zeros(B, T + 1, HV, V), ValueError),
    ("v", zeros(B + 1, T, HV, V), ValueError),
    ("v", zeros(B, T, HV, V, dtype=np.float64), TypeError),
    ("scale", "1", TypeError),
    ("scale", True, TypeError),
    ("scale", 1j, TypeError),
    ("scale", [1.0], TypeError),
    ("scale", np.nan, ValueError),
    ("scale", np.inf, ValueError),
    ("scale", 10**400, ValueError),
    ("use_qk_l2norm_in_kernel", 1, TypeError),
    ("use_qk_l2norm_in_kernel", None, TypeError),
    ("use_qk_l2norm_in_kernel", "yes", TypeError),
    ("use_qk_l2norm_in_kernel", [], TypeError),
    ("state_layout", "hkv", ValueError),
    ("state_layout", "KV", ValueError),
    ("state_layout", None, ValueError),
    ("state_layout", 0, ValueError),
    ("cu_seqlens", slots(0, T), ValueError),  # B is 2
    ("cu_seqlens", [0, T], TypeError),
    ("cu_seqlens", 3, TypeError),
    ("out", zeros(B, T, HV), ValueError),
    ("out", zeros(B, T, HV, V + 1), ValueError),
    ("out", zeros(B, T, HV, V, dtype=np.float64), TypeError),
    ("out", "out", TypeError),
    ("out", [], TypeError),
    ("out", read_only(zeros(B, T, HV, V)), ValueError),
    ("out", overlapping(B, T, HV, V), ValueError),
    ("out", np.broadcast_to(zeros(1, T, HV, V), (B, T, HV, V)), ValueError),
    ("check", "yes", TypeError),
    ("check", 1, TypeError),
]
RAW = [
    ("A_log", None, TypeError),
    ("A_log", 0.0, TypeError),
    ("A_log", zeros(H), ValueError),
    ("A_log", zeros(1, HV), ValueError),
    ("A_log", zeros(HV, dtype=np.int64), TypeError),
    ("dt_bias", None, TypeError),
    ("dt_bias", zeros(), ValueError),
    ("dt_bias", zeros(HV + 1), ValueError),
    ("dt_bias", zeros(HV, dtype=bool), TypeError),
    ("a", None, TypeError),
    ("a", zeros(B, T, H), ValueError),
    ("a", zeros(B, T), ValueError),
    ("a", zeros(B, T, HV, 1), ValueError),
    ("a", zeros(T * B, H), ValueError),
    ("a", zeros(B, T, HV, dtype=np.uint8), TypeError),
    ("b", zeros(T, B, HV), ValueError),
    ("b", zeros(B, T, HV, dtype=np.complex128), TypeError),
    ("softplus_beta", 0.0, ValueError),
    ("softplus_beta", -1.0, ValueError),
    ("softplus_beta", np.inf, ValueError),
    ("softplus_beta", np.nan, ValueError),
    ("softplus_beta", None, TypeError),
    ("softplus_beta", "1", TypeError),
    ("softplus_threshold", np.nan, ValueError),
    ("softplus_threshold", None, TypeError),
    ("softplus_threshold", "20", TypeError),
    ("initial_state_source", 0.0, TypeError),
    ("initial_state_source", zeros(SLOTS, HV, K), ValueError),
    ("initial_state_source", zeros(SLOTS, HV, V, K), ValueError),
    ("initial_state_source", zeros(SLOTS, H, K, V), ValueError),
    ("initial_state_source", zeros(SLOTS, HV, K, V, dtype=np.int32), TypeError),
    ("initial_state_source", zeros(SLOTS, HV, K, V, dtype=">f4"), TypeError),
    ("initial_state_source", read_only(zeros(SLOTS, HV, K, V)), ValueError),
    ("initial_state_source", overlapping(SLOTS, HV, K, V), ValueError),
    ("initial_state_source", None, ValueError),  # but indices
    ("initial_state_indices", [0, 1], TypeError),
    ("initial_state_indices", slots(0, 1, dtype=np.float32), TypeError),
    ("initial_state_indices", slots(0, 1, dtype=np.int16), TypeError),
    ("initial_state_indices", slots(0, 1, dtype=np.uint32), TypeError),
    ("initial_state_indices", slots(0, 1, dtype=bool), TypeError),
    ("initial_state_indices", slots(0), ValueError),
    ("initial_state_indices", slots(0, 1, 2), ValueError),
    ("initial_state_indices", slots([0], [1]), ValueError),
    ("initial_state_indices", slots(0, SLOTS), IndexError),
    ("initial_state_indices", slots(2**31 - 1, 0), IndexError),
    ("initial_state_indices", slots(2**62, 0, dtype=np.int64), IndexError),
    ("initial_state_indices", slots(3, 3), ValueError),
    ("initial_state_indices", None, ValueError),  # six slots for two sequences
    ("output_state_indices", [0, 1], TypeError),
    ("output_state_indices", slots(0, 1, dtype=np.float64), TypeError),
    ("output_state_indices", slots(0), ValueError),
    ("output_state_indices", slots(0, SLOTS), IndexError),
    ("output_state_indices", slots(4, 4), ValueError),
    ("output_state_indices", slots(1, 5), ValueError),  # row 1 reads slot 1, which row 0 writes
    ("disable_state_update", 1, TypeError),
    ("disable_state_update", None, TypeError),
]
GATES = [
    ("g", None, TypeError),
    ("g", zeros(B, T, H), ValueError),
    ("g", zeros(B, T, HV, dtype=np.int32), TypeError),
    ("g", zeros(B, T, HV, 1), ValueError),
    ("beta", None, TypeError),
    ("beta", zeros(B, T + 1, HV), ValueError),
    ("beta", zeros(B, T, HV, dtype=object), TypeError),
    ("initial_state", zeros(B, HV, V, K), ValueError),
    ("initial_state", zeros(B + 1, HV, K, V), ValueError),
    ("initial_state", zeros(B, HV, K, V, dtype=np.int8), TypeError),
    ("initial_state", [0.0], TypeError),
    ("output_final_state", 1, TypeError),
    ("output_final_state", None, TypeError),
]
CHUNK = [
    ("chunk_size", 0, ValueError),
    ("chunk_size", -64, ValueError),
    ("chunk_size", 64.0, TypeError),
    ("chunk_size", "64", TypeError),
    ("chunk_size", True, TypeError),
    ("batch_invariant", 1, TypeError),
    ("batch_invariant", None, TypeError),
]
# Names that a message may use for an argument besides its own.
ALIASES = {
    "initial_state_source": ["initial_state_indices"],
    "initial_state_indices": ["initial_state_source"],
    "output_state_indices": ["initial_state_indices"],
}


def calls():
    for argument, value, error in TENSORS:
        for operation in (UPDATE, *GIVEN):
            yield operation, argument, value, error
    for argument, value, error in RAW:
        yield UPDATE, argument, value, error
    for operation in GIVEN:
        for argument, value, error in GATES:
            yield operation, argument, value, error
    for argument, value, error in CHUNK:
        yield gdr.chunk_gated_delta_rule, argument, value, error


def good_call(operation, **sizes):
    x = make_inputs(**({"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V, "num_slots": SLOTS} | sizes))
    if operation is UPDATE:
        call = dict(zip(inspect.signature(UPDATE).parameters, raw(x), strict=False))
        return call | {"initial_state_source": x.state, "initial_state_indices": slots(3, 1)[: len(x.slots)]}
    return dict(zip(("q", "k", "v", "g", "beta"), given(x), strict=True)) | {"initial_state": x.initial_state}


def assert_refused(operation, call, argument, error):
    before = {name: x.copy() for name, x in call.items() if isinstance(x, np.ndarray) and x.dtype != object}
    names = "|".join([argument, *ALIASES.get(argument, [])])
    with pytest.raises(error) as caught:
        operation(**call)
    assert type(caught.value) is error  # no subclass that something else has raised
    assert re.search(rf"\b({names})\b", str(caught.value)), caught.value
    for name, x in before.items():
        assert_same_bits(call[name], x, name)


def describe(value):
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{list(value.shape)}" + (f"={value.tolist()}" if value.size < 4 else "")
    return str(value)[:12]


@pytest.mark.parametrize(
    ("operation", "argument", "value", "error"),
    [
        pytest.param(*call, id=f"{call[0].__name__.split('_')[0]}-{call[1]}-{describe(call[2])}-{n}")
        for n, call in enumerate(calls())
    ],
)
def test_refused_by_name_and_nothing_written(operation, argument, value, error):
    call = good_call(operation)
    operation(**call)
    assert_refused(operation, good_call(operation) | {argument: value}, argument, error)


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        (slots(0, 3, dtype=np.float32), TypeError),
        (slots(0, 3, dtype=np.int16), TypeError),
        (slots([0, 3], [3, 3]), ValueError),
        (slots(), ValueError),
        (slots(0), ValueError),
        (slots(1, 3), ValueError),
        (slots(0, 2), ValueError),
        (slots(0, 4), ValueError),
        (slots(0, 2, 1, 3), ValueError),
        (slots(0, -1, 3), ValueError),
        (slots(0, 5, 3), ValueError),
        (slots(0, 2**62, 3, dtype=np.int64), ValueError),
        (slots(-(2**62), 3, dtype=np.int64), ValueError),
    ],
)
@pytest.mark.parametrize("operation", [UPDATE, *GIVEN])
def test_wrong_offsets_are_refused(operation, cu_seqlens, error):
    call = good_call(operation, B=1)
    names = ["initial_state", "initial_state_source", "initial_state_indices"]
    for name in names:
        call.pop(name, None)
    assert_refused(operation, call | {"cu_seqlens": cu_seqlens}, "cu_seqlens", error)


def test_a_key_head_dimension_past_the_limit_is_refused():
    for operation in (UPDATE, *GIVEN):
        for size in (0, 257):
            call = good_call(operation) | {"q": zeros(B, T, H, size), "k": zeros(B, T, H, size)}
            assert_refused(operation, call, "q", ValueError)


def test_indices_without_a_pool_are_refused():
    call = good_call(UPDATE)
    call["initial_state_source"] = None
    assert_refused(UPDATE, call, "initial_state_indices", ValueError)
    call["initial_state_indices"] = None
    assert_refused(UPDATE, call | {"output_state_indices": slots(0, 1)}, "output_state_indices", ValueError)


def test_output_indices_that_could_only_be_ignored_are_refused():
    call = good_call(UPDATE) | {"output_state_indices": slots(4, 5), "disable_state_update": True}
    assert_refused(UPDATE, call, "output_state_indices", ValueError)


@pytest.mark.parametrize("name", ["q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state_source"])
def test_an_out_that_overlaps_an_operand_is_refused(name):
    call = good_call(UPDATE)
    memory = np.zeros(10_000, np.float32)
    shape = call[name].shape
    call[name] = memory[: call[name].size].reshape(shape)
    call["out"] = memory[: B * T * HV * V].reshape(B, T, HV, V)
    assert_refused(UPDATE, call, "out", ValueError)


@pytest.mark.parametrize("name", ["q", "k", "v", "a", "b", "A_log", "dt_bias"])
def test_a_pool_that_overlaps_an_operand_is_refused(name):
    call = good_call(UPDATE)
    memory = np.zeros(10_000, np.float32)
    call[name] = memory[: call[name].size].reshape(call[name].shape)
    call["initial_state_source"] = memory[: SLOTS * HV * K * V].reshape(SLOTS, HV, K, V)
    assert_refused(UPDATE, call, "initial_state_source", ValueError)


def test_operands_that_are_read_may_share_memory():
    for operation in (UPDATE, *GIVEN):
        want, got = (
            operation(**(good_call(operation) | {"k": good_call(operation)["q"]})),
            operation(**((call := good_call(operation)) | {"k": call["q"]})),
        )
        assert_same_bits(got if operation is UPDATE else got[0], want if operation is UPDATE else want[0])


@pytest.mark.parametrize("operation", [UPDATE, *GIVEN, gdr.gated_delta_rule_gate])
def test_unknown_keywords_are_refused(operation):
    for keyword in ("head_first", "chunk", "intermediate_states_buffer", "use_gate_in_kernel"):
        with pytest.raises(TypeError, match=keyword):
            operation(**{keyword: True})


def test_a_call_that_was_described_before_is_checked_again():
    # Shapes and dtypes of a signature are checked once; values are checked in every call.
    for _ in range(2):
        call = good_call(UPDATE)
        UPDATE(**call)
        call["initial_state_indices"] = slots(3, SLOTS)
        assert_refused(UPDATE, call, "initial_state_indices", IndexError)
        call["initial_state_indices"] = slots(3, 3)
        assert_refused(UPDATE, call, "initial_state_indices", ValueError)
        packed = good_call(GIVEN[0], lengths=[1, 2])
        GIVEN[0](**packed, cu_seqlens=slots(0, 1, 3))
        assert_refused(GIVEN[0], packed | {"cu_seqlens": slots(0, 4, 3)}, "cu_seqlens", ValueError)


@pytest.mark.parametrize(
    ("good", "equal"),
    [
        ({"scale": 1.0}, {"scale": True}),
        ({"softplus_beta": 1.0}, {"softplus_beta": True}),
        ({"softplus_threshold": 1.0}, {"softplus_threshold": np.True_}),
        ({"use_qk_l2norm_in_kernel": False}, {"use_qk_l2norm_in_kernel": 0}),
        ({"check": True}, {"check": 1}),
        ({"disable_state_update": True}, {"disable_state_update": 1}),
    ],
)
def test_a_scalar_of_a_wrong_type_is_refused_whatever_equals_it(good, equal):
    for _ in range(2):
        UPDATE(**good_call(UPDATE) | good)
        assert_refused(UPDATE, good_call(UPDATE) | equal, *equal, TypeError)


def test_equal_shapes_of_other_strides_are_other_calls():
    x = make_inputs(B=2, T=4, H=3, K=3, V=3)
    want, _ = gdr.fused_recurrent_gated_delta_rule(*given(x))
    assert x.q.swapaxes(2, 3).shape == x.q.shape
    q = np.ascontiguousarray(x.q.swapaxes(2, 3)).swapaxes(2, 3)
    got, _ = gdr.fused_recurrent_gated_delta_rule(q, x.k, x.v, x.g, x.beta)
    assert_same_bits(got, want)


def test_scalars_of_numpy_are_numbers():
    x = make_inputs()
    want, _ = gdr.fused_recurrent_gated_delta_rule(*given(x), 0.5)
    for scale in (np.float32(0.5), np.float64(0.5)):
        assert_same_bits(gdr.fused_recurrent_gated_delta_rule(*given(x), scale)[0], want)
    assert_same_bits(
        gdr.fused_recurrent_gated_delta_rule(*given(x), 1)[0],
        gdr.fused_recurrent_gated_delta_rule(*given(x), np.int64(1))[0],
    )


def test_many_signatures_do_not_grow_without_bound():
    for n in range(_inputs._MAX_SPECS + 50):
        gdr.gated_delta_rule_gate(zeros(1), zeros(n, 1), zeros(1), zeros(n, 1))
    assert len(_inputs._specs) <= _inputs._MAX_SPECS


# -- elements where no GPU can read them: the launchers' own check, with NumPy arrays in place of CuPy's


class _Launched(Exception):
    pass


class _Launches(dict):
    def get(self, variant):
        raise _Launched


def _at_an_odd_address(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


@pytest.mark.parametrize("name", [None, "q", "v", "out", "A_log", "a", "initial_state", "initial_slots", "cu_seqlens"])
@pytest.mark.parametrize(("launcher", "plan"), [(_cuda_fused_recurrent, "fused_recurrent"), (_cuda_ring, "ring_step")])
def test_misaligned_elements_are_refused_before_a_launch(monkeypatch, launcher, plan, name):
    if launcher is _cuda_ring and name == "cu_seqlens":
        pytest.skip("takes none")
    lengths = {"lengths": [2, 3]} if launcher is _cuda_fused_recurrent else {"B": 2, "T": 1}
    x = make_inputs(**lengths, H=1, HV=2, K=4, V=4, dtype="float16")
    operands = {n: getattr(x, n) for n in ("q", "k", "v", "a", "b", "A_log", "dt_bias")}
    operands |= {"out": np.empty_like(x.v), "initial_state": x.state, "initial_slots": x.slots}
    operands |= {} if x.cu_seqlens is None else {"cu_seqlens": x.cu_seqlens}
    operands = {n: y.copy() if n != name else _at_an_odd_address(y) for n, y in operands.items()}
    operands |= {"final_state": operands["initial_state"], "final_slots": operands["initial_slots"]}
    form = Form("fused_recurrent", (*TOKENS, *RAW_GATES), {"initial_state": "initial_state_source"})
    call = _inputs.prepare(form, tuple(map(operands.get, OPERANDS)))
    if name in ("initial_slots", "cu_seqlens"):  # on the host these were copied
        setattr(call, name, operands[name])
    call.library = types.SimpleNamespace(stream=lambda device: 0)
    call.ring = types.SimpleNamespace(entries=4)
    monkeypatch.setattr(_arrays.NumpyArrays, "pointer", lambda self, x: x.__array_interface__["data"][0])
    made = launcher.Plan(call)
    made.launches = _Launches()
    monkeypatch.setitem(call.spec.plan, plan, made)
    said = {"initial_state": "initial_state_source"}.get(name, name)
    wanted = (_Launched, None) if name is None else (ValueError, f"^{said}: expected elements at multiples of")
    with pytest.raises(wanted[0], match=wanted[1]):
        launcher.run(call)
