"""The short way: networks and labels or texts in, images out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from tstitch_jax.core.checks import check_number, is_list, shown
from tstitch_jax.core.grids import last_steps, make_knots, match_snr
from tstitch_jax.core.guidance import autoguide, cfg, guidance_interval
from tstitch_jax.core.loop import Step, draw_noise, image_keys, iterate, run
from tstitch_jax.core.plan import Plan, check_fractions
from tstitch_jax.core.prediction import at_equal_snr, by_rows, with_cond, without_variance
from tstitch_jax.core.solvers import make_solver
from tstitch_jax.core.stitch import if_used, stitch
from tstitch_jax.core.types import Cond, Denoiser, Key, Knots, Params, Prediction, Solver
from tstitch_jax.models import devices
from tstitch_jax.models.types import Autoencoder, Network, Precomputed
from tstitch_jax.sampling.checks import (
    check_autoencoder,
    check_images,
    check_key,
    check_networks,
    check_scales,
    check_size,
    check_start,
)
from tstitch_jax.sampling.conditioning import Condition, make_conditions


class Given(NamedTuple):
    """All data of a stitched, guided denoiser: the parameters of what ``_assemble`` makes.

    Attributes:
        params: Of each network.
        plan: Which one takes each step.
        scales: Of each network's guidance, a scalar or float32 ``[N]``; None for no guidance.
        auto_scale: Of autoguidance by the first network, a scalar or float32 ``[N]``; or None.
        seen: The grid at equal signal-to-noise ratio of each network that was trained on another
            schedule than the trajectory's; else None.
    """

    params: tuple[Params, ...]
    plan: Plan
    scales: tuple[Any, ...]
    auto_scale: Any
    seen: tuple[Knots | None, ...]


@functools.cache
def _assemble(
    denoisers: tuple[Denoiser, ...],
    channels: tuple[int | None, ...],
    rescale: float,
) -> Denoiser:
    """One denoiser, a function of ``Given``, with a ``Condition`` for each network."""

    def given_of(k: int) -> Callable[[Cond], Cond]:
        return lambda cond: cond[k].given

    def denoiser(given: Given, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        plain = [
            each if seen is None else at_equal_snr(each, seen)
            for each, seen in zip(denoisers, given.seen, strict=True)
        ]
        weak = with_cond(plain[0], given_of(0))
        stages, params = [], []
        for k, (stage, own) in enumerate(zip(plain, given.params, strict=True)):
            if given.scales[k] is not None:
                stage = cfg(stage, given.scales[k], cond[k].null, channels[k], rescale)
            stage = with_cond(stage, given_of(k))
            if k and given.auto_scale is not None:
                stage = autoguide(stage, weak, given.auto_scale, channels[k])
                own = own, given.params[0]
            stages.append(stage)
            params.append(own)
        return stitch(stages, given.plan)(params, x, knot, cond)

    return denoiser


class Inputs(NamedTuple):
    """The compiled function's traced arguments.

    Attributes:
        key: The key of all images.
        given: The denoiser's parameters.
        knots: The sampling grid.
        indices: int32 ``[B]``, the number of each image, by which its noise is drawn.
        conditions: What each network is conditioned on.
        eta, noise, start: As ``sample`` takes them, or None.
        coder_params: The autoencoder's parameters, or None.
    """

    key: Key
    given: Given
    knots: Knots
    indices: Any
    conditions: tuple[Condition, ...]
    eta: Any
    noise: Any
    start: Any
    coder_params: Any


@functools.partial(jax.jit, static_argnames=("shape", "encoder"))
def begin(inputs, *, shape, encoder):
    """The keys of the images, and the state at the first point."""
    keys, noise, start = image_keys(inputs.key, inputs.indices), inputs.noise, inputs.start
    if noise is None:
        noise = draw_noise(keys, 0, shape)
    if start is None:
        return keys, noise
    if encoder is not None:
        start = encoder(inputs.coder_params, start)
    alpha, sigma = (jnp.asarray(v)[0] for v in (inputs.knots.alpha, inputs.knots.sigma))
    return keys, alpha * start + sigma * noise


@functools.partial(jax.jit, static_argnames=("decoder", "finish"))
def _finish(x, coder_params, *, decoder, finish):
    """Images out of the last state."""
    if decoder is not None:
        x = decoder(coder_params, x)
    return x if finish is None else finish(x)


def to_images(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Clipped to [-1, 1]."""
    return jnp.clip(x, -1, 1)


def to_pixels(x: Float[Array, "b h w c"]) -> tuple[UInt8[Array, "b h w c"], Bool[Array, " b"]]:
    """Images in [-1, 1] as pixels, rounded, so that little has to leave the device.

    And of each image whether it is finite, which pixels cannot say.
    """
    pixels = jnp.round((to_images(x) + 1) * 127.5).astype(jnp.uint8)
    return pixels, jnp.isfinite(x).all(axis=(1, 2, 3))


def draw(inputs, *, mesh, **static):
    """Keys, labels and parameters to images. On a mesh each device does its own images alone."""
    if mesh is None:
        return _draw_here(inputs, **static)
    own, everything = devices.OWN, devices.ALL
    specs: Any = [everything] * len(inputs)
    specs = Inputs(*specs)._replace(
        **dict.fromkeys(("indices", "conditions", "noise", "start"), own)
    )
    kept = sum(static[name] for name in ("return_trajectory", "return_predictions"))
    out = (own, *[devices.OWN_IN_STEPS] * kept) if kept else own
    function = functools.partial(_draw_here, **static)
    return devices.each_device(function, mesh, (specs,), out)(inputs)


@functools.partial(jax.jit, static_argnames=("precompute", "shape"))
def _precomputed(given, conditions, *, precompute, shape):
    """The denoiser's parameters, with what every step would compute of them alone."""

    def own(k: int) -> Params:
        params, function = given.params[k], precompute[k]
        if function is None:
            return params
        cond = conditions[k].given
        rows = len(cond) * (1 if given.scales[k] is None else 2)
        shapes = [
            jax.ShapeDtypeStruct((rows, *of), dtype)
            for of, dtype in ((shape, jnp.float32), (cond.shape[1:], cond.dtype))
        ]

        def make(params: Params) -> Any:
            return function(params, *shapes)

        if not jax.tree.leaves(jax.eval_shape(make, params)):
            return params
        if k == 0 and given.auto_scale is not None:  # which guides the others' steps
            return Precomputed(params, make(params))
        return Precomputed(params, if_used(given.plan, k, make, params))

    return given._replace(params=tuple(map(own, range(len(precompute)))))


def _draw_here(
    inputs, *, denoiser, solver, precompute, shape, encoder, decoder, finish, return_trajectory,
    return_predictions,
):  # fmt: skip
    keys, x = begin(inputs, shape=shape, encoder=encoder)
    result = run(
        denoiser,
        _solver(solver, inputs.eta),
        inputs.knots,
        x,
        params=_precomputed(inputs.given, inputs.conditions, precompute=precompute, shape=shape),
        cond=inputs.conditions,
        keys=keys,
        return_trajectory=return_trajectory,
        return_predictions=return_predictions,
    )
    x, *kept = result if isinstance(result, tuple) else (result,)
    x = _finish(x, inputs.coder_params, decoder=decoder, finish=finish)
    return (x, *kept) if kept else x


_sample = jax.jit(
    draw,
    static_argnames=(
        "denoiser", "solver", "precompute", "shape", "encoder", "decoder", "finish", "mesh",
        "return_trajectory", "return_predictions",
    ),
)  # fmt: skip


def _solver(solver: str | Solver, eta: Any) -> Solver:
    return solver if isinstance(solver, Solver) else make_solver(solver, eta=eta)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A checked request: the one compiled function's traced and static arguments.

    Requests that differ in key, labels, texts, plan, scales, guidance interval, eta, noise or start
    share an executable.

    Attributes:
        inputs: The traced ones; on a mesh, of as many images as its devices divide.
        static: The others.
        batch: How many images were asked for.
    """

    inputs: Inputs
    static: dict[str, Any]
    batch: int

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.inputs.given.plan

    def run(self, callback: Callable[[Step], object] | None = None) -> Any:
        """Samples, compiling where nothing alike has run before.

        With a callback the same steps are taken one by one from the host, and it sees each.
        """
        inputs, static = self.inputs, self.static

        def wanted(x: jax.Array) -> jax.Array:
            """Without what fills a mesh."""
            return x if len(x) == self.batch else x[: self.batch]

        if callback is None:
            result = _sample(inputs, **static)
            if isinstance(result, tuple):
                return wanted(result[0]), *(jax.vmap(wanted)(kept) for kept in result[1:])
            return wanted(result)
        inputs = self.precomputed().inputs
        chosen = {name: static[name] for name in ("shape", "encoder")}
        keys, x = begin(inputs, **chosen)
        solver = _solver(static["solver"], None if inputs.eta is None else float(inputs.eta))
        steps = iterate(
            static["denoiser"], solver, inputs.knots, x,
            params=inputs.given, cond=inputs.conditions, keys=keys,
        )  # fmt: skip
        kept = []
        for step in steps:
            x = step.x
            step = Step(step.index, wanted(step.x), wanted(step.x0))
            callback(step)
            asked = ((step.x, "return_trajectory"), (step.x0, "return_predictions"))
            kept.append([value for value, name in asked if static[name]])
        chosen = {name: static[name] for name in ("decoder", "finish")}
        x = wanted(_finish(x, inputs.coder_params, **chosen))
        return (x, *map(jnp.stack, zip(*kept, strict=True))) if kept[0] else x

    def precomputed(self) -> Sampling:
        """The same, with what is computed before the loop in the inputs."""
        inputs, precompute = self.inputs, self.static["precompute"]
        if not any(precompute):
            return self
        given = _precomputed(
            inputs.given, inputs.conditions, precompute=precompute, shape=self.static["shape"]
        )
        static = self.static | {"precompute": (None,) * len(precompute)}
        return dataclasses.replace(self, inputs=inputs._replace(given=given), static=static)

    def compile(self) -> Callable[..., Any]:
        """The executable, to be called with the ``inputs`` of this or a like request."""
        return self.lower().compile()

    def lower(self) -> jax.stages.Lowered:
        """The traced program; the networks' parameters may be shapes."""
        return _sample.lower(self.inputs, **self.static)

    @property
    def function(self) -> Callable[[Inputs], Any]:
        """The pure function of ``inputs`` that is compiled."""
        return functools.partial(draw, **self.static)


def _place(mesh: Mesh | None, value: Any, params: Params) -> Any:
    """What is given by image, on the mesh of the parameters."""
    if mesh is None or value is None:
        return value
    value = devices.fill(mesh, np.asarray(value))
    # Of networks that are shapes a program is compiled for devices that need not be here.
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        value = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return devices.over_data(mesh, value)


def _on_cpu(params: Params) -> bool:
    return all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, Tracer)
        and all(device.platform == "cpu" for device in leaf.devices())
        for leaf in jax.tree.leaves(params)
    )


def prepare(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Any = None,
    context: Any = None,
    prompts: Any = None,
    negative: Any = None,
    text_encoder: Any = None,
    size: Any = None,
    fractions: Sequence[float] | np.ndarray | None = None,
    plan: Plan | None = None,
    steps: int | str | Sequence[float | int] | np.ndarray = 50,
    spacing: str = "respaced",
    solver: str | Solver = "ddim",
    eta: float | None = None,
    cfg_scale: Any = 1.5,
    cfg_channels: int | None = None,
    cfg_rescale: float = 0.0,
    cfg_interval: Sequence[float | int] | None = None,
    auto_scale: float | None = None,
    noise: Float[Array | np.ndarray, "b h w c"] | None = None,
    start: Float[Array | np.ndarray, "b h2 w2 c2"] | None = None,
    strength: float | None = None,
    autoencoder: Autoencoder | None = None,
    decode: bool = True,
    return_trajectory: bool = False,
    return_predictions: bool = False,
) -> Sampling:
    """Checks all that ``sample`` takes, before the sampler is compiled; raises as it does."""
    check_networks(networks)
    check_key(key)
    cards = [network.card for network in networks]
    card, schedule = cards[-1], networks[-1].schedule
    knots = make_knots(schedule, steps, spacing)

    eta = None if eta is None else check_number("eta", eta)
    if not isinstance(solver, Solver):
        method = make_solver(solver, eta=eta)  # raises if the two do not go together
    elif eta is not None:
        raise ValueError(f"eta goes with a solver's name; give it to {solver.name} itself")
    else:
        method = solver
    if not eta:
        # Without noise DDIM is another program; a solver by name and as itself is the same one.
        solver, eta = method, None

    if fractions is not None and plan is not None:
        raise ValueError("give fractions or a plan, not both")
    if plan is None:
        if fractions is None:
            if len(networks) > 1:
                raise ValueError(f"give fractions or a plan for the {len(networks)} networks")
            fractions = [1.0]
        fractions = check_fractions(fractions, len(networks))
        plan = Plan.from_fractions(fractions, knots, schedule)
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a ts.Plan, got {shown(plan)}; see Plan.from_list")
    plan = Plan.from_list(plan.networks, plan.num_networks)
    if plan.num_networks != len(networks):
        raise ValueError(f"the plan is for {plan.num_networks} networks, got {len(networks)}")
    if plan.steps != knots.steps:
        raise ValueError(f"the plan has {plan.steps} steps, the sampler {knots.steps}")
    if method.needs_consistency:
        for used in (cards[k] for k, count in enumerate(plan.counts()) if count):
            if not used.consistency:
                raise ValueError(
                    f"the solver {method.name!r} needs consistency networks, and the card of "
                    f"{used.name} does not say that it is one (consistency)"
                )

    scales = check_scales(cfg_scale, len(networks), knots.steps)
    coder = autoencoder if decode else None
    if decode:
        check_autoencoder(networks[-1], autoencoder)
    image_shape = check_size(size, networks, 1 if coder is None else coder.factor)
    allowed = range(1, card.image_shape[2] + 1)
    if cfg_channels is not None:
        if not isinstance(cfg_channels, int | np.integer) or cfg_channels not in allowed:
            raise ValueError(
                f"cfg_channels must be 1 to {len(allowed)}, the channels of an image or latent, "
                f"got {shown(cfg_channels)}"
            )
        cfg_channels = int(cfg_channels)
    cfg_rescale = check_number("cfg_rescale", cfg_rescale, low=0, high=1)
    if cfg_rescale and all(scale is None for scale in scales):
        raise ValueError("cfg_rescale rescales guidance, but cfg_scale None guides nowhere")
    if auto_scale is not None:
        auto_scale = check_number("auto_scale", auto_scale)
        if len(networks) < 2:
            raise ValueError(
                "auto_scale lets the first network guide the later ones, but there is only one"
            )

    conditions = make_conditions(
        cards, [scale is not None for scale in scales], labels=labels, context=context,
        prompts=prompts, negative=negative, text_encoder=text_encoder,
    )  # fmt: skip
    shape = (len(conditions[0].given), *image_shape)
    if noise is not None:
        noise = check_images("noise", noise, shape, "one an image")
    mesh = devices.mesh_of(*networks, coder)
    start, left = check_start(start, strength, knots.steps, shape, coder)
    if left < knots.steps:
        knots, plan = last_steps(knots, left), plan.last_steps(left)
        scales = [s[-left:] if isinstance(s, np.ndarray) else s for s in scales]

    def over_steps(name: str, scale: Any) -> Any:
        if scale is None:
            return None
        if cfg_interval is None:
            return np.float32(scale)
        if isinstance(scale, np.ndarray):
            raise ValueError(f"give {name} per step or cfg_interval, not both")
        try:
            low, high = (float(bound) for bound in cfg_interval if is_list(cfg_interval))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"cfg_interval must be two noise levels, low and high, got {shown(cfg_interval)}"
            ) from None
        return guidance_interval(scale, knots, low, high)

    if cfg_interval is not None and auto_scale is None and all(s is None for s in scales):
        raise ValueError("cfg_interval says where to guide, but cfg_scale None guides nowhere")
    denoisers = [_by_rows(n.denoiser, n.rows) if n.rows else n.denoiser for n in networks]
    if len({each.learned_variance for each in cards}) > 1:
        denoisers = [_plain(denoiser) for denoiser in denoisers]
    params = tuple(network.params for network in networks)
    place = functools.partial(_place, mesh, params=params)
    return Sampling(
        inputs=Inputs(
            key,
            Given(
                params=params,
                plan=plan,
                scales=tuple(over_steps("cfg_scale", scale) for scale in scales),
                auto_scale=over_steps("auto_scale", auto_scale),
                seen=tuple(
                    None if network.schedule == schedule else match_snr(knots, network.schedule)
                    for network in networks
                ),
            ),
            knots,
            place(np.arange(shape[0], dtype=np.int32)),
            tuple(Condition(*map(place, own)) for own in conditions),
            None if eta is None else np.float32(eta),
            place(noise),
            place(start),
            None if coder is None else coder.params,
        ),
        static=dict(
            denoiser=_assemble(
                tuple(denoisers),
                tuple(cfg_channels or each.guidance_channels for each in cards),
                cfg_rescale,
            ),
            solver=solver,
            precompute=tuple(
                network.precompute if network.precompute and _on_cpu(network.params) else None
                for network in networks
            ),
            shape=image_shape,
            encoder=None if coder is None or start is None else _encode_mean(coder.encode),
            decoder=None if coder is None else coder.decode,
            finish=to_images if decode else None,
            mesh=mesh,
            return_trajectory=return_trajectory,
            return_predictions=return_predictions,
        ),
        batch=shape[0],
    )


# One function per denoiser and encoder, so that jit knows it again.
_plain = functools.cache(without_variance)
_by_rows = functools.cache(by_rows)


@functools.cache
def _encode_mean(encode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, images: encode(params, images, None)


def sample(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Any = None,
    context: Any = None,
    prompts: Any = None,
    negative: Any = None,
    text_encoder: Any = None,
    size: Any = None,
    fractions: Sequence[float] | np.ndarray | None = None,
    plan: Plan | None = None,
    steps: int | str | Sequence[float | int] | np.ndarray = 50,
    spacing: str = "respaced",
    solver: str | Solver = "ddim",
    eta: float | None = None,
    cfg_scale: Any = 1.5,
    cfg_channels: int | None = None,
    cfg_rescale: float = 0.0,
    cfg_interval: Sequence[float | int] | None = None,
    auto_scale: float | None = None,
    noise: Float[Array | np.ndarray, "b h w c"] | None = None,
    start: Float[Array | np.ndarray, "b h2 w2 c2"] | None = None,
    strength: float | None = None,
    autoencoder: Autoencoder | None = None,
    decode: bool = True,
    return_trajectory: bool = False,
    return_predictions: bool = False,
    callback: Callable[[Step], object] | None = None,
) -> Any:
    """Samples images from one network, or from several stitched along the trajectory.

    All plans, labels, keys, scales, intervals and noises of one batch size and number of steps run
    in one executable (guidance by one scale, by scales per step or by none is one each); image i
    depends on the key and i alone.

    The trajectory runs in the forward process of the last network. One that was trained on another
    (a flow before a variance-preserving one, say) is asked at equal signal-to-noise ratio and at
    its own time (``at_equal_snr``).

    Networks that ``ts.shard`` has put on a mesh of devices sample there, each device its part of
    the images; any number of images will do.

    Args:
        key: A JAX PRNG key.
        networks: From the one that takes the first, noisy steps to the one that takes the last.
        labels: B class labels, 0 to ``num_classes - 1``, of the networks that have classes; or a
            list of such lists, one for each of these, where their classes differ.
        context: What the other networks are conditioned on, float32 ``[B, L, D]``; or a list of
            such arrays, one for each of these, where they differ. Any length L will do.
        prompts: B texts instead, of which ``text_encoder`` makes the contexts.
        negative: What the unconditional half of guidance is given: beside prompts a text, or B
            (no text unless given); beside a context another one, for one image or B.
        text_encoder: What ``ts.load`` returns of ``card.text_encoder``; or a list with one for each
            network that takes a context. It runs before the sampler, in a program of its own.
        size: Height and width of what is returned, images or, with ``decode=False``, latents, where
            networks take other sizes than their cards'; Stable Diffusion takes any multiples of 64.
        fractions: Each network's share of the trajectory, summing to 1 (``Plan.from_fractions``).
        plan: A plan instead of fractions. A single network needs neither.
        steps: Number of steps N, a spec such as ``"ddim50"``, or the falling list of times
            themselves (see ``make_knots``).
        spacing: How N steps are spread over the times: ``"respaced"``, ``"leading"``,
            ``"linspace"``, ``"trailing"``, ``"karras"``, ``"exponential"``, ... (``make_knots``).
        solver: A name of ``SOLVERS``, or a solver such as ``ts.dpmpp(order=3)``.
        eta: Noise of ``"ddim"`` (0 unless given) or ``"euler_ancestral"`` (1), 0 to 1.
        cfg_scale: Scale of classifier-free guidance. A number runs the conditional and the
            unconditional half; None runs the conditional one alone, at half the price. Or a list
            with an entry for each network: None, a number, or N numbers, one a step; where one of
            these is 1 the unconditional half is left out.
        cfg_channels: How many of the first channels are guided; None for what the card says.
        cfg_rescale: Rescaled guidance's phi, 0 (none) to 1 (see ``cfg``).
        cfg_interval: Guide only at noise levels sigma / alpha from the first number (exclusive) to
            the second (``guidance_interval``); elsewhere guidance costs nothing.
        auto_scale: Scale of autoguidance: the first network, as the weak one, guides all later ones
            (``autoguide``). Comes on top of classifier-free guidance; give ``cfg_scale=None`` for
            autoguidance alone.
        noise: x_T, float32 ``[B, H, W, C]``, instead of noise drawn from the key.
        start: Images to start from, float32 ``[B, H, W, C]``: they are brought to the noise level
            where the last ``strength`` of the steps begins, and the plan switches where it would
            on the whole way. Images in [-1, 1], encoded where there is an autoencoder; latents
            with ``decode=False``. The noise comes from the key: to change an image that was drawn
            from a key, take another.
        strength: Share of the steps that ``start`` goes through, above 0, at most 1.
        autoencoder: What decodes the latents of latent networks, in the same executable; see
            ``card.autoencoder`` for the one that a network was trained with.
        decode: Whether to return images clipped to [-1, 1]; else what the network denoises, as is.
        return_trajectory: Whether to return x after each step too (neither clipped nor decoded).
        return_predictions: Whether to return x0 as predicted in each step too (the same).
        callback: Called with a ``Step`` (index, x, x0) after each step, which is then taken from
            the host: for previews and progress bars. The numbers are the same up to rounding.
            Another eta compiles its step anew.

    Returns:
        float32 ``[B, H, W, C]``, of the latents' shape if they are not decoded; with
        ``return_trajectory`` or ``return_predictions`` a tuple of it and those, each
        ``[N, B, H, W, C]``, N being the steps that ``strength`` leaves.

    Raises:
        ValueError: If any argument is not as said, or the networks do not fit together; before
            anything is compiled.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be a function of a step, got {shown(callback)}")
    return prepare(
        key, networks, labels=labels, context=context, prompts=prompts, negative=negative,
        text_encoder=text_encoder, size=size, fractions=fractions, plan=plan, steps=steps,
        spacing=spacing, solver=solver, eta=eta, cfg_scale=cfg_scale, cfg_channels=cfg_channels,
        cfg_rescale=cfg_rescale, cfg_interval=cfg_interval, auto_scale=auto_scale, noise=noise,
        start=start, strength=strength, autoencoder=autoencoder, decode=decode,
        return_trajectory=return_trajectory, return_predictions=return_predictions,
    ).run(callback)  # fmt: skip
