"""Plans: which network takes each step of a trajectory."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tstitch_jax.core.checks import as_array, check_number, check_whole, is_list, is_whole, shown
from tstitch_jax.core.files import write_text
from tstitch_jax.core.types import Knots, Leaf, Schedule, record, static

TOLERANCE = 1e-6
"""Of what is compared with knots, which are float32: 0.1 + 0.2 is 0.3 here."""


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colors, which color-blind readers can tell apart, without yellow."""


@record
class Plan:
    """Which network takes each step. Data, not code: one executable runs every plan of its length.

    Attributes:
        networks: int32 ``[N]``, the number of the network that takes each step, 0 to K-1. NumPy
            when made by a constructor; traced inside ``jit``.
        num_networks: K. Static.
    """

    networks: Leaf
    num_networks: int = static()

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return self.networks.shape[0]

    @classmethod
    def from_list(
        cls, networks: Sequence[int] | np.ndarray, num_networks: int | np.integer
    ) -> Plan:
        """The plan that gives step i to network ``networks[i]``.

        Raises:
            ValueError: If it is empty or names a network below 0 or above K-1.

        >>> Plan.from_list([0, 0, 1], 2).describe(["small", "large"])
        'small x 2, large x 1'
        """
        array = as_array(networks)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"a plan is a list of whole numbers, one a step, got {shown(networks)}"
            )
        num_networks = check_whole("num_networks", num_networks, 1, 2**31 - 1)
        if len(array) > _MOST_STEPS:
            raise ValueError(f"a plan has at most {_MOST_STEPS} steps, got {len(array)}")
        if array.min() < 0 or array.max() >= num_networks:
            raise ValueError(
                f"a plan for {num_networks} networks holds numbers 0 to {num_networks - 1}, "
                f"got {array.min()} to {array.max()}"
            )
        return cls(array.astype(np.int32), num_networks)

    @classmethod
    def from_counts(cls, counts: Sequence[int] | np.ndarray) -> Plan:
        """The plan that gives the first ``counts[0]`` steps to network 0, the next to 1, and so on.

        Raises:
            ValueError: If a count is negative or all are 0.
        """
        array = as_array(counts)
        whole = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
        if not whole or not array.any() or array.min() < 0:
            raise ValueError(
                f"counts must be whole numbers, at least 0, not all 0, got {shown(counts)}"
            )
        if array.sum(dtype=np.float64) > _MOST_STEPS:  # integers might wrap around
            raise ValueError(f"a plan has at most {_MOST_STEPS} steps, got {shown(counts)}")
        return cls.from_list(np.repeat(np.arange(len(array)), array), len(array))

    @classmethod
    def from_fractions(
        cls, fractions: Sequence[float] | np.ndarray, knots: Knots, schedule: Schedule
    ) -> Plan:
        """The published rule: network k owns its part of the progress ``1 - t / T``.

        The first network takes the steps with progress up to ``f_1``, the next up to ``f_1 + f_2``,
        and so on (Pan et al. 2024, arXiv:2402.14167): for two networks, the first runs where
        ``t / T >= 1 - f_1``. T is the number of training times and t, 0 to T-1, the place of the
        step's time among them.

        Args:
            fractions: One per network, at least 0, summing to 1.
            knots: The sampling grid.
            schedule: The one that the grid was made from.

        Raises:
            ValueError: If the fractions are not as said.

        >>> from tstitch_jax.core.grids import make_knots
        >>> from tstitch_jax.core.schedules import make_schedule
        >>> schedule = make_schedule("linear")
        >>> knots = make_knots(schedule, 20)
        >>> Plan.from_fractions([0.4, 0.6], knots, schedule).describe()
        '0 x 8, 1 x 12'
        """
        fractions = check_fractions(fractions)
        step, count = _places(knots, schedule)
        progress = 1 - step / count
        bounds = np.cumsum(np.asarray(fractions, np.float64))[:-1]
        networks = (progress[:, None] > bounds + TOLERANCE).sum(axis=1)
        return cls.from_list(networks, len(fractions))

    @classmethod
    def from_times(cls, bounds: Sequence[float | int] | np.ndarray, knots: Knots) -> Plan:
        """By network time: network 0 takes the steps at times of at least ``bounds[0]``, and so on.

        Args:
            bounds: K-1 times that do not rise; the last network takes what is below all of them.
            knots: The sampling grid.

        Raises:
            ValueError: If the bounds rise or are no numbers, or the knots are none.
        """
        bounds = _check_bounds("times", bounds, knots, sign=-1)
        time = np.asarray(knots.time[:-1], np.float64)
        bounds = bounds - TOLERANCE * np.clip(np.abs(bounds), 1, 1e9)  # those may be infinite
        return cls.from_list((time[:, None] < bounds).sum(axis=1), len(bounds) + 1)

    @classmethod
    def from_snr(cls, bounds: Sequence[float | int] | np.ndarray, knots: Knots) -> Plan:
        """By signal-to-noise ratio: network 0 takes the steps at ratios of at most ``bounds[0]``.

        The ratio is ``alpha^2 / sigma^2``, which means the same for every schedule.

        Args:
            bounds: K-1 ratios that do not fall; the last network takes what is above all of them.
            knots: The sampling grid.

        Raises:
            ValueError: If the bounds fall or are no numbers, or the knots are none.
        """
        bounds = _check_bounds("ratios", bounds, knots, sign=1)
        alpha, sigma = (np.asarray(leaf[:-1], np.float64) for leaf in (knots.alpha, knots.sigma))
        snr = np.square(alpha / sigma)
        above = snr[:, None] > bounds * (1 + TOLERANCE)
        return cls.from_list(above.sum(axis=1), len(bounds) + 1)

    @classmethod
    def from_switches(cls, switches: Sequence[int] | np.ndarray, steps: int) -> Plan:
        """By step: network k+1 takes over at step ``switches[k]``, counted from 0.

        Raises:
            ValueError: If the switches fall, or lie outside 0 to ``steps``.

        >>> Plan.from_switches([20], steps=50).describe(["small", "large"])
        'small x 20, large x 30'
        """
        array, steps = as_array(switches), _check_steps(steps)
        whole = array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.integer)
        if not whole or (np.diff([0, *array, steps]) < 0).any():
            raise ValueError(
                f"switches must be whole numbers that do not fall, 0 to {steps}, "
                f"got {shown(switches)}"
            )
        return cls.from_counts(np.diff([0, *array, steps]))

    @classmethod
    def interleaved(cls, pattern: Sequence[int] | np.ndarray, steps: int) -> Plan:
        """A pattern of counts again and again: ``[1, 2]`` is one step of 0, two of 1, one of 0 ...

        Raises:
            ValueError: If a count is negative or all are 0, or there are no steps.
        """
        once = cls.from_counts(pattern)
        return cls.from_list(np.resize(once.networks, _check_steps(steps)), once.num_networks)

    @classmethod
    def decreasing(cls, steps: int, seed: int, first: float = 1.0, last: float = 0.0) -> Plan:
        """Draws network 0 with a probability that falls, linearly in the step, and 1 otherwise.

        Args:
            steps: N.
            seed: Of NumPy's generator; equal seeds give equal plans.
            first: Probability in the first step.
            last: Probability in the last step.

        Raises:
            ValueError: If a probability is not one, or there are no steps.
        """
        first = check_number("the first probability", first, low=0, high=1)
        last = check_number("the last probability", last, low=0, high=1)
        drawn = np.random.default_rng(check_whole("seed", seed)).random(_check_steps(steps))
        return cls.from_list((drawn >= np.linspace(first, last, steps)).astype(int), 2)

    @classmethod
    def dit(cls, fraction: float, knots: Knots, schedule: Schedule) -> Plan:
        """The published program's rule for two DiTs: the first where ``t / T >= 1 - fraction``.

        For more networks it becomes ``1 - t / T <= cumsum(fractions)``: ``from_fractions``.
        """
        fraction = _check_fraction(fraction)
        return cls.from_fractions([fraction, 1 - fraction], knots, schedule)

    @classmethod
    def ldm(cls, fraction: float, knots: Knots, schedule: Schedule) -> Plan:
        """The published program's rule for latent diffusion: ``t / T > 1 - fraction``.

        With a fraction of 1 the first network takes all, also a step at time 0.
        """
        (step, count), fraction = _places(knots, schedule), _check_fraction(fraction)
        small = (step / count > 1 - fraction + TOLERANCE) | (fraction == 1)
        return cls.from_list(1 - small.astype(int), 2)

    @classmethod
    def stable_diffusion(cls, fraction: float, steps: int) -> Plan:
        """The published program's rule for Stable Diffusion and SDXL: ``(i + 1) / N <= fraction``.

        It goes by the step i of N, not by its time.
        """
        progress = np.arange(1, _check_steps(steps) + 1) / steps
        return cls.from_list((progress > _check_fraction(fraction) + TOLERANCE).astype(int), 2)

    @classmethod
    def lcm(cls, fraction: float, steps: int) -> Plan:
        """The published program's rule for LCM: ``i / N <= fraction``, but no step at fraction 0.

        So any other fraction below 1 gives the first network one step more than Stable Diffusion's.
        """
        progress, fraction = np.arange(_check_steps(steps)) / steps, _check_fraction(fraction)
        small = (progress <= fraction + TOLERANCE) & (fraction > 0)
        return cls.from_list(1 - small.astype(int), 2)

    def reversed(self) -> Plan:
        """The same runs from the last to the first: large to small out of small to large."""
        return Plan(self.networks[::-1], self.num_networks)

    def last_steps(self, count: int) -> Plan:
        """The last ``count`` steps alone, as ``schedules.last_steps`` cuts the grid.

        Raises:
            ValueError: If there are not so many, or none.
        """
        count = check_whole("the number of last steps", count, 1, self.steps)
        return Plan(self.networks[-count:], self.num_networks)

    def counts(self) -> tuple[int, ...]:
        """How many steps each network takes."""
        steps = np.bincount(np.asarray(self.networks), minlength=self.num_networks)
        return tuple(int(n) for n in steps)

    def runs(self) -> list[tuple[int, int]]:
        """The plan as runs ``(network, steps)``, in order."""
        groups = itertools.groupby(np.asarray(self.networks).tolist())
        return [(network, len(list(group))) for network, group in groups]

    def describe(self, names: Sequence[str] | None = None, most: int | None = None) -> str:
        """The runs in words, ``"small x 40, large x 60"``; networks by number without names.

        Of more than ``most`` runs it says the number, and how many steps each network takes.
        """
        if names is not None and (not is_list(names) or len(names) != self.num_networks):
            raise ValueError(f"{self.num_networks} networks need as many names, got {shown(names)}")
        runs = self.runs()
        many = most is not None and len(runs) > most
        said = enumerate(self.counts()) if many else runs
        text = ", ".join(f"{names[k] if names else k} x {n}" for k, n in said)
        return f"{text} in {len(runs)} runs" if many else text

    def __repr__(self) -> str:
        traced = not isinstance(self.networks, np.ndarray)
        return f"Plan({f'{self.num_networks} networks' if traced else self.describe(most=8)})"

    def _repr_html_(self) -> str:
        """The plan as a colored bar, for notebooks."""
        parts = "".join(
            f'<div title="network {k}: {n} steps" style="flex:{n};background:'
            f'{COLORS[k % len(COLORS)]};color:white;text-align:center;overflow:hidden">'
            f"{k} x {n}</div>"
            for k, n in self.runs()
        )
        return f'<div style="display:flex;max-width:40em;font:13px sans-serif">{parts}</div>'

    def cost(self, per_step: Sequence[float | int] | np.ndarray) -> float:
        """Total of a cost per step and network: seconds as measured, or a card's multiply-adds.

        Raises:
            ValueError: If there is not one cost for each network.

        >>> Plan.from_counts([40, 60]).cost([1.0, 10.0])
        640.0
        """
        return float(np.dot(self.counts(), self._costs(per_step)))

    def speedup(self, per_step: Sequence[float | int] | np.ndarray) -> float:
        """How many times cheaper than the most expensive network alone.

        Raises:
            ValueError: If there is not one cost for each network, all above 0.

        >>> Plan.from_counts([40, 60]).speedup([1.0, 10.0])
        1.5625
        """
        costs = self._costs(per_step)
        if not costs.min() > 0:
            raise ValueError(f"costs must be above 0, got {shown(per_step)}")
        return self.steps * float(costs.max()) / self.cost(costs)

    def _costs(self, per_step: Sequence[float | int] | np.ndarray) -> np.ndarray:
        array = as_array(per_step)
        numbers = array.dtype.kind in "iuf" and np.isfinite(array).all()
        if array.shape != (self.num_networks,) or not numbers:
            raise ValueError(
                f"{self.num_networks} networks need as many costs, finite numbers, "
                f"got {shown(per_step)}"
            )
        return array.astype(np.float64)

    def to_json(self) -> str:
        """The plan as one line of JSON, which ``from_json`` reads.

        >>> Plan.from_counts([40, 60]).to_json()
        '{"num_networks": 2, "runs": [[0, 40], [1, 60]]}'
        """
        return json.dumps({"num_networks": self.num_networks, "runs": self.runs()})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of a text that ``to_json`` made, of a plan or of a ``Calibration``.

        Raises:
            ValueError: If it is no such text.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a plan is JSON such as {_EXAMPLE}, but {error}") from None
        number, runs = (data.get(k) for k in ("num_networks", "runs")) if _is_plan(data) else (0, 0)
        if not is_whole(number) or not isinstance(runs, list) or not all(map(_is_run, runs)):
            raise ValueError(f"a plan is JSON such as {_EXAMPLE}, got {shown(text)}")
        steps = sum(run[1] for run in runs)
        if steps > _MOST_STEPS:
            raise ValueError(f"a plan has at most {_MOST_STEPS} steps, got {steps}")
        networks = np.repeat([run[0] for run in runs], [run[1] for run in runs])
        return cls.from_list(networks.astype(np.int64), number)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to a file, whole or not at all.

        Raises:
            ValueError: If the path names no file.
            OSError: If the file cannot be written.
        """
        file = Path(path)
        if not file.name:
            raise ValueError(f"path must name a file to write the plan to, got {shown(path)}")
        write_text(file, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: If the file is no plan, or cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the plan {path}: {error}") from None


_EXAMPLE = '{"num_networks": 2, "runs": [[0, 40], [1, 60]]}'
_MOST_STEPS = 1_000_000


def _is_plan(data: object) -> bool:
    return isinstance(data, dict) and data.keys() - {"calibration"} == {"num_networks", "runs"}


def _is_run(run: object) -> bool:
    if not isinstance(run, list) or len(run) != 2 or not all(map(is_whole, run)):
        return False
    return 0 <= run[0] < 2**31 and 0 < run[1] < 2**31


def _places(knots: Knots, schedule: Schedule) -> tuple[np.ndarray, int]:
    """The place of each step's time among the training times, 0 to T-1, and T."""
    if not isinstance(knots, Knots) or not isinstance(schedule, Schedule):
        raise ValueError(
            "a plan by progress needs the knots and the schedule that they were made from, "
            f"got {type(knots).__name__} and {type(schedule).__name__}"
        )
    time, count = np.asarray(knots.time[:-1], np.float64), schedule.num_train_steps
    if time.max() > schedule.times[-1] + TOLERANCE:
        raise ValueError(
            f"the knots start at time {time.max():g}, but the schedule {schedule.name!r} ends at "
            f"{schedule.times[-1]:g}; give the one that they were made from"
        )
    return np.interp(time, schedule.times, np.arange(count)), count


def _check_steps(steps: int) -> int:
    return check_whole("steps", steps, 1, _MOST_STEPS)


def _check_fraction(fraction: float) -> float:
    return check_number("the first network's fraction", fraction, low=0, high=1)


def _check_bounds(
    what: str, bounds: Sequence[float | int] | np.ndarray, knots: Knots, sign: int
) -> np.ndarray:
    if not isinstance(knots, Knots):
        raise ValueError(f"a plan by {what} needs the knots, got {shown(knots)}")
    array = as_array(bounds)
    if array.ndim != 1 or array.dtype.kind not in "iuf" or np.isnan(array).any():
        raise ValueError(f"the {what} to switch at must be a list of numbers, got {shown(bounds)}")
    array = array.astype(np.float64)
    if (np.diff(array) * sign < 0).any():
        order = "fall" if sign > 0 else "rise"
        raise ValueError(f"the {what} to switch at must not {order}, got {shown(bounds)}")
    return array


def check_fractions(
    fractions: Sequence[float] | np.ndarray, num_networks: int | None = None
) -> list[float]:
    """The fractions as floats.

    Raises:
        ValueError: Unless there are ``num_networks`` of them, at least 0, summing to 1.
    """
    if not is_list(fractions):
        raise ValueError(f"fractions must be a list of numbers, got {shown(fractions)}")
    fractions = [check_number("fractions", f) for f in fractions]
    said = f"got {', '.join(format(f, 'g') for f in fractions) or 'none'}"
    if not fractions or (num_networks is not None and len(fractions) != num_networks):
        expected = f"{num_networks} networks need {num_networks}" if num_networks else "give some"
        raise ValueError(f"{expected} fractions, {said}")
    if not all(0 <= f <= 1 for f in fractions):
        raise ValueError(f"fractions must lie between 0 and 1, {said}")
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must sum to 1, {said} (sum {sum(fractions):g})")
    return fractions
