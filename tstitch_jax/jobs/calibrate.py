r"""Where to switch networks, chosen from one short run.

Along trajectories of the last network, the reference, every other network is asked for the same
steps, and what it would do to the result is predicted from the difference (see
``docs/calibration.md`` for the derivation): in a band of spatial frequencies whose states have
variance :math:`v_i` over images at point i, the deterministic flow carries an error e at that point
to :math:`e \sqrt{v_N / v_i}` in the result. In units of the result's own deviation it stays
:math:`e / \sqrt{v_i}`, whatever the remaining steps. The damage of a plan is the mean square of the
sum of its steps' errors in these units: 0 for the reference alone; 1 for results that differ from
the reference's by as much as those differ from their mean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.core.checks import check_number, check_whole, is_list, shown, to_builtin
from tstitch_jax.core.files import write_text
from tstitch_jax.core.plan import Plan
from tstitch_jax.core.types import Key, Knots
from tstitch_jax.jobs.timing import pareto_front, pass_seconds, passes
from tstitch_jax.models import devices
from tstitch_jax.models.types import Network
from tstitch_jax.sampling.checks import check_key
from tstitch_jax.sampling.program import (
    Config,
    Inputs,
    assemble,
    initial_state,
    prepared,
    sample_program,
)
from tstitch_jax.sampling.sampler import KEEP, Sampler

TOLERANCE = 0.005
"""The damage that is tolerated unless something else is asked for."""

NEGLIGIBLE = 0.05
"""An error of x0, relative to the images' variance, below which it is not asked whether a linear
filter would make a smaller one."""

_FLOOR = (2 / 255) ** 2 / 12
"""Variance of the rounding to pixels, which is added to that of a band: less cannot be seen."""

_STATES = 2000
"""About how many ways of counting steps are looked through."""

_LINEAR = "a linear filter"


class Choice(NamedTuple):
    """One plan and what is to be expected of it.

    Attributes:
        plan: The plan.
        damage: Its predicted damage.
        error: The standard error of that, over the conditions.
        speedup: How many times cheaper than the last network alone.
    """

    plan: Plan
    damage: float
    error: float
    speedup: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What ``calibrate`` found: a plan, and why.

    Attributes:
        chosen: The chosen plan with what is expected of it.
        front: The plans that no other one is better than in both damage and cost, cheapest first.
        names: Of the K networks.
        steps_alone: float64 ``[K, N]``, the damage of each step by each network alone.
        linear: float64 ``[N]``, the same if a linear filter took the step: the Wiener filter of the
            trajectories' own means and spectra. A network that does more damage takes no step,
            but where it is within the step's share of 0.5%, or errs by less than 5% of the
            images' variance.
        x0, eps: float64 ``[K, N]``, mean squared difference of each network's prediction from the
            last one's, at the same x and time.
        cosine: float64 ``[K, N]``, their cosine, of eps.
        costs: float64 ``[K, N]``, what each step costs by each network: seconds an image, or
            multiply-adds.
        warnings: Why networks should not be stitched, in words; empty if nothing speaks against it.
        settings: What it was measured with.
    """

    chosen: Choice
    front: tuple[Choice, ...]
    names: tuple[str, ...]
    steps_alone: np.ndarray
    linear: np.ndarray
    x0: np.ndarray
    eps: np.ndarray
    cosine: np.ndarray
    costs: np.ndarray
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    _gram: np.ndarray

    def __repr__(self) -> str:
        plan = self.plan.describe(self.names, most=4)
        return f"Calibration({plan}; damage {self.damage:.2%}, {self.speedup:.2f}x faster)"

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.chosen.plan

    @property
    def damage(self) -> float:
        """The chosen plan's predicted damage."""
        return self.chosen.damage

    @property
    def speedup(self) -> float:
        """How many times cheaper the chosen plan is than the last network alone."""
        return self.chosen.speedup

    @property
    def fractions(self) -> tuple[float, ...]:
        """The share of the number of steps that each network takes in the chosen plan.

        They are ``sample``'s fractions only where times are evenly spaced.
        """
        return tuple(count / self.plan.steps for count in self.plan.counts())

    def predict(self, plan: Plan) -> Choice:
        """What is to be expected of any plan for these networks and steps.

        Raises:
            ValueError: If the plan is for other numbers of networks or steps.
        """
        count, steps = self.costs.shape
        if not isinstance(plan, Plan) or (plan.num_networks, plan.steps) != (count, steps):
            raise ValueError(
                f"this was calibrated for plans of {steps} steps by {count} networks, "
                f"got {shown(plan)}"
            )
        return _expected(plan, self._gram, self.costs)

    def to_json(self) -> str:
        """The plan as JSON that ``Plan.from_json`` and ``--plan`` read, with how it was chosen."""
        plan = json.loads(self.plan.to_json())
        front = [
            {"damage": _digits(c.damage), "speedup": _digits(c.speedup), "runs": c.plan.runs()}
            for c in self.front
        ]
        about = {
            "networks": self.names, "damage": _digits(self.damage),
            "damage_error": _digits(self.chosen.error), "speedup": _digits(self.speedup),
            "warnings": self.warnings, **self.settings, "front": front,
        }  # fmt: skip
        return json.dumps(plan | {"calibration": about})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes that JSON to a file, whole or not at all.

        Raises:
            OSError: If the file cannot be written.
        """
        write_text(Path(path), self.to_json() + "\n")


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _expected(plan: Plan, gram: np.ndarray, costs: np.ndarray) -> Choice:
    networks, (count, steps) = np.asarray(plan.networks), costs.shape
    others = np.flatnonzero(networks < count - 1)
    entries = networks[others] * steps + others
    own = gram[:, entries[:, None], entries].sum(axis=(1, 2))
    spent = costs[networks, np.arange(steps)].sum()
    error = own.std(ddof=1) / math.sqrt(len(own))
    return Choice(plan, max(float(own.mean()), 0.0), float(error), float(costs[-1].sum() / spent))


def _cosines(size: int) -> np.ndarray:
    """The orthonormal matrix of the discrete cosine transform (type 2), float32."""
    frequency, place = np.mgrid[:size, :size]
    matrix = math.sqrt(2 / size) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * size))
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


def _bands(height: int, width: int) -> np.ndarray:
    """Zeros and ones: which band, by radius, each coefficient lies in; float32 ``[S, H, W]``."""
    count = max(1, min(height, width) // 2)
    radius = np.hypot(*np.meshgrid(np.arange(height) / height, np.arange(width) / width,
                                   indexing="ij"))  # fmt: skip
    band = np.minimum((radius * count).astype(int), count - 1)
    return (band == np.arange(count)[:, None, None]).astype(np.float32)


class _Measured(NamedTuple):
    """By network but the last, and step; errors are in units of the state's deviation.

    Attributes:
        gram: float32 ``[B, M, M]``, mean products of the errors, M being (K - 1) N.
        linear: float32 ``[N]``, mean square of the linear filter's.
        whole: float32 ``[N]``, mean square if x0 were wrong by as much as images differ.
        x0, eps: float32 ``[K-1, N]``, mean squared differences.
        cosine: float32 ``[K-1, N]``, of eps.
        scale: float32 ``[K-1, N]``, how long x0 is along the last network's.
        level: float32 ``[K-1, N]``, mean square of eps over the last network's.
    """

    gram: Float[Array, "b m m"]
    linear: Float[Array, " n"]
    whole: Float[Array, " n"]
    x0: Float[Array, "k n"]
    eps: Float[Array, "k n"]
    cosine: Float[Array, "k n"]
    scale: Float[Array, "k n"]
    level: Float[Array, "k n"]


@functools.partial(jax.jit, static_argnames=("config",))
def _measure(inputs: Inputs, *, config: Config) -> _Measured:
    """One trajectory of the last network, and all others' predictions along it."""
    shape = config.shape
    _, start = initial_state(inputs, config)
    _, after, clean = sample_program(inputs, config)
    states = jnp.concatenate([start[None], after])
    inputs = prepared(inputs, config)
    knots = jax.tree.map(jnp.asarray, inputs.knots)
    here, there = (jax.tree.map(lambda v, p=p: v[p], knots) for p in (slice(-1), slice(1, None)))
    count, steps = inputs.plan.num_networks, knots.steps
    product = functools.partial(jnp.einsum, precision="highest")
    rows, columns, bands = _cosines(shape[0]), _cosines(shape[1]), _bands(*shape[:2])

    def transform(x: jax.Array) -> jax.Array:
        return product("uh,...hwc,vw->...uvc", rows, x, columns)

    def over_bands(power: jax.Array) -> jax.Array:
        """The mean over each band, at each coefficient."""
        mean = product("suv,...uvc->...sc", bands, power) / bands.sum((1, 2))[:, None]
        return product("suv,...sc->...uvc", bands, mean)

    # By point: mean over images, and variance about it, by band.
    spectra = transform(states)
    means = spectra.mean(axis=1)
    images = spectra.shape[1]
    spread = jnp.square(spectra - means[:, None]).sum(axis=1) / (images - 1)
    variance = over_bands(spread) + _FLOOR
    unit = 1 / jnp.sqrt(variance[1:])

    def over_images(value: jax.Array) -> jax.Array:
        return value.mean(axis=(1, 2, 3))

    def compare(at: tuple[jax.Array, jax.Array, Knots, Knots, jax.Array]) -> tuple:
        x, x0, knot, after, unit = at
        eps = (x - knot.alpha * x0) / knot.sigma
        found = []
        for k in range(count - 1):
            # All steps to network k, with its guidance.
            alone = Plan(jnp.full(steps, k, jnp.int32), count)
            denoiser = assemble(inputs._replace(plan=alone), config)
            other = denoiser(x, knot, inputs.cond)
            difference = other.x0 - x0
            lengths = over_images(jnp.square(other.eps)), over_images(jnp.square(eps))
            error = after.alpha * difference + after.sigma * (other.eps - eps)
            found.append((
                transform(error) * unit,
                over_images(jnp.square(difference)).mean(),
                over_images(jnp.square(other.eps - eps)).mean(),
                (over_images(other.eps * eps) / jnp.sqrt(lengths[0] * lengths[1])).mean(),
                over_images(other.x0 * x0).mean() / over_images(jnp.square(x0)).mean(),
                lengths[0].mean() / lengths[1].mean(),
            ))  # fmt: skip
        return tuple(jnp.stack(each) for each in zip(*found, strict=True))

    errors, *found = jax.lax.map(compare, (states[:-1], clean, here, there, unit))
    errors = jnp.moveaxis(errors, 0, 1).reshape(-1, images, math.prod(shape))  # [M, B, HWC]
    gram = product("mbd,nbd->bmn", errors, errors) / math.prod(shape)

    def filtered(at: tuple) -> tuple[jax.Array, jax.Array]:
        """The linear filter's error: the line through means and covariances by band."""
        spectrum, mean, power, x0, knot, after, unit = at
        slope = knot.alpha * variance[-1] / power
        line = means[-1] + slope * (spectrum - mean)
        carried = (after.alpha - after.sigma * knot.alpha / knot.sigma) * unit
        wrong = jnp.square(carried * (line - transform(x0))).mean()
        return wrong, (jnp.square(carried) * variance[-1]).mean()

    points = (spectra[:-1], means[:-1], variance[:-1], clean, here, there, unit)
    return _Measured(gram, *jax.lax.map(filtered, points), *(value.T for value in found))


def _search(gram: np.ndarray, allowed: np.ndarray, free: bool) -> list[list[int]]:
    """Plans of little damage for every way of counting the steps, by dynamic programming.

    Of all plans that give each network the same number of steps so far, the one of least damage is
    kept. Without ``free`` there is only one, so none is lost; with it, the plans kept are the best
    ones where errors of different steps do not go together and all steps of a network cost alike,
    and good ones elsewhere.

    Args:
        gram: float64 ``[M, M]``, mean products of errors.
        allowed: bool ``[K, N]``, who may take which step; the last network may take all.
        free: Whether an earlier network may come after a later one.
    """
    count, steps = allowed.shape
    # Steps are put together until there are not too many ways of counting.
    blocks = max(
        m for m in range(1, steps + 1)
        if m == 1 or math.comb(m + count - 1, count - 1) <= _STATES
    )  # fmt: skip
    block = np.arange(steps) * blocks // steps
    sums = np.kron(np.eye(count - 1), np.equal.outer(np.arange(blocks), block))
    products = sums @ gram @ sums.T
    may = np.array([[allowed[k, block == b].all() for b in range(blocks)] for k in range(count)])
    # By counts: damage, its derivative by each further error (halved), and who took each block.
    labels: dict[tuple[int, ...], tuple[float, np.ndarray, tuple[int, ...]]] = {
        (0,) * count: (0.0, np.zeros(len(products)), ())
    }
    for b in range(blocks):
        following: dict[tuple[int, ...], tuple[float, np.ndarray, tuple[int, ...]]] = {}
        for counts, (damage, slope, taken) in labels.items():
            for k in range(0 if free or not taken else taken[-1], count):
                if not may[k, b]:
                    continue
                own, towards = damage, slope
                if k < count - 1:
                    entry = k * blocks + b
                    own = damage + products[entry, entry] + 2 * slope[entry]
                    towards = slope + products[entry]
                key = (*counts[:k], counts[k] + 1, *counts[k + 1 :])
                if key not in following or own < following[key][0]:
                    following[key] = own, towards, (*taken, k)
        labels = following
    return [np.asarray(taken)[block].tolist() for *_, taken in labels.values()]


def _front(plans: Sequence[list[int]], gram: np.ndarray, costs: np.ndarray) -> tuple[Choice, ...]:
    count, steps = costs.shape
    mean, spent, damages = gram.mean(axis=0), [], []
    for plan in np.asarray(plans):
        others = np.flatnonzero(plan < count - 1)
        entries = plan[others] * steps + others
        damages.append(float(mean[np.ix_(entries, entries)].sum()))
        spent.append(float(costs[plan, np.arange(steps)].sum()))
    kept = pareto_front(spent, damages, lower_is_better=True)
    found = {
        (cost, damage): plan
        for cost, damage, plan, best in zip(spent, damages, plans, kept, strict=True)
        if best
    }
    return tuple(
        _expected(Plan.from_list(found[point], count), gram, costs) for point in sorted(found)
    )


def _runs(steps: np.ndarray) -> str:
    """Numbers of steps in words: ``"0 to 4, 7"``."""
    numbers = np.flatnonzero(steps)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _warnings(
    networks: Sequence[Network], found: _Measured, allowed: np.ndarray, costs: np.ndarray,
    solver: str,
) -> list[str]:  # fmt: skip
    """What speaks against stitching these networks, or against the prediction."""
    last, steps, said = networks[-1].card, costs.shape[1], []
    if solver not in ("ddim", "euler"):
        said.append(
            f"damage is predicted for deterministic first-order steps; with {solver} that of the "
            "last steps may be several times as large: check the plan"
        )
    for k, network in enumerate(networks[:-1]):
        card = network.card
        if card.data and last.data and card.data != last.data:
            said.append(f"{card.name} was trained on {card.data}, {last.name} on {last.data}")
        worse = ~allowed[k]
        if worse.all():
            said.append(
                f"{card.name} does more damage than {_LINEAR} in every step, so it takes none: "
                "were both trained on the same data, and are its schedule, target and classes what "
                "its card says?"
            )
        elif worse.any():
            said.append(
                f"{card.name} does more damage than {_LINEAR} in {worse.sum()} of {steps} steps "
                f"({_runs(worse)}), which it does not take; nor, where switches are final, any "
                "before them"
            )
        # Near the end both see the image itself; in the middle both see the same noise.
        scale = float(np.median(found.scale[k, -max(1, steps // 5) :]))
        if not 0.8 < scale < 1.25:
            said.append(
                f"{card.name} makes images {scale:.3g} times as large as {last.name}: are their "
                "latents scaled alike?"
            )
        level = float(np.median(found.level[k]))
        if not 0.8 < level < 1.25:
            said.append(
                f"{card.name} sees {level:.3g} times the power of noise that {last.name} sees at "
                "the same time: is its schedule what its card says?"
            )
        if costs[k].sum() >= costs[-1].sum():
            said.append(f"{card.name} costs no less than {last.name}: nothing is to be gained")
    return said


class _TooQuick(ValueError):
    """No plan is as quick as that."""

    def __init__(self, budget: float, name: str, quickest: float) -> None:
        super().__init__(
            f"no plan is {budget:g} times as quick as {name} alone; the quickest is "
            f"{quickest:.2f} times as quick"
        )


def _check_goal(tolerance: Any, budget: Any) -> tuple[float, float | None]:
    if tolerance is not None and budget is not None:
        raise ValueError("give a tolerance or a budget, not both")
    if budget is not None:
        budget = check_number("budget", budget)
        if budget < 1:
            raise ValueError(f"the budget is a speed-up of at least 1, such as 1.5, got {budget:g}")
    tolerance = TOLERANCE if tolerance is None else check_number("tolerance", tolerance, low=0)
    return tolerance, budget


def _in_turn(conditions: int, value: Any) -> Any:
    """As many as there are conditions: those given in turn, or spread over them if they are more.

    Of a list of lists each; what is no list, or empty, as it is, for others to refuse.
    """
    every = list(value) if is_list(value) and len(value) and is_list(value[0]) else [value]
    lengths = {len(own) if is_list(own) else 0 for own in every}
    if len(lengths) > 1 or 0 in lengths:
        return value
    count = lengths.pop()
    turns = np.arange(conditions) * max(count, conditions) // conditions % count
    spread = [[own[k] for k in turns] for own in every]
    return spread if is_list(value[0]) else spread[0]


def calibrate(
    key: Key,
    sampler: Sampler,
    *,
    tolerance: float | int | None = None,
    budget: float | int | None = None,
    free: bool = False,
    labels: Any = None,
    prompts: Any = None,
    cond: Any = None,
    negative: Any = None,
    size: Any = None,
    conditions: int = 64,
    costs: str = "seconds",
) -> Calibration:
    """Chooses which network takes which step, from one trajectory per condition.

    Costs one trajectory of the last network, one of each other, and a few single steps to measure
    their time.

    Args:
        key: A JAX PRNG key.
        sampler: A sampler of at least two networks, from the one for the first, noisy steps to the
            one for the last, which the others are compared with. Its plan is ignored. Errors are
            propagated as deterministic first-order steps would, whatever its solver.
        tolerance: Choose the cheapest plan whose predicted damage is at most this: the mean square
            of the change in the result, relative to the result's variance over images; 0.005
            unless given.
        budget: Choose instead the plan of least damage that costs at least this factor less than
            the last network alone.
        free: Whether an earlier network may come back after a later one; else each switch is final.
        labels: Class labels that the conditions take in turn (or a list for each network); spread
            over all classes unless given.
        prompts: Texts that the conditions take in turn.
        cond, negative, size: As in a call of the sampler; ``size`` is that of the latents.
        conditions: How many trajectories, at least 4; with ``cond``, as many as it has.
        costs: ``"seconds"``, as measured here, or ``"macs"``, multiply-adds as the cards say.

    Returns:
        A ``Calibration``; a sampler takes it as its plan.

    Raises:
        ValueError: If an argument is invalid, or no plan reaches the ``budget``.
        FloatingPointError: If predictions are not finite.
    """
    tolerance, budget = _check_goal(tolerance, budget)
    if costs not in ("seconds", "macs"):
        raise ValueError(f"costs must be seconds or macs, got {shown(costs)}")
    check_key(key)
    check_whole("conditions", conditions, 4)
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a ts.Sampler, got {shown(sampler)}")
    networks, count = sampler.networks, len(sampler.networks)
    if count < 2:
        raise ValueError("calibration compares networks; give at least two")
    if devices.mesh_of(*networks) is not None:
        raise ValueError("calibration runs on one device; load the networks without a mesh")
    if costs == "macs" and any(network.card.macs <= 0 for network in networks):
        raise ValueError("a card says nothing of multiply-adds; take costs='seconds'")
    if labels is None and "labels" in sampler.takes:
        labels = list(range(max(network.card.num_classes for network in networks)))
    asked = dict(
        labels=None if labels is None else _in_turn(conditions, labels),
        prompts=None if prompts is None else _in_turn(conditions, prompts),
        negative=negative,
        size=size,
    )
    last = Plan.from_list([count - 1] * sampler.knots.steps, count)
    request = sampler.replace(plan=last).request(key, cond=cond, decode=False, keep=KEEP, **asked)
    if request.batch < 4:
        raise ValueError(f"give a context for at least 4 conditions, got {request.batch}")
    steps, solver = request.plan.steps, sampler.solver.name
    if sampler.solver.needs_consistency:
        raise ValueError(f"with the solver {solver!r} no error outlives a step; take another")
    if costs == "macs":
        per_pass = [float(network.card.macs) for network in networks]
    else:
        per_pass = pass_seconds(networks, request.batch, request.config.shape)
    spent = passes(request) @ np.asarray(per_pass)
    quickest = float(spent[-1].sum() / spent.min(axis=0).sum())
    if budget is not None and budget > quickest:
        raise _TooQuick(budget, networks[-1].card.name, quickest)
    measured = _measure(request.inputs, config=request.config)
    found = jax.tree.map(lambda v: np.asarray(v, np.float64), jax.device_get(measured))
    if not all(np.isfinite(value).all() for value in found):
        raise FloatingPointError("predictions along the trajectory are not finite")

    def with_last(value: np.ndarray, last: float | int) -> np.ndarray:
        return np.concatenate([value, np.full((1, steps), last)])

    mean = found.gram.mean(axis=0)
    steps_alone = with_last(np.diagonal(mean).reshape(-1, steps), 0)
    # A step's share of what is tolerated by default is never refused: where there is hardly
    # anything but noise no network beats the filter, and none needs to.
    harmless = np.maximum(NEGLIGIBLE * found.whole, TOLERANCE / steps)
    allowed = steps_alone <= np.maximum(found.linear, harmless)
    plans = _search(mean, allowed, free)
    front = _front(plans, found.gram, spent)
    if budget is None:
        chosen = next(choice for choice in front if choice.damage <= tolerance)
    else:
        quick = [choice for choice in front if choice.speedup >= budget]
        if not quick:
            raise _TooQuick(budget, networks[-1].card.name, front[0].speedup)
        chosen = quick[-1]
    goal = {"tolerance": tolerance} if budget is None else {"budget": budget}
    given = {
        k: to_builtin(v)
        for k, v in asked.items()
        if v is not None and (cond is None or k == "size")
    }
    return Calibration(
        chosen=chosen,
        front=front,
        names=tuple(network.card.name for network in networks),
        steps_alone=steps_alone,
        linear=found.linear,
        x0=with_last(found.x0, 0),
        eps=with_last(found.eps, 0),
        cosine=with_last(found.cosine, 1),
        costs=spent,
        warnings=tuple(_warnings(networks, found, allowed, spent, solver)),
        settings={
            **goal, "free": free, "conditions": request.batch, "costs": costs,
            **sampler.replace(plan=None).settings(), **given,
        },
        _gram=found.gram,
    )  # fmt: skip
