"""Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.solvers.common import combine, euler_step, karras_slope, second_evaluation
from tstitch_jax.core.types import Denoise, Knots, Solver, State, record

_ADAMS_BASHFORTH = np.array(
    [[12, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float32
) / np.array([[24], [24], [24], [24]], np.float32)
"""Weights of eps, newest first, by how many earlier ones there are; with none, half of it."""


@record
class PNDM(Solver):
    """See ``pndm``."""

    name = "pndm"

    def init(self, x: jax.Array) -> State:
        return (jnp.zeros_like(x),) * 3

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        first = denoise(x, knot)
        slope = karras_slope(knot, next_knot)

        def transfer(eps: jax.Array) -> jax.Array:
            # The formula above for x = alpha x0 + sigma eps, which rounding spoils less
            return euler_step(first, next_knot) + slope * (eps - first.eps)

        def at_the_end() -> jax.Array:
            return denoise(transfer(first.eps), next_knot).eps

        # In the first step the other half of the mean; where Euler's step is all there is, and in
        # a step to clean data, where eps is undefined, the one at its start.
        ask = (knot.index == 0) & (next_knot.sigma > 0) & (slope != 0)
        other = jax.lax.cond(ask, at_the_end, lambda: first.eps)
        values = (first.eps, *state)
        weights = jnp.asarray(_ADAMS_BASHFORTH, x.dtype)[jnp.minimum(knot.index, 3)]
        eps = combine(weights, values) + jnp.where(knot.index == 0, 0.5, 0) * other
        return transfer(eps), values[:3]

    def evaluations(self, knots: Knots) -> np.ndarray:
        return 1 + (second_evaluation(knots, karras=True) & (np.arange(knots.steps) == 0))


def pndm() -> PNDM:
    r"""PLMS: Adams and Bashforth's method on eps, in the transfer of DDIM.

    .. math::
        x_s = \frac{\alpha_s}{\alpha_t} x_t
            + \left(\sigma_s - \frac{\alpha_s}{\alpha_t} \sigma_t\right) e, \quad
        e = \tfrac{1}{24} (55 \epsilon_t - 59 \epsilon_{t-1} + 37 \epsilon_{t-2} - 9 \epsilon_{t-3})

    (equations 9 and 12 of the paper). The weights are those of equal steps, which are equal in time
    and not in the integrated variable, so that the order is 2. The start is that of Stable
    Diffusion and of diffusers' ``PNDMScheduler`` with ``skip_prk_steps``: not the paper's three
    Runge-Kutta steps, but in the first step the mean of eps at both ends (a second evaluation),
    then formulas of two and three values. A step in which alpha grows more than tenfold is Euler's
    (``karras_slope``).
    """
    return PNDM()
