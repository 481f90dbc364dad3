"""Draws ``docs/step.png``: ``python docs/make_step.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent

INK, SOFT, LINE = "#24292f", "#57606a", "#8c959f"


def box(axes: Any, x: float, y: float, text: str, width: float, color: str, **more: Any) -> None:
    """A rounded box around its centre."""
    height = more.pop("height", 0.56)
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner,
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=color,
            edgecolor=more.pop("edge", LINE),
            linewidth=more.pop("line", 0.8),
            zorder=3,
        )
    )
    axes.text(x, y, text, ha="center", va="center", color=INK, zorder=4, **{"size": 9} | more)


def arrow(
    axes: Any, start: Any, end: Any, *, bend: float = 0, color: str = INK, **more: Any
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=more.pop("head", 11),
            color=color,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
            zorder=more.pop("zorder", 2),
            **{"linewidth": 1.2} | more,
        )
    )


def canvas(width: float, height: float) -> Any:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def draw_step() -> None:
    blue, green, yellow, red = "#dbe9ff", "#dcf5e3", "#fff1cf", "#ffe0d6"
    figure, axes = canvas(11, 5.6)

    axes.add_patch(
        FancyBboxPatch(
            (1.55, 0.55),
            7.9,
            4.35,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="#f6f8fa",
            edgecolor=LINE,
            linestyle="--",
            linewidth=1,
            zorder=0,
        )
    )
    axes.text(
        1.75, 0.8, "one step of lax.scan, in one compiled program", size=9, color=SOFT, va="center"
    )

    box(axes, 0.8, 3.4, "$x_i$\nstate", 0.9, "white", height=0.8)
    box(axes, 10.2, 3.4, "$x_{i+1}$\nstate", 0.9, "white", height=0.8)
    box(axes, 2.6, 3.4, "solver.step", 1.5, blue, height=0.8, weight="bold")
    box(axes, 4.75, 3.4, "cfg\n$[x;\\ x]$, [labels; null]", 1.9, yellow, height=0.8)
    box(axes, 6.95, 3.4, "stitch\nlax.cond(plan[i] == 1)", 1.85, red, height=0.8)
    box(axes, 6.05, 2.05, "small network", 1.5, green)
    box(axes, 7.9, 2.05, "large network", 1.5, green)
    box(axes, 6.95, 1.05, "predict: eps, v, x0 or flow to (x0, eps)", 3.5, blue)

    arrow(axes, (1.25, 3.4), (1.85, 3.4))
    arrow(axes, (3.35, 3.4), (3.8, 3.4))
    arrow(axes, (5.7, 3.4), (6.02, 3.4))
    arrow(axes, (6.75, 3.0), (6.05, 2.33))
    arrow(axes, (7.15, 3.0), (7.9, 2.33), color=LINE, linestyle=":")
    arrow(axes, (6.05, 1.77), (6.55, 1.33))
    arrow(axes, (7.9, 1.77), (7.35, 1.33), color=LINE, linestyle=":")
    axes.text(8.02, 2.72, "only one of them runs", size=8.5, color=SOFT, va="center")
    # The prediction goes back: guidance combines its halves, the solver takes the result.
    axes.plot([5.2, 4.75], [1.05, 1.05], color=INK, linewidth=1.2, zorder=2)
    arrow(axes, (4.75, 1.05), (4.75, 3.0))
    axes.text(4.62, 1.6, "Prediction", size=9, color=INK, ha="right", va="center")
    arrow(axes, (3.8, 3.15), (3.35, 3.15))
    axes.text(3.57, 2.86, "guided", size=8.5, color=SOFT, ha="center")
    axes.plot([2.6, 2.6, 9.2], [3.8, 4.25, 4.25], color=INK, linewidth=1.2, zorder=2)
    axes.plot([9.2, 9.2], [4.25, 3.4], color=INK, linewidth=1.2, zorder=2)
    arrow(axes, (9.2, 3.4), (9.75, 3.4))

    box(axes, 2.6, 5.25, "knots[i], knots[i+1]: time, alpha, sigma", 3.5, "white")
    box(axes, 7.4, 5.25, "plan, parameters, labels, guidance scale", 3.6, "white")
    arrow(axes, (2.2, 4.97), (2.2, 3.8), linewidth=0.9, color=SOFT)
    arrow(axes, (6.95, 4.97), (6.95, 3.8), linewidth=0.9, color=SOFT)
    arrow(axes, (6.6, 4.97), (5.0, 3.8), linewidth=0.9, color=SOFT)
    note = "What is white is data: another plan, label, scale or seed runs in the same program."
    axes.text(5.5, 0.22, note, size=9, color=SOFT, ha="center", va="center")
    figure.savefig(HERE / "step.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw_step()
