"""What the pictures share."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

BLUE, ORANGE, GREEN, RED, GREY = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "0.55"
PALE = {"blue": "#d6e6f4", "orange": "#fde3c8", "green": "#d5ecd4", "grey": "0.92", "red": "#f7d4d4"}


def plain(width: float, height: float, xlim: tuple[float, float], ylim: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure with one axis that shows no axis, for diagrams."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=xlim, ylim=ylim)
    axis.axis("off")
    return figure, axis


def box(
    axis: Any, x: float, y: float, w: float, h: float, text: str = "", color: str = "grey", size: float = 9
) -> None:
    """A labelled box."""
    axis.add_patch(Rectangle((x, y), w, h, facecolor=PALE[color], edgecolor="0.35", linewidth=0.8))
    axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def arrow(axis: Any, start: tuple[float, float], stop: tuple[float, float], color: str = "0.3") -> None:
    """An arrow."""
    axis.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=10, color=color, linewidth=1))
