"""UniPC, a unified predictor-corrector (Zhao et al. 2023, arXiv:2302.04867)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.solvers.common import (
    combine,
    half_log_snr,
    order_here,
    parse_order,
    phi,
)
from tstitch_jax.core.types import Denoise, Knots, Solver, State, record, static


def _vandermonde(nodes: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    """Solves ``sum_j rho_j nodes_j^i = right_i``, i = 0, 1, ..., for up to three nodes."""
    if len(nodes) == 1:
        return [right[0]]
    if len(nodes) == 2:
        first = (right[1] - nodes[1] * right[0]) / (nodes[0] - nodes[1])
        return [first, right[0] - first]
    result = []
    for j, node in enumerate(nodes):
        a, b = (other for i, other in enumerate(nodes) if i != j)
        top = right[2] - (a + b) * right[1] + a * b * right[0]
        result.append(top / ((node - a) * (node - b)))
    return result


def _weights(order: int, lengths: tuple[jax.Array, ...], correct: bool) -> list[jax.Array]:
    """Weights of the values at a step's start, before it (and at its end), of a given order.

    Args:
        order: The order of the predictor or of the corrector.
        lengths: The step's h, then those of the steps before it.
        correct: Whether the value at the step's end is known: the last weight.
    """
    h = lengths[0]
    values = phi(h, order + 1)
    right = [math.factorial(k) * values[k] / values[0] for k in range(1, order + 1)]
    nodes = [-sum(lengths[1:j], jnp.zeros_like(h)) / h for j in range(2, order + 1)]
    if correct:
        rho = _vandermonde([*nodes, jnp.ones_like(h)], right)
        if order == 1:
            rho = [jnp.full_like(h, 0.5)]
    else:
        # A single difference gets a half (the paper's implementation, and diffusers').
        rho = [jnp.full_like(h, 0.5)] if order == 2 else _vandermonde(nodes, right) if nodes else []
    differences = [r / n for r, n in zip(rho, nodes, strict=False)]
    end = [rho[-1]] if correct else []
    weights = [1 - sum(differences + end, jnp.zeros_like(h)), *differences]
    weights += [jnp.zeros_like(h)] * (len(lengths) - len(weights))
    return [h * values[0] * w for w in weights + end]


@record
class UniPC(Solver):
    """See ``unipc``."""

    name = "unipc"
    order: int = static()

    def init(self, x: jax.Array) -> State:
        order, one = self.order, jnp.ones((), x.dtype)
        return (jnp.zeros_like(x),) * order, (one,) * order, x, one, jnp.ones((), jnp.int32)

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        order, (history, lengths, start, start_sigma, used) = self.order, state
        value = denoise(x, knot).x0

        # The step before this one, again, knowing the value at its end
        table = jnp.stack(
            [jnp.stack(_weights(p, lengths, correct=True)) for p in range(1, order + 1)]
        )
        push = combine(table[used - 1], (*history, value))
        corrected = knot.sigma / start_sigma * start + knot.alpha * push
        x = jnp.where(knot.index > 0, corrected, x)

        h = half_log_snr(next_knot) - half_log_snr(knot)
        history, lengths = (value, *history)[:order], (h, *lengths)[:order]
        here = order_here(order, knot, next_knot, short=order == 3)
        table = jnp.stack(
            [jnp.stack(_weights(p, lengths, correct=False)) for p in range(1, order + 1)]
        )
        push = combine(table[here - 1], history)
        ahead = next_knot.sigma / knot.sigma * x + next_knot.alpha * push
        return ahead, (history, lengths, x, knot.sigma, here)


def unipc(order: int | np.integer = 2) -> UniPC:
    r"""UniPC with :math:`B_2(h) = e^h - 1`, predicting x0: one evaluation a step.

    The evaluation at a step's start first corrects the state that the step before it predicted
    (UniC, equation 3 of the paper), then predicts on from there (UniP, equation 8), both from

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s h \varphi_1(-h)
            \left(\hat x_0 + \sum_m \rho_m \frac{D_m}{r_m}\right)

    with differences :math:`D_m` of predictions against the one at the step's start,
    :math:`r_m = (\lambda_m - \lambda_t) / h`. The order rises over the first steps and falls over
    the last ones, as in diffusers' ``UniPCMultistepScheduler``; the last state is predicted only.

    Args:
        order: p of the predictor, 1, 2 or 3. Corrected, the method converges with order 2, 3 and,
            as it starts with lower orders, 3.

    Raises:
        ValueError: If the order is none of these.
    """
    order = parse_order("unipc", order, (1, 2, 3))
    return UniPC(order)
