"""What steps cost, and which ways of sampling are worth their cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tstitch_jax.core.types import Condition
from tstitch_jax.models.families import conditioner_of
from tstitch_jax.models.types import Network
from tstitch_jax.sampling.program import SampleRequest
from tstitch_jax.sampling.sampler import Sampler

ROUNDS = 3
"""Timed runs of a step, after one that warms up."""


def passes(request: SampleRequest) -> np.ndarray:
    """How often an image goes through each network, by the network that takes the step.

    Guidance sends it through twice, autoguidance through the weak network too.

    Returns:
        float64 ``[K, N, K]``: entry ``[k, i, m]`` says how often it goes through network m in step
        i if network k takes that step.
    """
    inputs = request.inputs
    count, steps = len(inputs.denoisers), request.plan.steps

    def guided(scale: Any) -> np.ndarray:
        """Whether each step is; a scale for all steps guides whatever its value."""
        if scale is None:
            return np.zeros(steps)
        return np.ones(steps) if np.ndim(scale) == 0 else np.asarray(scale) != 1

    counts = np.zeros((count, steps, count))
    for k, scale in enumerate(inputs.scales):
        counts[k, :, k] += 1 + guided(scale)
        if k:
            counts[k, :, 0] += guided(inputs.weak_scale)
    return counts * inputs.solver.evaluations(inputs.knots)[:, None]


def timed(request: SampleRequest) -> float:
    """Seconds per image; compiles where nothing alike has run before."""
    start = time.perf_counter()
    jax.block_until_ready(request.run())
    return (time.perf_counter() - start) / request.batch


def pass_seconds(
    networks: Sequence[Network], batch: int, shape: tuple[int, ...] | None = None
) -> list[float]:
    """Seconds per image that one pass through each network takes here, from one step of each.

    Args:
        networks: The networks.
        batch: How many images at a time.
        shape: ``(H, W, C)`` of what they denoise; those of their cards unless given.
    """
    steps = []
    for network in networks:
        given, _ = conditioner_of(network.card).example(batch)
        request = Sampler(network, steps=1, guidance=None).request(
            jax.random.key(0), cond=Condition((given,), (None,)), size=shape and shape[:2],
            decode=False,
        )  # fmt: skip
        steps.append(request.prepared())
    # In rounds that go through all, so that what slows the machine for a while slows them all.
    rounds = [[timed(step) for step in steps] for _ in range(ROUNDS + 1)][1:]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def pareto_front(
    costs: Sequence[float | int], values: Sequence[float | int], *, lower_is_better: bool
) -> list[bool]:
    """Which points no other one is better than, in cost or value, without being worse in either.

    Equal points are all of the front, or none is; one that is not finite is not.

    >>> pareto_front([1, 2, 3], [9, 4, 5], lower_is_better=True)
    [True, True, False]
    """
    sign = 1 if lower_is_better else -1
    points = [(cost, sign * value) for cost, value in zip(costs, values, strict=True)]
    finite = sorted({point for point in points if all(map(math.isfinite, point))})
    # From the cheapest on, a point is of the front if it beats the best value so far.
    front, best = set(), math.inf
    for point in finite:
        if point[1] < best:
            front.add(point)
            best = point[1]
    return [point in front for point in points]
