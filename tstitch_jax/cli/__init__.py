"""The command line, ``tstitch``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tstitch_jax.cli import evaluation, networks, sampling, sweep
from tstitch_jax.cli.devices import keep_programs, leave_hosts
from tstitch_jax.cli.text import printable, whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tstitch: error: {message} (see {self.prog} --help)\n")


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

    command("networks", networks.networks_command, "list the networks that can be loaded by name",
            "tstitch networks")  # fmt: skip

    sub = command(
        "sample", sampling.sample_command, "draw a labelled grid of images from stitched networks",
        "tstitch sample --networks fashion-s fashion-xl --fractions 0.4 0.6 --labels Bag Dress",
    )  # fmt: skip
    sampling.add_options(
        sub,
        fractions="give it again for another row (default: a row per 0, 0.2, ... 1)",
        plan="a row for a plan that ts.Plan.save wrote, instead of fractions or beside them",
        labels="one a column (default: the first ten)",
    )
    sub.add_argument("--start", metavar="FILE",
                     help="an image to start from, scaled and cut to the size")  # fmt: skip
    sub.add_argument("--strength", type=float, metavar="S",
                     help="how far to change it, above 0, at most 1")  # fmt: skip
    sub.add_argument("--out", default="samples.png", metavar="FILE",
                     help="the picture (default: samples.png)")  # fmt: skip

    sub = command(
        "generate", sampling.generate_command,
        "sample many images into a folder, over all devices and hosts; stopped, it goes on",
        "tstitch generate --num 50000 --fractions 0.4 0.6 --out samples",
    )  # fmt: skip
    sub.add_argument("--num", type=whole(1), required=True, metavar="N", help="how many images")
    sub.add_argument("--out", required=True, metavar="DIR",
                     help="the folder: samples.npz, settings.json, shards/")  # fmt: skip
    sampling.add_options(
        sub,
        fractions="needed for more than one network",
        plan="a plan that ts.Plan.save wrote, instead of fractions",
        labels="which the images take in turn (default: all)",
    )
    sub.add_argument(
        "--batch", type=whole(1), default=16, metavar="B",
        help="images of a device at a time, and of a file (default: 16)",
    )  # fmt: skip
    sub.add_argument("--png", action="store_true", help="write each image as a PNG too")
    sub.add_argument(
        "--model-devices", type=whole(1), default=1, metavar="M",
        help="spread each network's parameters over M devices (default: 1)",
    )  # fmt: skip
    sub.add_argument(
        "--distributed", action="store_true",
        help="several hosts, of a TPU pod, Slurm or what else jax.distributed finds by itself",
    )  # fmt: skip
    sub.add_argument("--coordinator", metavar="ADDRESS",
                     help="several hosts: HOST:PORT of the first, with the next two")  # fmt: skip
    sub.add_argument("--num-hosts", type=whole(1), metavar="N", help="how many hosts")
    sub.add_argument("--host", type=whole(0), metavar="I", help="which one this is, from 0")
    sub.add_argument(
        "--host-timeout", type=whole(1), default=60, metavar="SECONDS",
        help="how long hosts wait for each other, before one counts as dead (default: 60)",
    )  # fmt: skip

    sub = command(
        "evaluate", evaluation.evaluate_command,
        "FID, sFID, Inception Score, precision, recall of images against a reference",
        "tstitch evaluate samples VIRTUAL_imagenet256_labeled.npz --out result.json",
    )  # fmt: skip
    evaluation.add_options(sub)

    sub = command(
        "sweep", sweep.sweep_command,
        "quality against time over many ways of sampling: a table, charts; stopped, it goes on",
        "tstitch sweep configs/sweep_fractions.py --out runs/fractions",
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="a Python file with a SweepConfig, config")
    sub.add_argument("--out", metavar="DIR",
                     help="folder of the sweep (default: runs/ and the file's name)")  # fmt: skip
    sub.add_argument(
        "--reference", metavar="SPEC",
        help="what tstitch evaluate takes as REFERENCE, instead of the configuration's",
    )  # fmt: skip
    sub.add_argument("--dry-run", action="store_true",
                     help="print plans, costs and the expected time alone")  # fmt: skip

    sub = command(
        "export", sampling.export_command,
        "write a sampler, weights and all, to a file that needs JAX alone",
        "tstitch export --fractions 0.4 0.6 --labels Bag Dress --out sampler.npz",
    )  # fmt: skip
    sub.add_argument("--out", required=True, metavar="FILE", help="the .npz file")
    sampling.add_options(
        sub,
        fractions="needed for more than one network; a call may give another plan",
        plan="a plan that ts.Plan.save wrote, instead of fractions",
        labels="one an image; a call may give as many others (default: the first ten)",
    )
    sub.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="NAME",
        help="for what it is lowered (default: cpu cuda tpu)",
    )  # fmt: skip

    sub = command(
        "convert", networks.convert_command, "convert a foreign checkpoint to a network folder",
        "tstitch convert DiT-XL-2-256x256.pt networks/dit-xl",
    )  # fmt: skip
    sub.add_argument(
        "source",
        metavar="SRC",
        help="a .pt, .pth, .ckpt, .bin or .safetensors file, a *.index.json, or the folder of a "
        "network of diffusers or transformers (config.json and weights); nothing in it is run",
    )
    sub.add_argument("out", metavar="OUT", help="the folder to write")
    sub.add_argument(
        "--family",
        metavar="NAME",
        help="dit, sit, autoencoder, inception, text_encoder or clip (default: told from the "
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
        "train", networks.train_command, "train a network, or go on with a run that was stopped",
        "tstitch train configs/fashion_s.py --out runs/fashion-s",
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="a Python file with a TrainConfig, config")
    sub.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    sub.add_argument(
        "--data", metavar="SPEC", help="an .npz file or tfds:NAME, instead of the configuration's"
    )
    sub.add_argument("--steps", type=whole(1), metavar="N",
                     help="number of steps, instead of the configuration's")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    status = 0
    try:
        keep_programs()
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        # Names out of a file may hold anything, such as control sequences.
        line = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
        line = printable(line)
        print(f"tstitch: error: {line}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        print(f"tstitch: error: too many images at a time for the device: {first}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("tstitch: stopped", file=sys.stderr)
        status = 130
    if status:
        leave_hosts(status)
    return status
