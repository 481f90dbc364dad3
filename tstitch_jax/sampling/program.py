"""The traced program: distinct networks and data in, images out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from tstitch_jax.core.denoisers import (
    Ready,
    at_equal_snr,
    by_rows,
    prepare,
    stitch,
    with_cond,
    without_variance,
)
from tstitch_jax.core.guidance import autoguide, cfg
from tstitch_jax.core.loop import Step, draw_noise, image_keys, iterate, run
from tstitch_jax.core.plan import Plan
from tstitch_jax.core.types import Condition, Denoiser, Key, Knots, Solver
from tstitch_jax.models import devices
from tstitch_jax.models.types import Coder


class Inputs(NamedTuple):
    """Everything that the program takes as data; changing it compiles nothing.

    Attributes:
        key: The key of all images.
        denoisers: One per network.
        plan: Which network takes each step.
        scales: Guidance scale of each network, a scalar or float32 ``[N]``; None without guidance.
        rescale: Rescaled guidance's phi, a scalar; None without it.
        weak_scale: Scale of autoguidance, a scalar or float32 ``[N]``; None without it.
        grids: For each network that was trained on another schedule than the trajectory's, the grid
            at equal signal-to-noise ratio; else None.
        knots: The sampling grid.
        solver: The numerical method.
        indices: int32 ``[B]``, the global number of each image, which selects its noise.
        cond: Its halves are tuples with one entry per network.
        noise: x_T, float32 ``[B, H, W, C]``, or None to draw it.
        start: Images or latents to start from, or None.
        coder: The autoencoder's coder, or None.
    """

    key: Key
    denoisers: tuple[Denoiser, ...]
    plan: Plan
    scales: tuple[Any, ...]
    rescale: Any
    weak_scale: Any
    grids: tuple[Knots | None, ...]
    knots: Knots
    solver: Solver
    indices: Any
    cond: Condition
    noise: Any
    start: Any
    coder: Coder | None


BY_IMAGE = ("indices", "cond", "noise", "start")
"""The inputs with a leading batch axis."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What the program is compiled for; a hashable value.

    Attributes:
        shape: ``(H, W, C)`` of the state.
        channels: Guided channels of each network; None for all.
        rows: Rows that each network takes at a time on a TPU; None for all.
        drop_variance: Whether learned variances are left out, since not all networks have one.
        output: ``"images"``, clipped; ``"pixels"``, uint8 with whether each image is finite; or
            ``"state"``, as the last step leaves it.
        mesh: Where the images are spread over devices; None for one device.
        platform: Where it runs, for what is computed before the loop; None for anywhere.
        keep: Which of ``"trajectory"`` and ``"predictions"`` are returned too.
    """

    shape: tuple[int, int, int]
    channels: tuple[int | None, ...]
    rows: tuple[int | None, ...]
    drop_variance: bool
    output: str
    mesh: Mesh | None
    platform: str | None
    keep: tuple[str, ...] = ()


def assemble(inputs: Inputs, config: Config) -> Denoiser:
    """The stitched, guided denoiser of the inputs' networks, each of which may have two places."""
    plain = []
    for denoiser, rows, grid in zip(inputs.denoisers, config.rows, inputs.grids, strict=True):
        denoiser = by_rows(denoiser, rows)
        if config.drop_variance:
            denoiser = without_variance(denoiser)
        plain.append(denoiser if grid is None else at_equal_snr(denoiser, grid))
    stages = []
    for k, (stage, scale, channels) in enumerate(
        zip(plain, inputs.scales, config.channels, strict=True)
    ):
        if scale is not None:
            stage = cfg(stage, scale, channels, 0 if inputs.rescale is None else inputs.rescale)
        stage = with_cond(stage, k)
        if k and inputs.weak_scale is not None:  # the first network guides the others
            weak = with_cond(plain[0], 0)
            stage = autoguide(stage, weak, inputs.weak_scale, channels)
        stages.append(stage)
    return stitch(stages, inputs.plan)


def prepared(inputs: Inputs, config: Config) -> Inputs:
    """The inputs with what does not depend on the step computed; see ``core.denoisers.prepare``."""
    denoisers, givens, nulls = [], list(inputs.cond.given), list(inputs.cond.null)
    for k, denoiser in enumerate(inputs.denoisers):
        guided = inputs.scales[k] is not None
        shape = (len(inputs.indices) * (2 if guided else 1), *config.shape)
        cond = Condition(givens[k], nulls[k])
        denoiser, (givens[k], nulls[k]) = prepare(denoiser, shape, cond, config.platform)
        denoisers.append(Ready(denoiser))
    cond = Condition(tuple(givens), tuple(nulls))
    return inputs._replace(denoisers=tuple(denoisers), cond=cond)


def initial_state(inputs: Inputs, config: Config) -> tuple[jax.Array, jax.Array]:
    """The keys of the images, and the state at the first knot."""
    keys, noise, start = image_keys(inputs.key, inputs.indices), inputs.noise, inputs.start
    if noise is None:
        noise = draw_noise(keys, 0, config.shape)
    if start is None:
        return keys, noise
    if inputs.coder is not None:
        start = inputs.coder.encode(start)
    alpha, sigma = (jnp.asarray(v)[0] for v in (inputs.knots.alpha, inputs.knots.sigma))
    return keys, alpha * start + sigma * noise


def to_pixels(x: Float[Array, "b h w c"]) -> tuple[UInt8[Array, "b h w c"], Bool[Array, " b"]]:
    """Images in [-1, 1] as rounded pixels, and whether each image is finite.

    Pixels cannot show that a value was not finite, and are a quarter of the bytes.
    """
    pixels = jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return pixels, jnp.isfinite(x).all(axis=(1, 2, 3))


def finish(x: jax.Array, coder: Coder | None, output: str) -> Any:
    """The output of the last state."""
    if coder is not None and output != "state":
        x = coder.decode(x)
    if output == "pixels":
        return to_pixels(x)
    return jnp.clip(x, -1, 1) if output == "images" else x


def sample_program(inputs: Inputs, config: Config) -> Any:
    """The output, and what ``keep`` names; on a mesh each device samples its own images."""
    if config.mesh is None:
        return _sample_here(inputs, config)
    own, everything = devices.OWN, devices.ALL
    specs = Inputs(*[everything] * len(inputs))._replace(**dict.fromkeys(BY_IMAGE, own))  # pyright: ignore
    out = (own, *[devices.OWN_IN_STEPS] * len(config.keep))
    here = functools.partial(_sample_here, config=config)
    return devices.each_device(here, config.mesh, (specs,), out)(inputs)


def _sample_here(inputs: Inputs, config: Config) -> Any:
    keys, x = initial_state(inputs, config)
    inputs = prepared(inputs, config)
    result = run(
        assemble(inputs, config),
        inputs.solver,
        inputs.knots,
        x,
        cond=inputs.cond,
        keys=keys,
        platform=config.platform,
        return_trajectory="trajectory" in config.keep,
        return_predictions="predictions" in config.keep,
    )
    x, *kept = result if isinstance(result, tuple) else (result,)
    return (finish(x, inputs.coder, config.output), *kept)


_compiled = jax.jit(sample_program, static_argnames="config")
_prepared = jax.jit(prepared, static_argnames="config")
_initial_state = jax.jit(initial_state, static_argnames="config")
_finish = jax.jit(finish, static_argnames="output")


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """A checked request: the data and the configuration of one run of the program.

    Attributes:
        inputs: The data; on a mesh, of as many images as its devices divide.
        config: What it is compiled for. Requests with equal ones share an executable.
        batch: How many images are returned.
    """

    inputs: Inputs
    config: Config
    batch: int

    @property
    def plan(self) -> Plan:
        """The plan of its steps."""
        return self.inputs.plan

    def run(self, callback: Callable[[Step], object] | None = None) -> tuple[Any, ...]:
        """Samples, compiling if no request with an equal configuration has run before.

        With a callback the same steps are taken one by one from the host, and it receives each.

        Returns:
            The output, and what ``config.keep`` names, each ``[N, B, H, W, C]``.
        """
        if callback is None:
            return self.trim(_compiled(self.inputs, config=self.config))
        config, batch = self.config, self.batch
        keys, x = _initial_state(self.inputs, config=config)
        inputs = _prepared(self.inputs, config=config)
        denoiser = assemble(inputs, config)
        steps = iterate(denoiser, inputs.solver, inputs.knots, x, cond=inputs.cond, keys=keys)
        kept = []
        for step in steps:
            x = step.x
            callback(Step(step.index, x[:batch], step.x0[:batch]))
            values = {"trajectory": x[:batch], "predictions": step.x0[:batch]}
            kept.append([values[name] for name in config.keep])
        output = _finish(x[:batch], inputs.coder, output=config.output)
        return (output, *map(jnp.stack, zip(*kept, strict=True)))

    def trim(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program's result without the images that fill up a mesh."""
        output, *kept = result
        if len(self.inputs.indices) == self.batch:
            return result
        output = jax.tree.map(lambda x: x[: self.batch], output)
        return (output, *(x[:, : self.batch] for x in kept))

    def replace(self, **changes: Any) -> SampleRequest:
        """The same request with other fields of its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def prepared(self) -> SampleRequest:
        """The same request with what precedes the loop already computed."""
        return dataclasses.replace(self, inputs=_prepared(self.inputs, config=self.config))

    def lower(self) -> jax.stages.Lowered:
        """The traced program; the networks' parameters may be shapes."""
        return _compiled.lower(self.inputs, config=self.config)

    def compile(self) -> Callable[[Inputs], tuple[Any, ...]]:
        """The executable, to be called with the ``inputs`` of this or a like request."""
        return self.lower().compile()

    @property
    def function(self) -> Callable[[Inputs], tuple[Any, ...]]:
        """The pure function of ``inputs`` that is compiled."""
        return functools.partial(sample_program, config=self.config)


def place(mesh: Mesh | None, value: Any, tree: Any) -> Any:
    """A pytree of arrays with a batch axis, spread over the mesh of ``tree``'s arrays."""
    if mesh is None or value is None:
        return value
    # Of networks that are shapes a program is compiled for devices that need not be here.
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))

    def one(leaf: Any) -> Any:
        leaf = devices.fill(mesh, np.asarray(leaf))
        if shapes:
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return devices.over_data(mesh, leaf)

    return jax.tree.map(one, value)
