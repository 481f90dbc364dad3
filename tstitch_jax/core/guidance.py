"""Guidance as combinators: from denoisers to a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from tstitch_jax.core.checks import shown
from tstitch_jax.core.plan import TOLERANCE, Plan
from tstitch_jax.core.prediction import predict
from tstitch_jax.core.stitch import stitch
from tstitch_jax.core.types import Cond, Denoiser, Knots, Params, Prediction

Guided = Callable[[Params, jax.Array, Knots, Cond, jax.Array], Prediction]
"""A denoiser that takes the step's scale too."""


def _with_scale(guided: Guided, plain: Denoiser, scale: float | jax.Array) -> Denoiser:
    """``guided`` at the scale; of scales by step, ``plain`` where the step's scale is 1."""
    scales = jnp.asarray(scale, jnp.float32)
    if not scales.ndim:
        return lambda params, x, knot, cond: guided(params, x, knot, cond, scales)

    def by_step(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        if scales.shape != (knot.steps,):
            raise ValueError(
                f"a guidance scale per step must have shape ({knot.steps},), got {scales.shape}"
            )

        def here(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
            return guided(params, x, knot, cond, scales[knot.step])

        either = stitch([plain, here], Plan((scales != 1).astype(jnp.int32), 2))
        return either((params, params), x, knot, cond)

    return by_step


def _channels(channels: int | None, x: jax.Array) -> slice:
    if channels is not None and not 0 < channels <= x.shape[-1]:
        raise ValueError(f"guided channels must be 1 to {x.shape[-1]}, got {channels}")
    return slice(channels)


def _push(base: Prediction, towards: Prediction, scale: jax.Array, guided: slice) -> Prediction:
    """``base + scale (towards - base)`` in the guided channels, ``towards`` in the others."""

    def push(start: jax.Array, end: jax.Array) -> jax.Array:
        return end.at[..., guided].set((start + scale * (end - start))[..., guided])

    return towards._replace(x0=push(base.x0, towards.x0), eps=push(base.eps, towards.eps))


def _rescale(
    guided: Prediction, plain: Prediction, rescale: float, x: jax.Array, knot: Knots, chosen: slice
) -> Prediction:
    """Brings the deviation of v, over an image's guided channels, back towards the plain one's."""

    def v(prediction: Prediction) -> jax.Array:
        return knot.alpha * prediction.eps - knot.sigma * prediction.x0

    # Of a constant image the root has no derivative; its factor is 1.
    variance, wanted = (
        jnp.var(v(p)[..., chosen], axis=(1, 2, 3), keepdims=True) for p in (guided, plain)
    )
    varies = (variance > 0) & (wanted > 0)
    ratio = jnp.sqrt(jnp.where(varies, wanted, 1) / jnp.where(varies, variance, 1))
    scaled = v(guided).at[..., chosen].multiply(rescale * ratio + (1 - rescale))
    prediction = predict("v", scaled, x, knot.alpha, knot.sigma)
    return prediction._replace(variance=guided.variance)


def cfg(
    denoiser: Denoiser,
    scale: float | jax.Array,
    null: Cond,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    r"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    :math:`\hat\epsilon = \epsilon_\varnothing + s (\epsilon_c - \epsilon_\varnothing)`, and the
    same of x0, which is the same guidance, since at one x and time each is linear in the other.
    The conditional and the unconditional half run as one batch of 2 B, an image's two rows side by
    side, so that a batch that is spread over devices stays where it is.

    Args:
        denoiser: The denoiser to guide.
        scale: A scalar, or float32 ``[N]`` with a scale per step; may be traced. A scalar of 1
            gives the conditional prediction at the price of any other; in a step whose own scale
            is 1 the unconditional half is not run (see ``guidance_interval``). For a scale per
            network, guide each before they are stitched, or give ``scales[plan.networks]``.
        null: Conditioning of the unconditional half: a pytree like ``cond`` with leaves that
            broadcast to its leaves, such as the null label, or a negative prompt.
        channels: Guide only so many of the first channels, the rest staying conditional (the
            published DiT sampler guides 3 of 4); None guides all.
        rescale: How far, 0 to 1, the deviation of the guided v goes back to that of the
            conditional one, against over-exposure (Lin et al. 2024, arXiv:2305.08891, equations 14
            to 16, phi), over the guided channels. The paper's networks predict v; here v is formed
            of any target.

    Returns:
        A denoiser whose variance, if any, is the conditional one.

    Raises:
        ValueError: If ``rescale`` is outside [0, 1]; while tracing, if scale or channels misfit.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be between 0 and 1, got {rescale}")

    def guided(params: Params, x: jax.Array, knot: Knots, cond: Cond, s: jax.Array) -> Prediction:
        chosen = _channels(channels, x)

        def pair(given: jax.Array, nothing: ArrayLike) -> jax.Array:
            nothing = jnp.broadcast_to(jnp.asarray(nothing, given.dtype), given.shape)
            both = jnp.stack([given, nothing], axis=1)
            return both.reshape(-1, *given.shape[1:])

        def half(both: jax.Array, which: int) -> jax.Array:
            return both.reshape(-1, 2, *both.shape[1:])[:, which]

        both = denoiser(params, pair(x, x), knot, jax.tree.map(pair, cond, null))
        given, nothing = (jax.tree.map(lambda v, h=h: half(v, h), both) for h in (0, 1))
        result = _push(nothing, given, s, chosen)
        return _rescale(result, given, rescale, x, knot, chosen) if rescale else result

    return _with_scale(guided, denoiser, scale)


def autoguide(
    denoiser: Denoiser, weak: Denoiser, scale: float | jax.Array, channels: int | None = None
) -> Denoiser:
    r"""Autoguidance (Karras et al. 2024, arXiv:2406.02507, equation 2): away from a weaker network.

    :math:`\hat x_0 = x_0^{weak} + s (x_0 - x_0^{weak})`, and the same of eps, for the same
    conditioning. In a stitched sampler the small network, loaded anyway, can be the weak one.

    Args:
        denoiser: The denoiser to guide.
        weak: A worse one of the same data.
        scale: As in ``cfg``; in a step whose own scale is 1 the weak one is not run.
        channels: As in ``cfg``.

    Returns:
        A denoiser whose parameters are the pair ``(params, weak_params)``; its variance, if any,
        is that of ``denoiser``.
    """

    def guided(params: Params, x: jax.Array, knot: Knots, cond: Cond, s: jax.Array) -> Prediction:
        chosen = _channels(channels, x)
        strong = denoiser(params[0], x, knot, cond)
        return _push(weak(params[1], x, knot, cond), strong, s, chosen)

    def plain(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        return denoiser(params[0], x, knot, cond)

    return _with_scale(guided, plain, scale)


def guidance_interval(scale: float, knots: Knots, low: float, high: float) -> np.ndarray:
    """A scale per step that guides only in an interval of noise levels, and is 1 outside of it.

    Guidance harms diversity at high noise and does nothing at low noise (Kynkäänniemi et al. 2024,
    arXiv:2404.07724, equation 5); outside the interval its second evaluation is left out.

    Args:
        scale: The scale within.
        knots: The sampling grid.
        low: Steps are guided at levels sigma / alpha above this,
        high: and up to this; may be infinite. Levels within 1e-6 of a bound are at it.

    Returns:
        float32 ``[N]``, for ``cfg`` and ``autoguide``.

    Raises:
        ValueError: If the interval is empty or below 0, or the scale is no finite number.
    """
    numbers = [v for v in (scale, low, high) if isinstance(v, int | float | np.number)]
    if len(numbers) < 3 or not np.isfinite(scale) or not 0 <= low < high:
        raise ValueError(
            "a guidance interval needs a scale and levels 0 <= low < high, got scale "
            f"{shown(scale)}, {shown(low)} and {shown(high)}"
        )
    with np.errstate(divide="ignore"):
        level = np.asarray(knots.sigma[:-1], np.float64) / np.asarray(knots.alpha[:-1], np.float64)
    within = (level > low * (1 + TOLERANCE)) & (level <= high * (1 + TOLERANCE))
    return np.where(within, scale, 1).astype(np.float32)
