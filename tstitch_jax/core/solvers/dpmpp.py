"""DPM-Solver++ in its multistep and its stochastic form (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.solvers.common import (
    combine,
    half_log_snr,
    order_here,
    parse_order,
    phi,
    root,
)
from tstitch_jax.core.types import Denoise, Knots, Solver, State, record, static

_SHORT = 15
"""Trajectories of fewer steps lower the order over the last ones (as diffusers does)."""


@record
class DPMSolver(Solver):
    """See ``dpmpp``."""

    name = "dpmpp"
    order: int = static()
    exact: bool = static()

    def init(self, x: jax.Array) -> State:
        memory = self.order - 1
        return (jnp.zeros_like(x),) * memory, (jnp.ones((), x.dtype),) * memory

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        order, (history, lengths) = self.order, state
        h = half_log_snr(next_knot) - half_log_snr(knot)
        values = (denoise(x, knot).x0, *history)
        phi_1, phi_2, phi_3 = (h * p for p in phi(h, 3))
        phi_3 = phi_3 * (2 if self.exact else 1)
        none = jnp.zeros_like(h)
        weights = [[phi_1, none, none]]
        if order >= 2:
            half = phi_1 * h / lengths[0] / 2
            weights.append([phi_1 + half, -half, none])
        if order == 3:
            last, before = lengths
            share, both = last / (last + before), h / (last + before)
            first = (phi_2 * (1 + share) + phi_3 * both) * h / last
            second = (phi_2 * share + phi_3 * both) * h / before
            weights.append([phi_1 + first, -first - second, second])
        table = jnp.stack([jnp.stack(row[:order]) for row in weights])
        here = order_here(order, knot, next_knot, short=knot.steps < _SHORT)
        push = combine(table[here - 1], values)
        x = next_knot.sigma / knot.sigma * x + next_knot.alpha * push
        return x, (values[: order - 1], (h, *lengths)[: order - 1])


def dpmpp(order: int | np.integer = 2, exact: bool = False) -> DPMSolver:
    r"""DPM-Solver++, multistep: one evaluation a step (algorithm 2 of the paper, and its order 3).

    With :math:`\lambda = \log(\alpha / \sigma)`, steps :math:`h = \lambda_s - \lambda_t`, and
    divided differences :math:`D_0, D_1, D_2` of the predicted :math:`\hat x_0` in units of h:

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t
            + \alpha_s h \left(\varphi_1 D_0 + \varphi_2 D_1 + \varphi_3 D_2\right)

    with :math:`\varphi_k(-h)`. Order 2 takes :math:`\varphi_1 / 2` for :math:`\varphi_2`, as the
    paper does ("midpoint"). The first steps have the order that their history allows, the step to
    clean data has order 1, and below 15 steps the one before it at most 2, as in diffusers'
    ``DPMSolverMultistepScheduler``.

    In order 3 the authors' program, and diffusers and k-diffusion after it, take half of the second
    derivative that the Taylor expansion asks for; measured, it then converges with order 2. That
    is what is taken here unless it is to be ``exact``.

    Args:
        order: 1 (which is DDIM), 2 or 3.
        exact: Whether order 3 takes the whole second derivative, and so converges with order 3.
            With few steps neither form is better everywhere.

    Raises:
        ValueError: If the order is none of these, or is not 3 and is to be exact.
    """
    order = parse_order("dpmpp", order, (1, 2, 3))
    if exact and order != 3:
        raise ValueError(f"exact is a form of order 3, got order {order}")
    return DPMSolver(order, exact)


@record
class DPMSolverSDE(Solver):
    """See ``dpmpp_sde``."""

    name = "dpmpp_sde"
    order: int = static()

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, x: jax.Array) -> State:
        return (jnp.zeros_like(x), jnp.ones((), x.dtype)) if self.order == 2 else ()

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        h = half_log_snr(next_knot) - half_log_snr(knot)
        x0 = wanted = denoise(x, knot).x0
        if self.order == 2:
            before, length = state
            here = order_here(2, knot, next_knot, short=knot.steps < _SHORT)
            wanted = x0 + jnp.where(here == 2, h / length / 2, 0) * (x0 - before)
            state = (x0, h)
        fresh = -jnp.expm1(-2 * h)  # the share of the variance that is drawn anew
        x = next_knot.sigma / knot.sigma * jnp.exp(-h) * x + next_knot.alpha * fresh * wanted
        return x + next_knot.sigma * root(fresh) * noise, state


def dpmpp_sde(order: int | np.integer = 2) -> DPMSolverSDE:
    r"""SDE-DPM-Solver++, multistep, of order 1 or 2 (equations 17 and 18 of the paper's revision).

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-h} x_t
            + \alpha_s (1 - e^{-2h}) \left(D_0 + \tfrac12 D_1\right)
            + \sigma_s \sqrt{1 - e^{-2h}}\, z

    It integrates the diffusion SDE, whose marginals are those of the ODE. Steps as in ``dpmpp``.

    Args:
        order: 1 or 2; what is drawn has this order in the predictions, and 1 in the noise.

    Raises:
        ValueError: If the order is none of these.
    """
    order = parse_order("dpmpp_sde", order, (1, 2))
    return DPMSolverSDE(order)
