"""A whole sampler, weights and all, as one file that needs JAX alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from tstitch_jax.core.checks import check_seed, shown
from tstitch_jax.core.files import check_writable, whole_file
from tstitch_jax.core.plan import Plan
from tstitch_jax.core.types import Condition
from tstitch_jax.sampling.sampler import Sampler

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _bits(leaf: Any) -> np.ndarray:
    """A weight as ``.npz`` can hold it, which knows no bfloat16."""
    array = np.asarray(leaf)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _given(cond: Condition) -> dict[str, np.ndarray]:
    """The arguments that carry the conditioning of all networks, by name."""
    first, *others = map(np.asarray, cond.given)
    if any(not np.array_equal(first, other) for other in others):
        raise ValueError(
            "a sampler is exported with the same labels, or the same contexts, for all networks"
        )
    if first.ndim == 1:
        return {"labels": first}
    nulls = [np.asarray(each) for each in cond.null if each is not None]
    if any(not np.array_equal(nulls[0], other) for other in nulls[1:]):
        raise ValueError("a sampler is exported with the same negative for all networks")
    return {"context": first} | ({"negative": nulls[0]} if nulls else {})


def _replaced(cond: Condition, values: Sequence[Any]) -> Condition:
    """With the values of a call; null labels stay as they are."""
    given, *negative = values
    null = [negative[0] if negative and each is not None else each for each in cond.null]
    return Condition(tuple(given for _ in cond.given), tuple(null))


def export(
    path: str | os.PathLike[str],
    sampler: Sampler,
    *,
    labels: Any = None,
    prompts: Any = None,
    cond: Any = None,
    negative: Any = None,
    size: Any = None,
    decode: bool = True,
    seed: int = 0,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a sampler to an ``.npz`` file from which JAX alone, without this library, samples.

    The file holds ``program``, the bytes of ``jax.export`` (StableHLO); ``weight_0000``, ...; the
    arguments that were given here, ``seed``, ``labels``, ``plan`` and ``scales``, of which a call
    may give others of the same shape; and ``about``, JSON. Nothing in it is run when it is read.
    ``jax.export.deserialize(bytearray(file["program"])).call`` takes the list of the weights, in
    the order of their names, and then these four arguments; ``docs/scale.md`` has it as a script.

    Of networks that are conditioned on a context there are ``context`` and, where they are guided,
    ``negative``, float32 ``[B, L, D]``, in the place of ``labels``: what a text encoder makes of
    prompts is a part of the file, the encoder is not.

    It returns images, float32 ``[B, H, W, C]`` in [-1, 1], those of ``sample`` with
    ``jax.random.key(seed)``. ``seed`` is uint32, ``labels`` int32 ``[B]``, ``plan`` int32 ``[N]``,
    ``scales`` float32: the guidance scale of each guided network (of each step too, where one was
    given by step, or an interval).

    Args:
        path: The file.
        sampler: What is written, with its networks on one device.
        labels, prompts, cond, negative, size, decode: As in a call of the sampler; the same for all
            networks.
        seed: 0 to 2^32 - 1.
        platforms: For which the program is lowered, of ``PLATFORMS``.

    Raises:
        ValueError: If an argument is not as said, or no file can be written there; before any
            long work.
        OSError: If the file cannot be written after all.
    """
    check_writable(Path(path))
    wrong = [name for name in platforms if name not in PLATFORMS]
    if wrong or not platforms:
        raise ValueError(f"platforms must be some of {', '.join(PLATFORMS)}, got {wrong}")
    check_seed(seed)
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a ts.Sampler, got {shown(sampler)}")
    networks = sampler.networks
    request = sampler.request(
        jax.random.key(seed), labels=labels, prompts=prompts, cond=cond, negative=negative,
        size=size, decode=decode,
    )  # fmt: skip
    if request.config.mesh is not None:
        raise ValueError("a sampler is exported from networks on one device, not on a mesh")
    if set(platforms) != {"cpu"}:  # else the program holds what is quick on a CPU alone
        request = request.replace(platform=None)
    inputs = jax.tree.map(jnp.asarray, request.inputs)
    given = _given(inputs.cond)
    leaves, tree = jax.tree.flatten((inputs.denoisers, inputs.coder))
    # A network with several places is written once.
    distinct = list({id(leaf): leaf for leaf in leaves}.values())
    places = [next(i for i, each in enumerate(distinct) if each is leaf) for leaf in leaves]
    dtypes = [leaf.dtype for leaf in distinct]
    weights = [_bits(leaf) for leaf in distinct]
    guided = [scale for scale in inputs.scales if scale is not None]
    scales = np.array(np.broadcast_arrays(*guided) if guided else [], np.float32)

    def draw(weights: Any, seed: Any, *rest_of_inputs: Any) -> jax.Array:
        *cond, plan, scales = rest_of_inputs
        parts = [
            jax.lax.bitcast_convert_type(weight, dtype) if weight.dtype != dtype else weight
            for weight, dtype in zip(weights, dtypes, strict=True)
        ]
        denoisers, coder = jax.tree.unflatten(tree, [parts[place] for place in places])
        rest = iter(scales)
        output, *_ = request.function(
            inputs._replace(
                key=jax.random.key(seed),
                denoisers=denoisers,
                plan=Plan(plan, len(networks)),
                scales=tuple(None if s is None else next(rest) for s in inputs.scales),
                cond=_replaced(inputs.cond, cond),
                coder=coder,
            )
        )
        return output

    arguments = dict(
        seed=np.uint32(seed),
        **given,
        plan=np.asarray(request.plan.networks, np.int32),
        scales=scales,
    )
    function: Callable[..., Any] = jax.jit(draw)
    program = jax.export.export(function, platforms=tuple(platforms))(weights, *arguments.values())
    about = {
        "arguments": list(arguments),
        "networks": [network.card.name for network in networks],
        "licenses": [network.card.license for network in networks],
        "checksums": [network.card.checksum for network in networks],
        "platforms": list(program.platforms),
        "jax": jax.__version__,
    }
    named = {f"weight_{i:04d}": weight for i, weight in enumerate(weights)}
    with whole_file(Path(path)) as stream:
        np.savez(
            stream,
            about=np.array(json.dumps(about)),
            program=np.frombuffer(program.serialize(), np.uint8),
            **arguments,  # pyright: ignore[reportArgumentType]
            **named,
        )
