"""Stream a long text through a state of fixed memory.

    python docs/examples/streaming.py [FILE] [--piece 512]

Reads a text piece by piece, as a server reads a long prompt: each piece is one prefill that goes on from the state of
the last.  However long the text is, the memory is one state.  Checks at the end that one prefill of the whole text
leaves the same state.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import gdr
from gdr.testing import relative_rms

H, HV, K, V = 2, 4, 64, 64


def projections(data: np.ndarray) -> tuple[np.ndarray, ...]:
    """The q, k, v, a and b of some bytes: a random embedding, as the layer of an untrained model gives them."""
    tables = np.random.default_rng(0)
    qk = tables.standard_normal((2, 256, H, K), np.float32)
    v = tables.standard_normal((256, HV, V), np.float32)
    ab = tables.standard_normal((2, 256, HV), np.float32)
    return tuple(x[data][None] for x in (*qk, v, *ab))


def main() -> None:
    """Read, and compare with one prefill of everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", help="a text (default: all topics of Python's help)")
    parser.add_argument("--piece", type=int, default=512, help="tokens of a piece (512)")
    args = parser.parse_args()
    text = Path(args.file).read_bytes() if args.file else "".join(topics.values()).encode()
    data = np.frombuffer(text, np.uint8)[: 1 << 17]

    state = gdr.DeltaRuleState(2, HV, K, V, num_k_heads=H, A_log=np.full(HV, -6.0))
    stream, whole = state.alloc(2)
    started = time.perf_counter()
    for first in range(0, len(data), args.piece):
        state.prefill(*projections(data[first : first + args.piece]), [stream])
    seconds = time.perf_counter() - started
    state.prefill(*projections(data), [whole])
    difference = relative_rms(state.read([stream]), state.read([whole]))
    print(f"{len(data):,} tokens in pieces of {args.piece}: {len(data) / seconds:,.0f} tokens/s")
    print(f"memory: a state of {state.nbytes // 2:,} bytes, whatever the length")
    print(f"difference from one prefill of everything: {difference:.1e} of the state")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
