"""Finds, compiles, caches and launches the CUDA kernels.

One source ``cuda/<stem>.cu`` holds one kernel, ``extern "C"`` and named ``<stem>``, whose one argument is a
struct passed by value (``const __grid_constant__``).  One *specialisation* of it is a set of preprocessor
definitions; each is one module, compiled by CuPy (NVRTC) the first time it is asked for and kept for the life
of the process.  CuPy keeps the binaries on disk as well.

Three comments in a source speak to this module (and to the tests that compile without a GPU)::

    // requires: sm_80          the oldest GPU the kernel is made for (sm_75 without)
    // options: --use_fast_math more options for NVRTC
    // launch: dependent        may start before what is ahead of it in its stream has ended, for it waits itself

The last is programmatic dependent launch, of compute capability 9.0 and up; elsewhere the kernel starts when it may.
Such a kernel calls ``ptx::wait_for_kernels_ahead`` before it reads what a kernel may have written and before it
writes; all of its blocks do, for the kernel behind it relies on its end to mean the end of all before it.  One that
was made to run beside the kernel ahead of it knows what it may read when, and calls it before it ends.

CuPy itself adds ``-ftz=true``: subnormal float32 numbers count as zero in CUDA kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

Define = int | str | bool
Specialization = tuple[str, dict[str, Define]]  # of a source: its stem, and what is defined

OPTIONS = ("-std=c++17",)
OLDEST = 75
INSTALL = 'install CuPy for your CUDA driver: pip install "gdr[cuda13]" (or "gdr[cuda12]")'


class CudaUnavailable(RuntimeError):
    """CUDA cannot be used here; the message says why and what to install."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message has the kernel, its options and the first lines of the log."""


@cache
def sources() -> Path:
    """The directory of the CUDA sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    candidates = (package / "_cuda_src", package.parent / "cuda")
    for path in candidates:
        if (path / "include" / "gdr").is_dir():
            return path
    raise FileNotFoundError(f"gdr's CUDA sources are missing: looked in {candidates[0]} and {candidates[1]}")


class Source(NamedTuple):
    """One ``.cu`` file and what it says of itself."""

    stem: str
    text: str
    headers: str  # hash of every header of ours that it includes, directly or not
    requires: int  # 75 for compute capability 7.5
    options: tuple[str, ...]
    dependent: bool  # it waits itself for what is ahead of it


_INCLUDE = re.compile(r'^\s*#\s*include\s*["<](gdr/[^">]+)[">]', re.MULTILINE)
_REQUIRES = re.compile(r"^//\s*requires:\s*sm_(\d+)", re.MULTILINE)
_OPTIONS = re.compile(r"^//\s*options:\s*(.+)$", re.MULTILINE)
_DEPENDENT = re.compile(r"^//\s*launch:\s*dependent$", re.MULTILINE)


def included(text: str, include: Path) -> dict[str, str]:
    """Every header of ours that `text` includes, directly or not: its name and text."""
    headers: dict[str, str] = {}
    waiting = _INCLUDE.findall(text)
    while waiting:
        name = waiting.pop()
        if name not in headers:
            headers[name] = (include / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(headers[name])
    return headers


def read_source(stem: str, directory: Path | None = None) -> Source:
    """Read ``<stem>.cu`` and hash the headers that it includes."""
    directory = directory or sources()
    text = (directory / f"{stem}.cu").read_text(encoding="utf-8")
    digest = hashlib.sha256()
    for name, header in sorted(included(text, directory / "include").items()):
        digest.update(f"{name}\0{header}\0".encode())
    requires = _REQUIRES.search(text)
    options = _OPTIONS.search(text)
    return Source(
        stem,
        text,
        digest.hexdigest()[:16],
        int(requires[1]) if requires else OLDEST,
        tuple(options[1].split()) if options else (),
        _DEPENDENT.search(text) is not None,
    )


_source = cache(read_source)


def _literal(value: Define) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def compose(source: Source, defines: Mapping[str, Define]) -> str:
    """Compose the text to compile.

    CuPy's disk cache is keyed by this text and by the options, not by what headers say: hence their hash.
    Definitions are lines of the text rather than ``-D`` options, because CuPy runs the compiler once more for
    every new set of options.
    """
    lines = [f"// gdr {source.stem}, headers {source.headers}"]
    lines += [f"#define {name} {_literal(value)}" for name, value in sorted(defines.items())]
    lines += [f'#line 1 "{source.stem}.cu"', source.text]
    return "\n".join(lines)


def options(source: Source, directory: Path | None = None) -> tuple[str, ...]:
    """NVRTC's options for a source, but for the architecture."""
    return (*OPTIONS, f"-I{(directory or sources()) / 'include'}", *source.options)


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise CudaUnavailable(f"CUDA needs CuPy, which cannot be imported ({error}); {INSTALL}") from error
    except Exception as error:  # CuPy raises what it likes when its libraries do not load
        raise CudaUnavailable(f"CuPy is broken ({type(error).__name__}: {error}); {INSTALL}") from error
    return cupy


def _device_count(cupy: Any) -> int:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise CudaUnavailable(f"no usable NVIDIA driver or GPU ({error}); check nvidia-smi and {INSTALL}") from error
    if not count:
        raise CudaUnavailable("no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return count


class Gpu(NamedTuple):
    """What of a GPU decides which kernels it runs."""

    capability: int  # 90 for 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory that a block may have
    early: bool = False  # whether kernels can start before those ahead of them have ended


@cache
def describe_gpu(device: int) -> Gpu:
    """What of a CUDA device decides which kernels it runs."""
    gpu = _import_cupy().cuda.Device(device)
    attributes = gpu.attributes
    capability = int(gpu.compute_capability)
    return Gpu(
        capability,
        int(attributes["MultiProcessorCount"]),
        int(attributes["MaxSharedMemoryPerBlockOptin"]),
        _dependent_launcher(capability) is not None,
    )


def require_device(device: int) -> Any:
    """Return CuPy, or say why a CUDA device cannot be used."""
    cupy = _import_cupy()
    count = _device_count(cupy)
    if not 0 <= device < count:
        raise CudaUnavailable(f"there is no CUDA device {device}; this machine has {count}")
    _require("gdr", device, OLDEST)
    return cupy


def _require(what: str, device: int, requires: int) -> None:
    """Refuse a GPU that is older than a kernel asks for."""
    have = describe_gpu(device).capability
    if have < requires:
        raise CudaUnavailable(
            f"{what} needs a GPU of compute capability {requires / 10:.1f} or newer; "
            f"CUDA device {device} has {have / 10:.1f}"
        )


class Device(NamedTuple):
    """A CUDA device as ``gdr info`` shows it."""

    ordinal: int
    name: str
    capability: str
    memory: int  # bytes


class Status(NamedTuple):
    """Whether CUDA can be used, and if not, why."""

    usable: bool
    reason: str
    devices: list[Device]


def cuda_status() -> Status:
    """Say whether the CUDA kernels can be used here; never raises."""
    devices = []
    try:
        cupy = _import_cupy()
        for ordinal in range(_device_count(cupy)):
            properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
            devices.append(
                Device(
                    ordinal,
                    properties["name"].decode(),
                    f"{properties['major']}.{properties['minor']}",
                    properties["totalGlobalMem"],
                )
            )
        sources()
        if all(describe_gpu(device.ordinal).capability < OLDEST for device in devices):
            raise CudaUnavailable(f"no GPU here has compute capability {OLDEST / 10:.1f} or newer")
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # whatever a half-installed CUDA raises is the answer
        return Status(False, str(error) or type(error).__name__, devices)
    return Status(True, f"CuPy {cupy.__version__}", devices)


# CUlaunchConfig of cuda.h: grid and block, shared memory, stream; then its attributes and how many there are.
_CONFIG = struct.Struct("7I Q Q I 0Q")
# CUlaunchAttribute: programmatic stream serialization, allowed.
_ATTRIBUTE = ctypes.create_string_buffer(struct.pack("I 0Q I 60x", 6, 1), 72)
_MOST_CONFIGS = 256  # that a kernel keeps


class Params(threading.local):
    """A kernel's argument: one C struct, passed by value.  Each thread has its own copy.

    `layout` is a :mod:`struct` format with the types of the C struct in order and native alignment ("QQqif");
    what aligns the C struct's end is added.
    """

    def __init__(self, layout: str) -> None:
        record = struct.Struct(layout + "0Q")
        self.size = record.size
        self.buffer = ctypes.create_string_buffer(record.size)
        self._pack_into = record.pack_into
        # cuLaunchKernel wants an array of pointers, one an argument; it copies what they point to.
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)
        self.reference = ctypes.byref(self._pointers)

    def pack(self, *values: float | bytes) -> None:
        """Fill in the struct's fields."""
        self._pack_into(self.buffer, 0, *values)


class Arguments(Params):
    """Params of which all that follows the head is filled in once (in every thread)."""

    def __init__(self, head: str, rest: str, values: Sequence[float]) -> None:
        super().__init__(head + rest)
        self.pack(*struct.unpack(head, bytes(struct.calcsize(head))), *values)
        self.pack_head = partial(struct.Struct(head).pack_into, self.buffer, 0)  # fills in what differs


class Kernel:
    """A compiled kernel on one device.

    Attributes
    ----------
    stem, defines, device
        What was asked for.
    function : int
        The driver's handle (``CUfunction``).
    registers, local_bytes, shared_bytes, max_threads : int
        A thread's registers and local memory (spills go there); a block's static shared memory and most
        threads.
    """

    def __init__(self, stem: str, defines: Mapping[str, Define], device: int, raw_kernel: Any, dependent: bool) -> None:
        driver = _import_cupy().cuda.driver
        self.stem, self.defines, self.device = stem, dict(defines), device
        self._raw_kernel = raw_kernel  # owns the module
        self.function: int = raw_kernel.kernel.ptr
        self.registers: int = raw_kernel.num_regs
        self.local_bytes: int = raw_kernel.local_size_bytes
        self.shared_bytes: int = raw_kernel.shared_size_bytes
        self.max_threads: int = raw_kernel.max_threads_per_block
        self._context: int = driver.ctxGetCurrent()
        self._dynamic_shared: int = raw_kernel.max_dynamic_shared_size_bytes
        self._launch = driver.launchKernel
        self._launch_dependent = _dependent_launcher(describe_gpu(device).capability) if dependent else None
        self._handle, self._check = ctypes.c_void_p(self.function), driver.check_status
        self._configs: dict[tuple, Any] = {}
        self._get_context, self._set_context = driver.ctxGetCurrent, driver.ctxSetCurrent
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Kernel {_describe(self.stem, self.defines)} on CUDA device {self.device}>"

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: Params,
        stream: int,
        shared: int = 0,
    ) -> None:
        """Launch on a stream (handle) of the kernel's device with `shared` bytes of dynamic shared memory."""
        if 0 in grid:
            return
        # A thread that has not used CUDA has no current context, one that uses another device has that one's.
        current = self._get_context()
        if current == self._context:
            self._start(grid, block, params, stream, shared)
            return
        self._set_context(self._context)
        try:
            self._start(grid, block, params, stream, shared)
        finally:
            self._set_context(current)

    def _start(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], params: Params, stream: int, shared: int
    ) -> None:
        if self._launch_dependent is None:
            if shared > self._dynamic_shared:
                self._allow_shared(shared)
            self._launch(self.function, *grid, *block, shared, stream, params.address, 0)
            return
        config = self._configs.get((grid, block, shared, stream)) or self._configure(grid, block, shared, stream)
        status = self._launch_dependent(config, self._handle, params.reference, None)
        if status:
            self._check(status)

    def _configure(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, stream: int) -> Any:
        """Describe a launch to the driver; what was described is kept, to start it sooner."""
        if shared > self._dynamic_shared:
            self._allow_shared(shared)
        config = ctypes.create_string_buffer(_CONFIG.size)
        _CONFIG.pack_into(config, 0, *grid, *block, shared, stream, ctypes.addressof(_ATTRIBUTE), 1)
        if len(self._configs) >= _MOST_CONFIGS:
            self._configs.clear()
        reference = self._configs[grid, block, shared, stream] = ctypes.byref(config)
        return reference

    def _allow_shared(self, shared: int) -> None:
        """Ask for more dynamic shared memory than the 48 KiB every kernel may have."""
        with self._lock:
            if shared > self._dynamic_shared:
                cupy = _import_cupy()
                limit = describe_gpu(self.device).shared
                if shared + self.shared_bytes > limit:
                    raise CudaUnavailable(
                        f"{_describe(self.stem, self.defines)} needs {shared + self.shared_bytes} bytes of "
                        f"shared memory a block; CUDA device {self.device} has {limit}"
                    )
                with cupy.cuda.Device(self.device):
                    self._raw_kernel.max_dynamic_shared_size_bytes = shared
                self._dynamic_shared = shared


_kernels: dict[tuple, Kernel] = {}
_locks: dict[tuple, threading.Lock] = {}
_locks_lock = threading.Lock()


def load(stem: str, defines: Mapping[str, Define], device: int) -> Kernel:
    """Compile (once) one specialisation of ``cuda/<stem>.cu`` for one device.

    Parameters
    ----------
    stem : str
        Name of the source and of its kernel.
    defines : mapping of str to int, str or bool
        Preprocessor definitions; a bool becomes 0 or 1, a str stands as it is.
    device : int
        CUDA device ordinal.

    Raises
    ------
    CudaUnavailable
        No CuPy, no driver, no GPU, or too old a one.
    CompileError
        NVRTC refused the source.
    """
    key = (stem, device, *sorted(defines.items()))
    kernel = _kernels.get(key)
    if kernel is None:
        with _locks_lock:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:  # of several threads that want the same kernel, one compiles
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _compile(stem, defines, device)
    return kernel


def _compile(stem: str, defines: Mapping[str, Define], device: int) -> Kernel:
    cupy = require_device(device)
    source = _source(stem)
    _require(stem, device, source.requires)
    flags = options(source)
    module = cupy.RawModule(code=compose(source, defines), options=flags, backend="nvrtc")
    try:
        with cupy.cuda.Device(device), _capture_tolerated():
            return Kernel(stem, defines, device, module.get_function(stem), source.dependent)
    except cupy.cuda.compiler.CompileException as error:
        raise CompileError(_compile_message(stem, defines, flags, str(error))) from error
    except RuntimeError as error:
        if "CUDA headers" in str(error) or "failed to load" in str(error):  # CuPy's words: no headers, no NVRTC
            raise CudaUnavailable(f"{error}; {INSTALL}") from error
        raise


def _describe(stem: str, defines: Mapping[str, Define]) -> str:
    return f"{stem}({', '.join(f'{name}={_literal(value)}' for name, value in sorted(defines.items()))})"


def _compile_message(stem: str, defines: Mapping[str, Define], flags: tuple[str, ...], log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    shown = [line for line in lines if "error" in line.lower()][:1] + lines[:12]
    return "\n".join(
        [
            f"NVRTC cannot compile {_describe(stem, defines)}",
            f"options: {' '.join(flags)}",
            *dict.fromkeys(shown),
        ]
    )


@cache
def _driver() -> Any:
    """The CUDA driver's library, for what CuPy does not call; None where it is not found."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _dependent_launcher(capability: int) -> Any:
    """The driver's cuLaunchKernelEx where kernels can be launched as dependent ones, else None."""
    # Drivers before CUDA 12.3 know no such edges in the graphs that they capture.
    if capability < 90 or _import_cupy().cuda.runtime.driverGetVersion() < 12030:
        return None
    return getattr(_driver(), "cuLaunchKernelEx", None)


@contextmanager
def _capture_tolerated() -> Iterator[None]:
    """Let this thread load a module while a stream is being captured into a CUDA graph.

    Loading allocates, which a capture in the default ("global") mode forbids to every thread, though nothing
    of it belongs into the graph.
    """
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    exchange: Any = getattr(_driver(), "cuThreadExchangeStreamCaptureMode", None)
    exchanged = exchange is not None and exchange(ctypes.byref(mode)) == 0
    try:
        yield
    finally:
        if exchanged:
            exchange(ctypes.byref(mode))


def cache_info() -> dict[str, Any]:
    """Where sources and compiled kernels lie and which kernels this process has loaded."""
    try:
        directory: Path | None = sources()
    except FileNotFoundError:
        directory = None
    cache = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
    return {
        "sources": directory,
        "cache_dir": cache,
        "cached_files": sum(1 for _ in cache.glob("*.cubin")) if cache.is_dir() else 0,
        "loaded": [repr(kernel) for kernel in _kernels.values()],
    }
