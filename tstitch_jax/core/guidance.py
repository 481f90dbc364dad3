"""Guidance as combinators: records that take denoisers and are a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from tstitch_jax.core.checks import as_array, check_number, shown
from tstitch_jax.core.denoisers import Wrapper, as_pytree, choose, prepare_each
from tstitch_jax.core.plan import TOLERANCE
from tstitch_jax.core.prediction import predict
from tstitch_jax.core.types import Condition, Denoiser, Knots, Leaf, Prediction, record, static


def as_scale(scale: ArrayLike) -> Leaf:
    """A guidance scale as a float32 array, so that any number runs in the same executable."""
    if isinstance(scale, jax.Array):
        return scale
    numbers = as_array(scale)
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"a guidance scale must be a number or one per step, got {shown(scale)}")
    return numbers.astype(np.float32)


def _scale_here(scale: Leaf, knot: Knots) -> tuple[jax.Array, bool]:
    """The step's scale, and whether scales are given by step."""
    scale = jnp.asarray(scale, jnp.float32)
    if not scale.ndim:
        return scale, False
    if scale.shape != (knot.steps,):
        raise ValueError(
            f"a guidance scale per step must have shape ({knot.steps},), got {scale.shape}"
        )
    return scale[knot.step], True


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
    guided: Prediction, plain: Prediction, rescale: Leaf, x: jax.Array, knot: Knots, chosen: slice
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


@record
class Guided(Wrapper):
    """See ``cfg``."""

    denoiser: Denoiser
    scale: Leaf
    rescale: Leaf | None = None
    channels: int | None = static(default=None)

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        if cond.null is None:
            raise ValueError(
                "classifier-free guidance needs the null half of the condition; give "
                "cond=ts.Condition(given, null)"
            )
        scale, by_step = _scale_here(self.scale, knot)

        def guided() -> Prediction:
            return self._guided(x, knot, cond, scale)

        if not by_step:
            return guided()
        plain = Condition(cond.given)
        return choose(scale != 1, [lambda: self.denoiser(x, knot, plain), guided])

    def _guided(self, x: jax.Array, knot: Knots, cond: Condition, scale: jax.Array) -> Prediction:
        chosen = _channels(self.channels, x)

        def pair(given: ArrayLike, null: ArrayLike) -> jax.Array:
            given, null = jnp.asarray(given), jnp.asarray(null)
            return jnp.stack([given, null], axis=1).reshape(-1, *given.shape[1:])

        def half(both: jax.Array, which: int) -> jax.Array:
            return both.reshape(-1, 2, *both.shape[1:])[:, which]

        pairs = Condition(jax.tree.map(pair, cond.given, cond.null))
        both = self.denoiser(pair(x, x), knot, pairs)
        given, null = (jax.tree.map(lambda v, h=h: half(v, h), both) for h in (0, 1))
        result = _push(null, given, scale, chosen)
        if self.rescale is None:
            return result
        return _rescale(result, given, self.rescale, x, knot, chosen)

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        return super().prepare((2 * shape[0], *shape[1:]), cond, platform)


def cfg(
    denoiser: Denoiser, scale: ArrayLike, channels: int | None = None, rescale: ArrayLike = 0.0
) -> Guided:
    r"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    :math:`\hat\epsilon = \epsilon_\varnothing + s (\epsilon_c - \epsilon_\varnothing)`, and the
    same of x0, which is the same guidance, since at one x and time each is linear in the other.
    The conditional and the unconditional half run as one batch of 2 B, an image's two rows side by
    side, so that a batch that is spread over devices stays where it is. The unconditional half
    reads ``cond.null``.

    Args:
        denoiser: The denoiser to guide.
        scale: A scalar, or float32 ``[N]`` with a scale per step; may be traced. A scalar of 1
            gives the conditional prediction at the price of any other; in a step whose own scale
            is 1 the unconditional half is not run (see ``guidance_interval``). For a scale per
            network, guide each before they are stitched, or give ``scales[plan.networks]``.
        channels: How many of the first channels are guided, the others staying conditional (the
            published DiT sampler guides 3 of 4); None guides all.
        rescale: How far, 0 to 1, the deviation of the guided v goes back to that of the
            conditional one, against over-exposure (Lin et al. 2024, arXiv:2305.08891, equations 14
            to 16, phi), over the guided channels. The paper's networks predict v; here v is formed
            of any target.

    Returns:
        A denoiser whose variance, if any, is the conditional one.

    Raises:
        ValueError: If ``rescale`` is outside [0, 1]; while tracing, if the condition has no null
            half, or scale or channels do not fit.
    """
    if not isinstance(rescale, jax.Array):
        rescale = check_number("rescale", rescale, low=0, high=1)
    none = not isinstance(rescale, jax.Array) and rescale == 0
    return Guided(
        as_pytree(denoiser), as_scale(scale), None if none else as_scale(rescale), channels
    )


@record
class Autoguided:
    """See ``autoguide``."""

    denoiser: Denoiser
    weak: Denoiser
    scale: Leaf
    channels: int | None = static(default=None)

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction:
        scale, by_step = _scale_here(self.scale, knot)

        def plain() -> Prediction:
            return self.denoiser(x, knot, cond)

        def guided() -> Prediction:
            chosen = _channels(self.channels, x)
            return _push(self.weak(x, knot, cond), plain(), scale, chosen)

        return choose(scale != 1, [plain, guided]) if by_step else guided()

    def prepare(
        self, shape: tuple[int, ...], cond: Condition, platform: str | None
    ) -> tuple[Denoiser, Condition]:
        (denoiser, weak), cond = prepare_each((self.denoiser, self.weak), shape, cond, platform)
        return Autoguided(denoiser, weak, self.scale, self.channels), cond


def autoguide(
    denoiser: Denoiser, weak: Denoiser, scale: ArrayLike, channels: int | None = None
) -> Autoguided:
    r"""Autoguidance (Karras et al. 2024, arXiv:2406.02507, equation 2): away from a weaker network.

    :math:`\hat x_0 = x_0^{weak} + s (x_0 - x_0^{weak})`, and the same of eps, for the same
    conditioning. In a stitched sampler the small network, loaded anyway, can be the weak one.

    Args:
        denoiser: The denoiser to guide.
        weak: A worse one of the same data.
        scale: As in ``cfg``; in a step whose own scale is 1 the weak one is not run.
        channels: As in ``cfg``.

    Returns:
        A denoiser whose variance, if any, is that of ``denoiser``.
    """
    return Autoguided(as_pytree(denoiser), as_pytree(weak), as_scale(scale), channels)


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
