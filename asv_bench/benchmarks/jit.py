"""Compiling the CUDA kernels: what the first call of a process costs, with and without CuPy's cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from .common import cupy

_FIRST_CALL = """
import time
import cupy, gdr
cupy.zeros(1).sum().item()  # CUDA itself is up
x = gdr.testing.make_inputs(B=1, T={tokens}, H=2, HV=4, K=128, V=128, dtype="bfloat16", num_slots=1, xp="cupy")
started = time.perf_counter()
{call}
cupy.cuda.get_current_stream().synchronize()
print(time.perf_counter() - started)
"""

_CALLS = {
    "fused_recurrent": _FIRST_CALL.format(
        tokens=1,
        call="gdr.fused_sigmoid_gating_delta_rule_update(x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, "
        "x.state, x.slots, use_qk_l2norm_in_kernel=True)",
    ),
    "chunk": _FIRST_CALL.format(
        tokens=128,
        call="gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm_in_kernel=True)",
    ),
}


class FirstCall:
    """The first call of an operation in a new process."""

    params = [list(_CALLS)]
    param_names = ["operation"]
    timeout = 300

    def setup(self, operation):
        cupy()

    def track_cold(self, operation):
        with tempfile.TemporaryDirectory() as cache:
            return _first_call(operation, cache)

    def track_warm(self, operation):
        with tempfile.TemporaryDirectory() as cache:
            _first_call(operation, cache)
            return _first_call(operation, cache)

    track_cold.unit = track_warm.unit = "seconds"


def _first_call(operation, cache):
    done = subprocess.run(
        [sys.executable, "-c", _CALLS[operation]],
        env={**os.environ, "CUPY_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
