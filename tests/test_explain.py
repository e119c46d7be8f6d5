"""`gdr.explain` names what would run, and runs nothing."""

import numpy as np
import pytest

import gdr


def test_an_operation_is_explained_and_not_run(monkeypatch):
    monkeypatch.setenv("GDR_CPU", "numpy")
    x = gdr.testing.make_inputs(B=2, T=3, H=2, HV=4, K=8, V=8, dtype="float32")
    pool, before = x.state.copy(), x.state.copy()
    out = np.full_like(x.v, np.nan)
    text = gdr.explain(
        gdr.fused_sigmoid_gating_delta_rule_update,
        *(x.A_log, x.a, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.b, pool, x.slots),
        out=out,
    )
    assert "2 sequences, 6 tokens, H=2 HV=4 K=8 V=8, float32, float32 state read, float32 state written" in text
    assert "recurrent, token by token" in text
    assert "backend: numpy, because GDR_CPU says so" in text
    assert np.isnan(out).all()
    assert pool.tobytes() == before.tobytes()


@pytest.mark.parametrize(("T", "form"), [(1, "recurrent"), (512, "chunkwise")])
def test_prefill_says_which_form_it_chooses(T, form):
    x = gdr.testing.make_inputs(B=1, T=T, H=2, HV=4, K=8, V=8, dtype="float32")
    state = gdr.DeltaRuleState(2, 4, 8, 8, num_k_heads=2, A_log=x.A_log)
    slots = state.alloc(1)
    text = gdr.explain(state.prefill, x.q, x.k, x.v, x.a, x.b, slots)
    assert f"form: {form}" in text
    assert not state.read(slots).any()
    state.prefill(x.q, x.k, x.v, x.a, x.b, slots)  # planning is over
    assert state.read(slots).any()


def test_a_pool_with_a_ring_says_when_states_are_written(monkeypatch):
    monkeypatch.setenv("GDR_CPU", "numpy")
    x = gdr.testing.make_inputs(B=1, T=1, H=2, HV=4, K=8, V=8, dtype="float32")
    state = gdr.DeltaRuleState(2, 4, 8, 8, num_k_heads=2, A_log=x.A_log, ring=5)
    tokens = (x.q, x.k, x.v, x.a, x.b, state.alloc(1))
    assert "form: one token; a state is written after 5\n" in gdr.explain(state.step, *tokens)
    assert "form: drafts, each after its parents; no state is written\n" in gdr.explain(state.verify, *tokens)
    state.step(*tokens)
    text = gdr.explain(state.prefill, *(np.repeat(y, 40, axis=1) for y in tokens[:5]), tokens[5])
    assert "form: chunkwise" in text
    assert "first: what is pending in the ring is written into the states\n" in text


def test_a_wrong_call_is_refused_as_ever():
    x = gdr.testing.make_inputs(B=1, T=4, H=2, HV=4, K=8, V=8)
    with pytest.raises(ValueError, match=r"^beta: "):
        gdr.explain(gdr.chunk_gated_delta_rule, x.q, x.k, x.v, x.g, x.beta[:, :2])


def test_what_runs_no_operation_is_refused():
    with pytest.raises(TypeError, match=r"^function: "):
        gdr.explain(gdr.varlen.cu_seqlens_of, [1, 2])


@pytest.mark.gpu
def test_a_gpu_call_names_its_kernels():
    x = gdr.testing.make_inputs(B=1, T=1024, H=2, HV=4, K=128, V=128, dtype="float16", xp="cupy", device="cuda")
    text = gdr.explain(gdr.chunk_gated_delta_rule, x.q, x.k, x.v, x.g, x.beta)
    assert "backend: cuda, because the arrays are on CUDA device" in text
    assert "kernel: chunk_prepare" in text
    assert "kernel: chunk_state" in text
