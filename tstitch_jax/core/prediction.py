"""What a network's raw output means: every target is turned into x0 and eps here."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from tstitch_jax.core.checks import unknown
from tstitch_jax.core.types import Prediction

TARGETS = ("eps", "x0", "v", "flow")


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
