"""Heun's method, for diffusion and for flows: two evaluations a step."""

from __future__ import annotations

import jax
import numpy as np

from tstitch_jax.core.solvers.common import euler_step, karras_slope, second_evaluation
from tstitch_jax.core.types import Denoise, Knots, Prediction, Solver, State, record


def _far_end(
    denoise: Denoise, first: Prediction, next_knot: Knots, slope: jax.Array
) -> tuple[Prediction, jax.Array]:
    """The prediction at Euler's end of the step, and that end.

    Where Euler's step is all there is, nothing is asked, and the first prediction returned: without
    a slope, and in a step to clean data, where eps is undefined.
    """
    end = euler_step(first, next_knot)
    ask = (next_knot.sigma > 0) & (slope != 0)
    return jax.lax.cond(ask, lambda: denoise(end, next_knot), lambda: first), end


@record
class Heun(Solver):
    """See ``heun``."""

    name = "heun"

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        first = denoise(x, knot)
        slope = karras_slope(knot, next_knot)
        second, end = _far_end(denoise, first, next_knot, slope)
        return end + slope * (second.eps - first.eps) / 2, state

    def evaluations(self, knots: Knots) -> np.ndarray:
        return 1 + second_evaluation(knots, karras=True)


def heun() -> Heun:
    r"""Heun's method in Karras' coordinates, order 2 (Karras et al. 2022, arXiv:2206.00364).

    Algorithm 1 without churn. With :math:`\tilde x = x / \alpha` and
    :math:`\tilde\sigma = \sigma / \alpha` the slope is eps; the mean of the slopes at both ends is
    taken: :math:`\tilde x_s = \tilde x_t + (\tilde\sigma_s - \tilde\sigma_t)
    (\hat\epsilon_t + \hat\epsilon_s) / 2`. A step to clean data is Euler's, and so is one in which
    alpha grows more than tenfold (``karras_slope``). The method wants many steps at high noise, as
    ``spacing="karras"`` gives them; with few, or for a flow, ``flow_heun`` is the better one.
    """
    return Heun()


@record
class FlowHeun(Solver):
    """See ``flow_heun``."""

    name = "flow_heun"

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        first = denoise(x, knot)
        # (alpha_s + sigma_s) (tau_s - tau_t)
        slope = (knot.alpha * next_knot.sigma - next_knot.alpha * knot.sigma) / (
            knot.alpha + knot.sigma
        )
        second, end = _far_end(denoise, first, next_knot, slope)
        change = (second.eps - second.x0) - (first.eps - first.x0)
        return end + slope * change / 2, state

    def evaluations(self, knots: Knots) -> np.ndarray:
        return 1 + second_evaluation(knots, karras=False)


def flow_heun() -> FlowHeun:
    r"""Heun's method in a flow's coordinates, order 2, for flows and any other schedule.

    With :math:`y = x / (\alpha + \sigma)` and :math:`\tau = \sigma / (\alpha + \sigma)`, every
    schedule is the flow :math:`y = (1 - \tau) x_0 + \tau \epsilon` of slope
    :math:`\epsilon - x_0`, finite also in pure noise. For a flow itself these are x and t (SiT,
    Ma et al. 2024, arXiv:2401.08740; diffusers' ``FlowMatchHeunDiscreteScheduler``). A step to
    clean data is Euler's.
    """
    return FlowHeun()
