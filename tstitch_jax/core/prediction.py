"""What a network's raw output means: every target is turned into x0 and eps here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tstitch_jax.core.checks import unknown
from tstitch_jax.core.types import Cond, Denoiser, Knots, Params, Prediction

TARGETS = ("eps", "x0", "v", "flow")

Apply = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
"""``(params, x [B, H, W, C], time [B], cond) -> raw output``, as a Flax module's ``apply``."""


def check_target(target: str) -> None:
    """Raises ValueError if ``target`` is none of ``TARGETS``."""
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)


def make_target(
    target: str,
    x0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
) -> Float[Array, "b h w c"]:
    """What a network of that target learns to say of ``x_t = alpha x0 + sigma eps``.

    ``v = alpha eps - sigma x0`` (Salimans & Ho 2022), ``flow = eps - x0`` (Liu et al. 2022).
    """
    check_target(target)
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[target]


def predict(
    target: str,
    output: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    alpha: Float[Array, "*b"],
    sigma: Float[Array, "*b"],
) -> Prediction:
    """Solves ``x = alpha x0 + sigma eps`` and the target's definition for ``x0`` and ``eps``.

    ``alpha`` and ``sigma`` are scalars, or broadcast against ``x``. An ``eps`` network needs
    ``alpha > 0`` and an ``x0`` network ``sigma > 0``; ``v`` and ``flow`` are well posed anywhere.
    """
    check_target(target)
    if target == "eps":
        return Prediction((x - sigma * output) / alpha, output)
    if target == "x0":
        return Prediction(output, (x - alpha * output) / sigma)
    if target == "v":
        norm = jnp.square(alpha) + jnp.square(sigma)
        return Prediction((alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm)
    return Prediction(
        (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    )


def as_denoiser(apply: Apply, target: str, learned_variance: bool = False) -> Denoiser:
    """Makes a denoiser of a network's ``apply``.

    Args:
        apply: ``(params, x, time, cond) -> output``, with ``time`` float32 ``[B]``.
        target: What the output is, one of ``"eps"``, ``"x0"``, ``"v"``, ``"flow"``.
        learned_variance: Whether the output has twice the channels, the second half placing the
            log-variance in [-1, 1] between its bounds (Nichol & Dhariwal 2021, equation 15).

    Raises:
        ValueError: If the target is unknown.
    """
    check_target(target)

    def denoiser(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        time = jnp.full(x.shape[:1], knot.time, jnp.float32)
        output = apply(params, x, time, cond).astype(jnp.float32)
        if not learned_variance:
            return predict(target, output, x, knot.alpha, knot.sigma)
        output, variance = jnp.split(output, 2, axis=-1)
        prediction = predict(target, output, x, knot.alpha, knot.sigma)
        return prediction._replace(variance=(variance + 1) / 2)

    return denoiser


def without_variance(denoiser: Denoiser) -> Denoiser:
    """The same denoiser with its learned variance left out, to stitch it with one that has none."""

    def plain(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        return denoiser(params, x, knot, cond)._replace(variance=None)

    return plain


def in_chunks(code: Callable[..., Any], size: int, *batches: Any) -> Any:
    """``code(*batches)``, at most ``size`` rows at a time, one piece after another.

    Takes and returns pytrees of arrays with a leading batch axis. On a batch that is spread over
    devices each piece would lie on one: map it over the devices first (``jax.shard_map``).
    """
    rows = len(jax.tree.leaves(batches)[0])
    if rows <= size:
        return code(*batches)
    chunks = -(-rows // size)
    size = -(-rows // chunks)  # equal pieces, as each size is a program

    def split(batch: jax.Array) -> jax.Array:
        batch = jnp.pad(batch, [(0, chunks * size - rows)] + [(0, 0)] * (batch.ndim - 1))
        return batch.reshape(chunks, size, *batch.shape[1:])

    pieces = jax.lax.map(lambda chunk: code(*chunk), jax.tree.map(split, batches))
    return jax.tree.map(lambda v: v.reshape(chunks * size, *v.shape[2:])[:rows], pieces)


def by_rows(denoiser: Denoiser, rows: int) -> Denoiser:
    """The same denoiser, asked on TPUs for at most so many rows at a time (``Network.rows``).

    Their fast memory holds the activations of so many; see ``in_chunks``. On other platforms
    pieces are not worth it.
    """

    def by_platform(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        def whole(x: jax.Array, cond: Cond) -> Prediction:
            return denoiser(params, x, knot, cond)

        def pieces(x: jax.Array, cond: Cond) -> Prediction:
            return in_chunks(whole, rows, x, cond)

        if len(x) <= rows:
            return whole(x, cond)
        return jax.lax.platform_dependent(x, cond, tpu=pieces, default=whole)

    return by_platform


def with_cond(denoiser: Denoiser, select: Callable[[Cond], Cond]) -> Denoiser:
    """The same denoiser, conditioned on ``select(cond)``: its own part of what several share.

    Denoisers that take different conditioning (labels of other classes, labels and text) are
    stitched with one ``cond`` that holds it all, such as a dict.
    """

    def selecting(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        return denoiser(params, x, knot, select(cond))

    return selecting


def at_equal_snr(denoiser: Denoiser, own: Knots) -> Denoiser:
    r"""The same denoiser in a trajectory of another forward process than it was trained on.

    Where :math:`\alpha / \sigma = \alpha' / \sigma'`, the states of the two processes are the same
    up to scale (Kingma et al. 2021, arXiv:2107.00630, section 5.1): the denoiser is asked at its
    own time and at :math:`x' = x \sqrt{(\alpha'^2 + \sigma'^2) / (\alpha^2 + \sigma^2)}`, and what
    it says of x0 and eps holds as it is. Where its process has no such ratio, it is asked at the
    nearest end (see ``match_snr``), and says what holds there.

    Args:
        denoiser: The denoiser.
        own: The trajectory's grid as the denoiser's process sees it, from ``match_snr``; its leaves
            may be traced.

    Raises:
        ValueError: While tracing, if the two grids differ in length.
    """

    def matched(params: Params, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        if own.steps != knot.steps:
            raise ValueError(f"the matched grid has {own.steps} steps, the knots {knot.steps}")
        time, alpha, sigma = (jnp.asarray(v)[knot.index] for v in (own.time, own.alpha, own.sigma))
        seen = dataclasses.replace(knot, time=time, alpha=alpha, sigma=sigma)
        scale = jnp.hypot(alpha, sigma) / jnp.hypot(knot.alpha, knot.sigma)
        return denoiser(params, x * scale, seen, cond)

    return matched
