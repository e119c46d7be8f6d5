from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy

from gdr import _cuda_loader as loader

REPOSITORY = Path(__file__).resolve().parent.parent

AXPY = """\
#include "gdr/axpy.cuh"
// requires: sm_75
extern "C" __global__ void axpy(const __grid_constant__ P p) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] += p.factor * FACTOR * p.x[i] + OFFSET;
}
"""
AXPY_HEADER = '#include "gdr/offset.cuh"\nstruct P { const float *x; float *y; long long n; float factor; };\n'

# Each block reverses `n` floats of its own through dynamic shared memory.
REVERSE = """\
struct P { float *x; int n; };
extern "C" __global__ void reverse(const __grid_constant__ P p) {
  extern __shared__ float s[];
  float* x = p.x + (long long)blockIdx.x * p.n;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) s[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) x[i] = s[p.n - 1 - i];
}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of small kernels in place of the package's own."""
    include = tmp_path / "include" / "gdr"
    include.mkdir(parents=True)
    (tmp_path / "axpy.cu").write_text(AXPY)
    (tmp_path / "reverse.cu").write_text(REVERSE)
    (include / "axpy.cuh").write_text(AXPY_HEADER)
    (include / "offset.cuh").write_text("#define OFFSET 0.f\n")
    (include / "unused.cuh").write_text("\n")
    monkeypatch.setattr(loader, "sources", lambda: tmp_path)
    monkeypatch.setattr(loader, "_kernels", {})
    monkeypatch.setattr(loader, "_locks", {})
    loader._source.cache_clear()
    yield tmp_path
    loader._source.cache_clear()


def test_importing_gdr_loads_no_array_library() -> None:
    code = "import sys, gdr; print([m for m in ('cupy', 'torch', 'jax', 'numba') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_the_text_changes_with_the_headers_that_are_included(toy: Path) -> None:
    before = loader.compose(loader.read_source("axpy"), {})
    (toy / "include" / "gdr" / "unused.cuh").write_text("// edited\n")
    assert loader.compose(loader.read_source("axpy"), {}) == before
    (toy / "include" / "gdr" / "offset.cuh").write_text("#define OFFSET 1.f\n")
    assert loader.compose(loader.read_source("axpy"), {}) != before


def test_headers_may_include_each_other(toy: Path) -> None:
    (toy / "include" / "gdr" / "offset.cuh").write_text('#include "gdr/axpy.cuh"\n')
    headers = loader.included((toy / "axpy.cu").read_text(), toy / "include")
    assert sorted(headers) == ["gdr/axpy.cuh", "gdr/offset.cuh"]


def test_definitions_come_first_and_lines_keep_their_numbers(toy: Path) -> None:
    text = loader.compose(loader.read_source("axpy"), {"B": True, "A": 3, "T": "float"})
    lines = text.splitlines()
    assert lines[1:5] == ["#define A 3", "#define B 1", "#define T float", '#line 1 "axpy.cu"']
    assert lines[5] == AXPY.splitlines()[0]


def test_a_source_says_what_it_needs(toy: Path) -> None:
    (toy / "new.cu").write_text("// requires: sm_80\n// options: --use_fast_math --maxrregcount=64\n")
    source = loader.read_source("new")
    assert source.requires == 80
    assert loader.options(source)[-2:] == ("--use_fast_math", "--maxrregcount=64")
    assert not source.dependent
    (toy / "waits.cu").write_text("// launch: dependent\n")
    assert loader.read_source("waits").dependent
    assert loader.read_source("reverse").requires == 75


def test_params_are_a_c_struct_of_each_thread() -> None:
    params = loader.Params("Qif Q i")
    assert params.size == 32  # 8 + 4 + 4 + 8 + 4 and what aligns the end
    params.pack(1, 2, 3.0, 4, 5)
    other: list[loader.Params] = []

    def pack() -> None:
        params.pack(9, 9, 9.0, 9, 9)
        other.append(params.address)

    thread = threading.Thread(target=pack)
    thread.start()
    thread.join()
    assert other != [params.address]
    assert np.frombuffer(params.buffer, np.uint64, 1)[0] == 1


@pytest.fixture
def fake(toy: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    cupy = FakeCupy()
    monkeypatch.setattr(loader, "_import_cupy", lambda: cupy)
    loader.describe_gpu.cache_clear()
    yield cupy
    loader.describe_gpu.cache_clear()


def test_threads_that_want_one_kernel_compile_it_once(fake: FakeCupy) -> None:
    kernels: list[loader.Kernel] = []
    threads = [threading.Thread(target=lambda: kernels.append(loader.load("axpy", {"FACTOR": 2}, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8
    assert len(set(map(id, kernels))) == 1
    assert len(fake.compiled) == 1
    loader.load("axpy", {"FACTOR": 3}, 0)
    assert len(fake.compiled) == 2
    assert loader.cache_info()["loaded"] == [
        "<Kernel axpy(FACTOR=2) on CUDA device 0>",
        "<Kernel axpy(FACTOR=3) on CUDA device 0>",
    ]


def test_a_launch_uses_the_context_of_the_kernel(fake: FakeCupy) -> None:
    kernel = loader.load("axpy", {"FACTOR": 2}, 0)
    params = loader.Params("QQqf")
    expected = (7, 2, 1, 1, 32, 1, 1, 0, 5, params.address, 0)
    kernel.launch((2, 1, 1), (32, 1, 1), params, 5)
    fake.context = 0  # as in a thread that has not used CUDA
    kernel.launch((2, 1, 1), (32, 1, 1), params, 5)
    assert fake.launches == [(11, expected), (11, expected)]
    assert fake.context == 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What reaches a driver that knows dependent launches: bytes of the configuration, kernel, and its struct."""
    found: list[tuple] = []

    def launch(config: Any, function: Any, pointers: Any, extra: None) -> int:
        address = ctypes.cast(pointers._obj[0], ctypes.POINTER(ctypes.c_uint64))
        found.append((bytes(config._obj), function.value, address[0]))
        return len(found) - 1

    monkeypatch.setattr(loader, "_driver", lambda: types.SimpleNamespace(cuLaunchKernelEx=launch))
    return found


@pytest.fixture
def dependent(fake: FakeCupy) -> str:
    """Name of a kernel that waits itself for what is ahead of it."""
    (loader.sources() / "waits.cu").write_text(f"// launch: dependent\n{AXPY}")
    return "waits"


def test_a_kernel_that_waits_is_launched_as_a_dependent_one(fake: FakeCupy, launches: list, dependent: str) -> None:
    params = loader.Params("QQqf")
    params.pack(77, 2, 3, 4.0)
    loader.load("axpy", {}, 0).launch((2, 3, 4), (32, 1, 1), params, 5)
    assert launches == []
    assert len(fake.launches) == 1
    kernel = loader.load(dependent, {}, 0)
    kernel.launch((2, 3, 4), (32, 1, 1), params, 5, shared=96)
    assert len(fake.launches) == 1
    (config, function, first), = launches  # fmt: skip
    assert (function, first) == (7, 77)
    *numbers, attributes, count = loader._CONFIG.unpack(config)
    assert numbers == [2, 3, 4, 32, 1, 1, 96, 5]
    assert count == 1
    assert ctypes.string_at(attributes, 72) == bytes(loader._ATTRIBUTE)
    with pytest.raises(RuntimeError, match="driver error 1"):
        kernel.launch((1, 1, 1), (32, 1, 1), params, 5)


def test_old_gpus_and_drivers_launch_the_ordinary_way(
    fake: FakeCupy, launches: list, dependent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = loader.Params("QQqf")
    fake.capability = "89"
    loader.load(dependent, {"A": 1}, 0).launch((1, 1, 1), (32, 1, 1), params, 5)
    fake.capability, fake.driver_version = "90", 12020
    loader.describe_gpu.cache_clear()
    loader.load(dependent, {"A": 2}, 0).launch((1, 1, 1), (32, 1, 1), params, 5)
    fake.driver_version = 12030
    for driver in (None, types.SimpleNamespace()):
        monkeypatch.setattr(loader, "_driver", lambda driver=driver: driver)
        loader.load(dependent, {"A": str(driver)}, 0).launch((1, 1, 1), (32, 1, 1), params, 5)
        loader.describe_gpu.cache_clear()
        assert not loader.describe_gpu(0).early
    assert launches == []
    assert len(fake.launches) == 4


def test_the_structs_of_a_dependent_launch_are_the_drivers() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 1, 2, 3
    config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes = 4, 5, 6, 7
    config.hStream = driver.CUstream(8)
    config.attrs, config.numAttrs = [attribute], 1
    *numbers, attributes, count = loader._CONFIG.unpack(ctypes.string_at(config.getPtr(), loader._CONFIG.size))
    assert (numbers, count) == ([1, 2, 3, 4, 5, 6, 7, 8], 1)
    # Two in a row show the size of one.
    assert ctypes.string_at(attributes, 72) == bytes(loader._ATTRIBUTE)
    config.attrs, config.numAttrs = [attribute, attribute], 2
    attributes = loader._CONFIG.unpack(ctypes.string_at(config.getPtr(), loader._CONFIG.size))[-2]
    assert ctypes.string_at(attributes, 144) == 2 * bytes(loader._ATTRIBUTE)


def test_an_empty_grid_launches_nothing(fake: FakeCupy) -> None:
    loader.load("axpy", {}, 0).launch((0, 1, 1), (32, 1, 1), loader.Params("QQqf"), 0)
    assert fake.launches == []


def test_shared_memory_is_asked_for_up_to_what_the_device_has(fake: FakeCupy) -> None:
    kernel = loader.load("reverse", {}, 0)
    kernel.launch((1, 1, 1), (32, 1, 1), loader.Params("Qi"), 0, shared=64 * 1024)
    assert kernel._raw_kernel.max_dynamic_shared_size_bytes == 64 * 1024
    with pytest.raises(loader.CudaUnavailable, match=r"reverse.* needs 103424 bytes of shared memory"):
        kernel.launch((1, 1, 1), (32, 1, 1), loader.Params("Qi"), 0, shared=100 * 1024)


def test_a_compile_error_names_kernel_options_and_the_first_lines_of_the_log(fake: FakeCupy) -> None:
    fake.log = "\n".join(["axpy.cu(4): error: identifier FACTOR is undefined", *(f"line {i}" for i in range(99))])
    with pytest.raises(loader.CompileError) as error:
        loader.load("axpy", {"K": 128}, 0)
    message = str(error.value)
    assert "axpy(K=128)" in message
    assert "-std=c++17" in message
    assert "FACTOR is undefined" in message
    assert "line 50" not in message
    fake.log = None
    assert loader.load("axpy", {"K": 128}, 0).registers == 32


def test_an_old_gpu_is_refused(fake: FakeCupy) -> None:
    fake.capability = "70"
    with pytest.raises(loader.CudaUnavailable, match=r"gdr needs .* 7\.5 or newer; CUDA device 0 has 7\.0"):
        loader.load("axpy", {}, 0)
    fake.capability = "75"
    loader.describe_gpu.cache_clear()
    (loader.sources() / "new.cu").write_text("// requires: sm_80\n")
    with pytest.raises(loader.CudaUnavailable, match=r"new needs .* 8\.0 or newer; CUDA device 0 has 7\.5"):
        loader.load("new", {}, 0)
    assert fake.compiled == []


def test_a_device_that_is_not_there_is_refused(fake: FakeCupy) -> None:
    assert loader.require_device(0) is fake
    with pytest.raises(loader.CudaUnavailable, match="no CUDA device 1; this machine has 1"):
        loader.require_device(1)


@pytest.mark.parametrize("broken", [ImportError("No module named 'cupy'"), RuntimeError("libcublas.so")])
def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, broken: Exception) -> None:
    import builtins

    real = builtins.__import__

    def no_cupy(name: str, *args: object) -> object:
        if name == "cupy":
            raise broken
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_cupy)
    with pytest.raises(loader.CudaUnavailable, match=r'pip install "gdr\[cuda13\]"'):
        loader.load("gate", {}, 0)
    status = loader.cuda_status()
    assert not status.usable
    assert str(broken) in status.reason
    assert status.devices == []


def test_status_never_raises() -> None:
    status = loader.cuda_status()
    assert status.reason
    assert status.usable <= bool(status.devices)


@pytest.fixture
def cupy() -> types.ModuleType:
    return pytest.importorskip("cupy")


def axpy(kernel: loader.Kernel, x: object, y: object, stream: int, factor: float = 1.0) -> None:
    AXPY_PARAMS.pack(x.data.ptr, y.data.ptr, x.size, factor)
    kernel.launch((-(-x.size // 128), 1, 1), (128, 1, 1), AXPY_PARAMS, stream)


AXPY_PARAMS = loader.Params("QQqf")


@pytest.mark.gpu
def test_a_kernel_runs_on_the_stream_it_is_given(toy: Path, cupy: types.ModuleType) -> None:
    kernel = loader.load("axpy", {"FACTOR": 2}, 0)
    assert kernel.registers > 0
    assert kernel.local_bytes == 0
    assert kernel.max_threads == 1024
    x, y = cupy.arange(1000, dtype=cupy.float32), cupy.ones(1000, cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    axpy(kernel, x, y, stream.ptr, factor=0.5)
    stream.synchronize()
    np.testing.assert_array_equal(y.get(), np.arange(1000, dtype=np.float32) + 1)


@pytest.mark.gpu
def test_an_edited_header_is_compiled_again(toy: Path, cupy: types.ModuleType) -> None:
    x, y = cupy.zeros(4, cupy.float32), cupy.zeros(4, cupy.float32)
    axpy(loader.load("axpy", {"FACTOR": 1}, 0), x, y, 0)
    (toy / "include" / "gdr" / "offset.cuh").write_text("#define OFFSET 5.f\n")
    loader._source.cache_clear()
    loader._kernels.clear()
    axpy(loader.load("axpy", {"FACTOR": 1}, 0), x, y, 0)
    assert y.get().tolist() == [5.0] * 4


@pytest.mark.gpu
def test_nvrtc_errors_are_reported(toy: Path, cupy: types.ModuleType) -> None:
    with pytest.raises(loader.CompileError, match=r'axpy\.cu\(5\): error: identifier "FACTOR" is undefined'):
        loader.load("axpy", {}, 0)


@pytest.mark.gpu
def test_threads_that_never_used_cuda_launch(toy: Path, cupy: types.ModuleType) -> None:
    kernel = loader.load("axpy", {"FACTOR": 1}, 0)
    count, repeats = 8, 200
    xs = [cupy.full(1000, i, cupy.float32) for i in range(count)]
    ys = [cupy.zeros(1000, cupy.float32) for _ in range(count)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(count)]
    cupy.cuda.Device().synchronize()
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(repeats):
                axpy(kernel, xs[i], ys[i], streams[i].ptr)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cupy.cuda.Device().synchronize()
    assert errors == []
    for i, y in enumerate(ys):
        np.testing.assert_array_equal(y.get(), np.full(1000, repeats * i, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["Relaxed", "Global"])
def test_a_graph_replays_what_was_launched(toy: Path, cupy: types.ModuleType, mode: str) -> None:
    x, y = cupy.ones(1000, cupy.float32), cupy.zeros(1000, cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture(getattr(cupy.cuda.runtime, f"streamCaptureMode{mode}"))
        # Loading in the middle of a capture works as well, if not fast.
        kernel = loader.load("axpy", {"FACTOR": 1, "UNUSED": f"{mode}_{time.time_ns()}"}, 0)
        axpy(kernel, x, y, stream.ptr, factor=1.0)
        axpy(kernel, x, y, stream.ptr, factor=10.0)  # the struct of the first launch is overwritten here
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
    stream.synchronize()
    assert y.get().tolist() == [33.0] * 1000


@pytest.mark.gpu
def test_more_than_48_kib_of_dynamic_shared_memory(toy: Path, cupy: types.ModuleType) -> None:
    kernel = loader.load("reverse", {}, 0)
    n = 60 * 256
    x = cupy.arange(2 * n, dtype=cupy.float32)
    params = loader.Params("Qi")
    params.pack(x.data.ptr, n)
    kernel.launch((2, 1, 1), (256, 1, 1), params, 0, shared=4 * n)
    want = np.arange(2 * n, dtype=np.float32).reshape(2, n)[:, ::-1].ravel()
    np.testing.assert_array_equal(x.get(), want)
    with pytest.raises(loader.CudaUnavailable, match="bytes of shared memory"):
        kernel.launch((2, 1, 1), (256, 1, 1), params, 0, shared=1 << 20)


@pytest.mark.gpu
def test_another_device_than_the_current_one(toy: Path, cupy: types.ModuleType) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    with cupy.cuda.Device(1):
        x, y = cupy.ones(10, cupy.float32), cupy.zeros(10, cupy.float32)
        cupy.cuda.Device().synchronize()
    with cupy.cuda.Device(0):
        axpy(loader.load("axpy", {"FACTOR": 3}, 1), x, y, 0)
        assert cupy.cuda.runtime.getDevice() == 0
    assert y.get().tolist() == [3.0] * 10


@pytest.mark.gpu
def test_status_lists_the_devices(cupy: types.ModuleType) -> None:
    status = loader.cuda_status()
    assert status.usable, status.reason
    assert status.devices[0].capability.replace(".", "") == cupy.cuda.Device(0).compute_capability
    assert status.devices[0].memory > 0
