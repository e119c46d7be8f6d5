"""DeltaRuleState: stepping, bookkeeping, files and memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import gdr

from .common import BACKENDS, SHAPES, normal, synchronize, use


def _state(backend, num_slots, dtype="float32"):
    H, HV, K, V = SHAPES["qwen3-next"]
    return gdr.DeltaRuleState(
        num_slots, HV, K, V, num_k_heads=H, A_log=np.zeros(HV, np.float32), dtype=dtype,
        device="cuda" if backend == "cuda" else "cpu",
    )  # fmt: skip


class Step:
    """One token of each of `batch` sequences."""

    params = [BACKENDS, [1, 8, 64], ["float32", "bfloat16"]]
    param_names = ["backend", "batch", "dtype"]

    def setup(self, backend, batch, dtype):
        self.xp = use(backend)
        H, HV, K, V = SHAPES["qwen3-next"]
        self.state = _state(backend, batch, dtype)
        self.slots = self.xp.asarray(self.state.alloc(batch))
        self.q, self.k = normal(self.xp, (2, batch, H, K), seed=1)
        self.v = normal(self.xp, (batch, HV, V), seed=2)
        self.a, self.b = normal(self.xp, (2, batch, HV), seed=3)
        self.time_step(backend, batch, dtype)

    def time_step(self, backend, batch, dtype):
        self.state.step(self.q, self.k, self.v, self.a, self.b, self.slots)
        synchronize(self.xp)


class Slots:
    """Bookkeeping over a pool of 64 slots."""

    params = [["numpy", "cuda"]]
    param_names = ["backend"]

    def setup(self, backend):
        self.xp = use(backend)
        self.state = _state(backend, 64)
        self.slots = self.state.alloc(8)
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "pool"
        self.state.save(self.path)

    def time_alloc_and_free(self, backend):
        self.state.free(self.state.alloc(8))
        synchronize(self.xp)

    def time_fork_and_free(self, backend):
        self.state.free(self.state.fork(self.slots))
        synchronize(self.xp)

    def time_save(self, backend):
        self.state.save(self.path)

    def time_load(self, backend):
        gdr.DeltaRuleState.load(self.path, device=self.state.device)
        synchronize(self.xp)


class Pool:
    """Memory of a pool of 16 slots."""

    params = [["float32", "bfloat16"]]
    param_names = ["dtype"]

    def track_bytes(self, dtype):
        return _state("numpy", 16, dtype).nbytes

    track_bytes.unit = "bytes"

    def peakmem_pool(self, dtype):
        state = _state("numpy", 16, dtype)
        state.pool[:] = 1  # a page that was never written takes no memory
