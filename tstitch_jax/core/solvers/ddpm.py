"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal, arXiv:2102.09672)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tstitch_jax.core.checks import check_name
from tstitch_jax.core.solvers.common import root
from tstitch_jax.core.types import Denoise, Knots, Solver, State, record, static

VARIANCES = ("auto", "learned", "small", "large")


@record
class DDPM(Solver):
    """See ``ddpm``."""

    name = "ddpm"
    variance: str = static()

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        assert noise is not None, "ddpm is stochastic"
        prediction = denoise(x, knot)
        ratio = knot.alpha / next_knot.alpha
        old, new = jnp.square(knot.sigma), jnp.square(next_knot.sigma)
        beta = old - jnp.square(ratio) * new
        small, large = beta * new / old, beta

        use = self.variance
        if use == "auto":
            use = "small" if prediction.variance is None else "learned"
        if use == "learned":
            if prediction.variance is None:
                raise ValueError(
                    "ddpm with variance='learned' needs a network that learned its variance; "
                    "use variance='small' or 'large'"
                )
            # The bounds' logs are finite where noise is added; where it is not, any number will do.
            low, high = (jnp.log(jnp.maximum(v, 1e-30)) for v in (small, large))
            std = jnp.exp((low + prediction.variance * (high - low)) / 2)
        else:
            std = root(small if use == "small" else large)
        std = jnp.where(new > 0, std, 0.0)

        mean = next_knot.alpha * beta / old * prediction.x0 + ratio * new / old * x
        return mean + std * noise, state


def ddpm(variance: str = "auto") -> DDPM:
    r"""DDPM: draws from the Gaussian posterior of a step, equation 7 of Ho et al.

    With :math:`\beta = \sigma_t^2 - (\alpha_t/\alpha_s)^2 \sigma_s^2`, the variance that the
    forward process adds between the points s and t, and
    :math:`\tilde\beta = \beta \sigma_s^2 / \sigma_t^2`:

    .. math::
        x_s = \frac{\alpha_s \beta}{\sigma_t^2} \hat x_0
            + \frac{\alpha_t \sigma_s^2}{\alpha_s \sigma_t^2} x_t + \nu z

    Args:
        variance: What :math:`\nu^2` is. ``"small"`` is :math:`\tilde\beta`; ``"large"`` is
            :math:`\beta` (in the published variance-preserving form); ``"learned"`` lies between
            them in log space where the network says (Nichol & Dhariwal, equation 15); ``"auto"`` is
            ``"learned"`` where the denoiser has a variance and ``"small"`` where it has none. The
            last step adds no noise.

    Raises:
        ValueError: If the variance is unknown; in the step, if it is ``"learned"`` and the denoiser
            has none.
    """
    check_name("variance", variance, VARIANCES)
    return DDPM(variance)
