"""Denoisers as records: a network, and combinators that take denoisers and return a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tstitch_jax.core.checks import shown
from tstitch_jax.core.plan import Plan
from tstitch_jax.core.prediction import check_target, predict
from tstitch_jax.core.types import (
    Cond,
    Condition,
    Denoiser,
    Knots,
    Params,
    Prediction,
    record,
    static,
)

Apply = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
"""``(params, x [B, H, W, C], time [B], cond) -> raw output``, as a Flax module's ``apply``."""


def as_condition(cond: Any) -> Condition:
    """``cond`` itself if it is a ``Condition``, else one without a null half."""
    return cond if isinstance(cond, Condition) else Condition(cond)


def as_pytree(denoiser: Denoiser) -> Denoiser:
    """A denoiser that ``jit`` takes as an argument: a plain function becomes static data of one."""
    leaves = jax.tree.leaves(denoiser)
    if callable(denoiser) and len(leaves) == 1 and leaves[0] is denoiser:
        return jax.tree_util.Partial(denoiser)
    return denoiser


def prepare(
    denoiser: Denoiser, shape: tuple[int, ...], cond: Condition, platform: str | None
) -> tuple[Denoiser, Condition]:
    """Computes once, before the loop, what does not depend on the step.

    A denoiser's method of this name takes the same other arguments. What follows from parameters
    alone becomes leaves of the denoiser; what has a batch axis goes into the condition. Denoisers
    without such a method are returned as they are.

    Args:
        denoiser: Any denoiser.
        shape: ``(B, H, W, C)`` of the state.
        cond: The condition of the whole trajectory.
        platform: Where the loop will run, such as ``"cpu"``; None if unknown.
    """
    method = getattr(denoiser, "prepare", None)
    return (denoiser, cond) if method is None else method(shape, cond, platform)


@record
class Ready:
    """A denoiser that was prepared, and is not prepared again."""

    denoiser: Denoiser

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        return self.denoiser(x, knot, cond)


@record
class NetworkDenoiser:
    """See ``as_denoiser``."""

    params: Params
    apply: Apply = static()
    target: str = static()
    learned_variance: bool = static()

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        time = jnp.full(x.shape[:1], knot.time, jnp.float32)
        output = self.apply(self.params, x, time, cond.given).astype(jnp.float32)
        if not self.learned_variance:
            return predict(self.target, output, x, knot.alpha, knot.sigma)
        output, variance = jnp.split(output, 2, axis=-1)
        prediction = predict(self.target, output, x, knot.alpha, knot.sigma)
        return prediction._replace(variance=(variance + 1) / 2)

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        method = getattr(self.apply, "prepare", None)
        if method is None:
            return self, cond
        return dataclasses.replace(self, params=method(self.params, shape, cond, platform)), cond


def as_denoiser(
    apply: Apply, params: Params, target: str, learned_variance: bool = False
) -> NetworkDenoiser:
    """A denoiser made of a network's ``apply`` and parameters.

    Args:
        apply: ``(params, x, time, cond) -> output``, with ``time`` float32 ``[B]`` and ``cond`` the
            given half of the condition. It is configuration: ``jit`` compiles again for another
            function, so define it once. It may have a method
            ``prepare(params, shape, cond, platform) -> params``, called once before the loop.
        params: Its parameters, the leaves of the denoiser.
        target: What the output is: ``"eps"``, ``"x0"``, ``"v"`` or ``"flow"``.
        learned_variance: Whether the output has twice the channels, the second half placing the
            log-variance in [-1, 1] between its bounds (Nichol & Dhariwal 2021, equation 15).

    Raises:
        ValueError: If the target is unknown.
    """
    check_target(target)
    return NetworkDenoiser(params, apply, target, learned_variance)


@custom_vmap
def _unbatched(index: jax.Array) -> jax.Array:
    return index


@_unbatched.def_vmap
def _refuse(axis_size, in_batched, index):  # pyright: ignore[reportUnusedFunction]
    raise ValueError(
        "a plan (or a guidance scale per step, which is one) cannot be mapped by vmap (axis of "
        f"{axis_size}): the switch would run every network at every step. Call the jitted sampler "
        "once for each; it does not compile again."
    )


def choose(index: jax.Array, branches: Sequence[Callable[[], Prediction]]) -> Prediction:
    """Runs the branch with this index and no other.

    Args:
        index: A scalar, an integer or, of two branches, a bool.
        branches: Functions without arguments; all return the same kind of prediction.

    Raises:
        ValueError: If ``vmap`` maps the index.
    """
    if len(branches) == 1:
        return branches[0]()
    index = _unbatched(jnp.asarray(index, jnp.int32))
    if len(branches) == 2:
        return jax.lax.cond(index == 1, branches[1], branches[0])
    return jax.lax.switch(index, branches)


@record
class Stitched:
    """See ``stitch``."""

    denoisers: tuple[Denoiser, ...]
    plan: Plan

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        if self.plan.steps != knot.steps:
            raise ValueError(f"the plan has {self.plan.steps} steps, the knots have {knot.steps}")
        network = jnp.asarray(self.plan.networks)[knot.step]
        return choose(network, [lambda d=d: d(x, knot, cond) for d in self.denoisers])

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        denoisers, cond = prepare_each(self.denoisers, shape, cond, platform)
        return Stitched(denoisers, self.plan), cond


def stitch(denoisers: Sequence[Denoiser], plan: Plan) -> Stitched:
    """A denoiser that is ``denoisers[plan.networks[i]]`` in step i (T-Stitch, arXiv:2402.14167).

    Two networks go through ``lax.cond``, more through ``lax.switch``, on a scalar: only the chosen
    network runs. All must give the same kind of prediction (see ``without_variance``).

    Args:
        denoisers: K of them.
        plan: A plan for K networks, of as many steps as the knots have; its leaf may be traced.

    Raises:
        ValueError: If the plan is for another number of networks; while tracing, if it is for
            another number of steps, or is mapped by ``vmap``.
    """
    if not isinstance(plan, Plan):
        raise ValueError(
            f"plan must be a ts.Plan, got {shown(plan)}; Plan.from_fractions makes one of fractions"
        )
    if len(denoisers) != plan.num_networks:
        raise ValueError(
            f"the plan is for {plan.num_networks} networks, got {len(denoisers)} denoisers"
        )
    return Stitched(tuple(map(as_pytree, denoisers)), plan)


@record
class WithCond:
    """See ``with_cond``."""

    denoiser: Denoiser
    part: int | str = static()

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        return self.denoiser(x, knot, self._own(cond))

    def _own(self, cond: Condition) -> Condition:
        return Condition(cond.given[self.part], None if cond.null is None else cond.null[self.part])

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        # Other denoisers may read this part as it is, so the prepared one gets its own condition.
        return prepare(self.denoiser, shape, self._own(cond), platform)


def with_cond(denoiser: Denoiser, part: int | str) -> WithCond:
    """The same denoiser, conditioned on its own part of a condition that several share.

    Denoisers that take different conditioning (labels of other classes, labels and texts) are
    stitched with one condition whose halves are tuples or dicts.

    Args:
        denoiser: The denoiser.
        part: Which entry of the condition's halves it reads: an index or a key.
    """
    return WithCond(as_pytree(denoiser), part)


def prepare_each(
    denoisers: Sequence[Denoiser], shape: tuple[int, ...], cond: Condition, platform: str | None
) -> tuple[tuple[Denoiser, ...], Condition]:
    """``prepare`` of denoisers that share a condition, for the combinators.

    If one of them changes the condition, each gets its own part of a tuple.
    """
    pairs = [prepare(denoiser, shape, cond, platform) for denoiser in denoisers]
    if all(own is cond for _, own in pairs):
        return tuple(denoiser for denoiser, _ in pairs), cond
    given, null = zip(*(own for _, own in pairs), strict=True)
    shared = Condition(given, None if cond.null is None else null)
    return tuple(with_cond(denoiser, k) for k, (denoiser, _) in enumerate(pairs)), shared


class Wrapper:
    """A denoiser that changes what another one takes or returns."""

    denoiser: Denoiser

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        denoiser, cond = prepare(self.denoiser, shape, cond, platform)
        return dataclasses.replace(self, denoiser=denoiser), cond  # pyright: ignore


@record
class WithoutVariance(Wrapper):
    """See ``without_variance``."""

    denoiser: Denoiser

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        return self.denoiser(x, knot, cond)._replace(variance=None)


def without_variance(denoiser: Denoiser) -> WithoutVariance:
    """The same denoiser without its learned variance, to stitch it with one that has none."""
    return WithoutVariance(as_pytree(denoiser))


@record
class AtEqualSNR(Wrapper):
    """See ``at_equal_snr``."""

    denoiser: Denoiser
    grid: Knots

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        grid = self.grid
        if grid.steps != knot.steps:
            raise ValueError(f"the matched grid has {grid.steps} steps, the knots {knot.steps}")
        time, alpha, sigma = (
            jnp.asarray(v)[knot.index] for v in (grid.time, grid.alpha, grid.sigma)
        )
        matched = dataclasses.replace(knot, time=time, alpha=alpha, sigma=sigma)
        scale = jnp.hypot(alpha, sigma) / jnp.hypot(knot.alpha, knot.sigma)
        return self.denoiser(x * scale, matched, cond)


def at_equal_snr(denoiser: Denoiser, grid: Knots) -> AtEqualSNR:
    r"""The same denoiser in a trajectory of another forward process than it was trained on.

    Where :math:`\alpha / \sigma = \alpha' / \sigma'`, the states of the two processes are the same
    up to scale (Kingma et al. 2021, arXiv:2107.00630, section 5.1): the denoiser is evaluated at
    its own time and at :math:`x' = x \sqrt{(\alpha'^2 + \sigma'^2) / (\alpha^2 + \sigma^2)}`, and
    its x0 and eps hold unchanged. Where its process has no such ratio, it is evaluated at the
    nearest end (see ``match_snr``).

    Args:
        denoiser: The denoiser.
        grid: The trajectory's grid matched to the denoiser's process, from ``match_snr``; its
            leaves may be traced.

    Raises:
        ValueError: While tracing, if the two grids differ in length.
    """
    return AtEqualSNR(as_pytree(denoiser), grid)


def in_chunks(code: Callable[..., Any], size: int, *batches: Any) -> Any:
    """``code(*batches)``, at most ``size`` rows at a time, one piece after another.

    Takes and returns pytrees of arrays with a leading batch axis. On a batch that is spread over
    devices each piece would lie on one: map it over the devices first (``jax.shard_map``).
    """
    rows = len(jax.tree.leaves(batches)[0])
    if rows <= size:
        return code(*batches)
    chunks = -(-rows // size)
    size = -(-rows // chunks)  # equal pieces, as each size is a program

    def split(batch: jax.Array) -> jax.Array:
        batch = jnp.pad(batch, [(0, chunks * size - rows)] + [(0, 0)] * (batch.ndim - 1))
        return batch.reshape(chunks, size, *batch.shape[1:])

    pieces = jax.lax.map(lambda chunk: code(*chunk), jax.tree.map(split, batches))
    return jax.tree.map(lambda v: v.reshape(chunks * size, *v.shape[2:])[:rows], pieces)


@record
class ByRows(Wrapper):
    """See ``by_rows``."""

    denoiser: Denoiser
    rows: int = static()

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        def whole(x: jax.Array, cond: Condition) -> Prediction:
            return self.denoiser(x, knot, cond)

        def pieces(x: jax.Array, cond: Condition) -> Prediction:
            return in_chunks(whole, self.rows, x, cond)

        if len(x) <= self.rows:
            return whole(x, cond)
        return jax.lax.platform_dependent(x, cond, tpu=pieces, default=whole)


def by_rows(denoiser: Denoiser, rows: int | None) -> Denoiser:
    """The same denoiser, evaluated on TPUs for at most ``rows`` rows at a time; None: all at once.

    A TPU's fast memory holds the activations of so many rows (``Network.rows``). Other platforms
    gain nothing from pieces.
    """
    return denoiser if rows is None else ByRows(as_pytree(denoiser), rows)
