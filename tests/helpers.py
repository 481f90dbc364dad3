"""Small networks, closed-form denoisers, and the plain-loop oracle that tests share."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import convert
from tstitch_jax.core.loop import draw_noise
from tstitch_jax.core.schedules import make_schedule
from tstitch_jax.core.types import Prediction
from tstitch_jax.models.build import make_network, module_of
from tstitch_jax.models.cards import Card
from tstitch_jax.models.families import init_params
from tstitch_jax.models.store import load, read_card, save
from tstitch_jax.models.types import Network

GOLDEN = Path(__file__).parent / "golden"


def tiny_card(name="tiny", width=32, depth=1, num_heads=2, **changes) -> Card:
    """A card of the published layout, small enough for a CPU to run many times."""
    card = Card(
        name=name,
        architecture="dit",
        config={"width": width, "depth": depth, "num_heads": num_heads, "patch": 2},
        target="eps",
        learned_variance=True,
        schedule={"name": "linear"},
        image_shape=(8, 8, 4),
        num_classes=10,
        guidance_channels=3,
    )
    return dataclasses.replace(card, **changes)


def random_params(card: Card, seed: int = 0):
    """Parameters without the zeros of a fresh network, so that every path matters."""
    shapes = jax.eval_shape(lambda k: init_params(module_of(card), k), jax.random.key(0))
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.asarray(0.05 * generator.standard_normal(s.shape), np.float32), shapes
    )


def tiny_network(seed: int = 0, **changes) -> Network:
    card = tiny_card(**changes)
    return make_network(card, random_params(card, seed))


PUBLISHED_HEADS = {"small": 2, "base": 3, "large": 4}


@functools.cache
def published_network(name: str) -> Network:
    """One of the published program's tiny networks, converted: a name of ``PUBLISHED_HEADS``."""
    with tempfile.TemporaryDirectory() as folder:
        source = GOLDEN / "tstitch_tiny" / f"{name}.pt"
        convert(source, f"{folder}/{name}", num_heads=PUBLISHED_HEADS[name])
        return load(f"{folder}/{name}")


def loop(denoiser, solver, knots, x, *, params, cond=None, keys=None, noise=None):
    """The oracle: the same solver and denoiser in a plain Python loop; x after each step."""

    @jax.jit
    def step(x, state, knot, after, step_noise):
        def denoise(x, asked):
            return denoiser(params, x, dataclasses.replace(asked, step=knot.index), cond)

        return solver.step(denoise, x, state, knot, after, step_noise)

    state, trajectory = solver.init(x), []
    for i in range(knots.steps):
        knot, after = (jax.tree.map(lambda v, j=j: jnp.asarray(v[j]), knots) for j in (i, i + 1))
        step_noise = None
        if solver.stochastic:
            step_noise = draw_noise(keys, i + 1, x.shape[1:]) if noise is None else noise[i]
        x, state = step(x, state, knot, after, step_noise)
        trajectory.append(x)
    return jnp.stack(trajectory)


def relative(found, expected) -> float:
    """Largest difference over the largest magnitude expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gaussian_denoiser(mean: float, std: float, variance: float | None = None):
    """The exact denoiser of data that is Gaussian in each pixel; its params scale the mean.

    With ``variance``, it claims to have learned that one.
    """

    def denoiser(params, x, knot, cond, /):
        total = jnp.square(knot.alpha * std) + jnp.square(knot.sigma)
        centre = mean * params
        x0 = centre + knot.alpha * std**2 / total * (x - knot.alpha * centre)
        eps = knot.sigma / total * (x - knot.alpha * centre)
        return Prediction(x0, eps, None if variance is None else jnp.full_like(x, variance))

    return denoiser


def mixture_denoiser(mean: float = 0.7, std: float = 0.25):
    """The exact denoiser of data near ``mean`` or ``-mean`` in each pixel, half and half."""

    def denoiser(params, x, knot, cond, /):
        total = jnp.square(knot.alpha * std) + jnp.square(knot.sigma)
        centre = mean * jnp.tanh(knot.alpha * mean * x / total)
        x0 = centre + knot.alpha * std**2 / total * (x - knot.alpha * centre)
        return Prediction(x0, knot.sigma / total * (x - knot.alpha * centre))

    return denoiser


def correlated_denoiser(mean, cov, variance: float | None = None):
    """The exact denoiser of Gaussian data whose C channels have this mean and covariance."""
    values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
    values, vectors = jnp.asarray(values, jnp.float32), jnp.asarray(vectors, jnp.float32)

    def denoiser(params, x, knot, cond, /):
        rest = (x - knot.alpha * mean) @ vectors
        total = jnp.square(knot.alpha) * values + jnp.square(knot.sigma)
        x0 = mean + (knot.alpha * values / total * rest) @ vectors.T
        eps = (knot.sigma / total * rest) @ vectors.T
        return Prediction(x0, eps, None if variance is None else jnp.full_like(x, variance))

    return denoiser


@functools.cache
def labelled(std: float = 0.25):
    """A closed-form stand-in for a network: ``mixture_denoiser`` around a value of each label.

    Its params are the mixture's mean, its labels are shifts in tenths, and it claims a variance.
    """

    def denoiser(params, x, knot, cond, /):
        centre = 0.1 * cond.astype(jnp.float32)[:, None, None, None]
        shifted = mixture_denoiser(params, std)(None, x - knot.alpha * centre, knot, None)
        return Prediction(shifted.x0 + centre, shifted.eps, jnp.full_like(x, 0.5))

    return denoiser


labelled_denoiser = labelled()


def closed_network(mean: float, std: float = 0.25, **changes) -> Network:
    """A network whose denoiser is a closed form: it compiles in no time."""
    card = tiny_card(**changes)
    return Network(labelled(std), jnp.float32(mean), card, make_schedule(**card.schedule))


def write_text_pair(root: Path) -> dict[str, str]:
    """Folders of a pair that is conditioned on texts, and of the goldens' text encoder, by name."""
    convert(GOLDEN / "clip_tiny" / "text_encoder", root / "words")
    width = read_card(root / "words").config["width"]
    for seed, name in enumerate(("a", "b")):
        card = Card(
            name=name, architecture="unet", target="eps", learned_variance=False,
            config={"widths": [4, 8], "layers": 1, "heads": [0, 2], "middle_heads": 0, "groups": 4},
            schedule={"name": "scaled_linear"}, image_shape=(16, 16, 3), num_classes=0,
            context=(77, width), text_encoder=str(root / "words"),
        )  # fmt: skip
        save(root / name, make_network(card, random_params(card, seed)))
    return {path.name: str(path) for path in root.iterdir()}
