"""Measures what ``docs/results.md`` says besides the sweeps, and writes all of its tables.

    python docs/make_results.py            # some minutes on two cores
    python docs/make_results.py --tables   # only the tables, from the files that are there

The sweeps are run before, each by the command of its file in ``configs/``.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tstitch_jax as ts
from tstitch_jax import charts, pipeline
from tstitch_jax.files import whole_file

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = ["fashion-s", "fashion-xl"]
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
    networks = [ts.load(name) for name in NAMES]
    found = ts.calibrate(
        jax.random.key(0), networks, steps=STEPS, conditions=CONDITIONS, cfg_scale=1.5,
        costs="macs",
    )  # fmt: skip
    time = np.asarray(ts.make_knots(networks[-1].schedule, STEPS).time)[:-1]
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
    _, predicted = ts.sample(
        jax.random.key(0), [ts.load("fashion-xl")], labels=labels, steps=STEPS,
        return_predictions=True,
    )  # fmt: skip
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
        networks = [ts.load(name) for name in names]
        request = pipeline.prepare(
            jax.random.key(0), networks, labels=np.resize(np.arange(10), 25).tolist(), steps=10,
            solver="dpmpp", fractions=[1 / len(names)] * len(names),
        )  # fmt: skip
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
    counts = dict(run.split(" x ") for run in text.split(", "))
    return ts.Plan.from_counts([int(counts.get(name, 0)) for name in names])


def measure_calibration() -> None:
    """What calibrations predict of the sweep's plans, beside what it measured."""
    networks = [ts.load(name) for name in NAMES]
    rows = []
    for seed in range(SEEDS):
        found = ts.calibrate(
            jax.random.key(seed), networks, steps=10, spacing="trailing", solver="dpmpp",
            cfg_scale=1.5, costs="macs",
        )  # fmt: skip
        for row in read("fractions/results.csv"):
            expected = found.predict(plan_of(row["plan"], NAMES))
            chosen = expected.plan.counts() == found.plan.counts()
            rows.append([
                seed, row["x"], expected.damage, expected.error, float(row[FD]),
                "yes" if chosen else "no",
            ])  # fmt: skip
    write("calibration/results.csv", ["seed", "x", "damage", "damage_error", FD, "chosen"], rows)


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


def fractions() -> str:
    rows = read("fractions/results.csv")
    return markdown(
        ["fraction", *MEASURES, "speed-up"],
        [
            [
                row["x"],
                *(number(row, f"{key}_fashion-features") for key in MEASURES.values()),
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


def calibration() -> str:
    """Damage of each fraction, as the seeds predict it, and how often it was chosen."""
    rows = read("calibration/results.csv")
    lines = []
    for x in dict.fromkeys(row["x"] for row in rows):
        own = [row for row in rows if row["x"] == x]
        damages = [float(row["damage"]) for row in own]
        chosen = sum(row["chosen"] == "yes" for row in own)
        lines.append([
            x, f"{np.mean(damages):.2%} ± {np.std(damages, ddof=1):.2%}",
            f"{float(own[0][FD]):.3f}", f"{chosen} of {len(own)}",
        ])  # fmt: skip
    return markdown(["fraction", "predicted damage", "measured FD", "chosen"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "fractions": fractions,
    "predictions": predictions,
    "spectrum": spectrum,
    "cost": cost,
    "calibration": calibration,
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
    file = HERE / "results.md"
    text = page(file.read_text())
    with whole_file(file) as stream:
        stream.write(text.encode())


if __name__ == "__main__":
    main()
