"""Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import check_number
from tstitch_jax.core.solvers.common import euler_step, root
from tstitch_jax.core.types import Denoise, Knots, Leaf, Solver, State, record


@record
class DDIM(Solver):
    """See ``ddim``; ``eta`` is None in the deterministic sampler."""

    name = "ddim"
    eta: Leaf | None = None

    @property
    def stochastic(self) -> bool:
        return self.eta is not None

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        prediction = denoise(x, knot)
        if self.eta is None:
            return euler_step(prediction, next_knot), state
        eta = self.eta
        ratio = knot.alpha / next_knot.alpha
        share = jnp.square(ratio * next_knot.sigma / knot.sigma)  # of noise that stays, in [0, 1]
        std = eta * next_knot.sigma * root(1 - share)
        # sqrt(sigma_s^2 - std^2), as a sum of terms that cannot cancel below 0
        eps = next_knot.sigma * root((1 - eta**2) + eta**2 * share)
        return next_knot.alpha * prediction.x0 + eps * prediction.eps + std * noise, state


def ddim(eta: float | np.floating | jax.Array = 0.0) -> DDIM:
    r"""DDIM, equation 12 of the paper, in the form that needs only alpha and sigma.

    .. math::
        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \nu^2}\,\hat\epsilon + \nu z, \quad
        \nu = \eta \frac{\sigma_s}{\sigma_t} \sqrt{\sigma_t^2 - (\alpha_t / \alpha_s)^2 \sigma_s^2}

    Args:
        eta: 0 for the deterministic sampler (order 1), 1 for DDPM's noise. A Python 0 makes a
            solver that takes no noise at all; a traced value always takes noise.

    Raises:
        ValueError: If eta is no number from 0 to 1; a JAX array is not looked at.
    """
    if not isinstance(eta, jax.Array):
        eta = check_number("eta", eta, low=0, high=1)
        if eta == 0:
            return DDIM()
        eta = np.float32(eta)
    return DDIM(eta)
