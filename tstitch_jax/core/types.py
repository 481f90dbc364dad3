"""Records and type aliases that the whole library shares. Nothing here computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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


Denoiser = Callable[[Params, jax.Array, Knots, Cond], Prediction]
"""A pure function from parameters, noisy images float32 ``[B, H, W, C]``, one knot and conditioning
to a prediction. Guidance and stitching are functions from denoisers to a denoiser."""


Denoise = Callable[[jax.Array, Knots], Prediction]
"""A denoiser with its parameters and conditioning filled in: all that a solver sees."""


State = Any
"""A solver's own pytree, carried from step to step; ``()`` where it needs none."""


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
