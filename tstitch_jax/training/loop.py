"""The training loop: resumable to the bit, with progress, a log, and previews."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import as_json, check_whole, shown
from tstitch_jax.core.files import write_text
from tstitch_jax.core.types import Params
from tstitch_jax.hub import resolve
from tstitch_jax.jobs.folder import held_folder, remove_unfinished
from tstitch_jax.models.build import (
    check_card,
    check_classes,
    make_network,
    module_of,
)
from tstitch_jax.models.cards import Card, FeatureCard
from tstitch_jax.models.measure import init_params
from tstitch_jax.models.store import check_place, save
from tstitch_jax.training.classification import accuracy, make_classifier_loss
from tstitch_jax.training.data import (
    ArrayImages,
    Images,
    NoSplit,
    batch_indices,
    normalize,
    open_images,
)
from tstitch_jax.training.loss import check_times, make_loss
from tstitch_jax.training.state import TrainState, init_state, make_optimizer, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What the training of any network is given.

    Attributes:
        card: The network to be trained; its sizes and checksum are filled in.
        data: A spec for ``open_images``.
        steps: Optimizer steps. Besides the place of the data the only setting that may change when
            a run is resumed, and only while the cooldown has not begun.
        batch: Images per step.
        learning_rate, warmup, cooldown, weight_decay, clip: See ``make_optimizer``; in steps.
        ema: Decay of the average of parameters that becomes the network.
        seed: Seed of the parameters, the batches and the noise.
        save_every: Steps between checkpoints.
        stored_dtype: What the finished network's parameters are stored in.
        init: Name or folder of a network of the same architecture and sizes, whose parameters the
            run starts from; empty for new ones.
    """

    card: Card | FeatureCard
    data: str
    steps: int
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    cooldown: int = 500
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500
    stored_dtype: str = "float32"
    init: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(BaseConfig):
    """A run that trains a denoiser; a file in ``configs/`` holds one as ``config``.

    Attributes:
        label_dropout: Probability of the null label.
        min_snr: See ``weights``; None weighs all times alike.
        times: The part of the training times, from data (0) to noise (1), that is trained on. A
            network for the last 60% of a trajectory needs (0, 0.6) only.
    """

    card: Card
    label_dropout: float = 0.1
    min_snr: float | None = 5.0
    times: tuple[float | int, float | int] = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(BaseConfig):
    """A run that trains a classifier. The accuracy on the data's test split, where it has one, is
    logged at every checkpoint.

    Attributes:
        label_smoothing: Share of the wanted probability that all classes are given alike.
        shift, flip: See ``augment``.
    """

    card: FeatureCard
    label_smoothing: float = 0.1
    shift: int = 2
    flip: float = 0.5


Config = TrainConfig | ClassifierConfig

SETTINGS = "settings.json"


def _check(config: Config) -> None:
    """Raises ValueError for what would fail, or silently train something else, later on."""
    kind = FeatureCard if isinstance(config, ClassifierConfig) else Card
    if not isinstance(config.card, kind):
        raise ValueError(f"card must be a {kind.__name__}, got {config.card!r}")
    if not isinstance(config.data, str):
        raise ValueError(f"data must be text, such as 'tfds:mnist', got {shown(config.data)}")
    whole = dict(steps=1, batch=1, save_every=1, warmup=0, cooldown=0, seed=0)
    tiny = np.finfo(np.float32).tiny
    numbers = [
        ("learning_rate", tiny, np.inf),
        ("weight_decay", 0, np.inf),
        ("clip", tiny, np.inf),
        ("ema", 0, 1),
    ]
    if isinstance(config, ClassifierConfig):
        if config.card.architecture != "classifier":
            raise ValueError(f"cannot train the architecture {config.card.architecture!r}")
        whole["shift"] = 0
        numbers += [("label_smoothing", 0, 1), ("flip", 0, 1)]
    else:
        numbers.append(("label_dropout", 0, 1))
        if config.min_snr is not None:
            numbers.append(("min_snr", tiny, np.inf))
        check_times(config.times)
    for field, low in whole.items():
        check_whole(field, getattr(config, field), low, 2**32 - 1)
    for field, low, high in numbers:
        value = getattr(config, field)
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{field} must be a number from {low:g} to {high:g}, got {value!r}")
    if config.stored_dtype not in ("float32", "float16"):
        raise ValueError(f"stored_dtype must be float32 or float16, got {config.stored_dtype!r}")
    if config.warmup + config.cooldown > config.steps:
        raise ValueError(
            f"warmup {config.warmup} and cooldown {config.cooldown} need at least as many steps, "
            f"got {config.steps}"
        )


def _check_images(images: Images, config: Config) -> None:
    if len(images) < 1:
        raise ValueError(f"{config.data} holds no images")
    found, _ = images.read([0])
    if found.dtype != np.uint8 or found.shape[1:] != tuple(config.card.image_shape):
        raise ValueError(
            f"{config.data} holds {found.dtype} images of {found.shape[1:]}, "
            f"the network takes uint8 of {tuple(config.card.image_shape)}"
        )
    if isinstance(images, ArrayImages):  # others are checked batch by batch
        _check_labels(images.labels, config)


def _check_labels(labels: np.ndarray, config: Config) -> None:
    if labels.min() < 0 or labels.max() >= config.card.num_classes:
        raise ValueError(
            f"{config.data} has labels {labels.min()} to {labels.max()}, "
            f"the network takes 0 to {config.card.num_classes - 1}"
        )


def _start(config: Config) -> Params | None:
    """The parameters that a run starts from; None for new ones.

    Raises:
        ValueError: If they are not of the network to be trained.
    """
    if not config.init:
        return None
    network = resolve.load(config.init)
    given, wanted = network.card, config.card
    fields = ["architecture", "config", "image_shape", "num_classes"]
    if isinstance(wanted, Card):
        fields += ["target", "learned_variance", "schedule"]
    pairs = [(name, getattr(given, name, None), getattr(wanted, name)) for name in fields]
    # As JSON has them, which knows no tuples.
    said = [f"{name} {a!r} for {b!r}" for name, a, b in pairs if json.dumps(a) != json.dumps(b)]
    if said:
        raise ValueError(
            f"{wanted.name} cannot start from {config.init}, which has {'; '.join(said)}"
        )
    return network.params


def _keep_settings(config: Config, file: Path, done: int | None) -> None:
    """Writes the settings of a run; refuses to go on with ones that would change it.

    Args:
        config: The settings.
        file: Where they are kept.
        done: Steps done so far, None for a new run.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=as_json))
    # The folders of generated images and of sweeps have a file of that name, too.
    if done is None and file.exists() and b'"learning_rate"' not in file.read_bytes():
        raise ValueError(f"{file} is not that of a training run; take another --out")
    if done is not None:
        try:
            # A setting that did not exist yet had what is now its default.
            defaults = {
                field.name: field.default
                for field in dataclasses.fields(config)
                if field.default is not dataclasses.MISSING
            }
            old = json.loads(json.dumps(defaults)) | json.loads(file.read_text())
            changed = [k for k in settings if settings[k] != old[k] and k not in ("data", "steps")]
            end = min(old["steps"], config.steps) - config.cooldown
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is missing or damaged: {error!r}") from None
        if changed:
            said = "; ".join(f"{k} was {old[k]!r}, is {settings[k]!r}" for k in changed)
            raise ValueError(
                f"{file.parent} holds a run with other settings: {said}; take another --out"
            )
        if config.steps != old["steps"] and done > end:
            raise ValueError(
                f"{file.parent} has done {done} steps; its {old['steps']} steps can become "
                f"{config.steps} only before the cooldown, which begins after {end}"
            )
    write_text(file, json.dumps(settings, indent=2) + "\n")


def _cut_log(file: Path, step: int) -> None:
    """Drops what a killed run logged after its last checkpoint."""
    if not file.exists():
        return
    with file.open(newline="") as stream:
        header, *rows = list(csv.reader(stream)) or [[]]
    if not header:
        file.unlink()
        return
    kept = [row for row in rows if row and int(row[0]) <= step]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *kept])
    write_text(file, text.getvalue())


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Within it Ctrl-C and SIGTERM only fill the list, for the loop to save first; once each."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _objective(config: Config) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The module that is trained, its loss, and what makes a network of a card and parameters."""

    def apply(params: Params, *inputs: jax.Array) -> Any:
        return module.apply({"params": params}, *inputs)

    if isinstance(config, ClassifierConfig):
        check_classes(config.card)
        module = module_of(config.card)
        loss = make_classifier_loss(
            apply, shift=config.shift, flip=config.flip, label_smoothing=config.label_smoothing
        )
        return module, loss, make_network
    schedule = check_card(config.card)
    module = module_of(config.card)
    loss = make_loss(
        apply,
        schedule,
        config.card.target,
        learned_variance=config.card.learned_variance,
        min_snr=config.min_snr,
        label_dropout=config.label_dropout,
        null_label=config.card.num_classes,
        times=config.times,
    )
    return module, loss, make_network


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    images: Images | None = None,
    held_out: Images | None = None,
    preview: Callable[[Any, Path], None] | None = None,
    progress: bool = True,
) -> Any:
    """Trains a network, or goes on where an earlier run with the same settings stopped.

    Ctrl-C or SIGTERM stops it after the step under way, which is saved; a second one at once.

    Args:
        config: The run.
        out: Its folder: ``settings.json``, ``log.csv``, ``checkpoints/``, previews, and at the end
            ``network/``, the network's folder.
        images: The data, instead of opening ``config.data``.
        held_out: The test split of a classifier's data, likewise.
        preview: Called with the averaged network and the path of a PNG at every checkpoint.
        progress: Whether to show a progress bar.

    Returns:
        The network with averaged parameters, a ``Network`` or a ``FeatureNetwork``.

    Raises:
        ValueError: If settings and data do not fit, or ``out`` holds other things or a run with
            other settings, or another process works on it.
        OSError: If it cannot be written.
        FloatingPointError: If the loss is not finite.
        KeyboardInterrupt: If it was asked to stop, and has saved.
    """
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    classifies = isinstance(config, ClassifierConfig)
    _check(config)
    if images is None:
        images = open_images(config.data)
        if classifies:
            with contextlib.suppress(NoSplit):
                held_out = open_images(config.data, "test")
    _check_images(images, config)
    if held_out is not None:
        _check_images(held_out, config)
    module, loss, make = _objective(config)
    optimizer = make_optimizer(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        cooldown=config.cooldown,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    init_key, key = jax.random.split(jax.random.key(config.seed))
    step_fn = make_step(loss, optimizer, config.ema)

    out = Path(out)
    log_file = out / "log.csv"
    check_place(out / "network")
    names = [folder.name for folder in (out / "checkpoints").glob("*")]
    last = max((int(name) for name in names if name.isdigit()), default=None)
    first_params = _start(config) if last is None else None

    def averaged(state: TrainState) -> Any:
        return make(config.card, state.ema)

    def fresh(params: Params) -> TrainState:
        return init_state(params, optimizer)

    def new_params() -> Params:
        return init_params(module, init_key)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held_folder(out, SETTINGS))
        _keep_settings(config, out / SETTINGS, last)
        remove_unfinished(out)
        manager = stack.enter_context(
            ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)
        )
        if last is None:
            state = fresh(new_params() if first_params is None else first_params)
        else:
            target = jax.eval_shape(lambda: fresh(new_params()))
            state = manager.restore(last, args=ocp.args.StandardRestore(target))
        start = int(state.step)
        _cut_log(log_file, start)
        new_log = not log_file.exists()
        with (
            log_file.open("a", newline="") as stream,
            tqdm(
                total=config.steps * config.batch,
                initial=start * config.batch,
                unit="img",
                unit_scale=True,
                disable=not progress,
                desc=config.card.name,
                smoothing=0.05,
            ) as bar,
            _asked_to_stop() as stop,
        ):
            log = csv.writer(stream)
            if new_log:
                log.writerow(["step", "loss", "gradient_norm", *["accuracy"] * classifies])
                stream.flush()
            pending = []  # metrics left on the device, so that it need not wait for the host
            for step in range(start, config.steps):
                x, y = images.read(
                    batch_indices(config.seed, step, config.batch, len(images)).tolist()
                )
                _check_labels(y, config)
                state, metrics = step_fn(state, key, jnp.asarray(normalize(x)), jnp.asarray(y))
                pending.append([metrics["loss"], metrics["gradient_norm"]])
                bar.update(config.batch)
                done = step + 1
                due = done % config.save_every == 0 or done == config.steps
                save_now = due or bool(stop)
                # Also at a checkpoint, so that a run that goes on from it logs the same means.
                if done % 50 == 0 or save_now:
                    means = np.asarray(pending, np.float64).mean(axis=0)
                    pending = []
                    if not np.isfinite(means[0]):
                        raise FloatingPointError(
                            f"the loss is {means[0]} by step {done}; lower the learning rate. "
                            f"The last checkpoint in {out} is whole"
                        )
                    score = ""
                    if classifies and due and held_out is not None:
                        score = f"{accuracy(averaged(state), held_out):.4f}"
                    log.writerow([done, *(f"{v:.6g}" for v in means), *[score] * classifies])
                    bar.set_postfix(loss=f"{means[0]:.4f}")
                if save_now:
                    stream.flush()
                    manager.save(done, args=ocp.args.StandardSave(state))
                    if due and preview is not None:
                        preview(averaged(state), out / f"preview_{done:06d}.png")
                    if stop:
                        raise KeyboardInterrupt
        network = averaged(state)
        save(out / "network", network, np.dtype(config.stored_dtype))
    return network
