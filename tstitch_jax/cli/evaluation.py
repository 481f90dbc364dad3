"""``tstitch evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_jax.cli.text import table, whole
from tstitch_jax.core.checks import printable

if TYPE_CHECKING:
    from tstitch_jax.evaluation import Evaluation


def add_options(sub: argparse.ArgumentParser) -> None:
    from tstitch_jax.evaluation import METRICS

    sub.add_argument("samples", metavar="SAMPLES",
                     help=".npz, folder, tfds:NAME:SPLIT or FILE.npz:ARRAY")  # fmt: skip
    sub.add_argument("reference", metavar="REFERENCE", nargs="?",
                     help="the same, or an .npz with mu, sigma, mu_s, sigma_s")  # fmt: skip
    sub.add_argument("--features", metavar="NAME",
                     help="inception (default), fashion, clip-vit-..., or a folder")  # fmt: skip
    sub.add_argument("--prompts", metavar="FILE",
                     help="each sample's text, one a line, for the CLIP score")  # fmt: skip
    sub.add_argument(
        "--metrics", nargs="+", metavar="NAME",
        help=f"{', '.join(METRICS)} (default: all but fid_infinity)",
    )  # fmt: skip
    sub.add_argument("--num", type=whole(1), metavar="N", help="only the first N samples")
    sub.add_argument("--save-statistics", metavar="FILE",
                     help="write mu, sigma, mu_s, sigma_s of SAMPLES, an .npz")  # fmt: skip
    sub.add_argument("--out", metavar="FILE", help="write the result, with all settings, as JSON")
    sub.add_argument("--picture", metavar="FILE",
                     help="draw samples nearest to REFERENCE and farthest")  # fmt: skip
    sub.add_argument("--skip-broken", action="store_true",
                     help="leave out, and count, broken images of a folder")  # fmt: skip
    sub.add_argument("--batch", type=whole(1), default=32, metavar="B",
                     help="images of a device at a time (default: 32)")  # fmt: skip
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", metavar="TYPE",
        help="float32 (default) or bfloat16, to compute in",
    )  # fmt: skip


def _load(name: str, dtype: Any) -> Any:
    """A feature network by name, on all devices of this machine."""
    import jax

    from tstitch_jax.hub import resolve
    from tstitch_jax.models.devices import make_mesh
    from tstitch_jax.models.types import FeatureNetwork

    network = resolve.load(name, dtype, mesh=make_mesh(devices=jax.local_devices()))
    if not isinstance(network, FeatureNetwork):
        raise ValueError(
            f"{name} is no feature network; give inception, fashion, clip-vit-large-patch14, or "
            "the folder of one"
        )
    return network


def _show(result: Evaluation) -> None:
    """The values as a table, and what they are of."""
    from tstitch_jax.evaluation import METRICS, metric_key, metric_name

    features, rows = result.features, []
    for metric in METRICS:
        key = metric_key(metric, features["name"])
        if key in result.metrics:
            error = f"± {result.errors[key]:.1g}" if key in result.errors else ""
            value = result.metrics[key]
            rows.append([metric_name(metric, features["name"]), f"{value:.5g}", error])
    if rows:
        print(table(["measure", "value", ""], rows))
    print(f"\nsamples:   {result.samples['num']} images, {printable(result.samples['name'])}")
    if result.reference is not None:
        said = result.reference["num"]
        num = f"{said} images" if said else "statistics" if result.reference["statistics"] else ""
        name = printable(result.reference["name"])
        print(f"reference: {', '.join(filter(None, [num, name]))}")
    print(f"features:  {features['name']}, {features['dtype']}, {features['checksum'][:12]}")
    for note in result.notes:
        print(f"note: {printable(note)}")


def evaluate_command(arguments: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from tstitch_jax.core.files import check_writable
    from tstitch_jax.evaluation import evaluate, open_source, read_prompts
    from tstitch_jax.hub import download

    # What is wrong with the sets is said before a network is downloaded.
    sources = [
        spec and open_source(spec, skip_broken=arguments.skip_broken)
        for spec in (arguments.samples, arguments.reference)
    ]
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    usual = "inception" if prompts is None else "clip-vit-large-patch14"
    if prompts is not None and sources[0].count != len(prompts):
        raise ValueError(
            f"{arguments.prompts} has {len(prompts)} lines, {sources[0].name} "
            f"{sources[0].count} images; write one prompt a line, in the images' order"
        )
    if arguments.out is not None:
        out = Path(arguments.out)
        for source in filter(None, sources):
            if source.path and out.exists() and out.samefile(source.path):
                raise ValueError(f"{out} holds {source.name} itself; choose another file")
        check_writable(out)
    result = evaluate(
        *sources,
        features=_load(arguments.features or usual, getattr(jnp, arguments.dtype)),
        metrics=arguments.metrics,
        prompts=prompts,
        num=arguments.num,
        batch=arguments.batch,
        statistics=arguments.save_statistics,
        picture=arguments.picture,
        cache=download.cache_folder() / "features",
    )
    if arguments.out is not None:
        result.save(arguments.out)
    _show(result)
    for path in (arguments.save_statistics, arguments.out, arguments.picture):
        if path is not None:
            print(f"written: {path}")
