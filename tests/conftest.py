from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

# HYPOTHESIS_PROFILE=deep pytest: hours of searching instead of seconds.  The default draws the same examples
# on every run, so that a failure in CI is a failure on the next machine too.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=40, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("deep", max_examples=5000, stateful_step_count=200, print_blob=True, **_COMMON)
settings.register_profile(
    "smoke", max_examples=3, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _why_no_gpu() -> str | None:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "no NVIDIA GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable NVIDIA GPU: {error}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    why = _why_no_gpu()
    if why is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=why))
