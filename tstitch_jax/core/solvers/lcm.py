"""Sampling from latent consistency models (Luo et al. 2023, arXiv:2310.04378)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import check_number
from tstitch_jax.core.types import Denoise, Knots, Leaf, Solver, State, record


@record
class LCM(Solver):
    """See ``lcm``."""

    name = "lcm"
    needs_consistency = True
    sigma_data: Leaf
    time_scale: Leaf

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        scaled, data = self.time_scale * knot.time, self.sigma_data**2
        norm = jnp.square(scaled) + data
        skip, out = data / norm, scaled * jax.lax.rsqrt(norm)
        clean = skip * x + out * denoise(x, knot).x0
        return next_knot.alpha * clean + next_knot.sigma * noise, state


def lcm(sigma_data: float = 0.5, time_scale: float = 10.0) -> LCM:
    r"""Multistep consistency sampling: to clean data, and noise back up to the next point.

    .. math::
        x_s = \alpha_s f(x_t, t) + \sigma_s z, \quad
        f(x_t, t) = c_{skip}(t) x_t + c_{out}(t) \hat x_0, \quad
        c_{skip} = \frac{\sigma_d^2}{(kt)^2 + \sigma_d^2}, \quad
        c_{out} = \frac{kt}{\sqrt{(kt)^2 + \sigma_d^2}}

    (algorithm 3 and appendix of the paper; Song et al. 2023, arXiv:2303.01469, section 5.) Its
    network must have been distilled for this: the x0 of a plain denoiser is a blurred mean.

    Args:
        sigma_data: :math:`\sigma_d`.
        time_scale: k; t is the network's time, 0 to T-1.

    Raises:
        ValueError: If one of them is not a positive number.
    """
    return LCM(
        np.float32(check_number("sigma_data", sigma_data, low=1e-9)),
        np.float32(check_number("time_scale", time_scale, low=1e-9)),
    )
