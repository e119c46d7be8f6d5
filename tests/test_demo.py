"""The demo: honest predictions, and a delta rule that is worth its error correction."""

from __future__ import annotations

import numpy as np
import pytest

from gdr import demo


@pytest.fixture(scope="module")
def reading():
    return demo.read(demo.read_texts([], 1024))


def _text(data):
    return demo.Text("text", np.asarray(data, np.uint8))


def _some_text(length=600, seed=0):
    words = [b"the ", b"gated ", b"delta ", b"rule ", b"forgets ", b"and ", b"writes "]
    rng = np.random.default_rng(seed)
    return np.frombuffer(b"".join(words[i] for i in rng.integers(len(words), size=length)), np.uint8)[:length].copy()


@pytest.mark.parametrize("known", [100, 299, 301, 450], ids=lambda known: f"after {known}")
def test_the_future_has_no_part_in_a_prediction(known):
    data = _some_text()
    shuffled = data.copy()
    np.random.default_rng(1).shuffle(shuffled[known:])
    assert np.any(data[known:] != shuffled[known:])
    before, after = demo.read([_text(data)]), demo.read([_text(shuffled)])
    for name in ("delta", "hebbian", "frequency"):
        (x,), (y,) = getattr(before, name), getattr(after, name)
        # bits[i] is the cost of byte i + 1, the last known one is known - 1.
        np.testing.assert_allclose(x.bits[: known - 1], y.bits[: known - 1], rtol=1e-4, err_msg=name)
        assert np.abs(x.bits[known - 1 :] - y.bits[known - 1 :]).max() > 0.1


def test_predictions_are_probabilities_known_before_the_byte():
    data = _some_text(200)
    scores = np.random.default_rng(2).standard_normal((200, 256)).astype(np.float32)
    p = demo.probabilities(scores, data)
    assert p.shape == (199, 256)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)
    changed = data.copy()
    changed[-1] ^= 1
    np.testing.assert_array_equal(demo.probabilities(scores, changed), p)


def test_useless_scores_cost_little_more_than_frequencies():
    data = _some_text(500)
    noise = 30 * np.random.default_rng(3).standard_normal((500, 256)).astype(np.float32)
    useless = demo.judge(noise, data).bits.sum()
    frequencies = demo.judge(np.zeros((500, 256), np.float32), data).bits.sum()
    assert useless <= frequencies + np.log2(len(demo.SHARPNESS)) + 0.01


def test_contexts_are_similar_as_far_as_they_end_alike():
    f = demo.features(np.frombuffer(b"xabcd.yabcd.zzzcd", np.uint8))
    alike = np.einsum("hk,hk->h", f[5], f[11]).mean()  # both after "abcd"
    less = np.einsum("hk,hk->h", f[5], f[17]).mean()  # only "cd" is common
    assert alike == pytest.approx(1, abs=1e-6)
    assert 0.4 < less < 0.8


def test_memory_without_error_correction_is_the_plain_recurrence():
    q, k, v, a, b = demo._operands(_some_text(150))
    decay, beta = 0.5 ** (1 / demo.HALF_LIFE), demo.LEARNING_RATE
    h = np.zeros((demo.HEADS, demo.KEY_DIM, demo.VALUE_DIM))
    want = np.empty(v.shape)
    for t in range(150):
        h = decay * h + k[t, :, :, None] * (beta * v[t])[:, None]
        want[t] = np.einsum("hkv,hk->hv", h, q[t])
    got = demo.without_error_correction(q, k, v, a, b, chunk=64)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_gates_are_the_ones_named():
    import gdr

    *_, a, b = demo._operands(_some_text(3))
    zeros = np.zeros(demo.HEADS, np.float32)
    g, beta = gdr.gated_delta_rule_gate(zeros, a[None], zeros, b[None])
    np.testing.assert_allclose(np.exp(g * demo.HALF_LIFE), 0.5, rtol=1e-4)
    np.testing.assert_allclose(beta, demo.LEARNING_RATE, rtol=1e-5)


def test_the_error_correction_pays(reading):
    def mean(outcomes, field):
        return np.concatenate([getattr(outcome, field) for outcome in outcomes]).mean()

    assert mean(reading.delta, "correct") > mean(reading.hebbian, "correct") + 0.05
    assert mean(reading.delta, "bits") < mean(reading.hebbian, "bits") - 0.3
    assert mean(reading.hebbian, "correct") > mean(reading.frequency, "correct") + 0.05


def test_stepping_is_prefilling(reading):
    assert reading.difference < 1e-3 * reading.magnitude
    assert reading.prefilled + reading.stepped == 8 * 1024


def test_texts_of_any_length_from_two_bytes():
    reading = demo.read([_text([1, 2]), _text([5] * 77), _text([0, 255, 0])])
    assert [len(outcome.bits) for outcome in reading.delta] == [1, 76, 2]
    assert "nan" not in demo.table(reading)


def test_progress_counts_every_byte():
    counts = []
    demo.read([_text(_some_text(50)), _text(_some_text(21))], progress=counts.append)
    assert sum(counts) == 71


def test_table_has_a_row_for_each_range_of_positions(reading):
    lines = demo.table(reading).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1-63", "64-255", "256-1023", "all"]


def test_plot(reading, tmp_path):
    demo.plot(reading, str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(demo.DemoError, match="cannot write"):
        demo.plot(reading, str(tmp_path / "curve.nonsense"))
    with pytest.raises(demo.DemoError, match="cannot write"):
        demo.plot(reading, str(tmp_path / "no" / "curve.png"))
