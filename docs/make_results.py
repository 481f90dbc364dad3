"""Measures what ``docs/results.md`` says besides the sweeps, and writes all of its tables.

    python docs/make_results.py            # some minutes on two cores
    python docs/make_results.py --tables   # only the tables, from the files that are there

The sweeps are run before, each by the command of its file in ``configs/``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

import tstitch_jax as ts
from tstitch_jax.cli.text import load_config
from tstitch_jax.core.files import write_text
from tstitch_jax.jobs.timing import pareto_front
from tstitch_jax.report import charts
from tstitch_jax.sampling.sampler import make_sampler

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONFIGS = HERE.parent / "configs"
NAMES = ["fashion-s", "fashion-xl"]
THREE = ["fashion-s", "fashion-b", "fashion-xl"]
CALIBRATED = ["fractions", "allocation", "three", "guidance", "steps"]
"""The sweeps whose plans are predicted, too."""

MOST_STEPS = 20
"""Of plans that are predicted: many trajectories of more steps take long."""

CALLED = {
    "fractions": "fractions, three seeds", "allocation": "four orders", "three": "three networks",
}  # fmt: skip
"""What the table says of sweeps that are of one setting."""

STEPS, CONDITIONS, SEEDS = 50, 256, 5

Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (RESULTS / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
    with (RESULTS / name).open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(header)
        table.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in rows)


def chart(name: str, figure: Any) -> None:
    charts.write_chart(figure, RESULTS / name)


def measure_predictions() -> None:
    """How networks differ along the large one's trajectory: cosine and L2, by step."""
    sampler = ts.Sampler(NAMES, steps=STEPS)
    found = ts.calibrate(jax.random.key(0), sampler, conditions=CONDITIONS, costs="macs")
    time = np.asarray(sampler.knots.time)[:-1]
    rows = [
        [name, i, float(time[i]), float(found.cosine[k, i]), float(found.eps[k, i] ** 0.5),
         float(found.x0[k, i] ** 0.5), float(found.steps_alone[k, i])]
        for k, name in enumerate(NAMES[:-1])
        for i in range(STEPS)
    ]  # fmt: skip
    header = ["network", "step", "time", "cosine_eps", "rms_eps", "rms_x0", "damage"]
    write("predictions/results.csv", header, rows)

    def lines(column: int) -> list[charts.Line]:
        return [
            charts.Line(n, [r[1] for r in own], [r[column] for r in own], [0.0] * STEPS)
            for n in NAMES[:-1]
            for own in [[r for r in rows if r[0] == n]]
        ]

    for column, file, title in (
        (3, "cosine", "Cosine between predictions of the noise"),
        (5, "x0", "Root mean square between predicted images"),
    ):
        figure = charts.curves(
            lines(column), title=f"{title}\nwith fashion-xl's, along its trajectory",
            x_label=f"step of {STEPS}", y_label=title.split()[0],
        )  # fmt: skip
        chart(f"predictions/{file}.png", figure)


def measure_spectrum() -> None:
    """Power of the predicted images by spatial frequency, by step, over that of the results."""
    labels = np.resize(np.arange(10), CONDITIONS).tolist()
    sampler = ts.Sampler("fashion-xl", steps=STEPS)
    predicted = sampler(jax.random.key(0), labels=labels, keep=["predictions"]).predictions
    assert predicted is not None
    size = predicted.shape[2]
    power = np.abs(np.fft.fft2(np.asarray(predicted)[..., 0], norm="ortho")) ** 2
    power = power.mean(axis=1)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size)] * 2)) * size
    octaves = {
        "1 to 2": (0.5, 2.5),
        "3 to 5": (2.5, 5.5),
        "6 to 9": (5.5, 9.5),
        "10 to 14": (9.5, 14.5),
    }
    rows, lines = [], []
    for name, (low, high) in octaves.items():
        inside = (frequency >= low) & (frequency < high)
        share = power[:, inside].mean(axis=1) / power[-1, inside].mean()
        rows += [[name, i, float(v)] for i, v in enumerate(share)]
        lines.append(charts.Line(f"{name} periods", list(range(STEPS)), share, [0.0] * STEPS))
    write("spectrum/results.csv", ["periods", "step", "share"], rows)
    figure = charts.curves(
        lines, title="Power of the predicted image\nover that of the last step's, by frequency",
        x_label=f"step of {STEPS}", y_label="Share of the final power",
    )  # fmt: skip
    chart("spectrum/share.png", figure)


def measure_cost() -> None:
    """Parameters, storage and memory of stitched networks against the large one alone."""
    rows = []
    for names in (NAMES[-1:], NAMES):
        sampler = ts.Sampler(names, plan=[1 / len(names)] * len(names), steps=10, solver="dpmpp")
        networks = sampler.networks
        labels = np.resize(np.arange(10), 25).tolist()
        request = sampler.request(jax.random.key(0), labels=labels)
        analysis = request.lower().compile().memory_analysis()
        stored = sum(
            file.stat().st_size
            for name in names
            for file in (Path(ts.__file__).parent / "embedded" / name).rglob("*")
            if file.is_file()
        )
        rows.append([
            " + ".join(names),
            sum(n.card.num_params for n in networks),
            stored,
            sum(leaf.nbytes for n in networks for leaf in jax.tree.leaves(n.params)),
            analysis.temp_size_in_bytes,
        ])  # fmt: skip
    header = ["networks", "parameters", "stored_bytes", "parameter_bytes", "working_bytes"]
    write("cost/results.csv", header, rows)


def plan_of(text: str, names: Sequence[str]) -> ts.Plan:
    """The plan that a sweep's table describes."""
    runs = [run.split(" x ") for run in text.split(", ")]
    steps = [names.index(name) for name, count in runs for _ in range(int(count))]
    return ts.Plan.from_list(steps, len(names))


def measure_calibration() -> None:
    """What calibrations predict of the sweeps' plans, and what they choose.

    A calibration is of all the points that differ in their plan only.
    """
    rows, chosen = [], []
    for sweep in CALIBRATED:
        config = load_config(str(CONFIGS / f"sweep_{sweep}.py"), ts.SweepConfig)
        settings: dict[str, list[ts.Point]] = {}
        for point in config.points:
            if point.options["steps"] > MOST_STEPS:
                continue
            name = setting(sweep, point.series, point.options["solver"], point.options["steps"])
            settings.setdefault(name, []).append(point)
        for name, points in settings.items():
            names = list(points[0].networks)
            samplers = [make_sampler(names, **point.options) for point in points]
            for seed in range(SEEDS):
                found = ts.calibrate(jax.random.key(seed), samplers[0], costs="macs")
                for sampler in samplers:
                    plan = sampler.plan
                    assert plan is not None
                    expected = found.predict(plan)
                    rows.append([
                        name, plan.describe(names, most=4), plan.counts()[0] / plan.steps, seed,
                        expected.damage, expected.error,
                    ])  # fmt: skip
                chosen.append([
                    name, seed, found.plan.describe(names), found.fractions[0], found.damage,
                    found.speedup,
                ])  # fmt: skip
    header = ["setting", "plan", "fraction", "seed", "damage", "damage_error"]
    write("calibration/results.csv", header, rows)
    header = ["setting", "seed", "plan", "fraction", "damage", "speedup"]
    write("calibration/chosen.csv", header, chosen)


def setting(sweep: str, series: str, solver: str, steps: int | str) -> str:
    """What a calibration is of, in words."""
    if sweep == "guidance":
        return series
    return f"{solver}, {steps} steps" if sweep == "steps" else sweep


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(row: dict[str, str], key: str, digits: int = 3) -> str:
    """A mean with its deviation over the seeds, where there are some."""
    mean, error = f"{float(row[key]):.{digits}f}", row[f"{key}_std"]
    return f"{mean} ± {float(error):.{digits}f}" if error else mean


MEASURES = {
    "FD": "fd", "score": "score", "precision": "precision", "recall": "recall",
    "accuracy": "accuracy",
}  # fmt: skip
"""What they are called, and the first part of their columns."""

FD = "fd_fashion-features"


def change(sweep: str, point: str, base: str) -> str:
    """By how much a point's distance differs from another's of the same noise, seed by seed."""

    def by_seed(name: str) -> np.ndarray:
        files = (RESULTS / sweep / "results").glob(f"{name}-seed*.json")
        return np.array([json.loads(file.read_text())["metrics"][FD] for file in sorted(files)])

    found = by_seed(point) / by_seed(base) - 1
    return f"{found.mean():+.1%} ± {found.std(ddof=1):.1%}" if found.any() else ""


def fractions() -> str:
    rows, pair = read("fractions/results.csv"), "fashion-s-+-fashion-xl"
    return markdown(
        ["fraction", "FD", "change of FD", *list(MEASURES)[1:], "speed-up"],
        [
            [
                row["x"],
                number(row, FD),
                change("fractions", f"{pair}-{row['x']}", f"{pair}-0"),
                *(number(row, f"{key}_fashion-features") for key in list(MEASURES.values())[1:]),
                f"{float(row['speedup']):.2f}",
            ]
            for row in rows
        ],
    )


def predictions() -> str:
    rows = read("predictions/results.csv")
    chosen = ["0", "5", "10", "20", "30", "40", "45", "49"]
    cells = {(r["network"], r["step"]): r for r in rows}
    return markdown(
        ["", *(f"step {i}" for i in chosen)],
        [
            [f"{title}, {name}", *(f"{float(cells[name, i][key]):.3f}" for i in chosen)]
            for key, title in (("cosine_eps", "cosine of the noise"), ("rms_x0", "L2 of the image"))
            for name in NAMES[:-1]
        ],
    )


def spectrum() -> str:
    rows = read("spectrum/results.csv")
    chosen = ["0", "5", "10", "20", "30", "40", "45", "49"]
    cells = {(r["periods"], r["step"]): f"{float(r['share']):.2f}" for r in rows}
    periods = dict.fromkeys(row["periods"] for row in rows)
    return markdown(
        ["periods across the image", *(f"step {i}" for i in chosen)],
        [[p, *(cells[p, i] for i in chosen)] for p in periods],
    )


def cost() -> str:
    rows = read("cost/results.csv")
    base = rows[0]

    def cell(row: dict[str, str], key: str, unit: float, name: str) -> str:
        return f"{int(row[key]) / unit:.1f} {name} ({int(row[key]) / int(base[key]):.2f})"

    return markdown(
        ["networks", "parameters", "stored (float16)", "loaded (float32)", "working memory"],
        [
            [
                row["networks"],
                cell(row, "parameters", 1e6, "M"),
                *(
                    cell(row, f"{what}_bytes", 1e6, "MB")
                    for what in ("stored", "parameter", "working")
                ),
            ]
            for row in rows
        ],
    )


def allocation() -> str:
    rows, plans = read("allocation/results.csv"), predicted("allocation")
    published = ["10.06", "12.94", "19.02", "27.61"]
    pair, first = "fashion-s-and-fashion-xl-5-steps-each", rows[0]["x"]
    return markdown(
        ["order", "FD", "change of FD", *list(MEASURES)[1:], "published FID", "predicted damage"],
        [
            [
                row["x"],
                number(row, FD),
                change("allocation", *(f"{pair}-{x.replace(' ', '-')}" for x in (row["x"], first))),
                *(number(row, f"{key}_fashion-features") for key in list(MEASURES.values())[1:]),
                fid,
                f"{damage:.1%}",
            ]
            for row, fid, (_, damage, *_) in zip(rows, published, plans, strict=True)
        ],
    )


def pairs() -> str:
    """Those of the 66 plans in which two networks share the steps."""
    cells = {
        tuple(plan_of(row["plan"], THREE).counts()): number(row, FD)
        for row in read("three/results.csv")
    }
    counts: list[tuple[str, Callable[[int], tuple[int, int, int]]]] = [
        ("fashion-s, then fashion-xl", lambda early: (early, 0, 10 - early)),
        ("fashion-b, then fashion-xl", lambda early: (0, early, 10 - early)),
        ("fashion-s, then fashion-b", lambda early: (early, 10 - early, 0)),
    ]
    return markdown(
        ["fraction", *(name for name, _ in counts)],
        [[f"{i / 10:g}", *(cells[plan(i)] for _, plan in counts)] for i in range(11)],
    )


def costs_of_three() -> list[tuple[list[int], float, dict[str, str]]]:
    """Of the 66 plans the steps of each network, and their multiply-adds over fashion-xl's."""
    macs = [ts.load(name).card.macs for name in THREE]
    found = []
    for row in read("three/results.csv"):
        counts = plan_of(row["plan"], THREE).counts()
        cost = sum(map(int.__mul__, counts, macs)) / (sum(counts) * macs[-1])
        found.append((counts, cost, row))
    return found


def on_front(rows: Sequence[tuple[list[int], float, dict[str, str]]]) -> list[bool]:
    """By cost; times of 66 plans lie closer together than they can be measured."""
    distances = [float(row[FD]) for *_, row in rows]
    return pareto_front([cost for _, cost, _ in rows], distances, lower_is_better=True)


def draw_three() -> None:
    """All 66 plans by cost, and the front."""
    rows = costs_of_three()
    chosen = dict(zip([str(counts) for counts, *_ in rows], on_front(rows), strict=True))
    series = list(dict.fromkeys(row["series"] for *_, row in rows))
    own = [[each for each in rows if each[-1]["series"] == name] for name in series]
    lines = [
        charts.Line(
            name, [cost for _, cost, _ in points], [float(row[FD]) for *_, row in points],
            [0.0] * len(points), [", ".join(map(str, counts)) for counts, *_ in points],
        )
        for name, points in zip(series, own, strict=True)
    ]  # fmt: skip
    figure = charts.front(
        lines, [[chosen[str(counts)] for counts, *_ in points] for points in own],
        title=f"Frechet distance of 66 plans\n{rows[0][-1]['images']} images, one seed",
        x_label="multiply-adds, over those of fashion-xl alone", y_label="Frechet distance",
        label="steps of fashion-s, -b, -xl",
    )  # fmt: skip
    chart("three/front.png", figure)


def three() -> str:
    """The front of all 66 plans."""
    rows = costs_of_three()
    front = sorted(itertools.compress(rows, on_front(rows)), key=lambda each: -each[1])
    return markdown(
        ["steps of fashion-s, -b, -xl", "FD", "speed-up by multiply-adds"],
        [[", ".join(map(str, counts)), number(row, FD), f"{1 / cost:.2f}"]
         for counts, cost, row in front],
    )  # fmt: skip


def guidance() -> str:
    """The distance by fraction, a column for each kind."""
    rows = read("guidance/results.csv")
    series = list(dict.fromkeys(row["series"] for row in rows))
    cells = {(row["x"], row["series"]): number(row, FD) for row in rows}
    return markdown(
        ["fraction", *series],
        [[x, *(cells[x, name] for name in series)] for x in dict.fromkeys(r["x"] for r in rows)],
    )


def finetuned() -> str:
    """The distance by fraction, and what training on changed of it."""
    rows = read("finetuned/results.csv")
    base, *trained = dict.fromkeys(row["series"] for row in rows)
    cells = {(row["x"], row["series"]): number(row, FD) for row in rows}

    def point(series: str, x: str) -> str:
        return f"{series.replace(' ', '-')}-{x}"

    return markdown(
        ["fraction", base, *(title for name in trained for title in (name, "change"))],
        [
            [x, cells[x, base]]
            + [cell for name in trained
               for cell in (cells[x, name], change("finetuned", point(name, x), point(base, x)))]
            for x in dict.fromkeys(row["x"] for row in rows)
        ],
    )  # fmt: skip


def steps() -> str:
    """The distance by solver and number of steps, a column for each fraction."""
    rows = read("steps/results.csv")
    ways = list(dict.fromkeys(row["series"].split(", ")[1] for row in rows))
    cells = {
        (row["solver"], row["x"], row["series"].split(", ")[1]): number(row, FD) for row in rows
    }
    return markdown(
        ["solver", "steps", *ways],
        [
            [solver, count, *(cells[solver, count, way] for way in ways)]
            for solver, count in dict.fromkeys((row["solver"], row["x"]) for row in rows)
        ],
    )


def measured(name: str) -> dict[str, float]:
    """The distance of each plan of a setting, as the sweep found it."""
    return {
        row["plan"]: float(row[FD])
        for sweep in CALIBRATED
        for row in read(f"{sweep}/results.csv")
        if setting(sweep, row["series"], row["solver"], row["steps"]) == name
    }


def predicted(name: str) -> list[tuple[float, float, float, float]]:
    """Of each plan of a setting the share of fashion-s, the mean damage, its deviation, and FD."""
    own = [row for row in read("calibration/results.csv") if row["setting"] == name]
    distances, found = measured(name), []
    for plan in dict.fromkeys(row["plan"] for row in own):
        same = [row for row in own if row["plan"] == plan]
        damages = [float(row["damage"]) for row in same]
        share = float(same[0]["fraction"])
        found.append(
            (share, float(np.mean(damages)), float(np.std(damages, ddof=1)), distances[plan])
        )
    return found


def choices(name: str) -> list[float]:
    """The fractions of the smallest network that the seeds chose."""
    rows = read("calibration/chosen.csv")
    return [float(row["fraction"]) for row in rows if row["setting"] == name]


def calibration() -> str:
    """Damage of each fraction, as the seeds predict it, and how often it was chosen."""
    chosen = choices("fractions")
    return markdown(
        ["fraction", "predicted damage", "measured FD", "chosen"],
        [
            [f"{share:g}", f"{mean:.2%} ± {std:.2%}", f"{fd:.3f}",
             f"{chosen.count(share)} of {len(chosen)}"]
            for share, mean, std, fd in predicted("fractions")
        ],
    )  # fmt: skip


def settings() -> str:
    """How well predictions order the plans of each setting, and the shares of fashion-s chosen."""
    lines = []
    for name in dict.fromkeys(row["setting"] for row in read("calibration/results.csv")):
        plans = predicted(name)
        rank = spearmanr([plan[1] for plan in plans], [plan[3] for plan in plans]).statistic
        chosen = ", ".join(dict.fromkeys(f"{each:g}" for each in sorted(choices(name))))
        lines.append([CALLED.get(name, name), f"{len(plans)}", f"{rank:.2f}", chosen])
    return markdown(["setting", "plans", "rank correlation", "chosen"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "fractions": fractions,
    "pairs": pairs,
    "three": three,
    "allocation": allocation,
    "steps": steps,
    "guidance": guidance,
    "finetuned": finetuned,
    "predictions": predictions,
    "spectrum": spectrum,
    "cost": cost,
    "calibration": calibration,
    "settings": settings,
}


def page(text: str) -> str:
    """The page with its tables, each between a comment with its name and one that ends it."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true")
    if not parser.parse_args().tables:
        measure_predictions()
        measure_spectrum()
        measure_cost()
        measure_calibration()
        draw_three()
    file = HERE / "results.md"
    write_text(file, page(file.read_text()))


if __name__ == "__main__":
    main()
