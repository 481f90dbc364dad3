"""The one loop of the library."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tstitch_jax.types import Cond, Denoiser, Key, Knots, Params, Solver

_STARTS, _ENDS = slice(None, -1), slice(1, None)
"""Of the steps, among the knots."""


def image_keys(key: Key, indices: Int[Array, " b"]) -> jax.Array:
    """A key per image, by its global index alone: batch size and device count do not matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def draw_noise(keys: jax.Array, stream: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 ``[B, *shape]``. Stream 0 is x_T, i + 1 is the noise of step i."""
    streams = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(streams)


def run(
    denoiser: Denoiser,
    solver: Solver,
    knots: Knots,
    x: Float[Array, "b h w c"],
    *,
    params: Params,
    cond: Cond = None,
    keys: jax.Array | None = None,
    noise: Float[Array, "n b h w c"] | None = None,
    return_trajectory: bool = False,
) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Float[Array, "n b h w c"]]:
    """Integrates from noise to data in one ``lax.scan``. Pure: jit, shard or pmap it.

    Args:
        denoiser: Any denoiser, guided and stitched or not.
        solver: The numerical method.
        knots: The sampling grid.
        x: x_T, float32 ``[B, H, W, C]``.
        params: The denoiser's parameters.
        cond: The denoiser's conditioning.
        keys: One key per image (see ``image_keys``), from which a stochastic solver's noise is
            drawn within the loop.
        noise: That noise, given instead, float32 ``[N, B, H, W, C]``.
        return_trajectory: Whether to return x after each step too.

    Returns:
        x_0, float32 ``[B, H, W, C]``; with ``return_trajectory`` also ``[N, B, H, W, C]``.

    Raises:
        ValueError: If a stochastic solver has neither keys nor noise, or the noise has another
            number of steps than the knots.
    """
    if solver.stochastic and (keys is None) == (noise is None):
        raise ValueError("a stochastic solver needs either keys or noise")
    if noise is not None and noise.shape[0] != knots.steps:
        raise ValueError(f"noise for {noise.shape[0]} steps, but the knots have {knots.steps}")
    knots = jax.tree.map(jnp.asarray, knots)

    def denoise(x: jax.Array, knot: Knots):
        return denoiser(params, x, knot, cond)

    def step(carry, inputs):
        (x, state), (knot, next_knot, step_noise) = carry, inputs
        if solver.stochastic and keys is not None:
            step_noise = draw_noise(keys, knot.index + 1, x.shape[1:])
        x, state = solver.step(denoise, x, state, knot, next_knot, step_noise)
        return (x, state), x if return_trajectory else None

    here, there = (jax.tree.map(lambda v, p=p: v[p], knots) for p in (_STARTS, _ENDS))
    (x, _), trajectory = jax.lax.scan(step, (x, solver.init(x)), (here, there, noise))
    return x if trajectory is None else (x, trajectory)
