"""What several solvers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import is_whole, shown
from tstitch_jax.core.types import Knots, Prediction


def parse_order(name: str, order: int | np.integer, known: Sequence[int]) -> int:
    """The order of a method; raises ValueError unless it is one of ``known``."""
    if not is_whole(order) or order not in known:
        *most, last = known
        raise ValueError(
            f"{name} has order {', '.join(map(str, most))} or {last}, got {shown(order)}"
        )
    return int(order)


def root(value: jax.Array) -> jax.Array:
    """The square root of what is not negative, whose derivative at 0 is 0 instead of infinite."""
    positive = value > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, value, 1)), 0)


def half_log_snr(knot: Knots) -> jax.Array:
    r""":math:`\lambda = \log(\alpha / \sigma)`, kept finite where either is 0 (some 87 in float32).

    Steps from pure noise and steps to clean data are then very long instead of infinite; the
    formulas of the exponential integrators have the right limits.
    """
    tiny = jnp.finfo(jnp.result_type(knot.alpha)).tiny
    return jnp.log(jnp.maximum(knot.alpha, tiny)) - jnp.log(jnp.maximum(knot.sigma, tiny))


def karras_slope(knot: Knots, next_knot: Knots) -> jax.Array:
    r"""The length of a step in Karras' coordinates, times the new alpha.

    :math:`\alpha_s (\tilde\sigma_s - \tilde\sigma_t)` with :math:`\tilde\sigma = \sigma / \alpha`,
    which is infinite in pure noise; next to it, a mean of slopes amplifies whatever they differ in.
    Where alpha grows more than tenfold, as in a first step from the end of a cosine schedule or of
    a flow, this is 0, which leaves Euler's step.
    """
    ratio = next_knot.alpha / jnp.maximum(knot.alpha, next_knot.alpha / 10)
    slope = next_knot.sigma - ratio * knot.sigma
    return jnp.where(next_knot.alpha > 10 * knot.alpha, 0, slope)


def second_evaluation(knots: Knots, karras: bool) -> np.ndarray:
    """Which steps of a method of two evaluations take the second one, bool ``[N]``.

    A step to clean data does not; nor, with ``karras``, one that ``karras_slope`` makes Euler's.
    """
    alpha, sigma = np.asarray(knots.alpha), np.asarray(knots.sigma)
    taken = sigma[1:] > 0
    return taken & (alpha[1:] <= 10 * alpha[:-1]) if karras else taken


def euler_step(prediction: Prediction, knot: Knots) -> jax.Array:
    """Euler's step to a point, in whatever coordinates (see ``euler``)."""
    return knot.alpha * prediction.x0 + knot.sigma * prediction.eps


def phi(h: jax.Array, count: int) -> list[jax.Array]:
    r""":math:`\varphi_1(-h)` to :math:`\varphi_{count}(-h)`, the parts of exponential integrators.

    :math:`\varphi_k(z) = \sum_j z^j / (j + k)!`, so :math:`\varphi_1(z) = (e^z - 1) / z` and
    :math:`\varphi_{k+1}(z) = (\varphi_k(z) - 1 / k!) / z` (Hochbruck & Ostermann 2010). That
    recursion cancels for small steps, where the series is taken.
    """
    small = jnp.minimum(h, 1.0)
    large = jnp.maximum(h, 1.0)
    direct = -jnp.expm1(-large) / large
    values = []
    for k in range(1, count + 1):
        series = sum((-small) ** j * (1 / math.factorial(j + k)) for j in range(16))
        values.append(jnp.where(h < 1, series, direct))
        direct = (1 / math.factorial(k) - direct) / large
    return values


def order_here(order: int, knot: Knots, next_knot: Knots, short: bool) -> jax.Array:
    """The order of a multistep method in one step: what history allows, 1 in a step to clean data.

    The last step lasts forever on the scale of the methods, which only its first order takes.

    Args:
        order: The method's.
        knot: Where the step starts; the step's number says how much history there is.
        next_knot: Where it ends.
        short: Whether the order is at most 2 in the step before the last, too.
    """
    here = jnp.minimum(knot.index + 1, order)
    if short:
        here = jnp.minimum(here, jnp.maximum(knot.steps - knot.index, 2))
    return jnp.where(next_knot.sigma > 0, here, 1)


def combine(weights: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """The sum of ``values`` with scalar ``weights``."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), jnp.zeros_like(values[0]))
