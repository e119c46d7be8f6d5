"""Deferred write-back and speculative decoding of `DeltaRuleState`."""

from __future__ import annotations

import numpy as np

import gdr

from .common import SHAPES, normal, synchronize, use

BACKENDS = ["numpy", "cuda"]


class _Pool:
    """A pool of a batch that has taken a period of steps, so that slots fold at different times."""

    def setup(self, backend, batch, ring, T=1):
        self.xp = use(backend)
        H, HV, K, V = SHAPES["qwen3-next"]
        self.state = gdr.DeltaRuleState(
            batch, HV, K, V, num_k_heads=H, A_log=np.zeros(HV, np.float32), ring=ring, stagger=True, layout="vk",
            device="cuda" if backend == "cuda" else "cpu",
        )  # fmt: skip
        self.slots = self.xp.asarray(self.state.alloc(batch))
        self.q, self.k = normal(self.xp, (2, batch, T, H, K), seed=1)
        self.v = normal(self.xp, (batch, T, HV, V), seed=2)
        self.a, self.b = normal(self.xp, (2, batch, T, HV), seed=3)

    def tokens(self, T):
        return tuple(x[:, :T] for x in (self.q, self.k, self.v, self.a, self.b))


class Step(_Pool):
    """One token of each of `batch` sequences, written at once (ring 0) or every 16 tokens."""

    params = [BACKENDS, [1, 8, 64], [0, 16]]
    param_names = ["backend", "batch", "ring"]

    def setup(self, backend, batch, ring):
        super().setup(backend, batch, ring)
        for _ in range(max(1, ring)):
            self.state.step(*self.tokens(1), self.slots)

    def time_step(self, backend, batch, ring):
        self.state.step(*self.tokens(1), self.slots)
        synchronize(self.xp)


class Drafts(_Pool):
    """`T` drafts of each of `batch` sequences verified, and half of them committed."""

    params = [BACKENDS, [1, 8], [2, 8]]
    param_names = ["backend", "batch", "T"]

    def setup(self, backend, batch, T):
        super().setup(backend, batch, 16, T)
        self.accepted = self.xp.full(batch, T // 2)
        self.time_verify_and_commit(backend, batch, T)

    def time_verify_and_commit(self, backend, batch, T):
        self.state.verify(*self.tokens(T), self.slots)
        self.state.commit(self.slots, self.accepted)
        synchronize(self.xp)
