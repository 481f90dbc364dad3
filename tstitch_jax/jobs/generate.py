"""Many images: a resumable job over all devices and hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from tstitch_jax.core.checks import check_seed, check_whole, is_list, shown
from tstitch_jax.core.types import Condition
from tstitch_jax.jobs.hosts import HostError, Hosts, tell_all
from tstitch_jax.jobs.shards import SAMPLES, Shards, differences
from tstitch_jax.models import devices
from tstitch_jax.models.build import checksum
from tstitch_jax.models.conditioning import check_texts
from tstitch_jax.models.types import Autoencoder, Network, TextEncoder
from tstitch_jax.sampling.checks import MAX_BATCH
from tstitch_jax.sampling.program import Inputs, SampleRequest
from tstitch_jax.sampling.sampler import Sampler

FORMAT = 4

_UNSEEN = {
    "name", "num_params", "macs", "source", "source_checksum", "data", "license", "class_names",
    "autoencoder", "text_encoder",
}  # fmt: skip
"""What no image depends on of that which a card says."""


def _settings(
    sampler: Sampler, request: SampleRequest, encoders: Sequence[TextEncoder], seed: int,
    asked: dict[str, Any], batch: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that an image's bytes depend on."""
    mesh, coder = request.config.mesh, sampler.autoencoder
    owners = [*sampler.networks, *([] if coder is None else [coder]), *encoders]
    leaves = [jax.tree.leaves(owner.tree) for owner in owners]

    def seen(owner: Network | Autoencoder | TextEncoder) -> dict[str, Any]:
        card = dataclasses.asdict(owner.card)
        card["checksum"] = card["checksum"] or checksum(owner.tree)
        return {name: value for name, value in card.items() if name not in _UNSEEN}

    return {
        "format": FORMAT,
        **sampler.settings(),
        "autoencoder": None if coder is None else coder.card.name,
        "cards": [seen(owner) for owner in owners],
        "dtypes": [sorted({str(leaf.dtype) for leaf in own}) for own in leaves],
        "plan": np.asarray(request.plan.networks).tolist(),
        "alpha": np.asarray(request.inputs.knots.alpha, np.float64).tolist(),
        "sigma": np.asarray(request.inputs.knots.sigma, np.float64).tolist(),
        "size": request.config.shape,
        "channels": request.config.channels,
        "seed": seed,
        **asked,
        "batch": batch,
        "platform": next(iter(leaves[0][0].devices())).platform,
        "jax": jax.__version__,
        "random numbers": [
            jax.config.jax_default_prng_impl,  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.jax_threefry_partitionable,  # pyright: ignore[reportAttributeAccessIssue]
        ],
        "matmul precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        "model devices": 1 if mesh is None else mesh.shape[devices.MODEL],
    }


def _check_hosts(settings: dict[str, Any]) -> None:
    """Raises HostError, on every host, if they were not all given the same."""
    first, *others = (json.loads(said) for said in tell_all(json.dumps(settings)))
    for i, other in enumerate(others, 1):
        if said := differences(first, other):
            raise HostError(
                f"the settings differ from host 0 to host {i}: {'; '.join(said)}; run the same on "
                "every host"
            )


def _check(num: int, batch: int, seed: int) -> None:
    check_whole("num", num, 1)
    check_whole("batch", batch, 1, MAX_BATCH)
    check_seed(seed)


@dataclasses.dataclass
class _Team:
    """The devices that hold all networks once, and sample a batch at a time.

    Each team runs a program of its own, compiled for its devices alone: a program that is spread
    over many rounds otherwise than that of one, and an image would depend on how many there are.
    """

    request: SampleRequest
    place: Any
    execute: Callable[[Inputs], Any] | None = None

    def lower(self) -> jax.stages.Lowered:
        return self.request.lower()

    def start(self, indices: np.ndarray, given: Any) -> Any:
        """Pixels, and whether each image is finite, when the devices are through.

        ``given`` is the first half of the condition.
        """
        indices, given = jax.device_put((indices.astype(np.int32), given), self.place)
        inputs = self.request.inputs
        inputs = inputs._replace(indices=indices, cond=inputs.cond._replace(given=given))
        assert self.execute is not None
        return self.execute(inputs)[0]


def _teams(sampler: Sampler, request: SampleRequest) -> list[_Team]:
    """One for each row of the networks' mesh; nothing is compiled yet."""
    mesh = request.config.mesh
    if mesh is not None and mesh.is_multi_process:
        raise ValueError(
            "each host generates on its own devices: make_mesh(devices=jax.local_devices())"
        )
    teams = []
    for row in [None] if mesh is None else devices.rows(mesh):
        inputs = request.inputs
        if row is None:
            place = next(iter(jax.tree.leaves(sampler.networks[0].tree)[0].devices()))
        else:
            place = NamedSharding(row, PartitionSpec())
            denoisers, coder = devices.part((inputs.denoisers, inputs.coder), row)
            inputs = inputs._replace(denoisers=denoisers, coder=coder)
        # Without what fills the mesh: each team samples whole batches.
        indices, cond = jax.tree.map(
            lambda leaf: np.asarray(leaf)[: request.batch], (inputs.indices, inputs.cond)
        )
        key, indices, cond = jax.device_put((inputs.key, indices, cond), place)
        inputs = inputs._replace(key=key, indices=indices, cond=cond)
        alone = dataclasses.replace(request, inputs=inputs)
        teams.append(_Team(alone.replace(output="pixels", mesh=None), place))
    return teams


def generate(
    out: str | os.PathLike[str],
    sampler: Sampler,
    *,
    num: int,
    seed: int = 0,
    labels: Any = None,
    prompts: Any = None,
    negative: Any = None,
    size: Any = None,
    batch: int = 16,
    png: bool = False,
    progress: bool = True,
    host_timeout: float | int = 60,
) -> Path:
    """Samples many images into a folder, over the devices of a mesh and over all hosts.

    Image i depends on the seed, its label or prompt, and i alone. It is always computed as row
    ``i % batch`` of a device's batch ``i // batch``, so that its bytes do not depend on the number
    of devices and hosts. Each batch becomes a file with a checksum as soon as it is there: a job
    that was stopped goes on where it was when it is called again, a damaged file is made again, and
    the end result is the same to the byte. The number of images may be raised later. Memory does
    not grow with it.

    Under ``jax.distributed`` every host calls this with the same arguments and with networks on its
    own devices, and all see the same folder; if not, all say so. If a host fails or dies the
    others stop.

    Args:
        out: The folder: ``samples.npz`` (see ``Shards.join``), ``settings.json``, ``shards/``,
            which may be deleted in the end, and ``png/``.
        sampler: What samples. With networks on a mesh (``ts.load(..., mesh=)``, ``ts.shard``) all
            of its devices work; it must be of this host's devices.
        num: Number of images.
        seed: Seed of all noise, 0 to 2^32 - 1.
        labels: Image i is of class ``labels[i % len(labels)]``; all classes unless given.
        prompts: Where the networks are conditioned on texts, image i is of the text
            ``prompts[i % len(prompts)]``, whose number is then its label in ``samples.npz``.
        negative: The text that guidance leads away from; the empty text unless given.
        size: As in a call of the sampler.
        batch: Images of a device at a time, and of a file. Part of the settings, as it may change
            an image's last bit.
        png: Whether to write each image as a PNG too, and remove those of more images than ``num``.
        progress: Whether to show progress.
        host_timeout: Seconds after which a host that gives no sign of life counts as dead.

    Returns:
        The path of ``samples.npz``.

    Raises:
        ValueError: If an argument is invalid, the folder holds other things or images of other
            settings, or another process works on it; before anything is compiled.
        OSError: If a file cannot be written, or another host has failed (``HostError``). What is
            done is kept.
        FloatingPointError: If an image is not finite.
    """
    _check(num, batch, seed)
    num, batch, seed = int(num), int(batch), int(seed)
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a ts.Sampler, got {shown(sampler)}")
    cards = [network.card for network in sampler.networks]
    if prompts is None:
        if negative is not None:
            raise ValueError("negative goes with prompts")
        if labels is None:
            labels = range(cards[-1].num_classes)
        if not is_list(labels) or any(
            is_list(each) and not isinstance(each, str) for each in labels
        ):
            raise ValueError(
                f"labels must be one list of class labels for all networks, got {shown(labels)}"
            )
        cycle: list[Any] = list(labels)
        numbers = np.stack(sampler.condition(labels=cycle).given)  # by network, all checked
        label_numbers = numbers[-1]
        encoders: list[TextEncoder] = []

        def condition_of(chosen: list[Any]) -> Condition:
            return sampler.condition(labels=chosen)

    else:
        if labels is not None or sampler.takes != {"prompts"}:
            raise ValueError("prompts are for networks that are all conditioned on texts alone")
        if negative is not None and not isinstance(negative, str):
            raise ValueError(f"negative must be one text, got {shown(negative)}")
        cycle, numbers = check_texts("prompts", prompts), np.empty(0)
        label_numbers = numbers
        encoders = sampler.text_encoders()

        def condition_of(chosen: list[Any]) -> Condition:
            return sampler.condition(prompts=chosen, negative=negative)

    def given_of(numbers: np.ndarray) -> Any:
        return condition_of([cycle[n] for n in numbers]).given

    first = [cycle[n] for n in np.resize(np.arange(len(cycle)), batch)]
    request = sampler.request(jax.random.key(seed), cond=condition_of(first), size=size)
    teams = _teams(sampler, request)
    request_of_team = teams[0].request
    shape = jax.eval_shape(request_of_team.function, request_of_team.inputs)[0][0].shape[1:]
    asked: dict[str, Any] = {"prompts": cycle, "negative": negative or ""}
    if prompts is None:
        same = (numbers == label_numbers).all()
        asked = {"labels": label_numbers.tolist() if same else numbers.tolist()}
    settings = _settings(sampler, request, encoders, seed, asked, batch)
    shards = Shards(Path(out), settings, batch, shape)
    _check_hosts(shards.settings | {"num": num})

    leader = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        word, refused = "", None
        if leader:
            try:
                stack.enter_context(shards.opened())
                word = f"go {secrets.token_hex(8)}"
            except (ValueError, OSError) as error:
                word, refused = f"no {error}", error
        word = tell_all(word)[0]
        if refused is not None:
            raise refused
        if word.startswith("no "):
            raise HostError(f"host 0 refuses: {word[3:]}")
        hosts = stack.enter_context(Hosts(shards.folder / ".hosts", word[3:], host_timeout))
        _make(teams, shards, hosts, lambda i: given_of(i % len(cycle)), num, progress)
        if leader:
            silent = not progress
            of_all = np.arange(num) % len(cycle)
            labels_of = of_all if prompts is not None else label_numbers[of_all]
            return shards.join(
                num,
                labels_of,
                png,
                lambda k: tqdm(k, "joining", unit="file", disable=silent, leave=False, delay=1),
            )
        for _ in hosts.wait([0], "done"):
            pass
        return shards.folder / SAMPLES


def _compile(teams: Sequence[_Team]) -> None:
    """Traced once, then compiled for each team, many at a time."""
    lowered = [team.lower() for team in teams]
    with ThreadPoolExecutor() as pool:
        for team, execute in zip(teams, pool.map(lambda p: p.compile(), lowered), strict=True):
            team.execute = execute


def _make(
    teams: Sequence[_Team], shards: Shards, hosts: Hosts,
    given_of: Callable[[np.ndarray], Sequence[Any]], num: int, progress: bool,
) -> None:  # fmt: skip
    """Makes this host's part of what is missing; shard k is of host k modulo their number."""
    own = list(shards.needed(num))[hosts.index :: hosts.count]
    silent = not progress or hosts.index > 0
    checked = tqdm(own, "checking", unit="file", disable=silent, leave=False, delay=1)
    missing = [k for k in checked if shards.read(k) is None]

    def images(shards_: Iterable[int]) -> int:
        return sum(min(num - k * shards.batch, shards.batch) for k in shards_)

    had = done = images(own) - images(missing)
    with tqdm(total=num, initial=done, desc="generating", unit="img", disable=silent) as bar:

        def show(others: dict[int, dict[str, Any]]) -> None:
            hosts.report(images=done, had=had)
            said = {i: (other["images"], other["had"]) for i, other in others.items()}
            said[hosts.index] = done, had
            made = {i: images for i, (images, _) in said.items()}
            bar.initial = sum(had for _, had in said.values())  # which the rate leaves out
            bar.update(sum(made.values()) - bar.n)
            if hosts.count > 1:
                bar.set_postfix_str(", ".join(f"host {i}: {n}" for i, n in sorted(made.items())))

        show({})
        if missing:
            bar.set_description("compiling")
            _compile(teams[: len(missing)])
            bar.set_description("generating")
            bar.unpause()  # the rate is that of sampling

        def collect(k: int, result: Any) -> None:
            nonlocal done
            pixels, finite = (np.asarray(value) for value in result)
            if not finite.all():
                raise FloatingPointError(
                    f"image {k * shards.batch + int(np.argmin(finite))} is not finite; with "
                    "bfloat16 try float32, else a lower guidance scale"
                )
            shards.write(k, pixels)
            done += images([k])
            show(hosts.check())

        pending: deque[tuple[int, Any]] = deque()
        for turn, k in enumerate(missing):
            indices = k * shards.batch + np.arange(shards.batch)
            started = teams[turn % len(teams)].start(indices, given_of(indices))
            pending.append((k, started))
            # Each team has one batch at work and one ahead while the host writes.
            if len(pending) == 2 * len(teams):
                collect(*pending.popleft())
        while pending:
            collect(*pending.popleft())
        hosts.report(stage="made")
        if hosts.index == 0:
            for others in hosts.wait(range(hosts.count), "made"):
                show(others)
            show(hosts.check())
