"""``tstitch sample``, ``generate`` and ``export``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_jax.cli.text import class_labels, number, scale, table, whole

if TYPE_CHECKING:
    from tstitch_jax.models.types import Network

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


def load_networks(arguments: argparse.Namespace, mesh: Any = None) -> list[Any]:
    """The networks, which must fit together."""
    import tstitch_jax as ts
    from tstitch_jax.sampling.checks import check_networks

    _prompts(arguments)  # a file that is not there is told before anything is downloaded
    networks = [ts.load(name, _dtype(arguments), mesh=mesh) for name in arguments.networks]
    check_networks(networks)
    return networks


def _load(arguments: argparse.Namespace, mesh: Any = None) -> tuple[list[Any], Any]:
    """The networks and, where they make latents, the autoencoder."""
    import tstitch_jax as ts

    networks, dtype = load_networks(arguments, mesh), _dtype(arguments)
    card = networks[-1].card
    wanted = arguments.autoencoder or card.autoencoder
    try:
        return networks, ts.load(wanted, dtype, mesh=mesh) if wanted else None
    except (ValueError, OSError) as error:
        if arguments.autoencoder:
            raise
        raise ValueError(
            f"{card.name} makes latents, and its card names the autoencoder {wanted}; give another "
            f"with --autoencoder, or mend this: {error}"
        ) from None


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The texts of ``--prompt`` or of the lines of ``--prompts``."""
    if arguments.prompts is None:
        return arguments.prompt
    if arguments.prompt:
        raise ValueError("give --prompt or --prompts, not both")
    from tstitch_jax.evaluation import read_prompts

    return read_prompts(arguments.prompts)


def asked_of(
    arguments: argparse.Namespace, networks: Sequence[Network], mesh: Any = None,
    all_labels: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What is asked for: labels, prompts with their encoders, or both.

    Without labels there are ten, or, with ``all_labels``, none, which means all.
    """
    import tstitch_jax as ts

    prompts = _prompts(arguments)
    takes_texts = [n.card for n in networks if n.card.context is not None]
    classes = [n.card for n in networks if n.card.context is None]
    asked: dict[str, Any] = {}
    if classes:
        chosen = arguments.labels
        if chosen is None and prompts and takes_texts:
            raise ValueError(f"{classes[0].name} is conditioned on classes; give --labels too")
        wanted = chosen or not all_labels
        asked["labels"] = class_labels(chosen, classes[-1]) if wanted else None
    elif arguments.labels:
        raise ValueError(f"{networks[0].card.name} has no classes; give --prompt, not --labels")
    if not takes_texts:
        if prompts or arguments.negative or arguments.text_encoder:
            raise ValueError(
                f"{networks[0].card.name} is conditioned on classes; give --labels, not texts"
            )
        return asked
    if prompts is None:
        raise ValueError(f"{takes_texts[0].name} is conditioned on texts; give --prompt TEXT")
    names = arguments.text_encoder or [card.text_encoder for card in takes_texts]
    names = names * len(takes_texts) if len(names) == 1 else names
    if "" in names:
        unsaid = takes_texts[names.index("")].name
        raise ValueError(f"the card of {unsaid} names no text encoder; give --text-encoder NAME")
    loaded = {name: ts.load(name, _dtype(arguments), mesh=mesh) for name in dict.fromkeys(names)}
    encoders = [loaded[name] for name in names]
    return asked | dict(prompts=prompts, negative=arguments.negative, text_encoder=encoders)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is passed on as it is."""
    same = ("spacing", "solver", "eta", "cfg_scale", "cfg_channels", "cfg_rescale", "cfg_interval",
            "auto_scale", "size")  # fmt: skip
    options = {name: getattr(arguments, name) for name in same if hasattr(arguments, name)}
    if arguments.times and arguments.steps:
        raise ValueError("give --steps or --times, not both")
    return options | {"steps": arguments.times or arguments.steps or "50"}


def _one_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fractions or the plan, where there can be one only."""
    from tstitch_jax import Plan

    fractions, plans = arguments.fractions or [], arguments.plan or []
    if len(fractions) + len(plans) > 1:
        raise ValueError("give --fractions or --plan once")
    if not fractions and not plans and len(arguments.networks) > 1:
        raise ValueError(f"give --fractions or --plan for the {len(arguments.networks)} networks")
    if plans:
        return {"plan": Plan.load(plans[0])}
    return {"fractions": fractions[0]} if fractions else {}


def generate_command(arguments: argparse.Namespace) -> None:
    import jax

    from tstitch_jax.cli.devices import join_hosts, others_may_fail
    from tstitch_jax.jobs.generate import generate
    from tstitch_jax.models.devices import make_mesh

    join_hosts(arguments)
    with others_may_fail():
        mesh = make_mesh(arguments.model_devices, jax.local_devices())
        networks, autoencoder = _load(arguments, mesh)
        asked = asked_of(arguments, networks, mesh, all_labels=True)
        path = generate(
            arguments.out, networks, num=arguments.num, seed=arguments.seed, **asked,
            batch=arguments.batch, png=arguments.png, autoencoder=autoencoder,
            host_timeout=arguments.host_timeout, **_one_plan(arguments), **options_of(arguments),
        )  # fmt: skip
    if jax.process_index() == 0:
        print(f"{arguments.num} images: {path}")


def export_command(arguments: argparse.Namespace) -> None:
    from tstitch_jax.jobs.export import export

    networks, autoencoder = _load(arguments)
    export(
        arguments.out, networks, **asked_of(arguments, networks), seed=arguments.seed,
        platforms=arguments.platforms, autoencoder=autoencoder,
        **_one_plan(arguments), **options_of(arguments),
    )  # fmt: skip
    size = Path(arguments.out).stat().st_size
    print(f"{arguments.out}: {size / 1e6:.1f} MB, for {', '.join(arguments.platforms)}")


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
    from tstitch_jax.sampling import sampler

    out = pictures.check_png(arguments.out)
    networks, autoencoder = _load(arguments)
    card = networks[-1].card
    names = [n.card.name for n in networks]
    asked = asked_of(arguments, networks)
    texts, labels = asked.get("prompts"), asked.get("labels")
    origin = _start(arguments, card, autoencoder, len(texts or labels or ()))

    def request(**who: Any) -> sampler.Sampling:
        return sampler.prepare(
            jax.random.key(arguments.seed),
            networks,
            autoencoder=autoencoder,
            **asked,
            **origin,
            **options_of(arguments),
            **who,
        )

    rows = _rows(networks, arguments)
    requests = [request(**who) for _, who in rows]
    columns = texts or [card.class_names[k] if card.class_names else str(k) for k in labels or ()]
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
