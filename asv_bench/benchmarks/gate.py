"""gated_delta_rule_gate."""

from __future__ import annotations

import gdr

from .common import BACKENDS, normal, synchronize, use


class Gate:
    """The gates of 32 value heads."""

    params = [BACKENDS, [1, 1024]]
    param_names = ["backend", "tokens"]

    def setup(self, backend, tokens):
        self.xp = use(backend)
        self.A_log, self.dt_bias = normal(self.xp, (2, 32), seed=1)
        self.a, self.b = normal(self.xp, (2, 1, tokens, 32), seed=2)
        self.time_gate(backend, tokens)

    def time_gate(self, backend, tokens):
        gdr.gated_delta_rule_gate(self.A_log, self.a, self.dt_bias, self.b)
        synchronize(self.xp)
