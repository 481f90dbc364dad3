"""Heun's method, for diffusion and for flows: two evaluations a step."""

from __future__ import annotations

import jax

from tstitch_jax.solvers.common import cached, no_state
from tstitch_jax.types import Denoise, Knots, Prediction, Solver, State


def _ahead(prediction: Prediction, knot: Knots) -> jax.Array:
    """Euler's step."""
    return knot.alpha * prediction.x0 + knot.sigma * prediction.eps


def _unless_clean(
    denoise: Denoise, first: Prediction, next_knot: Knots
) -> tuple[Prediction, jax.Array]:
    """The prediction at Euler's end of the step, and that end.

    In a step to clean data nothing is asked, as eps there is undefined, and the first one returned.
    """
    end = _ahead(first, next_knot)
    second = jax.lax.cond(next_knot.sigma > 0, lambda: denoise(end, next_knot), lambda: first)
    return second, end


@cached
def heun() -> Solver:
    r"""Heun's method in Karras' coordinates, order 2 (Karras et al. 2022, arXiv:2206.00364).

    Algorithm 1 without churn. With :math:`\tilde x = x / \alpha` and
    :math:`\tilde\sigma = \sigma / \alpha` the slope is eps; the mean of the slopes at both ends is
    taken: :math:`\tilde x_s = \tilde x_t + (\tilde\sigma_s - \tilde\sigma_t)
    (\hat\epsilon_t + \hat\epsilon_s) / 2`. A step to clean data is Euler's. The coordinates are
    infinite in pure noise: a grid that starts there (a flow's, a zero terminal SNR) takes
    ``flow_heun``.
    """

    def step(
        denoise: Denoise,
        x: jax.Array,
        state: State,
        knot: Knots,
        next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        first = denoise(x, knot)
        second, end = _unless_clean(denoise, first, next_knot)
        slope = next_knot.sigma - next_knot.alpha / knot.alpha * knot.sigma
        return end + slope * (second.eps - first.eps) / 2, state

    return Solver(no_state, step, stochastic=False, name="heun", needs_signal=True)


@cached
def flow_heun() -> Solver:
    r"""Heun's method in a flow's coordinates, order 2, for flows and any other schedule.

    With :math:`y = x / (\alpha + \sigma)` and :math:`\tau = \sigma / (\alpha + \sigma)`, every
    schedule is the flow :math:`y = (1 - \tau) x_0 + \tau \epsilon` of slope
    :math:`\epsilon - x_0`, finite also in pure noise. For a flow itself these are x and t (SiT,
    Ma et al. 2024, arXiv:2401.08740; diffusers' ``FlowMatchHeunDiscreteScheduler``). A step to
    clean data is Euler's.
    """

    def step(
        denoise: Denoise,
        x: jax.Array,
        state: State,
        knot: Knots,
        next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        first = denoise(x, knot)
        second, end = _unless_clean(denoise, first, next_knot)
        # (alpha_s + sigma_s) (tau_s - tau_t)
        slope = (knot.alpha * next_knot.sigma - next_knot.alpha * knot.sigma) / (
            knot.alpha + knot.sigma
        )
        change = (second.eps - second.x0) - (first.eps - first.x0)
        return end + slope * change / 2, state

    return Solver(no_state, step, stochastic=False, name="flow_heun")
