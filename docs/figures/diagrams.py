"""Diagrams: what is where, and what goes where."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures.style import PALE, arrow, box, plain


def rule() -> Figure:
    """The four stages of one token, around the state."""
    figure, axis = plain(9, 2.5, (0, 18), (0, 5))
    stages = (
        ("forget", "h ← exp(g) h", "orange"),
        ("error", "u = β (v − hᵀ k)", "red"),
        ("write", "h ← h + k uᵀ", "blue"),
        ("read", "o = hᵀ q", "green"),
    )
    for i, (name, formula, color) in enumerate(stages):
        x = 1.6 + 3.9 * i
        box(axis, x, 1.6, 3.1, 1.5, f"{name}\n{formula}", color, 10)
        arrow(axis, (x - 0.8, 2.35), (x, 2.35))
    arrow(axis, (16.4, 2.35), (17.6, 2.35))
    axis.text(0.7, 2.35, "h", fontsize=12, ha="right", va="center")
    axis.text(17.7, 2.35, "h", fontsize=12, ha="left", va="center")
    for x, text in ((3.1, "g"), (7.0, "k, v, β"), (10.9, "k"), (14.8, "q")):
        arrow(axis, (x, 4.3), (x, 3.1))
        axis.text(x, 4.4, text, ha="center", va="bottom", fontsize=10)
    arrow(axis, (14.8, 1.6), (14.8, 0.6))
    axis.text(14.8, 0.45, "o", ha="center", va="top", fontsize=11)
    return figure


def pool() -> Figure:
    """A pool of slots: sequences point into it, one forks."""
    figure, axis = plain(9, 3, (0, 18), (0, 6))
    owners = {1: ("A", "blue"), 3: ("C", "green"), 4: ("B", "orange"), 6: ("A′", "blue")}
    for slot in range(8):
        name, color = owners.get(slot, ("free", "grey"))
        box(axis, 1 + 2 * slot, 1.2, 1.8, 1.6, name, color, 10)
        axis.text(1.9 + 2 * slot, 0.9, str(slot), ha="center", va="top", fontsize=8, color="0.4")
    axis.text(9, 0.1, "pool [num_slots, HV, K, V]", ha="center", fontsize=9, color="0.3")
    for x, slot, text in ((4.0, 1, "A"), (7.5, 4, "B"), (11.0, 3, "C")):
        axis.text(x, 4.9, text, ha="center", va="bottom", fontsize=11)
        arrow(axis, (x, 4.8), (1.9 + 2 * slot, 2.9))
    axis.text(1.2, 5.0, "slots = [1, 4, 3]", fontsize=9, color="0.3", va="bottom", ha="left")
    axis.annotate(
        "", (13.9, 2.9), (3.2, 2.9), arrowprops={"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.28", "ls": "--"}
    )
    axis.text(14.4, 3.6, "fork: a copy", fontsize=9, ha="left")
    return figure


def packed() -> Figure:
    """Three sequences, one of them empty, along one T axis."""
    figure, axis = plain(9, 2, (-0.5, 18), (0, 4))
    lengths, colors = (6, 0, 3, 8), ("blue", "grey", "orange", "green")
    start = 0
    for n, (length, color) in enumerate(zip(lengths, colors)):
        for t in range(length):
            box(axis, start + t, 1.4, 0.92, 0.92, f"{n}.{t}", color, 7)
        axis.plot([start - 0.04] * 2, [1.1, 2.7], color="0.3", lw=1)
        if length:
            axis.text(start + length / 2, 2.6, f"sequence {n}", ha="center", fontsize=8)
        start += length
    axis.plot([start - 0.04] * 2, [1.1, 2.7], color="0.3", lw=1)
    axis.text(5.96, 3.1, "sequence 1: empty", ha="center", fontsize=8, color="0.4")
    for x in (0, 6, 9, 17):
        axis.text(x - 0.04, 0.9, str(x), ha="center", va="top", fontsize=9)
    axis.text(8.5, 0.2, "cu_seqlens = [0, 6, 6, 9, 17]", ha="center", fontsize=9, color="0.3")
    return figure


def chunks() -> Figure:
    """What depends on the state and what does not, in the chunkwise form."""
    figure, axis = plain(9, 3.4, (0, 18), (0, 7))
    for c in range(3):
        x = 1 + 5.6 * c
        for i in range(6):
            for j in range(i + 1):
                color = PALE["orange"] if i == j else PALE["blue"]
                patch = Rectangle((x + 0.42 * j, 5.9 - 0.42 * i), 0.38, 0.38, facecolor=color, edgecolor="0.6", lw=0.5)
                axis.add_patch(patch)
        axis.text(x + 2.9, 5.2, "T = A⁻¹ diag(β),\nD and q kᵀ from\nthis chunk alone", fontsize=8, va="center")
        box(axis, x, 1.2, 4.2, 1.1, "u = T (v − e^G k h)\no = e^G q h + (q kᵀ ∘ D) u", "green", 8)
        arrow(axis, (x + 1.2, 3.7), (x + 1.2, 2.4))
        arrow(axis, (x + 4.2, 1.75), (x + 5.6, 1.75))
        axis.text(x + 4.9, 1.9, "h", fontsize=10, ha="center", va="bottom")
    arrow(axis, (0.2, 1.75), (1, 1.75))
    axis.text(0.5, 1.9, "h", fontsize=10, ha="center", va="bottom")
    axis.text(9, 6.7, "all chunks at once", ha="center", fontsize=9, color="0.35")
    axis.text(9, 0.4, "one chunk after the other", ha="center", fontsize=9, color="0.35")
    return figure


def block_vk() -> Figure:
    """How a block of the "vk" kernel holds its rows: 16 lanes a row, two rows a warp side by side."""
    figure, axis = plain(9, 3.2, (-2.4, 18), (0, 6.6))
    for row in range(4):
        for lane in range(16):
            box(axis, lane, 4.6 - 1.1 * row, 0.94, 0.9, f"{lane}", "blue" if row % 2 == 0 else "green", 7)
        axis.text(-0.2, 5.05 - 1.1 * row, f"v = {row}", ha="right", va="center", fontsize=9)
    axis.text(8, 5.9, "K: a lane holds the same neighbouring elements of all of its rows", ha="center", fontsize=9)
    text = (
        "lanes 0–15 of a warp (blue) and 16–31 (green) work on two rows side by side;\n"
        "a row's products with k and q are sums over its 16 lanes"
    )
    axis.text(8, 0.5, text, ha="center", fontsize=9, color="0.3")
    return figure


def block_kv() -> Figure:
    """How a block of the "kv" kernel holds its columns: a thread has 16 bytes of columns, splits share the rows."""
    figure, axis = plain(9, 3.4, (-3.2, 18), (0, 7))
    for split in range(4):
        for lane in range(8):
            box(
                axis,
                2 * lane,
                5.0 - 1.1 * split,
                1.92,
                0.98,
                f"lane {lane}",
                ("blue", "orange", "green", "red")[split],
                7,
            )
        axis.text(-0.2, 5.5 - 1.1 * split, f"rows of\nsplit {split}", ha="right", va="center", fontsize=8)
    axis.text(8, 6.4, "V: a thread holds 16 bytes of neighbouring columns", ha="center", fontsize=9)
    arrow(axis, (8, 1.6), (8, 1.0))
    text = (
        "a column's products with k and q: one tree of sums over the splits,\n"
        "of a thread, then of a warp's lanes, then of the warps"
    )
    axis.text(8, 0.85, text, ha="center", va="top", fontsize=9, color="0.3")
    return figure
