"""The gated delta rule on NumPy and CuPy: the recurrence of Gated DeltaNet, its chunkwise form and its state pool."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdr._cuda_loader import CompileError, CudaUnavailable
from gdr._explain import explain
from gdr._warmup import warmup
from gdr.chunk import chunk_gated_delta_rule
from gdr.fused_recurrent import fused_recurrent_gated_delta_rule, fused_sigmoid_gating_delta_rule_update
from gdr.gate import gated_delta_rule_gate
from gdr.state import DeltaRuleState

if TYPE_CHECKING:
    from gdr import reference, testing, varlen

__version__ = "0.1.0"

__all__ = [
    "CompileError",
    "CudaUnavailable",
    "DeltaRuleState",
    "chunk_gated_delta_rule",
    "explain",
    "fused_recurrent_gated_delta_rule",
    "fused_sigmoid_gating_delta_rule_update",
    "gated_delta_rule_gate",
    "reference",
    "testing",
    "varlen",
    "warmup",
]

_MODULES = ("reference", "testing", "varlen")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gdr.{name}")
    raise AttributeError(f"module 'gdr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
