"""Sampling grids taken from forward processes; on the host, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from tstitch_jax.core.checks import as_array, check_name, shown
from tstitch_jax.core.schedules import levels_at, times_at
from tstitch_jax.core.types import Knots, Schedule


def respace(num_train_steps: int, steps: int | str | np.integer) -> np.ndarray:
    """Which training times a sampler of fewer steps keeps, ascending int64.

    Args:
        num_train_steps: T.
        steps: ``50`` or ``"50"``: so many, evenly from 0 to T-1, ends included and rounded; a
            single one is T-1.
            ``"10,10,20"``: the times cut into as many equal sections, with so many in each.
            ``"ddim50"``: so many with a whole-numbered stride from 0 (Song et al. 2021).

    Raises:
        ValueError: If the text is none of these, or asks for more times than there are.

    >>> respace(1000, 5)
    array([  0, 250, 500, 749, 999])
    """
    try:
        text = str(steps).strip()
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(
            "steps must be a number like 50, sections like '10,10,20' or 'ddim50', got "
            + shown(steps)
        ) from None
    if min(counts) < 1:
        raise ValueError(f"steps must be at least 1, got {shown(steps)}")
    if sum(counts) > num_train_steps:
        raise ValueError(
            f"steps must be at most the {num_train_steps} training times, got {shown(steps)}"
        )
    if text.startswith("ddim"):
        for stride in range(1, num_train_steps + 1):
            kept = np.arange(0, num_train_steps, stride)
            if [len(kept)] == counts:
                return kept
        raise ValueError(
            f"no whole stride over {num_train_steps} training times gives {text!r}; "
            f"give {text.removeprefix('ddim')!r} for rounded times"
        )
    if counts == [1]:
        return np.array([num_train_steps - 1])
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = num_train_steps // len(counts) + (i < num_train_steps % len(counts))
        if count > size:
            raise ValueError(
                f"section {i + 1} of {shown(steps)} holds {size} times, asked for {count}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Half rounds to even; each time is start + i * stride, summed as the published tables are.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.array(kept)


def _leading(total: int, count: int) -> np.ndarray:
    """A whole stride from time 0 (Song et al. 2021; diffusers' ``leading`` without offset)."""
    return (np.arange(count) * (total // count))[::-1]


def _lcm(total: int, count: int) -> np.ndarray:
    """Of the 50 times that latent consistency models are distilled at, evenly many."""
    distilled = np.arange(50, 0, -1) * (total // 50) - 1
    if count > 50 or total < 50:
        raise ValueError(
            f"spacing 'lcm' picks from 50 times, which cannot hold {count} steps of {total}"
        )
    return distilled[np.floor(np.arange(count) * (50 / count)).astype(int)]


_PLACES: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _leading,
    "leading+1": lambda total, count: _leading(total, count) + 1,
    "linspace": lambda total, count: np.linspace(total - 1, 0, count),
    "trailing": lambda total, count: np.round(np.arange(count, 0, -1) * (total / count)) - 1,
    "lcm": _lcm,
}
"""From T and N to places among the training times, from noise to data."""


_RHO = 7
"""Of Karras' spacing (Karras et al. 2022, section 3)."""


_LEVELS: dict[str, Callable[[float, float, np.ndarray], np.ndarray]] = {
    "karras": lambda low, high, u: (high ** (1 / _RHO) * (1 - u) + low ** (1 / _RHO) * u) ** _RHO,
    "exponential": lambda low, high, u: high ** (1 - u) * low**u,
}
"""From the least and the largest noise level, sigma / alpha, to levels, u from 0 to 1."""


SPACINGS = ("respaced", *_PLACES, *_LEVELS)
"""Names of the ways to spread N steps over the training times; see ``make_knots``."""


def _number(steps: int | str | np.integer) -> int | None:
    """A plain number of steps, also as text; None of anything else."""
    try:
        return int(str(steps))
    except ValueError:
        return None


def _count(steps: int | str | np.integer, spacing: str, limit: int) -> int:
    """The number of steps of a spacing that takes a plain number."""
    count = _number(steps)
    if count is None:
        raise ValueError(f"spacing {spacing!r} needs a plain number of steps, got {shown(steps)}")
    if not 1 <= count <= limit:
        bound = "at least 1" if count < 1 else f"at most the {limit} training times"
        raise ValueError(f"steps must be {bound}, got {shown(steps)}")
    return count


def _given_times(schedule: Schedule, times: np.ndarray) -> np.ndarray:
    """A list of times from a user."""
    if not times.size or times.dtype.kind not in "iuf":
        raise ValueError(f"times must be a list of numbers, got {shown(times)}")
    times = times.astype(np.float64)
    last = 1 if schedule.name == "flow" else schedule.num_train_steps - 1
    low = times > 0 if schedule.name == "flow" else times >= 0
    if not (low & (times <= last)).all():
        bounds = "above 0, at most 1" if schedule.name == "flow" else f"0 to {last}"
        raise ValueError(
            f"times of the schedule {schedule.name!r} must be {bounds}, "
            f"got {times.min():g} to {times.max():g}"
        )
    # As float32, which is what is sampled with, not only the times but the levels must differ.
    levels = np.stack(levels_at(schedule, times)).astype(np.float32)
    same = (np.diff(levels) == 0).all(axis=0)
    rising = np.flatnonzero((np.diff(times.astype(np.float32)) >= 0) | same)
    if rising.size:
        i = int(rising[0])
        raise ValueError(
            "times must fall, from noise to data, by enough to tell in float32, but "
            f"{times[i]:.9g} is followed by {times[i + 1]:.9g}"
        )
    return times


def _grid(time: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> Knots:
    """The record of the columns, cast once to float32."""
    index = np.arange(len(time), dtype=np.int32)
    columns = (column.astype(np.float32) for column in (time, alpha, sigma))
    return Knots(index, index, *columns, steps=len(time) - 1)


def make_knots(
    schedule: Schedule,
    steps: int | str | Sequence[float | int] | np.ndarray | jax.Array,
    spacing: str = "respaced",
) -> Knots:
    """The sampling grid: so many points of noise, and the clean end; cast once to float32.

    Args:
        schedule: The forward process.
        steps: A number, for ``"respaced"`` also a text as ``respace`` takes it, or the falling
            list of network times itself, whole or not.
        spacing: How a number of steps N is spread over the T training times.

            - ``"respaced"``: evenly, both ends included, rounded (``respace``). For a flow its time
              from 1 to 0 is cut evenly, as SiT's sampler does (Ma et al. 2024).
            - ``"leading"``: a whole stride up from time 0; ``"leading+1"`` the same one time later,
              as latent diffusion and Stable Diffusion do.
            - ``"linspace"``: evenly, both ends included, not rounded.
            - ``"trailing"``: a stride down from time T-1 (Lin et al. 2024, table 2).
            - ``"karras"``: noise levels sigma / alpha in equal steps of their seventh root (Karras
              et al. 2022, equation 5); ``"exponential"``: of their logarithm. Both over the levels
              of the schedule, asked at the times that belong to them.
            - ``"lcm"``: evenly many of the 50 times of latent consistency models (Luo et al. 2023).

    Returns:
        Knots with N+1 points; NumPy leaves. Between training times alpha and sigma follow from
        the angle ``atan(sigma / alpha)``, linear in time.

    Raises:
        ValueError: If the schedule is none, the spacing is unknown or takes no such steps, the
            times do not fall, or the schedule's noise level is infinite where the spacing needs it.

    >>> from tstitch_jax.core.schedules import make_schedule
    >>> knots = make_knots(make_schedule("linear"), 4, "trailing")
    >>> [float(t) for t in knots.time]
    [999.0, 749.0, 499.0, 249.0, 0.0]
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be what ts.make_schedule returns, got {shown(schedule)}")
    check_name("spacing", spacing, SPACINGS)
    total, flow = schedule.num_train_steps, schedule.name == "flow"
    if not isinstance(steps, int | str | np.integer):
        times = as_array(steps)
        if times.ndim != 1:
            raise ValueError(f"steps must be a whole number or a list of times, got {shown(steps)}")
        if spacing != "respaced":
            raise ValueError(f"give a list of times or the spacing {spacing!r}, not both")
        times = _given_times(schedule, times)
    elif spacing in _LEVELS:
        count = _count(steps, spacing, total)
        if schedule.alpha[-1] == 0:
            raise ValueError(
                f"spacing {spacing!r} needs a finite noise level sigma / alpha to start at, but "
                f"the schedule {schedule.name!r} ends in pure noise; use 'respaced' or 'trailing'"
            )
        low, high = (float(schedule.sigma[i] / schedule.alpha[i]) for i in (0, -1))
        level = _LEVELS[spacing](low, high, np.linspace(0, 1, count))
        norm = np.sqrt(1 + level**2)
        times = times_at(schedule, 1 / norm, level / norm)
        return _grid(np.append(times, 0), np.append(1 / norm, 1), np.append(level / norm, 0))
    elif spacing != "respaced":
        places = _PLACES[spacing](total, _count(steps, spacing, total))
        if places[0] > total - 1:
            raise ValueError(
                f"spacing {spacing!r} of {steps} steps starts at time {places[0]:g}, "
                f"after the last of the {total} training times"
            )
        times = (places + 1) / total if flow else places.astype(np.float64)
    elif flow and _number(steps) is not None:
        times = np.linspace(1, 0, _count(steps, spacing, total) + 1)[:-1]
    else:
        times = schedule.times[respace(total, steps)[::-1]]
    alpha, sigma = levels_at(schedule, times)
    return _grid(np.append(times, 0), np.append(alpha, 1), np.append(sigma, 0))


def match_snr(knots: Knots, schedule: Schedule) -> Knots:
    """The same grid as another forward process sees it: equal signal-to-noise ratio, its own time.

    Args:
        knots: The grid of the trajectory; host arrays.
        schedule: The forward process that a network was trained on. Where it has no such ratio
            (a variance-preserving one has no pure noise), its nearest end is taken.

    Returns:
        Knots for ``at_equal_snr``.

    >>> from tstitch_jax.core.schedules import make_schedule
    >>> flow, linear = make_schedule("flow"), make_schedule("linear")
    >>> seen = match_snr(make_knots(linear, 4), flow)
    >>> [round(float(t), 3) for t in seen.time]
    [0.994, 0.905, 0.594, 0.01, 0.0]
    """
    alpha, sigma = (np.asarray(leaf, np.float64) for leaf in (knots.alpha, knots.sigma))
    times, clean = times_at(schedule, alpha, sigma), sigma == 0
    alpha, sigma = levels_at(schedule, times)
    return _grid(*(np.where(clean, end, v) for v, end in ((times, 0), (alpha, 1), (sigma, 0))))


def last_steps(knots: Knots, count: int) -> Knots:
    """The grid of the last ``count`` steps alone, for a start from something less than noise.

    Raises:
        ValueError: If there are not so many, or none.
    """
    if not isinstance(count, int | np.integer) or not 1 <= count <= knots.steps:
        raise ValueError(f"the last steps must be 1 to {knots.steps}, got {shown(count)}")
    tail = slice(-count - 1, None)
    return _grid(*(np.asarray(leaf)[tail] for leaf in (knots.time, knots.alpha, knots.sigma)))
