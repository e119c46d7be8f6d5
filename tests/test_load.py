"""Continuous batching at load: arrivals, forks and departures, with float64 replays of sampled sequences.

A few seconds as a test.  ``python tests/test_load.py --seconds 120`` runs it at length and prints what was
done.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from places import Place

from gdr import DeltaRuleState, reference
from gdr.testing import make_inputs, relative_rms

SECONDS = float(os.environ.get("GDR_LOAD_SECONDS", "2"))
DEPARTURES = 300  # at least, of a thread in each part of a run
SLOTS, H, HV, K, V = 48, 1, 2, 32, 32
BANK = 4096
OPERANDS = ("q", "k", "v", "a", "b")


@dataclass
class Request:
    """One sequence: its tokens are stretches of the bank; a forked one shares its parent's first
    stretches."""

    slot: int
    stretches: list[tuple[int, int]]
    to_decode: int
    sampled: bool
    outputs: list[np.ndarray] = field(default_factory=list)

    def token(self) -> int:
        """Index in the bank of the token that comes next; it counts as taken."""
        start, count = self.stretches[-1]
        self.stretches[-1] = (start, count + 1)
        return (start + count) % BANK

    def tokens(self) -> np.ndarray:
        return np.concatenate([(start + np.arange(count)) % BANK for start, count in self.stretches])


class Server:
    """A pool with requests that come, run and go."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place, self.rng = place, np.random.default_rng(seed)
        self.bank = make_inputs(B=1, T=BANK, H=H, HV=HV, K=K, V=V, normalize=False, gates="slow", seed=seed)
        self.there = {name: place.put(getattr(self.bank, name)[0]) for name in OPERANDS}
        self.state = DeltaRuleState(
            SLOTS,
            HV,
            K,
            V,
            num_k_heads=H,
            A_log=place.put(self.bank.A_log),
            dt_bias=place.put(self.bank.dt_bias),
            device="cpu" if place.on_host else "cuda",
        )
        self.running: list[Request] = []
        self.done = dict.fromkeys(
            ("arrivals", "forks", "departures", "steps", "prefills", "tokens", "refusals", "reloads", "replays"), 0
        )
        self.worst = 0.0

    def gather(self, index: np.ndarray) -> list:
        index = self.place.put(index)
        return [self.there[name][index] for name in OPERANDS]

    def arrive(self) -> None:
        wanted = int(self.rng.integers(1, 9))
        try:
            slots = self.state.alloc(wanted)
        except ValueError:
            self.done["refusals"] += 1
            return
        lengths = np.minimum(self.rng.geometric(0.02, size=wanted), 400)
        lengths[self.rng.random(wanted) < 0.05] = 0
        starts = self.rng.integers(0, BANK, size=wanted)
        requests = [
            Request(int(slot), [(int(start), int(n))], int(self.rng.geometric(0.03)), self.rng.random() < 0.1)
            for slot, start, n in zip(slots, starts, lengths, strict=True)
        ]
        index = np.concatenate([r.tokens() for r in requests])
        cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
        operands = [x[None] for x in self.gather(index)]
        o = self.state.prefill(*operands, slots, self.place.put(cu_seqlens))
        if any(r.sampled for r in requests):
            o = self.place.get(o)[0]
            for r, bos, eos in zip(requests, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
                if r.sampled:
                    r.outputs.append(o[bos:eos])
        self.running += requests
        self.done["arrivals"] += wanted
        self.done["prefills"] += 1
        self.done["tokens"] += len(index)

    def fork(self) -> None:
        parent = self.running[self.rng.integers(len(self.running))]
        count = int(self.rng.integers(1, 4))
        try:
            slots = self.state.fork([parent.slot] * count)
        except ValueError:
            self.done["refusals"] += 1
            return
        for slot in slots:
            start = int(self.rng.integers(0, BANK))
            self.running.append(
                Request(
                    int(slot),
                    [*parent.stretches, (start, 0)],
                    int(self.rng.geometric(0.05)),
                    parent.sampled,
                    list(parent.outputs),
                )
            )
        self.done["forks"] += count

    def step(self) -> None:
        order = self.rng.permutation(len(self.running))
        batch: list[Request | None] = [self.running[i] for i in order]
        for _ in range(self.rng.integers(0, 3)):
            batch.insert(int(self.rng.integers(len(batch) + 1)), None)
        slots = np.array([-1 if r is None else r.slot for r in batch], np.int32)
        index = np.array([0 if r is None else r.token() for r in batch])
        o = self.state.step(*self.gather(index), slots)
        if any(r is not None and r.sampled for r in batch):
            o = self.place.get(o)
            for row, r in enumerate(batch):
                if r is None:
                    assert not o[row].any()
                elif r.sampled:
                    r.outputs.append(o[row : row + 1])
        for r in self.running:
            r.to_decode -= 1
        self.done["steps"] += 1
        self.done["tokens"] += len(self.running)

    def depart(self) -> None:
        leaving = [r for r in self.running if r.to_decode <= 0]
        for r in leaving:
            if r.sampled:
                self.replay(r)
        if leaving:
            self.state.free([r.slot for r in leaving])
        self.running = [r for r in self.running if r.to_decode > 0]
        self.done["departures"] += len(leaving)

    def replay(self, r: Request) -> None:
        """Run a whole sequence again in float64, and compare all that it gave and what it left."""
        x, index = self.bank, r.tokens()
        q, k, v, a, b = (getattr(x, name)[:, index] for name in OPERANDS)
        o, pool = reference.fused_sigmoid_gating_delta_rule_update(
            x.A_log, a, x.dt_bias, 1.0, 20.0, q, k, v, b, np.zeros((1, HV, K, V)), [0], None, True
        )
        got = np.concatenate(r.outputs) if r.outputs else o[0, :0]
        errors = relative_rms(got, o[0]), relative_rms(self.place.get(self.state.read([r.slot])), pool)
        self.worst = max(self.worst, *errors)
        assert max(errors) < 1e-5, f"a sequence of {len(index)} tokens is off by {errors}"
        self.done["replays"] += 1

    def reload(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "pool"
            self.state.save(path)
            self.state = DeltaRuleState.load(path, device=self.state.device)
        self.done["reloads"] += 1

    def serve(self, until: float, departures: int) -> None:
        while time.monotonic() < until or self.done["departures"] < departures:
            if self.rng.random() < 0.25:
                self.arrive()
            if self.running and self.rng.random() < 0.1:
                self.fork()
            if self.rng.random() < 0.002:
                self.reload()
            if self.running:
                self.step()
            self.depart()
            assert self.state.num_free == SLOTS - len(self.running)
        for r in self.running:
            r.to_decode = 0
        self.depart()
        assert self.state.num_free == SLOTS
        assert not self.place.get(self.state.read(self.state.alloc(SLOTS))).any()


def resident_mib() -> float:
    gc.collect()
    if sys.platform != "linux":
        return 0.0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(place: Place, seconds: float, threads: int) -> dict:
    """Serve on several pools at once, each in a thread and on a stream of its own; return what was done."""
    failures: list[BaseException] = []

    def run(seed: int, until: float, departures: int, servers: list[Server]) -> None:
        try:
            with place.stream():
                server = Server(place, seed)
                servers.append(server)
                server.serve(until, departures)
        except BaseException as error:
            failures.append(error)

    def together(seconds: float, seed: int) -> list[Server]:
        servers: list[Server] = []
        until = time.monotonic() + seconds
        workers = [threading.Thread(target=run, args=(seed + n, until, DEPARTURES, servers)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        return servers

    # Both parts do enough that everything happens in them, however long kernels take to compile.
    together(seconds / 4, 100)  # compiles, and fills every cache
    before, device_before = resident_mib(), place.device_mib()
    servers = together(seconds * 3 / 4, 0)
    total = {name: sum(server.done[name] for server in servers) for name in servers[0].done}
    worst = max(server.worst for server in servers)
    del servers
    growth, device_growth = resident_mib() - before, place.device_mib() - device_before
    return {
        "threads": threads,
        **total,
        "worst": worst,
        "growth_mib": round(growth, 1),
        "device_growth_mib": round(device_growth, 1),
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_lost_under_load(place, threads):
    done = serve(place, SECONDS, threads)
    assert done["departures"] == done["arrivals"] + done["forks"]
    assert min(done["replays"], done["forks"], done["refusals"], done["prefills"]) > 0, done
    assert done["growth_mib"] < 32, done
    assert done["device_growth_mib"] < 1, done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--place", choices=["numpy", "numba", "cuda"], default="numpy")
    options = parser.parse_args()
    if options.place != "cuda":
        os.environ["GDR_CPU"] = options.place
    print(json.dumps({"place": options.place} | serve(Place(options.place), options.seconds, options.threads)))
