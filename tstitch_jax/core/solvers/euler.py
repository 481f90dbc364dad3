"""Euler's method, deterministic and ancestral, for diffusion and for flows."""

from __future__ import annotations

import jax
import numpy as np

from tstitch_jax.core.solvers.ddim import ddim
from tstitch_jax.core.types import Solver


def euler() -> Solver:
    r"""Euler's method for the probability-flow ODE, order 1.

    In Karras' coordinates (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn),
    :math:`\tilde x = x / \alpha` and :math:`\tilde\sigma = \sigma / \alpha`, the slope is eps, and
    a step gives :math:`\tilde x_s = \hat x_0 + \tilde\sigma_s \hat\epsilon`. For a flow
    (:math:`\alpha = 1 - t`, :math:`\sigma = t`; Liu et al. 2022, arXiv:2209.03003) the slope is
    :math:`\hat\epsilon - \hat x_0`, and a step gives
    :math:`x_s = (1 - t_s) \hat x_0 + t_s \hat\epsilon`. Both are
    :math:`x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon`, which is DDIM; so this is ``ddim()``.
    """
    return ddim()


def euler_ancestral(eta: float | np.floating | jax.Array = 1.0) -> Solver:
    r"""Euler's method to a lower noise level, and noise back up to the next one.

    In Karras' coordinates (as in k-diffusion and diffusers' ``EulerAncestralDiscreteScheduler``):
    :math:`\sigma_{up} = \eta\,\tilde\sigma_s \sqrt{1 - \tilde\sigma_s^2 / \tilde\sigma_t^2}`,
    :math:`\sigma_{down}^2 = \tilde\sigma_s^2 - \sigma_{up}^2` and
    :math:`\tilde x_s = \hat x_0 + \sigma_{down} \hat\epsilon + \sigma_{up} z`. Multiplied by
    :math:`\alpha_s` that is DDIM with this eta; so this is ``ddim(eta)``, 1 by default.

    Raises:
        ValueError: As ``ddim``.
    """
    return ddim(eta)
