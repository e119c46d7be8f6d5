from __future__ import annotations

import re

import pytest
from fake_cupy import FakeCupy

import gdr
from gdr import _cuda_loader as loader
from gdr import _warmup


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    cupy = FakeCupy()
    monkeypatch.setattr(loader, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(loader, "_kernels", {})
    loader.describe_gpu.cache_clear()
    yield cupy
    loader.describe_gpu.cache_clear()


def test_on_numpy_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDR_CPU", "numpy")
    assert gdr.warmup(device="cpu") == []


def test_numba_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gdr._numba_fused_recurrent")
    monkeypatch.setenv("GDR_CPU", "numba")
    done = gdr.warmup(device="cpu")
    assert done
    assert all("numba" in line for line in done)


def test_every_kernel_is_compiled_once(fake: FakeCupy) -> None:
    done = gdr.warmup(device="cuda", max_batch=64)
    assert len(done) == len(set(done)) == len(fake.compiled)
    assert any("fused_recurrent_kv" in line and "GDR_ONE_TOKEN=1" in line for line in done)
    assert any(line.startswith("<Kernel gate") for line in done)
    assert gdr.warmup(device="cuda", max_batch=64) == done
    assert len(done) == len(fake.compiled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_of_float32_have_kernels_of_their_own(fake: FakeCupy, dtype: str) -> None:
    done = gdr.warmup(device="cuda", max_batch=1, dtype=dtype)
    chunks = set(re.findall(r"<Kernel (chunk\w+)", " ".join(done)))
    assert chunks
    assert all(stem.endswith("_f32") for stem in chunks) == (dtype == "float32")


def test_packed_prompts_have_their_kernels_compiled(fake: FakeCupy) -> None:
    gdr.warmup(device="cuda", max_batch=16)
    card = loader.describe_gpu(0)
    compiled = {(kernel.stem, *sorted(kernel.defines.items())) for kernel in loader._kernels.values()}
    assert any(stem == "chunk_fused_sm90" for stem, *_ in compiled)
    for T, N in ((4096, 4), (4096, 16), (3000, 3), (900, 7)):
        spec = _warmup.make_spec("chunk", B=1, T=T, sequences=N, H=16, HV=32, K=128, V=128)
        wanted = {key for key, _ in _warmup.specializations([spec], card)}
        assert wanted <= compiled


def test_kernels_that_the_gpu_is_too_old_for_are_left_out(fake: FakeCupy) -> None:
    fake.capability = "75"
    done = gdr.warmup(device="cuda", max_batch=1)
    assert done
    assert not any(line.startswith("<Kernel chunk") for line in done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda", "dtype": "float64"}, "dtype"),
        ({"device": "cuda", "state_dtype": "int8"}, "state_dtype"),
        ({"K": 257}, "K"),
        ({"H": 3, "HV": 4}, "HV"),
        ({"layout": "kvk"}, "layout"),
        ({"max_batch": 0}, "max_batch"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        gdr.warmup(**arguments)


def test_a_made_spec_is_what_a_call_describes() -> None:
    """`make_spec` says what `gdr._spec.describe` says of such arrays, but for the device."""
    from gdr._spec import OPERANDS, RAW_GATES, TOKENS, Form, describe

    x = gdr.testing.make_inputs(B=3, T=2, H=2, HV=4, K=8, V=6, layout="vk", num_slots=3)
    pool, slots = x.state, x.slots
    operands = {"q": x.q, "k": x.k, "v": x.v, "A_log": x.A_log, "dt_bias": x.dt_bias, "a": x.a, "b": x.b}
    operands |= {"initial_state": pool, "initial_slots": slots, "final_state": pool, "final_slots": slots}
    form = Form("fused_recurrent", (*TOKENS, *RAW_GATES))
    want = describe(form, tuple(map(operands.get, OPERANDS)), True, "vk", False)
    got = _warmup.make_spec("fused_recurrent", B=3, T=2, H=2, HV=4, K=8, V=6, dtype="float32", layout="vk")
    for name in ("op", "compute", "B", "T", "N", "H", "HV", "K", "V", "gates", "l2norm", "varlen", "layout"):
        assert getattr(got, name) == getattr(want, name)
    for name in ("dtypes", "shapes", "strides"):
        assert getattr(got, name) == getattr(want, name)


@pytest.mark.gpu
def test_calls_after_a_warmup_compile_nothing() -> None:
    import cupy

    gdr.warmup(device="cuda", H=2, HV=4, K=64, V=64, layout="vk", max_batch=64)
    loaded = dict(loader._kernels)
    for B, T, lengths in ((1, 1, None), (5, 1, None), (64, 1, None), (3, 4, None), (1, 1, [3, 0, 9, 20])):
        x = gdr.testing.make_inputs(
            B, T, 2, 4, 64, 64, lengths=lengths, dtype="bfloat16", layout="vk", xp="cupy", device="cuda"
        )
        gdr.fused_sigmoid_gating_delta_rule_update(
            *(x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, x.slots),
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=x.cu_seqlens,
            state_layout="vk",
        )
    cupy.cuda.Device().synchronize()
    assert set(loader._kernels) == set(loaded)
