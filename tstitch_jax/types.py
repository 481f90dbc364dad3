"""Records and type aliases that the whole library shares. Nothing here computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

Params = Any
"""A pytree of arrays; for the networks of this library a plain nested dict."""

Cond = Any
"""A pytree of arrays with a leading batch axis that a denoiser is conditioned on, here int32
``[B]`` class labels or float32 ``[B, L, D]`` contexts."""

Key = jax.Array
"""A typed PRNG key, as ``jax.random.key`` makes."""


Leaf = Any
"""An array of a record: NumPy on the host, a ``jax.Array`` where it is traced, and whatever else
JAX puts in an array's place."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A forward process ``x_t = alpha(t) x_0 + sigma(t) eps`` sampled at its training times.

    Host arrays in NumPy float64, ordered from data to noise.

    Attributes:
        name: The name it was made from, e.g. ``"linear"``.
        times: ``[T]``, the time that the network is given at each training step.
        alpha: ``[T]``, the signal's coefficient.
        sigma: ``[T]``, the noise's coefficient (a standard deviation).
    """

    name: str
    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def num_train_steps(self) -> int:
        return len(self.times)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("times", "alpha", "sigma")
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Knots:
    """The sampling grid: N+1 points from noise (0) to data (N). One point of it is a *knot*.

    A knot is the same record with scalar leaves, which is what ``lax.scan`` hands to the step.

    Attributes:
        index: int32 ``[N+1]``, the number of the point.
        step: int32 ``[N+1]``, the sampling step that asks. The loop sets it to the step under way,
            also where a solver asks at the step's far end, since whatever goes by steps (the plan,
            a scale per step) is looked up by it.
        time: float32 ``[N+1]``, the time that the network is given.
        alpha: float32 ``[N+1]``, the signal's coefficient; 1 at the last point.
        sigma: float32 ``[N+1]``, the noise's standard deviation; 0 at the last point.
        steps: N. Static, so that data given by steps is checked against it while tracing.
    """

    index: Leaf
    step: Leaf
    time: Leaf
    alpha: Leaf
    sigma: Leaf
    steps: int = dataclasses.field(metadata={"static": True})


class Prediction(NamedTuple):
    """What a denoiser says of ``x_t``, whatever target its network was trained for.

    Attributes:
        x0: float32 ``[B, H, W, C]``, the clean image.
        eps: float32 ``[B, H, W, C]``, the noise; ``x_t = alpha x0 + sigma eps``.
        variance: float32 ``[B, H, W, C]`` or None. Where the network learned the variance of the
            reverse step: its place in log space between the smallest (0, the posterior's) and the
            largest (1, the forward step's); Nichol & Dhariwal 2021, equation 15.
    """

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    variance: Float[Array, "b h w c"] | None = None


class Features(NamedTuple):
    """What a feature network says of images; everything float32.

    Attributes:
        pool: ``[B, D]``, its last layer before the classifier, pooled over the image.
        logits: ``[B, K]``, of its classes, without a bias where the published measure has none;
            None without classes.
        spatial: ``[B, S]``, an inner layer's values at every place, flattened; None without one.
    """

    pool: Float[Array, "b d"]
    logits: Float[Array, "b k"] | None = None
    spatial: Float[Array, "b s"] | None = None


Denoiser = Callable[[Params, jax.Array, Knots, Cond], Prediction]
"""A pure function from parameters, noisy images float32 ``[B, H, W, C]``, one knot and conditioning
to a prediction. Guidance and stitching are functions from denoisers to a denoiser."""

Denoise = Callable[[jax.Array, Knots], Prediction]
"""A denoiser with its parameters and conditioning filled in: all that a solver sees."""

State = Any
"""A solver's own pytree, carried from step to step; ``()`` where it needs none."""


class Tokenizer(NamedTuple):
    """From texts to the numbers of tokens that a text encoder takes.

    Attributes:
        encode: ``texts -> ids``, NumPy int32 ``[B, T]``: start, text, end, and what fills it up. A
            text that is too long is cut, with a warning that says what is left out.
        files: The files it was made from, by name; they are kept in the folders of networks.
        size: How many tokens there are.
    """

    encode: Callable[[Sequence[str]], np.ndarray]
    files: Mapping[str, bytes]
    size: int


class Solver(NamedTuple):
    """A numerical method as two pure functions; it knows nothing about networks.

    What ``step`` asks the denoiser first is the prediction at ``knot`` itself.

    Attributes:
        init: ``x -> state`` for the noise ``x``, float32 ``[B, H, W, C]``.
        step: ``(denoise, x, state, knot, next_knot, noise) -> (x, state)``, from ``knot`` to
            ``next_knot``; ``noise`` is standard normal with the shape of ``x``, or None where the
            solver is not stochastic.
        stochastic: Whether ``step`` takes noise.
        name: What errors call it.
        needs_consistency: Whether x0 must come from consistency networks.
    """

    init: Callable[[jax.Array], State]
    step: Callable[
        [Denoise, jax.Array, State, Knots, Knots, jax.Array | None], tuple[jax.Array, State]
    ]
    stochastic: bool
    name: str = "solver"
    needs_consistency: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseCard:
    """What there is to know of any network besides its parameters; ``card.json`` in its folder.

    Attributes:
        name: Its short name.
        architecture: The registered name of the Flax module, e.g. ``"dit"``.
        config: The keyword arguments of that module.
        num_params: Number of parameters.
        macs: Multiply-adds of one forward pass of one image.
        source: Where it comes from: a file, a hub, or the command that trained it.
        source_checksum: SHA-256 of the file it was converted from, hexadecimal; of several files,
            that of the text with one line ``"SHA-256  NAME"`` for each, in order of name.
        data: What it was trained on.
        license: The license of the weights.
        checksum: SHA-256 of the parameters, hexadecimal.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    num_params: int = 0
    macs: int = 0
    source: str = ""
    source_checksum: str = ""
    data: str = ""
    license: str = ""
    checksum: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(BaseCard):
    """The card of a network that denoises images, or the latents of an autoencoder.

    Attributes:
        image_shape: ``(H, W, C)`` of its input.
        target: What its output is: ``"eps"``, ``"v"``, ``"x0"`` or ``"flow"``.
        learned_variance: Whether a second half of the output channels holds the variance.
        schedule: The arguments of ``make_schedule``.
        num_classes: Number of classes; the null label of guidance is this number itself. 0 for a
            network that is conditioned on a context.
        context: ``(L, D)``, length and width of the contexts that it is conditioned on, such as
            encoded texts; None with classes.
        class_names: Their names, or empty.
        guidance_channels: How many of the first channels guidance acts on by default; None for all.
        autoencoder: The name of the autoencoder whose latents it denoises; empty for images.
        text_encoder: The name of the text encoder that makes its contexts; empty without one.
        consistency: Whether it was distilled to a consistency network, whose x0 is a sample.
    """

    image_shape: tuple[int, int, int]
    target: str
    learned_variance: bool
    schedule: dict[str, Any]
    num_classes: int
    context: tuple[int, int] | None = None
    class_names: tuple[str, ...] = ()
    guidance_channels: int | None = None
    autoencoder: str = ""
    text_encoder: str = ""
    consistency: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderCard(BaseCard):
    """The card of an autoencoder.

    Attributes:
        image_shape: ``(H, W, C)`` of the images it was trained on.
        scaling_factor: What the encoder's output is multiplied by to give latents.
    """

    image_shape: tuple[int, int, int]
    scaling_factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureCard(BaseCard):
    """The card of a network whose features images are compared in, with each other or with texts.

    Attributes:
        image_shape: ``(H, W, C)`` of the images it was trained on.
        num_classes: Number of its classes; 0 of one that knows texts instead.
        class_names: Their names, or empty.
        tokenizer_checksum: As of ``TextEncoderCard``; empty of one that knows no texts.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] = ()
    tokenizer_checksum: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderCard(BaseCard):
    """The card of a network that makes contexts of texts, for others to be conditioned on.

    Attributes:
        tokenizer_checksum: SHA-256 of the text with one line ``"SHA-256  NAME"`` for each file of
            its tokenizer, in order of name.
    """

    tokenizer_checksum: str = ""


class Precomputed(NamedTuple):
    """A network's parameters, and what is computed of them alone (``Network.precompute``)."""

    params: Params
    forms: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A denoiser with its parameters and its card: what ``load`` returns.

    Attributes:
        denoiser: The denoiser.
        params: Its parameters.
        card: What it is.
        schedule: The forward process it was trained on.
        rows: How many rows a TPU's fast memory holds the activations of, above which ``sample``
            lets it work in pieces; None for any number. Guidance asks for two rows an image.
        multiple: What divides the height and width of its inputs; None where it takes those of its
            card alone.
        precompute: ``(params, x, cond) -> forms``, by the shapes of x and cond: what a loop on a
            CPU would compute of the parameters alone in every step. This denoiser takes it beside
            them, as ``Precomputed``; None where there is nothing, or with another denoiser.
    """

    denoiser: Denoiser
    params: Params
    card: Card
    schedule: Schedule
    rows: int | None = None
    multiple: int | None = None
    precompute: Callable[[Params, Any, Any], Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """The way from images to latents and back, with its parameters and its card.

    Attributes:
        encode: ``(params, images, noise) -> latents``: float32 ``[B, H, W, C]`` in [-1, 1] to
            float32 ``[B, H/f, W/f, D]``. With ``noise``, float32 of the latents' shape, a sample
            of the posterior, with None its mean.
        decode: ``(params, latents) -> images``, not clipped.
        params: Its parameters, a nested dict.
        card: What it is.
        factor: ``f``, how many times smaller latents are than images.
        channels: ``D``, the latents' channels.
    """

    encode: Callable[[Params, jax.Array, jax.Array | None], jax.Array]
    decode: Callable[[Params, jax.Array], jax.Array]
    params: Params
    card: AutoencoderCard
    factor: int
    channels: int


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network whose features images are compared in, with its parameters and its card.

    Attributes:
        extract: ``(params, pixels) -> Features``; pixels are ``[B, H, W, C]`` with values from 0 to
            255, uint8 or float32.
        params: Its parameters, a nested dict.
        card: What it is.
        dtype: What it computes in, ``"float32"`` or ``"bfloat16"``.
        embed: ``(params, ids) -> vectors`` of texts, int32 ``[B, T]`` to float32 ``[B, D]``, in the
            space of the pooled features; None of a network that knows no texts.
        tokenizer: What makes ``ids`` of texts; None without ``embed``.
    """

    extract: Callable[[Params, jax.Array], Features]
    params: Params
    card: FeatureCard
    dtype: str = "float32"
    embed: Callable[[Params, jax.Array], jax.Array] | None = None
    tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """The way from texts to contexts that a denoiser is conditioned on.

    ``encoder.encode(encoder.params, encoder.tokenizer.encode(texts))`` is the context of texts.

    Attributes:
        encode: ``(params, ids) -> context``: int32 ``[B, T]`` to float32 ``[B, T, D]``.
        params: Its parameters, a nested dict.
        card: What it is.
        tokens: T, the length of a text.
        width: D.
        tokenizer: What makes ``ids`` of texts; None where they come from elsewhere.
    """

    encode: Callable[[Params, jax.Array], jax.Array]
    params: Params
    card: TextEncoderCard
    tokens: int
    width: int
    tokenizer: Tokenizer | None = None
