"""How long does the state remember?  Recall against distance for several decays.

    python docs/examples/remembering.py [--plot remembering.svg]

Random pairs of keys and values are written into one state, one a token.  Then every key is asked for its value: the
answer is right when the value that it resembles most, of all that were written, is its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import gdr

TOKENS, KEY_DIM, VALUE_DIM, SEQUENCES = 512, 64, 64, 8
HALF_LIVES = (16, 64, 256, np.inf)
DISTANCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def recall() -> dict[float, np.ndarray]:
    """The share of right answers by distance, for each half-life: a head each."""
    rng = np.random.default_rng(0)
    HV = len(HALF_LIVES)
    k = rng.standard_normal((SEQUENCES, TOKENS, 1, KEY_DIM), np.float32)
    v = rng.standard_normal((SEQUENCES, TOKENS, 1, VALUE_DIM), np.float32)
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    g = np.broadcast_to(-np.log(2) / np.array(HALF_LIVES, np.float32), (SEQUENCES, TOKENS, HV))
    _, h = gdr.chunk_gated_delta_rule(
        k, k, np.repeat(v, HV, axis=2), g, np.ones_like(g), use_qk_l2norm_in_kernel=True, output_final_state=True
    )
    k, v = (x[:, :, 0] / np.linalg.norm(x[:, :, 0], axis=-1, keepdims=True) for x in (k, v))
    read = np.einsum("bhkv,btk->bhtv", h, k)
    right = np.einsum("bhtv,bsv->bhts", read, v).argmax(-1) == np.arange(TOKENS)
    # Distance 1 is the last token; neighbours are averaged, fewer where recall falls fast.
    share = {}
    for head, half_life in enumerate(HALF_LIVES):
        by_distance = right[:, head, ::-1].mean(axis=0)
        share[half_life] = np.array([by_distance[max(0, d - 1 - d // 8) : d + d // 8].mean() for d in DISTANCES])
    return share


def plot(share: dict[float, np.ndarray]) -> Any:
    """The shares as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axis = figure.subplots()
    for (half_life, values), color in zip(share.items(), ("#9ecae1", "#4292c6", "#08519c", "#d62728")):
        label = "no decay" if np.isinf(half_life) else f"half-life {half_life} tokens"
        axis.plot(DISTANCES, values, "o-", ms=4, color=color, label=label)
    axis.set(xscale="log", xlabel="tokens since the pair was written", ylabel="values recalled", ylim=(0, 1.02))
    axis.set_xticks(DISTANCES[::2], DISTANCES[::2])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def main() -> None:
    """Print the shares, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", metavar="FILE", help="draw recall against distance")
    args = parser.parse_args()
    share = recall()
    print("distance  " + "".join(f"{d:>6}" for d in DISTANCES))
    for half_life, values in share.items():
        print(f"{half_life:>8}  " + "".join(f"{value:>6.0%}" for value in values))
    if args.plot:
        plot(share).savefig(args.plot)
        print(args.plot)


if __name__ == "__main__":
    main()
