"""Records and type aliases that the whole library shares. Nothing here computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeVar,
    dataclass_transform,
    runtime_checkable,
)

import jax
import numpy as np
from jaxtyping import Array, Float

Params = Any
"""A pytree of arrays; for the networks of this library a plain nested dict."""

Cond = Any
"""A pytree of arrays with a leading batch axis: the conditioning of one network, such as int32
``[B]`` class labels or float32 ``[B, L, D]`` encoded texts. Only that network looks inside."""

Key = jax.Array
"""A typed PRNG key, as ``jax.random.key`` makes."""

Leaf = Any
"""An array of a record: NumPy on the host, a ``jax.Array`` or a tracer where JAX maps over it."""

State = Any
"""A solver's own pytree, carried from step to step; ``()`` where it needs none."""

T = TypeVar("T", bound=type)


def static(**options: Any) -> Any:
    """A field of a ``record`` that is configuration, compared by value, and no array."""
    return dataclasses.field(metadata={"static": True}, **options)


def _brief(value: Any) -> str:
    """A field's value in a record's repr: arrays by dtype and shape, large trees by size."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]" if value.shape else str(value)
    leaves = jax.tree.leaves(value)
    if isinstance(value, dict) and leaves:
        return f"<{sum(leaf.size for leaf in leaves):,} parameters>"
    return repr(value)


def _repr(self: Any) -> str:
    fields = ", ".join(
        f"{field.name}={_brief(getattr(self, field.name))}" for field in dataclasses.fields(self)
    )
    return f"{type(self).__name__}({fields})"


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def record(cls: T) -> T:
    """A frozen dataclass that is a pytree: its fields are children, those made by ``static`` not.

    Nothing is checked when one is made, since JAX makes them of tracers, shapes and shardings, too;
    the functions that make records for users check their arguments.
    """
    if "__repr__" not in vars(cls):
        cls.__repr__ = _repr  # pyright: ignore[reportAttributeAccessIssue]
    made = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    return jax.tree_util.register_dataclass(made)


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


@record
class Knots:
    """The sampling grid: N+1 points from noise (0) to data (N). One point of it is a *knot*.

    A knot is the same record with scalar leaves, which is what ``lax.scan`` passes to the step.

    Attributes:
        index: int32 ``[N+1]``, the number of the point.
        step: int32 ``[N+1]``, the sampling step. The loop sets it to the current step, also where a
            solver evaluates at the step's far end, since everything given by step (the plan, a
            scale per step) is looked up by it.
        time: float32 ``[N+1]``, the time that the network is given.
        alpha: float32 ``[N+1]``, the signal's coefficient; 1 at the last point.
        sigma: float32 ``[N+1]``, the noise's standard deviation; 0 at the last point.
        steps: N. Static, so that data given by step is checked against it while tracing.
    """

    index: Leaf
    step: Leaf
    time: Leaf
    alpha: Leaf
    sigma: Leaf
    steps: int = static()


class Prediction(NamedTuple):
    """A denoiser's prediction at ``x_t``, whatever target its network was trained for.

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


class Condition(NamedTuple):
    """The conditioning of a batch: two pytrees of equal structure with a leading batch axis.

    Attributes:
        given: The conditioning of each image, such as its label.
        null: That of the unconditional half of guidance, such as the null label; None without
            guidance.
    """

    given: Cond
    null: Cond = None


@runtime_checkable
class Denoiser(Protocol):
    """A callable pytree: its arrays are leaves, its configuration is static.

    Takes noisy images, float32 ``[B, H, W, C]``, one knot and their conditioning. Guidance and
    stitching take denoisers and return a denoiser.

    A denoiser may also have ``prepare(shape, cond, platform) -> (denoiser, cond)``, which computes
    once, before the loop, what does not depend on the step; see ``prepare``.
    """

    def __call__(self, x: jax.Array, knot: Knots, cond: Condition, /) -> Prediction: ...


Denoise = Callable[[jax.Array, Knots], Prediction]
"""A denoiser with its conditioning filled in: all that a solver sees."""


class Solver:
    """A numerical method: a ``record`` that knows nothing about networks.

    The first evaluation in a step must be the prediction at ``knot`` itself.

    Attributes:
        name: Its name in error messages.
        needs_consistency: Whether x0 must come from consistency networks.
    """

    name: ClassVar[str] = "solver"
    needs_consistency: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        """Whether ``step`` takes noise."""
        return False

    def init(self, x: jax.Array) -> State:
        """The state before the first step, for the noise ``x``, float32 ``[B, H, W, C]``."""
        return ()

    def step(
        self, denoise: Denoise, x: jax.Array, state: State, knot: Knots, next_knot: Knots,
        noise: jax.Array | None,
    ) -> tuple[jax.Array, State]:  # fmt: skip
        """``x`` and the state at ``next_knot``, from those at ``knot``.

        ``noise`` is standard normal with the shape of ``x``; None unless ``stochastic``.
        """
        raise NotImplementedError

    def evaluations(self, knots: Knots) -> np.ndarray:
        """How often each step evaluates the denoiser, int ``[N]``."""
        return np.ones(knots.steps, int)
