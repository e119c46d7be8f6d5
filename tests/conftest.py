from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from places import Place

# HYPOTHESIS_PROFILE=deep pytest: hours of searching instead of seconds.  The default draws the same examples
# on every run, so that a failure in CI is a failure on the next machine too.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=40, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile(
    "deep",
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "5000")),
    stateful_step_count=100,
    print_blob=True,
    **_COMMON,
)
settings.register_profile("smoke", max_examples=3, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
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


@pytest.fixture(scope="module", params=["numpy", "numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Every backend in turn; the host's are chosen by GDR_CPU."""
    if request.param == "numba":
        pytest.importorskip("numba")
        if importlib.util.find_spec("gdr._numba_fused_recurrent") is None:
            pytest.skip("this version has no numba backend")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "cuda":
            patch.setenv("GDR_CPU", request.param)
        yield Place(request.param)


@pytest.fixture(scope="module")
def host(place: Place) -> Place:
    """The backends of the host alone."""
    if not place.on_host:
        pytest.skip("about the host")
    return place
