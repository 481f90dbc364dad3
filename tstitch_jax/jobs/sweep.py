"""Quality against time over many ways of sampling: a resumable job."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import statistics
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from tstitch_jax.core.checks import as_json, check_number, check_whole, is_list, shown
from tstitch_jax.core.files import write_text
from tstitch_jax.core.plan import Plan
from tstitch_jax.core.types import Condition
from tstitch_jax.evaluation import METRICS, evaluate, metric_key, metric_name, open_source
from tstitch_jax.evaluation.request import check_features, check_request
from tstitch_jax.evaluation.sources import Source
from tstitch_jax.hub import resolve
from tstitch_jax.jobs.folder import held_folder, remove_unfinished
from tstitch_jax.jobs.generate import generate
from tstitch_jax.jobs.shards import differences
from tstitch_jax.jobs.timing import pareto_front, pass_seconds, passes, timed
from tstitch_jax.models import devices
from tstitch_jax.models.conditioning import check_texts
from tstitch_jax.models.families import conditioner_of
from tstitch_jax.models.types import FeatureNetwork, Network
from tstitch_jax.report import charts, pictures
from tstitch_jax.sampling.checks import MAX_BATCH
from tstitch_jax.sampling.program import SampleRequest
from tstitch_jax.sampling.sampler import Sampler, make_sampler

SETTINGS, TIMES, RESULTS = "settings.json", "times.json", "results.csv"

ROUNDS = 5
"""Timed runs of each point, after one that warms up; a median needs no more."""

DEFAULTS: dict[str, Any] = dict(
    fractions=None, plan=None, steps=50, spacing="respaced", solver="ddim", eta=None,
    cfg_scale=1.5, cfg_channels=None, cfg_rescale=0.0, cfg_interval=None, auto_scale=None,
    size=None,
)  # fmt: skip
"""Options of a point."""

OF_TEXTS = ("negative", "text_encoder")
"""Options of a point of networks that take texts, besides ``DEFAULTS``."""

NOISE = 0.02
"""By what share a time may be longer and count as equal: measured again, it differs by as much."""

LOWER_IS_BETTER = ("fid", "sfid", "fid_infinity", "kid")
"""The measures that are distances; of the others more is better."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One way of sampling, and where it stands in the charts.

    Attributes:
        series: The curve that it belongs to.
        x: Its place on the horizontal axis: a number, or in a sweep without an axis a name.
        networks: Names or folders, as ``load`` takes them, first steps first.
        options: Those of ``sample``: ``fractions`` or ``plan`` (a ``Plan``, or the list of its
            networks by step), ``steps``, ``spacing``, ``solver``, ``eta``, ``cfg_scale``,
            ``cfg_channels``, ``cfg_rescale``, ``cfg_interval``, ``auto_scale``, ``size``. With
            prompts also ``negative``, and ``text_encoder``: a name, or one for each network;
            those that the networks' cards name unless given.
    """

    series: str
    x: float | int | str
    networks: Sequence[str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep; a file in ``configs/`` holds one as ``config``.

    Attributes:
        points: The ways of sampling; no two of a series at one x.
        reference: What the images are measured against (``open_source``); None where no measure
            needs it.
        features: Name or folder of the feature network.
        metrics: Of ``evaluation.METRICS``; the first is set against time.
        num: Images of each point and seed.
        seeds: Of the images, the same at all points; more may be added later.
        batch: Images of a device at a time, at most 2^16.
        x_label: What the horizontal axis is.
        dtype: What the networks compute in, ``"float32"`` or ``"bfloat16"``.
        prompts: For networks that are conditioned on texts: image i is of text
            ``prompts[i % len(prompts)]``, at all points. ``"clip_score"`` measures how well.
        keep_images: Whether to keep all images, and not only the first ten of each point.
    """

    points: Sequence[Point]
    reference: str | None
    features: str
    metrics: Sequence[str]
    num: int
    seeds: Sequence[int]
    x_label: str
    batch: int = 16
    dtype: str = "float32"
    prompts: Sequence[str] | None = None
    keep_images: bool = False


class Estimate(NamedTuple):
    """What is to be expected of a point.

    Attributes:
        point: The point.
        plan: Its plan in words.
        cost: Multiply-adds of an image, those of the dearest point being 1. Of another size than
            that of a network's card they are taken to be in proportion to the pixels.
        seconds: Of an image.
    """

    point: Point
    plan: str
    cost: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedPoint:
    """A point that has been checked.

    Attributes:
        point: The point.
        name: The name of its files.
        sampler: Samples it.
        options: All of ``DEFAULTS``.
        texts: With prompts, ``prompts`` and ``negative``.
        request: A batch for each device, to measure the time of.
    """

    point: Point
    name: str
    sampler: Sampler
    options: dict[str, Any]
    texts: dict[str, Any]
    request: SampleRequest

    @property
    def networks(self) -> list[Network]:
        return self.sampler.networks

    @property
    def names(self) -> list[str]:
        return self.sampler.names

    @property
    def plan(self) -> str:
        """The plan in words, that of many runs by its counts."""
        return self.request.plan.describe(self.names, most=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that a sweep works with, checked and loaded."""

    config: SweepConfig
    ways: list[ResolvedPoint]
    features: FeatureNetwork
    reference: Source | None

    @property
    def settings(self) -> dict[str, Any]:
        """All that the values depend on, as JSON holds it, but for the seeds."""
        config, leaf = self.config, jax.tree.leaves(self.features.params)[0]
        common = {
            "reference": config.reference,
            "features": [self.features.card.name, self.features.card.checksum],
            **{k: getattr(config, k) for k in ("metrics", "num", "batch", "dtype")},
            "platform": next(iter(leaf.devices())).platform,
            "jax": jax.__version__,
        }
        if config.prompts is not None:
            common["prompts"] = list(config.prompts)
        points = {}
        for way in self.ways:
            kept = {k: v for k, v in way.options.items() if k not in ("fractions", "plan", "steps")}
            if way.texts:
                kept["negative"] = way.texts["negative"]
                encoders = [encoder.card for encoder in way.sampler.text_encoders()]
                kept["text_encoder"] = [[card.name, card.checksum] for card in encoders]
            inputs, coder = way.request.inputs, way.sampler.autoencoder
            points[way.name] = {
                "networks": [[n.card.name, n.card.checksum] for n in way.networks],
                "autoencoder": coder and coder.card.checksum,
                "plan": np.asarray(inputs.plan.networks).tolist(),
                "times": np.asarray(inputs.knots.time, np.float64).tolist(),
                **kept,
            }
        return json.loads(json.dumps({"common": common, "points": points}, default=as_json))


def _x(point: Point) -> str:
    return f"{point.x:g}" if isinstance(point.x, int | float) else str(point.x)


def _where(point: Point) -> str:
    return f"point {_x(point)} of {point.series!r}"


def _name(point: Point) -> str:
    return re.sub(r"[^\w.+-]+", "-", f"{point.series} {_x(point)}").strip("-.")


def _check(config: SweepConfig) -> None:
    """Raises ValueError for what no network need be loaded to see."""
    for name in ("points", "metrics", "seeds"):
        if not is_list(getattr(config, name)):
            raise ValueError(f"{name} must be a list, got {shown(getattr(config, name))}")
        if not len(getattr(config, name)):
            raise ValueError(f"the sweep has no {name}")
    for name, values, low, high in (
        ("num", [config.num], 1, 2**32 - 1),
        ("batch", [config.batch], 1, MAX_BATCH),
        ("each seed", config.seeds, 0, 2**32 - 1),
    ):
        for value in values:
            check_whole(name, value, low, high)
    for name in ("features", "x_label", "reference"):
        value = getattr(config, name)
        if not isinstance(value, str) and not (name == "reference" and value is None):
            raise ValueError(f"{name} must be a text, got {shown(value)}")
    if wrong := [m for m in config.metrics if not isinstance(m, str) or m not in METRICS]:
        raise ValueError(f"unknown measure {shown(wrong[0])}; choose from {', '.join(METRICS)}")
    for name in ("metrics", "seeds"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise ValueError(f"{name} must differ, got {list(getattr(config, name))}")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {shown(config.dtype)}")
    if config.prompts is not None:
        check_texts("prompts", config.prompts)
    names: dict[str, Point] = {}
    for point in config.points:
        if not isinstance(point, Point):
            raise ValueError(f"points must be ts.Point, got {shown(point)}")
        if not isinstance(point.series, str):
            raise ValueError(f"the series of a point must be a name, got {shown(point.series)}")
        if not isinstance(point.x, int | float | str):
            raise ValueError(f"{_where(point)}: x must be a finite number or a name")
        if not isinstance(point.x, str):
            check_number(f"x of a point of {point.series!r}", point.x, " or a name")
        if isinstance(point.x, str) != isinstance(config.points[0].x, str):
            raise ValueError(f"{_where(point)}: x must be numbers at all points, or names at all")
        if not is_list(point.networks) or not len(point.networks):
            raise ValueError(f"{_where(point)}: networks must be a list of names")
        if not isinstance(point.options, dict):
            raise ValueError(f"{_where(point)}: options must be a dict")
        other = names.setdefault(_name(point), point)
        if other is not point:
            raise ValueError(f"{_where(point)} and {_where(other)} have one name, {_name(point)}")


def _texts(config: SweepConfig, sampler: Sampler, given: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` is given of texts; raises ValueError if the networks take something else.

    Args:
        config: The sweep.
        sampler: A point's sampler.
        given: The point's own option ``negative``, if any.
    """
    name = sampler.names[0]
    if len(sampler.takes) > 1:
        raise ValueError(
            f"{' and '.join(sampler.names)} are conditioned on texts and on classes; a sweep is of "
            "the one or the other"
        )
    if sampler.takes == {"labels"}:
        if config.prompts is not None:
            raise ValueError(f"{name} is conditioned on classes; leave out the prompts")
        if given:
            raise ValueError(f"{min(given)} goes with prompts")
        return {}
    if config.prompts is None:
        raise ValueError(f"{name} is conditioned on texts; give the sweep prompts")
    negative = given.get("negative", "")
    if not isinstance(negative, str):
        raise ValueError(f"negative must be one text, got {shown(negative)}")
    return dict(prompts=list(config.prompts), negative=negative)


def _open_way(
    config: SweepConfig, point: Point, mesh: Mesh | None, loaded: dict[str, Any]
) -> ResolvedPoint:
    """A point's networks and its options; raises ValueError if something is wrong with them."""

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = resolve.load(name, getattr(jnp, config.dtype), mesh=mesh)
        return loaded[name]

    known = (*DEFAULTS, *OF_TEXTS)
    if wrong := sorted(point.options.keys() - set(known)):
        raise ValueError(f"no option {wrong[0]!r}; choose from {', '.join(known)}")
    of_texts = {name: point.options[name] for name in OF_TEXTS if name in point.options}
    options = DEFAULTS | {k: v for k, v in point.options.items() if k not in of_texts}
    if not isinstance(options["solver"], str):
        raise ValueError(f"the solver must be a name, got {shown(options['solver'])}")
    if isinstance(options["plan"], list | tuple | np.ndarray):
        options["plan"] = Plan.from_list(options["plan"], len(point.networks))
    networks = [load(name) for name in point.networks]
    for name, network in zip(point.networks, networks, strict=True):
        if not isinstance(network, Network):
            raise ValueError(f"{name} is not a denoiser")
    names = of_texts.pop("text_encoder", None)
    names = [names] * len(networks) if isinstance(names, str) else names
    if names is not None and not (is_list(names) and all(isinstance(n, str) for n in names)):
        raise ValueError(f"text_encoder must be a name or a list of names, got {shown(names)}")
    coder = networks[-1].card.autoencoder
    sampler = make_sampler(
        networks,
        autoencoder=load(coder) if coder else None,
        text_encoder=names and [load(name) for name in names],
        **{k: v for k, v in options.items() if k != "size"},
    )
    texts = _texts(config, sampler, of_texts | ({"text_encoder": names} if names else {}))
    count = config.batch * (1 if mesh is None else mesh.shape[devices.DATA])
    examples = [conditioner_of(network.card).example(count) for network in networks]
    scales = sampler.guidance.scale
    nulls = [
        None if scale is None else each.null for each, scale in zip(examples, scales, strict=True)
    ]
    cond = Condition(tuple(each.given for each in examples), tuple(nulls))
    if texts:  # which are checked, and their encoders loaded
        sampler.condition(prompts=texts["prompts"][:1], negative=texts["negative"])
    request = sampler.request(jax.random.key(0), cond=cond, size=options["size"])
    return ResolvedPoint(
        point=point, name=_name(point), sampler=sampler, options=options, texts=texts,
        request=request,
    )  # fmt: skip


def _open(config: SweepConfig, mesh: Mesh | None) -> _Job:
    """Checks a sweep and loads what it works with; nothing is computed, and nothing written."""
    _check(config)
    reference = None if config.reference is None else open_source(config.reference)
    features = resolve.load(config.features, mesh=mesh)
    check_features(features)
    loaded, ways = {}, []
    for point in config.points:
        try:
            ways.append(_open_way(config, point, mesh, loaded))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_where(point)}: {error}") from None
    for way in ways:
        images, *_ = jax.eval_shape(way.request.function, way.request.inputs)
        height, width, _ = images.shape[1:]
        classes = None if way.texts else way.networks[-1].card.num_classes
        samples = Source(
            name="its images", count=config.num, shape=(height, width, 3),
            labels=None if classes is None else np.arange(config.num) % classes,
        )  # fmt: skip
        try:
            check_request(
                samples, reference, features, config.metrics, None, _prompts_of_images(config)
            )
        except ValueError as error:
            raise ValueError(f"{_where(way.point)}: {error}") from None
    return _Job(config=config, ways=ways, features=features, reference=reference)


def _prompts_of_images(config: SweepConfig) -> list[str] | None:
    """The text of each image, where they are to be compared with it."""
    if config.prompts is None or "clip_score" not in config.metrics:
        return None
    return [config.prompts[i % len(config.prompts)] for i in range(config.num)]


def _rows(way: ResolvedPoint) -> np.ndarray:
    """How often an image goes through each network, float ``[K]``."""
    plan = np.asarray(way.request.plan.networks)
    return passes(way.request)[plan, np.arange(len(plan))].sum(axis=0)


def estimate(config: SweepConfig, *, mesh: Mesh | None = None) -> list[Estimate]:
    """What a sweep will cost, from one measured step of each network.

    The networks' own times, without those of text encoders, of an autoencoder and of measuring the
    images.

    Args:
        config: The sweep.
        mesh: As for ``sweep``.

    Raises:
        ValueError: As ``sweep`` does, before anything is computed.
    """
    job = _open(config, mesh)
    shapes = [way.request.config.shape for way in job.ways]
    seconds: dict[tuple[int, Any], float] = {}
    for shape in dict.fromkeys(shapes):
        ways = [way for way, own in zip(job.ways, shapes, strict=True) if own == shape]
        networks = list({id(n): n for way in ways for n in way.networks}.values())
        times = pass_seconds(networks, ways[0].request.batch, shape)
        seconds |= {(id(n), shape): each for n, each in zip(networks, times, strict=True)}
    rows = [_rows(way) for way in job.ways]

    def macs(network: Network, shape: tuple[int, ...]) -> float:
        return network.card.macs * math.prod(shape[:2]) / math.prod(network.card.image_shape[:2])

    costs = [
        float(np.dot(row, [macs(n, shape) for n in way.networks]))
        for row, way, shape in zip(rows, job.ways, shapes, strict=True)
    ]
    return [
        Estimate(
            way.point, way.plan, cost / (max(costs) or 1),
            float(np.dot(row, [seconds[id(n), shape] for n in way.networks])),
        )
        for way, cost, row, shape in zip(job.ways, costs, rows, shapes, strict=True)
    ]  # fmt: skip


def _read(file: Path) -> Any:
    """What a file of JSON holds; None if it is not there, or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1, default=as_json) + "\n")


@contextlib.contextmanager
def _opened(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Makes the folder, or accepts one of the same settings, for us alone.

    Raises:
        ValueError: If there is something else in that place, or another process works on it.
        OSError: If it cannot be written.
    """
    file = out / SETTINGS
    with held_folder(out, SETTINGS):
        old = _read(file) if file.exists() else settings
        if not isinstance(old, dict) or not old.keys() == settings.keys():
            raise ValueError(f"{file} is damaged; choose another folder")
        said = differences(old["common"], settings["common"])
        for name in old["points"].keys() & settings["points"].keys():
            said += differences(old["points"][name], settings["points"][name], name)
        if said:
            raise ValueError(
                f"{out} holds a sweep of other settings: {'; '.join(said)}; choose another folder"
            )
        _write(file, settings | {"points": old["points"] | settings["points"]})
        remove_unfinished(out)
        yield


def _times(job: _Job, file: Path, progress: bool) -> dict[str, list[float]]:
    """Seconds per image of each point and round, from the file or measured.

    Each round goes through all points, so that what slows the machine for a while slows them all.
    """
    devices = jax.tree.leaves(job.ways[0].networks[0].tree)[0].devices()
    place = [len(devices), next(iter(devices)).device_kind]
    stored, names = _read(file), [way.name for way in job.ways]
    if isinstance(stored, dict) and stored.get("devices") == place:
        times = stored["seconds_per_image"]
        if set(names) <= times.keys():
            return {name: times[name] for name in names}
    times = {name: [] for name in names}
    total = len(names) * (ROUNDS + 1)
    with tqdm(total=total, desc="timing", unit="run", disable=not progress) as bar:
        for turn in range(ROUNDS + 1):
            for way in job.ways:
                seconds = timed(way.request)
                if turn:  # the first round compiles and warms up
                    times[way.name].append(seconds)
                bar.update()
    _write(file, {"devices": place, "seconds_per_image": times})
    return times


@contextlib.contextmanager
def _followed(bar: tqdm, folder: Path, batch: int, num: int, weight: float) -> Iterator[None]:
    """Moves the bar while a job of ``generate`` fills its folder."""
    before, done = bar.n, threading.Event()

    def follow() -> None:
        while not done.wait(1):
            images = min(num, batch * len(list(folder.glob("shards/*.npz"))))
            bar.update(before + round(images * weight) - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    bar.update(before + round(num * weight) - bar.n)


def _draw(way: ResolvedPoint, images: Path, file: Path) -> None:
    """A row of the first ten images."""
    source, card = open_source(images), way.networks[-1].card
    first = next(source.read(min(10, source.count)))
    if prompts := way.texts.get("prompts"):
        chosen = [prompts[k % len(prompts)] for k in range(len(first))]
        names = [textwrap.shorten(text, 40, placeholder="...") for text in chosen]
    else:
        labels = [k % card.num_classes for k in range(len(first))]
        names = [card.class_names[k] if card.class_names else str(k) for k in labels]
    picture = pictures.grid(
        first[None].astype(np.float32) / 127.5 - 1,
        [""],
        names,
        title=f"{way.point.series}, {_x(way.point)}",
        footer=way.plan,
    )
    file.parent.mkdir(exist_ok=True)
    pictures.write_png(picture, file)


def _hashes(reference: dict[str, Any] | None) -> Any:
    return reference and (reference["sha256"], reference["statistics"])


def _measure(job: _Job, way: ResolvedPoint, seed: int, out: Path, bar: tqdm, weight: float) -> None:
    """Images of a point and seed, and then their values, in a file that is there when all is."""
    config, name = job.config, f"{way.name}-seed{seed}"
    images, result = out / "images" / name, out / "results" / f"{name}.json"
    with _followed(bar, images, config.batch, config.num, weight):
        generate(
            images, way.sampler, num=config.num, seed=seed, batch=config.batch,
            size=way.options["size"], progress=False, **way.texts,
        )  # fmt: skip
    found = evaluate(
        images, job.reference, features=job.features, metrics=config.metrics,
        prompts=_prompts_of_images(config), cache=out / ".features", progress=False,
    )  # fmt: skip
    for other in out.glob("results/*.json"):
        known = _read(other)
        if isinstance(known, dict) and _hashes(known["reference"]) != _hashes(found.reference):
            raise ValueError(
                f"the reference {config.reference} is no longer that of {other}; restore it, or "
                "choose another folder"
            )
    if seed == config.seeds[0]:
        _draw(way, images, out / "pictures" / f"{way.name}.png")
    result.parent.mkdir(exist_ok=True)
    point = dataclasses.asdict(way.point) | {"plan": way.plan}
    _write(result, {"point": point, "seed": seed, **dataclasses.asdict(found)})


def _guidance(options: dict[str, Any]) -> str:
    """The guidance of a point in words."""
    scale, auto = options["cfg_scale"], options["auto_scale"]
    parts = [] if scale is None else [f"{scale}"]
    parts += [] if auto is None else [f"auto {auto:g}"]
    if options["cfg_interval"] is not None:
        parts.append("at {:g} to {:g}".format(*options["cfg_interval"]))
    return ", ".join(parts) or "none"


class _Row(NamedTuple):
    """A point's results: mean and deviation over the seeds of each measure, and its time."""

    way: ResolvedPoint
    means: list[float]
    errors: list[float]
    seconds: float
    front: bool


def _on_front(
    seconds: Sequence[float | int], values: Sequence[float | int], *, lower_is_better: bool
) -> list[bool]:
    """``pareto_front``, less the points that are quicker than its next one by noise alone.

    >>> _on_front([1, 1.01, 2, 3], [9, 4, 5, 3], lower_is_better=True)
    [False, True, False, True]
    """
    front = pareto_front(seconds, values, lower_is_better=lower_is_better)
    kept: list[float | int] = []
    for time in sorted(set(itertools.compress(seconds, front)), reverse=True):
        if not kept or time * (1 + NOISE) < kept[-1]:
            kept.append(time)
    return [on and time in kept for on, time in zip(front, seconds, strict=True)]


def _collect(job: _Job, out: Path, times: dict[str, list[float]]) -> list[_Row]:
    keys = [metric_key(metric, job.features.card.name) for metric in job.config.metrics]
    found = []
    for way in job.ways:
        files = [out / "results" / f"{way.name}-seed{seed}.json" for seed in job.config.seeds]
        values = np.array([[_read(file)["metrics"][key] for key in keys] for file in files])
        deviation = values.std(axis=0, ddof=1) if len(files) > 1 else np.zeros(len(keys))
        found.append((way, values.mean(axis=0).tolist(), deviation.tolist()))
    seconds = [statistics.median(times[way.name]) for way in job.ways]
    front = _on_front(
        seconds, [means[0] for _, means, _ in found],
        lower_is_better=job.config.metrics[0] in LOWER_IS_BETTER,
    )  # fmt: skip
    return [
        _Row(way, means, errors, each, best)
        for (way, means, errors), each, best in zip(found, seconds, front, strict=True)
    ]


def _write_table(job: _Job, rows: Sequence[_Row], file: Path) -> None:
    config, text = job.config, io.StringIO()
    keys = [metric_key(metric, job.features.card.name) for metric in config.metrics]
    table, dearest = csv.writer(text, lineterminator="\n"), max(row.seconds for row in rows)
    table.writerow([
        "series", "x", "networks", "plan", "steps", "solver", "guidance",
        *(name for key in keys for name in (key, f"{key}_std")), "images", "seeds",
        "seconds_per_image", "speedup", "pareto",
    ])  # fmt: skip
    for way, means, errors, seconds, front in rows:
        measured = [
            [f"{mean:.6g}", f"{error:.3g}" if len(config.seeds) > 1 else ""]
            for mean, error in zip(means, errors, strict=True)
        ]
        table.writerow([
            way.point.series, _x(way.point), " + ".join(way.names), way.plan,
            way.request.plan.steps, way.options["solver"], _guidance(way.options),
            *(cell for pair in measured for cell in pair), config.num, len(config.seeds),
            f"{seconds:.6g}", f"{dearest / seconds:.4g}", "yes" if front else "no",
        ])  # fmt: skip
    write_text(file, text.getvalue())


def _write_charts(job: _Job, rows: Sequence[_Row], out: Path) -> None:
    config, features = job.config, job.features.card.name
    series: dict[str, list[_Row]] = {}
    for row in rows:
        series.setdefault(row.way.point.series, []).append(row)
    for own in series.values():
        if not isinstance(config.points[0].x, str):
            own.sort(key=lambda row: float(row.way.point.x))
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    num = f"{config.num} images, {seeds}"

    def names(metric: str) -> tuple[str, str, str]:
        """A measure, what a title says below it, and what an axis says of it."""
        name, _, of = metric_name(metric, features).partition(" (")
        name = name[0].upper() + name[1:]
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        below = f"{num}, in {features}" if of else num
        return name, below, f"{name} ({better} is better)"

    for k, metric in enumerate(config.metrics):
        title, below, label = names(metric)
        lines = [
            charts.Line(name, [row.way.point.x for row in own], [row.means[k] for row in own],
                        [row.errors[k] for row in own])
            for name, own in series.items()
        ]  # fmt: skip
        figure = charts.curves(
            lines, title=f"{title}\n{below}", x_label=config.x_label, y_label=label
        )
        charts.write_chart(figure, out / f"{metric_key(metric, features)}.png")
    lines = [
        charts.Line(
            name, [row.seconds for row in own], [row.means[0] for row in own],
            [row.errors[0] for row in own], [_x(row.way.point) for row in own],
        )
        for name, own in series.items()
    ]  # fmt: skip
    title, below, label = names(config.metrics[0])
    figure = charts.front(
        lines, [[row.front for row in own] for own in series.values()],
        title=f"{title} against time\n{below}", x_label="seconds per image (lower is better)",
        y_label=label, label=config.x_label,
    )  # fmt: skip
    charts.write_chart(figure, out / "pareto.png")


def sweep(
    config: SweepConfig, out: str | os.PathLike[str], *, mesh: Mesh | None = None,
    progress: bool = True,
) -> Path:  # fmt: skip
    """Measures quality and time of many ways of sampling, and draws the one against the other.

    First the time of each, without compilation, in rounds that go through all points; then images
    and their values, one seed of all points before the next. Points of one number of networks,
    images, steps and solver, with networks of the same architectures and the same kind of guidance,
    share their compiled programs, one that is timed and one that generates. Stopped at any moment,
    it goes on where it was when it is called again; points and seeds may then have been added.

    Args:
        config: The sweep.
        out: The folder: ``results.csv``, a chart ``KEY.png`` for each measure, ``pareto.png`` (the
            first measure against time), ``times.json``, ``results/``, ``pictures/`` with the first
            ten images of each point, and while they are needed ``images/``.
        mesh: Devices to work on; the default one alone unless given. Seconds per image are those
            of all of them together.
        progress: Whether to show progress.

    Returns:
        The path of ``results.csv``.

    Raises:
        ValueError: If a point, the reference or a setting is not as said (the error names the
            point), or the folder holds other things or a sweep of other settings; before anything
            is computed. Also if the reference is found to be another one under the same name, after
            the images of the next point.
        OSError: If a file cannot be written. What is done is kept.
        FloatingPointError: If a point's images are not finite.
    """
    charts.check_matplotlib()
    job, out = _open(config, mesh), Path(out)
    with _opened(out, job.settings):
        times = _times(job, out / TIMES, progress)
        seconds = {name: statistics.median(own) for name, own in times.items()}
        mean = statistics.mean(seconds.values())

        def is_done(way: ResolvedPoint, seed: int) -> bool:
            found = _read(out / "results" / f"{way.name}-seed{seed}.json")
            return isinstance(found, dict) and "metrics" in found

        # One seed of all points, then the next: a curve is there soon, and its error bars later.
        every = [(way, seed) for seed in config.seeds for way in job.ways]
        # An image counts for as much as it takes, so that the time left is right.
        shares = [seconds[way.name] / mean for way, _ in every]
        total, had = sum(round(config.num * share) for share in shares), 0
        with tqdm(total=total, unit="img", smoothing=0.05, disable=not progress) as bar:
            for (way, seed), share in zip(every, shares, strict=True):
                images = out / "images" / f"{way.name}-seed{seed}"
                if is_done(way, seed):
                    had += round(config.num * share)
                    bar.initial = had  # which the rate leaves out
                    bar.update(round(config.num * share))
                else:
                    bar.set_description(f"{_where(way.point)}, seed {seed}")
                    try:
                        _measure(job, way, seed, out, bar, share)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"{_where(way.point)}: {error}") from None
                if not config.keep_images:
                    shutil.rmtree(images, ignore_errors=True)
        rows = _collect(job, out, times)
        _write_table(job, rows, out / RESULTS)
        _write_charts(job, rows, out)
    return out / RESULTS
