"""Forward processes and the sampling grids taken from them; all on the host, in float64."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np

from tstitch_jax.types import Knots, Schedule


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among ``known``; it says the near ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def _linear(t: int) -> np.ndarray:
    """Ho et al. 2020: betas from 1e-4 to 0.02, scaled so that T does not change the process."""
    return np.cumprod(1 - np.linspace(0.1 / t, 20 / t, t))


def _scaled_linear(t: int) -> np.ndarray:
    """Rombach et al. 2022: square roots of the betas in equal steps, 0.00085 to 0.012."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, t) ** 2 * 1000 / t)


def _cosine(t: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17, with betas of at most 0.999."""
    alpha_bar = np.cos((np.arange(t + 1) / t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


ALPHA_BARS = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine}


def make_schedule(name: str, num_train_steps: int = 1000) -> Schedule:
    """The forward process of a name.

    Args:
        name: ``"linear"``, ``"scaled_linear"`` or ``"cosine"`` (variance preserving:
            ``alpha^2 + sigma^2 = 1``, network times 0 .. T-1), or ``"flow"`` (rectified flow:
            ``alpha = 1 - t``, ``sigma = t``, network times in (0, 1]; Liu et al. 2022).
        num_train_steps: T, the number of training times.

    Raises:
        ValueError: If the name is unknown or T is below 21, where a linear beta would pass 1.

    >>> round(float(make_schedule("linear").alpha[0] ** 2), 6)
    0.9999
    """
    if num_train_steps < 21:
        raise ValueError(f"num_train_steps must be at least 21, got {num_train_steps}")
    if name == "flow":
        t = np.arange(1, num_train_steps + 1) / num_train_steps
        return Schedule(name, t, 1 - t, t)
    if name not in ALPHA_BARS:
        raise unknown("schedule", name, [*ALPHA_BARS, "flow"])
    alpha_bar = ALPHA_BARS[name](num_train_steps)
    times = np.arange(num_train_steps, dtype=np.float64)
    return Schedule(name, times, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def respace(num_train_steps: int, steps: int | str) -> np.ndarray:
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
    text = str(steps).strip()
    strided = text.startswith("ddim")
    try:
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(
            f"steps must be a number like 50, sections like '10,10,20' or 'ddim50', got {steps!r}"
        ) from None
    if min(counts) < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    if sum(counts) > num_train_steps:
        raise ValueError(
            f"steps must be at most the {num_train_steps} training times, got {steps!r}"
        )
    if strided:
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
            raise ValueError(f"section {i + 1} of {steps!r} holds {size} times, asked for {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Half rounds to even; each time is start + i * stride, summed as the published tables are.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.array(kept)


def make_knots(schedule: Schedule, steps: int | str) -> Knots:
    """The sampling grid of ``steps`` training times and the clean end, cast once to float32.

    A number of steps of a flow cuts its time from 1 to 0 evenly, as SiT's sampler does (Ma et al.
    2024), without regard to the training times.

    Args:
        schedule: The forward process.
        steps: As ``respace`` takes it.

    Returns:
        Knots with N+1 points, N the number of steps; NumPy leaves.
    """
    kept = respace(schedule.num_train_steps, steps)[::-1]
    count = len(kept)
    if schedule.name == "flow" and str(steps).strip() == str(count):
        time = np.linspace(1, 0, count + 1)
        columns = (time, 1 - time, time)
    else:
        columns = (
            np.append(values[kept], end)
            for values, end in ((schedule.times, 0), (schedule.alpha, 1), (schedule.sigma, 0))
        )
    time, alpha, sigma = (column.astype(np.float32) for column in columns)
    return Knots(np.arange(count + 1, dtype=np.int32), time, alpha, sigma, steps=count)
