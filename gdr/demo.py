"""``gdr demo``: a memory of fast weights reads text and predicts the next byte, learning while it reads.

Every text is one sequence with a state of its own.  When byte ``x[t]`` arrives, the delta rule writes the pair
(what came before it -> ``x[t]``) and reads with what has come by now; the answer is the prediction of ``x[t + 1]``::

    k[t] = features(x[..t-1])     v[t] = embedding(x[t])     q[t] = features(x[..t])

Contexts that end in the same bytes have similar keys, so what is written for one disturbs the others.  The error
correction ``u = beta (v - h^T k)`` writes only what the memory does not say yet; the same memory without it,
``u = beta v``, adds everything up and blurs.  Nothing is trained beforehand: features and embeddings are random.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdr._threads import one_blas_thread
from gdr.state import DeltaRuleState
from gdr.varlen import cu_seqlens_of

HEADS, KEY_DIM, VALUE_DIM = 4, 256, 64
# How much the last 1, 2, 3 and 4 bytes weigh in a key.
ORDER_WEIGHTS = (0.5, 0.6, 0.6, 0.3)
LEARNING_RATE = 0.3  # beta
HALF_LIFE = 8000.0  # bytes after which a memory has faded by half
# What a score is multiplied by before the softmax; 0 trusts the byte frequencies alone.
SHARPNESS = (0.0, *(2.0**i for i in range(-3, 6)))
TOPICS = ("specialnames", "formatstrings", "debugger", "import", "try", "calls", "exprlists", "class")
POSITIONS = (1, 64, 256, 1024, 2048, 4096)


class DemoError(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Text(NamedTuple):
    """A text to read: its name and its bytes."""

    name: str
    data: np.ndarray


class Outcome(NamedTuple):
    """How well the bytes after a text's first were predicted: right or wrong, and the bits each would cost."""

    correct: np.ndarray
    bits: np.ndarray


@dataclass
class Reading:
    """What became of reading some texts.

    Attributes
    ----------
    delta, hebbian, frequency : list of Outcome
        One a text: the delta rule, the same memory without error correction, and the bytes' frequencies so far.
    difference, magnitude : float
        The largest difference between stepping and prefilling the same tokens, and their outputs' RMS.
    prefilled, stepped : int
        Tokens read by ``prefill`` and by ``step``.
    prefill_seconds, step_seconds : float
        The time these took.
    """

    delta: list[Outcome]
    hebbian: list[Outcome]
    frequency: list[Outcome]
    difference: float
    magnitude: float
    prefilled: int
    stepped: int
    prefill_seconds: float
    step_seconds: float


def read_texts(files: Sequence[str], limit: int) -> list[Text]:
    """Read the files' first `limit` bytes, or with no files those of some topics of Python's own help."""
    if files:
        texts = [Text(name, _read_file(name, limit)) for name in files]
    else:
        from pydoc_data.topics import topics

        encoded = {name: topics[name].encode()[:limit] for name in TOPICS if name in topics}
        texts = [Text(name, np.frombuffer(data, np.uint8)) for name, data in encoded.items()]
    for text in texts:
        if len(text.data) < 2:
            raise DemoError(f"{text.name} has {len(text.data)} bytes; predicting the next one takes at least 2")
    return texts


def _read_file(name: str, limit: int) -> np.ndarray:
    try:
        with Path(name).open("rb") as file:
            return np.frombuffer(file.read(limit), np.uint8)
    except OSError as error:
        raise DemoError(f"cannot read {name}: {error.strerror}") from None


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Random signs [order, 256, HEADS, KEY_DIM] that spell contexts, and embeddings [256, VALUE_DIM]."""
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([-1, 1], np.float32), (len(ORDER_WEIGHTS), 256, HEADS, KEY_DIM))
    embeddings = rng.standard_normal((256, VALUE_DIM), np.float32)
    return signs, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def features(data: np.ndarray) -> np.ndarray:
    """Describe what stands before each position, 0 to len(data): float32 [len(data) + 1, HEADS, KEY_DIM].

    The last n bytes are the product of n random sign vectors, so contexts agree as far as they end alike.
    """
    signs, _ = _tables()
    orders = len(ORDER_WEIGHTS)
    padded = np.concatenate([np.zeros(orders, np.uint8), data])
    spelled = np.ones((len(data) + 1, HEADS, KEY_DIM), np.float32)
    described = np.zeros_like(spelled)
    for back, weight in enumerate(ORDER_WEIGHTS):
        start = orders - 1 - back
        spelled *= signs[back, padded[start : start + len(data) + 1]]
        described += np.float32(weight) * spelled
    described /= np.linalg.norm(described, axis=-1, keepdims=True)
    return described


class _Operands(NamedTuple):
    """What the delta rule takes of each token: [T, heads, ...]."""

    q: Any
    k: Any
    v: Any
    a: Any
    b: Any


def _operands(data: np.ndarray) -> _Operands:
    """The operands of reading a text."""
    described = features(data)
    _, embeddings = _tables()
    shape = len(data), HEADS
    v = np.repeat(embeddings[data][:, None], HEADS, axis=1)
    # softplus(a) = ln 2 / HALF_LIFE and sigmoid(b) = LEARNING_RATE, with A_log = 0.
    a = np.full(shape, np.log(np.expm1(np.log(2) / HALF_LIFE)), np.float32)
    b = np.full(shape, np.log(LEARNING_RATE / (1 - LEARNING_RATE)), np.float32)
    return _Operands(described[1:], described[:-1], v, a, b)


def _packed(operands: list[_Operands], parts: list[slice], xp: Any) -> tuple[_Operands, Any]:
    """A part of each text, packed: operands with B = 1, and cu_seqlens."""
    packed = _Operands(
        *(xp.asarray(np.concatenate([x[part] for x, part in zip(xs, parts)])[None]) for xs in zip(*operands))
    )
    return packed, xp.asarray(cu_seqlens_of([part.stop - part.start for part in parts]))


def read(texts: Sequence[Text], device: str = "cpu", progress: Any = None) -> Reading:
    """Read the texts: the first half of each in one varlen prefill, the rest token by token.

    `progress` is called with the number of tokens read since the last call.
    """
    progress = progress or (lambda count: None)
    try:
        state = DeltaRuleState(
            2 * len(texts),
            HEADS,
            KEY_DIM,
            VALUE_DIM,
            A_log=np.zeros(HEADS, np.float32),
            scale=1.0,
            device=device,
        )
    except RuntimeError as error:  # no CUDA here
        raise DemoError(f"device {device}: {error}") from None
    if device == "cpu":
        xp, to_host, wait = np, np.asarray, lambda: None
    else:
        import cupy

        xp, to_host, wait = cupy, cupy.asnumpy, lambda: cupy.cuda.get_current_stream().synchronize()
    lengths = [len(text.data) for text in texts]
    halves = [length // 2 for length in lengths]
    operands = [_operands(text.data) for text in texts]
    slots = state.alloc(len(texts))
    outputs = [np.empty((length, HEADS, VALUE_DIM), np.float32) for length in lengths]

    first, bounds = _packed(operands, [slice(0, half) for half in halves], xp)
    started = time.perf_counter()
    o = state.prefill(*first, slots, bounds)
    wait()
    prefill_seconds = time.perf_counter() - started
    for output, part in zip(outputs, np.split(to_host(o)[0], np.cumsum(halves)[:-1])):
        output[: len(part)] = part
    progress(sum(halves))

    # The twins read the second half in one go as well, to be compared with.
    twins = state.fork(slots)
    step_seconds = 0.0
    active = list(range(len(texts)))
    for offset in range(max(length - half for length, half in zip(lengths, halves))):
        finished = [i for i in active if halves[i] + offset == lengths[i]]
        if finished:
            state.free(slots[finished])
            active = [i for i in active if i not in finished]
        rows = (tuple(x[halves[i] + offset] for x in operands[i]) for i in active)
        token = _Operands(*(xp.asarray(np.stack(xs)) for xs in zip(*rows)))
        started = time.perf_counter()
        o = state.step(*token, slots[active])
        wait()
        step_seconds += time.perf_counter() - started
        for i, row in zip(active, to_host(o)):
            outputs[i][halves[i] + offset] = row
        progress(len(active))

    rest = [slice(half, length) for half, length in zip(halves, lengths)]
    second, bounds = _packed(operands, rest, xp)
    prefilled = to_host(state.prefill(*second, twins, bounds))[0]
    stepped = np.concatenate([output[part] for output, part in zip(outputs, rest)])
    return Reading(
        delta=[judge(_scores(output), text.data) for output, text in zip(outputs, texts)],
        hebbian=[
            judge(_scores(without_error_correction(*operand)), text.data) for operand, text in zip(operands, texts)
        ],
        frequency=[judge(np.zeros((len(text.data), 256), np.float32), text.data) for text in texts],
        difference=float(np.abs(stepped - prefilled).max()),
        magnitude=float(np.sqrt(np.mean(np.square(stepped)))),
        prefilled=sum(halves),
        stepped=sum(lengths) - sum(halves),
        prefill_seconds=prefill_seconds,
        step_seconds=step_seconds,
    )


def without_error_correction(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray, chunk: int = 128
) -> np.ndarray:
    """The same memory with ``u = beta v``: h = e^g h + k u^T, o = h^T q, a chunk at a time.  Returns o."""
    decay = 0.5 ** (1 / HALF_LIFE)
    age = np.arange(chunk)
    fade = np.tril(decay ** (age[:, None] - age)).astype(np.float32)
    u = LEARNING_RATE * v
    h = np.zeros((HEADS, KEY_DIM, VALUE_DIM), np.float32)
    o = np.empty_like(v)
    with one_blas_thread:  # products this small only wait for each other's threads
        for start in range(0, len(v), chunk):
            part = slice(start, start + chunk)
            qc, kc, uc = (x[part].transpose(1, 0, 2) for x in (q, k, u))
            n = qc.shape[1]
            since = decay ** np.arange(1, n + 1, dtype=np.float32)[:, None]
            within = (qc @ kc.transpose(0, 2, 1) * fade[:n, :n]) @ uc
            o[part] = (within + since * (qc @ h)).transpose(1, 0, 2)
            h = since[-1] * h + (kc * fade[n - 1, :n, None]).transpose(0, 2, 1) @ uc
    return o


def _scores(o: np.ndarray) -> np.ndarray:
    """How much the heads together speak for each byte: the similarity of what they read to its embedding."""
    _, embeddings = _tables()
    return o.sum(axis=1) @ embeddings.T


def frequencies(data: np.ndarray) -> np.ndarray:
    """Each byte's share of what has come up to and including each position, [len(data), 256]."""
    seen = np.zeros((len(data), 256), np.float32)
    seen[np.arange(len(data)), data] = 1
    # Each byte starts with a count of 1/32, so that none is impossible.
    counts = np.cumsum(seen, axis=0) + np.float32(1 / 32)
    return counts / counts.sum(axis=1, keepdims=True)


def probabilities(scores: np.ndarray, data: np.ndarray) -> np.ndarray:
    """The probability of every byte at positions 1 to len(data) - 1, known before that byte: [len(data) - 1, 256].

    ``p(byte) ~ frequency(byte) exp(sharpness score(byte))``, mixed over `SHARPNESS`: each sharpness has the weight
    that its own predictions so far have earned.  No byte's own value has a part in its prediction.
    """
    log_frequency = np.log(frequencies(data)[:-1])
    actual = data[1:, None].astype(np.intp)
    experts = []
    for sharpness in SHARPNESS:
        logits = np.float32(sharpness) * scores[:-1] + log_frequency
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        experts.append(logits)
    earned = np.zeros((len(SHARPNESS), len(data) - 1))
    with np.errstate(divide="ignore"):
        for i, expert in enumerate(experts):
            earned[i, 1:] = np.cumsum(np.log(np.take_along_axis(expert, actual, 1)[:-1, 0], dtype=np.float64))
    weights = np.exp(earned - earned.max(axis=0))
    weights /= weights.sum(axis=0)
    mixed = np.zeros_like(experts[0])
    for weight, expert in zip(weights.astype(np.float32), experts):
        mixed += weight[:, None] * expert
    return mixed


def judge(scores: np.ndarray, data: np.ndarray) -> Outcome:
    """Compare the predictions that scores make with what came."""
    predicted = probabilities(scores, data)
    actual = data[1:].astype(np.intp)
    bits = -np.log2(np.take_along_axis(predicted, actual[:, None], 1)[:, 0])
    return Outcome(predicted.argmax(axis=1) == actual, bits)


def table(reading: Reading) -> str:
    """Accuracy and bits per byte by position, averaged over the texts that reach it."""
    longest = max(len(outcome.bits) for outcome in reading.delta) + 1
    bounds = [position for position in POSITIONS if position < longest]
    bounds.append(longest)
    rows = list(pairwise(bounds))
    if len(rows) > 1:
        rows.append((1, longest))
    columns = (reading.frequency, reading.hebbian, reading.delta)
    lines = [
        f"{'':14}{'most frequent byte':>20}{'no error correction':>22}{'delta rule':>20}",
        f"{'bytes':14}" + "".join(f"{'correct':>{width - 10}}{'bits/byte':>10}" for width in (20, 22, 20)),
    ]
    for start, stop in rows:
        name = "all" if (start, stop) == (1, longest) and len(rows) > 1 else f"{start}-{stop - 1}"
        cells = ""
        for outcomes, width in zip(columns, (10, 12, 10)):
            correct, bits = (np.concatenate([x[start - 1 : stop - 1] for x in xs]) for xs in zip(*outcomes))
            cells += f"{100 * correct.mean():>{width - 2}.1f} %{bits.mean():>10.2f}"
        lines.append(f"{name:14}{cells}")
    return "\n".join(lines)


def plot(reading: Reading, path: str) -> None:
    """Draw the learning curve into a file."""
    try:
        learning_curve(reading).savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        raise DemoError(f"cannot write {path}: {reason}") from None


def learning_curve(reading: Reading) -> Any:
    """Accuracy and bits per byte by position as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = (
        (reading.frequency, "most frequent byte", "0.55"),
        (reading.hebbian, "no error correction: u = β v", "tab:orange"),
        (reading.delta, "delta rule: u = β (v − hᵀk)", "tab:blue"),
    )
    for outcomes, label, color in styles:
        for axis, values in zip(axes, zip(*outcomes)):
            axis.plot(*_smoothed(values), label=label, color=color)
    for axis, what in zip(axes, ("share of bytes predicted right", "bits per byte")):
        axis.set(xlabel="position in the text (bytes)", ylabel=what, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, None)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Learning while reading, {len(reading.delta)} texts")
    return figure


def _smoothed(values: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of position, and the windows' middles, over all texts that reach them."""
    values = [np.asarray(x, np.float64) for x in values]
    longest = max(map(len, values))
    window = max(1, longest // 24)
    starts = np.arange(0, max(1, longest - window // 2), window)  # a short rest would only be noise
    means = [np.concatenate([x[start : start + window] for x in values]).mean() for start in starts]
    return starts + window / 2, np.array(means)


def summary(reading: Reading) -> str:
    """How stepping and prefilling agree, and how fast they were."""
    return (
        f"stepping and prefilling the same {reading.stepped:,} bytes: outputs differ by at most "
        f"{reading.difference:.1e} (their RMS is {reading.magnitude:.2f})\n"
        f"prefill: {reading.prefilled / reading.prefill_seconds:,.0f} tokens/s    "
        f"step: {reading.stepped / reading.step_seconds:,.0f} tokens/s"
    )
