"""The short way: networks and labels in, images out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tstitch_jax.guidance import cfg
from tstitch_jax.plan import Plan, check_fractions
from tstitch_jax.prediction import without_variance
from tstitch_jax.sampler import draw_noise, image_keys, run
from tstitch_jax.schedules import make_knots
from tstitch_jax.solvers import make_solver
from tstitch_jax.stitch import stitch
from tstitch_jax.types import Autoencoder, Denoiser, Key, Network


@functools.partial(
    jax.jit,
    static_argnames=(
        "denoisers",
        "solver",
        "channels",
        "null",
        "shape",
        "decoder",
        "clip",
        "return_trajectory",
    ),
)
def _sample(
    key, params, plan, knots, labels, scale, eta, noise, decoder_params,
    *, denoisers, solver, channels, null, shape, decoder, clip, return_trajectory,
):  # fmt: skip
    if scale is not None:
        denoisers = [cfg(d, scale, null, c) for d, c in zip(denoisers, channels, strict=True)]
    keys = image_keys(key, jnp.arange(labels.shape[0]))
    result = run(
        stitch(denoisers, plan),
        make_solver(solver) if eta is None else make_solver(solver, eta=eta),
        knots,
        draw_noise(keys, 0, shape) if noise is None else noise,
        params=params,
        cond=labels,
        keys=keys,
        return_trajectory=return_trajectory,
    )
    x: Any
    x, trajectory = result if return_trajectory else (result, None)
    if decoder is not None:
        x = decoder(decoder_params, x)
    if clip:
        x = jnp.clip(x, -1, 1)
    return (x, trajectory) if return_trajectory else x


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A checked request: the one compiled function's dynamic and static arguments.

    Requests that differ in key, labels, plan, scale, eta or noise share an executable.
    """

    dynamic: tuple[Any, ...]
    static: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The resolved plan."""
        return self.dynamic[2]

    def run(self) -> Any:
        """Samples, compiling where nothing alike has run before."""
        return _sample(*self.dynamic, **self.static)

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
    first = networks[0]
    for other in networks[1:]:
        for what, a, b in (
            ("image shape", first.card.image_shape, other.card.image_shape),
            ("number of classes", first.card.num_classes, other.card.num_classes),
            ("autoencoder", first.card.autoencoder, other.card.autoencoder),
        ):
            if a != b and not (what == "autoencoder" and "" in (a, b)):
                raise ValueError(
                    f"{first.card.name} and {other.card.name} cannot be stitched: "
                    f"their {what} differs, {a} and {b}"
                )
        if first.schedule != other.schedule:
            raise ValueError(
                f"{first.card.name} and {other.card.name} cannot be stitched: their noise schedule "
                f"differs, {first.card.schedule} and {other.card.schedule}"
            )


def _check_labels(labels: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be a list of whole numbers, one an image, got {labels!r}")
    if array.min() < 0 or array.max() >= classes:
        wrong = [int(v) for v in array if not 0 <= v < classes]
        raise ValueError(f"labels must be 0 to {classes - 1}, got {', '.join(map(str, wrong[:5]))}")
    return array.astype(np.int32)


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


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def prepare(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Sequence[int] | np.ndarray,
    fractions: Sequence[float] | np.ndarray | None = None,
    plan: Plan | None = None,
    steps: int | str = 50,
    solver: str = "ddim",
    eta: float = 0.0,
    cfg_scale: float | None = 1.5,
    cfg_channels: int | None = None,
    noise: Float[Array | np.ndarray, "b h w c"] | None = None,
    autoencoder: Autoencoder | None = None,
    decode: bool = True,
    return_trajectory: bool = False,
) -> Sampling:
    """Checks everything that ``sample`` takes, before anything is compiled; raises as it does."""
    check_networks(networks)
    if not isinstance(key, jax.Array):
        raise ValueError(f"key must come from jax.random.key, got {key!r:.80}")
    card, schedule = networks[0].card, networks[0].schedule
    labels = _check_labels(labels, card.num_classes)
    knots = make_knots(schedule, steps)
    eta = _number("eta", eta)
    make_solver(solver, eta=eta)  # raises if the two do not go together

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

    if cfg_scale is not None:
        cfg_scale = _number("cfg_scale", cfg_scale)
        if not abs(cfg_scale) < float(np.finfo(np.float32).max):
            raise ValueError(f"cfg_scale must be a finite number or None, got {cfg_scale}")
    allowed = range(1, card.image_shape[2] + 1)
    if cfg_channels is not None and not (isinstance(cfg_channels, int) and cfg_channels in allowed):
        raise ValueError(f"cfg_channels must be 1 to {card.image_shape[2]}, got {cfg_channels}")
    if noise is not None:
        noise = jnp.asarray(noise, jnp.float32)
        expected = (len(labels), *card.image_shape)
        if noise.shape != expected:
            raise ValueError(f"noise must be {expected}, one per label, got {tuple(noise.shape)}")

    if decode:
        check_autoencoder(networks[-1], autoencoder)
    decoder = autoencoder if decode else None
    denoisers: list[Denoiser] = [network.denoiser for network in networks]
    if len({network.card.learned_variance for network in networks}) > 1:
        denoisers = [_plain(denoiser) for denoiser in denoisers]
    return Sampling(
        dynamic=(
            key,
            tuple(network.params for network in networks),
            plan,
            knots,
            labels,
            None if cfg_scale is None else np.float32(cfg_scale),
            None if eta == 0 else np.float32(eta),
            noise,
            None if decoder is None else decoder.params,
        ),
        static=dict(
            denoisers=tuple(denoisers),
            solver=solver,
            channels=tuple(cfg_channels or n.card.guidance_channels for n in networks),
            null=card.num_classes,
            shape=card.image_shape,
            decoder=None if decoder is None else decoder.decode,
            clip=decode,
            return_trajectory=return_trajectory,
        ),
    )


# One function per denoiser, so that jit knows it again.
_plain = functools.cache(without_variance)


def sample(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Sequence[int] | np.ndarray,
    fractions: Sequence[float] | np.ndarray | None = None,
    plan: Plan | None = None,
    steps: int | str = 50,
    solver: str = "ddim",
    eta: float = 0.0,
    cfg_scale: float | None = 1.5,
    cfg_channels: int | None = None,
    noise: Float[Array | np.ndarray, "b h w c"] | None = None,
    autoencoder: Autoencoder | None = None,
    decode: bool = True,
    return_trajectory: bool = False,
) -> Any:
    """Samples images from one network, or from several stitched along the trajectory.

    All plans, labels, keys, scales and noises of one batch size and number of steps run in one
    executable; image i depends on the key and i alone.

    Args:
        key: A JAX PRNG key.
        networks: From the one that takes the first, noisy steps to the one that takes the last.
        labels: B class labels, 0 to ``num_classes - 1``.
        fractions: Each network's share of the trajectory, summing to 1 (``Plan.from_fractions``).
        plan: A plan instead of fractions. A single network needs neither.
        steps: Number of steps N, or a spec such as ``"ddim50"`` (see ``respace``).
        solver: ``"ddim"`` or ``"ddpm"``.
        eta: DDIM's noise, 0 (none) to 1.
        cfg_scale: Scale of classifier-free guidance. Any number runs the conditional and the
            unconditional half; None runs the conditional one alone, at half the price.
        cfg_channels: How many of the first channels are guided; None for what the card says.
        noise: x_T, float32 ``[B, H, W, C]``, instead of noise drawn from the key.
        autoencoder: What decodes the latents of latent networks, in the same executable; see
            ``card.autoencoder`` for the one that a network was trained with.
        decode: Whether to return images clipped to [-1, 1]; else what the network denoises, as is.
        return_trajectory: Whether to return x after each step too (neither clipped nor decoded).

    Returns:
        float32 ``[B, H, W, C]``, of the latents' shape if they are not decoded; with
        ``return_trajectory`` a pair of it and ``[N, B, H, W, C]``.

    Raises:
        ValueError: If any argument is not as said, or the networks do not fit together; before
            anything is compiled.
    """
    return prepare(
        key, networks, labels=labels, fractions=fractions, plan=plan, steps=steps, solver=solver,
        eta=eta, cfg_scale=cfg_scale, cfg_channels=cfg_channels, noise=noise,
        autoencoder=autoencoder, decode=decode, return_trajectory=return_trajectory,
    ).run()  # fmt: skip
