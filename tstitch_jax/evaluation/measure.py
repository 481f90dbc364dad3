"""Samples against a reference: every measure in one pass over the images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tstitch_jax.core.checks import check_whole, printable
from tstitch_jax.core.files import check_writable, whole_file
from tstitch_jax.evaluation.clip_score import ClipScore, embed_texts
from tstitch_jax.evaluation.features import BLOCK, UNIT, Extractor, Kept, ahead, fit_channels
from tstitch_jax.evaluation.frechet import frechet_distance
from tstitch_jax.evaluation.inception_score import SPLIT, InceptionScore
from tstitch_jax.evaluation.infinity import distance_at_infinity
from tstitch_jax.evaluation.kernel import kernel_distance
from tstitch_jax.evaluation.manifold import nearest, precision_recall
from tstitch_jax.evaluation.report import Evaluation, metric_key, notes
from tstitch_jax.evaluation.request import NEIGHBOURS, Request, check_request
from tstitch_jax.evaluation.sources import STATISTICS, Source, from_array, open_source
from tstitch_jax.evaluation.statistics import Moments
from tstitch_jax.models.types import FeatureNetwork
from tstitch_jax.report import pictures


@dataclasses.dataclass
class _Measured:
    """One set of images, after the pass over it."""

    source: Source
    num: int
    digest: str
    moments: Moments
    spatial: Moments
    score: InceptionScore
    pools: list[np.ndarray]
    right: int
    fit: ClipScore | None

    @functools.cached_property
    def features(self) -> np.ndarray:
        """The pooled features, float32 ``[num, D]``, where they were wanted."""
        joined = np.concatenate(self.pools)
        self.pools.clear()
        return joined


def _measure(
    source: Source, num: int, wanted: set[str], texts: np.ndarray | None = None, *,
    extract: Extractor, kept: Kept, progress: bool,
) -> _Measured:  # fmt: skip
    """One pass over the first ``num`` images, for what the wanted measures need of them.

    ``texts`` are the vectors of their prompts.
    """
    fit = None if texts is None else ClipScore(texts)
    result = _Measured(source, 0, "", Moments(), Moments(), InceptionScore(), [], 0, fit)
    card = extract.network.card
    digest = hashlib.sha256(f"{source.shape}".encode())
    with tqdm(
        total=num, unit="img", desc=printable(source.name[-30:]), disable=not progress
    ) as bar:
        for block in ahead(_first(source.read(extract.block), num)):
            pixels = fit_channels(block, card.image_shape[2], source.name)
            digest.update(np.ascontiguousarray(pixels).data)
            found = kept.get(pixels, extract)
            if not np.isfinite(found.pool).all():
                raise ValueError(
                    f"{card.name} gives features of {source.name} that are not finite; "
                    "with bfloat16 try float32"
                )
            if wanted & {"fid", "fid_infinity", "statistics"}:
                result.moments.add(found.pool)
            if wanted & {"sfid", "statistics"} and found.spatial is not None:
                result.spatial.add(found.spatial)
            if "is" in wanted and found.logits is not None:
                result.score.add(found.logits)
            if wanted & {"precision", "recall", "kid", "fid_infinity", "picture"}:
                result.pools.append(np.asarray(found.pool))
            if "accuracy" in wanted and source.labels is not None and found.logits is not None:
                labels = source.labels[result.num : result.num + len(pixels)]
                result.right += int((found.logits.argmax(-1) == labels).sum())
            if result.fit is not None:
                if source.skipped:
                    raise ValueError(
                        f"{source.skipped[0]} is broken: without it the prompts are not those of "
                        "the images; mend it, or remove it and its prompt"
                    )
                result.fit.add(found.pool)
            result.num += len(pixels)
            bar.update(len(pixels))
    result.digest = digest.hexdigest()
    return result


def _first(batches: Iterator[np.ndarray], num: int) -> Iterator[np.ndarray]:
    """The batches of the first ``num`` images; those after them are not read."""
    for batch in batches:
        yield batch[:num]
        num -= len(batch)
        if num <= 0:
            return


def _look(source: Source, network: FeatureNetwork) -> None:
    """Raises ValueError for what only the images themselves show, in the first ones."""
    first = next(source.read(BLOCK))
    fit_channels(first, network.card.image_shape[2], source.name)
    # Floats in [0, 1] that were cast to uint8: nothing else would tell of it but the distance.
    if first.max() <= 1:
        raise ValueError(
            f"{source.name} has no value above 1 in its first {len(first)} images; images must "
            "have values from 0 to 255"
        )


def _write_statistics(path: Path, measured: _Measured, network: FeatureNetwork) -> None:
    """The moments of a set, as a reference."""
    found: dict[str, Any] = {"mu": measured.moments.mean, "sigma": measured.moments.covariance}
    if measured.spatial.count:
        found |= {"mu_s": measured.spatial.mean, "sigma_s": measured.spatial.covariance}
    with whole_file(path) as stream:
        np.savez(
            stream, **found, num=np.array(measured.num),
            features=np.array(network.card.checksum), dtype=np.array(network.dtype),
        )  # fmt: skip


def _values(
    request: Request, made: _Measured, beside: _Measured | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The measures, and the errors of some of them."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    known = {} if request.reference is None else request.reference.statistics
    chosen = request.metrics

    def moments(name: str) -> tuple[np.ndarray, np.ndarray]:
        if name in known:
            return known[name], known[name.replace("mu", "sigma")]
        assert beside is not None
        found = beside.moments if name == "mu" else beside.spatial
        return found.mean, found.covariance

    for metric, ours, name in (("fid", made.moments, "mu"), ("sfid", made.spatial, "mu_s")):
        if metric in chosen:
            values[metric], errors[metric] = frechet_distance(
                ours.mean, ours.covariance, *moments(name)
            )
    if "fid_infinity" in chosen:
        found = distance_at_infinity(made.features, *moments("mu"))
        values["fid_infinity"], errors["fid_infinity"] = found
    if "is" in chosen:
        values["is"], spread = made.score.result()
        errors |= {"is": spread} if made.num > SPLIT else {}
    if "clip_score" in chosen and made.fit is not None:
        values["clip_score"], error = made.fit.result()
        errors |= {"clip_score": error} if made.num > 1 else {}
    if "accuracy" in chosen:
        values["accuracy"] = made.right / made.num
    if beside is not None and "kid" in chosen:
        values["kid"], errors["kid"] = kernel_distance(beside.features, made.features)
    if beside is not None and {"precision", "recall"} & set(chosen):
        both = precision_recall(beside.features, made.features, NEIGHBOURS)
        values |= both._asdict()
    return {metric: values[metric] for metric in chosen}, errors


def _is_sorted(labels: np.ndarray) -> bool:
    """Whether images of several classes go class by class; one image of each says nothing."""
    return bool((np.diff(labels) >= 0).all()) and 1 < len(np.unique(labels)) < len(labels)


def _description(source: Source, measured: _Measured | None) -> dict[str, Any]:
    """What a set is, for the report."""
    num = int(source.statistics.get("num", 0)) if measured is None else measured.num
    labels = source.labels
    return {
        "name": source.name,
        "num": num,
        "sorted": labels is not None and _is_sorted(labels),
        "image_shape": list(source.shape),
        "sha256": "" if measured is None else measured.digest,
        "statistics": {
            name: hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
            for name, value in sorted(source.statistics.items())
            if name in STATISTICS
        },
        "skipped": list(source.skipped),
        "settings": source.settings,
    }


def _report(
    request: Request, made: _Measured, beside: _Measured | None,
    values: dict[str, float], errors: dict[str, float], cut: int,
) -> Evaluation:  # fmt: skip
    network, reference = request.network, request.reference
    name, leaf = network.card.name, jax.tree.leaves(network.params)[0]
    samples = _description(request.samples, made)
    against = None if reference is None else _description(reference, beside)
    size = request.shapes.pool.shape[1]
    return Evaluation(
        metrics={metric_key(k, name): v for k, v in values.items()},
        errors={metric_key(k, name): v for k, v in errors.items()},
        samples=samples,
        reference=against,
        features={
            "name": name,
            "checksum": network.card.checksum,
            "source": network.card.source,
            "source_checksum": network.card.source_checksum,
            "dtype": network.dtype,
        },
        settings={
            "tstitch_jax": version("tstitch_jax"),
            "platform": next(iter(leaf.devices())).platform,
            "jax": jax.__version__,
            "neighbours": NEIGHBOURS,
            "split": SPLIT,
            **({} if request.prompts is None else {"prompts": _digest(request.prompts)}),
        },
        notes=list(notes(request.metrics, samples, against, network.card, size, cut)),
    )


def _digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts as a file has them."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def _check_statistics(path: Path, request: Request) -> None:
    """Raises ValueError unless the samples' statistics can be written there."""
    if path.suffix != ".npz":
        raise ValueError(f"the file of statistics must end in .npz, got {path}")
    if request.num < 2:
        raise ValueError(f"statistics need at least 2 images, {request.samples.name} has 1")
    for source in (request.samples, request.reference):
        if source is not None and source.path and path.exists() and path.samefile(source.path):
            raise ValueError(f"{path} holds {source.name} itself; choose another file")
    check_writable(path)


def _check_picture(path: str | os.PathLike[str], request: Request) -> Path:
    """Raises ValueError unless a picture of both sets can be drawn and written there."""
    samples, reference = request.samples, request.reference
    if reference is None or not reference.count:
        raise ValueError("the picture needs a REFERENCE with images")
    if reference.shape[:2] != samples.shape[:2]:
        raise ValueError(
            f"the picture needs images of one size, got {samples.shape[:2]} and "
            f"{reference.shape[:2]}"
        )
    return pictures.check_png(path)


def _draw(path: Path, made: _Measured, theirs: _Measured, features: str) -> None:
    """The samples nearest to the reference and farthest from it, above their nearest neighbours."""
    distances, neighbours = nearest(theirs.features, made.features)
    order = np.argsort(distances, kind="stable")
    count = min(10, made.num // 2) or 1
    shown = np.concatenate([order[:count], order[::-1][:count]])
    ours = _pick(made.source, shown)
    beside = _pick(theirs.source, neighbours[shown])
    images = np.stack([ours[:count], beside[:count], ours[count:], beside[count:]])
    picture = pictures.grid(
        images.astype(np.float32) / 127.5 - 1,
        ["nearest\nsamples", "their\nneighbours", "farthest\nsamples", "their\nneighbours"],
        [""] * count,
        title=f"{made.source.name} and {theirs.source.name}",
        footer=f"by distance in the features of {features}",
    )
    pictures.write_png(picture, path)


def _pick(source: Source, indices: np.ndarray) -> np.ndarray:
    """Some of a set's images, in colour, by going through it again."""
    found: dict[int, np.ndarray] = {}
    wanted, start = set(indices.tolist()), 0
    for batch in source.read(BLOCK):
        for i in wanted & set(range(start, start + len(batch))):
            found[i] = np.broadcast_to(batch[i - start], (*source.shape[:2], 3))
        start += len(batch)
    return np.stack([found[i] for i in indices.tolist()])


def evaluate(
    samples: str | os.PathLike[str] | np.ndarray | Source,
    reference: str | os.PathLike[str] | np.ndarray | Source | None = None,
    *,
    features: FeatureNetwork,
    metrics: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    num: int | None = None,
    batch: int = UNIT,
    skip_broken: bool = False,
    statistics: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures samples against a reference, as Dhariwal & Nichol 2021 (arXiv:2105.05233) do.

    With the Inception network (``ts.load("inception")``): FID (Heusel et al. 2017), sFID (Nash et
    al. 2021), KID (Binkowski et al. 2018), Inception Score (Salimans et al. 2016, in splits of
    5000), precision and recall (Kynkaanniemi et al. 2019, k = 3). With another network the same in
    its features, under other names, and its accuracy on the labels of the samples. With CLIP
    (``ts.load("clip-vit-large-patch14")``) and prompts also the CLIP score (Hessel et al. 2021).

    The values do not depend on ``batch`` or the number of devices.

    Args:
        samples: What ``open_source`` takes: an ``.npz`` file, a folder, ``tfds:NAME``, or uint8
            images ``[N, H, W, C]``.
        reference: The same, where statistics (``mu``, ``sigma``, ...) take the place of images for
            the Frechet distances; None for what needs none.
        features: The feature network, on a device or copied onto a mesh.
        metrics: Of ``METRICS``; by default all that these sets allow, without ``"fid_infinity"``.
        prompts: The text that each sample was made of, in the samples' order.
        num: Only the first so many samples.
        batch: Images that a device is given ahead, rounded up to a multiple of 32.
        skip_broken: Whether to leave out, and count, broken files of a folder.
        statistics: An ``.npz`` file to write, with the samples' ``mu``, ``sigma``, ``mu_s`` and
            ``sigma_s``, to be a reference later (at least 2 images).
        picture: A PNG file to write: the samples nearest to the reference and farthest from it,
            in the features, each above its nearest reference image.
        cache: A folder in which features are kept until the job is through, so that it goes on
            where it was when it is killed.
        progress: Whether to show progress.

    Raises:
        ValueError: If a set is not as said, or a measure cannot be had of it; before anything is
            computed, except for what shows only when images are read.
        OSError: If a file cannot be written.
    """
    batch = check_whole("batch", batch, 1)

    def opened(spec: Any, role: str) -> Source:
        if isinstance(spec, np.ndarray):
            return from_array(f"the array of {role}", spec)
        return spec if isinstance(spec, Source) else open_source(spec, skip_broken=skip_broken)

    theirs = None if reference is None else opened(reference, "the reference")
    request = check_request(opened(samples, "samples"), theirs, features, metrics, num, prompts)
    if not request.metrics and statistics is None:
        raise ValueError(f"there is nothing to measure of {request.samples.name}")
    if statistics is not None:
        _check_statistics(Path(statistics), request)
    drawing = None if picture is None else _check_picture(picture, request)
    for source in (request.samples, theirs):
        if source is not None and source.count:
            _look(source, features)
    kept = Kept(cache, features)
    run = functools.partial(
        _measure, extract=Extractor(features, batch), kept=kept, progress=progress
    )

    extra = {"statistics": statistics, "picture": drawing}
    asked = {name for name, path in extra.items() if path is not None}
    texts, cut = None, 0
    if "clip_score" in request.metrics and prompts is not None:
        texts, cut = embed_texts(features, prompts[: request.num])
    made = run(request.samples, request.num, {*request.metrics, *asked}, texts)
    beside, of_reference = None, request.of_reference() | (asked & {"picture"})
    if theirs is not None and of_reference:
        key = features.card.checksum, features.dtype, frozenset(of_reference)
        if key not in theirs.measured:
            theirs.measured[key] = run(theirs, theirs.count, of_reference)
        beside = theirs.measured[key]
    if statistics is not None:
        _write_statistics(Path(statistics), made, features)
    values, errors = _values(request, made, beside)
    if drawing is not None and beside is not None:
        _draw(drawing, made, beside, features.card.name)
    kept.forget()
    return _report(request, made, beside, values, errors, cut)
