"""The loop: one step, in one ``lax.scan`` or from the host."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from tstitch_jax.core.checks import shown
from tstitch_jax.core.denoisers import as_condition, as_pytree, prepare
from tstitch_jax.core.types import Condition, Denoiser, Key, Knots, Prediction, Solver, State

_STARTS, _ENDS = slice(None, -1), slice(1, None)
"""Slices that select each step's start and end knot."""


def image_keys(key: Key, indices: Int[Array | np.ndarray, " b"]) -> jax.Array:
    """A key per image, by its global index alone: batch size and device count do not matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def draw_noise(keys: jax.Array, stream: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 ``[B, *shape]``. Stream 0 is x_T, i + 1 is the noise of step i."""
    streams = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
    # The same numbers as drawn in the shape, whose indices LLVM takes seconds to compile on CPUs.
    flat = jax.vmap(lambda k: jax.random.normal(k, (math.prod(shape),), jnp.float32))(streams)
    return flat.reshape(len(keys), *shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of ``iterate``, after it was taken.

    Attributes:
        index: Its number, 0 to N-1.
        x: float32 ``[B, H, W, C]``, the state that it ended with.
        x0: float32 ``[B, H, W, C]``, the clean image as the denoiser saw it from the step's start.
    """

    index: int
    x: jax.Array
    x0: jax.Array


def _advance(
    denoiser: Denoiser, solver: Solver, cond: Condition, keys: jax.Array | None,
    carry: tuple[jax.Array, State], inputs: tuple[Knots, Knots, jax.Array | None],
) -> tuple[tuple[jax.Array, State], jax.Array]:  # fmt: skip
    """One step of either loop: the new state, and the first prediction of x0."""
    (x, state), (knot, next_knot, noise) = carry, inputs
    predicted: list[jax.Array] = []

    def denoise(x: jax.Array, at: Knots) -> Prediction:
        prediction = denoiser(x, dataclasses.replace(at, step=knot.index), cond)
        predicted.append(prediction.x0)
        return prediction

    if solver.stochastic and keys is not None:
        noise = draw_noise(keys, knot.index + 1, x.shape[1:])
    x, state = solver.step(denoise, x, state, knot, next_knot, noise)
    return (x, state), predicted[0]


def _check(solver: Solver, knots: Knots, keys: jax.Array | None, noise: Any) -> Knots:
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be a ts.Solver such as ts.ddim(), got {shown(solver)}")
    if solver.stochastic and (keys is None) == (noise is None):
        raise ValueError("a stochastic solver needs either keys or noise")
    if noise is not None and noise.shape[0] != knots.steps:
        raise ValueError(f"noise for {noise.shape[0]} steps, but the knots have {knots.steps}")
    return jax.tree.map(jnp.asarray, knots)


def platform_of(tree: Any) -> str | None:
    """The platform that holds all arrays of a pytree; None if it is unknown, as of tracers."""
    platforms: set[str | None] = set()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            known = not isinstance(leaf, Tracer)
            platforms |= {device.platform for device in leaf.devices()} if known else {None}
    return platforms.pop() if len(platforms) == 1 else None


def _prepare(
    denoiser: Denoiser, x: jax.Array, cond: Any, platform: str | None
) -> tuple[Denoiser, Condition]:
    return prepare(denoiser, x.shape, as_condition(cond), platform or platform_of(denoiser))


def run(
    denoiser: Denoiser,
    solver: Solver,
    knots: Knots,
    x: Float[Array, "b h w c"],
    *,
    cond: Any = None,
    keys: jax.Array | None = None,
    noise: Float[Array, "n b h w c"] | None = None,
    platform: str | None = None,
    return_trajectory: bool = False,
    return_predictions: bool = False,
) -> Any:
    """Integrates from noise to data in one ``lax.scan``. Pure: jit, shard or pmap it.

    Args:
        denoiser: Any denoiser, guided and stitched or not.
        solver: The numerical method.
        knots: The sampling grid.
        x: x_T, float32 ``[B, H, W, C]``.
        cond: The conditioning, a ``Condition``; any other pytree is one without a null half.
        keys: One key per image (see ``image_keys``), from which a stochastic solver's noise is
            drawn within the loop.
        noise: That noise, given instead, float32 ``[N, B, H, W, C]``.
        platform: Where the loop will run, such as ``"cpu"``, for denoisers that ``prepare`` forms
            for one platform; taken from the denoiser's arrays unless they are traced.
        return_trajectory: Whether to return x after each step too.
        return_predictions: Whether to return each step's prediction of x0 too.

    Returns:
        x_0, float32 ``[B, H, W, C]``; with ``return_trajectory`` or ``return_predictions`` a tuple
        of it and those, in this order, each ``[N, B, H, W, C]``.

    Raises:
        ValueError: If a stochastic solver has not one of keys and noise, or the noise has another
            number of steps than the knots.
    """
    knots = _check(solver, knots, keys, noise)
    denoiser, cond = _prepare(denoiser, x, cond, platform)
    advance = functools.partial(_advance, denoiser, solver, cond, keys)

    def step(carry, inputs):
        carry, x0 = advance(carry, inputs)
        values = ((carry[0], return_trajectory), (x0, return_predictions))
        return carry, tuple(value for value, wanted in values if wanted)

    here, there = (jax.tree.map(lambda v, p=p: v[p], knots) for p in (_STARTS, _ENDS))
    (x, _), kept = jax.lax.scan(step, (x, solver.init(x)), (here, there, noise))
    return (x, *kept) if kept else x


_advance_compiled = jax.jit(_advance)
_prepare_compiled = jax.jit(_prepare, static_argnames="platform")


def iterate(
    denoiser: Denoiser,
    solver: Solver,
    knots: Knots,
    x: Float[Array, "b h w c"],
    *,
    cond: Any = None,
    keys: jax.Array | None = None,
    noise: Float[Array, "n b h w c"] | None = None,
) -> Iterator[Step]:
    """The same integration step by step from the host: for previews, progress bars, early stops.

    The step is compiled once for denoisers and solvers of one structure. Takes the arguments of
    ``run`` and raises the same errors; returns an iterator over the N steps.

    >>> from tstitch_jax.core.grids import make_knots
    >>> from tstitch_jax.core.schedules import make_schedule
    >>> from tstitch_jax.core.solvers import ddim
    >>> def zeros(x, knot, cond):
    ...     return Prediction(jnp.zeros_like(x), x / knot.sigma)
    >>> knots = make_knots(make_schedule("linear"), 3)
    >>> for step in iterate(zeros, ddim(), knots, jnp.ones((1, 2, 2, 1))):
    ...     print(step.index, round(float(step.x.max()), 2))
    0 0.96
    1 0.01
    2 0.0
    """
    knots = _check(solver, knots, keys, noise)
    denoiser = as_pytree(denoiser)
    platform = platform_of(denoiser)
    denoiser, cond = _prepare_compiled(denoiser, x, as_condition(cond), platform=platform)

    def steps() -> Iterator[Step]:
        # One knot's leaves are scalars; the jitted step sees the same shapes in every round.
        points = [jax.tree.map(lambda v, i=i: v[i], knots) for i in range(knots.steps + 1)]
        carry = (x, solver.init(x))
        for i in range(knots.steps):
            inputs = points[i], points[i + 1], None if noise is None else noise[i]
            carry, x0 = _advance_compiled(denoiser, solver, cond, keys, carry, inputs)
            yield Step(i, carry[0], x0)

    return steps()
