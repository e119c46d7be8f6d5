"""The CUDA kernels on an emulated GPU against the reference: they compute the right thing, whatever the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from emulated import COMPILER, Kernel, build, gpu, on_device, to_device
from places import assert_same_bits, given
from test_cuda_ring import Pool as RingPool

import gdr
from gdr import _backends, _inputs, reference
from gdr import _cuda_chunk as cuda_chunk
from gdr import _cuda_chunk_f32 as cuda_chunk_f32
from gdr import _cuda_loader as loader
from gdr import _cuda_ring as cuda_ring
from gdr import _cuda_tiles as cuda_tiles
from gdr._spec import OPERANDS, RAW_GATES, TOKENS, Form
from gdr._warmup import make_spec
from gdr.testing import Inputs, assert_close, make_inputs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no g++")]

RTOL_O = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 2.5e-3}
RTOL_F32 = 4e-6  # of the chunkwise form in float32, outputs and states


class Ring(RingPool):
    put = staticmethod(lambda x: on_device(np.ascontiguousarray(x)))


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    directory = root / "emulated"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(params=[80, 90])
def capability(request: Any, monkeypatch: pytest.MonkeyPatch, directory: Path) -> Iterator[int]:
    with gpu(monkeypatch, directory, request.param):
        yield request.param


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Iterator[None]:
    with gpu(monkeypatch, directory):
        yield


def poisoned(x: np.ndarray) -> Any:
    return on_device(np.full(x.shape, np.nan, x.dtype))


def host(x: Any) -> np.ndarray:
    return x.view(np.ndarray)


def assert_rule(function: str, x: Inputs, rtol_h: float, rtol_o: float | None = None, **options: Any) -> None:
    there = to_device(x)
    with mock.patch.dict(_backends.CHUNK_FROM, cuda=0):  # however short sequences are
        o, h = getattr(gdr, function)(
            *given(there), initial_state=there.initial_state, cu_seqlens=there.cu_seqlens, output_final_state=True,
            out=poisoned(x.v), **options,
        )  # fmt: skip
    options.pop("wide_range", None)
    want_o, want_h = getattr(reference, function)(
        *given(x), initial_state=x.initial_state, cu_seqlens=x.cu_seqlens, output_final_state=True, **options
    )
    assert_close(host(o), want_o, rtol=rtol_o or RTOL_O[x.v.dtype.name], name="o")
    assert_close(host(h), want_h, rtol=rtol_h, name="h")


def assert_chunk(x: Inputs, **options: Any) -> None:
    rtol_h, rtol_o = (RTOL_F32, RTOL_F32) if x.v.dtype == np.float32 else (1e-3, None)
    assert_rule("chunk_gated_delta_rule", x, rtol_h, rtol_o, **options)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunk(capability: int, layout: str, dtype: str) -> None:
    x = make_inputs(lengths=[70, 0, 1, 130], H=1, HV=2, K=96, V=64, dtype=dtype, layout=layout)
    assert_chunk(x, state_layout=layout, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("T", [3, 70])  # token by token, and by chunks
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_calls_like_one_that_ran(device: None, dtype: str, T: int) -> None:
    """They go from their operands to the launch, and are as right as the first."""
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    workspace = on_device(np.empty(1 << 20, np.uint8))
    workspace = workspace[-workspace.ctypes.data % 128 :]
    for seed in range(4):
        x = make_inputs(B=1, T=T, H=1, HV=2, K=32, V=16, dtype=dtype, seed=seed)
        there = to_device(x)
        lent = {"workspace": workspace} if seed == 3 else {}
        got = gdr.chunk_gated_delta_rule(*given(there), initial_state=there.initial_state, **options, **lent)
        want = reference.chunk_gated_delta_rule(*given(x), initial_state=x.initial_state, **options)
        for name, y, z, rtol in zip("oh", got, want, (RTOL_O[dtype], 1e-3)):
            assert y.dtype == (x.v.dtype if name == "o" else np.float32)
            assert_close(host(y), z, rtol=rtol, name=name)
    assert ["launch" in checked.spec.plan for checked in _inputs._specs.values()] == [True]
    memory = on_device(np.zeros(there.v.nbytes + 1, np.uint8))
    there.v = memory[1:].view(there.v.dtype).reshape(there.v.shape)
    with pytest.raises(ValueError, match=r"^v: expected elements at multiples of"):
        gdr.chunk_gated_delta_rule(*given(there), initial_state=there.initial_state, **options)


def at_odd_addresses(dtype: str, V: int) -> Inputs:
    x = make_inputs(B=1, T=80, H=1, HV=1, K=100, V=V, dtype=dtype)
    for name in ("q", "k", "v"):
        inner = getattr(x, name)
        base = np.full((*inner.shape[:3], inner.shape[3] + 3), np.nan, inner.dtype)
        base[..., 1:-2] = inner
        setattr(x, name, base[..., 1:-2])
    return x


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_chunk_at_odd_addresses(capability: int, dtype: str) -> None:
    assert_chunk(at_odd_addresses(dtype, 64))


@pytest.mark.parametrize("tile", [(16, 2, 2), (16, 4, 3), (32, 2, 3), (32, 4, 2), (64, 2, 2)])
def test_tiles_of_float32(device: None, tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_chunk_f32, "pick_tile", lambda *_: cuda_chunk_f32.Tile(*tile))
    assert_chunk(make_inputs(B=2, T=70, H=1, HV=1, K=128, V=64, dtype="float32"))


def test_float32_in_parts(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five value heads of a key head; three chunks at a time, which ends within sequences and between them."""
    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", 100_000)
    x = make_inputs(lengths=[130, 0, 10, 96], H=1, HV=5, K=32, V=16, dtype="float32", gates="slow")
    assert_chunk(x)


@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("gates", ["slow", "none"])
def test_float32_keeps_its_digits(device: None, gates: str, keys: str) -> None:
    assert_chunk(make_inputs(B=1, T=1500, H=1, HV=1, K=64, V=16, dtype="float32", gates=gates, keys=keys))


@pytest.mark.parametrize("decay", [0.0, -1e-6, -80.0, -1e4, -np.inf])
def test_extreme_decays_of_float32(device: None, decay: float) -> None:
    x = make_inputs(B=1, T=100, H=1, HV=1, K=64, V=16, dtype="float32")
    x.g[:, 30::37] = decay
    with np.errstate(invalid="ignore"):
        assert_chunk(x)


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_magnitudes_of_float32(device: None, scale: float) -> None:
    x = make_inputs(B=1, T=100, H=1, HV=1, K=64, V=16, dtype="float32")
    x.v *= np.float32(scale)
    x.state *= np.float32(scale)
    assert_chunk(x)


def assert_wide_range(V: int) -> None:
    x = make_inputs(B=1, T=80, H=1, HV=1, K=64, V=V, dtype="bfloat16")
    x.v = (x.v.astype(np.float32) * 1e6).astype(x.v.dtype)
    x.state *= 1e6
    assert_rule("chunk_gated_delta_rule", x, 5e-3, rtol_o=6e-3, wide_range=True)


def test_wide_range(capability: int) -> None:
    assert_wide_range(64)


def test_workspace(device: None) -> None:
    x = to_device(make_inputs(B=1, T=80, H=1, HV=1, K=64, V=64, dtype="bfloat16"))
    chunk = gdr.chunk_gated_delta_rule
    (line,) = re.findall(r"scratch: (\d+) bytes", gdr.explain(chunk, *given(x)))
    memory = np.zeros(int(line) + 128, np.uint8)
    workspace = on_device(memory[-memory.ctypes.data % 128 :][: int(line)])
    o, _ = chunk(*given(x), workspace=workspace)
    assert memory.any()
    assert_same_bits(host(o), host(chunk(*given(x))[0]))
    for wrong, message in (
        (workspace[:-128], f"workspace: expected at least {line} bytes, got {int(line) - 128}"),
        (workspace.view(np.int8), "workspace: expected a dense uint8 array of one axis, got int8"),
        (host(workspace), "workspace: expected an array on CUDA device 0, got one on cpu"),
        (128, "workspace: expected an array of uint8, got int"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            chunk(*given(x), workspace=wrong)


def test_explain_knows_the_flags_of_a_call(device: None) -> None:
    x = to_device(make_inputs(B=1, T=64 * 200, H=1, HV=1, K=128, V=128, dtype="bfloat16"))
    text = gdr.explain(gdr.chunk_gated_delta_rule, *given(x))
    assert "form: chunkwise, 64 tokens a chunk" in text
    assert "kernel: chunk_combine" in text
    assert "WIDE=0" in text
    text = gdr.explain(gdr.chunk_gated_delta_rule, *given(x), batch_invariant=True, wide_range=True)
    assert "kernel: chunk_state" in text
    assert "chunk_combine" not in text
    assert "WIDE=1" in text
    assert "WIDE=0" not in text


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "chunkwise, 32 tokens a chunk"),
        ({"T": 29}, "recurrent, token by token: sequences of fewer than 30 tokens are done sooner so"),
        ({"B": 200, "T": 59}, "recurrent, token by token: sequences of fewer than 60 tokens are done sooner so"),
        (
            {"T": 19, "dtype": "bfloat16"},
            "recurrent, token by token: sequences of fewer than 20 tokens are done sooner so",
        ),
        ({"V": 20}, "recurrent, token by token: chunks need V to be a multiple of 16, and it is 20"),
        ({"B": 0}, "recurrent, token by token: there are no states"),
    ],
)
def test_explain_says_why_no_chunks(device: None, changes: dict[str, Any], form: str) -> None:
    shape = {"B": 2, "T": 48, "H": 1, "HV": 1, "K": 32, "V": 32, "dtype": "float32"}
    x = to_device(make_inputs(**(shape | changes)))
    text = gdr.explain(gdr.chunk_gated_delta_rule, *given(x))
    assert f"form: {form}\n" in text
    assert ("kernel: fused_recurrent_kv" in text) == form.startswith("recurrent")
    assert ("kernel: chunk_prepare_f32" in text) == form.startswith("chunkwise")


@pytest.mark.parametrize(
    ("K", "card", "reason"),
    [
        (32, (75, 64 << 10), "chunks need compute capability 8.0, and this GPU has 7.5"),
        (256, (89, 99 << 10), "chunks of K=256 need more shared memory than a block of this GPU has"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_chunks_that_a_gpu_has_no_room_for(dtype: str, K: int, card: tuple[int, int], reason: str) -> None:
    spec = make_spec("chunk", B=1, T=100, H=1, HV=1, K=K, V=32, dtype=dtype)
    assert cuda_chunk.choose(spec, loader.Gpu(card[0], 60, card[1]), False) == reason


@pytest.mark.parametrize(
    ("tokens", "sequences", "HV", "chunks"),
    [
        (256, 256, 32, False),  # one each
        (512, 64, 32, False),
        (128, 16, 32, False),
        (4352, 257, 32, True),  # a prompt may be among them
        (107, 8, 32, True),
        (543, 32, 8, True),
        (19, 1, 32, False),
        (20, 1, 32, True),
    ],
)
def test_a_long_sequence_may_be_among_packed_ones(tokens: int, sequences: int, HV: int, chunks: bool) -> None:
    card = loader.Gpu(90, 132, 227 << 10, early=True)
    spec = make_spec("chunk", B=1, T=tokens, sequences=sequences, H=HV // 2, HV=HV, K=128, V=128)
    assert isinstance(cuda_chunk.choose(spec, card, False), cuda_chunk.Cut) == chunks
    assert isinstance(cuda_chunk.choose(spec, card, True), cuda_chunk.Cut)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_batches_do_not_show_in_splits(capability: int) -> None:
    """Whatever the batch, and by chunks wherever they run without `batch_invariant`."""
    shared = {80: 163, 90: 227, 100: 227}.get(capability, 99) << 10
    card = loader.Gpu(capability, 100, shared)
    for K, V in product((32, 64, 96, 128, 256), (32, 64, 128, 256)):
        splits = set()
        for N in (1, 8, 100):
            spec = make_spec("chunk", B=N, T=200, H=4, HV=8, K=K, V=V)
            cut = cuda_chunk.choose(spec, card, True)
            assert isinstance(cut, str) == isinstance(cuda_chunk.choose(spec, card, False), str)
            if isinstance(cut, cuda_chunk.Cut):
                splits.add((cut.tile.split, cut.segment, cut.fused))
        assert len(splits) <= 1


def test_explain_says_why_these_kernels() -> None:
    card = loader.Gpu(90, 132, 227 << 10, early=True)
    for heads, batch, reason in (
        ((16, 32), {"B": 4, "T": 2048}, "one kernel, whose 128 blocks use the 132 processors well"),
        ((16, 32), {"B": 1, "T": 8192}, "54 blocks prepare chunks beside the 64 that walk, on 132 processors"),
        ((2, 8), {"B": 1, "T": 8192}, "in segments of 16 chunks, as 16 blocks for whole sequences leave most of 132"),
    ):
        spec = make_spec("chunk", H=heads[0], HV=heads[1], K=128, V=128, **batch)
        cut = cuda_chunk.choose(spec, card, False)
        assert isinstance(cut, cuda_chunk.Cut)
        assert cuda_chunk.why(spec, cut, card).startswith(reason)
    fixed = cuda_chunk.choose(spec, card, True)
    assert isinstance(fixed, cuda_chunk.Cut)
    assert cuda_chunk.why(spec, fixed, card) == (
        "a kernel that prepares all chunks, then 16 blocks that walk, on 132 processors"
    )


def test_explain_names_the_kernels_of_a_ring(device: None) -> None:
    pool = Ring(3, 1, 2, 64, 64, dtype="float32", capacity=5)

    def call(T: int, **fields: Any) -> None:
        there = {name: pool.put(x) for name, x in pool.tokens(1, T).items()} | pool.gates
        slots = pool.put(np.zeros(1, np.int32))
        states = {"initial_state": pool.pool, "initial_slots": slots, "final_state": pool.pool, "final_slots": slots}
        form = Form("fused_recurrent", (*TOKENS, *RAW_GATES))
        call = _inputs.prepare(form, tuple(map((there | states).get, OPERANDS)), l2norm=True, layout="vk")
        for name, value in fields.items():
            setattr(call, name, value)
        _backends.run(call)

    step, drafts, prompt = (
        gdr.explain(call, T, **fields)
        for T, fields in ((1, {"ring": pool.ring}), (4, {"ring": pool.ring, "draft": True}), (9, {"folds": pool.ring}))
    )
    assert re.findall(r"kernel: (\w+)", step) == ["ring_step"]
    assert "form: one token; a state is written after 5\n" in step
    assert re.findall(r"kernel: (\w+)", drafts) == ["ring_verify"]
    assert re.findall(r"kernel: (\w+)", prompt) == ["ring_fold", "fused_recurrent_vk"]


@pytest.mark.parametrize(("columns", "map_columns", "K"), [(64, 64, 64), (64, 128, 128), (128, 128, 128)])
def test_segments(columns: int, map_columns: int, K: int, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cuda_chunk.Cut(cuda_chunk.Tile(columns, 1, 3, True), 1, map_columns)
    monkeypatch.setattr(cuda_chunk, "pick_cut", lambda *_: cut)
    x = make_inputs(lengths=[64 * 4 + 5, 0, 130], H=1, HV=1, K=K, V=128, dtype="float16", gates="slow")
    assert_rule("chunk_gated_delta_rule", x, 1e-3)
    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", 1 << 19)  # states are carried from part to part
    _inputs.forget()
    assert_rule("chunk_gated_delta_rule", x, 1e-3)


def run_chunk(there: Inputs, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    with mock.patch.dict(_backends.CHUNK_FROM, cuda=0):
        o, h = gdr.chunk_gated_delta_rule(
            *given(there), initial_state=there.initial_state, cu_seqlens=there.cu_seqlens, output_final_state=True,
            out=poisoned(there.v), **options,
        )  # fmt: skip
    return host(o), host(h)


# One sequence and some at once, empty ones among them, fewer chunks than groups and more, value heads of one part and
# of two.
@pytest.mark.parametrize("workspace", [512 << 20, 300_000])
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": [64 * 9 + 5], "HV": 2},
        {"lengths": [70, 0, 64 * 7, 1, 64 * 7, 130], "HV": 2},
        {"B": 3, "T": 150, "HV": 10},
    ],
)
def test_beside(shape: dict[str, Any], workspace: int, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", workspace)
    x = make_inputs(**({"H": 2, "K": 64, "V": 128, "dtype": "bfloat16", "gates": "slow"} | shape))
    seen = []
    for beside in (0, 1, 2):
        cut = cuda_chunk.Cut(cuda_chunk.Tile(64, 1, 3, True), beside=beside)
        monkeypatch.setattr(cuda_chunk, "pick_cut", lambda *_, cut=cut: cut)
        _inputs.forget()
        seen.append(run_chunk(to_device(x)))
    for got in seen[1:]:
        assert_same_bits(got[0], seen[0][0])
        assert_same_bits(got[1], seen[0][1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "K"), [("kv", 128), ("vk", 128), ("vk", 96), ("vk", 126)])
def test_states_at_any_addresses(
    layout: str, K: int, state_dtype: str, fused: bool, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neighbours of a state cannot be read at once, and where they can, the bits are the same."""
    cut = cuda_chunk.Cut(cuda_chunk.Tile(64, 1, 3, True), fused=fused)
    monkeypatch.setattr(cuda_chunk, "pick_cut", lambda *_: cut)
    monkeypatch.setitem(_backends.CHUNK_FROM, "cuda", 0)
    x = make_inputs(
        lengths=[70, 0, 5], H=1, HV=2, K=K, V=64, dtype="bfloat16", state_dtype=state_dtype, layout=layout, gates="slow"
    )
    there = to_device(x)
    seen = []
    for offset in (0, 8):
        memory = np.full(x.state.nbytes + 256, 0xFF, np.uint8)
        memory = memory[-memory.ctypes.data % 128 + offset :][: x.state.nbytes]
        pool = memory.view(x.state.dtype).reshape(x.state.shape)
        pool[...] = x.state
        operands = {name: getattr(there, name) for name in (*TOKENS, *RAW_GATES, "cu_seqlens")}
        operands |= {"out": poisoned(x.v)} | dict.fromkeys(("initial_state", "final_state"), on_device(pool))
        operands |= dict.fromkeys(("initial_slots", "final_slots"), there.slots)
        form = Form("chunk", (*TOKENS, *RAW_GATES))
        call = _inputs.prepare(form, tuple(map(operands.get, OPERANDS)), l2norm=True, layout=layout)
        cuda_chunk.run(call)
        assert not np.isnan(pool.astype(np.float32)).any()
        seen.append((host(call.out), pool))
    for got, want in zip(*seen):
        assert_same_bits(got, want)
    assert (seen[0][1] != x.state).any()


@pytest.fixture(params=[64, 128])
def fused(request: Any, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls run as one kernel, on blocks of 64 or 128 value columns."""
    cut = cuda_chunk.Cut(cuda_chunk.Tile(request.param, 1, 3, True), fused=True)
    monkeypatch.setattr(cuda_chunk, "pick_cut", lambda *_: cut)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("K", [32, 128])
def test_fused(fused: None, layout: str, K: int) -> None:
    lengths = [70, 0, 1, 64 * 5 + 63, 64]
    x = make_inputs(lengths=lengths, H=1, HV=2, K=K, V=128, dtype="bfloat16", layout=layout, gates="slow")
    assert_rule("chunk_gated_delta_rule", x, 1e-3, state_layout=layout, use_qk_l2norm_in_kernel=True)


def test_fused_with_many_sequences(fused: None) -> None:
    """More than one warp puts in order; some of the same length."""
    lengths = [0, *range(1, 30), 66, 130, 1, 0, 66]
    assert_chunk(make_inputs(lengths=lengths, H=1, HV=1, K=32, V=128, dtype="bfloat16"))


def test_fused_keeps_sequences_apart(fused: None) -> None:
    """What lies in memory behind a sequence does not show in it, not even where zeros would not hide it."""
    x = make_inputs(lengths=[70, 65], H=1, HV=2, K=32, V=128, dtype="bfloat16")
    o, h = run_chunk(to_device(x))
    for operand in (x.q, x.k, x.v, x.g, x.beta):
        operand[:, 70:] = np.nan
    other_o, other_h = run_chunk(to_device(x))
    assert_same_bits(other_o[:, :70], o[:, :70])
    assert_same_bits(other_h[0], h[0])
    assert np.isnan(other_h[1].astype(np.float32)).any()


@pytest.mark.parametrize(("H", "V"), [(1, 128), (3, 128), (1, 256)])
def test_fused_with_a_key_head_for_each_value_head(fused: None, H: int, V: int) -> None:
    """No two blocks of all columns share K and Q, but two of half of them do, and what follows from these."""
    assert_chunk(make_inputs(lengths=[130, 64 * 6], H=H, HV=H, K=128, V=V, dtype="bfloat16", gates="slow"))


def test_fused_where_the_copy_engine_finds_no_tiles(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(B=2, T=330, H=2, HV=4, K=64, V=128, dtype="bfloat16", gates="slow")
    x.k = np.broadcast_to(x.k[:, :, :1], x.k.shape)
    assert_chunk(x)
    monkeypatch.setattr(cuda_tiles, "available", lambda: False)
    x = make_inputs(B=2, T=330, H=2, HV=4, K=64, V=128, dtype="bfloat16", gates="slow")
    assert_chunk(x)


def test_fused_at_odd_addresses(fused: None) -> None:
    assert_chunk(at_odd_addresses("float16", 128))


def test_fused_with_a_wide_range(fused: None) -> None:
    assert_wide_range(128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_on_a_pool(fused: None, dtype: str) -> None:
    """Raw gates, five chunks at most, slots outside the pool."""
    x = make_inputs(lengths=[70, 0, 290, 5, 64], H=1, HV=2, K=64, V=128, dtype=dtype, state_dtype="bfloat16")
    slots = x.slots.copy()
    slots[3], slots[4] = -1, len(x.state)
    there = to_device(x)
    names = (*TOKENS, *RAW_GATES, "cu_seqlens")
    operands = {name: getattr(there, name) for name in names} | {"out": poisoned(x.v)}
    operands |= dict.fromkeys(("initial_state", "final_state"), there.state)
    operands |= dict.fromkeys(("initial_slots", "final_slots"), on_device(slots))
    call = _inputs.prepare(Form("chunk", (*TOKENS, *RAW_GATES)), tuple(map(operands.get, OPERANDS)), l2norm=True)
    cuda_chunk.run(call)
    slots[4] = -1
    want_o, want_state = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, slots,
        use_qk_l2norm_in_kernel=True, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    assert_close(host(call.out), want_o, rtol=RTOL_O[dtype], name="o")
    assert not host(call.out)[0, 360:].astype(np.float32).any()
    assert_close(host(there.state), want_state, rtol=3e-3, name="pool")  # as far as bfloat16 goes


def test_batches_that_fill_a_gpu_take_one_kernel() -> None:
    card = loader.Gpu(90, 132, 227 << 10)
    heads = {"H": 16, "HV": 32, "K": 128, "V": 128}
    for batch, stems in (
        ({"B": 4, "T": 2048}, ["chunk_fused_sm90"]),
        ({"B": 1, "T": 8192}, ["chunk_prepare", "chunk_state_sm90"]),
        ({"B": 4, "T": 2048, "pad": 1 << 20}, ["chunk_prepare", "chunk_state_sm90"]),
    ):
        spec = make_spec("chunk", **heads, **batch)
        assert [stem for stem, _ in cuda_chunk.specializations(spec, card)] == stems
        fixed = cuda_chunk.specializations(spec, card, batch_invariant=True)
        assert [stem for stem, _ in fixed] == ["chunk_prepare", "chunk_state_sm90"]


@pytest.mark.parametrize(("tokens", "segments"), [(2048, 5), (8192, 8), (32768, 8)])
def test_segments_of_a_long_sequence_fill_a_gpu_once(tokens: int, segments: int) -> None:
    card = loader.Gpu(90, 132, 227 << 10, early=True)
    spec = make_spec("chunk", B=1, T=tokens, H=2, HV=8, K=128, V=128)
    cut = cuda_chunk.choose(spec, card, False)
    assert isinstance(cut, cuda_chunk.Cut)
    assert (cut.tile.columns, cut.map_columns, -(-tokens // 64 // cut.segment)) == (64, 128, segments)


def test_long_sequences_are_prepared_beside_the_walk() -> None:
    card = loader.Gpu(90, 132, 227 << 10, early=True)
    shape = {"B": 1, "T": 8192, "H": 16, "HV": 32, "K": 128, "V": 128}
    for changes, gpu_, beside in (
        ({}, card, 54),
        ({}, card._replace(early=False), 0),
        ({"H": 2, "HV": 8}, card, 0),
        ({"H": 8, "HV": 16, "B": 2}, card, 54),
        ({"H": 1, "HV": 1, "sequences": 40}, card, 0),
    ):
        spec = make_spec("chunk", **{**shape, **changes})
        cut = cuda_chunk.choose(spec, gpu_, False)
        assert isinstance(cut, cuda_chunk.Cut)
        assert cut.beside == beside
        kernels = cuda_chunk.specializations(spec, gpu_)
        assert {bool(defines.get("GDR_BESIDE")) for _, defines in kernels} == {beside > 0}


@pytest.mark.parametrize(("H", "HV"), [(2, 8), (8, 16), (16, 16)])
@pytest.mark.parametrize("tokens", [1 << 17, 1 << 20])
def test_several_segments_fit_the_workspace(tokens: int, H: int, HV: int) -> None:
    card = loader.Gpu(90, 132, 227 << 10)
    cut = cuda_chunk.choose(make_spec("chunk", B=1, T=tokens, H=H, HV=HV, K=128, V=128), card, False)
    assert isinstance(cut, cuda_chunk.Cut)
    tiles = H * 2 * 64 * 128 * 2 + HV * (2 * 10 * 512 + 3 * 64 * 4)
    assert 2 * cut.segment * tiles < (512 << 20) + 2 * tiles


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(("dtype", "K", "V"), [("bfloat16", 128, 128), ("float32", 60, 100)])
def test_recurrence(device: None, layout: str, dtype: str, K: int, V: int) -> None:
    x = make_inputs(lengths=[1, 0, 13, 3], H=2, HV=4, K=K, V=V, dtype=dtype, layout=layout)
    assert_rule("fused_recurrent_gated_delta_rule", x, 1e-6, state_layout=layout, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_one_token_of_a_pool(device: None, layout: str, state_dtype: str) -> None:
    x = make_inputs(
        B=5, T=1, H=1, HV=2, K=128, V=64, dtype="bfloat16", state_dtype=state_dtype, layout=layout, num_slots=9
    )
    slots = x.slots.copy()
    slots[1], slots[3] = -1, 9  # padding: below the pool and past it
    there = to_device(x)
    o = gdr.fused_sigmoid_gating_delta_rule_update(
        there.A_log, there.a, there.dt_bias, 1.0, 20.0, there.q, there.k, there.v, there.b, there.state,
        on_device(slots), use_qk_l2norm_in_kernel=True, state_layout=layout, out=poisoned(x.v),
    )  # fmt: skip
    live = [0, 2, 4]
    want_o, want_state = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, np.where(slots == 9, -1, slots),
        use_qk_l2norm_in_kernel=True, state_layout=layout,
    )  # fmt: skip
    assert_close(host(o)[live], want_o[live], rtol=RTOL_O["bfloat16"], name="o")
    assert not host(o)[[1, 3]].astype(np.float32).any()
    got = host(there.state)
    assert_close(got, want_state, rtol=1e-6 if state_dtype == "float32" else 3e-3, name="pool")
    others = [n for n in range(9) if n not in slots[live]]
    assert_same_bits(got[others], x.state[others])


def test_calls_that_were_seen_before(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"B": 3, "T": 1, "H": 1, "HV": 2, "K": 64, "V": 64, "num_slots": 5, "layout": "vk"}
    problems = [make_inputs(**shape, dtype="bfloat16", seed=seed) for seed in (0, 1)]

    def update(there: Inputs, out: Any = None) -> Any:
        return gdr.fused_sigmoid_gating_delta_rule_update(
            there.A_log, there.a, there.dt_bias, 1.0, 20.0, there.q, there.k, there.v, there.b, there.state,
            there.slots, state_layout="vk", out=out,
        )  # fmt: skip

    want = []
    for x in problems:
        _inputs.forget()
        there = to_device(x)
        want.append((host(update(there)), host(there.state)))
    update(to_device(x), poisoned(x.v))
    with monkeypatch.context() as patch:
        patch.setattr(_inputs, "describe_call", None)  # they go from their operands to the launch
        for x, (want_o, want_state) in zip(problems, want):
            for out in (None, poisoned(x.v)):
                there = to_device(x)
                o = update(there, out)
                assert out is None or o is out
                assert_same_bits(host(o), want_o)
                assert_same_bits(host(there.state), want_state)
    assert "recurrent" in gdr.explain(update, there)
    assert_same_bits(host(there.state), want_state)
    memory = np.zeros(x.v.nbytes + 1, np.uint8)
    there.v = on_device(memory[1:].view(x.v.dtype).reshape(x.v.shape))
    with pytest.raises(ValueError, match=r"^v: expected elements at multiples of 2 bytes"):
        update(there)


def test_gate(device: None) -> None:
    x = make_inputs(B=2, T=7, H=1, HV=3, K=8, V=8, dtype="bfloat16")
    there = to_device(x)
    got = gdr.gated_delta_rule_gate(there.A_log, there.a, there.dt_bias, there.b)
    want = reference.gated_delta_rule_gate(x.A_log, x.a, x.dt_bias, x.b)
    for name, y, expected in zip(("g", "beta"), got, want):
        assert_close(host(y), expected, rtol=1e-6, name=name)


# Kernels in float32 arithmetic and on tensor cores, of states of both widths and both layouts, with the tiles of a GPU
# that the batch leaves idle and of one that it fills.
@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize(
    ("layout", "dtype", "state_dtype"),
    [
        ("vk", "bfloat16", "float32"),
        ("vk", "bfloat16", "bfloat16"),
        ("vk", "float16", "float16"),
        ("vk", "float32", "bfloat16"),
        ("kv", "bfloat16", "float32"),
        ("kv", "float32", "float16"),
    ],
)
def test_rings(
    multiprocessors: int,
    layout: str,
    dtype: str,
    state_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
) -> None:
    with gpu(monkeypatch, directory, multiprocessors=multiprocessors):
        pool = Ring(3, 1, 2, 64, 80, layout=layout, dtype=dtype, state_dtype=state_dtype, capacity=5, stagger=True)
        for slots in ([0, 1, 2], [2, -1, 0], [2, 3], [0, 1, 2], [2], [1, 0], [2, 0]):
            pool.run(slots)
        pool.check()
        for T, accepted in ((3, [1, 3, 0]), (8, [8, 5, 1]), (16, [0, 9, 16]), (5, [5, 2, 4])):
            slots = pool.rng.permutation(3)
            parents = np.array([[int(pool.rng.integers(-1, t)) if t else -1 for t in range(T)] for _ in slots])
            pool.run(slots, T, parents if T % 2 else None, draft=True)
            pool.check()
            pool.commit(slots, accepted)
            pool.check()
            pool.run(slots[:2])
        cuda_ring.fold(pool.ring, pool.put(np.array([1, 3])))
        pool.check()
        cuda_ring.fold(pool.ring)
        pool.check()


def run_ring(state_dtype: str, dtype: str = "bfloat16") -> list[bytes]:
    """Steps and drafts of two sequences: the bits of all outputs, and of the states in the end."""
    pool = Ring(2, 1, 1, 64, 128, state_dtype=state_dtype, dtype=dtype)
    slots = pool.put(np.array([1, 0]))
    seen = []
    steps = [(8, [8, 5]), (3, [2, 3]), (16, [16, 1]), *[(1, None)] * 15, (4, [3, 4])]
    for T, accepted in steps:
        x = {name: pool.put(y) for name, y in pool.tokens(2, T).items()}
        seen.append(host(pool.call(x, slots, draft=accepted is not None)).tobytes())
        if accepted is not None:
            cuda_ring.commit(pool.ring, slots, pool.put(np.array(accepted)))
    return [*seen, host(cuda_ring.read(pool.ring, slots)).tobytes(), host(pool.pool).tobytes()]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_tiles_of_rings_do_not_show(state_dtype: str, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    seen = []
    for multiprocessors in (132, 1):
        with gpu(monkeypatch, directory, multiprocessors=multiprocessors):
            seen.append(run_ring(state_dtype))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("state_dtype", "dtype"), [("float32", "bfloat16"), ("bfloat16",) * 2, ("float32",) * 2])
def test_what_kernels_see_too_early_does_not_show(
    state_dtype: str, dtype: str, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    seen = []
    for lies in (False, True):
        with gpu(monkeypatch, directory, lies=lies):
            seen.append(run_ring(state_dtype, dtype))
    assert seen[0] == seen[1]


def test_a_slot_that_two_rows_named_is_as_good_as_new_once_it_is_overwritten(device: None) -> None:
    pool = Ring(3, 1, 2, 64, 64)
    pool.run([1, 2], 9, draft=True)
    pool.commit([1, 2], [9, 4])
    # What blocks of two rows, side by side, may leave: each waits to be the last of one row's.
    pool.ring.fills[1, 1], pool.ring.arrivals[1] = 3, 1
    cuda_ring.forget(pool.ring, pool.put(np.array([-1, 1, 3])))
    assert not host(pool.ring.fills)[1].any()
    assert not host(pool.ring.arrivals).any()
    pool.states[1] = pool.as_kv(host(pool.pool))[1]
    for _ in range(3):
        pool.run([1, 2], 9, draft=True)  # folds, too
        pool.commit([1, 2], [9, 4])
    pool.check()


# Each thread copies to the other block what it has, reads there what another thread of that block copied, and goes on
# with the sum; the first block's barrier awaits other bytes meanwhile. Before that, the halves of each block meet, of
# which the second comes after the other block's first half: as many threads as a block has are not yet the block.
PAIRS = """
#include "gdr/cluster.cuh"

using namespace gdr;

constexpr int kRounds = 3, kThreads = 512;
enum Mistake { kNone, kEndsEarly, kDoesNotMeet, kOwnAddress, kMisaligned, kOutside, kNoBlock, kWaitsForever };

struct Params {
    u32* to;
    const uint4* from;
    int mistake;
};
struct Shared {
    Barrier full, read, own, came[2];
    uint4 mine[kThreads], copied[kThreads], brought;
    u32 late[2][kThreads];
};

extern "C" __global__ void __cluster_dims__(GDR_CLUSTER, 1, 1) __launch_bounds__(kThreads)
    pairs(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    Shared& sm = *reinterpret_cast<Shared*>(shared);
    const int thread = threadIdx.x, mate = blockDim.x - 1 - thread;
    const u32 block = block_of_cluster(), other = block ^ 1;
    if (thread == 0) {
        sm.full.init(1), sm.read.init(blockDim.x), sm.own.init(1);
        for (Barrier& came : sm.came) came.init(blockDim.x / 2);
        Barrier::publish_inits();
    }
    if (p.mistake != kDoesNotMeet) meet_cluster();
    if (p.mistake == kEndsEarly && block == 0) return;
    if (p.mistake == kWaitsForever) {
        if (thread == 0) sm.full.wait(0);
        return;
    }
    if (thread == 0) {
        if (block == 0) sm.own.arrive_expect(16);
        else sm.own.arrive();
    }
    if (block == 1) sm.own.wait(0);
    u32 x = blockIdx.x * 10000 + blockIdx.y * 100000 + thread;
    for (int i = 0; i < 2; ++i) {
        if (thread < mate) arrive_in_cluster(address_in_block(sm.came[i].address(), other));
        else sm.came[i].wait(0);
        sm.late[i][thread] = x;
        if (i == 0) __syncthreads();
        else sync_threads(1, blockDim.x);
        x += 2 * sm.late[i][mate];
    }
    for (int round = 0; round < kRounds; ++round) {
        const u32 local = shared_address(&sm.copied[thread]), outside = (228 << 10) - local;
        u32 to = address_in_block(local, other + (p.mistake == kNoBlock));
        if (p.mistake == kOwnAddress) to = local;
        if (p.mistake == kMisaligned) to += 8;
        if (p.mistake == kOutside) to += outside;
        sm.mine[thread] = make_uint4(x, x + 1, x + 2, x + 3);
        publish_to_engines();
        if (round > 0) sm.read.wait(round % 2 ^ 1);
        copy_in_cluster(to, shared_address(&sm.mine[thread]), 16, address_in_block(sm.full.address(), other));
        if (thread == 0) sm.full.arrive_expect(16 * blockDim.x);
        sm.full.wait(round % 2);
        const uint4 copied = sm.copied[mate];
        arrive_in_cluster(address_in_block(sm.read.address(), other));
        x += copied.x + copied.w + __shfl_sync(0xffffffffu, x, 0);
    }
    if (block == 0) {
        if (thread == 0) sm.own.copy_bulk(shared_address(&sm.brought), p.from, 16);
        sm.own.wait(0);
        x += sm.brought.x;
    }
    meet_cluster();
    p.to[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + thread] = x;
}
"""


PAIRS_SHARED = 21 << 10  # bytes, at least its struct Shared
MISTAKES = re.findall(r"k\w+", re.findall(r"enum Mistake {(.*)}", PAIRS)[0])


@cache
def build_pairs(directory: Path, text: str = PAIRS) -> Any:
    return build(loader.Source("pairs", text, "", 90, (), dependent=False), {"GDR_CLUSTER": 2}, directory)


def test_blocks_of_a_cluster_reach_each_other(directory: Path) -> None:
    kernel, params = Kernel("pairs", build_pairs(directory)), loader.Params("QQi")
    got, copied, threads = np.zeros((2, 4, 512), np.uint32), np.full(4, 7, np.uint32), np.arange(512)
    params.pack(got.ctypes.data, copied.ctypes.data, MISTAKES.index("kNone"))
    kernel.launch((4, 2, 1), (512, 1, 1), params, 0, PAIRS_SHARED)
    x = np.arange(2)[:, None, None] * 100000 + np.arange(4)[:, None] * 10000 + threads
    for _ in range(2):
        x = x + 2 * x[..., ::-1]
    for _ in range(3):
        x = x + 2 * x[:, [1, 0, 3, 2], ::-1] + 3 + x[..., threads // 32 * 32]
    x[:, ::2] += 7
    assert (got == x).all()

    if os.environ.get("GDR_SANITIZE") != "1":  # with it the access ends the process
        with pytest.raises(AssertionError, match="pairs: writes beyond its shared memory"):
            kernel.launch((4, 2, 1), (512, 1, 1), params, 0, 20 << 10)
    with pytest.raises(AssertionError, match="pairs: the grid's x is no multiple of the cluster's blocks"):
        kernel.launch((3, 2, 1), (512, 1, 1), params, 0, PAIRS_SHARED)
    with pytest.raises(AssertionError, match="pairs: more threads than there are fibers"):
        kernel.launch((2, 1, 1), (513, 1, 1), params, 0, PAIRS_SHARED)
    params.pack(got.ctypes.data, copied.ctypes.data, MISTAKES.index("kWaitsForever"))
    with pytest.raises(AssertionError, match="pairs: threads wait for each other"):
        kernel.launch((2, 1, 1), (1, 1, 1), params, 0, PAIRS_SHARED)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("kEndsEarly", "block 0 of the cluster has ended"),
        ("kDoesNotMeet", "block 1 of the cluster may not have started: the blocks have not met"),
        ("kOwnAddress", "no copy of 16 bytes"),
        ("kMisaligned", "no copy of 16 bytes"),
        ("kOutside", "a cluster's shared memory: 1 bytes at "),
        ("kNoBlock", "block 2 of a cluster of 2"),
    ],
)
def test_mistakes_of_clusters_are_reported(mistake: str, message: str, directory: Path) -> None:
    """They end the process: hence another one."""
    params = loader.Params("QQi")
    params.pack(0, 0, MISTAKES.index(mistake))
    run = "import ctypes, sys; "
    run += f"ctypes.CDLL(sys.argv[1]).run(bytes.fromhex(sys.argv[2]), 2, 1, 1, 512, {PAIRS_SHARED})"
    command = [sys.executable, "-c", run, build_pairs(directory)._name, params.buffer.raw.hex()]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode < 0
    assert message in ended.stderr


def test_blocks_of_a_cluster_have_no_static_shared_memory(directory: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build_pairs(directory, PAIRS.replace("extern __shared__", "__shared__ int count; extern __shared__"))
    assert "blocks of a cluster have dynamic shared memory" in capfd.readouterr().err
