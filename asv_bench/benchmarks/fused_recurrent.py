"""fused_sigmoid_gating_delta_rule_update: decoding and verifying over a state pool."""

from __future__ import annotations

import numpy as np

import gdr

from .common import (
    BACKENDS,
    SHAPES,
    device_seconds,
    host_seconds,
    launch_seconds,
    normal,
    numpy_dtype,
    synchronize,
    use,
)

_L2 = 128 * 2**20  # more than any GPU's L2 cache holds


class _Update:
    """One call of `tokens` tokens for each of `batch` sequences, over as many pools as asked for."""

    def __init__(self, xp, shape, batch, tokens, state, pools=1):
        H, HV, K, V = SHAPES[shape]
        dtype = "float32" if xp is np else "bfloat16"
        self.q, self.k = normal(xp, (2, batch, tokens, H, K), dtype, seed=1)
        self.v = normal(xp, (batch, tokens, HV, V), dtype, seed=2)
        self.a, self.b = normal(xp, (2, batch, tokens, HV), dtype, seed=3)
        self.A_log, self.dt_bias = normal(xp, (2, HV), seed=4)
        # Slots in no order, as in a pool that has been in use.
        self.slots = xp.asarray(np.random.default_rng(5).permutation(batch).astype(np.int32))
        first = normal(xp, (batch, HV, K, V), state, seed=6)
        self.pools = [first, *(first.copy() for _ in range(pools - 1))]
        self.out = xp.empty_like(self.v)
        self.state_bytes = 2 * first.nbytes  # read and written

    def call(self, pool=0):
        return gdr.fused_sigmoid_gating_delta_rule_update(
            self.A_log, self.a, self.dt_bias, 1.0, 20.0, self.q, self.k, self.v, self.b, self.pools[pool], self.slots,
            use_qk_l2norm_in_kernel=True, out=self.out,
        )  # fmt: skip

    def on_device(self, xp):
        """Seconds on the device with nothing of the states in its L2 cache."""
        return device_seconds(xp, [lambda i=i: self.call(i) for i in range(len(self.pools))])


def _cold_pools(shape, batch, state):
    _, HV, K, V = SHAPES[shape]
    return 1 + _L2 // (batch * HV * K * V * numpy_dtype(state).itemsize)


class Decode:
    """One token a sequence."""

    params = [BACKENDS, ["qwen3-next", "tp8-397b"], [1, 8, 64], ["float32", "bfloat16"]]
    param_names = ["backend", "shape", "batch", "state"]

    def setup(self, backend, shape, batch, state):
        self.xp = use(backend)
        self.update = _Update(self.xp, shape, batch, 1, state)
        self.update.call()

    def time_decode(self, backend, shape, batch, state):
        self.update.call()
        synchronize(self.xp)


class DecodeSmall:
    """The smallest shape, where the call itself is what costs: 4 sequences of 8 tokens, H = HV = 4, K = V = 16."""

    params = [BACKENDS]
    param_names = ["backend"]

    def setup(self, backend):
        self.xp = use(backend)
        self.update = _Update(self.xp, "small", 4, 8, "float32")
        self.update.call()

    def time_small(self, backend):
        self.update.call()
        synchronize(self.xp)


class Traffic:
    """GB/s of state read and written; on a device with a cold L2 cache."""

    params = [BACKENDS, [8, 64], ["float32", "bfloat16"]]
    param_names = ["backend", "batch", "state"]

    def setup(self, backend, batch, state):
        self.xp = use(backend)
        pools = _cold_pools("qwen3-next", batch, state) if backend == "cuda" else 1
        self.update = _Update(self.xp, "qwen3-next", batch, 1, state, pools)

    def track_state_traffic(self, backend, batch, state):
        seconds = host_seconds(self.update.call) if self.xp is np else self.update.on_device(self.xp)
        return self.update.state_bytes / seconds / 1e9

    track_state_traffic.unit = "GB/s"


class Device:
    """A GPU's own time with a cold L2 cache, and the host's for launching."""

    params = [["qwen3-next", "tp8-397b"], [1, 8, 64], [1, 4], ["float32", "bfloat16"]]
    param_names = ["shape", "batch", "tokens", "state"]

    def setup(self, shape, batch, tokens, state):
        self.xp = use("cuda")
        self.update = _Update(self.xp, shape, batch, tokens, state, _cold_pools(shape, batch, state))
        self.update.call()

    def track_device_microseconds(self, shape, batch, tokens, state):
        return 1e6 * self.update.on_device(self.xp)

    def track_host_microseconds(self, shape, batch, tokens, state):
        return 1e6 * launch_seconds(self.xp, self.update.call)

    track_device_microseconds.unit = track_host_microseconds.unit = "us"


class Accuracy:
    """Relative RMS error against float64 after 256 tokens."""

    params = [BACKENDS, ["float32", "float16", "bfloat16"]]
    param_names = ["backend", "dtype"]

    def setup(self, backend, dtype):
        use(backend)
        xp = "cupy" if backend == "cuda" else "numpy"
        self.x = gdr.testing.make_inputs(B=1, T=256, H=2, HV=4, K=64, V=64, dtype=dtype, seed=7, xp=xp)

    def track_error(self, backend, dtype):
        x = self.x
        got, _ = gdr.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm_in_kernel=True)
        host = [gdr.testing.to_numpy(y).astype(np.float64) for y in (x.q, x.k, x.v, x.g, x.beta)]
        want, _ = gdr.reference.fused_recurrent_gated_delta_rule(*host, use_qk_l2norm_in_kernel=True)
        return gdr.testing.relative_rms(gdr.testing.to_numpy(got), want)

    track_error.unit = "relative RMS"
