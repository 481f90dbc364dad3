"""High-level sampling: ``Sampler``, and ``sample`` as one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tstitch_jax.core.checks import check_number, check_whole, is_list, shown, to_builtin
from tstitch_jax.core.denoisers import as_pytree
from tstitch_jax.core.grids import last_steps, make_knots, match_snr
from tstitch_jax.core.guidance import guidance_interval
from tstitch_jax.core.loop import Step, platform_of
from tstitch_jax.core.plan import Plan, check_fractions
from tstitch_jax.core.solvers import make_solver
from tstitch_jax.core.types import Condition, Key, Knots, Solver
from tstitch_jax.hub import resolve
from tstitch_jax.models import devices
from tstitch_jax.models.build import outline, parse_dtype
from tstitch_jax.models.conditioning import Conditioner, check_texts
from tstitch_jax.models.families import conditioner_of
from tstitch_jax.models.types import Autoencoder, Network
from tstitch_jax.sampling.checks import (
    check_autoencoder,
    check_images,
    check_key,
    check_networks,
    check_scales,
    check_size,
    check_start,
    class_names,
)
from tstitch_jax.sampling.conditioning import check_condition, make_condition
from tstitch_jax.sampling.options import Guidance
from tstitch_jax.sampling.program import Config, Inputs, SampleRequest, place
from tstitch_jax.sampling.samples import Samples

KEEP = ("trajectory", "predictions")


def parse_plan(plan: Any, networks: Sequence[Network], knots: Knots) -> Plan:
    """The plan of a ``Plan``, of an object that has one (a ``Calibration``), or of fractions.

    Raises:
        ValueError: If it does not fit the networks or the steps.
    """
    count = len(networks)
    if isinstance(getattr(plan, "plan", None), Plan):
        plan = plan.plan
    if isinstance(plan, Plan):
        plan = Plan.from_list(plan.networks, plan.num_networks)
    elif plan is None or is_list(plan):
        fractions = check_fractions([1.0] if plan is None else plan, count)
        plan = Plan.from_fractions(fractions, knots, networks[-1].schedule)
    else:
        raise ValueError(f"plan must be a ts.Plan or fractions, got {shown(plan)}")
    if plan.num_networks != count:
        raise ValueError(f"the plan is for {plan.num_networks} networks, got {count}")
    if plan.steps != knots.steps:
        raise ValueError(f"the plan has {plan.steps} steps, the sampler {knots.steps}")
    return plan


def parse_guidance(guidance: Any, networks: Sequence[Network], steps: int) -> Guidance:
    """Guidance with one scale per network, each None, a float or float32 ``[N]``.

    Raises:
        ValueError: If an entry has another type or does not fit the networks.
    """
    if not isinstance(guidance, Guidance):
        guidance = Guidance(scale=guidance)
    scales = check_scales(guidance.scale, len(networks), steps)
    unguided = all(scale is None for scale in scales)
    channels, weak_scale = guidance.channels, guidance.weak_scale
    if channels is not None:
        most = networks[-1].card.image_shape[2]
        if not isinstance(channels, int | np.integer) or not 0 < channels <= most:
            raise ValueError(
                f"guided channels must be 1 to {most}, the channels of an image or latent, "
                f"got {shown(channels)}"
            )
        channels = int(channels)
    rescale = check_number("the rescale of guidance", guidance.rescale, low=0, high=1)
    if rescale and unguided:
        raise ValueError("rescale changes guidance, but there is none: give a guidance scale")
    if weak_scale is not None:
        weak_scale = check_number("the scale of autoguidance", weak_scale)
        if len(networks) < 2:
            raise ValueError(
                "autoguidance lets the first network guide the later ones, but there is only one"
            )
    interval = guidance.interval
    if interval is not None:
        if unguided and weak_scale is None:
            raise ValueError(
                "the interval limits guidance, but there is none: give a guidance scale"
            )
        for name, scale in (
            ("the guidance scale", scales),
            ("the scale of autoguidance", [weak_scale]),
        ):
            if any(isinstance(each, np.ndarray) for each in scale):
                raise ValueError(f"give {name} per step or an interval, not both")
        try:
            low, high = (float(bound) for bound in interval if is_list(interval))
            if not 0 <= low < high:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                "the guidance interval must be two noise levels, 0 <= low < high, "
                f"got {shown(interval)}"
            ) from None
        interval = low, high
    return Guidance(scales, interval, channels, rescale, weak_scale)


class Sampler:
    """Samples images from one network, or from several stitched along the trajectory.

    Construction checks all options; weights load at the first call. One executable serves every
    plan, key, label, text, scale, interval and noise of one batch size and number of steps
    (guidance by one scale, by scales per step or by none is one each), for all samplers of networks
    with equal configurations. Image i depends on the key and i alone.

    The trajectory runs in the forward process of the last network. A network that was trained on
    another one is evaluated at equal signal-to-noise ratio and at its own time.

    Attributes:
        plan: Which network takes each step; None for several networks that were given none, which
            only ``calibrate`` takes.
        knots: The sampling grid.
        solver: The numerical method.
        guidance: The guidance, with one scale per network.
    """

    def __init__(
        self,
        networks: Any,
        *,
        plan: Any = None,
        steps: Any = 50,
        spacing: str = "respaced",
        solver: str | Solver = "ddim",
        guidance: Any = 1.5,
        autoencoder: Any = None,
        text_encoder: Any = None,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        _loaded: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            networks: From the one that takes the first, noisy steps to the one that takes the last:
                names, paths, or what ``ts.load`` returns. A single one need not be a list.
            plan: A ``Plan``, what ``calibrate`` returns, or each network's fraction of the
                trajectory, summing to 1 (``Plan.from_fractions``). A single network needs none.
            steps: Number of steps N, a spec such as ``"ddim50"``, or the falling list of times
                themselves (see ``make_knots``).
            spacing: How N steps are spread over the times, a name of ``SPACINGS``.
            solver: A name of ``SOLVERS``, or a solver such as ``ts.dpmpp(order=3)``.
            guidance: A scale of classifier-free guidance, None for none, a list with an entry per
                network, or a ``Guidance``.
            autoencoder: Decodes latents: a name, a path or an ``Autoencoder``; the one that the
                last network's card names unless given.
            text_encoder: Encodes texts: a name, a path, a ``TextEncoder``, or a list with one for
                each network that takes texts; the ones that the cards name unless given.
            dtype: Compute dtype of what is loaded here, float32 or bfloat16.
            mesh: A mesh of devices to load onto, from ``make_mesh``; each device samples its part
                of the images.

        Raises:
            ValueError: If an option is invalid or the networks do not fit together.
        """
        if isinstance(networks, str | Network) or not isinstance(networks, Sequence):
            networks = [networks]
        self._options = dict(
            plan=plan, steps=steps, spacing=spacing, solver=solver, guidance=guidance,
            autoencoder=autoencoder, text_encoder=text_encoder, dtype=dtype, mesh=mesh,
        )  # fmt: skip
        parse_dtype(dtype)
        self.solver = solver if isinstance(solver, Solver) else make_solver(solver)
        if not dataclasses.is_dataclass(self.solver):
            raise ValueError(
                f"{type(self.solver).__name__} is not a record; decorate it by ts.record"
            )
        owners = [
            each for each in (*networks, autoencoder) if isinstance(each, Network | Autoencoder)
        ]
        if mesh is None:  # what is loaded here goes where the others are
            self._options["mesh"] = devices.mesh_of(*owners)
        else:
            networks = [devices.shard(n, mesh) if n in owners else n for n in networks]
        self._given = list(networks)
        self._loaded = {} if _loaded is None else _loaded
        self._networks = [self._outline(each) for each in self._given]
        check_networks(self._networks)
        last = self._networks[-1]
        self.knots = make_knots(last.schedule, steps, spacing)
        self.plan = None
        if plan is not None or len(self._networks) == 1:
            self.plan = parse_plan(plan, self._networks, self.knots)
        if self.plan is not None and self.solver.needs_consistency:
            for network, count in zip(self._networks, self.plan.counts(), strict=True):
                if count and not network.card.consistency:
                    raise ValueError(
                        f"the solver {self.solver.name!r} needs consistency networks, and the card "
                        f"of {network.card.name} does not say that it is one (consistency)"
                    )
        self.guidance = parse_guidance(guidance, self._networks, self.knots.steps)

    def _load(self, source: Any) -> Any:
        """What a name or path stands for, loaded once; other objects as they are."""
        if not isinstance(source, str) and not hasattr(source, "__fspath__"):
            return source
        if str(source) not in self._loaded:
            options = self._options
            self._loaded[str(source)] = resolve.load(source, options["dtype"], mesh=options["mesh"])
        return self._loaded[str(source)]

    def _outline(self, source: Any) -> Any:
        """The network of a name without its weights where its card is here, else loaded."""
        if not isinstance(source, str) and not hasattr(source, "__fspath__"):
            return source
        card = resolve.local_card(source)
        return self._load(source) if card is None else outline(card, self._options["dtype"])

    @functools.cached_property
    def networks(self) -> list[Network]:
        """The networks with their weights, which load at the first use."""
        return [self._load(each) for each in self._given]

    @property
    def names(self) -> list[str]:
        """The networks' names."""
        return [network.card.name for network in self._networks]

    def replace(self, **changes: Any) -> Sampler:
        """A sampler with other options, which shares all that is loaded.

        Args:
            changes: Arguments of ``Sampler``; ``dtype`` and ``mesh`` load anew.
        """
        networks = changes.pop("networks", self._given)
        shared = None if {"dtype", "mesh"} & changes.keys() else self._loaded
        return Sampler(networks, **(self._options | changes), _loaded=shared)

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The one given or named by the last network's card; loads at the first use."""
        source = self._options["autoencoder"]
        name = self._networks[-1].card.autoencoder
        if source is None and name:
            try:
                return self._load(name)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{self.names[-1]} makes latents, and its card names the autoencoder {name}; "
                    f"give another one, or fix this: {error}"
                ) from None
        return self._load(source)

    def _conditioners(self) -> list[Conditioner]:
        return [conditioner_of(network.card) for network in self._networks]

    @property
    def takes(self) -> set[str]:
        """What the networks are conditioned on: ``"labels"``, ``"prompts"``, or both."""
        return {conditioner.takes for conditioner in self._conditioners()}

    def text_encoders(self) -> list[Any]:
        """One for each network that takes prompts; they load at the first use."""
        takes = [conditioner.takes for conditioner in self._conditioners()]
        cards = [n.card for n, kind in zip(self._networks, takes, strict=True) if kind == "prompts"]
        source = self._options["text_encoder"]
        if source is None:
            for card in cards:
                if not card.text_encoder:
                    raise ValueError(
                        f"the card of {card.name} names no text encoder; give text_encoder"
                    )
            try:
                return [self._load(card.text_encoder) for card in cards]
            except (ValueError, OSError) as error:
                name, encoder = cards[0].name, cards[0].text_encoder
                raise ValueError(
                    f"{name} takes texts, and its card names the text encoder {encoder}; give "
                    f"another one, or fix this: {error}"
                ) from None
        return [self._load(each) for each in (source if is_list(source) else [source] * len(cards))]

    def condition(
        self, *, labels: Any = None, prompts: Any = None, cond: Any = None, negative: Any = None
    ) -> Condition:
        """The conditioning of a call: its halves are tuples with an entry for each network.

        Takes the arguments of a call of the same names, or such a condition as ``cond``; for a
        single network, its halves need be no tuples.
        """
        if isinstance(cond, Condition):
            if any(each is not None for each in (labels, prompts, negative)):
                raise ValueError("a ts.Condition is complete; leave out labels, prompts, negative")
            return check_condition(cond, [scale is not None for scale in self.guidance.scale])
        if prompts is not None and cond is None:
            check_texts("prompts", prompts)  # before an encoder is loaded
        return make_condition(
            self.names,
            self._conditioners(),
            [scale is not None for scale in self.guidance.scale],
            labels=labels,
            cond=cond,
            prompts=prompts,
            negative=negative,
            text_encoder=None if prompts is None or cond is not None else self.text_encoders(),
        )

    def request(
        self,
        key: Key,
        *,
        labels: Any = None,
        prompts: Any = None,
        cond: Any = None,
        negative: Any = None,
        size: Any = None,
        noise: Any = None,
        start: Any = None,
        strength: float | None = None,
        indices: Any = None,
        decode: bool = True,
        keep: Sequence[str] = (),
    ) -> SampleRequest:
        """The checked request of a call, not yet run; takes its arguments and raises its errors."""
        check_key(key)
        guidance, knots, plan = self.guidance, self.knots, self.plan
        if plan is None:
            raise ValueError(f"give a plan or fractions for the {len(self._networks)} networks")
        keep = [keep] if isinstance(keep, str) else keep
        if not is_list(keep) or any(name not in KEEP for name in keep):
            raise ValueError(f"keep must be some of {', '.join(KEEP)}, got {shown(keep)}")
        coder = self.autoencoder if decode else None
        if decode:
            check_autoencoder(self._networks[-1], coder)
        shape = check_size(size, self._networks, 1 if coder is None else coder.factor)
        condition = self.condition(labels=labels, prompts=prompts, cond=cond, negative=negative)
        batch = len(condition.given[0])
        if noise is not None:
            noise = check_images("noise", noise, (batch, *shape), "one an image")
        if indices is None:
            indices = range(batch)
        if (not is_list(indices) and not isinstance(indices, range)) or len(indices) != batch:
            raise ValueError(
                f"indices must be a list of whole numbers, one for each of the {batch} images, "
                f"got {shown(indices)}"
            )
        indices = np.array(
            [check_whole("an index", each, 0, 2**31 - 1) for each in indices], np.int32
        )
        start, left = check_start(start, strength, knots.steps, (batch, *shape), coder)
        scales = list(guidance.scale)
        if left < knots.steps:
            knots, plan = last_steps(knots, left), plan.last_steps(left)
            scales = [each[-left:] if isinstance(each, np.ndarray) else each for each in scales]

        def over_steps(scale: Any) -> Any:
            if scale is None:
                return None
            if guidance.interval is None:
                return np.asarray(scale, np.float32)
            return guidance_interval(scale, knots, *guidance.interval)

        networks = self.networks
        mesh = devices.mesh_of(*networks, coder)
        denoisers = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf,
            tuple(as_pytree(network.denoiser) for network in networks),
        )
        spread = functools.partial(place, mesh, tree=denoisers)
        cards = [network.card for network in networks]
        schedule = networks[-1].schedule
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(denoisers))
        return SampleRequest(
            Inputs(
                key=key,
                denoisers=denoisers,
                plan=plan,
                scales=tuple(map(over_steps, scales)),
                rescale=np.float32(guidance.rescale) if guidance.rescale else None,
                weak_scale=over_steps(guidance.weak_scale),
                grids=tuple(
                    None if network.schedule == schedule else match_snr(knots, network.schedule)
                    for network in networks
                ),
                knots=knots,
                solver=self.solver,
                indices=spread(indices),
                cond=spread(condition),
                noise=spread(noise),
                start=spread(start),
                coder=None if coder is None else coder.coder,
            ),
            Config(
                shape=shape,
                channels=tuple(guidance.channels or card.guidance_channels for card in cards),
                rows=tuple(network.rows for network in networks),
                drop_variance=len({card.learned_variance for card in cards}) > 1,
                output="images" if decode else "state",
                mesh=mesh,
                platform=None if traced else platform_of(denoisers),
                keep=tuple(name for name in KEEP if name in keep),
            ),
            batch,
        )

    def __call__(
        self,
        key: Key,
        *,
        labels: Any = None,
        prompts: Any = None,
        cond: Any = None,
        negative: Any = None,
        size: Any = None,
        noise: Float[Array | np.ndarray, "b h w c"] | None = None,
        start: Float[Array | np.ndarray, "b h2 w2 c2"] | None = None,
        strength: float | None = None,
        indices: Any = None,
        callback: Callable[[Step], object] | None = None,
        decode: bool = True,
        keep: Sequence[str] = (),
    ) -> Samples:
        """Samples a batch of images.

        Args:
            key: A JAX PRNG key.
            labels: B class labels, numbers or class names, for networks that have classes; or a
                list of such lists, one for each of these, where their classes differ.
            prompts: B texts, for networks that take texts.
            cond: The context of these instead, float32 ``[B, L, D]``; or a list of such arrays, one
                for each of these networks, where they differ.
            negative: What guidance leads away from: beside prompts a text, or B (the empty text
                unless given); beside ``cond`` another context, for one image or B.
            size: Height and width of what is returned, for networks that take other sizes than
                those of their cards.
            noise: x_T, float32 ``[B, H, W, C]``, instead of noise drawn from the key.
            start: Images to start from, float32 ``[B, H, W, C]`` in [-1, 1] (latents with
                ``decode=False``): they are brought to the noise level at which the last
                ``strength`` of the steps begins.
            strength: Share of the steps that ``start`` goes through, above 0, at most 1.
            indices: The global numbers of the images, 0 to B-1 unless given: image 7 alone is image
                7 of a batch.
            callback: Receives a ``Step`` (index, x, x0) after each step, which is then taken from
                the host: for previews and progress bars. Results are equal up to rounding.
            decode: Whether to decode and clip to images; else the latents are returned.
            keep: ``"trajectory"``, ``"predictions"``, or both.

        Raises:
            ValueError: If an argument is invalid, before anything is compiled.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function of a step, got {shown(callback)}")
        request = self.request(
            key, labels=labels, prompts=prompts, cond=cond, negative=negative, size=size,
            noise=noise, start=start, strength=strength, indices=indices, decode=decode, keep=keep,
        )  # fmt: skip
        output, *kept = request.run(callback)
        values = dict(zip(request.config.keep, kept, strict=True))
        return Samples(
            images=output if decode else None,
            latents=None if decode else output,
            trajectory=values.get("trajectory"),
            predictions=values.get("predictions"),
            names=self._names_of(request.batch, labels, prompts),
            settings=self.settings() | {"size": size, "strength": strength, "negative": negative},
        )

    def _names_of(self, batch: int, labels: Any, prompts: Any) -> tuple[str, ...]:
        if prompts is not None:
            return tuple(prompts)
        if not is_list(labels) or len(labels) != batch or is_list(labels[0]):
            return tuple(map(str, range(batch)))
        return class_names(labels, [network.card for network in self._networks])

    def settings(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        guidance = self.guidance
        return {
            "networks": self.names,
            "plan": self.plan and self.plan.describe(self.names, most=8),
            "steps": self.knots.steps,
            "times": np.asarray(self.knots.time, np.float64).tolist(),
            "solver": self.solver.name,
            "solver_options": to_builtin(self.solver),
            "guidance": [
                each.tolist() if isinstance(each, np.ndarray) else each for each in guidance.scale
            ],
            "interval": guidance.interval,
            "rescale": guidance.rescale,
            "weak_scale": guidance.weak_scale,
        }

    def __repr__(self) -> str:
        plan = " + ".join(self.names)
        if self.plan is not None:
            plan = self.plan.describe(self.names, most=4)
        return f"Sampler({plan}; {self.solver.name}, {self.knots.steps} steps)"


def make_sampler(
    networks: Any,
    *,
    fractions: Any = None,
    plan: Plan | None = None,
    solver: str | Solver = "ddim",
    eta: float | None = None,
    cfg_scale: Any = 1.5,
    cfg_channels: int | None = None,
    cfg_rescale: float = 0.0,
    cfg_interval: Any = None,
    auto_scale: float | None = None,
    **options: Any,
) -> Sampler:
    """The sampler of ``sample``'s options."""
    if fractions is not None and plan is not None:
        raise ValueError("give fractions or a plan, not both")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan must be a ts.Plan, got {shown(plan)}; see Plan.from_list")
    if not isinstance(solver, Solver):
        solver = make_solver(solver, eta=None if eta is None else check_number("eta", eta))
    elif eta is not None:
        raise ValueError(f"eta goes with a solver's name; give it to {solver.name} itself")
    guidance = Guidance(cfg_scale, cfg_interval, cfg_channels, cfg_rescale, auto_scale)
    chosen = fractions if plan is None else plan
    return Sampler(networks, plan=chosen, solver=solver, guidance=guidance, **options)


def sample(
    key: Key,
    networks: Sequence[Network],
    *,
    labels: Any = None,
    cond: Any = None,
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
        cond: What the other networks are conditioned on, float32 ``[B, L, D]``; or a list of
            such arrays, one for each of these, where they differ. Any length L will do.
        prompts: B texts instead, of which ``text_encoder`` makes the contexts.
        negative: What the unconditional half of guidance is given: beside prompts a text, or B
            (no text unless given); beside ``cond`` another one, for one image or B.
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
            the host: for previews and progress bars. Results are equal up to rounding.

    Returns:
        float32 ``[B, H, W, C]``, of the latents' shape if they are not decoded; with
        ``return_trajectory`` or ``return_predictions`` a tuple of it and those, each
        ``[N, B, H, W, C]``, N being the steps that ``strength`` leaves.

    Raises:
        ValueError: If any argument is not as said, or the networks do not fit together; before
            anything is compiled.
    """
    sampler = make_sampler(
        networks, fractions=fractions, plan=plan, steps=steps, spacing=spacing, solver=solver,
        eta=eta, cfg_scale=cfg_scale, cfg_channels=cfg_channels, cfg_rescale=cfg_rescale,
        cfg_interval=cfg_interval, auto_scale=auto_scale, autoencoder=autoencoder,
        text_encoder=text_encoder,
    )  # fmt: skip
    keep = [name for name, wanted in zip(KEEP, (return_trajectory, return_predictions), strict=True)
            if wanted]  # fmt: skip
    samples = sampler(
        key, labels=labels, prompts=prompts, cond=cond, negative=negative, size=size,
        noise=noise, start=start, strength=strength, decode=decode, keep=keep, callback=callback,
    )  # fmt: skip
    output = samples.images if decode else samples.latents
    kept = [getattr(samples, name) for name in keep]
    return (output, *kept) if kept else output
