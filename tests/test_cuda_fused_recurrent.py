"""What is special about the fused recurrence on a CUDA device; the rules all backends share are tested elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gdr
from gdr import _cuda_loader as loader
from gdr.testing import Inputs, assert_close, make_inputs, relative_rms, to_library, to_numpy

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("kv", "vk")
RTOL = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 2.5e-3}


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


def update(x: Inputs, layout: str = "kv", pool: Any = None, **options: Any) -> tuple[Any, Any]:
    """Run the drop-in on a copy of the pool and return outputs and pool."""
    if pool is None:
        pool = x.state.copy()
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": x.cu_seqlens, "state_layout": layout} | options
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, x.slots, **options
    )
    return o, pool


def expected(x: Inputs, layout: str = "kv", **options: Any) -> tuple[Any, Any]:
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": x.cu_seqlens, "state_layout": layout} | options
    return gdr.reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, x.slots, **options
    )


def check(x: Inputs, layout: str = "kv", **options: Any) -> None:
    """Compare a host problem's results on the device with the reference."""
    o, pool = update(x.to("cupy", "cuda"), layout, **options)
    want_o, want_pool = expected(x, layout, **options)
    assert_close(o, want_o, rtol=RTOL[x.v.dtype.name], name="o")
    assert_close(pool, want_pool, rtol=RTOL[x.state.dtype.name], name="pool")


def same_bits(got: Any, want: Any) -> None:
    got, want = (np.ascontiguousarray(to_numpy(x)) for x in (got, want))
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, dtype: str, state_dtype: str) -> None:
    options = {"H": 2, "HV": 4, "K": 128, "V": 128, "dtype": dtype, "state_dtype": state_dtype, "layout": layout}
    check(make_inputs(B=3, T=1, gate_dtype=dtype, seed=1, **options), layout)
    check(make_inputs(B=3, T=11, seed=2, **options), layout)
    check(make_inputs(lengths=[5, 0, 1, 17], seed=3, **options), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (16, 16), (32, 8), (33, 130), (64, 64), (64, 128), (100, 36), (192, 256), (256, 256)]
)
def test_shapes(layout: str, shape: tuple[int, int]) -> None:
    K, V = shape
    for state_dtype, dtype in (("float32", "bfloat16"), ("bfloat16", "float32")):
        options = {"K": K, "V": V, "dtype": dtype, "state_dtype": state_dtype, "layout": layout}
        check(make_inputs(B=5, T=1, H=3, HV=9, seed=1, **options), layout)
        check(make_inputs(lengths=[1, 9, 3], H=1, HV=2, seed=2, **options), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("initial", [None, *DTYPES])
def test_given_gates_and_states_of_two_dtypes(layout: str, initial: str | None) -> None:
    x = make_inputs(
        B=2, T=3, H=2, HV=4, K=128, V=64, layout=layout, state_dtype=initial, dtype="bfloat16", gate_dtype="float16"
    )
    states = None if initial is None else np.ascontiguousarray(x.state[:2])
    for want_state in (False, True):
        o, h = gdr.fused_recurrent_gated_delta_rule(
            *(to_library(y, "cupy", "cuda") for y in (x.q, x.k, x.v, x.g, x.beta)),
            scale=0.3,
            initial_state=to_library(states, "cupy", "cuda"),
            output_final_state=want_state,
            state_layout=layout,
        )
        want_o, want_h = gdr.reference.fused_recurrent_gated_delta_rule(
            x.q, x.k, x.v, x.g, x.beta, 0.3, states, True, state_layout=layout
        )
        assert_close(o, want_o, rtol=RTOL["bfloat16"], name="o")
        assert (h is not None) == want_state
        if h is not None:
            assert_close(h, want_h, rtol=RTOL["float32"], name="h")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 8, 64])
def test_a_float32_state_keeps_its_accuracy(layout: str, T: int) -> None:
    x = make_inputs(
        B=4, T=T, H=4, HV=8, K=128, V=128, dtype="bfloat16", gate_dtype="bfloat16", layout=layout, normalize=False
    )
    _, pool = update(x.to("cupy", "cuda"), layout)
    assert relative_rms(to_numpy(pool)[x.slots], expected(x, layout)[1][x.slots]) <= (2e-7 if T <= 8 else 4e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("lengths", [None, [2, 3, 1, 4, 0, 2]])
def test_padding(layout: str, index_dtype: str, lengths: list[int] | None) -> None:
    x = make_inputs(B=6, T=1, lengths=lengths, H=1, HV=2, K=64, V=64, num_slots=9, layout=layout, dtype="bfloat16")
    slots = np.array([4, -1, 8, 9, 0, -7], index_dtype)
    cu_seqlens = None if lengths is None else x.cu_seqlens.astype(index_dtype)
    x = replace(x, slots=slots, cu_seqlens=cu_seqlens)
    o, pool = update(x.to("cupy", "cuda"), layout)
    live = replace(x, slots=np.where(slots == 9, -1, slots))
    want_o, want_pool = expected(live, layout)
    assert_close(o, want_o, rtol=RTOL["bfloat16"], name="o")
    assert_close(pool, want_pool, rtol=RTOL["float32"], name="pool")
    padded = [n for n in range(6) if slots[n] < 0 or slots[n] > 8]
    for n in padded:
        rows = to_numpy(o)[n : n + 1] if lengths is None else to_numpy(o)[:, cu_seqlens[n] : cu_seqlens[n + 1]]
        assert not rows.view(np.uint16).any()
    untouched = [slot for slot in range(9) if slot not in slots]
    same_bits(to_numpy(pool)[untouched], x.state[untouched])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_slots(layout: str, cupy: Any) -> None:
    x = make_inputs(lengths=[1, 0, 3, 2], H=1, HV=2, K=64, V=64, num_slots=9, layout=layout)
    x = replace(x, slots=np.array([1, 2, 3, 4], np.int32))
    targets = np.array([5, 6, 3, -1])
    o, pool = update(x.to("cupy", "cuda"), layout, output_state_indices=cupy.asarray(targets))
    want_o, want_pool = expected(x, layout, output_state_indices=targets)
    assert_close(o, want_o, rtol=RTOL["float32"], name="o")
    assert_close(pool, want_pool, rtol=RTOL["float32"], name="pool")
    same_bits(pool[6], x.state[2])
    _, pool = update(x.to("cupy", "cuda"), layout, disable_state_update=True)
    same_bits(pool, x.state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 3])
def test_strides_and_alignment_do_not_show(layout: str, state_dtype: str, T: int, cupy: Any) -> None:
    x = make_inputs(
        B=3, T=T, H=2, HV=4, K=128, V=128, dtype="bfloat16", state_dtype=state_dtype, layout=layout, normalize=False
    ).to("cupy", "cuda")
    want = update(x, layout)

    def spread(array: Any, gap: int) -> Any:
        shape = (array.shape[0], *(n + 1 for n in array.shape[1:-1]), array.shape[-1] + gap)
        base = cupy.empty((2, *shape), array.dtype)[1]
        base.view(f"u{array.itemsize}").fill(np.iinfo(f"u{array.itemsize}").max)  # NaN
        view = base[tuple(slice(0, n) for n in array.shape[:-1])][..., gap // 2 : gap // 2 + array.shape[-1]]
        view[...] = array
        return view

    for gap in (0, 2, 16):
        y = replace(x, **{name: spread(getattr(x, name), gap) for name in ("q", "k", "v", "a", "b")})
        out = spread(x.v, gap)
        got = update(y, layout, pool=spread(x.state, gap), out=out)
        assert got[0] is out
        same_bits(cupy.ascontiguousarray(got[0]), want[0])
        same_bits(cupy.ascontiguousarray(got[1]), want[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(128, 128), (64, 64), (256, 256), (100, 36)])
def test_the_batch_does_not_show(layout: str, state_dtype: str, shape: tuple[int, int]) -> None:
    K, V = shape
    for T in (1, 4):
        x = make_inputs(B=72, T=T, H=4, HV=8, K=K, V=V, dtype="bfloat16", state_dtype=state_dtype, layout=layout)
        device = x.to("cupy", "cuda")
        o, pool = update(device, layout)
        for B in (1, 2, 9, 30):
            part = {name: getattr(device, name)[:B] for name in ("q", "k", "v", "a", "b")}
            some_o, some_pool = update(replace(device, **part, slots=device.slots[:B]), layout)
            same_bits(some_o, o[:B])
            same_bits(some_pool[device.slots[:B]], pool[device.slots[:B]])
        # Packed, and beside longer sequences.
        packed = {name: getattr(device, name).reshape(1, B_T, *getattr(device, name).shape[2:])
                  for name in ("q", "k", "v", "a", "b") for B_T in (72 * T,)}  # fmt: skip
        cu_seqlens = to_library(np.arange(0, 72 * T + 1, T), "cupy", "cuda")
        some_o, some_pool = update(replace(device, **packed, cu_seqlens=cu_seqlens), layout)
        same_bits(some_o.reshape(o.shape), o)
        same_bits(some_pool, pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_by_token_gives_the_bits_of_one_call(layout: str) -> None:
    x = make_inputs(B=2, T=21, H=2, HV=4, K=128, V=128, dtype="bfloat16", layout=layout).to("cupy", "cuda")
    o, pool = update(x, layout)
    stepped = x.state.copy()
    for first, last in ((0, 1), (1, 2), (2, 12), (12, 21)):
        part = {name: getattr(x, name)[:, first:last] for name in ("q", "k", "v", "a", "b")}
        some_o, _ = update(replace(x, **part), layout, pool=stepped)
        same_bits(some_o, o[:, first:last])
    same_bits(stepped, pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_give_the_same_bits(layout: str) -> None:
    x = make_inputs(lengths=[1, 30, 7, 8], H=4, HV=16, K=128, V=128, dtype="float16", layout=layout)
    x = x.to("cupy", "cuda")
    want = update(x, layout)
    for _ in range(30):
        got = update(x, layout)
        same_bits(got[0], want[0])
        same_bits(got[1], want[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B", [2, 5])
def test_calls_that_need_the_last_ones_results(layout: str, state_dtype: str, B: int, cupy: Any) -> None:
    x = make_inputs(
        B=B, T=1, H=4, HV=8, K=128, V=128, state_dtype=state_dtype, layout=layout, num_slots=B + 1, normalize=False
    )
    first = np.arange(B, dtype=np.int32)
    there = replace(x.to("cupy", "cuda"), slots=cupy.asarray(first))
    pool, outs = there.state.copy(), cupy.empty((40, *x.v.shape), x.v.dtype)

    def calls(finish: Any = lambda: None) -> None:
        # Each call's values are the last one's outputs; its states too; and now and then a kernel just ahead moves the
        # sequences to other slots.
        v = there.v
        for i, out in enumerate(outs):
            if i % 3 == 2:
                cupy.subtract(B, there.slots, out=there.slots)
            update(replace(there, v=v), layout, pool=pool, out=out)
            finish()
            v = out

    def restart() -> None:
        outs.fill(np.nan)
        pool[...], there.slots[...] = there.state, cupy.asarray(first)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        restart()
        calls(stream.synchronize)
        want = outs.copy(), pool.copy()
        for _ in range(30):
            restart()
            calls()
            same_bits(outs, want[0])
            same_bits(pool, want[1])
        restart()
        stream.begin_capture()
        calls()
        graph = stream.end_capture()
        for _ in range(30):
            restart()
            graph.launch()
            same_bits(outs, want[0])
            same_bits(pool, want[1])
    y, slots = x, first
    for i, got in enumerate(to_numpy(want[0])):
        slots = B - slots if i % 3 == 2 else slots
        o, state = expected(replace(y, slots=slots), layout)
        y = replace(y, v=np.asarray(o, x.v.dtype), state=state)
        assert_close(got, o, rtol={"float32": 2e-5, "bfloat16": 5e-2}[state_dtype], name=f"o of call {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 5])
def test_extreme_gates(layout: str, T: int) -> None:
    x = make_inputs(B=4, T=T, H=2, HV=4, K=64, V=64, layout=layout)
    for a in (-80.0, -30.0, 0.0, 19.0, 60.0):
        for A_log in (-10.0, 3.0, 40.0):
            y = replace(x, a=np.full_like(x.a, a), A_log=np.full_like(x.A_log, A_log), dt_bias=0 * x.dt_bias)
            check(replace(y, b=np.full_like(x.b, -a)), layout)
    zero = replace(x, k=0 * x.k, q=0 * x.q)
    o, pool = update(zero.to("cupy", "cuda"), layout)
    assert not to_numpy(o).any()
    assert np.isfinite(to_numpy(pool)).all()
    forget = np.full_like(x.g, -np.inf)
    arrays = [to_library(y, "cupy", "cuda") for y in (x.q, x.k, x.v, forget, x.beta)]
    states = np.ascontiguousarray(x.state[:4])
    o, h = gdr.fused_recurrent_gated_delta_rule(
        *arrays, initial_state=to_library(states, "cupy", "cuda"), output_final_state=True, state_layout=layout
    )
    want = gdr.reference.fused_recurrent_gated_delta_rule(
        x.q, x.k, x.v, forget, x.beta, None, states, True, state_layout=layout
    )
    assert_close(o, want[0], rtol=RTOL["float32"])
    assert_close(h, want[1], rtol=RTOL["float32"])


def test_gates_alone() -> None:
    x = make_inputs(B=3, T=50, H=2, HV=4, gates="slow", gate_dtype="bfloat16")
    g, beta = gdr.gated_delta_rule_gate(*(to_library(y, "cupy", "cuda") for y in (x.A_log, x.a, x.dt_bias, x.b)))
    want_g, want_beta = gdr.reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    assert_close(g, want_g, rtol=2e-7, name="g")
    assert_close(beta, want_beta, rtol=2e-7, name="beta")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_sequences_than_a_grid_has_rows(layout: str, cupy: Any) -> None:
    x = make_inputs(B=70_001, T=1, H=1, HV=1, K=4, V=4, layout=layout)
    check(x, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pool_of_more_than_2_31_elements(layout: str, cupy: Any) -> None:
    x = make_inputs(B=3, T=2, H=2, HV=8, K=128, V=128, dtype="bfloat16", state_dtype="bfloat16", layout=layout)
    slots = np.array([0, 16_500, 16_383], np.int32)  # 2^17 elements a slot
    if cupy.cuda.runtime.memGetInfo()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    pool = cupy.zeros((16_501, *x.state.shape[1:]), x.state.dtype)
    device = replace(x, slots=slots).to("cupy", "cuda")
    pool[device.slots] = device.state[:3]
    o, _ = update(device, layout, pool=pool)
    want_o, want = expected(replace(x, state=x.state[:3], slots=np.arange(3)), layout)
    assert_close(o, want_o, rtol=RTOL["bfloat16"], name="o")
    assert_close(pool[device.slots], want, rtol=RTOL["bfloat16"], name="pool")
    pool[device.slots] = 0
    assert not pool.view(np.uint16).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_that_lie_touch_nothing_outside(layout: str, cupy: Any) -> None:
    x = make_inputs(lengths=[2, 2, 2], H=1, HV=1, K=64, V=64, layout=layout).to("cupy", "cuda")
    base = cupy.full((3, *x.v.shape[1:]), 7.0, x.v.dtype)
    out = base[1:2]
    update(replace(x, cu_seqlens=cupy.asarray([-5, 4, 3, 1 << 40])), layout, out=out)
    assert (base[0] == 7).all()
    assert (base[2] == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout: str) -> None:
    torch = pytest.importorskip("torch")
    x = make_inputs(B=3, T=2, H=2, HV=4, K=128, V=128, dtype="bfloat16", layout=layout)
    want = update(x.to("cupy", "cuda"), layout)
    y = x.to("torch", "cuda")
    o, pool = update(y, layout, pool=y.state.clone())
    assert o.dtype == torch.bfloat16
    same_bits(o, want[0])
    same_bits(pool, want[1])

    stream = torch.cuda.Stream()
    pool, out = y.state.clone(), torch.empty_like(y.v)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        update(y, layout, pool=pool, out=out)
    same_bits(pool, x.state)
    graph.replay()
    torch.cuda.synchronize()
    same_bits(out, want[0])
    same_bits(pool, want[1])


def test_cupy_streams_and_graphs(cupy: Any) -> None:
    x = make_inputs(B=3, T=2, H=2, HV=4, K=128, V=128).to("cupy", "cuda")
    want = update(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    pool, out = x.state.copy(), cupy.empty_like(x.v)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        update(x, pool=pool, out=out)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    same_bits(out, want[0])
    same_bits(pool, want[1])


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this JAX has no GPU")
    x = make_inputs(B=2, T=3, H=2, HV=4, K=64, V=64, dtype="float16")
    y = x.to("jax", "cuda")
    o, h = gdr.fused_recurrent_gated_delta_rule(y.q, y.k, y.v, y.g, y.beta, output_final_state=True)
    assert type(o).__module__.startswith("jax")
    want = gdr.reference.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, output_final_state=True)
    assert_close(o, want[0], rtol=RTOL["float16"])
    assert_close(h, want[1], rtol=RTOL["float32"])


def test_no_kernel_of_the_usual_head_size_spills() -> None:
    for layout in LAYOUTS:
        for state_dtype in DTYPES:
            for T in (1, 2):
                for B in (1, 16, 64):
                    x = make_inputs(B=B, T=T, H=2, HV=4, K=128, V=128, state_dtype=state_dtype, layout=layout)
                    update(x.to("cupy", "cuda"), layout)
    kernels = [
        kernel
        for kernel in loader._kernels.values()
        if kernel.stem.startswith("fused_recurrent") and kernel.defines["GDR_K"] == 128
    ]
    aligned = [k for k in kernels if k.defines["GDR_ALIGNED_STATES"] and k.defines["GDR_ALIGNED_TOKENS"]]
    assert len(aligned) >= 12
    assert [kernel for kernel in aligned if kernel.local_bytes] == []
