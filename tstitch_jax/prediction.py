"""What a network's raw output means: every target is turned into x0 and eps here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tstitch_jax.schedules import unknown
from tstitch_jax.types import Cond, Denoiser, Knots, Params, Prediction

TARGETS = ("eps", "x0", "v", "flow")

Apply = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
"""``(params, x [B, H, W, C], time [B], cond) -> raw output``, as a Flax module's ``apply``."""


def check_target(target: str) -> None:
    """Raises ValueError if ``target`` is none of ``TARGETS``."""
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)


def make_target(
    target: str,
    x0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
) -> Float[Array, "b h w c"]:
    """What a network of that target learns to say of ``x_t = alpha x0 + sigma eps``.

    ``v = alpha eps - sigma x0`` (Salimans & Ho 2022), ``flow = eps - x0`` (Liu et al. 2022).
    """
    check_target(target)
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[target]


def predict(
    target: str,
    output: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
) -> Prediction:
    """Solves ``x = alpha x0 + sigma eps`` and the target's definition for ``x0`` and ``eps``.

    ``alpha`` and ``sigma`` are scalars, or broadcast against ``x``. An ``eps`` network needs
    ``alpha > 0`` and an ``x0`` network ``sigma > 0``; ``v`` and ``flow`` are well posed anywhere.
    """
    check_target(target)
    if target == "eps":
        return Prediction((x - sigma * output) / alpha, output)
    if target == "x0":
        return Prediction(output, (x - alpha * output) / sigma)
    if target == "v":
        norm = jnp.square(alpha) + jnp.square(sigma)
        return Prediction((alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm)
    return Prediction(
        (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    )


def as_denoiser(apply: Apply, target: str, learned_variance: bool = False) -> Denoiser:
    """Makes a denoiser of a network's ``apply``.

    Args:
        apply: ``(params, x, time, cond) -> output``, with ``time`` float32 ``[B]``.
        target: What the output is, one of ``"eps"``, ``"x0"``, ``"v"``, ``"flow"``.
        learned_variance: Whether the output has twice the channels, the second half placing the
            log-variance in [-1, 1] between its bounds (Nichol & Dhariwal 2021, equation 15).

    Raises:
        ValueError: If the target is unknown.
    """
    check_target(target)

    def denoiser(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        time = jnp.full(x.shape[:1], knot.time, jnp.float32)
        output = apply(params, x, time, cond).astype(jnp.float32)
        if not learned_variance:
            return predict(target, output, x, knot.alpha, knot.sigma)
        output, variance = jnp.split(output, 2, axis=-1)
        prediction = predict(target, output, x, knot.alpha, knot.sigma)
        return prediction._replace(variance=(variance + 1) / 2)

    return denoiser


def without_variance(denoiser: Denoiser) -> Denoiser:
    """The same denoiser with its learned variance left out, to stitch it with one that has none."""

    def plain(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        return denoiser(params, x, knot, cond)._replace(variance=None)

    return plain
