"""Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import check_number
from tstitch_jax.core.solvers.common import cached, euler_step, no_state, root
from tstitch_jax.core.types import Denoise, Knots, Solver, State


def ddim(eta: float | np.floating | jax.Array = 0.0) -> Solver:
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
    if isinstance(eta, jax.Array):  # traced, most often
        return _ddim(eta)
    return _numbered(check_number("eta", eta, low=0, high=1))


def _ddim(eta: float | jax.Array) -> Solver:
    stochastic = isinstance(eta, jax.Array) or eta != 0

    def step(
        denoise: Denoise,
        x: jax.Array,
        state: State,
        knot: Knots,
        next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        prediction = denoise(x, knot)
        if not stochastic:
            return euler_step(prediction, next_knot), state
        assert noise is not None, "ddim with eta > 0 is stochastic"
        ratio = knot.alpha / next_knot.alpha
        share = jnp.square(ratio * next_knot.sigma / knot.sigma)  # of noise that stays, in [0, 1]
        std = eta * next_knot.sigma * root(1 - share)
        # sqrt(sigma_s^2 - std^2), as a sum of terms that cannot cancel below 0
        eps = next_knot.sigma * root((1 - eta**2) + eta**2 * share)
        return next_knot.alpha * prediction.x0 + eps * prediction.eps + std * noise, state

    return Solver(no_state, step, stochastic, name="ddim")


_numbered = cached(_ddim)
