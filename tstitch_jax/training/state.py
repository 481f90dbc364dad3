"""What a training run carries from step to step, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tstitch_jax.core.types import Key, Params


class TrainState(NamedTuple):
    """Everything a run needs to go on; the batch and the noise follow from the seed and ``step``.

    Attributes:
        step: int32 scalar, steps done.
        params: The parameters being trained.
        ema: Their exponential moving average, which is what sampling uses.
        opt_state: Optax's state.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: Any


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    warmup: int,
    cooldown: int,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """AdamW, clipped by global norm; the rate rises linearly, stays, and falls to 0 at the end.

    Until the cooldown begins, the updates do not depend on ``steps``, so a run may be prolonged.
    """
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, cooldown, steps - cooldown - warmup),
        ],
        [warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(rate, b2=0.99, weight_decay=weight_decay)
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_step(
    loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation, ema: float
) -> Callable[[TrainState, Key, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step ``(state, key, images, labels) -> (state, {"loss", "gradient_norm"})``.

    ``key`` is the run's; the step folds its own number in. The average follows with
    ``min(ema, (1 + n) / (10 + n))`` after n steps.
    """

    def step(state: TrainState, key: Key, images: jax.Array, labels: jax.Array):
        key = jax.random.fold_in(key, state.step)
        value, gradient = jax.value_and_grad(loss)(state.params, key, images, labels)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1 + count) / (10 + count))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)
        norm = optax.tree.norm(gradient)
        new = TrainState(state.step + 1, params, average, opt_state)
        return new, {"loss": value, "gradient_norm": norm}

    return jax.jit(step, donate_argnums=0)
