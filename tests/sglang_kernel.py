"""Loads SGLang's fused decode function out of its one file, without SGLang."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock


def load(path: str | Path) -> Callable[..., Any]:
    """Return the function of a file ``fused_sigmoid_gating_recurrent.py``.

    The modules of SGLang that the file imports are replaced by the answers that they give on this machine.
    """
    import torch
    import triton  # noqa: F401  the file's import of it would be undone below

    major, minor = torch.cuda.get_device_capability()
    utils, jit_utils = types.ModuleType("sglang.srt.utils"), types.ModuleType("sglang.kernels.jit.utils")
    utils.get_device_sm = lambda: 10 * major + minor
    utils.is_cuda = lambda: True
    utils.is_hip = utils.is_gfx95_supported = lambda: False
    utils.is_sm90_supported = jit_utils.is_arch_support_pdl = lambda: major >= 9
    packages = ("sglang", "sglang.srt", "sglang.kernels", "sglang.kernels.jit")
    modules = {name: types.ModuleType(name) for name in packages} | {m.__name__: m for m in (utils, jit_utils)}
    spec = importlib.util.spec_from_file_location("sglang_fused_sigmoid_gating_recurrent", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules | {spec.name: module}):
        spec.loader.exec_module(module)
    return module.fused_sigmoid_gating_delta_rule_update
