"""Every CUDA kernel compiles for every GPU it is made for; needs NVRTC, no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import pytest

from gdr import _cuda_loader as loader
from gdr import _warmup as warmup
from gdr._spec import Spec

pytest.importorskip("cuda.bindings.nvrtc")
nvrtc = pytest.importorskip("nvrtc")

DTYPES = ("float32", "float16", "bfloat16")
# Shared memory that a block may have.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
Job = tuple[str, dict[str, Any]]


KINDS: tuple[dict[str, Any], ...] = ({"T": 1}, {"T": 4}, {"T": 64, "sequences": 3})


def square_specs(types: Iterable[tuple[str, str]]) -> Iterator[Spec]:
    """Calls of the recurrence with K = V = 128: dtypes, layouts, batches, and all that a call may have or lack."""
    types = list(types)
    for layout, kind in product(("kv", "vk"), KINDS):
        square = {"H": 16, "HV": 32, "K": 128, "V": 128, "layout": layout, **kind}
        for (dtype, state), B in product(types, (1,) if "sequences" in kind else (1, 8, 256)):
            yield warmup.make_spec("fused_recurrent", B=B, dtype=dtype, state_dtype=state, **square)
        variants: tuple[dict[str, Any], ...] = (
            {"gates": "given"},
            {"l2norm": False},
            {"gates": "given", "state_dtype": None, "final_dtype": "float32"},
            {"final_dtype": None},
            {"state_dtype": None},
            {"pad": 3},
            {"pad": 8},
            {"pad": 3, "dtype": "float32", "state_dtype": "bfloat16"},
        )
        for variant in variants:
            yield warmup.make_spec("fused_recurrent", B=1, **square, **variant)


def other_specs() -> Iterator[Spec]:
    """Calls of the recurrence with other head dimensions."""
    sizes = ((64, 64), (256, 256), (192, 128), (96, 80), (100, 60), (1, 1))
    for (K, V), layout, kind, state in product(sizes, ("kv", "vk"), KINDS, ("float32", "bfloat16")):
        for B in (1,) if "sequences" in kind else (1, 256):
            yield warmup.make_spec(
                "fused_recurrent", B=B, H=16, HV=32, K=K, V=V, layout=layout, state_dtype=state, **kind
            )


def recurrent_specs() -> Iterator[Spec]:
    yield from square_specs(product(DTYPES, DTYPES))
    yield from other_specs()


def chunk_specs() -> Iterator[Spec]:
    """Calls that choose every kernel of the chunkwise form for K = V = 128, and some for other sizes."""
    shape = {"H": 16, "HV": 32, "K": 128, "V": 128}
    lengths = ({"B": 1, "T": 4096}, {"B": 4, "T": 2048}, {"B": 64, "T": 256}, {"B": 1, "T": 4096, "sequences": 7})
    for layout, dtype, state in product(("kv", "vk"), DTYPES, DTYPES):
        for length in lengths:
            yield warmup.make_spec("chunk", dtype=dtype, state_dtype=state, layout=layout, **length, **shape)
    variants: tuple[dict[str, Any], ...] = (
        {"gates": "given"},
        {"gates": "given", "state_dtype": None, "final_dtype": "float32"},
        {"l2norm": False},
        {"state_dtype": None},
        {"final_dtype": None},
        {"pad": 3},
    )
    for layout, length, variant in product(("kv", "vk"), lengths, variants):
        yield warmup.make_spec("chunk", layout=layout, **length, **shape, **variant)
    for K, V in ((64, 64), (256, 256), (96, 80), (100, 60), (1, 1)):
        for length in lengths:
            yield warmup.make_spec("chunk", H=2, HV=4, K=K, V=V, **length)
    # The one kernel where no blocks share K and Q, and in blocks that share a head.
    yield warmup.make_spec("chunk", B=4, T=2048, H=32, HV=32, K=128, V=128)
    yield warmup.make_spec("chunk", B=1, T=8192, H=16, HV=64, K=128, V=128)


def ring_specs(types: Iterable[tuple[str, str]]) -> Iterator[Spec]:
    """Steps and drafts of pools with a ring: dtypes, layouts, batches and numbers of drafts, then other sizes."""
    square = {"H": 16, "HV": 32, "K": 128, "V": 128}
    for (dtype, state), layout, T in product(types, ("kv", "vk"), (1, 2, 8, 16)):
        for B in (1, 8, 256):
            yield warmup.make_spec("ring", B=B, T=T, dtype=dtype, state_dtype=state, layout=layout, **square)
    for layout in ("kv", "vk"):
        yield warmup.make_spec("ring", B=1, T=1, layout=layout, l2norm=False, pad=3, **square)


def other_ring_specs() -> Iterator[Spec]:
    sizes = ((64, 64), (256, 256), (192, 128), (96, 80), (100, 60), (1, 1))
    for (K, V), layout, state, B in product(sizes, ("kv", "vk"), ("float32", "bfloat16"), (1, 256)):
        yield warmup.make_spec("ring", B=B, T=1, H=2, HV=4, K=K, V=V, layout=layout, state_dtype=state)


def jobs(specs: Iterable[Spec], arch: int) -> list[Job]:
    """The different kernels that calls choose on a GPU."""
    return list(dict(warmup.specializations(list(specs), loader.Gpu(arch, 132, SHARED[arch], arch >= 90))).values())


def all_specs() -> list[Spec]:
    rings = [*ring_specs(product(DTYPES, DTYPES)), *other_ring_specs()]
    return [*recurrent_specs(), *chunk_specs(), *rings, warmup.make_spec("gate", B=1, T=1, H=1, HV=1, K=1, V=1)]


def covering(wanted: list[Job], seen: Iterable[Job] = ()) -> list[Job]:
    """A few of the kernels that have every value of every definition at least once.

    Values that are seen elsewhere do not count, but each kernel is there.
    """

    def parts(job: Job) -> set[tuple[str, Any]]:
        return {(job[0], item) for item in (*job[1].items(), None)}

    missing = set().union(*map(parts, wanted))
    missing -= {part for job in seen for part in parts(job) if part[1] is not None}
    chosen = []
    while missing:
        job = max(wanted, key=lambda job: len(missing & parts(job)))
        missing -= parts(job)
        chosen.append(job)
    return chosen


def check(compiled: Iterable[nvrtc.Compiled]) -> None:
    """Compare with what the launchers pass, and print what ptxas said (pytest -rP)."""
    compiled = list(compiled)
    print(nvrtc.report(compiled))
    layouts = params_layouts()
    for kernel in compiled:
        if kernel.stem in layouts:
            assert kernel.params == layouts[kernel.stem].size, f"the arguments of {kernel.stem} have another layout"
        if kernel.arch >= 90 and loader.read_source(kernel.stem).dependent:
            beside = kernel.stem == "chunk_state_sm90" and kernel.defines.get("GDR_BESIDE")
            assert kernel.waits, f"{kernel.stem} is launched as a dependent kernel and does not wait"
            assert kernel.waits_first != bool(beside), f"{kernel.stem} does not wait when it should"


def params_layouts() -> dict[str, loader.Params]:
    """The arguments of each kernel as its launcher packs them."""
    layouts: dict[str, loader.Params] = {}
    for op, module in warmup.launchers():
        stems = [path.stem for path in loader.sources().glob(f"{op}*.cu")]
        found = [value for value in vars(module).values() if isinstance(value, loader.Params)]
        if len(found) == 1:
            layouts |= dict.fromkeys(stems, found[0])
        layouts |= getattr(module, "PARAMS", {})
    return layouts


def test_every_source_is_a_kernel_that_some_call_uses() -> None:
    stems = {stem for arch in (90, 120) for stem, _ in jobs(all_specs(), arch)}
    assert stems == {path.stem for path in loader.sources().glob("*.cu")}
    assert stems == set(params_layouts())


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_kernels_compile_for(arch: int) -> None:
    """Each kernel, in the ways that neither an architecture with the same code nor another test shows."""
    alike = {86: 80, 89: 80, 100: 90, 120: 100}
    seen = recurrence_on_sm_90() if arch == 90 else []
    if arch in alike:
        seen = jobs(all_specs(), alike[arch])
    check(nvrtc.compile_all((*job, arch) for job in covering(jobs(all_specs(), arch), seen)))


def recurrence_on_sm_90() -> list[Job]:
    types = (("bfloat16", "float32"), ("float32", "float32"), ("float16", "float16"))
    wanted = jobs([*square_specs(types), *ring_specs(types)], 90)
    wide_slots = [(stem, {**defines, "GDR_INITIAL_SLOTS": 8}) for stem, defines in wanted if stem.startswith("ring_")]
    return wanted + [job for job in wide_slots if job[0] not in ("ring_commit", "ring_reset")]


def test_kernels_of_the_recurrence_do_not_spill_on_sm_90() -> None:
    compiled = nvrtc.compile_all((*job, 90) for job in recurrence_on_sm_90())
    check(compiled)
    check_spills(compiled)


def test_the_one_kernel_keeps_few_values_in_local_memory() -> None:
    """The walk does: packing the state early is worth more than they cost."""
    wanted = [job for job in jobs(chunk_specs(), 90) if job[0] == "chunk_fused_sm90"]
    chosen = covering(wanted)
    for name, values in (("GDR_COLUMNS", {64, 128}), ("GDR_CLUSTER", {1, 2})):
        assert {defines[name] for _, defines in chosen} == values
    compiled = nvrtc.compile_all((*job, 90) for job in chosen)
    assert max(kernel.stack for kernel in compiled) <= 144, "\n" + nvrtc.report(compiled)


def check_spills(compiled: list[nvrtc.Compiled]) -> None:
    spilled = [kernel for kernel in compiled if kernel.spills or kernel.stack]
    assert not spilled, "\n" + nvrtc.report(spilled)


@pytest.mark.slow
@pytest.mark.skipif("GDR_TEST_ALL_KERNELS" not in os.environ, reason="takes ten minutes; set GDR_TEST_ALL_KERNELS=1")
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_all_kernels_compile_for(arch: int) -> None:
    compiled = nvrtc.compile_all((*job, arch) for job in jobs(all_specs(), arch))
    check(compiled)
    if arch == 90:
        check_spills([c for c in compiled if c.defines.get("GDR_K") == c.defines.get("GDR_V") == 128])


def test_a_failure_names_the_kernel_and_the_line(tmp_path: Any) -> None:
    (tmp_path / "include" / "gdr").mkdir(parents=True)
    (tmp_path / "bad.cu").write_text('// bad\nextern "C" __global__ void bad() { return nothing; }\n')
    with pytest.raises(nvrtc.Failed, match=r"bad\.cu\(2\): error: identifier \"nothing\" is undefined"):
        nvrtc.compile("bad", {}, 90, tmp_path)
