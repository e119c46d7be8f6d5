"""Continuous batching: requests arrive, wait for a slot, are prefilled, decode together, and leave.

    python docs/examples/continuous_batching.py [--requests 60] [--slots 8] [--check]

Every turn of the loop admits who fits, prefills the newcomers as one varlen batch, and steps everybody else by one
token in one call.  With --check each request is then run alone, which must give the same outputs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np

import gdr
from gdr.testing import assert_close

H, HV, K, V = 2, 4, 64, 64
SHAPES = ((H, K), (H, K), (HV, V), (HV,), (HV,))  # of q, k, v, a and b


@dataclass
class Request:
    """A prompt and a number of tokens to decode, and what came of it."""

    number: int
    arrives: int
    prompt: int
    tokens: int
    slot: int = -1
    outputs: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.number)
        self._drawn = [rng.standard_normal((self.prompt + self.tokens, *shape), np.float32) for shape in SHAPES]

    def projections(self, start: int, count: int) -> list[np.ndarray]:
        """The q, k, v, a and b of some of its tokens: random, where a model would compute them."""
        return [x[start : start + count] for x in self._drawn]

    @property
    def done(self) -> int:
        """Tokens that it has behind it."""
        return sum(map(len, self.outputs))


def serve(requests: list[Request], slots: int) -> tuple[int, float]:
    """Serve all requests from a pool; returns the number of turns and the mean occupancy of the pool."""
    state = gdr.DeltaRuleState(slots, HV, K, V, num_k_heads=H, A_log=np.zeros(HV))
    waiting, running = list(requests), []
    turn, occupied = 0, 0
    while waiting or running:
        arrived = [request for request in waiting if request.arrives <= turn][: state.num_free]
        if arrived:
            waiting = [request for request in waiting if request not in arrived]
            for request, slot in zip(arrived, state.alloc(len(arrived))):
                request.slot = int(slot)
            parts = [gdr.varlen.pack(x)[0] for x in zip(*(r.projections(0, r.prompt) for r in arrived))]
            offsets = gdr.varlen.cu_seqlens_of([request.prompt for request in arrived])
            o = state.prefill(*parts, [request.slot for request in arrived], offsets)
            for request, output in zip(arrived, gdr.varlen.unpack(o, offsets)):
                request.outputs.append(output)
        if running:
            token = [np.concatenate(x) for x in zip(*(r.projections(r.done, 1) for r in running))]
            o = state.step(*token, [request.slot for request in running])
            for request, output in zip(running, o):
                request.outputs.append(output[None])
        running += arrived
        finished = [request for request in running if request.done == request.prompt + request.tokens]
        if finished:
            state.free([request.slot for request in finished])
            running = [request for request in running if request not in finished]
        turn, occupied = turn + 1, occupied + slots - state.num_free
    return turn, occupied / (turn * slots)


def check(request: Request) -> None:
    """Compare with the request alone, token by token."""
    q, k, v, a, b = (x[None] for x in request.projections(0, request.prompt + request.tokens))
    zeros = np.zeros(HV, np.float32)
    want = gdr.fused_sigmoid_gating_delta_rule_update(
        zeros, a, zeros, 1.0, 20.0, q, k, v, b, use_qk_l2norm_in_kernel=True
    )
    assert_close(np.concatenate(request.outputs), want[0], rtol=1e-5, name=f"request {request.number}")


def main() -> None:
    """Draw requests, serve them, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="run each request alone as well and compare")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.poisson(3, args.requests))
    requests = [
        Request(n, int(arrival), int(rng.integers(1, 200)), int(rng.integers(1, 60)))
        for n, arrival in enumerate(arrivals)
    ]
    started = time.perf_counter()
    turns, occupancy = serve(requests, args.slots)
    seconds = time.perf_counter() - started
    tokens = sum(request.prompt + request.tokens for request in requests)
    print(
        f"{args.requests} requests, {tokens:,} tokens, {turns} turns, {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s"
    )
    print(f"the pool of {args.slots} slots was {occupancy:.0%} occupied")
    if args.check:
        for request in requests:
            check(request)
        print("every request has the outputs that it has alone")


if __name__ == "__main__":
    main()
