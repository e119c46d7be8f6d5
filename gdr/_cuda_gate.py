"""Launches the gates on a CUDA device."""

from __future__ import annotations

from gdr import _arrays, _cuda_loader
from gdr._cuda_fused_recurrent import TYPES
from gdr._inputs import Call, refuse_misaligned
from gdr._spec import Spec

_THREADS = 256
_MAX_BLOCKS = 4096  # a thread then takes several elements
_params = _cuda_loader.Params("6Q 3q 6q 2q 4i 3f")
PARAMS = {"gate": _params}


def run(call: Call) -> None:
    """Fill ``call.g`` and ``call.beta``, new contiguous float32 arrays."""
    refuse_misaligned(call)
    spec = call.spec
    count = spec.B * spec.T * spec.HV
    pointer = _arrays.pointer
    operands = (call.A_log, call.dt_bias, call.a, call.b, call.g, call.beta)
    _params.pack(
        *(pointer(x) for x in operands),
        count,
        spec.T,
        spec.HV,
        *spec.strides["a"],
        *spec.strides["b"],
        spec.strides["A_log"][0],
        spec.strides["dt_bias"][0],
        *(TYPES[spec.dtypes[name]] for name in ("A_log", "dt_bias", "a", "b")),
        call.softplus_beta,
        1 / call.softplus_beta,
        call.softplus_threshold,
    )
    kernel = _cuda_loader.load("gate", {}, int(spec.device))
    blocks = min(-(-count // _THREADS), _MAX_BLOCKS)
    kernel.launch((blocks, 1, 1), (_THREADS, 1, 1), _params, call.stream)


def specializations(spec: Spec, gpu: _cuda_loader.Gpu) -> list[tuple[str, dict[str, _cuda_loader.Define]]]:
    """The kernels that a call needs, for ahead-of-time compilation: always the same one."""
    return [("gate", {})]
