"""Pictures of what the rule does, computed by the library."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import gdr
from figures.style import BLUE, GREY, ORANGE
from gdr import demo


def _pairs(count: int, K: int, V: int, overlap: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys that share a common part, and values, each of length 1: [1, count, 1, K] and [1, count, 1, V]."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((1, count, 1, K)) + overlap * rng.standard_normal(K)
    v = rng.standard_normal((1, count, 1, V))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, v))


def recall() -> Figure:
    """Error of reading every stored value back, by the number of pairs, with and without error correction."""
    K = V = 64
    counts = [2, 4, 8, 16, 24, 32, 48, 64]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, overlap, title in zip(axes, (0.0, 0.7), ("random keys", "keys with a common part")):
        delta, plain = [], []
        for count in counts:
            k, v = _pairs(count, K, V, overlap, seed=count)
            ones = np.ones((1, count, 1))
            _, h = gdr.fused_recurrent_gated_delta_rule(k, k, v, 0 * ones, ones, scale=1.0, output_final_state=True)
            for states, into in ((h[0, 0], delta), (k[0, :, 0].T @ v[0, :, 0], plain)):
                error = k[0, :, 0] @ states - v[0, :, 0]
                into.append(np.sqrt((error**2).sum(-1).mean()))
        axis.plot(counts, plain, "o-", color=ORANGE, ms=4, label="u = v: no error correction")
        axis.plot(counts, delta, "o-", color=BLUE, ms=4, label="u = v − hᵀk: the delta rule")
        axis.set(title=title, xlabel=f"pairs written into a state of K = {K}", ylim=(0, 3))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error of what is read, relative to a value")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def forgetting() -> Figure:
    """What is left of a write after some tokens, for several half-lives."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    rng = np.random.default_rng(3)
    T, K = 512, 128
    distances = np.arange(0, T, 8)
    for half_life, color in ((32, "#9ecae1"), (128, "#4292c6"), (512, "#08519c")):
        k = rng.standard_normal((1, T, 1, K))
        v = np.zeros((1, T, 1, 1))
        v[0, 0] = 1  # one value, then nothing but other keys
        q = np.broadcast_to(k[:, :1], k.shape)
        g = np.full((1, T, 1), -np.log(2) / half_life)
        beta = np.full((1, T, 1), 0.05)
        beta[0, 0] = 1
        o, _ = gdr.fused_recurrent_gated_delta_rule(q, k, v, g, beta, scale=1.0, use_qk_l2norm_in_kernel=True)
        axis.plot(distances, o[0, distances, 0, 0], color=color, label=f"half-life {half_life}")
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set(xlabel="tokens since the write", ylabel="what is read of it", ylim=(-0.1, 1.05), xlim=(0, T))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def demo_curve() -> Figure:
    """The learning curve that ``gdr demo --plot`` draws."""
    return demo.learning_curve(demo.read(demo.read_texts([], 4096)))


def remembering() -> Figure:
    """Recall against distance, as docs/examples/remembering.py draws it."""
    from examples.remembering import plot
    from examples.remembering import recall as recall_by_distance

    return plot(recall_by_distance())
