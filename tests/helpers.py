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
from tstitch_jax.core.denoisers import as_condition
from tstitch_jax.core.loop import draw_noise
from tstitch_jax.core.schedules import make_schedule
from tstitch_jax.core.types import Leaf, Prediction, record, static
from tstitch_jax.models.build import make_network, module_of
from tstitch_jax.models.cards import Card
from tstitch_jax.models.measure import init_params
from tstitch_jax.models.store import load, read_card, save
from tstitch_jax.models.types import Network
from tstitch_jax.sampling.program import SampleRequest
from tstitch_jax.sampling.sampler import make_sampler

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


def loop(denoiser, solver, knots, x, *, cond=None, keys=None, noise=None):
    """The oracle: the same solver and denoiser in a plain Python loop; x after each step."""

    @jax.jit
    def step(denoiser, solver, x, state, knot, after, step_noise):
        def denoise(x, at):
            return denoiser(x, dataclasses.replace(at, step=knot.index), as_condition(cond))

        return solver.step(denoise, x, state, knot, after, step_noise)

    state, trajectory = solver.init(x), []
    for i in range(knots.steps):
        knot, after = (jax.tree.map(lambda v, j=j: jnp.asarray(v[j]), knots) for j in (i, i + 1))
        step_noise = None
        if solver.stochastic:
            step_noise = draw_noise(keys, i + 1, x.shape[1:]) if noise is None else noise[i]
        x, state = step(denoiser, solver, x, state, knot, after, step_noise)
        trajectory.append(x)
    return jnp.stack(trajectory)


def relative(found, expected) -> float:
    """Largest difference over the largest magnitude expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@record
class Gaussian:
    """The exact denoiser of data that is Gaussian in each pixel.

    With ``variance``, it claims to have learned that one.
    """

    mean: Leaf
    std: float = static()
    variance: float | None = static(default=None)

    def __call__(self, x, knot, cond=None):
        total = jnp.square(knot.alpha * self.std) + jnp.square(knot.sigma)
        rest = x - knot.alpha * self.mean
        x0, eps = self.mean + knot.alpha * self.std**2 / total * rest, knot.sigma / total * rest
        learned = None if self.variance is None else jnp.full_like(x, self.variance)
        return Prediction(x0, eps, learned)


@record
class Mixture:
    """The exact denoiser of data near ``mean`` or ``-mean`` in each pixel, half and half."""

    mean: Leaf = 0.7
    std: float = static(default=0.25)

    def __call__(self, x, knot, cond=None):
        total = jnp.square(knot.alpha * self.std) + jnp.square(knot.sigma)
        center = self.mean * jnp.tanh(knot.alpha * self.mean * x / total)
        x0 = center + knot.alpha * self.std**2 / total * (x - knot.alpha * center)
        return Prediction(x0, knot.sigma / total * (x - knot.alpha * center))


@record
class Labelled:
    """A closed-form stand-in for a network: a ``Mixture`` around a value of each label.

    Its labels are shifts in tenths, and it claims to have learned a variance.
    """

    mean: Leaf
    std: float = static(default=0.25)

    def __call__(self, x, knot, cond):
        center = 0.1 * cond.given.astype(jnp.float32)[:, None, None, None]
        shifted = Mixture(self.mean, self.std)(x - knot.alpha * center, knot)
        return Prediction(shifted.x0 + center, shifted.eps, jnp.full_like(x, 0.5))


@record
class Correlated:
    """The exact denoiser of Gaussian data whose C channels are correlated; see ``correlated``."""

    mean: Leaf
    values: Leaf
    vectors: Leaf
    variance: float | None = static(default=None)

    def __call__(self, x, knot, cond=None):
        rest = (x - knot.alpha * self.mean) @ self.vectors
        total = jnp.square(knot.alpha) * self.values + jnp.square(knot.sigma)
        x0 = self.mean + (knot.alpha * self.values / total * rest) @ self.vectors.T
        eps = (knot.sigma / total * rest) @ self.vectors.T
        learned = None if self.variance is None else jnp.full_like(x, self.variance)
        return Prediction(x0, eps, learned)


def correlated(mean, cov, variance: float | None = None) -> Correlated:
    """The exact denoiser of Gaussian data whose channels have this mean and covariance."""
    values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
    return Correlated(
        jnp.asarray(mean), jnp.asarray(values, jnp.float32), jnp.asarray(vectors, jnp.float32),
        variance,
    )  # fmt: skip


def closed_network(mean: float, std: float = 0.25, **changes) -> Network:
    """A network whose denoiser is a closed form: it compiles in no time."""
    card = tiny_card(**changes)
    return Network(Labelled(jnp.float32(mean), std), card, make_schedule(**card.schedule))


OF_CALL = (
    "labels",
    "prompts",
    "cond",
    "negative",
    "size",
    "noise",
    "start",
    "strength",
    "decode",
    "keep",
)
"""Options of ``request_of`` that belong to one call."""


def request_of(key, networks, **options) -> SampleRequest:
    """The request of ``sample``'s options."""
    call = {name: options.pop(name) for name in OF_CALL if name in options}
    return make_sampler(networks, **options).request(key, **call)


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
