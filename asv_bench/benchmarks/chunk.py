"""chunk_gated_delta_rule: prefill."""

from __future__ import annotations

import numpy as np

import gdr

from .common import BACKENDS, SHAPES, host_seconds, loop_seconds, normal, synchronize, use


class _Prefill:
    """One call over packed sequences of the given lengths."""

    def __init__(self, xp, shape, lengths):
        H, HV, K, V = SHAPES[shape]
        dtype = "float32" if xp is np else "bfloat16"
        tokens = sum(lengths)
        self.q, self.k = normal(xp, (2, 1, tokens, H, K), dtype, seed=1)
        self.v = normal(xp, (1, tokens, HV, V), dtype, seed=2)
        self.g = -0.1 * abs(normal(xp, (1, tokens, HV), seed=3))
        self.beta = 1 / (1 + xp.exp(normal(xp, (1, tokens, HV), seed=4)))
        self.cu_seqlens = xp.asarray(gdr.varlen.cu_seqlens_of(lengths))
        self.h = xp.zeros((len(lengths), HV, K, V), np.float32)
        self.out = xp.empty_like(self.v)
        # What the recurrence itself needs: h^T k, the write and h^T q, 2 K V flops each.
        self.flops = 6 * tokens * HV * K * V

    def call(self):
        return gdr.chunk_gated_delta_rule(
            self.q, self.k, self.v, self.g, self.beta, initial_state=self.h, output_final_state=True,
            use_qk_l2norm_in_kernel=True, cu_seqlens=self.cu_seqlens, out=self.out,
        )  # fmt: skip


_LENGTHS = {
    "1x512": [512],
    "1x2048": [2048],
    "8x256": [256] * 8,
    "1x16384": [16384],
    "8192+3x2730": [8192, *[2730] * 3],
}


class Prefill:
    """Sequences of the length that a CPU is asked for; longer ones on a device alone."""

    params = [BACKENDS, list(_LENGTHS)]
    param_names = ["backend", "lengths"]

    def setup(self, backend, lengths):
        self.xp = use(backend)
        if backend != "cuda" and sum(_LENGTHS[lengths]) > 2048:
            raise NotImplementedError("takes too long on a CPU")
        self.prefill = _Prefill(self.xp, "qwen3-next", _LENGTHS[lengths])
        self.prefill.call()

    def time_prefill(self, backend, lengths):
        self.prefill.call()
        synchronize(self.xp)

    def peakmem_prefill(self, backend, lengths):
        self.prefill.call()
        synchronize(self.xp)

    def track_gflops(self, backend, lengths):
        call = self.prefill.call
        return self.prefill.flops / (host_seconds(call) if self.xp is np else loop_seconds(self.xp, call)) / 1e9

    track_gflops.unit = "GFLOP/s of the recurrence"


class Accuracy:
    """Relative RMS error against float64, random keys and keys that resemble each other."""

    params = [BACKENDS, ["random", "correlated"], ["float32", "bfloat16"]]
    param_names = ["backend", "keys", "dtype"]

    def setup(self, backend, keys, dtype):
        use(backend)
        xp = "cupy" if backend == "cuda" else "numpy"
        self.x = gdr.testing.make_inputs(T=512, B=1, H=2, HV=4, K=64, V=64, keys=keys, dtype=dtype, seed=7, xp=xp)

    def track_error(self, backend, keys, dtype):
        x = self.x
        got, _ = gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm_in_kernel=True)
        host = [gdr.testing.to_numpy(y).astype(np.float64) for y in (x.q, x.k, x.v, x.g, x.beta)]
        want, _ = gdr.reference.fused_recurrent_gated_delta_rule(*host, use_qk_l2norm_in_kernel=True)
        return gdr.testing.relative_rms(gdr.testing.to_numpy(got), want)

    track_error.unit = "relative RMS"
