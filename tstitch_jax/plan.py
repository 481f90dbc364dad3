"""Plans: which network takes each step of a trajectory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from tstitch_jax.types import Knots, Leaf, Schedule

_TOLERANCE = 1e-6
"""Of compared progress, as the times of knots are float32: 0.1 + 0.2 is 0.3 here."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which network takes each step. Data, not code: one executable runs every plan of its length.

    Attributes:
        networks: int32 ``[N]``, the number of the network that takes each step, 0 to K-1. NumPy
            when made by a constructor; traced inside ``jit``.
        num_networks: K. Static.
    """

    networks: Leaf
    num_networks: int = dataclasses.field(metadata={"static": True})

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return self.networks.shape[0]

    @classmethod
    def from_list(cls, networks: Sequence[int] | np.ndarray, num_networks: int) -> Plan:
        """The plan that gives step i to network ``networks[i]``.

        Raises:
            ValueError: If it is empty or names a network below 0 or above K-1.

        >>> Plan.from_list([0, 0, 1], 2).describe(["small", "large"])
        'small x 2, large x 1'
        """
        array = np.asarray(networks)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"a plan is a list of whole numbers, one a step, got {networks!r}")
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
        array = np.asarray(counts)
        whole = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
        if not whole or not array.any() or array.min() < 0:
            raise ValueError(f"counts must be whole numbers, at least 0, not all 0, got {counts!r}")
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

        >>> from tstitch_jax.schedules import make_knots, make_schedule
        >>> schedule = make_schedule("linear")
        >>> knots = make_knots(schedule, 20)
        >>> Plan.from_fractions([0.4, 0.6], knots, schedule).describe()
        '0 x 8, 1 x 12'
        """
        fractions = check_fractions(fractions)
        count = schedule.num_train_steps
        step = np.interp(np.asarray(knots.time[:-1]), schedule.times, np.arange(count))
        progress = 1 - step / count
        bounds = np.cumsum(np.asarray(fractions, np.float64))[:-1]
        networks = (progress[:, None] > bounds + _TOLERANCE).sum(axis=1)
        return cls.from_list(networks, len(fractions))

    def counts(self) -> tuple[int, ...]:
        """How many steps each network takes."""
        steps = np.bincount(np.asarray(self.networks), minlength=self.num_networks)
        return tuple(int(n) for n in steps)

    def runs(self) -> list[tuple[int, int]]:
        """The plan as runs ``(network, steps)``, in order."""
        groups = itertools.groupby(np.asarray(self.networks).tolist())
        return [(network, len(list(group))) for network, group in groups]

    def describe(self, names: Sequence[str] | None = None) -> str:
        """The runs in words, ``"small x 40, large x 60"``; networks by number without names."""
        return ", ".join(f"{names[k] if names else k} x {n}" for k, n in self.runs())

    def cost(self, per_step: Sequence[float]) -> float:
        """Total of a cost per step and network: seconds, or multiply-adds.

        >>> Plan.from_counts([40, 60]).cost([1.0, 10.0])
        640.0
        """
        if len(per_step) != self.num_networks:
            raise ValueError(f"{self.num_networks} networks need as many costs, got {per_step}")
        return float(np.dot(self.counts(), per_step))


def check_fractions(
    fractions: Sequence[float] | np.ndarray, num_networks: int | None = None
) -> list[float]:
    """The fractions as floats.

    Raises:
        ValueError: Unless there are ``num_networks`` of them, at least 0, summing to 1.
    """
    try:
        fractions = [float(f) for f in fractions]
    except (TypeError, ValueError):
        raise ValueError(f"fractions must be a list of numbers, got {fractions!r}") from None
    shown = f"got {', '.join(format(f, 'g') for f in fractions) or 'none'}"
    if not fractions or (num_networks is not None and len(fractions) != num_networks):
        expected = f"{num_networks} networks need {num_networks}" if num_networks else "give some"
        raise ValueError(f"{expected} fractions, {shown}")
    if not all(0 <= f <= 1 for f in fractions):
        raise ValueError(f"fractions must lie between 0 and 1, {shown}")
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must sum to 1, {shown} (sum {sum(fractions):g})")
    return fractions
