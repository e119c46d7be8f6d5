"""What the benchmarks share: shapes, backends, and how time on the host and on a device is taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

BACKENDS = ["numpy", "numba", "cuda"]

# H, HV, K, V
SHAPES = {
    "qwen3-next": (16, 32, 128, 128),
    "tp8-397b": (2, 8, 128, 128),
    "small": (4, 4, 16, 16),
}


def use(backend: str) -> Any:
    """Choose a backend and return its array library; skips the benchmark where this machine does not have it."""
    if backend == "cuda":
        return cupy()
    if backend == "numba" and (find_spec("numba") is None or find_spec("gdr._numba_fused_recurrent") is None):
        raise NotImplementedError("no Numba backend here")
    os.environ["GDR_CPU"] = backend
    return np


def cupy() -> Any:
    """CuPy, where there is a GPU."""
    try:
        import cupy
    except ImportError:
        raise NotImplementedError("no CuPy here") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        raise NotImplementedError("no GPU here") from None
    return cupy


def normal(xp: Any, shape: Sequence[int], dtype: str = "float32", seed: int = 0) -> Any:
    """Standard normal numbers, drawn on the host so that every machine has the same."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return xp.asarray(x.astype(numpy_dtype(dtype)))


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def synchronize(xp: Any) -> None:
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def host_seconds(call: Callable[[], Any], budget: float = 0.3) -> float:
    """Seconds of a call on the host, the best of as many as fit into `budget`, at least 3."""
    call()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < budget:
        started = time.perf_counter()
        call()
        took = time.perf_counter() - started
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def launch_seconds(xp: Any, call: Callable[[], Any], calls: int = 50, repeats: int = 9) -> float:
    """Seconds the host takes to launch a call, the median of `repeats`; the device is idle before each."""
    call()
    took = []
    for _ in range(repeats):
        synchronize(xp)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        took.append((time.perf_counter() - started) / calls)
    return float(np.median(took))


def device_seconds(xp: Any, calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Seconds a call takes on the device, the median of `repeats` replays of one graph that holds all `calls`.

    Events enclose the replay, so neither the host's launches nor its interpreter are in it.  Give calls that touch
    more memory together than the L2 cache holds, and every one starts cold.
    """
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        took = []
        for _ in range(repeats):
            start, stop = xp.cuda.Event(), xp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            took.append(xp.cuda.get_elapsed_time(start, stop) / 1e3 / len(calls))
    return float(np.median(took))


def loop_seconds(xp: Any, call: Callable[[], Any], calls: int = 10, repeats: int = 5) -> float:
    """Seconds a call of long work takes on the device: events around a loop of calls, the median of `repeats`."""
    call()
    stream = xp.cuda.get_current_stream()
    took = []
    for _ in range(repeats):
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        stream.synchronize()
        start.record(stream)
        for _ in range(calls):
            call()
        stop.record(stream)
        stop.synchronize()
        took.append(xp.cuda.get_elapsed_time(start, stop) / 1e3 / calls)
    return float(np.median(took))
