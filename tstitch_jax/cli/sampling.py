"""``tstitch sample``, ``generate`` and ``export``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_jax.cli.text import number, scale, table, whole

if TYPE_CHECKING:
    from tstitch_jax.sampling.program import SampleRequest
    from tstitch_jax.sampling.sampler import Sampler

EMBEDDED_PAIR = ("fashion-s", "fashion-xl")
DEFAULT_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
REPEATS = 3
"""Timed runs per row, interleaved; the median is shown."""


def add_options(
    sub: argparse.ArgumentParser, *, labels: str, fractions: str = "", plan: str = "",
    decodes: bool = True,
) -> None:  # fmt: skip
    """The options of everything that samples, with what three of them mean to the command.

    Without a meaning ``fractions`` and ``plan`` are left out; without ``decodes`` so is what
    concerns decoded images.
    """
    sub.add_argument(
        "--networks", nargs="+", default=list(EMBEDDED_PAIR), metavar="NAME",
        help="names or folders, small first (default: embedded pair)",
    )  # fmt: skip
    if fractions:
        sub.add_argument(
            "--fractions", nargs="+", type=number, action="append", metavar="F", help=fractions
        )
    sub.add_argument("--steps", metavar="N",
                     help="how many, or ddim50, or 10,10,20 (default: 50)")  # fmt: skip
    if plan:
        sub.add_argument("--plan", action="append", metavar="FILE", help=plan)
    sub.add_argument("--times", nargs="+", type=number, metavar="T",
                     help="the falling times themselves, not --steps")  # fmt: skip
    sub.add_argument("--spacing", default="respaced", metavar="NAME",
                     help="respaced (default), leading, trailing, karras, ...")  # fmt: skip
    sub.add_argument("--solver", default="ddim", metavar="NAME",
                     help="ddim (default), ddpm, dpmpp, unipc, heun, pndm, ...")  # fmt: skip
    sub.add_argument("--eta", type=number, help="noise of ddim and euler_ancestral, 0 to 1")
    sub.add_argument("--cfg-scale", type=scale, default=1.5, metavar="S",
                     help="guidance scale, or none (default: 1.5)")  # fmt: skip
    sub.add_argument("--cfg-channels", type=whole(1), metavar="C",
                     help="guide the first C channels (default: card's)")  # fmt: skip
    sub.add_argument("--cfg-rescale", type=number, default=0.0, metavar="PHI",
                     help="rescaled guidance, 0 to 1 (default: 0)")  # fmt: skip
    sub.add_argument("--cfg-interval", nargs=2, type=number, metavar=("LO", "HI"),
                     help="guide only at noise levels sigma / alpha in between")  # fmt: skip
    sub.add_argument("--auto-scale", type=number, metavar="S",
                     help="autoguidance of the later networks by the first")  # fmt: skip
    sub.add_argument("--labels", nargs="+", metavar="LABEL",
                     help=f"numbers or names, {labels}")  # fmt: skip
    if decodes:
        sub.add_argument("--size", nargs=2, type=whole(1), metavar=("H", "W"),
                         help="of the images (default: as the card says)")  # fmt: skip
        sub.add_argument("--autoencoder", metavar="NAME",
                         help="what decodes latents (default: as the card says)")  # fmt: skip
    sub.add_argument("--seed", type=whole(0, 2**32 - 1), default=0,
                     help="of the noise (default: 0)")  # fmt: skip
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", metavar="TYPE",
        help="float32 (default) or bfloat16, to compute in",
    )  # fmt: skip
    sub.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT",
                     help="texts, of networks that are conditioned on them")  # fmt: skip
    sub.add_argument("--prompts", metavar="FILE", help="a file with a text a line")
    sub.add_argument("--negative", default="", metavar="TEXT",
                     help="what guidance leads away from (default: no text)")  # fmt: skip
    sub.add_argument("--text-encoder", nargs="+", metavar="NAME",
                     help="what encodes texts (default: as the cards say)")  # fmt: skip


def _dtype(arguments: argparse.Namespace) -> Any:
    import jax.numpy as jnp

    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[arguments.dtype]


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The texts of ``--prompt`` or of the lines of ``--prompts``."""
    if arguments.prompts is None:
        return arguments.prompt
    if arguments.prompt:
        raise ValueError("give --prompt or --prompts, not both")
    from tstitch_jax.evaluation import read_prompts

    return read_prompts(arguments.prompts)


def sampler_of(arguments: argparse.Namespace, plan: Any = None, mesh: Any = None) -> Sampler:
    """The sampler that the options describe."""
    import tstitch_jax as ts

    _prompts(arguments)  # a missing file is found before anything is downloaded
    if arguments.times and arguments.steps:
        raise ValueError("give --steps or --times, not both")
    guidance = ts.Guidance(
        arguments.cfg_scale, arguments.cfg_interval, arguments.cfg_channels, arguments.cfg_rescale,
        arguments.auto_scale,
    )  # fmt: skip
    encoders = arguments.text_encoder
    return ts.Sampler(
        arguments.networks,
        plan=plan,
        steps=arguments.times or arguments.steps or "50",
        spacing=arguments.spacing,
        solver=ts.make_solver(arguments.solver, eta=arguments.eta),
        guidance=guidance,
        autoencoder=getattr(arguments, "autoencoder", None),
        text_encoder=encoders[0] if encoders and len(encoders) == 1 else encoders,
        dtype=_dtype(arguments),
        mesh=mesh,
    )


def called_with(
    arguments: argparse.Namespace, sampler: Sampler, all_labels: bool = False
) -> dict[str, Any]:
    """The labels, prompts and size of a call.

    Without labels there are ten, or, with ``all_labels``, none, which means all.
    """
    from tstitch_jax.models.families import conditioner_of

    prompts, labels = _prompts(arguments), arguments.labels
    cards = [network.card for network in sampler.networks]
    texts = [card for card in cards if conditioner_of(card).takes == "prompts"]
    classes = [card for card in cards if conditioner_of(card).takes == "labels"]
    if labels and not classes:
        raise ValueError(f"{cards[0].name} has no classes; give --prompt, not --labels")
    if not texts and (prompts or arguments.negative or arguments.text_encoder):
        raise ValueError(f"{cards[0].name} is conditioned on classes; give --labels, not texts")
    if texts and not prompts:
        raise ValueError(f"{texts[0].name} is conditioned on texts; give --prompt TEXT")
    if classes and labels is None:
        if texts:
            raise ValueError(f"{classes[0].name} is conditioned on classes; give --labels too")
        if not all_labels:
            labels = list(range(min(classes[-1].num_classes, 10)))
    call = dict(labels=labels and [_label(label) for label in labels], prompts=prompts)
    call["size"] = getattr(arguments, "size", None)
    return call | ({"negative": arguments.negative} if texts else {})


def _label(text: Any) -> Any:
    """A class label as a number where it is one, else a class name."""
    number = isinstance(text, str) and text.removeprefix("-").isdecimal()
    return int(text) if number else text


def _one_plan(arguments: argparse.Namespace) -> Any:
    """The plan or the fractions, of which there can be one only."""
    from tstitch_jax import Plan

    fractions, plans = arguments.fractions or [], arguments.plan or []
    if len(fractions) + len(plans) > 1:
        raise ValueError("give --fractions or --plan once")
    if not fractions and not plans and len(arguments.networks) > 1:
        raise ValueError(f"give --fractions or --plan for the {len(arguments.networks)} networks")
    return Plan.load(plans[0]) if plans else fractions[0] if fractions else None


def generate_command(arguments: argparse.Namespace) -> None:
    import jax

    from tstitch_jax.cli.devices import join_hosts, others_may_fail
    from tstitch_jax.jobs.generate import generate
    from tstitch_jax.models.devices import make_mesh

    join_hosts(arguments)
    with others_may_fail():
        mesh = make_mesh(arguments.model_devices, jax.local_devices())
        sampler = sampler_of(arguments, _one_plan(arguments), mesh)
        path = generate(
            arguments.out, sampler, num=arguments.num, seed=arguments.seed, batch=arguments.batch,
            png=arguments.png, host_timeout=arguments.host_timeout,
            **called_with(arguments, sampler, all_labels=True),
        )  # fmt: skip
    if jax.process_index() == 0:
        print(f"{arguments.num} images: {path}")


def export_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax.jobs.export import export

    sampler = sampler_of(arguments, _one_plan(arguments))
    export(
        arguments.out, sampler, seed=arguments.seed, platforms=arguments.platforms,
        **called_with(arguments, sampler),
    )  # fmt: skip
    size = Path(arguments.out).stat().st_size
    print(f"{arguments.out}: {size / 1e6:.1f} MB, for {', '.join(arguments.platforms)}")


def _rows(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """The rows of the picture: a label, and the fractions or the plan of each."""
    from tstitch_jax import Plan

    count = len(arguments.networks)

    def row(fractions: Sequence[float]) -> tuple[str, Any]:
        # Of two networks the first one's share says everything.
        shown = fractions[:1] if len(fractions) == 2 else fractions
        return " ".join(f"{f:g}" for f in shown), list(fractions)

    rows = [row(fractions) for fractions in arguments.fractions or ()]
    rows += [(Path(file).stem, Plan.load(file)) for file in arguments.plan or ()]
    if rows or count > 2:
        if not rows:
            raise ValueError(f"give --fractions or --plan for the {count} networks")
        return rows
    return [row([1.0])] if count == 1 else [row([f, 1 - f]) for f in DEFAULT_FRACTIONS]


def _start(
    arguments: argparse.Namespace, card: Any, autoencoder: Any, images: int
) -> dict[str, Any]:
    """The picture to start from, as often as there are images; nothing without one."""
    import numpy as np

    from tstitch_jax.report.pictures import read_picture

    if arguments.start is None:
        return {} if arguments.strength is None else {"strength": arguments.strength}
    factor = 1 if autoencoder is None else autoencoder.factor
    height, width = arguments.size or (factor * n for n in card.image_shape[:2])
    picture = read_picture(arguments.start, height, width)
    if (card.image_shape[2] if autoencoder is None else autoencoder.card.image_shape[2]) == 1:
        picture = picture.mean(axis=2, keepdims=True)
    return {"start": np.repeat(picture[None], images, axis=0), "strength": arguments.strength}


def sample_command(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np
    from tqdm import tqdm

    from tstitch_jax.report import pictures
    from tstitch_jax.sampling.checks import class_names

    out = pictures.check_png(arguments.out)
    rows = _rows(arguments)
    base = sampler_of(arguments, rows[0][1])
    key, names = jax.random.key(arguments.seed), base.names
    networks, card = base.networks, base.networks[-1].card
    call = called_with(arguments, base)
    texts, labels = call["prompts"], call["labels"]
    condition = base.condition(**{k: v for k, v in call.items() if k != "size"})
    origin = _start(arguments, card, base.autoencoder, len(texts or labels or ()))

    def request(plan: Any) -> SampleRequest:
        return base.replace(plan=plan).request(key, cond=condition, size=call["size"], **origin)

    requests = [request(plan) for _, plan in rows]
    columns = texts or list(class_names(labels, [network.card for network in networks]))
    # The dearest network alone is what the speed-up is measured against, drawn or not.
    dearest = max(range(len(networks)), key=lambda k: (networks[k].card.macs, k))
    alone = [set(np.asarray(r.plan.networks).tolist()) for r in requests]
    baseline = alone.index({dearest}) if {dearest} in alone else len(rows)
    if baseline < len(rows):
        timed = requests
    else:
        timed = [*requests, request([float(k == dearest) for k in range(len(networks))])]

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
                result, *_ = jax.block_until_ready(execute(sampling.inputs))
                if repeat:  # the first round warms up
                    times[i].append(time.perf_counter() - start)
                images[i] = np.asarray(result)
                bar.update()
    medians = [statistics.median(t) for t in times]
    speedups = [medians[baseline] / t for t in medians]

    lines = [
        [label, s.plan.describe(names), f"{t:.2f} s", f"{len(columns) / t:.1f}", f"{u:.2f}x"]
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
        f"{jax.default_backend()}; {len(columns)} images a row. "
        f"Time of a row without compilation; one compilation of {compile_time:.1f} s serves all."
    )
    picture = pictures.grid(
        np.stack(images[: len(rows)]),
        [f"{f}\n{t:.2f} s\n{u:.2f}x" for (f, *_), t, u in
         zip(lines, medians, speedups, strict=False)],
        [text if len(text) < 40 else f"{text[:37]}..." for text in columns],
        title=title,
        footer=footer,
    )  # fmt: skip
    pictures.write_png(picture, out)
    print(table(["fraction", "plan", "time", "images/s", "speed-up"], lines))
    print(f"compilation: {compile_time:.1f} s, once for all rows\npicture: {out}")
