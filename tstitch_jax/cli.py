"""The command line, ``tstitch``."""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tstitch_jax.types import BaseCard, Card

if TYPE_CHECKING:
    from tstitch_jax.types import Network

EMBEDDED_PAIR = ("fashion-s", "fashion-xl")
DEFAULT_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REPEATS = 3
"""Timed runs per row, interleaved; the median is shown."""


def _count(value: float) -> str:
    for unit in ("", "K", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _labels(texts: Sequence[str] | None, card: Card) -> list[int]:
    """Class labels from numbers or names; all classes by default, at most ten."""
    from tstitch_jax.schedules import unknown

    if texts is None:
        return list(range(min(card.num_classes, 10)))
    numbers = {name.lower(): i for i, name in enumerate(card.class_names)}
    labels = []
    for text in texts:
        if text.lower() in numbers:
            labels.append(numbers[text.lower()])
        elif text.removeprefix("-").isdecimal():
            labels.append(int(text))
        else:
            raise unknown("label", text, card.class_names or [f"0 to {card.num_classes - 1}"])
    return labels


def _scale(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {text!r}") from None


def networks_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax import checkpoint, hub

    known: dict[str, BaseCard | hub.Public] = {
        name: checkpoint.read_card(hub.find(name)) for name in hub.embedded_names()
    }
    known |= hub.PUBLIC
    rows = []
    for name, card in known.items():
        where = "here" if isinstance(card, BaseCard) or hub.is_cached(name) else "download"
        classes = str(getattr(card, "num_classes", 0) or "-")
        shape = "x".join(map(str, card.image_shape))
        rows.append(
            [name, _count(card.num_params), _count(card.macs), shape, classes, where,
             card.license, card.source, card.data]
        )  # fmt: skip
    header = ["network", "parameters", "FLOPs", "input", "classes", "where", "license", "source",
              "data"]  # fmt: skip
    print(_table(header, rows))
    print(
        "\nFLOPs: multiply-adds of one forward pass of one input, as the DiT paper counts them."
        "\nWhat is not here is downloaded and converted when it is first used, into "
        f"{hub.cache_folder()}."
    )


def convert_command(arguments: argparse.Namespace) -> None:
    from checkpoints_convert import convert

    card = convert(
        arguments.source,
        arguments.out,
        family=arguments.family,
        num_heads=arguments.num_heads,
        license=arguments.license,
        force=arguments.force,
    )
    config = ", ".join(f"{k} {v}" for k, v in card.config.items())
    print(f"{card.architecture}: {config}")
    if isinstance(card, Card):
        shape = "x".join(map(str, card.image_shape))
        print(
            f"{shape} inputs, {card.num_classes} classes, target {card.target}, schedule "
            f"{card.schedule['name']}, guidance on {card.guidance_channels or 'all'} channels, "
            f"latents of {card.autoencoder or 'no autoencoder'}"
        )
        if card.config["variant"] == "dit":
            print("A SiT has the same tensors: if it is one, give --family sit.")
    print(f"{_count(card.num_params)} parameters, SHA-256 {card.source_checksum}\n{arguments.out}")


def _rows(networks: Sequence[Network], arguments: argparse.Namespace) -> list[Any]:
    """The rows of the picture: a label, and the fractions or the plan of each."""
    from tstitch_jax import Plan

    def row(fractions: Sequence[float]) -> tuple[str, dict[str, Any]]:
        # Of two networks the first one's share says it all.
        shown = fractions[:1] if len(fractions) == 2 else fractions
        return " ".join(f"{f:g}" for f in shown), dict(fractions=list(fractions))

    rows = [row(fractions) for fractions in arguments.fractions or ()]
    rows += [(Path(file).stem, dict(plan=Plan.load(file))) for file in arguments.plan or ()]
    if rows:
        return rows
    if len(networks) == 1:
        return [row([1.0])]
    if len(networks) == 2:
        return [row([f, 1 - f]) for f in DEFAULT_FRACTIONS]
    raise ValueError(f"give --fractions or --plan for the {len(networks)} networks")


def sample_command(arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    import tstitch_jax as ts
    from tstitch_jax import checks, pictures, pipeline

    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[arguments.dtype]
    networks = [ts.load(name, dtype) for name in arguments.networks]
    checks.check_networks(networks)
    card = networks[-1].card
    wanted = arguments.autoencoder or card.autoencoder
    try:
        autoencoder = ts.load(wanted, dtype) if wanted else None
    except (ValueError, OSError) as error:
        if arguments.autoencoder:
            raise
        raise ValueError(
            f"{card.name} makes latents, and its card names the autoencoder {wanted}; give another "
            f"with --autoencoder, or mend this: {error}"
        ) from None
    names = [n.card.name for n in networks]
    labels = _labels(arguments.labels, card)

    def request(**who: Any) -> pipeline.Sampling:
        return pipeline.prepare(
            jax.random.key(arguments.seed),
            networks,
            labels=labels,
            steps=arguments.times or arguments.steps,
            spacing=arguments.spacing,
            solver=arguments.solver,
            eta=arguments.eta,
            cfg_scale=arguments.cfg_scale,
            cfg_channels=arguments.cfg_channels,
            cfg_rescale=arguments.cfg_rescale,
            cfg_interval=arguments.cfg_interval,
            auto_scale=arguments.auto_scale,
            autoencoder=autoencoder,
            **who,
        )

    rows = _rows(networks, arguments)
    requests = [request(**who) for _, who in rows]
    out = pictures.check_png(arguments.out)
    # The dearest network alone is what the speed-up is measured against, drawn or not.
    dearest = max(range(len(networks)), key=lambda k: (networks[k].card.macs, k))
    alone = [set(np.asarray(r.plan.networks).tolist()) for r in requests]
    baseline = alone.index({dearest}) if {dearest} in alone else len(rows)
    if baseline < len(rows):
        timed = requests
    else:
        timed = [*requests, request(fractions=[float(k == dearest) for k in range(len(networks))])]

    start = time.perf_counter()
    print(f"compiling one sampler for every row ({jax.default_backend()}) ...", file=sys.stderr)
    execute = timed[0].compile()
    compile_time = time.perf_counter() - start

    times: list[list[float]] = [[] for _ in timed]
    images: list[np.ndarray] = [np.empty(0)] * len(timed)
    with tqdm(total=len(timed) * (REPEATS + 1), desc="sampling", unit="run") as bar:
        for repeat in range(REPEATS + 1):
            for i, sampling in enumerate(timed):
                start = time.perf_counter()
                result = jax.block_until_ready(execute(sampling.inputs))
                if repeat:  # the first round warms up
                    times[i].append(time.perf_counter() - start)
                images[i] = np.asarray(result)
                bar.update()
    medians = [statistics.median(t) for t in times]
    speedups = [medians[baseline] / t for t in medians]

    table = [
        [label, s.plan.describe(names), f"{t:.2f} s", f"{len(labels) / t:.1f}", f"{u:.2f}x"]
        for (label, _), s, t, u in zip(rows, requests, medians, speedups, strict=False)
    ]
    guided = "unguided" if arguments.cfg_scale is None else f"guidance {arguments.cfg_scale:g}"
    if arguments.auto_scale is not None:
        guided += f", autoguidance {arguments.auto_scale:g}"
    if arguments.cfg_interval is not None:
        guided += " at noise levels {:g} to {:g}".format(*arguments.cfg_interval)
    title = f"{' + '.join(names)}: fraction of the steps taken by {names[0]}"
    if len(networks) == 1:
        title = names[0]
    elif len(networks) > 2:
        title = f"{' + '.join(names)}: fraction of each"
    footer = (
        f"{arguments.solver}, {requests[0].plan.steps} steps, {guided}, seed {arguments.seed}, "
        f"{jax.default_backend()}; {len(labels)} images a row. "
        f"Time of a row without compilation; one compilation of {compile_time:.1f} s serves all."
    )
    picture = pictures.grid(
        np.stack(images[: len(rows)]),
        [f"{f}\n{t:.2f} s\n{u:.2f}x" for (f, *_), t, u in
         zip(table, medians, speedups, strict=False)],
        [card.class_names[k] if card.class_names else str(k) for k in labels],
        title=title,
        footer=footer,
    )  # fmt: skip
    pictures.write_png(picture, out)
    print(_table(["fraction", "plan", "time", "images/s", "speed-up"], table))
    print(f"compilation: {compile_time:.1f} s, once for all rows\npicture: {out}")


def _load_config(path: str) -> Any:
    """The ``config`` of a Python file."""
    from tstitch_jax.training import TrainConfig

    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no configuration at {path}; give a Python file such as those in configs/"
        )
    sys.path.insert(0, str(file.parent))  # configurations may share a file beside them
    try:
        config = runpy.run_path(path).get("config")
    except (Exception, SystemExit) as error:  # whatever the user's own file raises
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path} has no TrainConfig named config")
    return config


def _preview(steps: int = 50, rows: int = 4) -> Callable[[Network, Path], None]:
    """A hook that draws a few images of each class."""

    def preview(network: Network, path: Path) -> None:
        import jax
        import numpy as np

        from tstitch_jax import pictures, pipeline

        card = network.card
        if card.autoencoder or card.image_shape[2] not in (1, 3):
            return
        labels = _labels(None, card)
        images = pipeline.sample(jax.random.key(0), [network], labels=labels * rows, steps=steps)
        picture = pictures.grid(
            np.asarray(images).reshape(rows, len(labels), *card.image_shape),
            [""] * rows,
            [card.class_names[k] if card.class_names else str(k) for k in labels],
            title=f"{card.name}, {path.stem}",
        )
        pictures.write_png(picture, path)

    return preview


def train_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax.training import train

    config = _load_config(arguments.config)
    changes = {k: getattr(arguments, k) for k in ("data", "steps") if getattr(arguments, k)}
    config = dataclasses.replace(config, **changes)
    out = arguments.out or f"runs/{config.card.name}"
    network = train(config, out, preview=_preview())
    print(f"{network.card.name}: {_count(network.card.num_params)} parameters in {out}/network")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tstitch: error: {message} (see {self.prog} --help)\n")


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = text.removeprefix("-").isdecimal()
        if not digits or int(text) < low or (high is not None and int(text) > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}, got {text!r}")
        return int(text)

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from tstitch_jax import __version__

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=100)

    parser = _Parser(
        prog="tstitch", description="Stitched sampling of diffusion models.",
        epilog="example: tstitch sample --fractions 0.4 0.6 --out samples.png",
        formatter_class=formatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tstitch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=f"example: {example}",
            formatter_class=formatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    command("networks", networks_command, "list the networks that can be loaded by name",
            "tstitch networks")  # fmt: skip

    sub = command(
        "sample", sample_command, "draw a labelled grid of images from stitched networks",
        "tstitch sample --networks fashion-s fashion-xl --fractions 0.4 0.6 --labels Bag Dress",
    )  # fmt: skip
    sub.add_argument(
        "--networks",
        nargs="+",
        default=list(EMBEDDED_PAIR),
        metavar="NAME",
        help="names or folders, first steps first (default: the embedded pair)",
    )
    sub.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        action="append",
        metavar="F",
        help="each network's share of the steps, summing to 1; give it again for "
        "another row (default for two networks: a row per 0, 0.2, ... 1)",
    )
    sub.add_argument(
        "--steps",
        default="50",
        metavar="N",
        help="number of steps, or a spec like ddim50 or 10,10,20 (default: 50)",
    )
    sub.add_argument(
        "--plan", action="append", metavar="FILE",
        help="a row for a plan that ts.Plan.save wrote, instead of fractions or beside them",
    )  # fmt: skip
    sub.add_argument("--times", nargs="+", type=float, metavar="T",
                     help="the falling times themselves, instead of --steps")  # fmt: skip
    sub.add_argument(
        "--spacing", default="respaced", metavar="NAME",
        help="respaced (default), leading, linspace, trailing, karras, exponential, ...",
    )  # fmt: skip
    sub.add_argument(
        "--solver", default="ddim", metavar="NAME",
        help="ddim (default), ddpm, dpmpp, unipc, euler, heun, pndm, sde, ...",
    )  # fmt: skip
    sub.add_argument("--eta", type=float, help="noise of ddim and euler_ancestral, 0 to 1")
    sub.add_argument(
        "--cfg-scale",
        type=_scale,
        default=1.5,
        metavar="S",
        help="guidance scale, or none for the conditional half alone (default: 1.5)",
    )
    sub.add_argument(
        "--cfg-channels",
        type=int,
        metavar="C",
        help="guide only the first C channels (default: what the card says)",
    )
    sub.add_argument("--cfg-rescale", type=float, default=0.0, metavar="PHI",
                     help="rescaled guidance, 0 to 1 (default: 0)")  # fmt: skip
    sub.add_argument(
        "--cfg-interval", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="guide only at noise levels sigma / alpha between these",
    )  # fmt: skip
    sub.add_argument("--auto-scale", type=float, metavar="S",
                     help="autoguidance of the later networks by the first")  # fmt: skip
    sub.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="classes by number or name, one a column (default: the first ten)",
    )
    sub.add_argument(
        "--autoencoder",
        metavar="NAME",
        help="name or folder of what decodes latents (default: what the card says)",
    )
    sub.add_argument(
        "--seed", type=_whole(0, 2**32 - 1), default=0, help="seed of the noise (default: 0)"
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the networks compute in (default: float32)",
    )
    sub.add_argument("--out", default="samples.png", metavar="FILE",
                     help="the picture (default: samples.png)")  # fmt: skip

    sub = command(
        "convert", convert_command, "convert a foreign checkpoint to a network folder",
        "tstitch convert DiT-XL-2-256x256.pt networks/dit-xl",
    )  # fmt: skip
    sub.add_argument(
        "source",
        metavar="SRC",
        help="a .pt, .pth, .ckpt, .bin or .safetensors file, a *.index.json, or the folder of a "
        "diffusers network (config.json and weights); nothing in it is run",
    )
    sub.add_argument("out", metavar="OUT", help="the folder to write")
    sub.add_argument(
        "--family",
        metavar="NAME",
        help="dit, sit or autoencoder (default: told from the tensors' names, where a SiT counts "
        "as a dit)",
    )
    sub.add_argument("--num-heads", type=_whole(1), metavar="N",
                     help="attention heads, for a network of no published size")  # fmt: skip
    sub.add_argument("--license", default="", metavar="TEXT", help="what the card says of it")
    sub.add_argument("--force", action="store_true", help="replace a network folder at OUT")

    sub = command(
        "train", train_command, "train a network, or go on with a run that was stopped",
        "tstitch train configs/fashion_s.py --out runs/fashion-s",
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="a Python file with a TrainConfig, config")
    sub.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    sub.add_argument(
        "--data", metavar="SPEC", help="an .npz file or tfds:NAME, instead of the configuration's"
    )
    sub.add_argument("--steps", type=_whole(1), metavar="N",
                     help="number of steps, instead of the configuration's")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        # Names out of a file may hold anything, such as control sequences.
        line = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
        line = "".join(c if c.isprintable() else "?" for c in line)
        print(f"tstitch: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tstitch: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
