"""The documentation's pictures: every one is drawn here, from the library itself or from docs/data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from figures import diagrams, learning, measured

FIGURES: dict[str, Callable] = {
    "rule": diagrams.rule,
    "pool": diagrams.pool,
    "packed": diagrams.packed,
    "chunks": diagrams.chunks,
    "block_vk": diagrams.block_vk,
    "block_kv": diagrams.block_kv,
    "recall": learning.recall,
    "forgetting": learning.forgetting,
    "demo": learning.demo_curve,
    "remembering": learning.remembering,
}


def draw_all(directory: Path) -> None:
    """Draw every picture that is not there yet or older than what it is drawn from."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = [path.stat().st_mtime for path in Path(__file__).parent.glob("*.py")]
    for name, draw in FIGURES.items():
        path = directory / f"{name}.svg"
        if not path.exists() or path.stat().st_mtime < max(sources):
            _save(draw(), path)
    for name, figure in measured.figures().items():
        _save(figure, directory / f"{name}.svg")
    (directory / "measured.md").write_text(measured.page(), encoding="utf-8")
    (directory / "numerics.md").write_text(measured.numerics_page(), encoding="utf-8")
    (directory / "deferral.md").write_text(measured.deferral_page(), encoding="utf-8")
    (directory / "kernels.md").write_text(measured.kernels_page(), encoding="utf-8")
    (directory / "reliability.md").write_text(measured.reliability_page(), encoding="utf-8")


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    # No date and no random ids: the same data give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "gdr"
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
