"""Charts of results: curves by series, and quality against time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tstitch_jax.core.files import whole_file
from tstitch_jax.core.plan import COLORS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

MARKERS = "osD^vP*X"
"""One more than there are colors, so that 56 series each have a pair of their own."""

LINES = ("-", "--", ":", "-.")
"""Of joined series; the next one, each time that the colours begin anew."""

_LOG = 8
"""Times that differ by more than this factor are drawn on a logarithmic axis."""


class Line(NamedTuple):
    """One series.

    Attributes:
        name: Its name.
        x: Where its points lie: all numbers, or all names.
        y: Their values.
        errors: Half the length of the bar at each point, 0 for none.
        labels: What the points are called where there is room for it.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    errors: Sequence[float]
    labels: Sequence[str] = ()


def check_matplotlib() -> None:
    """Raises ValueError if charts cannot be drawn for want of matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("charts need matplotlib; pip install 'tstitch_jax[plot]'") from None


def _style(axes: Axes, x_label: str, y_label: str) -> Axes:
    axes.set_xlabel(x_label, fontsize=16)
    axes.set_ylabel(y_label, fontsize=16)
    axes.tick_params(labelsize=14)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty chart whose letters can be read at half its size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axes = _style(figure.add_subplot(), x_label, y_label)
    axes.set_title(title, fontsize=16)
    return figure, axes


def _draw(axes: Axes, lines: Sequence[Line], *, joined: bool) -> None:
    styles = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False)
    for i, (line, (colour, marker)) in enumerate(zip(lines, styles, strict=False)):
        turn = i // len(COLORS)
        x: Any = list(line.x)  # names too, which Matplotlib's types leave out
        axes.errorbar(
            x, line.y, line.errors if any(line.errors) else None, label=line.name, color=colour,
            marker=marker, markersize=9, markerfacecolor="white" if turn % 2 else colour,
            linestyle=LINES[turn % len(LINES)] if joined else "none", linewidth=2.2,
            elinewidth=1.4, capsize=4,
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    """The names of the series below the chart, for which it grows; none for one series."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        columns = 2 if max(map(len, names)) < 36 else 1
        figure.set_figheight(figure.get_figheight() + 0.3 * -(-len(names) // columns))
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, fontsize=14, frameon=False
        )


def _place(figure: Figure, axes: Axes, labels: Sequence[Annotation]) -> None:
    """Moves labels to where they cover no point and no other label; those without place go.

    Args:
        figure, axes: The chart, otherwise complete.
        labels: Of points.
    """
    figure.draw_without_rendering()  # which lays it out
    points = [p for line in axes.lines for p in axes.transData.transform(line.get_xydata())]
    placed: list[Any] = []
    for label in labels:
        label.set_in_layout(False)
        for far, across, up in itertools.product((9, 30), (11, -11), (1, -1)):
            label.set_position((across, far * up))
            label.set_horizontalalignment("left" if across > 0 else "right")
            label.set_verticalalignment("bottom" if up > 0 else "top")
            box = label.get_window_extent()
            near = box.padded(5 * figure.dpi / 72)  # half a point's mark
            covers = box.count_overlaps(placed) or any(near.contains(*point) for point in points)
            if not covers and axes.bbox.count_contains(box.get_points()) == 2:
                placed.append(box)
                break
        else:
            label.remove()


def curves(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> Figure:
    """Values against x, a line for each series, with error bars.

    Names along x become places in the order they come in, and are not joined. Numbers above 0 that
    span more than a factor of 20, such as numbers of steps, have a logarithmic axis.
    """
    figure, axes = _axes(title, x_label, y_label)
    every = [x for line in lines for x in line.x]
    numbers = [x for x in every if not isinstance(x, str)]
    names = len(numbers) < len(every)
    _draw(axes, lines, joined=not names)
    if not names and 0 < 20 * min(numbers) < max(numbers):
        _log_axis(axes)
    if names:
        axes.margins(x=0.15)
        axes.tick_params(axis="x", rotation=15)
    _legend(figure, axes)
    return figure


def front(
    lines: Sequence[Line], on_front: Sequence[Sequence[bool]], *, title: str, x_label: str,
    y_label: str, label: str,
) -> Figure:  # fmt: skip
    """Values against time: all points by series, those of the Pareto front ringed and joined.

    Args:
        lines: Their x are seconds.
        on_front: Of each line's points whether they are of the front; these are labelled where
            they are at most 14, and there is room.
        title, x_label, y_label: What is written.
        label: What the labels of points are.
    """
    figure, axes = _axes(title, x_label, y_label)
    _draw(axes, lines, joined=False)
    best: list[tuple[Any, float, str]] = []
    for line, chosen in zip(lines, on_front, strict=True):
        best += itertools.compress(zip(line.x, line.y, line.labels, strict=True), chosen)
    best.sort(key=lambda point: point[:2])
    named = len(best) <= 14
    axes.plot(
        [x for x, *_ in best], [y for _, y, _ in best],
        label=f"Pareto front, with {label}" if named else "Pareto front",
        color="#444444", linestyle="--", linewidth=1.6, marker="o", markersize=17,
        markerfacecolor="none",
    )  # fmt: skip
    labels = [
        axes.annotate(
            text, (x, y), xytext=(11, 9), textcoords="offset points", fontsize=14, color="#222222"
        )
        for x, y, text in (best if named else ())
    ]
    times: list[Any] = [x for line in lines for x in line.x]
    if max(times) > _LOG * min(times):
        _log_axis(axes)
    axes.margins(0.1)
    _legend(figure, axes)
    _place(figure, axes, labels)
    return figure


def calibration(
    names: Sequence[str], steps_alone: np.ndarray, linear: np.ndarray, *,
    speedups: Sequence[float], damages: Sequence[float], chosen: int, title: str,
    tolerance: float | None,
) -> Figure:  # fmt: skip
    """Damage by step of each network, and of plans against their speed-up.

    Args:
        names: Of the networks but the last.
        steps_alone: float64 ``[K-1, N]``, damage of each step.
        linear: float64 ``[N]``, that of a linear filter.
        speedups, damages: Of the plans, one of which is chosen.
        chosen: Which.
        title: What is written above both.
        tolerance: Where to draw a line of tolerated damage; None for none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 5.5), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=17)
    left, right = figure.subplots(1, 2)
    _style(left, "step", "damage of the step alone")
    _style(right, "speed-up", "predicted damage")
    steps = range(steps_alone.shape[1])
    for name, values, colour, marker in zip(
        names, steps_alone, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False
    ):
        left.plot(steps, values, label=name, color=colour, marker=marker, linewidth=2.2)
    left.plot(steps, linear, label="a linear filter", color="#888888", linestyle="--", linewidth=2)
    left.set_yscale("log")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=14, frameon=False)
    right.plot(speedups, damages, color="#444444", marker="o", markersize=5, linewidth=1.6)
    right.plot(
        speedups[chosen], damages[chosen], color=COLORS[1], marker="*", markersize=22,
        linestyle="none", label="chosen",
    )  # fmt: skip
    if tolerance is not None:
        right.axhline(tolerance, color=COLORS[0], linestyle=":", linewidth=2, label="tolerated")
    right.legend(fontsize=14, frameon=False)
    if max(speedups) > _LOG:
        _log_axis(right)
    return figure


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def write_chart(figure: Figure, path: Path) -> None:
    """Writes a chart as a PNG, whole or not at all; raises OSError if that fails."""
    with whole_file(path) as stream:
        figure.savefig(stream, format="png")
