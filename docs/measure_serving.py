"""Measure continuous batching on a GPU, in tokens a second: writes docs/data/serving-NAME.json.

    [GDR_SGLANG_KERNEL=.../fused_sigmoid_gating_recurrent.py] python docs/measure_serving.py NAME

A server of eight layers and nothing else.  Sequences arrive at random moments with a prompt's state, take a step at a
time together with whatever else is there, and leave after a random number of steps; those that find no room wait.
Every step is the replay of a CUDA graph, captured for an eighth of the limit, two eighths, .., and rows without a
sequence are padding.  All implementations serve the same sequences; SGLang's Triton kernel is one of them where
GDR_SGLANG_KERNEL is the path of its file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]

import sglang_kernel

import gdr
from provenance import provenance, write

H, HV, D, LAYERS, CAPACITY = 16, 32, 128, 8, 16
LIMITS = (8, 32, 128, 256)
STEPS, LENGTH, LOAD = 256, 200, 0.95
KERNEL = os.environ.get("GDR_SGLANG_KERNEL", "")
NOTE = (
    f"Tokens a second through {LAYERS} layers, each with a pool of states: H=16 HV=32, K=V=128, layout vk, bfloat16 q, "
    f"k, v, a, b. Sequences arrive as a Poisson process and stay {LENGTH} steps in the mean, {LOAD:.0%} of what the "
    "limit could serve. Every step is the replay of a CUDA graph; the median of three runs."
)


class Step(NamedTuple):
    """One step of the server: where new sequences are put, and the slots of all."""

    arrived: list[int]
    live: list[int]


def schedule(limit: int, seed: int = 0) -> list[Step]:
    """Who is there at each step; it begins as it goes on, with sequences that came before."""
    rng = np.random.default_rng(seed)
    free, left, waiting, steps = list(range(limit))[::-1], {}, [], []
    waiting += rng.geometric(1 / LENGTH, int(limit * LOAD)).tolist()
    for _ in range(STEPS):
        waiting += rng.geometric(1 / LENGTH, rng.poisson(LOAD * limit / LENGTH)).tolist()
        arrived = []
        while waiting and free:
            arrived.append(free.pop())
            left[arrived[-1]] = waiting.pop(0)
        steps.append(Step(arrived, sorted(left)))
        for slot in [slot for slot, steps_left in left.items() if steps_left == 1]:
            del left[slot]
            free.append(slot)
        left = {slot: steps_left - 1 for slot, steps_left in left.items()}
    return steps


class Server:
    """Pools of all layers, and graphs of a step for some numbers of rows.

    `step(layer, x, slots, out)` runs one token of each row of a layer, `admit(slots, states)` puts prompts' states into
    the slots of every layer.
    """

    def __init__(self, limit: int, step: Callable[..., None], admit: Callable[[Any, Any], None]) -> None:
        self.admit, self.rows = admit, sorted({max(1, limit * i // 8) for i in range(1, 9)})
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = {"q": (1, H, D), "k": (1, H, D), "v": (1, HV, D), "a": (1, HV), "b": (1, HV)}

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(limit, *shape, device="cuda", generator=generator).bfloat16()

        inputs = [{name: normal(shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
        outs = [torch.empty_like(x["v"]) for x in inputs]
        self.slots = torch.full((limit,), -1, dtype=torch.int32, device="cuda")
        self.graphs = {}
        for rows in self.rows:
            parts = [{name: x[:rows] for name, x in layer.items()} for layer in inputs]

            def work(rows: int = rows, parts: list[dict[str, torch.Tensor]] = parts) -> None:
                for layer, x in enumerate(parts):
                    step(layer, x, self.slots[:rows], outs[layer][:rows])

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows]):
                work()

    def serve(self, steps: list[Step], prompts: Any) -> tuple[int, float]:
        """Tokens, and the seconds that they took."""
        padded = [step.live + [-1] * (len(self.slots) - len(step.live)) for step in steps]
        slots = torch.tensor(padded, dtype=torch.int32, device="cuda")
        arrivals = [torch.tensor(step.arrived, dtype=torch.int32, device="cuda") for step in steps]
        tokens, before = 0, None
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i, step in enumerate(steps):
            if step.arrived:
                self.admit(arrivals[i], prompts)
            if step.live != before:
                self.slots.copy_(slots[i])
                before = step.live
            if step.live:
                self.graphs[next(rows for rows in self.rows if rows >= len(step.live))].replay()
            tokens += len(step.live)
        torch.cuda.synchronize()
        return tokens, time.perf_counter() - start


def heads() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.uniform(0, 2, HV).astype(np.float32), rng.standard_normal(HV).astype(np.float32)


def gdr_server(limit: int, dtype: str, ring: int) -> Server:
    A_log, dt_bias = map(cupy.asarray, heads())
    kwargs = {"num_k_heads": H, "A_log": A_log, "dt_bias": dt_bias, "dtype": dtype, "layout": "vk", "device": "cuda"}
    pools = [gdr.DeltaRuleState(limit, HV, D, D, ring=ring, **kwargs) for _ in range(LAYERS)]
    for pool in pools:
        pool.alloc(limit)

    def step(layer: int, x: dict[str, torch.Tensor], slots: torch.Tensor, out: torch.Tensor) -> None:
        pools[layer].step(x["q"], x["k"], x["v"], x["a"], x["b"], slots, out=out)

    def admit(slots: torch.Tensor, states: torch.Tensor) -> None:
        for pool in pools:
            pool.write(slots, states[: len(slots)])

    return Server(limit, step, admit)


def sglang_server(limit: int, dtype: str) -> Server:
    update = sglang_kernel.load(KERNEL)
    A_log, dt_bias = (torch.from_numpy(x).cuda() for x in heads())
    pools = [torch.zeros(limit, HV, D, D, dtype=getattr(torch, dtype), device="cuda") for _ in range(LAYERS)]
    offsets = torch.arange(limit + 1, dtype=torch.int32, device="cuda")

    def step(layer: int, x: dict[str, torch.Tensor], slots: torch.Tensor, out: torch.Tensor) -> None:
        q, k, v = (x[name].transpose(0, 1) for name in "qkv")
        gates = x["a"][:, 0], dt_bias, 1.0, 20.0, q, k, v, x["b"][:, 0]
        rest = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": offsets[: len(slots) + 1]}
        update(A_log, *gates, pools[layer], slots, **rest)

    def admit(slots: torch.Tensor, states: torch.Tensor) -> None:
        for pool in pools:
            pool[slots.long()] = states[: len(slots)]

    return Server(limit, step, admit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help='of the GPU in the file\'s name, "h100"')
    name = parser.parse_args().name
    rows = []
    for dtype in ("float32", "bfloat16"):
        servers: dict[str, Callable[[int, str], Server]] = {
            "gdr in place": lambda limit, dtype: gdr_server(limit, dtype, 0),
            f"gdr ring={CAPACITY}": lambda limit, dtype: gdr_server(limit, dtype, CAPACITY),
        }
        if KERNEL:
            servers["SGLang"] = sglang_server
        for limit in LIMITS:
            steps = schedule(limit)
            prompts = (torch.randn(limit, HV, D, D, device="cuda") * 0.1).to(getattr(torch, dtype))
            for impl, make in servers.items():
                server = make(limit, dtype)
                server.serve(steps[:32], prompts)
                runs = [server.serve(steps, prompts) for _ in range(3)]
                tokens, seconds = sorted(runs, key=lambda run: run[1])[1]
                row = {"dtype": dtype, "limit": limit, "impl": impl, "tokens": tokens, "seconds": round(seconds, 4)}
                rows.append(row | {"tokens_per_second": round(tokens / seconds)})
                print(rows[-1], flush=True)
                del server
                torch.cuda.empty_cache()
                cupy.get_default_memory_pool().free_all_blocks()
    head = provenance("cuda")
    head["versions"]["torch"] = torch.__version__
    write(f"serving-{name}", head | {"note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
