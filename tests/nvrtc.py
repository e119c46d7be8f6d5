"""Compiles the CUDA sources with no GPU, as CuPy would, and reports what ptxas made of them.

python tests/nvrtc.py fused_recurrent --arch 75 90 -D K=128 -D V=128
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda.bindings import nvrtc
from cuda.pathfinder import find_nvidia_header_directory

from gdr import _cuda_loader as loader

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


class Compiled(NamedTuple):
    """A kernel as ptxas reports it; sizes in bytes."""

    stem: str
    defines: dict
    arch: int
    registers: int
    spills: int
    stack: int
    shared: int  # static
    params: int  # size of the kernel's one argument
    waits: bool  # for the kernels ahead
    waits_first: bool  # in the order of the PTX; then it uses global memory
    seconds: float
    log: str


class Failed(Exception):
    """NVRTC refused a source; the message is its log."""


def _check(result: tuple) -> object:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(nvrtc.nvrtcGetErrorString(status)[1].decode())
    return values[0] if values else None


def _text(program: object, size: object, get: object) -> str:
    buffer = b" " * _check(size(program))
    _check(get(program, buffer))
    return buffer.rstrip(b"\0").decode()


def include_options() -> list[str]:
    """Where CUDA's own headers are: in NVIDIA's wheels, or in a toolkit."""
    cudart = find_nvidia_header_directory("cudart")
    return [f"-I{cudart}", f"-I{cudart}/cccl"] if cudart else []


def compile(stem: str, defines: Mapping[str, loader.Define], arch: int, directory: Path | None = None) -> Compiled:
    """Compile one specialisation for one architecture, 90 for sm_90."""
    source = loader.read_source(stem, directory)
    text = loader.compose(source, defines)
    options = [
        *loader.options(source, directory),
        *include_options(),
        f"-arch=sm_{arch}",
        "--ptxas-options=-v",
    ]
    options += ["-ftz=true", "--device-as-default-execution-space"]  # as CuPy does
    start = time.perf_counter()
    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), f"{stem}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Failed(f"{stem} {dict(defines)} for sm_{arch}\n{log}")
        ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    entry = log[log.index(f"entry function '{stem}'") :]

    def number(pattern: str) -> int:
        return sum(int(match) for match in re.findall(pattern, entry))

    used = r"\b(?:(?:ld(?!\.relaxed)|st|atom|red)\.[\w.:]*global|cp\.async(?!\.bulk\.prefetch))"
    first = re.search(rf"\bgriddepcontrol\.wait|{used}", ptx)
    argument = re.search(rf"\.param \.align \d+ \.b8 {stem}_param_0\[(\d+)\]", ptx)
    return Compiled(
        stem=stem,
        defines=dict(defines),
        arch=arch,
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=number(r"(\d+) bytes smem"),
        params=int(argument[1]) if argument else 0,
        waits="griddepcontrol.wait" in ptx,
        waits_first=first is not None and first[0].startswith("griddepcontrol"),
        seconds=time.perf_counter() - start,
        log=log,
    )


def compile_all(jobs: Iterable[tuple[str, Mapping[str, loader.Define], int]]) -> list[Compiled]:
    """Compile many (stem, defines, arch) on all processors, as NVRTC holds no lock; every failure is reported."""

    def attempt(job: tuple[str, Mapping[str, loader.Define], int]) -> Compiled | Failed:
        try:
            return compile(*job)
        except Failed as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(attempt, jobs))
    failures = [str(result) for result in results if isinstance(result, Failed)]
    if failures:
        raise Failed(f"{len(failures)} of {len(results)} kernels do not compile\n" + "\n".join(failures[:10]))
    return [result for result in results if isinstance(result, Compiled)]


def report(compiled: Iterable[Compiled]) -> str:
    """One line a kernel."""
    lines = []
    for c in compiled:
        defines = " ".join(f"{name}={value}" for name, value in c.defines.items())
        lines.append(
            f"{c.stem:24s} sm_{c.arch:<4d}{c.registers:4d} registers {c.spills:5d} B spilled "
            f"{c.shared:6d} B shared {c.params:4d} B arguments {c.seconds:5.2f} s  {defines}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem")
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--sources", type=Path, help="another directory of sources")
    parser.add_argument("--log", action="store_true", help="print NVRTC's log as well")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    defines = dict(define.split("=", 1) for define in arguments.defines)
    for arch in arguments.arch:
        compiled = compile(arguments.stem, defines, arch, arguments.sources)
        print(report([compiled]))
        if arguments.log:
            print(compiled.log)


if __name__ == "__main__":
    main()
