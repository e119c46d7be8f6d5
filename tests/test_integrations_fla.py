"""The functions of flash-linear-attention on gdr.

Without a GPU they are compared with the float64 reference, and their signatures with those of fla-core where it is
installed.  With one they are compared with flash-linear-attention's own as well.
"""

from __future__ import annotations

import doctest
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from signatures import positional, positional_of

torch = pytest.importorskip("torch")

from gdr import reference  # noqa: E402
from gdr.integrations import fla  # noqa: E402
from gdr.testing import assert_close, make_inputs, relative_rms, to_numpy  # noqa: E402

CHUNK, RECURRENT = fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule
FUNCTIONS = [CHUNK, RECURRENT]
RTOL = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# The chunkwise form on a GPU multiplies in the operands' dtype, and so do its states.
RTOL_TENSOR_CORES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=FUNCTIONS, ids=["chunk", "recurrent"])
def function(request):
    return request.param


def problem(device="cpu", **shape):
    shape = {"B": 2, "T": 90, "H": 2, "HV": 4, "K": 16, "V": 24, "gates": "slow", "normalize": False} | shape
    return make_inputs(**shape, xp="torch", device=device)


def call(function, x, **rest):
    rest = {"beta": x.beta, "g": x.g, "use_qk_l2norm_in_kernel": True, "output_final_state": True} | rest
    return function(x.q, x.k, x.v, **{"cu_seqlens": x.cu_seqlens} | rest)


def expected(x, g=None, beta=None, **rest):
    arrays = {name: to_numpy(value) for name, value in vars(x).items()}
    return reference.fused_recurrent_gated_delta_rule(
        *(arrays[name] for name in "qkv"),
        arrays["g"] if g is None else g,
        arrays["beta"] if beta is None else beta,
        use_qk_l2norm_in_kernel=True,
        output_final_state=True,
        cu_seqlens=arrays["cu_seqlens"],
        **rest,
    )


def assert_pair(got, want):
    assert got[0].dtype in RTOL
    assert got[1].dtype == torch.float32
    dtype = got[0].dtype
    table, state_dtype = (RTOL_TENSOR_CORES, dtype) if got[0].is_cuda else (RTOL, torch.float32)
    assert_close(got[0], want[0], rtol=table[dtype], name="o")
    assert_close(got[1], want[1], rtol=table[state_dtype], name="final_state")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [{}, {"T": 1}, {"lengths": [70, 0, 1, 33]}, {"dtype": "bfloat16"}, {"dtype": "float16", "T": 3}],
    ids=str,
)
def test_against_the_reference(function, device, shape):
    x = problem(device, **shape)
    assert_pair(call(function, x), expected(x))


@pytest.mark.parametrize("state_v_first", [False, True])
def test_initial_states(function, state_v_first):
    layout = "vk" if state_v_first else "kv"
    x = problem(lengths=[40, 5], layout=layout)
    h = x.initial_state
    before = h.clone()
    want = expected(x, initial_state=to_numpy(h), state_layout=layout, scale=0.3)
    assert_pair(call(function, x, initial_state=h, state_v_first=state_v_first, scale=0.3), want)
    assert torch.equal(h, before)
    if state_v_first:
        with pytest.warns(DeprecationWarning, match="transpose_state_layout"):
            assert_pair(call(function, x, initial_state=h, transpose_state_layout=True, scale=0.3), want)
        with pytest.raises(ValueError, match="transpose_state_layout"):
            call(function, x, state_v_first=True, transpose_state_layout=True)


def test_no_final_state_and_no_norm(function):
    x = problem(normalize=True)
    o, h = call(function, x, output_final_state=False, use_qk_l2norm_in_kernel=False)
    assert h is None
    assert_close(o, expected(x)[0], rtol=5e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_gates_in_the_kernel(function, biased, twice):
    x = problem()
    bias = x.dt_bias if biased else torch.zeros_like(x.dt_bias)
    g, beta = reference.gated_delta_rule_gate(*map(to_numpy, (x.A_log, x.a, bias, x.b)))
    got = call(
        function,
        x,
        g=x.a,
        beta=x.b,
        A_log=torch.nn.Parameter(x.A_log, requires_grad=False),
        dt_bias=x.dt_bias if biased else None,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=twice,
    )
    assert_pair(got, expected(x, g, beta * (1 + twice)))


def test_recurrent_without_gates():
    x = problem()
    ones = np.ones(x.g.shape)
    assert_pair(call(RECURRENT, x, g=None, beta=None), expected(x, 0 * ones, ones))


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes(chunk_size):
    x = problem()
    assert_pair(call(CHUNK, x, chunk_size=chunk_size), expected(x))


@pytest.mark.parametrize("device", DEVICES)
def test_channels_first_operands(function, device):
    x = problem(device)
    want = call(function, x)
    x.q, x.k, x.v = (t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x.q, x.k, x.v))
    assert x.q.stride(-1) != 1
    for got, same in zip(call(function, x), want, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"])
def test_gradients_are_refused_with_the_reason(function, name):
    x = problem(T=2)
    tensors = {"q": x.q, "k": x.k, "v": x.v, "g": x.a, "beta": x.beta, "initial_state": x.initial_state}
    tensors |= {"A_log": x.A_log, "dt_bias": x.dt_bias, name: getattr(x, name).clone().requires_grad_()}
    if name == "g":
        tensors["g"] = x.a.clone().requires_grad_()
    with pytest.raises(TypeError, match=f"^{name}: requires grad, and gdr has no backward pass"):
        function(**tensors, use_gate_in_kernel=True)
    with torch.no_grad():
        function(**tensors, use_gate_in_kernel=True)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (CHUNK, "cu_seqlens_cpu"),
        (CHUNK, "chunk_indices"),
        (CHUNK, "cp_context"),
        (RECURRENT, "gk"),
        (RECURRENT, "gv"),
    ],
)
def test_what_is_not_implemented_is_refused(function, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        call(function, problem(T=2), **{name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("rest", "name"),
    [
        ({"allow_neg_eigval": True}, "allow_neg_eigval"),
        ({"use_gate_in_kernel": True}, "A_log"),
        ({"A_log": torch.zeros(4)}, "A_log"),
        ({"dt_bias": torch.zeros(4)}, "dt_bias"),
        ({"beta": torch.zeros(2, 2, 4, 24)}, "beta"),
    ],
    ids=str,
)
def test_wrong_combinations_are_named(function, rest, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(function, problem(T=2), **rest)


def test_wrong_values_are_named():
    x = problem(T=2)
    with pytest.raises(ValueError, match=r"^chunk_size: expected 16, 32 or 64, got 128"):
        call(CHUNK, x, chunk_size=128)
    with pytest.raises(ValueError, match=r"^g: "):
        call(RECURRENT, x, g=None, use_gate_in_kernel=True, A_log=x.A_log)
    with pytest.raises(ValueError, match=r"^beta: "):
        call(RECURRENT, x, beta=None, use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("name", ["head_first", "use_exp2", "offsets"])
def test_unknown_keywords_are_refused(function, name):
    with pytest.raises(TypeError, match=name):
        call(function, problem(T=2), **{name: False})


def test_the_example_runs():
    tried = doctest.testmod(fla)
    assert tried.attempted
    assert not tried.failed


def test_signatures_are_flas(function):
    try:
        installed = importlib.metadata.distribution("fla-core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fla-core is not installed")
    if installed.version != fla.FLA_VERSION:
        pytest.skip(f"fla-core is {installed.version}, not {fla.FLA_VERSION}")
    file = function.__name__.removesuffix("_gated_delta_rule")
    path = Path(str(installed.locate_file(f"fla/ops/gated_delta_rule/{file}.py")))
    assert positional_of(function) == positional(path, function.__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"H": 4, "HV": 8, "K": 128, "V": 128, "T": 300},
        {"H": 4, "HV": 8, "K": 128, "V": 128, "lengths": [129, 1, 64, 70]},
        {"H": 2, "HV": 2, "K": 64, "V": 64, "T": 64, "layout": "vk"},
    ],
    ids=str,
)
def test_against_flash_linear_attention(function, shape, gates):
    theirs = getattr(pytest.importorskip("fla.ops.gated_delta_rule"), function.__name__)
    x = problem("cuda", dtype="bfloat16", **shape)
    x.cu_seqlens = None if x.cu_seqlens is None else x.cu_seqlens.long()
    rest = {"initial_state": x.initial_state, "state_v_first": shape.get("layout") == "vk"}
    if gates:
        rest |= {"g": x.a, "beta": x.b, "A_log": x.A_log, "dt_bias": x.dt_bias}
        rest |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    got = call(function, x, **rest)
    with torch.no_grad():
        want = call(theirs, x, **rest)
    exact = expected(x, initial_state=to_numpy(x.initial_state), state_layout=shape.get("layout", "kv"))
    for name, mine, other, true in zip(("o", "final_state"), got, want, exact, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        assert_close(mine, other, rtol=1e-2, name=name)
        assert relative_rms(mine, true) <= max(RTOL[torch.float32], 1.5 * relative_rms(other, true))
