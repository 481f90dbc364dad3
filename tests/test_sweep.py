"""Sweeps: what they find, stopped and gone on with, what they refuse, and the command."""

import csv
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from conftest import UNOPTIMISED
from helpers import GOLDEN, tiny_network, write_text_pair
from hypothesis import given, strategies as st
from PIL import Image

import tstitch_jax as ts
from checkpoints_convert import convert
from tstitch_jax import cli, sweep as sweep_function
from tstitch_jax.cli.text import load_config
from tstitch_jax.evaluation import metric_key
from tstitch_jax.hub import resolve
from tstitch_jax.jobs.shards import Shards
from tstitch_jax.jobs.sweep import NOISE, ROUNDS, _check, _guidance, _on_front, _open_way, estimate
from tstitch_jax.jobs.timing import pareto_front
from tstitch_jax.models import build
from tstitch_jax.models.cards import FeatureCard
from tstitch_jax.models.measure import init_params
from tstitch_jax.report import charts


def sweep(config, out):
    return sweep_function(config, out, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks, one of features, and images to compare with."""
    root = tmp_path_factory.mktemp("sweep")
    for seed, (name, width) in enumerate((("small", 16), ("large", 32))):
        changes = dict(image_shape=(8, 8, 1), guidance_channels=None, width=width)
        ts.save(root / name, tiny_network(seed, name=name, **changes))
    card = FeatureCard(
        name="looks", architecture="classifier", config={"widths": [8], "blocks": [0]},
        image_shape=(8, 8, 1), num_classes=10, class_names=tuple("abcdefghij"),
    )  # fmt: skip
    params = init_params(build.module_of(card), jax.random.key(0))
    ts.save(root / "looks", ts.make_network(card, params))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(root / "reference.npz", arr_0=pixels)
    return root


@pytest.fixture(scope="module")
def config(folder):
    pair = [str(folder / "small"), str(folder / "large")]
    shares = [
        ts.Point(series="shares", x=f, networks=pair, options=dict(fractions=[f, 1 - f], steps=4))
        for f in (0.0, 0.5)
    ]
    plan = dict(plan=[1, 0, 1, 0], steps=4, cfg_scale=jax.numpy.float32(3))
    return ts.SweepConfig(
        points=[*shares, ts.Point(series="mixed", x=0.5, networks=pair, options=plan)],
        reference=str(folder / "reference.npz"), features=str(folder / "looks"),
        metrics=["fid", "recall", "accuracy"], num=5, seeds=[0, 7], batch=2, x_label="share",
    )  # fmt: skip


@pytest.fixture(scope="module")
def compilations():
    names = []

    def listen(event, duration, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


@pytest.fixture(scope="module")
def once():
    return functools.cache(resolve.load)


@pytest.fixture
def loaded_once(once, monkeypatch):
    """Networks that many cases load are read once."""
    monkeypatch.setattr(resolve, "load", once)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory, compilations):
    """The folder of a sweep that is through, and what was compiled for it."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert sweep(config, out) == out / "results.csv"
    return out, list(compilations)


def table(out):
    with (out / "results.csv").open() as stream:
        return list(csv.DictReader(stream))


def results(out):
    return {p.name: json.loads(p.read_text())["metrics"] for p in (out / "results").iterdir()}


def test_values_are_those_of_direct_calls(config, folder, done, tmp_path):
    networks = [ts.load(folder / "small"), ts.load(folder / "large")]
    plan = ts.Plan.from_list([1, 0, 1, 0], 2)
    sampler = ts.Sampler(networks, plan=plan, steps=4, guidance=3.0)
    rows = table(done[0])
    expected = [("shares", "0"), ("shares", "0.5"), ("mixed", "0.5")]
    assert [(row["series"], row["x"]) for row in rows] == expected
    found = []
    for seed in config.seeds:
        generated = ts.generate(
            tmp_path / str(seed), sampler, num=5, seed=seed, batch=2, progress=False
        )
        measured = ts.evaluate(
            generated, folder / "reference.npz", features=ts.load(folder / "looks"),
            metrics=config.metrics, progress=False,
        )  # fmt: skip
        found.append(measured.metrics)
    row = rows[2]
    for metric in config.metrics:
        key = metric_key(metric, "looks")
        values = [metrics[key] for metrics in found]
        assert float(row[key]) == pytest.approx(np.mean(values), rel=1e-5)
        assert float(row[f"{key}_std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-2)
    assert row["plan"] == "large x 1, small x 1, large x 1, small x 1"
    assert (row["steps"], row["solver"], row["guidance"]) == ("4", "ddim", "3.0")
    assert (row["networks"], row["images"], row["seeds"]) == ("small + large", "5", "2")


def test_times_and_the_front(done):
    rows = table(done[0])
    times = json.loads((done[0] / "times.json").read_text())["seconds_per_image"]
    assert [len(own) for own in times.values()] == [ROUNDS] * 3
    seconds = [float(row["seconds_per_image"]) for row in rows]
    assert seconds == pytest.approx([np.median(own) for own in times.values()], rel=1e-4)
    speedups = [float(row["speedup"]) for row in rows]
    assert speedups == pytest.approx([max(seconds) / s for s in seconds], rel=1e-3)
    values = [float(row["fd_looks"]) for row in rows]
    front = _on_front(seconds, values, lower_is_better=True)
    assert [row["pareto"] == "yes" for row in rows] == front


def test_two_programs_serve_all_plans_scales_and_seeds(done):
    assert sum("sample_program" in name for name in done[1]) == 2  # one is timed, one generates


def test_what_is_left_in_the_folder(done):
    out, _ = done
    charts_made = {"fd_looks.png", "recall_looks.png", "accuracy_looks.png", "pareto.png"}
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    others = {"images", "pictures", "results", "results.csv", "settings.json", "times.json"}
    assert names == charts_made | others
    for name in charts_made:
        with Image.open(out / name) as picture:
            assert picture.size[0] > 800
    assert list((out / "images").iterdir()) == []
    pictures = {"shares-0.png", "shares-0.5.png", "mixed-0.5.png"}
    assert {path.name for path in (out / "pictures").iterdir()} == pictures
    result = json.loads((out / "results" / "mixed-0.5-seed7.json").read_text())
    assert result["samples"]["settings"]["seed"] == result["seed"] == 7
    assert result["point"]["options"]["cfg_scale"] == 3


def test_stopped_anywhere_it_goes_on(config, done, tmp_path, monkeypatch):
    write, made, limit = Shards.write, [], [None]

    def counted(self, k, pixels):
        if len(made) == limit[0]:
            raise KeyboardInterrupt
        write(self, k, pixels)
        made.append((self.settings["seed"], k))

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "write", counted)
    for most in (2, 4, 10):  # in the first point, in the second, with another seed
        limit[0] = most
        with pytest.raises(KeyboardInterrupt):
            sweep(config, tmp_path / "out")
        times = (tmp_path / "out" / "times.json").read_bytes()
    limit[0] = None
    with monkeypatch.context() as patch:  # between images and their values
        patch.setattr(sys.modules[ts.Point.__module__], "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(config, tmp_path / "out")
    damaged = tmp_path / "out" / "results" / "shares-0-seed0.json"
    damaged.write_text(damaged.read_text()[:50])
    kept = (tmp_path / "out" / "results" / "shares-0.5-seed0.json").stat().st_mtime_ns
    sweep(config, tmp_path / "out")
    assert results(tmp_path / "out") == results(done[0])
    assert len(made) == 3 * 3 * 2 + 3  # three files a point and seed; those of the damaged twice
    assert (tmp_path / "out" / "results" / "shares-0.5-seed0.json").stat().st_mtime_ns == kept
    assert (tmp_path / "out" / "times.json").read_bytes() == times
    sweep(config, tmp_path / "out")
    assert len(made) == 21


def test_points_and_seeds_may_be_added(config, done, tmp_path):
    few = dataclasses.replace(config, points=config.points[:1], seeds=[0], keep_images=True)
    sweep(few, tmp_path / "out")
    assert table(tmp_path / "out")[0]["fd_looks_std"] == ""
    assert (tmp_path / "out" / "images" / "shares-0-seed0" / "samples.npz").is_file()
    sweep(config, tmp_path / "out")
    assert results(tmp_path / "out") == results(done[0])
    assert not list((tmp_path / "out" / "images").iterdir())


def test_other_settings_are_refused(config, done):
    before = (done[0] / "settings.json").read_bytes()
    first, *others = config.points
    for change, message in (
        (dict(num=6), "num was 5, is 6"),
        (dict(metrics=["fid"]), r'metrics was .*, is \["fid"\]'),
        (
            dict(
                points=[dataclasses.replace(first, options=first.options | {"eta": 1.0}), *others]
            ),
            "shares-0 eta was null, is 1.0",
        ),
    ):
        with pytest.raises(ValueError, match=f"holds a sweep of other settings: .*{message}"):
            sweep(dataclasses.replace(config, **change), done[0])
    assert (done[0] / "settings.json").read_bytes() == before


def test_another_reference_under_the_same_name_is_refused(config, folder, tmp_path):
    reference = tmp_path / "reference.npz"
    shutil.copy(folder / "reference.npz", reference)
    few = dataclasses.replace(
        config, points=config.points[:1], seeds=[0], reference=str(reference), metrics=["fid"]
    )
    sweep(few, tmp_path / "out")
    with np.load(reference) as stored:
        pixels = stored["arr_0"]
    np.savez(reference, arr_0=255 - pixels)
    sweep(few, tmp_path / "out")  # of which all is measured
    more = dataclasses.replace(few, seeds=[0, 7])
    with pytest.raises(ValueError, match=r"reference .* is no longer that of .*seed0\.json"):
        sweep(more, tmp_path / "out")
    np.savez(reference, arr_0=pixels)
    sweep(more, tmp_path / "out")


def test_places_that_are_refused(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.txt\)"):
        sweep(config, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        sweep(config, tmp_path / "thesis.txt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged"):
        sweep(config, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(points=[]), "the sweep has no points"),
        (dict(num=0), "num must be a whole number, 1 to 4294967295, got 0"),
        (dict(batch=2**16 + 1), "batch must be a whole number, 1 to 65536, got 65537"),
        (dict(seeds=[0, 0]), "seeds must differ"),
        (dict(seeds=None), "seeds must be a list, got None"),
        (dict(seeds=0), "seeds must be a list, got 0"),
        (dict(seeds=[10**400]), "each seed must be a whole number, 0 to 4294967295, got 10000"),
        (dict(metrics=["fidd"]), "unknown measure 'fidd'"),
        (dict(metrics=[["is"]]), r"unknown measure \['is'\]; choose from"),
        (dict(metrics="fid"), "metrics must be a list, got 'fid'"),
        (dict(x_label=None), "x_label must be a text, got None"),
        (dict(reference=5), "reference must be a text, got 5"),
        (dict(features=None), "features must be a text, got None"),
        (
            dict(features="fashion-s"),
            "^features must be a feature network .*, got Network.'fashion-s'",
        ),
        (
            dict(metrics=["fid_infinity"]),
            "fid_infinity cannot be measured: it needs at least 50 images",
        ),
        (dict(metrics=["sfid"]), "point 0 of 'shares': sfid cannot be measured: looks has no"),
        (dict(reference="nowhere.npz"), "nothing at nowhere.npz"),
        (dict(features="small"), "small"),
        (dict(dtype="int8"), "dtype must be"),
        (dict(x=math.nan), "x of a point of 'shares' must be a finite number or a name, got nan"),
        (dict(x=10**400), "x of a point of 'shares' must be a finite number or a name, got 1000"),
        (dict(x=None), "point None of 'shares': x must be a finite number or a name"),
        (dict(series=["a"]), r"series of a point must be a name, got \['a'\]"),
        (dict(x="a"), "numbers at all points, or names at all"),
        (dict(x=0.5), "point 0.5 of 'shares' and point 0.5 of 'shares' have one name"),
        (dict(networks=["nothing"]), "point 0 of 'shares': .*nothing"),
        (dict(networks=[]), "point 0 of 'shares': networks must be a list"),
        (dict(networks=5), "point 0 of 'shares': networks must be a list"),
        (dict(fractions=[0.5, 0.6]), "point 0 of 'shares': fractions must sum to 1"),
        (dict(plan=[0, 1]), "point 0 of 'shares': give fractions or a plan, not both"),
        (dict(fractions=None, plan=[0, 2]), "point 0 of 'shares': a plan for 2 networks"),
        (dict(solver="dim"), "point 0 of 'shares': unknown solver 'dim'"),
        (dict(solver=ts.ddim()), "point 0 of 'shares': the solver must be a name"),
        (dict(noise=1), "point 0 of 'shares': no option 'noise'"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(
    config, tmp_path, monkeypatch, loaded_once, change, message
):
    # As users call it, without the tests' own checks of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    point = config.points[0]
    fields = {k: v for k, v in change.items() if k in ("series", "x", "networks")}
    sweep_fields = {field.name for field in dataclasses.fields(ts.SweepConfig)}
    whole = {k: v for k, v in change.items() if k in sweep_fields}
    options = {k: v for k, v in change.items() if k not in {**fields, **whole}}
    first = dataclasses.replace(point, options=point.options | options, **fields)
    changed = dataclasses.replace(config, **({"points": [first, *config.points[1:]]} | whole))
    with pytest.raises(ValueError, match=message):
        sweep(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory):
    """A sweep of two networks that are conditioned on texts, measured by CLIP."""
    root = tmp_path_factory.mktemp("texts")
    pair = write_text_pair(root)
    convert(GOLDEN / "clip_tiny" / "clip", root / "clip")
    points = [
        ts.Point(
            series="shares", x=f, networks=[pair["a"], pair["b"]],
            options=dict(fractions=[f, 1 - f], steps=2, cfg_scale=3.0, negative="blurred"),
        )
        for f in (0.0, 0.5)
    ]  # fmt: skip
    return ts.SweepConfig(
        points=points, reference=None, features=str(root / "clip"), metrics=["clip_score"], num=3,
        seeds=[0], batch=2, x_label="share", prompts=["a cat", "two dogs"],
    )  # fmt: skip


def test_networks_of_texts(of_texts, tmp_path, loaded_once, once):
    path = sweep(dataclasses.replace(of_texts, keep_images=True), tmp_path / "out")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    point, row, key = of_texts.points[1], rows[1], "clip_score_clip"
    images = tmp_path / "out" / "images" / f"shares-{point.x:g}-seed0" / "samples.npz"
    sampler = ts.Sampler(list(point.networks), plan=[0.5, 0.5], steps=2, guidance=3.0)
    expected = ts.generate(
        tmp_path / "expected", sampler, prompts=of_texts.prompts, negative="blurred", num=3,
        batch=2, progress=False,
    )  # fmt: skip
    assert images.read_bytes() == expected.read_bytes()
    score = ts.evaluate(
        images, features=once(of_texts.features), prompts=["a cat", "two dogs", "a cat"],
        progress=False,
    )  # fmt: skip
    assert float(row[key]) == pytest.approx(score.metrics[key], rel=1e-5)
    assert rows[0][key] != rows[1][key]
    assert (tmp_path / "out" / "pictures" / "shares-0.png").exists()
    # Prompts and the negative text are of the settings.
    others = dataclasses.replace(of_texts, prompts=["a cat", "two foxes"])
    with pytest.raises(ValueError, match=r"other settings: prompts"):
        sweep(others, tmp_path / "out")
    without = [
        dataclasses.replace(p, options={**p.options, "negative": ""}) for p in of_texts.points
    ]
    with pytest.raises(ValueError, match=r"other settings: .*negative"):
        sweep(dataclasses.replace(of_texts, points=without), tmp_path / "out")


def test_another_size_and_encoder(of_texts, loaded_once, once):
    point = of_texts.points[0]
    words = once(point.networks[0]).card.text_encoder
    options = point.options | {"size": (32, 16), "text_encoder": [words, words]}
    larger = dataclasses.replace(point, series="larger", options=options)
    found = estimate(dataclasses.replace(of_texts, points=[point, larger]))
    assert [each.cost for each in found] == [0.5, 1]
    way = _open_way(of_texts, larger, None, {})
    assert [encoder.card.name for encoder in way.sampler.text_encoders()] == ["words", "words"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=None), "a is conditioned on texts; give the sweep prompts"),
        (dict(prompts=[]), "prompts must be a list of texts"),
        (dict(prompts="a cat"), "prompts must be a list of texts"),
        (dict(metrics=["fid"]), "fid cannot be measured: there is no REFERENCE"),
        (dict(metrics=["accuracy"]), "accuracy cannot be measured: clip knows no classes"),
        (dict(negative=["x", "y"]), "negative must be one text"),
        (dict(text_encoder="nowhere"), "nowhere"),
        (dict(text_encoder=["words"] * 3), "with one entry for each of the 2, got 3"),
        (dict(text_encoder=["words", ""]), "the name of a network is empty"),
        (dict(text_encoder=3), "text_encoder must be a name or a list of names, got 3"),
    ],
)
def test_bad_sweeps_of_texts(of_texts, tmp_path, loaded_once, change, message):
    first, second = of_texts.points
    words = ts.load(first.networks[0]).card.text_encoder
    options = {k: v for k, v in change.items() if k in ("negative", "text_encoder")}
    if isinstance(options.get("text_encoder"), list):
        options["text_encoder"] = [name and words for name in options["text_encoder"]]
    whole = {k: v for k, v in change.items() if k not in options}
    first = dataclasses.replace(first, options=first.options | options)
    with pytest.raises(ValueError, match=message):
        sweep(dataclasses.replace(of_texts, points=[first, second], **whole), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_are_of_no_use_to_classes(config, tmp_path):
    with pytest.raises(ValueError, match="small is conditioned on classes; leave out the prompts"):
        sweep(dataclasses.replace(config, prompts=["a cat"]), tmp_path / "out")
    point = config.points[0]
    point = dataclasses.replace(point, options=point.options | {"negative": "x"})
    with pytest.raises(ValueError, match="negative goes with prompts"):
        sweep(dataclasses.replace(config, points=[point]), tmp_path / "out")


def test_costs_count_every_row_of_guidance(config, folder):
    small, large = (ts.load(folder / name).card.macs for name in ("small", "large"))
    point = config.points[1]
    ways = {
        "guided": ({}, 2 * 2 * (small + large)),
        "alone": (dict(cfg_scale=None), 2 * (small + large)),
        "auto": (dict(cfg_scale=None, auto_scale=2.0), 2 * (small + large) + 2 * small),
        "nowhere": (dict(cfg_interval=[1e5, 1e6]), 2 * (small + large)),
        # In the first step alpha grows 16-fold, the last ends in clean data: once in each.
        "heun": (dict(solver="heun"), 6 * small + 6 * large),
        "pndm": (dict(solver="pndm"), 4 * small + 4 * large),
    }
    points = [
        dataclasses.replace(point, series=name, options=point.options | more)
        for name, (more, _) in ways.items()
    ]
    found = estimate(dataclasses.replace(config, points=points))
    costs = np.array([cost for _, cost in ways.values()])
    assert [each.cost for each in found] == pytest.approx(costs / costs.max())
    assert all(each.seconds > 0 for each in found)
    assert found[0].plan == "small x 2, large x 2"


def test_guidance_in_words():
    options = dict(cfg_scale=1.5, auto_scale=None, cfg_interval=None)
    assert _guidance(options) == "1.5"
    assert _guidance(options | {"cfg_scale": None}) == "none"
    assert _guidance(options | {"cfg_scale": None, "auto_scale": 2}) == "auto 2"
    assert _guidance(options | {"cfg_interval": [0.3, 3.0]}) == "1.5, at 0.3 to 3"


# ------------------------------------------------------------------------------- Pareto front

NUMBERS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(NUMBERS, st.booleans())
def test_the_front_is_what_nothing_beats(points, lower):
    costs, values = zip(*points, strict=True)
    front = pareto_front(costs, values, lower_is_better=lower)
    sign = 1 if lower else -1
    for (cost, value), chosen in zip(points, front, strict=True):
        better = [
            c <= cost and sign * v <= sign * value and (c, v) != (cost, value) for c, v in points
        ]
        assert chosen == (not any(better))
    assert any(front)


@given(NUMBERS, st.booleans())
def test_no_point_on_the_measured_front_is_there_by_noise(points, lower):
    seconds, values = zip(*points, strict=True)
    strict = pareto_front(seconds, values, lower_is_better=lower)
    assert _on_front(seconds, values, lower_is_better=lower) == strict  # no two nearly alike
    # The same points again, better and slower by a hair.
    slower = [s * (1 + NOISE) for s in seconds]
    better = [v - 0.5 if lower else v + 0.5 for v in values]
    front = _on_front([*seconds, *slower], [*values, *better], lower_is_better=lower)
    assert front[: len(points)] == [False] * len(points)
    assert any(front)


@pytest.mark.parametrize(
    ("costs", "values", "lower", "expected"),
    [
        ([1], [1], True, [True]),
        ([1, 1], [2, 2], True, [True, True]),  # duplicates
        ([1, 1], [2, 3], True, [True, False]),  # a tie in cost
        ([1, 2], [3, 3], True, [True, False]),  # a tie in value
        ([1, 2, 3], [3, 2, 1], True, [True, True, True]),
        ([1, 2, 3], [3, 2, 1], False, [True, False, False]),
        ([1, 2], [math.nan, 3], True, [False, True]),
        ([1, 2], [-math.inf, 3], True, [False, True]),
        ([], [], True, []),
    ],
)
def test_fronts(costs, values, lower, expected):
    assert pareto_front(costs, values, lower_is_better=lower) == expected


# ------------------------------------------------------------------------------------- charts


def test_every_series_has_a_style_of_its_own(tmp_path):
    lines = [charts.Line(f"series {i}", [0, 1], [i, i + 1], [0.1, 0.2]) for i in range(56)]
    figure = charts.curves(lines, title="t", x_label="x", y_label="y (lower is better)")
    drawn = [bars.lines[0] for bars in figure.axes[0].containers]
    styles = {(line.get_color(), line.get_marker()) for line in drawn}
    assert len(styles) == 56
    assert [drawn[i].get_linestyle() for i in (0, 7)] == ["-", "--"]
    assert drawn[0].get_markerfacecolor() == drawn[0].get_color()
    assert drawn[7].get_markerfacecolor() == "white"
    assert figure.axes[0].get_ylabel() == "y (lower is better)"
    charts.write_chart(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_names_along_x_are_not_joined():
    line = charts.Line("one", ["b", "a"], [1, 2], [0, 0])
    axes = charts.curves([line], title="", x_label="", y_label="").axes[0]
    assert axes.containers[0].lines[0].get_linestyle() == "None"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["b", "a"]
    assert not axes.figure.legends
    assert not axes.containers[0].has_yerr  # of one seed


@pytest.mark.parametrize(
    ("x", "scale"), [([5, 250], "log"), ([5, 100], "linear"), ([0, 1], "linear")]
)
def test_wide_ranges_of_x_are_logarithmic(x, scale):
    axes = charts.curves([charts.Line("one", x, [1, 2], [0, 0])], title="", x_label="", y_label="")
    assert axes.axes[0].get_xscale() == scale


def test_the_front_is_drawn_in_order_of_time():
    lines = [
        charts.Line("a", [3.0, 0.1], [1, 5], [0, 0], ["0.1", "0.9"]),
        charts.Line("b", [1.0, 2.0], [2, 3], [0, 0], ["0.5", "0.6"]),
    ]
    figure = charts.front(
        lines, [[True, True], [True, False]], title="", x_label="", y_label="", label="share"
    )
    drawn = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    np.testing.assert_array_equal(drawn.get_xydata(), [[0.1, 5], [1, 2], [3, 1]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.9", "0.5", "0.1"]
    assert figure.axes[0].get_xscale() == "log"


def test_labels_cover_neither_points_nor_each_other():
    x = [1.0, 1.02, 1.04, 2.0]
    line = charts.Line("a", x, [4, 3.9, 3.8, 1], [0] * 4, ["some name"] * 4)
    figure = charts.front([line], [[True] * 4], title="", x_label="", y_label="", label="name")
    axes = figure.axes[0]
    points = axes.transData.transform(np.column_stack([line.x, line.y]))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 2 <= len(boxes) < 5
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i])
        assert not box.count_contains(points)


# ------------------------------------------------------------------------------------ command

CONFIG = """
from tstitch_jax import Point, SweepConfig
config = SweepConfig(
    points=[
        Point(series="pair", x=f, networks=["{0}/small", "{0}/large"],
              options=dict(fractions=[f, 1 - f], steps=4))
        for f in (0.0, 0.5)
    ],
    reference="tfds:nothing", features="{0}/looks", metrics=["fid"], num=4, seeds=[0], batch=2,
    x_label="share",
)
"""


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    (tmp_path / "mine.py").write_text(CONFIG.format(folder))

    def run(*arguments):
        try:
            status = cli.main(["sweep", *arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_the_command(command, folder, tmp_path):
    reference = ("--reference", str(folder / "reference.npz"))
    status, out, _ = command("mine.py", "--dry-run", *reference)
    assert status == 0
    assert "large x 4" in out
    assert "small x 2, large x 2" in out
    assert "2 points, 1 seeds of 4 images: 0 s of sampling" in out
    assert "one measured step of each network" in out
    assert not (tmp_path / "runs").exists()

    status, out, err = command("mine.py", *reference)
    assert status == 0
    assert "2 points: runs/mine/results.csv" in out
    assert "timing" in err
    assert "img/s" in err
    assert len(table(tmp_path / "runs" / "mine")) == 2
    assert results(tmp_path / "runs" / "mine").keys() == {
        "pair-0-seed0.json",
        "pair-0.5-seed0.json",
    }


def test_killed_while_it_generates(command, folder, tmp_path):
    """The real program, kill -9, and the same command again."""
    reference = ["--reference", str(folder / "reference.npz")]
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("num=4", "num=40"))
    assert command("mine.py", *reference, "--out", "unbroken")[0] == 0
    environment = os.environ | {"XLA_FLAGS": UNOPTIMISED, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    job = tmp_path / "job"
    process = subprocess.Popen(
        [sys.executable, "-m", "tstitch_jax.cli", "sweep", "mine.py", *reference, "--out", job],
        env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        done = 20 * len(list(job.glob("results/*.json")))
        if done + len(list(job.glob("images/*/shards/*.npz"))) >= 25:  # in the second point
            process.kill()
        time.sleep(0.002)
    assert process.wait() < 0
    assert not (job / "results.csv").exists()
    assert command("mine.py", *reference, "--out", "job")[0] == 0
    assert results(job) == results(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "no configuration at mine.py"),
        ("x = 1", [], "mine.py has no SweepConfig named config"),
        ("1 / 0", [], "mine.py fails: ZeroDivisionError"),
        ("", ["--reference", "nowhere.npz"], "nothing at nowhere.npz"),
        ("", ["--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_bad_commands(command, tmp_path, text, arguments, message):
    if text is None:
        (tmp_path / "mine.py").unlink()
    elif text:
        (tmp_path / "mine.py").write_text(text)
    for more in ([], ["--dry-run"]):
        status, _, err = command("mine.py", *arguments, *more)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_charts_without_matplotlib(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'tstitch_jax\[plot\]'"):
        sweep(config, tmp_path / "out")


def test_the_projects_configurations(tmp_path, monkeypatch):
    """That they load; what they hold is checked as far as it goes without data."""
    monkeypatch.chdir(tmp_path)
    embedded = Path(ts.__file__).parent / "embedded" / "fashion-b"
    for run in ("fashion_b_all", "fashion_b_late"):  # as if these had been trained
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "network").symlink_to(embedded)
    root = Path(__file__).parents[1] / "configs"
    files = sorted(set(root.glob("sweep_*.py")) - {root / "sweep_fashion.py"})
    points = {f.stem: len(load_config(str(f), ts.SweepConfig).points) for f in files}
    assert points == {
        "sweep_allocation": 4, "sweep_finetuned": 9, "sweep_fractions": 11, "sweep_guidance": 45,
        "sweep_steps": 54, "sweep_three": 66,
    }  # fmt: skip
    loaded = {}
    for file in files:
        config = load_config(str(file), ts.SweepConfig)
        _check(config)
        for point in config.points:
            plan = _open_way(config, point, None, loaded).request.plan
            if fractions := point.options.get("fractions"):
                shares = [count / plan.steps for count in plan.counts()]
                assert shares == pytest.approx(fractions), point
