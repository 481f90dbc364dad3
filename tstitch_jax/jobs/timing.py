"""What steps cost, and which ways of sampling are worth their cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tstitch_jax.core.types import Solver
from tstitch_jax.models.types import Network
from tstitch_jax.sampling import sampler

ROUNDS = 3
"""Timed runs of a step, after one that warms up."""


def passes(request: sampler.Sampling) -> np.ndarray:
    """How often an image goes through each network, by who takes the step.

    Guidance sends it through twice, autoguidance through the first network too. Heun's methods ask
    twice a step, PNDM in the first step, none in a step to clean data nor, but for ``flow_heun``,
    in one where alpha grows more than tenfold (``karras_slope``).

    Returns:
        float64 ``[K, N, K]``: entry ``[k, i, m]`` says how often it goes through network m in step
        i if network k takes that step.
    """
    given, solver = request.inputs.given, request.static["solver"]
    count, steps = len(given.params), request.plan.steps

    def guided(scale: Any) -> np.ndarray:
        """Whether each step is; a scale for all steps guides whatever it is."""
        if scale is None:
            return np.zeros(steps)
        return np.ones(steps) if np.ndim(scale) == 0 else np.asarray(scale) != 1

    found = np.zeros((count, steps, count))
    for k, scale in enumerate(given.scales):
        found[k, :, k] += 1 + guided(scale)
        if k:
            found[k, :, 0] += guided(given.auto_scale)
    name = solver.name if isinstance(solver, Solver) else solver
    twice = np.zeros(steps)
    twice[: {"heun": steps, "flow_heun": steps, "pndm": 1}.get(name, 0)] = 1
    knots = request.inputs.knots
    alpha, sigma = np.asarray(knots.alpha), np.asarray(knots.sigma)
    twice *= sigma[1:] > 0
    if name != "flow_heun":
        twice *= alpha[1:] <= 10 * alpha[:-1]
    return found * (1 + twice)[:, None]


def timed(request: sampler.Sampling) -> float:
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
        card = network.card
        given: dict[str, Any] = dict(size=shape and shape[:2])
        if card.context is None:
            given["labels"] = np.resize(np.arange(card.num_classes), batch).tolist()
        else:
            given["context"] = np.zeros((batch, *card.context), np.float32)
        steps.append(
            sampler.prepare(
                jax.random.key(0), [network], steps=1, cfg_scale=None, decode=False, **given
            ).precomputed()
        )
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
