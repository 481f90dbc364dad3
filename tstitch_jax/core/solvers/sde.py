"""The stochastic sampler of SiT (Ma et al. 2024, arXiv:2401.08740)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import check_name, check_number
from tstitch_jax.core.solvers.common import root
from tstitch_jax.core.types import Denoise, Knots, Leaf, Solver, State, record, static

DIFFUSIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigma": lambda tau: tau,
    "constant": jnp.ones_like,
    "decreasing": lambda tau: jnp.square((1 - jnp.cos(jnp.pi * tau)) / 2),
    "increasing-decreasing": lambda tau: jnp.square(jnp.sin(jnp.pi * tau)),
}
"""Diffusion coefficients by the flow's time, 1 in noise and 0 in data (the paper's table 2)."""


@record
class SDE(Solver):
    """See ``sde``."""

    name = "sde"
    diffusion: str = static()
    scale: Leaf

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        assert noise is not None, "sde is stochastic"
        prediction = denoise(x, knot)
        total, next_total = knot.alpha + knot.sigma, next_knot.alpha + next_knot.sigma
        tau = knot.sigma / total
        length = tau - next_knot.sigma / next_total
        strength = jnp.where(next_knot.sigma > 0, self.scale * DIFFUSIONS[self.diffusion](tau), 0)
        drift = prediction.eps - prediction.x0 + strength / tau * prediction.eps
        y = x / total - length * drift + root(2 * strength * length) * noise
        return next_total * y, state


def sde(diffusion: str = "sigma", scale: float = 1.0) -> SDE:
    r"""Euler and Maruyama's method for the reverse SDE of a flow, on any schedule.

    In the coordinates of ``flow_heun``, over a step :math:`\Delta = \tau_t - \tau_s` and with the
    score :math:`-\hat\epsilon / \tau` (equation 5 of the paper, time running from noise to data):

    .. math::
        y_s = y_t
            - \Delta \left[(\hat\epsilon - \hat x_0) + \frac{D(\tau)}{\tau} \hat\epsilon\right]
            + \sqrt{2 D(\tau) \Delta}\, z

    Any D has the marginals of the ODE. A step to clean data is the ODE's (Euler's), whose end is
    :math:`\hat x_0`; the published program's default there is the SDE's mean, over a last step of
    0.04, which its ``last_step`` calls Mean.

    Args:
        diffusion: The form of D: ``"sigma"`` (:math:`\tau`, the published default), ``"constant"``,
            ``"decreasing"`` towards data or ``"increasing-decreasing"``.
        scale: What D is multiplied by; 0 gives the ODE.

    Raises:
        ValueError: If the form is unknown or the scale is negative.
    """
    check_name("diffusion", diffusion, DIFFUSIONS)
    return SDE(diffusion, np.float32(check_number("the scale of the diffusion", scale, low=0)))
