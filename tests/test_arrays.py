"""Arrays of other libraries: no copy on the way in, the same kind on the way out, and no mixture of devices."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from places import assert_same_bits

import gdr
from gdr import _arrays, _inputs
from gdr.testing import Inputs, make_inputs, to_numpy

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDR_CPU", "numpy")  # what matters here is the same for both, and numba compiles for seconds


@pytest.fixture(params=["torch", "jax"])
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


def address(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return x.data_ptr() if hasattr(x, "data_ptr") else x.unsafe_buffer_pointer()


def kind(x: Any) -> str:
    return _arrays.library_of(x).name


def problem(dtype: str = "float32", **rest: Any) -> Inputs:
    return make_inputs(**{"B": 2, "T": 3, "H": 2, "HV": 4, "K": 8, "V": 6, "dtype": dtype} | rest)


def operands(x: Inputs) -> tuple[Any, ...]:
    return x.q, x.k, x.v, x.g, x.beta


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_adopted_without_a_copy(library: str, dtype: str) -> None:
    x = problem(dtype).to(library).v
    arrays = _arrays.library_of(x)
    view = arrays.adopt(x)
    assert isinstance(view, np.ndarray)
    assert address(view) == address(x)
    assert view.dtype == _arrays.numpy_dtype(dtype)
    assert arrays.meta(x) == _arrays.library_of(view).meta(view)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_results_become_torch_tensors_without_a_copy(torch: Any, dtype: str) -> None:
    x = np.arange(24).reshape(2, 3, 4).astype(_arrays.numpy_dtype(dtype))
    tensor = _arrays.library_of(torch.zeros(1)).release(x)
    assert address(tensor) == address(x)
    assert tensor.dtype is getattr(torch, dtype)
    assert_same_bits(tensor, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_become_jax_arrays(jax: Any, dtype: str) -> None:
    x = np.arange(24).reshape(2, 3, 4).astype(_arrays.numpy_dtype(dtype))
    array = _arrays.library_of(jax.numpy.zeros(1)).release(x)
    assert array.dtype == x.dtype
    assert_same_bits(array, x)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_torch_views_keep_their_strides(torch: Any, dtype: str) -> None:
    packed = torch.arange(2 * 3 * 20).reshape(2, 3, 20).to(getattr(torch, dtype))
    x = packed[:, :, 5:13].unflatten(-1, (2, 4)).transpose(0, 1)
    view = _arrays.library_of(x).adopt(x)
    assert address(view) == address(x)
    assert tuple(step // view.itemsize for step in view.strides) == x.stride()
    assert_same_bits(np.array(view, order="C"), x.contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [gdr.fused_recurrent_gated_delta_rule, gdr.chunk_gated_delta_rule])
def test_results_are_of_the_kind_of_the_arguments(library: str, operation: Any, dtype: str) -> None:
    x = problem(dtype, T=40)
    want_o, want_h = operation(*operands(x), initial_state=x.initial_state, output_final_state=True)
    there = x.to(library)
    initial = gdr.testing.to_library(x.initial_state, library)
    o, h = operation(*operands(there), initial_state=initial, output_final_state=True)
    assert kind(o) == kind(h) == library
    assert_same_bits(o, want_o, "o")
    assert_same_bits(h, want_h, "h")


def test_the_gate_is_of_the_kind_of_its_logits(library: str) -> None:
    x = problem()
    want = gdr.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    there = x.to(library)
    got = gdr.gated_delta_rule_gate(there.A_log, there.a, there.dt_bias, there.b)
    for array, expected in zip(got, want, strict=True):
        assert kind(array) == library
        assert_same_bits(array, expected)


def test_results_share_no_memory_with_arguments_or_each_other(library: str) -> None:
    there = problem("bfloat16").to(library)
    call = {"initial_state": gdr.testing.to_library(problem("bfloat16").initial_state, library)}
    first = gdr.fused_recurrent_gated_delta_rule(*operands(there), output_final_state=True, **call)
    bits = [to_numpy(x).copy() for x in first]
    second = gdr.fused_recurrent_gated_delta_rule(*operands(there), output_final_state=True, **call)
    addresses = [address(x) for x in (*first, *second, *operands(there), *call.values())]
    assert len(set(addresses)) == len(addresses)
    for x, before in zip(first, bits, strict=True):
        assert_same_bits(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_torch_pool_is_updated_in_place(torch: Any, dtype: str) -> None:
    x = problem(dtype, state_dtype=dtype)
    there = x.to("torch")
    out = torch.full_like(there.v, float("nan"))
    pool_address = address(there.state)
    call = {"use_qk_l2norm_in_kernel": True}
    results = []
    for y, o in ((x, None), (there, out)):
        raw = (y.A_log, y.a, y.dt_bias, 1.0, 20.0, y.q, y.k, y.v, y.b)
        results.append(gdr.fused_sigmoid_gating_delta_rule_update(*raw, y.state, y.slots, out=o, **call))
    assert results[1] is out
    assert address(there.state) == pool_address
    assert_same_bits(out, results[0], "o")
    assert_same_bits(there.state, x.state, "pool")


def test_a_jax_pool_is_refused_for_it_cannot_be_updated_in_place(jax: Any) -> None:
    x = problem().to("jax")
    raw = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b)
    with pytest.raises(ValueError, match=r"initial_state_source: .*read-only"):
        gdr.fused_sigmoid_gating_delta_rule_update(*raw, x.state, x.slots)
    o = gdr.fused_sigmoid_gating_delta_rule_update(*raw, x.state, x.slots, disable_state_update=True)
    assert kind(o) == "jax"


def test_a_pool_takes_arrays_of_any_library(library: str) -> None:
    x = problem("bfloat16", T=1)
    steps = []
    for y in (x, x.to(library)):
        state = gdr.DeltaRuleState(4, 4, 8, 6, num_k_heads=2, A_log=y.A_log, dt_bias=y.dt_bias)
        slots = state.alloc(2)
        o = state.step(y.q, y.k, y.v, y.a, y.b, slots)
        flat = state.step(*(z[:, 0] for z in (y.q, y.k, y.v, y.a, y.b)), slots)
        steps.append((o, flat, state.read(slots)))
    assert kind(steps[1][0]) == kind(steps[1][1]) == library
    for got, want in zip(steps[1], steps[0], strict=True):
        assert_same_bits(got, want)


def test_libraries_on_the_host_may_be_mixed(library: str) -> None:
    x = problem("bfloat16")
    there = x.to(library)
    want, _ = gdr.fused_recurrent_gated_delta_rule(*operands(x))
    o, _ = gdr.fused_recurrent_gated_delta_rule(x.q, x.k, there.v, x.g, x.beta)
    assert kind(o) == library  # v's
    assert_same_bits(o, want)
    o, _ = gdr.fused_recurrent_gated_delta_rule(there.q, there.k, x.v, there.g, there.beta)
    assert kind(o) == "numpy"
    assert_same_bits(o, want)


@pytest.mark.parametrize("cpu", ["numpy", "numba"])
def test_read_only_arguments_are_only_read(monkeypatch: pytest.MonkeyPatch, cpu: str) -> None:
    if cpu == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("GDR_CPU", cpu)
    x = problem()
    want, want_h = gdr.fused_recurrent_gated_delta_rule(*operands(x), None, x.initial_state, True)
    frozen = [*operands(x), x.initial_state]
    for array in frozen:
        array.flags.writeable = False
    o, h = gdr.fused_recurrent_gated_delta_rule(*frozen[:5], None, frozen[5], True)
    assert_same_bits(o, want)
    assert_same_bits(h, want_h)
    x.state.flags.writeable = False
    raw = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b)
    gdr.fused_sigmoid_gating_delta_rule_update(*raw, x.state, x.slots, disable_state_update=True)


class OnDevice:
    """What looks like an array on a CUDA device."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.shape, self.ndim, self.strides, self.itemsize = x, x.shape, x.ndim, x.strides, x.itemsize


class DeviceArrays(_arrays.NumpyArrays):
    name = "device"

    def signature(self, arrays: Sequence[OnDevice]) -> tuple:
        return super().signature([x.x for x in arrays])

    def meta(self, x: OnDevice) -> _arrays.Meta:
        return super().meta(x.x)._replace(device=1)


@pytest.mark.parametrize("mixed", ["q", "v", "beta"])
@pytest.mark.parametrize("where", ["numpy", "torch", "jax"])
def test_host_and_device_are_never_mixed(monkeypatch: pytest.MonkeyPatch, where: str, mixed: str) -> None:
    pytest.importorskip(where)
    monkeypatch.setitem(_arrays._by_type, OnDevice, DeviceArrays())
    x = problem()
    setattr(x, mixed, OnDevice(getattr(x, mixed)))
    y = problem().to(where)
    for name in {"q", "k", "v", "g", "beta"} - {mixed}:
        setattr(x, name, getattr(y, name))
    with pytest.raises(TypeError, match=r"expected an array on the same device as q .*CUDA device 1"):
        gdr.fused_recurrent_gated_delta_rule(*operands(x))


def test_tensors_that_cannot_be_used_are_refused(torch: Any) -> None:
    x = problem().to("torch")
    refused = (
        (torch.empty(x.v.shape, device="meta"), r"v: expected a torch tensor on the CPU or a CUDA device, got .*meta"),
        (x.v.to_sparse(), r"v: expected a dense \(strided\) torch tensor"),
        (x.v.to(torch.int32), "v: expected .*dtype"),
        (x.v.to(torch.complex64), "v: expected .*dtype"),
    )
    for v, message in refused:
        with pytest.raises(TypeError, match=message):
            gdr.fused_recurrent_gated_delta_rule(x.q, x.k, v, x.g, x.beta)


def test_what_a_signature_does_not_tell_is_refused_by_name(torch: Any, jax: Any) -> None:
    x = problem()
    y, z = x.to("torch"), x.to("jax")
    deleted = jax.numpy.array(x.v)
    deleted.delete()
    negated = torch._neg_view(y.v)
    for _ in range(2):
        gdr.fused_recurrent_gated_delta_rule(*operands(y))
        gdr.fused_recurrent_gated_delta_rule(*operands(z))
        for others, v in ((y, torch.empty(x.v.shape, device="meta")), (y, negated), (z, deleted)):
            with pytest.raises(TypeError, match=r"^v: "):
                gdr.fused_recurrent_gated_delta_rule(others.q, others.k, v, others.g, others.beta)


def test_the_first_array_of_a_type_has_a_pointer() -> None:
    class First(np.ndarray):
        pass

    x = np.zeros(3).view(First)
    assert _arrays.pointer(x) == x.ctypes.data


def test_strides_that_end_within_an_element_are_refused_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_arrays._by_type, OnDevice, DeviceArrays())
    x = problem()
    v = np.zeros((2, 3, 4 * 6 * 4 + 1), np.uint8)[..., :-1].view(np.float32).reshape(x.v.shape)
    with pytest.raises(ValueError, match=r"^v: expected strides of whole elements .* got \(291, 97, 24, 4\) in bytes"):
        gdr.fused_recurrent_gated_delta_rule(*(OnDevice(y) for y in (x.q, x.k, v, x.g, x.beta)))


@pytest.mark.parametrize("guards", [True, False])
def test_a_tensor_is_recognised_by_all_that_is_known_of_it(
    torch: Any, guards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _arrays.library_of(torch.empty(1))
    if not guards:
        monkeypatch.setattr(library, "_guards", None)
    elif library._guards is None:
        pytest.skip("this torch has other guards")
    _inputs.forget()
    x = problem()
    y = x.to("torch")
    want, _ = gdr.fused_recurrent_gated_delta_rule(*operands(x))

    def assert_right(v: Any) -> None:
        assert_same_bits(gdr.fused_recurrent_gated_delta_rule(y.q, y.k, v, y.g, y.beta)[0], want)

    apart = torch.full((*y.v.shape[:2], 2 * y.v.shape[2], y.v.shape[3]), torch.nan)[:, :, ::2]
    apart.copy_(y.v)
    swapped = y.v.swapaxes(2, 3).contiguous().swapaxes(2, 3)
    for _ in range(2):
        for v in (y.v, apart, swapped, torch.nn.Parameter(y.v, requires_grad=False)):
            assert_right(v)
        with pytest.raises(TypeError, match="no autograd"):
            assert_right(y.v.clone().requires_grad_())
        with pytest.raises(ValueError, match="v: "):
            assert_right(y.v.flatten(2))
        with pytest.raises(TypeError, match=r"v: expected .*dtype"):
            assert_right(y.v.half())


def test_tensors_are_recognised_in_whatever_mode_calls_go_on(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _arrays.library_of(torch.empty(1))
    if library._guards is None:
        pytest.skip("this torch has other guards")
    signed: list[int] = []
    sign = library.signature
    monkeypatch.setattr(library, "signature", lambda arrays: signed.append(len(arrays)) or sign(arrays))
    _inputs.forget()
    x = operands(problem().to("torch"))

    def count(*arrays: Any) -> int:
        signed.clear()
        for _ in range(4):
            gdr.fused_recurrent_gated_delta_rule(*arrays)
        return len(signed)

    assert count(*x) == 1
    with torch.inference_mode():
        assert count(*x) == 1
    assert count(x[0], x[0], *x[2:]) == 4


@pytest.mark.parametrize("flag", ["_c_contiguous", "flags"])
def test_a_cupy_array_is_recognised_by_all_that_is_known_of_it(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Array(types.SimpleNamespace):
        def __init__(self, x: np.ndarray, device: int = 0) -> None:
            super().__init__(shape=x.shape, strides=x.strides, dtype=x.dtype)
            self.data = types.SimpleNamespace(device_id=device)
            setattr(self, flag, x.flags.c_contiguous if flag == "_c_contiguous" else x.flags)

    if flag == "_c_contiguous":
        Array._c_contiguous = None
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=Array))
    library = _arrays.CupyArrays()
    x = np.zeros((2, 3, 4), np.float32)
    apart, swapped = np.zeros((2, 3, 8), np.float32)[..., :4], x.swapaxes(0, 1).copy().swapaxes(0, 1)
    for known in (x, apart):
        recognizes = library.recognizer([Array(x), Array(known)])
        assert recognizes(Array(x + 1), Array(known))
        others = [y for y in (x, apart, swapped, x[:1], x.astype(np.float16)) if y is not known]
        for other in (*map(Array, others), Array(known, device=1)):
            assert not recognizes(Array(x), other)


def test_tensors_that_require_grad_are_refused_unless_grad_is_off(torch: Any) -> None:
    x = problem().to("torch")
    want, _ = gdr.fused_recurrent_gated_delta_rule(*operands(x))
    v = torch.nn.Parameter(x.v)
    with pytest.raises(TypeError, match="no autograd"):
        gdr.fused_recurrent_gated_delta_rule(x.q, x.k, v, x.g, x.beta)
    with torch.no_grad():
        o, _ = gdr.fused_recurrent_gated_delta_rule(x.q, x.k, v, x.g, x.beta)
    with torch.inference_mode():
        inferred, _ = gdr.fused_recurrent_gated_delta_rule(x.q, x.k, v, x.g, x.beta)
    assert not o.requires_grad
    assert_same_bits(o, want)
    assert_same_bits(inferred, want)


def test_jax_tracers_are_refused(jax: Any) -> None:
    x = problem().to("jax")
    with pytest.raises(TypeError, match=r"a JAX tracer; call outside jax\.jit"):
        jax.jit(lambda v: gdr.fused_recurrent_gated_delta_rule(x.q, x.k, v, x.g, x.beta)[0])(x.v)


def test_jax_arrays_work_in_a_callback(jax: Any) -> None:
    x = problem().to("jax")
    want, _ = gdr.fused_recurrent_gated_delta_rule(*operands(x))

    def call(*arrays: Any) -> Any:
        return gdr.fused_recurrent_gated_delta_rule(*arrays)[0]

    got = jax.jit(lambda *arrays: jax.pure_callback(call, x.v, *arrays))(*operands(x))
    assert_same_bits(got, want)


def test_numpy_in_numpy_out_imports_no_other_library() -> None:
    code = (
        "import sys, gdr; x = gdr.testing.make_inputs(); "
        "gdr.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta); "
        "print([m for m in ('cupy', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
}
"""


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_results_are_of_the_kind_of_the_arguments(cupy: Any, library: str, dtype: str) -> None:
    if library == "jax" and not any(d.platform == "gpu" for d in pytest.importorskip("jax").devices()):
        pytest.skip("this JAX has no GPU")
    x = problem(dtype)
    there, native = x.to(library, "cuda"), x.to("cupy", "cuda")
    want = gdr.fused_recurrent_gated_delta_rule(*operands(native), output_final_state=True)
    got = gdr.fused_recurrent_gated_delta_rule(*operands(there), output_final_state=True)
    for array, expected in zip(got, want, strict=True):
        assert kind(array) == library
        assert_same_bits(array, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", ["q", "v", "beta"])
@pytest.mark.parametrize("host", ["numpy", "torch"])
def test_device_arrays_are_never_mixed_with_host_arrays(cupy: Any, host: str, mixed: str) -> None:
    pytest.importorskip(host)
    x = problem().to("cupy", "cuda")
    setattr(x, mixed, getattr(problem().to(host), mixed))
    with pytest.raises(TypeError, match=rf"expected an array on the same device|{mixed}: expected an array"):
        gdr.fused_recurrent_gated_delta_rule(*operands(x))


@pytest.mark.gpu
def test_cupy_calls_join_the_current_stream_and_wait_for_nothing(cupy: Any) -> None:
    spin = cupy.RawKernel(SPIN, "spin")
    x, y = problem().to("cupy", "cuda"), problem(seed=1).to("cupy", "cuda")
    want, want_h = gdr.fused_recurrent_gated_delta_rule(*operands(y), output_final_state=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        gdr.fused_recurrent_gated_delta_rule(*operands(x), output_final_state=True)  # compiled, memory at hand
        stream.synchronize()
        spin((1,), (1,), (300_000_000,))
        for array, new in zip(operands(x), operands(y), strict=True):
            array[...] = new
        o, h = gdr.fused_recurrent_gated_delta_rule(*operands(x), output_final_state=True)
        assert not stream.done
    stream.synchronize()
    assert_same_bits(o, want)
    assert_same_bits(h, want_h)


@pytest.mark.gpu
def test_torch_calls_join_the_current_stream_and_wait_for_nothing(cupy: Any, torch: Any) -> None:
    spin = cupy.RawKernel(SPIN, "spin")
    x, y = problem("bfloat16").to("torch", "cuda"), problem("bfloat16", seed=1).to("torch", "cuda")
    want, want_h = gdr.fused_recurrent_gated_delta_rule(*operands(y), output_final_state=True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        gdr.fused_recurrent_gated_delta_rule(*operands(x), output_final_state=True)
        stream.synchronize()
        spin((1,), (1,), (300_000_000,), stream=cupy.cuda.ExternalStream(stream.cuda_stream))
        for array, new in zip(operands(x), operands(y), strict=True):
            array.copy_(new)
        o, h = gdr.fused_recurrent_gated_delta_rule(*operands(x), output_final_state=True)
        assert not stream.query()
    stream.synchronize()
    assert_same_bits(o, want)
    assert_same_bits(h, want_h)


@pytest.mark.gpu
def test_the_first_call_of_all_may_be_captured(cupy: Any, torch: Any) -> None:
    """In a process of its own: nothing is compiled, no context has been used by CuPy."""
    code = """
import torch
x = torch.randn(2, 1, 4, 64, device="cuda")
gates = -torch.rand(2, 1, 4, device="cuda")
out = torch.full_like(x, float("nan"))
torch.cuda.synchronize()
import gdr
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    gdr.fused_recurrent_gated_delta_rule(x, x, x, gates, gates, None, use_qk_l2norm_in_kernel=True, out=out)
graph.replay()
torch.cuda.synchronize()
o, _ = gdr.fused_recurrent_gated_delta_rule(x, x, x, gates, gates, None, use_qk_l2norm_in_kernel=True)
print(bool((o == out).all()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_become_arrays_of_cupy_bit_for_bit(monkeypatch: pytest.MonkeyPatch, torch: Any, dtype: str) -> None:
    # A CuPy that, as the real one, has no use for torch's bfloat16.
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(asarray=lambda x: x.numpy()))
    x = torch.linspace(-3, 3, 12).reshape(3, 4).to(getattr(torch, dtype))[:, ::2]
    assert_same_bits(_arrays.as_cupy(x), to_numpy(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pools_take_states_and_gates_from_tensors(torch: Any, dtype: str) -> None:
    kind = getattr(torch, dtype)
    A_log, h = torch.randn(4, device="cuda").to(kind), torch.randn(2, 4, 8, 16, device="cuda").to(kind)
    for state_dtype in ("float32", dtype):
        state = gdr.DeltaRuleState(3, 4, 8, 16, A_log=A_log, dtype=state_dtype, device="cuda", ring=2)
        slots = state.alloc(2)
        state.write(slots, h)
        np.testing.assert_array_equal(to_numpy(state.A_log), to_numpy(A_log).astype(np.float32))
        np.testing.assert_array_equal(to_numpy(state.read(slots)).astype(np.float32), to_numpy(h).astype(np.float32))
