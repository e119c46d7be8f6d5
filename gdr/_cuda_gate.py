"""Launches the gates on a CUDA device."""

from __future__ import annotations

from functools import reduce
from operator import or_

from gdr import _arrays, _cuda_loader
from gdr._cuda_fused_recurrent import TYPES
from gdr._inputs import Call, refuse_misaligned
from gdr._spec import Spec

_THREADS = 256
_MAX_BLOCKS = 4096  # a thread then takes several elements
_params = _cuda_loader.Params("6Q 3q 6q 2q 4i 3f")
PARAMS = {"gate": _params}


class Plan:
    """What the calls with one signature share."""

    def __init__(self, call: Call) -> None:
        spec = call.spec
        count = spec.B * spec.T * spec.HV
        self.kernel = _cuda_loader.load("gate", {}, int(spec.device))
        self.grid = min(-(-count // _THREADS), _MAX_BLOCKS), 1, 1
        # The fields of Params after the pointers.
        self.fixed = (
            *(count, spec.T, spec.HV),
            *(step for name in ("a", "b", "A_log", "dt_bias") for step in spec.strides[name]),
            *(TYPES[spec.dtypes[name]] for name in ("A_log", "dt_bias", "a", "b")),
            *(call.softplus_beta, 1 / call.softplus_beta, call.softplus_threshold),
        )


def run(call: Call) -> None:
    """Fill ``call.g`` and ``call.beta``, new contiguous float32 arrays."""
    plan = call.spec.plan.get("gate")
    if plan is None:
        plan = call.spec.plan["gate"] = Plan(call)
    operands = call.A_log, call.dt_bias, call.a, call.b, call.g, call.beta
    pointers = [*map(_arrays.pointer, operands)]
    if reduce(or_, pointers) & 7:
        refuse_misaligned(call)
    _params.pack(*pointers, *plan.fixed)
    plan.kernel.launch(plan.grid, (_THREADS, 1, 1), _params, call.stream)


def specializations(spec: Spec, gpu: _cuda_loader.Gpu) -> list[_cuda_loader.Specialization]:
    """The kernels that a call needs, for ahead-of-time compilation: always the same one."""
    return [("gate", {})]
