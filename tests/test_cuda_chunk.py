"""The chunkwise rule on a CUDA device against the reference: accuracy, lengths, pools, strides, and what must not
change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from places import assert_same_bits, given

import gdr
from gdr import _backends, _inputs, reference
from gdr import _cuda_chunk as cuda_chunk
from gdr import _cuda_chunk_f32 as cuda_chunk_f32
from gdr import _cuda_loader as loader
from gdr._spec import OPERANDS, Form
from gdr.testing import Inputs, assert_close, make_inputs, to_library, to_numpy

pytestmark = pytest.mark.gpu

RTOL_O = {"bfloat16": 2.5e-3, "float16": 1e-3, "float32": 5e-6}
RTOL_STATE = {"bfloat16": 1e-3, "float16": 1e-3, "float32": 5e-6}


def on_device(x: Any) -> Any:
    return to_library(x, "cupy", "cuda") if isinstance(x, np.ndarray) else x


def chunk(x: Inputs, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    there = x.to("cupy", "cuda")
    options = {name: on_device(value) for name, value in options.items()}
    o, h = gdr.chunk_gated_delta_rule(
        *given(there), cu_seqlens=there.cu_seqlens, output_final_state=True, **{"out": poisoned(x.v), **options}
    )
    return to_numpy(o), to_numpy(h)


def poisoned(x: np.ndarray) -> Any:
    return on_device(np.full(x.shape, np.nan).astype(x.dtype))


def assert_chunk(x: Inputs, rtol_o: float | None = None, rtol_h: float | None = None, **options: Any) -> None:
    options.setdefault("initial_state", x.initial_state)
    o, h = chunk(x, **options)
    want_o, want_h = reference.chunk_gated_delta_rule(
        *given(x), output_final_state=True, cu_seqlens=x.cu_seqlens, **options
    )
    assert_close(o, want_o, rtol=rtol_o or RTOL_O[x.v.dtype.name], name="o")
    assert_close(h, want_h, rtol=rtol_h or RTOL_STATE[x.v.dtype.name], name="h")


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls run by chunks, however short sequences are; none is kept from one test to the next."""
    monkeypatch.setitem(_backends.CHUNK_FROM, "cuda", 0)
    _inputs.forget()
    yield
    _inputs.forget()


@pytest.fixture(params=["chosen", "fused_128", "fused_64"])
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run on the kernels that they choose, then where it can on the one that does all, in blocks of columns."""
    if request.param == "chosen":
        return
    if cuda_chunk.describe_gpu(0).capability != 90 or request.node.callspec.params.get("dtype") == "float32":
        pytest.skip("not on this GPU")
    choose = cuda_chunk.pick_cut

    def pick(spec: Any, batch_invariant: bool, gpu: Any) -> cuda_chunk.Cut | None:
        if spec.K > 128 or spec.V % 64:
            return choose(spec, batch_invariant, gpu)
        columns = 64 if spec.V % 128 else int(request.param[6:])
        return cuda_chunk.Cut(cuda_chunk.Tile(columns, 1, 3, True), fused=True)

    monkeypatch.setattr(cuda_chunk, "pick_cut", pick)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "none"])
def test_accuracy(dtype: str, gates: str) -> None:
    assert_chunk(make_inputs(B=2, T=400, H=2, HV=4, K=128, V=128, dtype=dtype, gates=gates))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 1000])
def test_lengths(T: int, dtype: str) -> None:
    x = make_inputs(B=1, T=T, H=1, HV=2, K=128, V=128, dtype=dtype, seed=T)
    assert_chunk(x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("lengths", [[0, 1, 63, 0, 65, 64, 200, 0], [130], [*range(40)] * 2, [0, 1], [64, 128, 64]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_packed_sequences(lengths: list[int], layout: str, dtype: str) -> None:
    x = make_inputs(lengths=lengths, H=1, HV=3, K=64, V=64, dtype=dtype, layout=layout)
    assert_chunk(x, state_layout=layout)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("K", [32, 64, 96, 100, 128, 192, 256])
@pytest.mark.parametrize("V", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_head_dimensions(K: int, V: int, dtype: str) -> None:
    assert_chunk(make_inputs(B=1, T=150, H=2, HV=2, K=K, V=V, dtype=dtype, seed=K + V))


TILES = [(c, s, n, False) for c in (16, 32, 64, 128) for s in (1, 2) for n in (2, 3) if c * s < 256]


def use(monkeypatch: pytest.MonkeyPatch, cut: cuda_chunk.Cut) -> None:
    device = cuda_chunk.describe_gpu(0)
    if cut.tile.shared(128) > device.shared or (cut.tile.warpgroups and device.capability != 90):
        pytest.skip("not on this GPU")
    monkeypatch.setattr(cuda_chunk, "pick_cut", lambda *_: cut)
    _inputs.forget()  # they keep how calls are divided


@pytest.mark.parametrize("tile", [(16, 2, 2), (16, 4, 3), (32, 2, 3), (32, 4, 2), (64, 2, 2)])
def test_tiles_of_float32(tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cuda_chunk_f32.Tile(*tile)
    if chosen.shared(128) > cuda_chunk.describe_gpu(0).shared:
        pytest.skip("not on this GPU")
    monkeypatch.setattr(cuda_chunk_f32, "pick_tile", lambda *_: chosen)
    assert_chunk(make_inputs(B=1, T=333, H=1, HV=2, K=128, V=128, dtype="float32"))


@pytest.mark.parametrize("tile", [*TILES, (64, 1, 2, True), (64, 1, 3, True), (128, 1, 3, True)])
def test_tiles(tile: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, cuda_chunk.Cut(cuda_chunk.Tile(*tile)))
    assert_chunk(make_inputs(B=1, T=333, H=1, HV=2, K=128, V=128, dtype="bfloat16"))


@pytest.mark.parametrize("columns", [(64, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("segment", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[64 * 20 + 7], [0, 3, 64 * 9, 0, 65, 64 * 5 + 1, 0], [128, 1]])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_segments(
    columns: tuple[int, int], segment: int, lengths: list[int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, cuda_chunk.Cut(cuda_chunk.Tile(columns[0], 1, 3, True), segment, columns[1]))
    for gates in ("ordinary", "none"):
        x = make_inputs(lengths=lengths, H=1, HV=2, K=96, V=128, dtype="bfloat16", layout=layout, gates=gates)
        assert_chunk(x, state_layout=layout)


def test_segments_and_short_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(lengths=[64 * 30 + 5, 0, 64 * 11], H=1, HV=2, K=64, V=64, dtype="float16")
    use(monkeypatch, cuda_chunk.Cut(cuda_chunk.Tile(64, 1, 3, True), 4, 64))
    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", 1 << 20)
    assert_chunk(x)


BESIDE = [
    ({"lengths": [64 * 40 + 7]}, 68),
    ({"lengths": [64 * 40 + 7]}, 5),
    ({"lengths": [70, 0, 64 * 30, 1, 64 * 30, 130]}, 40),
    ({"lengths": [64 * 50, 64 * 20], "H": 2, "HV": 20}, 50),
    ({"B": 3, "T": 1000}, 80),
]


@pytest.mark.parametrize(("shape", "blocks"), BESIDE)
@pytest.mark.parametrize("workspace", [512 << 20, 2 << 20])
def test_beside(shape: dict[str, Any], blocks: int, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as one kernel after the other, with what others left in the workspace."""
    import cupy

    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", workspace)
    x = make_inputs(**{"H": 4, "HV": 8, "K": 128, "V": 128, "dtype": "bfloat16", "gates": "slow", **shape})
    tile = cuda_chunk.Tile(64, 1, 3, True)
    use(monkeypatch, cuda_chunk.Cut(tile))
    want = chunk(x, initial_state=x.initial_state)
    use(monkeypatch, cuda_chunk.Cut(tile, beside=blocks))
    lent = cupy.full(600 << 20, 1, cupy.uint8)
    for fill in (1, 255, None, None):
        if fill is not None:
            lent[:] = fill
        for got, whole in zip(chunk(x, initial_state=x.initial_state, workspace=lent), want):
            assert_same_bits(got, whole)


def test_beside_in_a_graph_and_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays, one after the other with the same workspace, while another stream takes processors."""
    import cupy

    problems = [make_inputs(B=1, T=64 * 50, H=8, HV=16, K=128, V=128, dtype="bfloat16", seed=s) for s in (0, 1)]
    tile = cuda_chunk.Tile(64, 1, 3, True)
    use(monkeypatch, cuda_chunk.Cut(tile))
    want = [chunk(x)[0] for x in problems]
    use(monkeypatch, cuda_chunk.Cut(tile, beside=80))
    there = [x.to("cupy", "cuda") for x in problems]
    outs = [poisoned(x.v) for x in problems]
    lent = cupy.full(256 << 20, 1, cupy.uint8)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]

    def both() -> None:
        for x, out in zip(there, outs):
            gdr.chunk_gated_delta_rule(*given(x), out=out, workspace=lent)

    with streams[1]:
        square = cupy.ones((4096, 4096), cupy.float32)
        square @ square
    with streams[0]:
        both()
        streams[0].begin_capture()
        both()
        graph = streams[0].end_capture()
        streams[0].synchronize()
        for _ in range(20):
            with streams[1]:
                square @ square
            for out in outs:
                out.fill(0)
            graph.launch(streams[0])
            for out, o in zip(outs, want):
                assert_same_bits(to_numpy(out), o)
    cupy.cuda.Device().synchronize()


def test_one_long_sequence_with_few_heads_is_cut() -> None:
    if cuda_chunk.describe_gpu(0).capability != 90:
        pytest.skip("not on this GPU")
    x = make_inputs(B=1, T=64 * 150 + 13, H=1, HV=2, K=128, V=128, dtype="bfloat16", gates="slow")
    assert "chunk_combine" in gdr.explain(gdr.chunk_gated_delta_rule, *given(x.to("cupy", "cuda")))
    assert_chunk(x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_raw_gates_and_norm_from_a_pool(keys: str, normalize: bool, dtype: str) -> None:
    x = make_inputs(lengths=[70, 0, 300, 5], H=2, HV=4, K=128, V=128, dtype=dtype, keys=keys, normalize=normalize)
    slots = x.slots.copy()
    slots[3] = -1
    there = x.to("cupy", "cuda")
    operands = {name: getattr(there, name) for name in ("q", "k", "v", "A_log", "dt_bias", "a", "b", "cu_seqlens")} | {
        "out": poisoned(x.v),
        "initial_state": there.state,
        "final_state": there.state,
    }
    operands["initial_slots"] = operands["final_slots"] = on_device(slots)
    form = Form("chunk", ("q", "k", "v", "A_log", "dt_bias", "a", "b"))
    call = _inputs.prepare(form, tuple(map(operands.get, OPERANDS)), l2norm=True)
    cuda_chunk.run(call)
    want_o, want_state = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, x.state, slots,
        use_qk_l2norm_in_kernel=True, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    assert_close(to_numpy(call.out), want_o, rtol=3e-3 if dtype == "bfloat16" else RTOL_O[dtype], name="o")
    assert not to_numpy(call.out)[0, 370:].astype(np.float32).any()
    got = to_numpy(there.state)
    assert_close(got, want_state, rtol=RTOL_STATE[dtype], name="pool")
    untouched = [n for n in range(len(x.state)) if n not in (slots[0], slots[2])]
    assert_same_bits(got[untouched], x.state[untouched])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_state_dtypes(state_dtype: str, layout: str) -> None:
    x = make_inputs(B=2, T=100, H=1, HV=2, K=128, V=64, dtype="bfloat16", state_dtype=state_dtype, layout=layout)
    assert_chunk(x, state_layout=layout)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -80.0, -1e4, -np.inf])
def test_extreme_decays(decay: float, dtype: str) -> None:
    x = make_inputs(B=1, T=200, H=1, HV=2, K=128, V=128, dtype=dtype)
    x.g[:, 30::37] = decay
    with np.errstate(all="ignore"):
        assert_chunk(x)
    x.g[...] = decay
    with np.errstate(all="ignore"):
        assert_chunk(x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("gates", ["none", "slow", "ordinary"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_correlated_keys(dtype: str, gates: str) -> None:
    x = make_inputs(B=1, T=512, H=2, HV=4, K=128, V=128, dtype=dtype, keys="correlated", gates=gates)
    # Decays and keys that resemble each other leave little of a state: its error is 0.7e-3 to 1.3e-3.
    assert_chunk(x, rtol_h=2e-3 if gates == "ordinary" and dtype == "bfloat16" else None)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_wide_range(scale: float) -> None:
    x = make_inputs(B=1, T=300, H=1, HV=2, K=128, V=128, dtype="bfloat16")
    x.v = (x.v.astype(np.float32) * scale).astype(x.v.dtype)
    state = (x.initial_state * scale).astype(np.float32)
    o, h = chunk(x, initial_state=state, wide_range=True)
    want_o, want_h = reference.chunk_gated_delta_rule(*given(x), initial_state=state, output_final_state=True)
    assert_close(o, want_o, rtol=5e-3, name="o")
    assert_close(h, want_h, rtol=5e-3, name="h")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_hundred_thousand_tokens(dtype: str) -> None:
    x = make_inputs(lengths=[100_003, 65, 0, 1], H=1, HV=1, K=64, V=64, dtype=dtype, gates="slow")
    assert_chunk(x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "scale"), [("bfloat16", 1e-4), ("bfloat16", 1e4), ("float32", 1e-25), ("float32", 1e30)]
)
def test_magnitudes(dtype: str, scale: float) -> None:
    x = make_inputs(B=1, T=300, H=1, HV=2, K=128, V=128, dtype=dtype)
    x.v = (x.v.astype(np.float32) * scale).astype(x.v.dtype)
    assert_chunk(x, initial_state=(x.initial_state * scale).astype(np.float32))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_strides_and_odd_addresses(name: str, dtype: str) -> None:
    x = make_inputs(B=2, T=130, H=2, HV=4, K=64, V=64, dtype=dtype)
    dense = chunk(x)
    there = x.to("cupy", "cuda")
    there.out = poisoned(x.v)
    inner = getattr(there, name)
    base = on_device(np.full((2, 131, *x.v.shape[2:3], 67), np.nan).astype(x.v.dtype))
    view = base[:, 1:, : inner.shape[2], 1:65]
    view[...] = inner
    setattr(there, name, view)
    o, h = gdr.chunk_gated_delta_rule(*given(there), output_final_state=True, out=there.out)
    assert_same_bits(o, dense[0])
    assert_same_bits(h, dense[1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_many_sequences_and_heads_and_short_workspace(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(lengths=[700, 0, 10, 900], H=2, HV=12, K=64, V=64, dtype=dtype)
    want = chunk(x, initial_state=x.initial_state)
    monkeypatch.setattr("gdr._cuda_chunk_call.MAX_WORKSPACE", 1 << 20)
    parts = make_inputs(lengths=[700, 0, 10, 900], H=2, HV=12, K=64, V=64, dtype=dtype)
    _inputs.forget()
    for got, whole in zip(chunk(parts, initial_state=parts.initial_state), want):
        assert_same_bits(got, whole)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_bits_every_time_and_in_any_batch(dtype: str) -> None:
    x = make_inputs(lengths=[200, 64, 333], H=2, HV=4, K=128, V=128, dtype=dtype)
    options = {"initial_state": x.initial_state, "batch_invariant": True}
    o, h = chunk(x, **options)
    for _ in range(3):
        again = chunk(x, **options)
        assert_same_bits(again[0], o)
        assert_same_bits(again[1], h)
    alone = make_inputs(lengths=[333], H=2, HV=4, K=128, V=128, dtype=dtype)
    for name in ("q", "k", "v", "g", "beta"):
        getattr(alone, name)[...] = getattr(x, name)[:, 264:]
    o1, h1 = chunk(alone, initial_state=x.initial_state[2:], batch_invariant=True)
    assert_same_bits(o1, o[:, 264:])
    assert_same_bits(h1, h[2:])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_capture(dtype: str) -> None:
    import cupy

    x = make_inputs(B=1, T=200, H=1, HV=2, K=128, V=128, dtype=dtype)
    there = x.to("cupy", "cuda")
    out = poisoned(x.v)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        gdr.chunk_gated_delta_rule(*given(there), out=out)
        want = to_numpy(out)
        stream.begin_capture()
        gdr.chunk_gated_delta_rule(*given(there), out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
    stream.synchronize()
    assert_same_bits(to_numpy(out), want)


def test_no_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_kernels", {})  # of these calls alone: small heads may spill
    for dtype in ("bfloat16", "float32"):
        chunk(make_inputs(B=1, T=64, H=1, HV=2, K=128, V=128, dtype=dtype))
    kernels = [k for k in loader._kernels.values() if k.stem in cuda_chunk.PARAMS]
    assert kernels
    for kernel in kernels:  # a few values outside the loops; packing the state early is worth some more
        assert kernel.local_bytes <= (144 if kernel.stem == "chunk_fused_sm90" else 16), kernel
