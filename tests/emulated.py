"""Runs the CUDA kernels on the host: a C++ compiler instead of a GPU.

`emulator/cuda.h` has threads as fibers, `emulator/gdr` the headers of inline PTX in plain C++; all else is compiled as
it stands.  Asynchronous work is done at once, so what this cannot find is a wait that is missing.

With GDR_SANITIZE=1 in the environment the kernels are compiled for the sanitizers of addresses and of undefined
behaviour, whose libraries must be loaded before Python.

Blocks run one after another, or, of a source with GDR_CLUSTER among its definitions, so many at a time: a thread block
cluster, whose blocks reach each other's shared memory by `gdr/cluster.cuh`.

`DeviceArray` stands for an array on a GPU, so that whole calls run: checked, described, planned and launched as ever.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from gdr import _arrays, _inputs
from gdr import _cuda_chunk as cuda_chunk
from gdr import _cuda_chunk_call as cuda_chunk_call
from gdr import _cuda_loader as loader
from gdr import _cuda_tiles as cuda_tiles
from gdr.testing import Inputs

HERE = Path(__file__).resolve().parent / "emulator"
COMPILER = shutil.which("g++")
OPTIMIZE = ["-O1"]  # compiling takes longer than running
if os.environ.get("GDR_SANITIZE") == "1":
    OPTIMIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    OPTIMIZE += ["-fno-sanitize-recover=all"]


class DeviceArray(np.ndarray):
    """An array that counts as one on CUDA device 0."""


def on_device(x: np.ndarray | None) -> DeviceArray | None:
    return None if x is None else x.view(DeviceArray)


def to_device(x: Inputs) -> Inputs:
    """A copy of inputs whose arrays are `DeviceArray`s; strides stay."""
    copy = x.to("numpy")
    for name, value in vars(copy).items():
        if isinstance(value, np.ndarray):
            setattr(copy, name, on_device(value))
    return copy


class _DeviceArrays(_arrays.NumpyArrays):
    name = "cupy"

    def meta(self, x: Any) -> _arrays.Meta:
        return super().meta(x)._replace(device=0)

    def empty(self, shape: tuple[int, ...], dtype: str, device: str | int) -> Any:
        size = int(np.prod(shape)) * _arrays.numpy_dtype(dtype).itemsize
        memory = np.full(size + 256, 0xFF, np.uint8)  # NaN
        start = 256 - memory.ctypes.data % 256  # the memory ends where the array ends, or a little after
        return memory[start : start + size].view(_arrays.numpy_dtype(dtype)).reshape(shape).view(DeviceArray)

    def empty_like(self, x: Any) -> Any:
        return self.empty(x.shape, x.dtype.name, 0)

    def stream(self, device: int) -> int:
        return 0

    def to_host(self, x: Any) -> np.ndarray:
        return x.view(np.ndarray)


def _cupy() -> types.SimpleNamespace:
    """As much of CuPy as calls need."""

    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype).view(DeviceArray)

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return _DeviceArrays().empty(shape, np.dtype(dtype).name, 0)

    def ascontiguousarray(x: Any) -> Any:
        return np.ascontiguousarray(x).view(DeviceArray)

    return types.SimpleNamespace(zeros=zeros, empty=empty, ascontiguousarray=ascontiguousarray)


class Kernel:
    """A kernel compiled for the host; launched like the loader's."""

    def __init__(self, stem: str, library: Any, lies: bool = False) -> None:
        self.stem, self._library, self._lies = stem, library, lies

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: loader.Params,
        stream: int,
        shared: int = 0,
    ) -> None:
        assert self._library.size_of_params() == params.size
        assert 0 not in grid
        self._library.lie(self._lies)
        wrong = self._library.run(params.buffer, *grid, block[0], shared)
        assert wrong is None, f"{self.stem}: {wrong.decode()}"


@contextmanager
def gpu(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    capability: int = 90,
    multiprocessors: int = 132,
    lies: bool = False,
) -> Iterator[None]:
    """Let calls with `DeviceArray`s run on an emulated GPU of a compute capability.

    With `lies`, what kernels see before they wait for those ahead is wrong now and then.
    """
    card = loader.Gpu(capability, multiprocessors, {80: 163 << 10, 90: 227 << 10}[capability], capability >= 90)

    def load(stem: str, defines: Mapping[str, loader.Define], device: int) -> Kernel:
        return Kernel(stem, _build(stem, tuple(sorted(defines.items())), directory), lies)

    def encode(maps: cuda_tiles.TileMaps, address: int) -> bytes:  # the struct TileMap of emulator/gdr/tiles.cuh
        tokens, columns = maps.box
        fields = address, *maps.extents, *maps.strides, columns, tokens, maps.turned
        return struct.pack("Q4q3q3i52x", *fields)

    with monkeypatch.context() as patch:
        patch.setitem(_arrays._by_type, DeviceArray, _DeviceArrays())
        patch.setattr(loader, "load", load)
        patch.setitem(sys.modules, "cupy", _cupy())
        patch.setattr(loader, "describe_gpu", lambda device: card)
        patch.setattr(cuda_chunk, "describe_gpu", lambda device: card)
        patch.setattr(cuda_chunk_call, "_capturing", lambda stream: False)
        patch.setattr(cuda_tiles, "available", lambda: True)
        patch.setattr(cuda_tiles.TileMaps, "encode", encode)
        _inputs.forget()
        yield
    _inputs.forget()


@cache
def _build(stem: str, defines: tuple[tuple[str, loader.Define], ...], directory: Path) -> Any:
    return build(loader.read_source(stem), dict(defines), directory)


def build(source: loader.Source, defines: Mapping[str, loader.Define], directory: Path) -> Any:
    """Compile a source for the host; what `Kernel` launches.

    What is in the directory is not compiled again, and processes may share it.
    """
    stem = source.stem
    text = re.sub(r"extern __shared__ .*\n", "", loader.compose(source, defines))
    library = directory / f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _compiled_header(directory)
        with TemporaryDirectory(dir=directory) as ours:
            file = Path(ours) / f"{stem}.cu"
            file.write_text(text)
            options = [f'-DSOURCE="{file}"', f"-DKERNEL={stem}", f"-DDEPENDENT={int(source.dependent)}"]
            options += [f"-D__CUDA_ARCH__={10 * max(source.requires, 80)}", "-shared"]
            options += [f"-I{directory}", f"-I{HERE}", f"-I{loader.sources() / 'include'}"]
            _compile(library, *options, str(HERE / "kernel.cpp"))
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


@cache
def _compiled_header(directory: Path) -> None:
    """Put a precompiled `cuda.h` into a directory: a third of what a kernel takes to compile."""
    header = directory / "cuda.h.gch"
    if not header.exists():
        _compile(header, "-x", "c++-header", str(HERE / "cuda.h"))


def _compile(target: Path, *options: str) -> None:
    """Let the compiler make a file, which is there once it is complete."""
    assert COMPILER
    with TemporaryDirectory(dir=target.parent) as ours:
        made = Path(ours) / target.name
        always = ["-std=c++20", *OPTIMIZE, "-w", "-fPIC", "-fno-gnu-unique"]
        subprocess.run([COMPILER, *always, *options, "-o", str(made)], check=True)
        made.replace(target)
