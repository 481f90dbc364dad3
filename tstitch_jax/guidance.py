"""Guidance as combinators: from denoisers to a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tstitch_jax.types import Cond, Denoiser, Knots, Params, Prediction


def cfg(
    denoiser: Denoiser, scale: float | jax.Array, null: Cond, channels: int | None = None
) -> Denoiser:
    r"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    :math:`\hat\epsilon = \epsilon_\varnothing + s (\epsilon_c - \epsilon_\varnothing)`, and the
    same of x0, which is the same guidance, since at one x and time each is linear in the other.
    The conditional and the unconditional half run as one batch of 2 B.

    Args:
        denoiser: The denoiser to guide.
        scale: 1 gives the conditional prediction, at the price of any other scale. A scalar, or
            float32 ``[N]`` with a scale per step; may be traced.
        null: Conditioning of the unconditional half: a pytree like ``cond`` with leaves that
            broadcast to its leaves, such as the null label.
        channels: Guide only so many of the first channels, the rest staying conditional (the
            published DiT sampler guides 3 of 4); None guides all.

    Returns:
        A denoiser whose variance, if any, is the conditional one.
    """

    def guided(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        s = jnp.asarray(scale, jnp.float32)
        if s.ndim:
            if s.shape != (knot.steps,):
                raise ValueError(
                    f"a guidance scale per step must have shape ({knot.steps},), got {s.shape}"
                )
            s = s[knot.index]
        if channels is not None and not 0 < channels <= x.shape[-1]:
            raise ValueError(f"guided channels must be 1 to {x.shape[-1]}, got {channels}")

        def pair(given: jax.Array, nothing: ArrayLike) -> jax.Array:
            nothing = jnp.broadcast_to(jnp.asarray(nothing, given.dtype), given.shape)
            return jnp.concatenate([given, nothing])

        both = denoiser(params, jnp.concatenate([x, x]), knot, jax.tree.map(pair, cond, null))

        def guide(value: jax.Array) -> jax.Array:
            given, nothing = jnp.split(value, 2)
            result = nothing + s * (given - nothing)
            if channels is None:
                return result
            return jnp.concatenate([result[..., :channels], given[..., channels:]], axis=-1)

        variance = None if both.variance is None else jnp.split(both.variance, 2)[0]
        return Prediction(guide(both.x0), guide(both.eps), variance)

    return guided
