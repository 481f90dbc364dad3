"""Stitching: one denoiser out of several, chosen by the step; nothing else chooses networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tstitch_jax.core.plan import Plan
from tstitch_jax.core.types import Cond, Denoiser, Knots, Params, Prediction


@custom_vmap
def _unbatched(network: jax.Array) -> jax.Array:
    return network


@_unbatched.def_vmap
def _refuse(axis_size, in_batched, network):  # pyright: ignore[reportUnusedFunction]
    raise ValueError(
        "a plan (or a guidance scale per step, which is one) cannot be mapped by vmap (axis of "
        f"{axis_size}): the switch would run every network at every step. Call the jitted sampler "
        "once for each; it does not compile again."
    )


def stitch(denoisers: Sequence[Denoiser], plan: Plan) -> Denoiser:
    """A denoiser that is ``denoisers[plan.networks[i]]`` in step i (T-Stitch, arXiv:2402.14167).

    Two networks go through ``lax.cond``, more through ``lax.switch``, on a scalar: only the chosen
    network runs. All must give the same kind of prediction (see ``without_variance``).

    Args:
        denoisers: K of them.
        plan: A plan for K networks, of as many steps as the knots have; its leaf may be traced.

    Returns:
        A denoiser whose parameters are the sequence of the K networks' parameters.

    Raises:
        ValueError: If the plan is for another number of networks; while tracing, if it is for
            another number of steps, or is mapped by ``vmap``.
    """
    if len(denoisers) != plan.num_networks:
        raise ValueError(
            f"the plan is for {plan.num_networks} networks, got {len(denoisers)} denoisers"
        )

    def branch(k: int):
        return lambda params, x, knot, cond: denoisers[k](params[k], x, knot, cond)

    branches = [branch(k) for k in range(len(denoisers))]

    def stitched(params: Sequence[Params], x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        if plan.steps != knot.steps:
            raise ValueError(f"the plan has {plan.steps} steps, the knots have {knot.steps}")
        if len(params) != len(branches):
            raise ValueError(f"{len(branches)} networks stitched, got {len(params)} parameters")
        operands = (tuple(params), x, knot, cond)
        if len(branches) == 1:
            return branches[0](*operands)
        network = _unbatched(jnp.asarray(plan.networks)[knot.step])
        if len(branches) == 2:
            return jax.lax.cond(network == 1, branches[1], branches[0], *operands)
        return jax.lax.switch(network, branches, *operands)

    return stitched


def if_used(plan: Plan, network: int, make: Callable[[Params], Any], params: Params) -> Any:
    """``make(params)`` where the network takes a step of the plan, else zeros of the same shapes.

    For what is computed of a network before the loop, at the cost of a good part of a step.
    """

    def nothing(params: Params) -> Any:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(make, params))

    return jax.lax.cond((jnp.asarray(plan.networks) == network).any(), make, nothing, params)
