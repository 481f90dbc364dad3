"""Losses of a diffusion network, for any target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tstitch_jax.core.checks import shown
from tstitch_jax.core.prediction import make_target, predict
from tstitch_jax.core.types import Key, Schedule


def weights(schedule: Schedule, target: str, min_snr: float | None) -> np.ndarray:
    """Weight of the squared error at each training time, float32 ``[T]``.

    Args:
        schedule: The forward process.
        target: What the network predicts.
        min_snr: None weighs all times alike; a number g weighs the error of x0 by ``min(snr, g)``
            (Hang et al. 2023, arXiv:2303.09556), carried over to the error of the target.
    """
    if min_snr is None:
        return np.ones(schedule.num_train_steps, np.float32)
    snr = np.square(schedule.alpha / schedule.sigma)
    # Squared error of the target over squared error of x0, at the same x_t.
    ratio = {
        "x0": np.ones_like(snr),
        "eps": snr,
        "v": np.square((np.square(schedule.alpha) + np.square(schedule.sigma)) / schedule.sigma),
        "flow": np.square((schedule.alpha + schedule.sigma) / schedule.sigma),
    }[target]
    # Without any signal eps says nothing of x0; the limit of its weight is 1.
    weight = np.minimum(snr, min_snr) / np.where(ratio > 0, ratio, 1)
    return np.where(ratio > 0, weight, 1).astype(np.float32)


def check_times(times: Any) -> None:
    """Raises ValueError unless ``times`` is two numbers, 0 <= low < high <= 1."""
    numbers = isinstance(times, tuple | list) and [type(v) for v in times]
    if not numbers or len(numbers) != 2 or not set(numbers) <= {int, float}:
        raise ValueError(f"times must be two numbers from 0 to 1, got {shown(times)}")
    if not 0 <= times[0] < times[1] <= 1:
        raise ValueError(f"times must be 0 <= low < high <= 1, got {times!r}")


def _log_cdf_difference(low: jax.Array, high: jax.Array) -> jax.Array:
    cdf = jax.scipy.stats.norm.cdf
    return jnp.log(jnp.maximum(cdf(high) - cdf(low), 1e-12))


def variational_bound(
    x0: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    predicted_x0: Float[Array, "b h w c"],
    variance: Float[Array, "b h w c"],
    alpha: Float[Array, "b 1 1 1"],
    sigma: Float[Array, "b 1 1 1"],
    alpha_before: Float[Array, "b 1 1 1"],
    sigma_before: Float[Array, "b 1 1 1"],
    log_variance_floor: float,
) -> Float[Array, " b"]:
    """Bits per dimension of a step's term of the bound (Ho et al. 2020, equation 5).

    The divergence of the network's Gaussian from the posterior; at the first training time, where
    ``sigma_before`` is 0, the likelihood of x0 in bins of 1/127.5. Gradients reach the variance
    only (Nichol & Dhariwal 2021, section 3.1).
    """
    ratio = alpha / alpha_before
    beta = jnp.square(sigma) - jnp.square(ratio * sigma_before)
    share = beta / jnp.square(sigma)
    low = jnp.maximum(
        jnp.log(jnp.maximum(share * jnp.square(sigma_before), 1e-30)), log_variance_floor
    )
    log_var = low + variance * (jnp.log(beta) - low)

    def mean(image: jax.Array) -> jax.Array:
        old = jnp.square(sigma_before / sigma) * ratio
        return alpha_before * share * image + old * x

    difference = mean(x0) - jax.lax.stop_gradient(mean(predicted_x0))
    divergence = 0.5 * (
        log_var - low + jnp.exp(low - log_var) - 1 + jnp.square(difference) * jnp.exp(-log_var)
    )
    std = jnp.exp(0.5 * log_var)
    centre = x0 - jax.lax.stop_gradient(mean(predicted_x0))
    bin_low = jnp.where(x0 < -0.999, -jnp.inf, (centre - 1 / 255) / std)
    bin_high = jnp.where(x0 > 0.999, jnp.inf, (centre + 1 / 255) / std)
    likelihood = -_log_cdf_difference(bin_low, bin_high)
    return jnp.where(sigma_before > 0, divergence, likelihood).mean((1, 2, 3)) / np.log(2)


def make_loss(
    apply: Callable[..., jax.Array],
    schedule: Schedule,
    target: str,
    *,
    learned_variance: bool,
    min_snr: float | None,
    label_dropout: float,
    null_label: int,
    times: tuple[float | int, float | int] = (0, 1),
) -> Callable[[Any, Key, Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, ""]]:
    """The training loss ``(params, key, images, labels) -> scalar``.

    Mean squared error of the target, weighted (see ``weights``), at times drawn uniformly from the
    part ``times`` of the schedule's; labels are replaced by ``null_label`` with probability
    ``label_dropout``. A learned variance adds the variational bound, times T / 1000 (Nichol &
    Dhariwal 2021, equation 16).
    """
    check_times(times)
    count = schedule.num_train_steps
    low, high = (round(share * count) for share in times)
    if low == high:
        raise ValueError(f"times {times} are none of the schedule's {count}")
    table = jnp.asarray(weights(schedule, target, min_snr))
    asked, alphas, sigmas = (
        jnp.asarray(values, jnp.float32)
        for values in (schedule.times, schedule.alpha, schedule.sigma)
    )
    # The posterior's variance at the first time is 0; the second's stands in for it, as published.
    ratio = schedule.alpha[1] / schedule.alpha[0]
    beta = schedule.sigma[1] ** 2 - (ratio * schedule.sigma[0]) ** 2
    floor = float(np.log(beta * (schedule.sigma[0] / schedule.sigma[1]) ** 2))

    def loss(
        params: Any, key: Key, images: Float[Array, "b h w c"], labels: Int[Array, " b"]
    ) -> Float[Array, ""]:
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        batch = images.shape[0]
        t = jax.random.randint(time_key, (batch,), low, high)
        # Drawn flat, as in draw_noise; the numbers are the same.
        eps = jax.random.normal(noise_key, (images.size,), jnp.float32).reshape(images.shape)
        dropped = jax.random.bernoulli(drop_key, label_dropout, (batch,))
        labels = jnp.where(dropped, null_label, labels)

        alpha, sigma = (values[t][:, None, None, None] for values in (alphas, sigmas))
        x = alpha * images + sigma * eps
        output = apply(params, x, asked[t], labels).astype(jnp.float32)
        variance = None
        if learned_variance:
            output, variance = jnp.split(output, 2, axis=-1)
        error = jnp.square(output - make_target(target, images, eps, alpha, sigma))
        total = (table[t] * error.mean((1, 2, 3))).mean()
        if variance is None:
            return total
        first = (t == 0)[:, None, None, None]
        before = jnp.maximum(t - 1, 0)
        bound = variational_bound(
            images,
            x,
            predict(target, output, x, alpha, sigma).x0,
            (variance + 1) / 2,
            alpha,
            sigma,
            jnp.where(first, 1.0, alphas[before][:, None, None, None]),
            jnp.where(first, 0.0, sigmas[before][:, None, None, None]),
            floor,
        )
        return total + count / 1000 * bound.mean()

    return loss
