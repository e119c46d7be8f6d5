"""``gdr selftest``: every operation on this machine against the float64 reference, with random and adversarial inputs.

A *case* is one call.  Its outputs start as NaN, it runs twice and must give the same bits, slots that it does not
write must keep theirs, and its relative RMS errors must stay under the limits of its dtypes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

# Relative RMS error of an output or a state of each dtype: its rounding, and that of float32 arithmetic.
LIMITS = {"float64": 1e-12, "float32": 1e-6, "float16": 4e-4, "bfloat16": 2.5e-3}
# The chunkwise form on tensor cores multiplies 16-bit inputs in 16 bits, and float32 ones in three TF32 products.
CHUNK_OUTPUT_LIMITS = {"float64": 1e-12, "float32": 1e-5, "float16": 2.5e-3, "bfloat16": 2.5e-3}
CHUNK_STATE_LIMIT = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-test from a command line's arguments; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gdr selftest", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the self-test's options to a parser."""
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (CUDA where it is usable, else the CPU)')
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (0)")


def run(args: argparse.Namespace) -> int:
    """Test, print the table of errors, and return 1 if anything failed."""
    from gdr import _cuda_loader

    try:
        places = list(_places(args.device))
    except (RuntimeError, ValueError) as error:
        print(f"gdr selftest: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    results: list[Result] = []
    for place in places:
        print(f"{place.name}: {place.description}")
        cases = list(_cases(place, args.quick, args.seed))
        results += _run_cases(cases, place)
    print(f"\n{table(results)}")
    failed = [result for result in results if result.failures]
    for result in failed:
        print(f"\nFAILED {result.case}")
        for failure in result.failures:
            print(f"    {failure}")
    verdict = f"{len(failed)} FAILED" if failed else "all passed"
    info = _cuda_loader.cache_info()
    if info["loaded"]:
        print(f"\n{len(info['loaded'])} CUDA kernels, compiled or from {info['cache_dir']}")
    print(f"\n{len(results)} cases, {verdict} ({time.perf_counter() - start:.1f} s)")
    return 1 if failed else 0


@dataclass(frozen=True)
class Case:
    """One call: what to draw, what to do to it, and which operation to run on it."""

    place: str
    op: str
    name: str
    inputs: dict[str, Any]  # arguments of testing.make_inputs
    change: Callable[[Any], Any] = lambda x: x
    options: dict[str, Any] = field(default_factory=dict)
    strided: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.inputs.items())
        return f"{self.place} {self.op}, {self.name}: {sizes} {self.options or ''}"


@dataclass
class Result:
    """The errors of a case, each with its limit, and what is wrong with it."""

    case: Case
    output: float = 0.0
    output_limit: float = 0.0
    state: float | None = None
    state_limit: float = 0.0
    failures: list[str] = field(default_factory=list)


class Place:
    """Where arrays are and operations run."""

    def __init__(self, name: str, description: str, ordinal: int | None = None) -> None:
        self.name, self.description, self.ordinal = name, description, ordinal

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the backend, or the device, that operations use."""
        if self.ordinal is not None:
            import cupy

            with cupy.cuda.Device(self.ordinal):
                yield
            return
        before = os.environ.get("GDR_CPU")
        os.environ["GDR_CPU"] = self.name
        try:
            yield
        finally:
            if before is None:
                del os.environ["GDR_CPU"]
            else:
                os.environ["GDR_CPU"] = before

    def put(self, x: Any) -> Any:
        """Copy a NumPy array here; None stays None."""
        from gdr.testing import to_library

        return to_library(x, "numpy") if self.ordinal is None else to_library(x, "cupy", "cuda")

    def strided(self, x: Any) -> Any:
        """Copy a NumPy array into a view whose axes, but for the last, have gaps."""
        import numpy as np

        if x is None or x.ndim < 3:
            return self.put(x)
        room = self.put(np.zeros((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 8), x.dtype))
        view = room[..., : x.shape[-2], 8:]
        view[...] = self.put(x)
        return view


def _places(device: str | None) -> Iterator[Place]:
    """The backends to test."""
    from gdr import _backends, _cuda_loader

    status = _cuda_loader.cuda_status()
    if device is None and not status.usable:
        print(f"CUDA is not usable: {status.reason}\n")
    if device == "cpu" or (device is None and not status.usable):
        for name in ("numba", "numpy") if _backends.cpu_backend() == "numba" else ("numpy",):
            yield Place(name, f"on the CPU, {os.cpu_count()} processors")
        return
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"--device: expected 'cpu', 'cuda' or 'cuda:<ordinal>', got {device!r}")
    ordinal = int(number or 0)
    _cuda_loader.require_device(ordinal)
    gpu = status.devices[ordinal]
    yield Place(
        f"cuda:{ordinal}",
        f"{gpu.name}, compute capability {gpu.capability}, {status.reason}",
        ordinal,
    )


def _run_cases(cases: list[Case], place: Place) -> list[Result]:
    """Run all cases behind a progress bar; on a GPU in several threads, for most of the time goes to the compiler."""
    threads = 1 if place.ordinal is None else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        return list(_progress(pool.map(lambda case: _attempt(case, place), cases), len(cases), place.name))


def _progress(results: Iterator[Result], total: int, name: str) -> Iterator[Result]:
    """Iterate behind a progress bar: tqdm's where it is installed, else a count; on a terminal only."""
    try:
        from tqdm import tqdm
    except ImportError:
        for done, result in enumerate(results, 1):
            yield result
            if sys.stderr.isatty():
                print(f"\r{name}: {done} of {total}", end="" if done < total else "\n", file=sys.stderr)
    else:
        yield from tqdm(results, total=total, desc=name, unit="case", leave=False, disable=None)


def _cases(place: Place, quick: bool, seed: int) -> Iterator[Case]:
    """Every combination of dtypes and layout on plain inputs; odd sizes and hard inputs on fewer of them."""
    on_cpu = place.ordinal is None
    dtypes = ("bfloat16", "float32", "float16") + (("float64",) if on_cpu else ())
    count = seed
    heads = {"H": 2, "HV": 4}
    square: dict[str, Any] = {**heads, "K": 128, "V": 128}

    def case(op: str, name: str, inputs: dict[str, Any], **rest: Any) -> Case:
        nonlocal count
        count += 1
        return Case(place.name, op, name, {**inputs, "seed": count}, **rest)

    def combinations() -> Iterator[dict[str, Any]]:
        for layout in ("kv", "vk"):
            for dtype in dtypes:
                states = ("float64",) if dtype == "float64" else dtypes[:3]
                for state in states[:1] if quick else states:
                    yield {"dtype": dtype, "state_dtype": state, "layout": layout}

    lengths = [64, 1, 0, 17, 3]
    most = 1 if quick or on_cpu else 512
    for types in combinations():
        yield case("update", "decode", {"B": 6, "T": 1, **square, **types})
        yield case("update", "several tokens", {"B": 3, "T": 5, **square, **types})
        yield case("update", "packed", {"lengths": lengths, **square, **types})
        yield case("recurrent", "packed", {"lengths": lengths, **square, **types})
        yield case("chunk", "packed", {"lengths": [200, 1, 0, 64, 65], **square, **types})
        yield case("chunk", "long", {"B": 1, "T": 300 if quick else 700, **square, **types})
        yield case("pool", "step and prefill", {"lengths": [100, 40], **square, **types})
        yield case("ring", "steps and drafts", {"B": 2, "T": 17, **square, **types})
        # A GPU has kernels of their own for small and for large batches.
        for op, name, T in (("update", "decode", 1), ("update", "several tokens", 2), ("chunk", "short", 20)):
            for B in _batches(place, op, most, T=T, **square, **types):
                yield case(op, f"{name}, batch of {B}", {"B": B, "T": T, **square, **types})
        for op, some in (("update", [2, 0, 1, 3]), ("chunk", [20, 0, 1, 65])):
            for N in _batches(place, op, most, T=6, packed=True, **square, **types):
                yield case(op, f"packed, {N} sequences", {"lengths": (some * N)[:N], **square, **types})
    for dtype in dtypes:
        yield case("gate", "plain", {"B": 3, "T": 50, "H": 5, "HV": 5, "gate_dtype": dtype, "dtype": dtype})
        yield case("gate", "large logits", {"B": 1, "T": 50, "gate_dtype": dtype, "dtype": dtype}, change=_large_logits)

    mixed: tuple[dict[str, Any], ...] = (
        {"dtype": "bfloat16", "layout": "vk"},
        {"dtype": "bfloat16", "layout": "kv"},
        {"dtype": "float32", "layout": "kv"},
        {"dtype": "float32", "layout": "vk"},
    )
    for types in mixed[1:3] if quick else mixed:
        for op in ("update", "recurrent", "chunk"):
            tokens: dict[str, Any] = {"lengths": [130, 0, 1, 40]} if op == "chunk" else {"lengths": [9, 0, 1, 20]}
            short = {**tokens, **heads, "K": 64, "V": 64, **types}
            for regime in ("slow", "fast", "none"):
                yield case(op, f"{regime} gates", {**short, "gates": regime})
            yield case(op, "correlated keys", {**short, "keys": "correlated", "gates": "slow"})
            yield case(op, "total decay", short, change=_total_decay)
            yield case(op, "large values", short, change=_large_values)
            yield case(op, "zero keys and queries", short, change=_zero_keys)
            yield case(op, "views with gaps", short, strided=True)
            yield case(op, "no norm, a scale", short, options={"use_qk_l2norm_in_kernel": False, "scale": 0.7})
            for K, V in ((1, 1), (100, 60), (256, 256), (96, 40), (17, 130)):
                yield case(op, f"K={K} V={V}", {**tokens, **heads, "K": K, "V": V, **types})
        short = {"B": 5, "T": 3, **heads, "K": 64, "V": 64, **types}
        yield case("update", "large logits", short, change=_large_logits)
        yield case("update", "padding", short, change=_padding)
        yield case(
            "update", "other output slots", {**short, "num_slots": 12}, options={"output_state_indices": "others"}
        )
        yield case("update", "state not updated", short, options={"disable_state_update": True})
        yield case("update", "no state", short, options={"initial_state_source": None})
        yield case("recurrent", "no initial state", short, options={"initial_state": None})
        yield case("chunk", "no initial state", {**short, "T": 100}, options={"initial_state": None})
        for op in ("recurrent", "chunk"):
            yield case(op, "no final state", {**short, "T": 70}, options={"output_final_state": False})
        yield case("update", "one head for all", {**short, "H": 1, "HV": 6})


def _batches(
    place: Place, op: str, most: int, *, T: int, state_dtype: str, packed: bool = False, **call: Any
) -> Iterator[int]:
    """Yield numbers of sequences, one for each choice of kernels that a GPU makes."""
    from gdr._cuda_loader import describe_gpu
    from gdr._warmup import doubling, make_spec, specializations

    if place.ordinal is None:
        yield 1
        return
    gpu = describe_gpu(place.ordinal)
    call |= {"state_dtype": state_dtype} if op == "update" else {"gates": "given", "final_dtype": "float32"}
    before = None
    for N in doubling(most):
        batch: dict[str, Any] = {"B": 1, "sequences": N} if packed else {"B": N}
        spec = make_spec("chunk" if op == "chunk" else "fused_recurrent", T=T, **batch, **call)
        kernels = dict(specializations([spec], gpu)).keys()
        if kernels != before:
            yield N
        before = kernels


def _large_logits(x: Any) -> Any:
    """Logits far beyond where exp overflows, of either sign."""
    a, b = x.a.copy(), x.b.copy()
    a[:, ::3], a[:, 1::3] = 1e4, -1e4
    b[:, ::2], b[:, 1::2] = 1e4, -1e4
    return replace(x, a=a, b=b)


def _total_decay(x: Any) -> Any:
    """Tokens that forget everything, g = -inf from given gates."""
    import numpy as np

    g, a = x.g.copy(), x.a.copy()
    g[:, ::7], g[:, 3::7] = -np.inf, 0.0
    a[:, ::7] = 3e4
    return replace(x, g=g, a=a)


def _large_values(x: Any) -> Any:
    return replace(x, v=(x.v * 1000).astype(x.v.dtype))


def _zero_keys(x: Any) -> Any:
    q, k = x.q.copy(), x.k.copy()
    q[:, ::2], k[:, ::3] = 0, 0
    return replace(x, q=q, k=k)


def _padding(x: Any) -> Any:
    """Two rows with negative slots, and the last slot in use."""
    slots = x.slots.copy()
    slots[0], slots[3] = -1, -7
    if len(x.state) - 1 not in slots:
        slots[1] = len(x.state) - 1
    return replace(x, slots=slots)


def _attempt(case: Case, place: Place) -> Result:
    """Run a case; anything it raises is a failure."""
    result = Result(case)
    try:
        from gdr.testing import make_inputs

        x = case.change(make_inputs(**case.inputs))
        with place.active():
            _OPERATIONS[case.op](case, place, x, result)
    except Exception as error:  # the report of a self-test has every kind of failure
        result.failures.append(f"{type(error).__name__}: {error}")
    return result


def _compare(result: Result, kind: str, got: Any, want: Any, limit: float) -> None:
    """Note the error of an output or a state."""
    from gdr.testing import relative_rms

    error = relative_rms(got, want)
    if kind == "state":
        result.state, result.state_limit = max(result.state or 0.0, error), limit
    else:
        result.output, result.output_limit = max(result.output, error), limit
    if not error <= limit:
        result.failures.append(f"{kind}: relative RMS error {error:.2e}, limit {limit:g}")


def _same_bits(result: Result, what: str, got: Any, want: Any) -> None:
    import numpy as np

    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    if got.shape != want.shape or got.tobytes() != want.tobytes():
        result.failures.append(what)


def _limits(case: Case, place: Place, dtype: str, state_dtype: str) -> tuple[float, float]:
    """Limits of the output and of the state."""
    if case.op in ("chunk", "pool") and place.ordinal is not None:
        state = LIMITS[state_dtype] if dtype == "float32" else max(CHUNK_STATE_LIMIT, LIMITS[state_dtype])
        return CHUNK_OUTPUT_LIMITS[dtype], max(state, 1e-5)
    return LIMITS[dtype], LIMITS[state_dtype]


def _update(case: Case, place: Place, x: Any, result: Result) -> None:
    import numpy as np

    import gdr
    from gdr import reference
    from gdr.testing import to_numpy

    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, **case.options}
    if "output_state_indices" in options:
        free = np.setdiff1d(np.arange(len(x.state)), x.slots)
        options["output_state_indices"] = free[: len(x.slots)].astype(np.int32)
    layout = case.inputs["layout"]
    has_state = options.pop("initial_state_source", True) is not None
    written = options.get("output_state_indices", x.slots)
    if options.get("disable_state_update") or not has_state:
        written = written[:0]

    def call(put: Callable[[Any], Any]) -> tuple[Any, Any]:
        pool = put(x.state) if has_state else None
        out = put(np.full_like(x.v, np.nan))
        there = {name: place.put(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
        gdr.fused_sigmoid_gating_delta_rule_update(
            place.put(x.A_log),
            put(x.a),
            place.put(x.dt_bias),
            1.0,
            20.0,
            put(x.q),
            put(x.k),
            put(x.v),
            put(x.b),
            pool,
            place.put(x.slots) if has_state else None,
            cu_seqlens=place.put(x.cu_seqlens),
            state_layout=layout,
            out=out,
            **there,
        )
        return to_numpy(out), to_numpy(pool)

    o, pool = call(place.strided if case.strided else place.put)
    o_again, pool_again = call(place.put)
    want_o, want_pool = reference.fused_sigmoid_gating_delta_rule_update(
        x.A_log,
        x.a,
        x.dt_bias,
        1.0,
        20.0,
        x.q,
        x.k,
        x.v,
        x.b,
        x.state if has_state else None,
        x.slots if has_state else None,
        cu_seqlens=x.cu_seqlens,
        state_layout=layout,
        **options,
    )
    limit, state_limit = _limits(case, place, x.v.dtype.name, x.state.dtype.name)
    _compare(result, "output", o, want_o, limit)
    _same_bits(result, "the output's bits differ from one run to the next", o, o_again)
    if pool is not None:
        _same_bits(result, "the states' bits differ from one run to the next", pool, pool_again)
        others = np.setdiff1d(np.arange(len(pool)), written)
        _same_bits(result, "a slot that no sequence writes has changed", pool[others], x.state[others])
        if written.size:
            _compare(result, "state", pool[written], want_pool[written], state_limit)  # type: ignore[index]


def _given(case: Case, place: Place, x: Any, result: Result) -> None:
    import numpy as np

    import gdr
    from gdr import reference
    from gdr.testing import to_numpy

    function = gdr.chunk_gated_delta_rule if case.op == "chunk" else gdr.fused_recurrent_gated_delta_rule
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "initial_state": x.initial_state, **case.options}
    options = {"output_final_state": True, **options, "state_layout": case.inputs["layout"]}
    operands = [x.q, x.k, x.v, x.g, x.beta]

    def call(put: Callable[[Any], Any]) -> tuple[Any, Any]:
        there = {name: put(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
        there |= {"cu_seqlens": place.put(x.cu_seqlens), "out": put(np.full_like(x.v, np.nan))}
        _, h = function(*(put(v) for v in operands), **there)
        out = there["out"]
        return to_numpy(out), to_numpy(h)

    o, h = call(place.strided if case.strided else place.put)
    o_again, h_again = call(place.put)
    options["cu_seqlens"] = x.cu_seqlens
    want_o, want_h = reference.fused_recurrent_gated_delta_rule(*operands, **options)
    # The final state is float32 whatever the pool's dtype.
    limit, state_limit = _limits(case, place, x.v.dtype.name, "float64" if x.v.dtype == np.float64 else "float32")
    _compare(result, "output", o, want_o, limit)
    _same_bits(result, "the output's bits differ from one run to the next", o, o_again)
    if h is not None:
        _compare(result, "state", h, want_h, state_limit)
        _same_bits(result, "the states' bits differ from one run to the next", h, h_again)


def _gate(case: Case, place: Place, x: Any, result: Result) -> None:
    import gdr
    from gdr.testing import to_numpy

    raw = (x.A_log, x.a, x.dt_bias, x.b)
    got = gdr.gated_delta_rule_gate(*(place.put(v) for v in raw))
    for array, want in zip(got, gdr.reference.gated_delta_rule_gate(*raw), strict=True):
        array = to_numpy(array)
        _compare(result, "output", array, want, LIMITS[array.dtype.name])


def _ring(case: Case, place: Place, x: Any, result: Result) -> None:
    """Steps of two sequences with deferred write-back, then drafts of which some are committed, and one more step."""
    import numpy as np

    import gdr
    from gdr import reference
    from gdr.testing import to_numpy

    layout, T = case.inputs["layout"], case.inputs["T"]
    H, HV, K, V = (int(case.inputs[name]) for name in ("H", "HV", "K", "V"))
    state = gdr.DeltaRuleState(
        len(x.state),
        HV,
        K,
        V,
        num_k_heads=H,
        A_log=place.put(x.A_log),
        dt_bias=place.put(x.dt_bias),
        dtype=x.state.dtype.name,
        layout=layout,
        device="cpu" if place.ordinal is None else f"cuda:{place.ordinal}",
        ring=5,
    )
    slots = state.alloc(2)
    state.write(slots, place.put(x.state[:2]))

    def tokens(first: int, last: int) -> dict[str, Any]:
        return {name: place.put(np.ascontiguousarray(getattr(x, name)[:, first:last])) for name in "qkvab"}

    steps, drafts = T - 5, 4
    outputs = [to_numpy(state.step(**tokens(t, t + 1), slots=slots)) for t in range(steps)]
    outputs.append(to_numpy(state.verify(**tokens(steps, steps + drafts), slots=slots)))
    state.commit(slots, np.array([drafts, 1]))
    after = to_numpy(state.step(**tokens(T - 1, T), slots=slots))
    head = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b)
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "state_layout": layout}
    want_o, _ = reference.fused_sigmoid_gating_delta_rule_update(*head, x.state, np.arange(2), **options)
    limit, state_limit = _limits(case, place, x.v.dtype.name, x.state.dtype.name)
    # States and updates of 16 bits are rounded under way, which the outputs see.
    limit = limit if x.state.dtype.itemsize > 2 else max(limit, 4 * state_limit)
    _compare(result, "output", np.concatenate(outputs, axis=1), want_o[:, : T - 1], limit)
    for n, kept in enumerate((drafts, 1)):
        path = [*range(steps + kept), T - 1]
        a, q, k, v, b = (getattr(x, name)[n : n + 1, path] for name in "aqkvb")
        head = (x.A_log, a, x.dt_bias, 1.0, 20.0, q, k, v, b)
        want_o, want = reference.fused_sigmoid_gating_delta_rule_update(
            *head, x.state[n : n + 1], np.zeros(1, int), **options
        )
        assert want is not None
        _compare(result, "output", after[n : n + 1], want_o[:, -1:], limit)
        error_limit = state_limit if x.state.dtype.itemsize > 2 else 4 * state_limit
        _compare(result, "state", to_numpy(state.read(slots[n : n + 1])), want, error_limit)


def _pool(case: Case, place: Place, x: Any, result: Result) -> None:
    """A prompt of two sequences through `prefill`, then one token of each through `step`."""
    import numpy as np

    import gdr
    from gdr import reference
    from gdr.testing import make_inputs, to_numpy

    layout, types = case.inputs["layout"], {k: case.inputs[k] for k in ("H", "HV", "K", "V", "dtype")}
    device = "cpu" if place.ordinal is None else f"cuda:{place.ordinal}"
    H, HV, K, V = (case.inputs[name] for name in ("H", "HV", "K", "V"))
    state = gdr.DeltaRuleState(
        len(x.state),
        HV,
        K,
        V,
        num_k_heads=H,
        A_log=place.put(x.A_log),
        dt_bias=place.put(x.dt_bias),
        dtype=x.state.dtype.name,
        layout=layout,
        device=device,
    )
    slots = state.alloc(2)
    q, k, v, a, b = (place.put(v) for v in (x.q, x.k, x.v, x.a, x.b))
    o = state.prefill(q, k, v, a, b, slots, place.put(x.cu_seqlens))
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "state_layout": layout}
    limit, state_limit = _limits(case, place, x.v.dtype.name, x.state.dtype.name)
    head = (x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b)
    zero = np.zeros_like(x.state)
    want_o, want = reference.fused_sigmoid_gating_delta_rule_update(
        *head, zero, slots, cu_seqlens=x.cu_seqlens, **options
    )
    _compare(result, "output", to_numpy(o), want_o, limit)

    # The step starts from the states that the prompt left, so that its own error is what is measured.
    before = to_numpy(state.pool).copy()
    assert want is not None
    _compare(result, "state", before[slots], want[slots], state_limit)
    y = make_inputs(B=2, T=1, seed=case.inputs["seed"] + 1, gate_dtype=x.a.dtype.name, **types)
    q, k, v, a, b = (place.put(v) for v in (y.q, y.k, y.v, y.a, y.b))
    o = state.step(q, k, v, a, b, slots)
    head = (x.A_log, y.a, x.dt_bias, 1.0, 20.0, y.q, y.k, y.v, y.b)
    want_o, want = reference.fused_sigmoid_gating_delta_rule_update(*head, before, slots, **options)
    assert want is not None
    _compare(result, "output", to_numpy(o), want_o, limit)
    _compare(result, "state", to_numpy(state.read(slots)), want[slots], state_limit)
    others = np.setdiff1d(np.arange(len(before)), slots)
    _same_bits(result, "a slot that no sequence writes has changed", to_numpy(state.pool)[others], before[others])


_OPERATIONS: dict[str, Callable[[Case, Place, Any, Result], None]] = {
    "update": _update,
    "recurrent": _given,
    "chunk": _given,
    "gate": _gate,
    "pool": _pool,
    "ring": _ring,
}

_TITLES = {
    "update": "fused_sigmoid_gating_delta_rule_update",
    "recurrent": "fused_recurrent_gated_delta_rule",
    "chunk": "chunk_gated_delta_rule",
    "gate": "gated_delta_rule_gate",
    "pool": "DeltaRuleState",
    "ring": "DeltaRuleState, ring=",
}


def table(results: Sequence[Result]) -> str:
    """The worst errors of each operation, dtype, state dtype and layout."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        inputs = result.case.inputs
        state = inputs.get("state_dtype") or ("float64" if inputs["dtype"] == "float64" else "float32")
        pool = ("", "") if result.case.op == "gate" else (state, inputs["layout"])
        key = (result.case.place, _TITLES[result.case.op], inputs["dtype"], *pool)
        groups.setdefault(key, []).append(result)
    header: tuple[str, ...] = (
        "",
        "operation",
        "dtype",
        "state",
        "layout",
        "cases",
        "output",
        "limit",
        "state",
        "limit",
        "",
    )
    rows = [header]
    order = list(_TITLES.values())
    for key, members in sorted(groups.items(), key=lambda group: order.index(group[0][1])):
        bad = any(member.failures for member in members)
        # The case that comes closest to its limit speaks for the group; a NaN is worse than any.
        output = max(members, key=lambda m: _ratio(m.output, m.output_limit))
        with_state = [m for m in members if m.state is not None]
        state_cells = ("", "")
        if with_state:
            worst = max(with_state, key=lambda m: _ratio(m.state, m.state_limit))
            state_cells = (f"{worst.state:.1e}", f"{worst.state_limit:g}")
        errors = (f"{output.output:.1e}", f"{output.output_limit:g}", *state_cells)
        rows.append((*key, str(len(members)), *errors, "FAILED" if bad else "ok"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    right = range(5, 10)
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def _ratio(error: float | None, limit: float) -> float:
    if error is None or not limit:
        return 0.0
    return error / limit if error == error else float("inf")
