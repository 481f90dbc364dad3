"""The command line, ``tstitch``."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tstitch_jax.cli import calibration, evaluation, networks, sampling, sweep
from tstitch_jax.cli.completion import PrintCompletion
from tstitch_jax.cli.devices import keep_programs, leave_hosts
from tstitch_jax.cli.text import number, whole
from tstitch_jax.core.checks import first_line, printable, unknown


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what was meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tstitch: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            command = action.metavar == "COMMAND"
            kind = "command" if command else action.option_strings[-1].removeprefix("--")
            self.error(str(unknown(kind, value, action.choices)))

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            name, known = extra[0].split("=")[0], self._option_string_actions
            near = difflib.get_close_matches(name, known, n=1) if name.startswith("-") else []
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
        return found, extra


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help for a screen of 80 columns: ``NAME ...`` where lists are taken, options in one line."""

    def __init__(self, prog: str) -> None:
        width = max(60, min(shutil.get_terminal_size().columns, 100))
        super().__init__(prog, max_help_position=26, width=width)

    def _format_args(self, action: argparse.Action, default_metavar: Any) -> str:
        if action.nargs == "+":
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from tstitch_jax import __version__

    parser = _Parser(
        prog="tstitch", usage="tstitch COMMAND [options]",
        description="Stitched sampling of diffusion models.",
        epilog="example: tstitch sample --fractions 0.4 0.6 --out samples.png\n"
        "Each command has --help, and an example there.",
        formatter_class=_Help,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tstitch {__version__}",
                        help="show the version and exit")  # fmt: skip
    parser.add_argument("--completion", action=PrintCompletion)
    commands = parser.add_subparsers(
        prog="tstitch", title="commands", dest="command", required=True, metavar="COMMAND"
    )

    def command(
        name: str, run: Callable, help: str, example: str, takes: str = "", more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, usage=f"tstitch {name} {takes}[options]", description=help + more,
            epilog=f"example: {example}", formatter_class=_Help,
        )  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    command("networks", networks.networks_command, "list the networks that can be loaded by name",
            "tstitch networks")  # fmt: skip

    sub = command(
        "sample", sampling.sample_command, "draw a labelled grid of images",
        "tstitch sample --fractions 0.4 0.6 --labels Bag Dress --out bags.png",
    )  # fmt: skip
    sampling.add_options(
        sub,
        fractions="each one's share; again: another row (default: six)",
        plan="a row for a plan that ts.Plan.save wrote",
        labels="one a column (default: ten)",
    )
    sub.add_argument("--start", metavar="FILE",
                     help="an image to start from, scaled and cut to the size")  # fmt: skip
    sub.add_argument("--strength", type=number, metavar="S",
                     help="how far to change it, above 0, at most 1")  # fmt: skip
    sub.add_argument("--out", default="samples.png", metavar="FILE",
                     help="the picture (default: samples.png)")  # fmt: skip

    sub = command(
        "generate", sampling.generate_command,
        "draw many images into a folder, over all devices",
        "tstitch generate --num 50000 --fractions 0.4 0.6 --out samples",
        "--num N --out DIR ", "; resumable",
    )  # fmt: skip
    sub.add_argument("--num", type=whole(1), required=True, metavar="N", help="how many images")
    sub.add_argument("--out", required=True, metavar="DIR",
                     help="the folder: samples.npz, settings.json, shards/")  # fmt: skip
    sampling.add_options(
        sub,
        fractions="each one's share of the steps, summing to 1",
        plan="a plan that ts.Plan.save wrote, for --fractions",
        labels="in turn (default: all)",
    )
    sub.add_argument(
        "--batch", type=whole(1), default=16, metavar="B",
        help="images of a device at a time (default: 16)",
    )  # fmt: skip
    sub.add_argument("--png", action="store_true", help="write each image as a PNG too")
    sub.add_argument(
        "--model-devices", type=whole(1), default=1, metavar="M",
        help="spread each network over M devices (default: 1)",
    )  # fmt: skip
    sub.add_argument(
        "--distributed", action="store_true",
        help="several hosts, which JAX finds by itself (pods, Slurm)",
    )  # fmt: skip
    sub.add_argument("--coordinator", metavar="ADDRESS",
                     help="or HOST:PORT of the first, with the next two")  # fmt: skip
    sub.add_argument("--num-hosts", type=whole(1), metavar="N", help="how many hosts")
    sub.add_argument("--host", type=whole(0), metavar="I", help="which one this is, from 0")
    sub.add_argument(
        "--host-timeout", type=whole(1), default=60, metavar="SECONDS",
        help="until a silent host counts as dead (default: 60)",
    )  # fmt: skip

    sub = command(
        "evaluate", evaluation.evaluate_command,
        "FID, sFID, Inception Score, precision, recall",
        "tstitch evaluate samples reference.npz --out result.json",
        "SAMPLES [REFERENCE] ", " of images against a reference",
    )  # fmt: skip
    evaluation.add_options(sub)

    sub = command(
        "calibrate", calibration.calibrate_command,
        "choose where to switch networks",
        "tstitch calibrate --networks fashion-s fashion-xl --tolerance 0.5%",
        more=", from one short run",
    )  # fmt: skip
    goal = sub.add_mutually_exclusive_group()
    goal.add_argument("--tolerance", type=calibration.share, metavar="D",
                      help="the damage that may be done (default: 0.5%%)")  # fmt: skip
    goal.add_argument("--budget", type=calibration.factor, metavar="X",
                      help="the least damage at that speed-up, as 1.5x")  # fmt: skip
    sub.add_argument("--free", action="store_true",
                     help="let an earlier network come back later on")  # fmt: skip
    sub.add_argument("--conditions", type=whole(4), default=64, metavar="B",
                     help="how many trajectories to look at (default: 64)")  # fmt: skip
    sub.add_argument("--costs", choices=("seconds", "macs"), default="seconds", metavar="UNIT",
                     help="seconds, measured here (default), or macs")  # fmt: skip
    sub.add_argument("--out", default="plan.json", metavar="FILE",
                     help="the plan, for --plan (default: plan.json)")  # fmt: skip
    sub.add_argument("--picture", metavar="FILE", help="a PNG: damage by step, and the front")
    sampling.add_options(sub, labels="in turn (default: all)", decodes=False)

    sub = command(
        "sweep", sweep.sweep_command,
        "quality against time over many ways of sampling",
        "tstitch sweep configs/sweep_fractions.py --out runs/fractions",
        "CONFIG ", ": table, charts; resumable",
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="a Python file with a SweepConfig, config")
    sub.add_argument("--out", metavar="DIR",
                     help="the folder (default: runs/ and the file's name)")  # fmt: skip
    sub.add_argument("--reference", metavar="SPEC",
                     help="instead of the configuration's (see evaluate)")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true",
                     help="print plans, costs and the expected time alone")  # fmt: skip

    sub = command(
        "export", sampling.export_command,
        "write a sampler to a file that needs JAX alone",
        "tstitch export --fractions 0.4 0.6 --labels Bag Dress --out sampler.npz",
        "--out FILE ", ": program, weights and all",
    )  # fmt: skip
    sub.add_argument("--out", required=True, metavar="FILE", help="the .npz file")
    sampling.add_options(
        sub,
        fractions="each one's share; a call may give another plan",
        plan="a plan that ts.Plan.save wrote, for --fractions",
        labels="one an image (default: ten)",
    )
    sub.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="NAME",
        help="what it is lowered for (default: cpu cuda tpu)",
    )  # fmt: skip

    sub = command(
        "convert", networks.convert_command, "convert a foreign checkpoint to a network folder",
        "tstitch convert DiT-XL-2-256x256.pt networks/dit-xl", "SRC OUT ",
    )  # fmt: skip
    sub.add_argument(
        "source",
        metavar="SRC",
        help=".pt, .pth, .ckpt, .bin, .safetensors or *.index.json, or a folder of diffusers "
        "or transformers; nothing in it is run",
    )
    sub.add_argument("out", metavar="OUT", help="the folder to write")
    sub.add_argument(
        "--family",
        metavar="NAME",
        help="dit, sit, unet, autoencoder, text_encoder, clip, inception (default: told from the "
        "tensors' names, where a SiT counts as a dit)",
    )
    sub.add_argument("--num-heads", type=whole(1), metavar="N",
                     help="attention heads, for a network of no published size")  # fmt: skip
    sub.add_argument("--tokenizer", metavar="FOLDER",
                     help="of a text encoder (default: the one beside it)")  # fmt: skip
    sub.add_argument("--lora", action="append", nargs="+", default=[], metavar=("FILE", "WEIGHT"),
                     help="merge a LoRA file, as strongly as WEIGHT (default: 1)")  # fmt: skip
    sub.add_argument("--license", default="", metavar="TEXT", help="what the card says of it")
    sub.add_argument("--force", action="store_true", help="replace a network folder at OUT")

    sub = command(
        "train", networks.train_command, "train a network, or go on with a stopped run",
        "tstitch train configs/fashion_s.py --out runs/fashion_s", "CONFIG ",
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="a Python file with a TrainConfig, config")
    sub.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    sub.add_argument("--data", metavar="SPEC",
                     help="an .npz file or tfds:NAME, not the configuration's")  # fmt: skip
    sub.add_argument("--steps", type=whole(1), metavar="N",
                     help="number of steps, not the configuration's")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    status = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no result is lost to a terminal of ASCII
    try:
        keep_programs()
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError) as error:
        # Names out of a file may hold anything, such as control sequences.
        line = re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split()))
        line = printable(line)
        print(f"tstitch: error: {line}", file=sys.stderr)
        status = 2
    except MemoryError as error:
        print(f"tstitch: error: out of memory: {error}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = f"too many images at a time for the device: {first_line(error)}"
        print(f"tstitch: error: {said}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("tstitch: stopped", file=sys.stderr)
        status = 130
    if status:
        leave_hosts(status)
    return status
