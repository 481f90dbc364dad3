"""Many images: a job over all devices and hosts that can be stopped and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tstitch_jax import checks, pipeline
from tstitch_jax.hosts import HostError, Hosts, tell_all
from tstitch_jax.parallel import DATA, MODEL
from tstitch_jax.shards import SAMPLES, Shards
from tstitch_jax.types import Autoencoder, Network

FORMAT = 1


def _settings(
    request: pipeline.Sampling, networks: Sequence[Network], autoencoder: Autoencoder | None,
    seed: int, labels: Sequence[int], batch: int, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All that an image's bytes depend on."""
    mesh = request.static["mesh"]
    owners = [*networks, *([] if autoencoder is None else [autoencoder])]
    leaves = jax.tree.leaves(owners[0].params)

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    return {
        "format": FORMAT,
        "networks": [network.card.name for network in networks],
        "autoencoder": None if autoencoder is None else autoencoder.card.name,
        "checksums": [owner.card.checksum for owner in owners],
        "dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
        "plan": np.asarray(request.plan.networks).tolist(),
        "times": np.asarray(request.inputs.knots.time, np.float64).tolist(),
        **{name: jax.tree.map(plain, value) for name, value in sorted(options.items())},
        "seed": seed,
        "labels": [int(label) for label in labels],
        "batch": batch,
        "platform": next(iter(leaves[0].devices())).platform,
        "model devices": 1 if mesh is None else mesh.shape[MODEL],
    }


def _check(num: int, batch: int, seed: int) -> None:
    for name, value, low in (("num", num, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r:.80}")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {seed}")


def _as_pixels(request: pipeline.Sampling) -> pipeline.Sampling:
    return dataclasses.replace(request, static=request.static | {"finish": pipeline.to_pixels})


def generate(
    out: str | os.PathLike[str],
    networks: Sequence[Network],
    *,
    num: int,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    batch: int = 16,
    png: bool = False,
    autoencoder: Autoencoder | None = None,
    progress: bool = True,
    host_timeout: float | int = 60,
    **options: Any,
) -> Path:
    """Samples many images into a folder, over the devices of a mesh and over all hosts.

    Image i depends on the seed, its label and i alone. It is always computed as row ``i % batch``
    of a device's batch ``i // batch``, so that its bytes do not depend on the number of devices and
    hosts. Each batch becomes a file with a checksum as soon as it is there: a job that was stopped
    goes on where it was when it is called again, a damaged file is made again, and the end result
    is the same to the byte. The number of images may be raised later. Memory does not grow with it.

    Under ``jax.distributed`` every host calls this with the same arguments and with networks on its
    own devices, and all see the same folder. If a host fails or dies the others stop.

    Args:
        out: The folder: ``samples.npz`` (see ``Shards.join``), ``settings.json``, ``shards/``,
            which may be deleted in the end, and ``png/``.
        networks: As for ``sample``. On a mesh (``ts.load(..., mesh=)``, ``ts.shard``) all of its
            devices work; it must be of this host's devices.
        num: Number of images.
        seed: Seed of all noise, 0 to 2^32 - 1.
        labels: Image i is of class ``labels[i % len(labels)]``; all classes unless given.
        batch: Images of a device at a time, and of a file. Part of the settings, as it may change
            an image's last bit.
        png: Whether to write each image as a PNG too.
        autoencoder: As for ``sample``.
        progress: Whether to show progress.
        host_timeout: Seconds after which a host that gives no sign of life counts as dead.
        **options: ``fractions``, ``plan``, ``steps``, ``spacing``, ``solver`` (by name), ``eta``,
            ``cfg_scale`` and the other options of guidance, as for ``sample``.

    Returns:
        The path of ``samples.npz``.

    Raises:
        ValueError: If an argument is not as said, the folder holds other things or images of other
            settings, or another process works on it; before anything is compiled.
        OSError: If a file cannot be written, or another host has failed (``HostError``). What is
            done is kept.
    """
    _check(num, batch, seed)
    allowed = {"fractions", "plan", "steps", "spacing", "solver", "eta", "cfg_scale", "auto_scale",
               "cfg_channels", "cfg_rescale", "cfg_interval"}  # fmt: skip
    if options.keys() - allowed:
        wrong = ", ".join(sorted(options.keys() - allowed))
        raise TypeError(f"generate takes no {wrong}; its options are {', '.join(sorted(allowed))}")
    if not isinstance(options.get("solver", "ddim"), str):
        raise ValueError("generate takes a solver by name, so that a job can be gone on with")
    checks.check_networks(networks)
    if labels is None:
        labels = range(networks[-1].card.num_classes)

    options = {"steps": 50, "spacing": "respaced", "solver": "ddim", "cfg_scale": 1.5} | options
    key = jax.random.key(seed)

    def prepare(labels: Any) -> pipeline.Sampling:
        return pipeline.prepare(key, networks, labels=labels, autoencoder=autoencoder, **options)

    prepare(list(labels))  # all labels are checked
    cycle = np.asarray(labels, np.int32)
    one = prepare([int(cycle[0])])
    mesh = one.static["mesh"]
    if mesh is not None and mesh.is_multi_process:
        raise ValueError(
            "each host generates on its own devices: make_mesh(devices=jax.local_devices())"
        )
    at_once = 1 if mesh is None else mesh.shape[DATA]
    request = _as_pixels(prepare(np.resize(cycle, at_once * batch).tolist()))
    shape = jax.eval_shape(request.function, request.inputs)[0].shape[1:]
    kept = {k: v for k, v in options.items() if k not in ("fractions", "plan", "steps")}
    settings = _settings(one, networks, autoencoder, seed, labels, batch, kept)
    shards = Shards(Path(out), settings, batch, shape)

    leader = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        word, refused = "", None
        if leader:
            try:
                stack.enter_context(shards.opened())
                word = f"go {secrets.token_hex(8)}"
            except (ValueError, OSError) as error:
                word, refused = f"no {error}", error
        word = tell_all(word)
        if refused is not None:
            raise refused
        if word.startswith("no "):
            raise HostError(f"host 0 refuses: {word[3:]}")
        hosts = stack.enter_context(Hosts(shards.folder / ".hosts", word[3:], host_timeout))
        _make(request, shards, hosts, cycle, num, at_once, progress)
        if leader:
            silent = not progress
            labels_of = cycle[np.arange(num) % len(cycle)]
            return shards.join(
                num,
                labels_of,
                png,
                lambda k: tqdm(k, "joining", unit="file", disable=silent, leave=False, delay=1),
            )
        for _ in hosts.wait([0], "done"):
            pass
        return shards.folder / SAMPLES


def _make(
    request: pipeline.Sampling, shards: Shards, hosts: Hosts, cycle: np.ndarray, num: int,
    at_once: int, progress: bool,
) -> None:  # fmt: skip
    """Makes this host's part of what is missing; shard k is of host k modulo their number."""
    own = list(shards.needed(num))[hosts.index :: hosts.count]
    silent = not progress or hosts.index > 0
    checked = tqdm(own, "checking", unit="file", disable=silent, leave=False, delay=1)
    missing = [k for k in checked if shards.read(k) is None]

    def images(shards_: Iterable[int]) -> int:
        return sum(min(num - k * shards.batch, shards.batch) for k in shards_)

    done = images(own) - images(missing)
    with tqdm(total=num, initial=done, desc="generating", unit="img", disable=silent) as bar:

        def show(others: dict[int, dict[str, Any]]) -> None:
            hosts.report(images=done)
            made = {i: said["images"] for i, said in others.items()} | {hosts.index: done}
            bar.update(sum(made.values()) - bar.n)
            if hosts.count > 1:
                bar.set_postfix_str(", ".join(f"host {i}: {n}" for i, n in sorted(made.items())))

        show({})
        execute = None
        pending: deque[tuple[list[int], Any]] = deque()
        for start in range(0, len(missing) + at_once, at_once):
            group = missing[start : start + at_once]
            if group:
                # What is missing to a batch of every device is filled with copies.
                filled = group + group[-1:] * (at_once - len(group))
                indices = np.concatenate(
                    [k * shards.batch + np.arange(shards.batch) for k in filled]
                )
                inputs = request.of_images(indices, cycle[indices % len(cycle)])
                if execute is None:
                    bar.set_description("compiling")
                    execute = request.compile()
                    bar.set_description("generating")
                    bar.unpause()  # the rate is that of sampling
                pending.append((group, execute(inputs)))
            # While the devices work, the batch before is written.
            while len(pending) > (1 if group else 0):
                ready, (pixels, finite) = pending.popleft()
                rows = np.asarray(pixels).reshape(-1, shards.batch, *shards.shape)
                for k, part, good in zip(
                    ready, rows, np.asarray(finite).reshape(-1, shards.batch), strict=False
                ):
                    if not good.all():
                        i = k * shards.batch + int(np.argmin(good))
                        raise FloatingPointError(
                            f"image {i} is not finite; with bfloat16 try float32, or a lower "
                            "guidance scale"
                        )
                    shards.write(k, part)
                    done += images([k])
                show(hosts.check())
        hosts.report(stage="made")
        if hosts.index == 0:
            for others in hosts.wait(range(hosts.count), "made"):
                show(others)
            show(hosts.check())
