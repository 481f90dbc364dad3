"""Forward processes; on the host, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from tstitch_jax.core.checks import as_array, check_name, check_whole, shown
from tstitch_jax.core.types import Schedule


def _linear(t: int, betas: Sequence[float]) -> np.ndarray:
    """Ho et al. 2020: betas in equal steps, scaled so that T does not change the process."""
    return np.cumprod(1 - np.linspace(betas[0] * 1000 / t, betas[1] * 1000 / t, t))


def _scaled_linear(t: int, betas: Sequence[float]) -> np.ndarray:
    """Rombach et al. 2022: square roots of the betas in equal steps."""
    return np.cumprod(1 - np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, t) ** 2 * 1000 / t)


def _cosine(t: int, betas: Sequence[float]) -> np.ndarray:
    """Nichol & Dhariwal 2021, equation 17, with betas of at most 0.999."""
    alpha_bar = np.cos((np.arange(t + 1) / t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


ALPHA_BARS = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine}


BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta of 1000, as published; the latter are Stable Diffusion's."""


_TIMES = 21, 2**20
"""The least T, below which a linear beta would pass 1, and the most, as arrays of it are made."""


def make_schedule(
    name: str,
    num_train_steps: int = 1000,
    zero_snr: bool = False,
    betas: Sequence[float] | np.ndarray | jax.Array | None = None,
) -> Schedule:
    """The forward process of a name.

    Args:
        name: ``"linear"``, ``"scaled_linear"`` or ``"cosine"`` (variance preserving:
            ``alpha^2 + sigma^2 = 1``, network times 0 .. T-1), or ``"flow"`` (rectified flow:
            ``alpha = 1 - t``, ``sigma = t``, network times in (0, 1]; Liu et al. 2022).
        num_train_steps: T, the number of training times, 21 to 2^20.
        zero_snr: Whether alpha is shifted and scaled so that the last time is pure noise, the
            first one staying as it is (Lin et al. 2024, arXiv:2305.08891, algorithm 1).
        betas: First and last beta of ``"linear"`` or ``"scaled_linear"``, as of 1000 training
            times, at most 0.02; those of ``BETAS`` unless given.

    Raises:
        ValueError: If the name is unknown, T or the betas are not as said, or a flow, which ends
            in pure noise anyway, is asked for ``zero_snr``.

    >>> round(float(make_schedule("linear").alpha[0] ** 2), 6)
    0.9999
    """
    check_name("schedule", name, [*ALPHA_BARS, "flow"])
    num_train_steps = check_whole("num_train_steps", num_train_steps, *_TIMES)
    numbers = as_array(BETAS.get(name, ()) if betas is None else betas)
    if betas is not None:
        fits = numbers.shape == (2,) and numbers.dtype.kind == "f"
        if name not in BETAS or not fits or not 0 < numbers[0] <= numbers[1] <= 0.02:
            raise ValueError(
                "betas are a first and a last one that rise, above 0, at most 0.02, of the "
                f"schedules {' and '.join(BETAS)}, got {shown(betas)} for {name!r}"
            )
    if name == "flow":
        if zero_snr:
            raise ValueError("zero_snr rescales alpha, but the schedule 'flow' ends at 0 already")
        t = np.arange(1, num_train_steps + 1) / num_train_steps
        return Schedule(name, t, 1 - t, t)
    alpha_bar = ALPHA_BARS[name](num_train_steps, numbers.tolist())
    alpha = np.sqrt(alpha_bar)
    if zero_snr:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    times = np.arange(num_train_steps, dtype=np.float64)
    return Schedule(name, times, alpha, np.sqrt(1 - alpha**2))


def _angle(schedule: Schedule) -> np.ndarray:
    """``atan(sigma / alpha)``, rising from data to noise, finite also where alpha is 0."""
    return np.arctan2(schedule.sigma, schedule.alpha)


def levels_at(schedule: Schedule, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and sigma at any times: those of the schedule, and between them by angle."""
    if schedule.name == "flow":
        return 1 - times, times
    angle = np.interp(times, schedule.times, _angle(schedule))
    alpha, sigma = np.cos(angle), np.sin(angle)
    place = np.clip(np.searchsorted(schedule.times, times), 0, schedule.num_train_steps - 1)
    exact = schedule.times[place] == times
    return (
        np.where(exact, schedule.alpha[place], alpha),
        np.where(exact, schedule.sigma[place], sigma),
    )


def times_at(schedule: Schedule, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The times of given signal-to-noise ratios; at the ends where the schedule has none such."""
    if schedule.name == "flow":
        return sigma / (alpha + sigma)
    return np.interp(np.arctan2(sigma, alpha), _angle(schedule), schedule.times)
