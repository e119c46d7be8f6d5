"""Qwen3-Next and Qwen3.5 of transformers with their linear-attention layers on gdr.

All the integrations' tests::

    python -m pip install torch 'transformers<5.25' accelerate && python -m pytest -k integrations
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gdr._backends  # noqa: E402
import gdr._inputs  # noqa: E402
from gdr.integrations import transformers as integration  # noqa: E402
from gdr.integrations.transformers import patch, patched, unpatch  # noqa: E402

FAMILIES = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LINEAR = 3  # of the four layers
QWEN3_5 = "transformers.models.qwen3_5"


def make_model(family="qwen3_next", device="cpu", dtype=torch.float32, seed=0):
    module = f"transformers.models.{family}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(importlib.import_module(f"{module}.configuration_{family}"), config_class)(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LINEAR + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        initializer_range=0.05,
        **(
            {}
            if family == "qwen3_5"
            else {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            }
        ),
    )
    model = getattr(importlib.import_module(f"{module}.modeling_{family}"), model_class)(config)
    return model.eval().to(device, dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, device):
    return make_model(family, device)


@pytest.fixture(scope="module")
def cpu_model():
    return make_model()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Every call of gdr, as (operation, B, T)."""
    seen = []
    recognize = gdr._inputs.recognize

    def spy(*args):
        checked = recognize(*args)
        seen.append((checked.spec.op, checked.spec.B, checked.spec.T))
        return checked

    monkeypatch.setattr(gdr._inputs, "recognize", spy)
    return seen


def prompt(model, B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 128, (B, T), generator=generator).to(model.device)


def generate(model, ids, mask=None, tokens=64, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def assert_near(got, want, rtol=1e-5):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= rtol, f"the largest difference is {error:.1e} of the largest value"


def states(cache):
    """The recurrent states in a cache, of any version of transformers."""
    found = getattr(cache, "recurrent_states", None) or [
        getattr(layer, "recurrent_states", None) for layer in cache.layers
    ]
    found = [x[0] if isinstance(x, dict) else x for x in found]
    return [x for x in found if x is not None]


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 70), (2, 5), (3, 64), (2, 200)])
def test_logits_are_those_of_the_unpatched_model(model, calls, B, T):
    ids = prompt(model, B, T)
    want = model(ids).logits
    assert calls == []
    with patched(model):
        got = model(ids).logits
    threshold = gdr._backends.CHUNK_FROM[model.device.type]
    assert calls == [("chunk" if threshold <= T else "fused_recurrent", B, T)] * LINEAR
    assert_near(got, want)


@pytest.mark.parametrize(("B", "padded"), [(1, False), (2, True), (5, True)])
def test_greedy_generation_is_that_of_the_unpatched_model(model, calls, B, padded):
    ids = prompt(model, B, 40)
    mask = torch.ones_like(ids)
    if padded:
        for n, pad in enumerate((7, 0, 39, 13, 1)[:B]):
            mask[n, :pad] = 0
    want = generate(model, ids, mask)
    with patched(model):
        got = generate(model, ids, mask)
    assert len(calls) == 64 * LINEAR
    assert calls[LINEAR:] == [("fused_recurrent", B, 1)] * (63 * LINEAR)
    assert torch.equal(got.sequences, want.sequences)
    assert got.sequences[:, 40:].unique().numel() > 8  # a model that says something
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        assert_near(mine, theirs)


def test_cache_holds_the_states_of_the_unpatched_model(model):
    ids = prompt(model, 2, 50)
    caches = []
    for context in (patched, None):
        with patched(model) if context else torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            for token in range(3):
                model(ids[:, token : token + 1], past_key_values=cache)
        caches.append(states(cache))
    assert len(caches[0]) == len(caches[1]) == LINEAR
    for got, want in zip(*caches, strict=True):
        assert_near(got, want)


def test_a_cache_goes_from_the_one_to_the_other(cpu_model):
    ids = prompt(cpu_model, 2, 50)
    want = cpu_model(ids, use_cache=True)
    with patched(cpu_model):
        cache = cpu_model(ids[:, :48], use_cache=True).past_key_values
    cpu_model(ids[:, 48:49], past_key_values=cache)
    with patched(cpu_model):
        got = cpu_model(ids[:, 49:], past_key_values=cache)
    assert_near(got.logits[:, -1], want.logits[:, -1])


def test_beam_search_is_that_of_the_unpatched_model(cpu_model):
    ids = prompt(cpu_model, 2, 20)
    want = generate(cpu_model, ids, tokens=16, num_beams=3)
    with patched(cpu_model):
        got = generate(cpu_model, ids, tokens=16, num_beams=3)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_layers_are_as_near_to_float32_as_unpatched_ones(device, dtype):
    # Whole models say little here: a rounding sends a token to another expert.
    model = make_model("qwen3_next", device, dtype)
    layer = next(m for m in model.modules() if type(m).__name__ in integration.LAYERS)
    x = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    theirs = layer(x)
    with patched(layer):
        mine = layer(x)
    assert mine.dtype == dtype
    exact = layer.float()(x.float())
    near, far = ((y.float() - exact).square().mean().sqrt().item() for y in (mine, theirs))
    assert near <= 1.05 * far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_decode(device, dtype):
    model = make_model("qwen3_5" if importlib.util.find_spec(QWEN3_5) else "qwen3_next", device, dtype)
    ids = prompt(model, 3, 40)
    want = model(ids).logits[:, 39:]
    with patched(model):
        cache = model(ids[:, :39], use_cache=True).past_key_values
        got = model(ids[:, 39:], past_key_values=cache).logits
    assert_near(got, want, 0.2 if dtype == torch.bfloat16 else 0.02)


def test_only_the_patched_model_changes_and_all_of_it_comes_back(calls):
    model, other = make_model(seed=0), make_model(seed=1)
    before = [dict(vars(layer)) for layer in model.modules()]
    ids = prompt(model, 1, 4)
    assert patch(model) is model
    assert patch(model) is model  # once more changes nothing
    other(ids)
    assert calls == []
    model(ids)
    assert len(calls) == LINEAR
    with patched(model):
        pass
    model(ids)  # a context leaves a model patched that was patched before
    assert len(calls) == 2 * LINEAR
    assert unpatch(model) is model
    assert [dict(vars(layer)) for layer in model.modules()] == before
    with pytest.raises(RuntimeError, match="of the caller"), patched(model):
        raise RuntimeError("an error of the caller's")
    assert [dict(vars(layer)) for layer in model.modules()] == before
    model(ids)
    assert len(calls) == 2 * LINEAR


def test_a_copy_of_a_patched_model_is_patched_and_its_own(calls):
    model = patch(make_model())
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    ids = prompt(twin, 1, 4)
    got = twin(ids).logits
    assert len(calls) == LINEAR
    assert_near(got, unpatch(twin)(ids).logits)


def test_a_model_with_hooks_of_accelerate(calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model()
    ids = prompt(model, 1, 20)
    want = model(ids).logits
    moved = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    for layer in model.modules():
        if type(layer).__name__ in integration.LAYERS:
            hooks.add_hook_to_module(layer, Hook())
    with patched(model):
        got = model(ids).logits
    assert len(calls) == len(moved) == LINEAR
    assert_near(got, want)
    model(ids)
    assert (len(calls), len(moved)) == (LINEAR, 2 * LINEAR)


def test_a_model_is_patched_whole_or_not_at_all(calls):
    model = make_model()
    last = [layer for layer in model.modules() if type(layer).__name__ in integration.LAYERS][-1]
    last.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ValueError, match=r"forward is not the one of transformers"):
        patch(model)
    model(prompt(model, 1, 4))
    assert calls == []


@pytest.mark.slow
def test_a_compiled_model_runs_on_gdr(calls):
    model = patch(make_model("qwen3_5"))  # a dense one: some versions cannot compile their own experts
    ids = prompt(model, 1, 20)
    got = torch.compile(model, backend="eager")(ids).logits
    assert len(calls) == LINEAR
    assert_near(got, unpatch(model)(ids).logits)


def test_gradients_are_refused(cpu_model):
    ids = prompt(cpu_model, 1, 20)
    with patched(cpu_model), torch.enable_grad(), pytest.raises(TypeError, match="query: requires grad"):
        cpu_model(ids)


@pytest.mark.parametrize("name", ["_chunk", "_recurrent", "_update"])
def test_packed_sequences_are_refused(name):
    q, g = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        getattr(integration, name)(q, q, q, g=g, beta=g, initial_state=None, cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("version", ["4.56.2", "5.25.0", "6.0.0.dev0"])
def test_other_versions_are_refused_by_name(cpu_model, monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"transformers {version}: .* 4\.57 to 5\.24"):
        patch(cpu_model)


def test_versions_are_those_that_the_documentation_names():
    page = Path(__file__).parents[1] / "docs" / "from-transformers.md"
    if not page.exists():
        pytest.skip("needs a checkout")
    first, last = (".".join(map(str, v)) for v in (integration.FIRST_VERSION, integration.LAST_VERSION))
    for text in (page.read_text(encoding="utf-8"), patch.__doc__):
        assert f"transformers {first} to {last}" in text


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has no layer of Qwen3NextGatedDeltaNet"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        patch("Qwen/Qwen3-Next-80B-A3B-Instruct")
