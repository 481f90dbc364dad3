"""The short way: networks and labels in, images out."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.guidance import autoguide, cfg, guidance_interval
from tstitch_jax.plan import Plan, check_fractions
from tstitch_jax.prediction import at_equal_snr, with_cond, without_variance
from tstitch_jax.sampler import Step, draw_noise, image_keys, iterate, run
from tstitch_jax.schedules import last_steps, make_knots, match_snr
from tstitch_jax.solvers import make_solver
from tstitch_jax.stitch import stitch
from tstitch_jax.types import (
    Autoencoder,
    Card,
    Cond,
    Denoiser,
    Key,
    Knots,
    Network,
    Params,
    Prediction,
    Solver,
)


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
    nulls: tuple[int, ...],
    channels: tuple[int | None, ...],
    rescale: float,
) -> Denoiser:
    """One denoiser, a function of ``Given``; conditioned on a tuple of labels, one per network."""

    def denoiser(given: Given, x: jax.Array, knot: Knots, cond: Cond, /) -> Prediction:
        plain = [
            each if seen is None else at_equal_snr(each, seen)
            for each, seen in zip(denoisers, given.seen, strict=True)
        ]
        weak = with_cond(plain[0], operator.itemgetter(0))
        stages, params = [], []
        for k, (stage, own) in enumerate(zip(plain, given.params, strict=True)):
            if given.scales[k] is not None:
                stage = cfg(stage, given.scales[k], nulls[k], channels[k], rescale)
            stage = with_cond(stage, operator.itemgetter(k))
            if k and given.auto_scale is not None:
                stage = autoguide(stage, weak, given.auto_scale, channels[k])
                own = own, given.params[0]
            stages.append(stage)
            params.append(own)
        return stitch(stages, given.plan)(params, x, knot, cond)

    return denoiser


@functools.partial(jax.jit, static_argnames=("shape", "encoder"))
def _begin(key, knots, labels, noise, start, coder_params, *, shape, encoder):
    """The keys of the images, and the state at the first point."""
    keys = image_keys(key, jnp.arange(labels[0].shape[0]))
    if noise is None:
        noise = draw_noise(keys, 0, shape)
    if start is None:
        return keys, noise
    if encoder is not None:
        start = encoder(coder_params, start)
    return keys, jnp.asarray(knots.alpha)[0] * start + jnp.asarray(knots.sigma)[0] * noise


@functools.partial(jax.jit, static_argnames=("decoder", "clip"))
def _finish(x, coder_params, *, decoder, clip):
    """Images out of the last state."""
    if decoder is not None:
        x = decoder(coder_params, x)
    return jnp.clip(x, -1, 1) if clip else x


@functools.partial(
    jax.jit,
    static_argnames=(
        "denoiser", "solver", "shape", "encoder", "decoder", "clip", "return_trajectory",
        "return_predictions",
    ),
)  # fmt: skip
def _sample(
    key, given, knots, labels, eta, noise, start, coder_params,
    *, denoiser, solver, shape, encoder, decoder, clip, return_trajectory, return_predictions,
):  # fmt: skip
    keys, x = _begin(key, knots, labels, noise, start, coder_params, shape=shape, encoder=encoder)
    result = run(
        denoiser,
        _solver(solver, eta),
        knots,
        x,
        params=given,
        cond=labels,
        keys=keys,
        return_trajectory=return_trajectory,
        return_predictions=return_predictions,
    )
    x, *kept = result if isinstance(result, tuple) else (result,)
    x = _finish(x, coder_params, decoder=decoder, clip=clip)
    return (x, *kept) if kept else x


def _solver(solver: str | Solver, eta: Any) -> Solver:
    return solver if isinstance(solver, Solver) else make_solver(solver, eta=eta)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A checked request: the one compiled function's dynamic and static arguments.

    Requests that differ in key, labels, plan, scales, guidance interval, eta, noise or start share
    an executable.
    """

    dynamic: tuple[Any, ...]
    static: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.dynamic[1].plan

    def run(self, callback: Callable[[Step], object] | None = None) -> Any:
        """Samples, compiling where nothing alike has run before.

        With a callback the same steps are taken one by one from the host, and it sees each.
        """
        if callback is None:
            return _sample(*self.dynamic, **self.static)
        key, given, knots, labels, eta, noise, start, coder_params = self.dynamic
        static = self.static
        chosen = {name: static[name] for name in ("shape", "encoder")}
        keys, x = _begin(key, knots, labels, noise, start, coder_params, **chosen)
        solver = _solver(static["solver"], None if eta is None else float(eta))
        kept = []
        steps = iterate(static["denoiser"], solver, knots, x, params=given, cond=labels, keys=keys)
        for step in steps:
            x = step.x
            callback(step)
            wanted = ((x, "return_trajectory"), (step.x0, "return_predictions"))
            kept.append([value for value, name in wanted if static[name]])
        chosen = {name: static[name] for name in ("decoder", "clip")}
        x = _finish(x, coder_params, **chosen)
        return (x, *map(jnp.stack, zip(*kept, strict=True))) if kept[0] else x

    def compile(self) -> Callable[..., Any]:
        """The executable, to be called with the ``dynamic`` of this or a like request."""
        return _sample.lower(*self.dynamic, **self.static).compile()


def check_networks(networks: Sequence[Network]) -> None:
    """Raises ValueError unless the networks can share one trajectory; says which two clash."""
    for each in networks if isinstance(networks, Sequence) else ():
        if isinstance(each, Autoencoder):
            raise ValueError(
                f"{each.card.name} is an autoencoder, not a denoiser; give it as the autoencoder"
            )
    if not isinstance(networks, Sequence) or not all(isinstance(n, Network) for n in networks):
        raise ValueError(f"networks must be a list of what ts.load returns, got {networks!r:.80}")
    if not networks:
        raise ValueError("give at least one network")
    first = networks[0].card
    for other in (network.card for network in networks[1:]):
        for what, a, b in (
            ("image shape", first.image_shape, other.image_shape),
            ("autoencoder", first.autoencoder, other.autoencoder),
        ):
            if a != b and not (what == "autoencoder" and "" in (a, b)):
                raise ValueError(
                    f"{first.name} and {other.name} cannot be stitched: "
                    f"their {what} differs, {a} and {b}"
                )


def _check_labels(labels: Any, cards: Sequence[Card]) -> tuple[np.ndarray, ...]:
    """Labels for each network, from one list for all or one list for each."""
    if not _is_list(labels) or not len(labels) or not _is_list(labels[0]):
        for card in cards:
            if card.num_classes != cards[0].num_classes:
                raise ValueError(
                    f"{cards[0].name} and {card.name} cannot share labels: their number of classes "
                    f"differs, {cards[0].num_classes} and {card.num_classes}; give a list of "
                    "labels for each network"
                )
        labels = [labels] * len(cards)
    if len(labels) != len(cards):
        raise ValueError(f"{len(cards)} networks need as many lists of labels, got {len(labels)}")
    checked = []
    for own, card in zip(labels, cards, strict=True):
        try:
            array = np.asarray(own)
        except ValueError:  # ragged
            array = np.empty(0)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"labels must be a list of whole numbers, one an image, got {_shown(own)}"
            )
        if array.min() < 0 or array.max() >= card.num_classes:
            wrong = [int(v) for v in array if not 0 <= v < card.num_classes]
            raise ValueError(
                f"labels must be 0 to {card.num_classes - 1}, got {', '.join(map(str, wrong[:5]))}"
            )
        if checked and len(array) != len(checked[0]):
            raise ValueError(
                f"every network needs labels for the same images, got {len(checked[0])} "
                f"and {len(array)}"
            )
        checked.append(array.astype(np.int32))
    return tuple(checked)


def check_autoencoder(network: Network, autoencoder: Autoencoder | None) -> None:
    """Raises ValueError unless what the network makes can be turned into images."""
    card = network.card
    if autoencoder is not None and not isinstance(autoencoder, Autoencoder):
        name = autoencoder.card.name if isinstance(autoencoder, Network) else repr(autoencoder)
        raise ValueError(f"{name:.80} is no autoencoder; give one, as ts.load returns it")
    if autoencoder is None:
        if card.autoencoder or card.image_shape[2] not in (1, 3):
            name = card.autoencoder or "sd-vae-ft-ema"
            raise ValueError(
                f"{card.name} makes latents of {card.image_shape[2]} channels, not images; "
                f"give autoencoder=ts.load({name!r}), or decode=False for the latents"
            )
    elif autoencoder.channels != card.image_shape[2]:
        raise ValueError(
            f"{card.name} makes {card.image_shape[2]} channels, the autoencoder "
            f"{autoencoder.card.name} takes latents of {autoencoder.channels}"
        )


def _shown(value: Any) -> str:
    """A value in an error message: one line, not too long."""
    return " ".join(repr(value).split())[:80]


def _images(name: str, value: Any, shape: tuple[int, ...], what: str) -> jax.Array:
    """A float32 array of that shape without NaN."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers {shape}, {what}") from None
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}, {what}, got {array.shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return jnp.asarray(array)


def _check_key(key: Any) -> None:
    """Raises ValueError unless it is one key, typed or of the older kind."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    older = isinstance(key, jax.Array) and (key.shape, key.dtype) == ((2,), jnp.uint32)
    if not older and not (typed and key.ndim == 0):
        raise ValueError(f"key must be one key from jax.random.key, got {_shown(key)}")


def _is_list(value: Any) -> bool:
    arrays = isinstance(value, np.ndarray | jax.Array) and value.ndim > 0
    return arrays or (isinstance(value, Sequence) and not isinstance(value, str))


def _number(name: str, value: Any, or_none: str = "") -> float:
    """A finite number that float32 holds."""
    try:
        if isinstance(value, str | bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number{or_none}, got {_shown(value)}") from None
    if not abs(number) < float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be a finite number{or_none}, got {number}")
    return number


def _check_scales(cfg_scale: Any, networks: int, steps: int) -> list[Any]:
    """Of each network None, a number, or an array of a number per step."""
    if _is_list(cfg_scale):
        if len(cfg_scale) != networks:
            raise ValueError(
                f"cfg_scale must be one number or None for all, or a list with one entry for each "
                f"of the {networks} networks, got {len(cfg_scale)} entries"
            )
        scales = list(cfg_scale)
    else:
        scales = [cfg_scale] * networks
    checked = []
    for scale in scales:
        if _is_list(scale):
            if len(scale) != steps:
                raise ValueError(f"cfg_scale per step needs {steps} numbers, got {len(scale)}")
            numbers = [_number("cfg_scale", value) for value in scale]
            checked.append(np.array(numbers, np.float32))
        else:
            checked.append(None if scale is None else _number("cfg_scale", scale, " or None"))
    return checked


def _check_start(
    start: Any, strength: Any, steps: int, shape: tuple[int, ...], encoder: Autoencoder | None
) -> tuple[Any, int]:
    """The start as an array, and how many of the last steps it leaves."""
    if (start is None) != (strength is None):
        raise ValueError("start and strength go together: an image and how far to change it")
    if start is None:
        return None, steps
    strength = _number("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0, at most 1, got {strength:g}")
    if encoder is not None:
        factor = encoder.factor
        shape = (shape[0], shape[1] * factor, shape[2] * factor, encoder.card.image_shape[2])
    if np.asarray(start).dtype.kind in "iu":
        raise ValueError("start must be floats, images in [-1, 1], got whole numbers (of pixels?)")
    start = _images("start", start, shape, "one image per label")
    return start, max(1, int(steps * strength + 1e-6))


def prepare(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Any,
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
    """Checks everything that ``sample`` takes, before anything is compiled; raises as it does."""
    check_networks(networks)
    _check_key(key)
    cards = [network.card for network in networks]
    card, schedule = cards[-1], networks[-1].schedule
    checked_labels = _check_labels(labels, cards)
    shape = (len(checked_labels[0]), *card.image_shape)
    knots = make_knots(schedule, steps, spacing)

    eta = None if eta is None else _number("eta", eta)
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
        raise ValueError(f"plan must be a ts.Plan, got {plan!r:.80}; see Plan.from_list")
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

    scales = _check_scales(cfg_scale, len(networks), knots.steps)
    allowed = range(1, card.image_shape[2] + 1)
    if cfg_channels is not None:
        if not isinstance(cfg_channels, int | np.integer) or cfg_channels not in allowed:
            raise ValueError(
                f"cfg_channels must be 1 to {len(allowed)}, got {_shown(cfg_channels)}"
            )
        cfg_channels = int(cfg_channels)
    cfg_rescale = _number("cfg_rescale", cfg_rescale)
    if not 0 <= cfg_rescale <= 1:
        raise ValueError(f"cfg_rescale must be between 0 and 1, got {cfg_rescale:g}")
    if cfg_rescale and all(scale is None for scale in scales):
        raise ValueError("cfg_rescale rescales guidance, but cfg_scale None guides nowhere")
    if auto_scale is not None:
        auto_scale = _number("auto_scale", auto_scale)
        if len(networks) < 2:
            raise ValueError(
                "auto_scale lets the first network guide the later ones, but there is only one"
            )

    if noise is not None:
        noise = _images("noise", noise, shape, "one per label")
    if decode:
        check_autoencoder(networks[-1], autoencoder)
    coder = autoencoder if decode else None
    start, left = _check_start(start, strength, knots.steps, shape, coder)
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
            low, high = (float(bound) for bound in cfg_interval if _is_list(cfg_interval))
        except (TypeError, ValueError):
            raise ValueError(
                f"cfg_interval must be two noise levels, low and high, got {_shown(cfg_interval)}"
            ) from None
        return guidance_interval(scale, knots, low, high)

    if cfg_interval is not None and auto_scale is None and all(s is None for s in scales):
        raise ValueError("cfg_interval says where to guide, but cfg_scale None guides nowhere")
    denoisers: list[Denoiser] = [network.denoiser for network in networks]
    if len({each.learned_variance for each in cards}) > 1:
        denoisers = [_plain(denoiser) for denoiser in denoisers]
    return Sampling(
        dynamic=(
            key,
            Given(
                params=tuple(network.params for network in networks),
                plan=plan,
                scales=tuple(over_steps("cfg_scale", scale) for scale in scales),
                auto_scale=over_steps("auto_scale", auto_scale),
                seen=tuple(
                    None if network.schedule == schedule else match_snr(knots, network.schedule)
                    for network in networks
                ),
            ),
            knots,
            checked_labels,
            None if eta is None else np.float32(eta),
            noise,
            start,
            None if coder is None else coder.params,
        ),
        static=dict(
            denoiser=_assemble(
                tuple(denoisers),
                tuple(each.num_classes for each in cards),
                tuple(cfg_channels or each.guidance_channels for each in cards),
                cfg_rescale,
            ),
            solver=solver,
            shape=card.image_shape,
            encoder=None if coder is None or start is None else _encode_mean(coder.encode),
            decoder=None if coder is None else coder.decode,
            clip=decode,
            return_trajectory=return_trajectory,
            return_predictions=return_predictions,
        ),
    )


# One function per denoiser and encoder, so that jit knows it again.
_plain = functools.cache(without_variance)


@functools.cache
def _encode_mean(encode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, images: encode(params, images, None)


def sample(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Any,
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

    Args:
        key: A JAX PRNG key.
        networks: From the one that takes the first, noisy steps to the one that takes the last.
        labels: B class labels, 0 to ``num_classes - 1``; or such a list for each network, where
            their classes differ.
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
        raise ValueError(f"callback must be a function of a step, got {_shown(callback)}")
    return prepare(
        key, networks, labels=labels, fractions=fractions, plan=plan, steps=steps, spacing=spacing,
        solver=solver, eta=eta, cfg_scale=cfg_scale, cfg_channels=cfg_channels,
        cfg_rescale=cfg_rescale, cfg_interval=cfg_interval, auto_scale=auto_scale, noise=noise,
        start=start, strength=strength, autoencoder=autoencoder, decode=decode,
        return_trajectory=return_trajectory, return_predictions=return_predictions,
    ).run(callback)  # fmt: skip
