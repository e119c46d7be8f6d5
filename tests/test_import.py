"""What `import gdr` costs and brings; the names, signatures and docstrings of the public API."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

import gdr

POSITIONAL = {
    "fused_sigmoid_gating_delta_rule_update": [
        "A_log", "a", "dt_bias", "softplus_beta", "softplus_threshold", "q", "k", "v", "b",
        "initial_state_source", "initial_state_indices", "scale", "use_qk_l2norm_in_kernel", "cu_seqlens",
    ],
    "fused_recurrent_gated_delta_rule": [
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
        "cu_seqlens",
    ],
    "chunk_gated_delta_rule": [
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
        "cu_seqlens",
    ],
    "gated_delta_rule_gate": ["A_log", "a", "dt_bias", "b"],
    "DeltaRuleState": ["num_slots", "num_v_heads", "head_k_dim", "head_v_dim"],
}  # fmt: skip
KEYWORDS = {
    "fused_sigmoid_gating_delta_rule_update": {
        "output_state_indices": None,
        "state_layout": "kv",
        "disable_state_update": False,
        "out": None,
        "check": None,
    },
    "fused_recurrent_gated_delta_rule": {"state_layout": "kv", "out": None, "check": None},
    "chunk_gated_delta_rule": {
        "state_layout": "kv",
        "out": None,
        "check": None,
        "chunk_size": 64,
        "batch_invariant": False,
    },
    "gated_delta_rule_gate": {"softplus_beta": 1.0, "softplus_threshold": 20.0},
    "DeltaRuleState": {
        "num_k_heads": None,
        "A_log": None,
        "dt_bias": None,
        "scale": None,
        "use_qk_l2norm": True,
        "softplus_beta": 1.0,
        "softplus_threshold": 20.0,
        "dtype": "float32",
        "layout": "kv",
        "device": "cpu",
    },
}
METHODS = ["alloc", "free", "reset", "fork", "step", "prefill", "read", "write", "save", "load", "to"]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"CUDA_PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_little():
    code = "import sys, numpy; before = set(sys.modules); import gdr; print(*set(sys.modules) - before)"
    brought = {name.partition(".")[0] for name in run_python(code).split()}
    assert "gdr" in brought
    assert brought - sys.stdlib_module_names <= {"gdr", "ml_dtypes", "threadpoolctl"}


def test_using_the_host_brings_no_gpu_library():
    code = """
import sys, gdr
from gdr.testing import make_inputs
x = make_inputs()
gdr.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
gdr.fused_recurrent_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
s = gdr.DeltaRuleState(4, 2, 16, 16, A_log=x.A_log); s.step(x.q[:, :1], x.k[:, :1], x.v[:, :1], x.a[:, :1], x.b[:, :1], s.alloc(2))
print(*{name.partition('.')[0] for name in sys.modules})
"""  # noqa: E501
    assert not {"cupy", "cupyx", "torch", "jax", "matplotlib"} & set(run_python(code).split())


@pytest.mark.parametrize("name", list(POSITIONAL))
def test_signatures(name):
    parameters = inspect.signature(getattr(gdr, name)).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[name]
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords.items() >= KEYWORDS[name].items()
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())


def test_positional_order_is_that_of_the_oracles():
    from gdr import reference

    for name in ("fused_sigmoid_gating_delta_rule_update", "fused_recurrent_gated_delta_rule",
                 "chunk_gated_delta_rule", "gated_delta_rule_gate"):  # fmt: skip
        want = inspect.signature(getattr(reference, name)).parameters
        got = inspect.signature(getattr(gdr, name)).parameters
        for parameter in want.values():
            assert got[parameter.name].kind == parameter.kind
            assert got[parameter.name].default == parameter.default


def test_public_names():
    for name in gdr.__all__:
        assert getattr(gdr, name) is not None
        assert name in dir(gdr)
    assert set(gdr.__all__) >= {*POSITIONAL, "reference", "testing"}
    with pytest.raises(AttributeError, match="no_such_name"):
        gdr.no_such_name  # noqa: B018
    assert resources.files("gdr").joinpath("py.typed").is_file()
    assert gdr.__version__.count(".") == 2


@pytest.mark.parametrize("name", [n for n in POSITIONAL if n != "DeltaRuleState"])
def test_operations_have_whole_docstrings(name):
    operation = getattr(gdr, name)
    text = inspect.getdoc(operation)
    for section in ("Parameters", "Returns", "Raises", "Notes", "Examples"):
        assert f"\n{section}\n---" in text, section
    for parameter in inspect.signature(operation).parameters:
        assert parameter in text, parameter


def test_methods_have_docstrings():
    for name in METHODS:
        assert inspect.getdoc(getattr(gdr.DeltaRuleState, name)), name
    for name in ("num_free", "nbytes", "pool"):
        assert inspect.getdoc(getattr(gdr.DeltaRuleState, name)), name


def public_modules():
    return ["gdr"] + [f"gdr.{m.name}" for m in pkgutil.iter_modules(gdr.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", public_modules())
def test_examples_in_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    with np.printoptions():
        failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed
