"""Time one sequence against its length on a GPU: writes docs/data/performance-GPU-prefill-sweep.json.

    python docs/measure_prefill.py NAME

The chunkwise form beside the recurrent one, and what `DeltaRuleState.prefill` makes of the same tokens, which chooses
between the two; the same of packed sequences; then what `batch_invariant=True` costs, and what a call costs the host.
Times are medians of replays of a CUDA graph that goes through several sets of inputs, which together are larger than
the L2 cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import cupy
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gdr
from gdr import _backends, _cuda_chunk_call, _cuda_loader, _inputs, _warmup
from gdr._arrays import numpy_dtype
from provenance import provenance, write
from replays import Replays

HEADS = {"qwen3-next": (16, 32), "tp8": (2, 8)}
DTYPES = ("bfloat16", "float32")
D = 128
LENGTHS = (1, 4, 8, 16, 24, 31, 32, 48, 64, 65, 96, 128, 192, 256, 384, 512, 700, 1000, 1024, 1500)
LENGTHS += tuple(1 << i for i in range(11, 18))
INVARIANT_FROM = 1024
PACKED = {
    "4096, 256 of 1": [4096, *[1] * 256],
    "512, 31 of 1": [512, *[1] * 31],
    "100, 7 of 1": [100, *[1] * 7],
    "256 of 1": [1] * 256,
    "64 of 8": [8] * 64,
    "8 of 16": [16] * 8,
}
COLD_BYTES = 128 << 20
TITLE = "one sequence against its length"
NOTE = (
    "Microseconds of one sequence of T tokens, K=V=128; qwen3-next has H=16 HV=32, tp8 H=2 HV=8. A float32 state is "
    "read and written, q and k are normalised by the kernels. Replays of a CUDA graph over inputs that are not in the "
    "cache."
)


def normal(shape: tuple[int, ...], dtype: str) -> Any:
    """Random numbers, the same again and again in a large array."""
    size = int(np.prod(shape))
    block = np.random.default_rng(size).standard_normal(min(size, 1 << 18), np.float32).astype(numpy_dtype(dtype))
    words = cupy.asarray(block.view(f"uint{block.dtype.itemsize * 8}"))
    return cupy.resize(words, size).view(block.dtype).reshape(shape)


class Inputs:
    """One sequence, and its slot of a pool."""

    def __init__(self, arrays: dict[str, Any], state: Any, slots: Any, n: int) -> None:
        self.q, self.k, self.v, self.a, self.b, self.g, self.beta, self.out = (x[n : n + 1] for x in arrays.values())
        self.state, self.initial, self.slots = state, state.pool[n : n + 1], slots[n : n + 1]

    @staticmethod
    def draw(H: int, HV: int, T: int, dtype: str) -> list[Inputs]:
        """As many sequences as it takes to be larger than the cache."""
        nbytes = T * (2 * H + 2 * HV) * D * numpy_dtype(dtype).itemsize + HV * D * D * 4
        N = min(256, 1 + COLD_BYTES // nbytes)
        arrays = {name: normal((N, T, heads, D), dtype) for name, heads in (("q", H), ("k", H), ("v", HV))}
        arrays |= {name: normal((N, T, HV), dtype) for name in "ab"}
        logits = normal((N, T, HV), "float32")
        arrays |= {"g": -cupy.log1p(cupy.exp(-logits)) / 16, "beta": 1 / (1 + cupy.exp(-logits))}
        arrays["out"] = cupy.empty_like(arrays["v"])
        A_log = cupy.asarray(np.linspace(-3, 1, HV, dtype=np.float32))
        state = gdr.DeltaRuleState(N, HV, D, D, num_k_heads=H, A_log=A_log, device="cuda")
        slots = cupy.asarray(state.alloc(N))
        return [Inputs(arrays, state, slots, n) for n in range(N)]

    def run(self, function: Callable[..., Any], **options: Any) -> None:
        """Run an operation from ready gates."""
        function(
            *(self.q, self.k, self.v, self.g, self.beta), initial_state=self.initial, output_final_state=True,
            use_qk_l2norm_in_kernel=True, out=self.out, **options,
        )  # fmt: skip

    def prefill(self, **options: Any) -> None:
        """Run the method of the pool, from raw gates."""
        self.state.prefill(self.q, self.k, self.v, self.a, self.b, self.slots, out=self.out, **options)


@contextmanager
def always_chunkwise() -> Iterator[None]:
    """Let chunk_gated_delta_rule run by chunks however short the sequence is."""
    chosen = _backends.CHUNK_FROM["cuda"]
    _backends.CHUNK_FROM["cuda"] = 0
    _inputs.forget()
    try:
        yield
    finally:
        _backends.CHUNK_FROM["cuda"] = chosen
        _inputs.forget()


def compile_kernels() -> None:
    """Compile most of what runs, on all processors."""
    specs = [
        _warmup.make_spec("chunk", B=1, T=T, H=H, HV=HV, K=D, V=D, dtype=dtype, gates=gates)
        for (H, HV), dtype, T, gates in product(HEADS.values(), DTYPES, LENGTHS, ("raw", "given"))
    ]
    with always_chunkwise(), ThreadPoolExecutor() as pool:
        wanted = dict(_warmup.specializations(specs, _cuda_loader.describe_gpu(0))).values()
        list(pool.map(lambda job: _cuda_loader.load(*job, 0), wanted))


def measure(calls: list[Callable[[], None]], seconds: float = 0.02) -> float:
    """Median time of a call, in microseconds."""
    replays = Replays(calls, calls[:1])
    replays.mean(1)
    count = max(1, int(seconds / 5 / (replays.mean(1) * 1e-6 * len(calls))))
    return float(np.median([replays.mean(count) for _ in range(5)]))


def sweep(model: str, dtype: str, T: int, workspace: Any) -> Iterator[dict[str, Any]]:
    """Times of one length."""
    sets = Inputs.draw(*HEADS[model], T, dtype)
    chunk, recurrent = gdr.chunk_gated_delta_rule, gdr.fused_recurrent_gated_delta_rule
    forms: dict[str, Callable[[Inputs], None]] = {
        "gdr chunkwise": lambda x: x.run(chunk, workspace=workspace),
        "gdr recurrent": lambda x: x.run(recurrent),
        "gdr prefill": lambda x: x.prefill(workspace=workspace),
    }
    if T >= INVARIANT_FROM:
        forms["gdr batch_invariant=True"] = lambda x: x.run(chunk, batch_invariant=True, workspace=workspace)
    for impl, form in forms.items():
        with always_chunkwise() if "chunkwise" in impl else nullcontext():
            us = measure([lambda x=x, form=form: form(x) for x in sets])
        yield {"suite": "sweep", "case": f"{model} {dtype}", "T": T, "impl": impl, "us": round(us, 2)}


def packed(model: str, case: str, lengths: list[int], workspace: Any) -> Iterator[dict[str, Any]]:
    """Times of packed sequences of bfloat16."""
    (H, HV), T, N = HEADS[model], sum(lengths), len(lengths)
    nbytes = T * (2 * H + 2 * HV) * D * 2 + 2 * N * HV * D * D * 4
    sets, offsets = [], cupy.asarray(gdr.varlen.cu_seqlens_of(lengths))
    for _ in range(1 + COLD_BYTES // nbytes):
        q, k, v = (normal((1, T, heads, D), "bfloat16") for heads in (H, H, HV))
        logits = normal((1, T, HV), "float32")
        states = normal((N, HV, D, D), "float32")
        sets.append((q, k, v, -cupy.log1p(cupy.exp(-logits)) / 16, 1 / (1 + cupy.exp(-logits)), states))
    chunk, recurrent, lent = gdr.chunk_gated_delta_rule, gdr.fused_recurrent_gated_delta_rule, {"workspace": workspace}
    for impl, form, rest in (("gdr chunkwise", chunk, lent), ("gdr recurrent", recurrent, {}), ("gdr", chunk, lent)):

        def call(x: tuple[Any, ...], form: Callable[..., Any] = form, rest: dict[str, Any] = rest) -> None:
            form(
                *x[:5], initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=True,
                cu_seqlens=offsets, **rest,
            )  # fmt: skip

        with always_chunkwise() if "chunkwise" in impl else nullcontext():
            us = measure([lambda x=x: call(x) for x in sets])
        yield {"suite": "packed", "case": f"{model}, {case}", "impl": impl, "us": round(us, 2)}


def host_cost(library: str, T: int, calls: int = 400) -> float:
    """Median time of a call on the host, in microseconds, where the call allocates what it returns."""
    x = gdr.testing.make_inputs(B=1, T=T, H=2, HV=8, K=D, V=D, dtype="bfloat16", xp=library, device="cuda")
    operands = (x.q, x.k, x.v, x.g, x.beta)
    options = {"initial_state": x.initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    took = []
    for i in range(calls):
        start = time.perf_counter()
        gdr.chunk_gated_delta_rule(*operands, **options)
        took.append(time.perf_counter() - start)
        if i % 10 == 0:  # the queue of the device stays short
            cupy.cuda.Device().synchronize()
    return float(np.median(took)) * 1e6


def host_rows() -> Iterator[dict[str, Any]]:
    # The longer one is cut into segments, which takes four kernels.
    for (name, library), T in product((("CuPy", "cupy"), ("torch", "torch")), (256, 8192)):
        if importlib.util.find_spec(library) is not None:
            case = f"chunk_gated_delta_rule, {name}, {T} tokens"
            yield {"suite": "host", "case": case, "impl": "gdr", "us": round(host_cost(library, T), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help='of the GPU in the file\'s name, "h100"')
    name = parser.parse_args().name
    compile_kernels()
    rows = list(host_rows())
    print(*rows, sep="\n", flush=True)
    workspace = cupy.empty(_cuda_chunk_call.MAX_WORKSPACE + (256 << 20), "uint8")  # and what is beside the tiles
    for model, dtype, T in product(HEADS, DTYPES, LENGTHS):
        found = list(sweep(model, dtype, T, workspace))
        rows += found
        print(model, dtype, T, *(f"{row['impl'].removeprefix('gdr ')} {row['us']}" for row in found), flush=True)
    for model, (case, lengths) in product(HEADS, PACKED.items()):
        rows += packed(model, case, lengths, workspace)
        print(*rows[-3:], sep="\n", flush=True)
    write(f"performance-{name}-prefill-sweep", provenance("cuda") | {"title": TITLE, "note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
