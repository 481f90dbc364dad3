"""The whole sampler compiled for TPUs ahead of time: the compiler's estimates, no measurement.

    python benchmarks/tpu_aot.py [--topology v5e:2x2] [--size 256] [--images 8] [--ops 10]
    python benchmarks/tpu_aot.py --check     # every topology and size, 8 images: do goals hold?
    python benchmarks/tpu_aot.py --text      # BK-SDM-Tiny + Stable Diffusion 1, and texts, 512 px

Needs libtpu (``pip install "jax[tpu]"``), but no TPU. DiT-S/2 + DiT-XL/2 (or with ``--text`` the
U-Nets), guided, 50 DDIM steps, bfloat16, with the decoder, data-parallel over the topology's chips.
Only shapes are given, nothing runs. The cycles are the ``estimated_cycles`` that the TPU compiler
writes at the instructions of its program, a loop's as often as it runs, summed by network. It
writes none at copies between memories that run beside the computation; the time of those from and
to HBM is printed for itself, and the share of the roofline also as it would be if no copy were
hidden.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import time
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
import published

import tstitch_jax as ts

NAMES = ("dit-s-2", "dit-xl-2")
TEXT_NAMES = ("bk-sdm-tiny", "sd-1")
STEPS = 50


class Chip(NamedTuple):
    """What one device of a topology, a whole chip, can do at best."""

    flops: float  # bfloat16, a second
    clock: float  # Hz
    bandwidth: float  # of HBM, bytes a second


CHIPS = {
    "v4": Chip(275e12, 1.05e9, 1228e9),
    "v5e": Chip(197e12, 1.5e9, 819e9),
    "v5p": Chip(459e12, 1.75e9, 2765e9),
    "v6e": Chip(918e12, 1.75e9, 1640e9),
}
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")

SHARES = {("v5e:2x2", 256): (0.40, 0.60)}
"""Of the roofline, by network, that ``--check`` asks for at least."""

COLLECTIVES = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z-]+|ragged-all-to-all"
    r"|send|recv)(?:-start)?\("
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def devices_of(topology: str) -> list[Any]:
    """Its chips, ahead of time; of a v4, two cores are one device only if asked for."""
    from jax.experimental import topologies

    config = dict(chip_config_name="megacore") if topology.startswith("v4:") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **config).devices


def compile_sampler(
    topology: str, size: int, images: int, decode: bool = True, text: bool = False
) -> tuple[jax.stages.Compiled, float, list[int]]:
    """The executable for so many images a device, its compile time, and the networks' work."""
    devices = devices_of(topology)
    mesh = ts.make_mesh(devices=devices)

    def make(card: Any) -> Any:
        return ts.shard(published.make(card, jnp.bfloat16), mesh)

    count = images * len(devices)
    if text:
        networks = [make(published.text_to_image(name, size)) for name in TEXT_NAMES]
        contexts = np.zeros((count, *published.CONTEXT), np.float32)
        asked: dict[str, Any] = dict(cond=contexts, negative=contexts[:1])
    else:
        networks = [make(published.dit(name, size)) for name in NAMES]
        asked = dict(labels=[0] * count)
    sampler = ts.Sampler(
        networks, plan=[0.5, 0.5], steps=STEPS,
        autoencoder=make(published.AUTOENCODER) if decode else None,
    )  # fmt: skip
    request = sampler.request(jax.random.key(0), **asked, decode=decode)
    start = time.perf_counter()
    compiled = request.compile()
    return compiled, time.perf_counter() - start, [network.card.macs for network in networks]


def report_encoder(topology: str, images: int) -> None:
    """The text encoder, a program of its own that runs before the sampler."""
    device = devices_of(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    encoder = published.make(published.TEXT_ENCODER, jnp.bfloat16)

    def there(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    ids = jax.ShapeDtypeStruct((images, encoder.tokens), jnp.int32, sharding=place)
    start = time.perf_counter()
    encode = jax.jit(lambda model, ids: model(ids))
    compiled = encode.lower(jax.tree.map(there, encoder.model), ids).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    print(
        f"{topology} texts, {images} a device: compiled in {seconds:.0f} s; arguments "
        f"{memory.argument_size_in_bytes / 1e9:.2f} GB + temporaries "
        f"{memory.temp_size_in_bytes / 1e9:.2f} GB",
        flush=True,
    )


class Instruction(NamedTuple):
    cycles: int
    copied: int  # bytes from or to HBM, beside the computation
    called: tuple[str, ...]
    operation: str
    line: str


class Program:
    """The text of an optimised program, as computations that call each other."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        name = None
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%([\w.-]+) \(", line):
                name = match[2]
                self.computations[name] = []
                self.entry = name if match[1] else self.entry
            elif name and line.startswith("  "):
                self.computations[name].append(_parse(line))

    def trips(self, condition: str) -> int:
        """How often a loop runs: the one constant that its condition compares with."""
        text = "\n".join(each.line for each in self.computations[condition])
        (bound,) = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
        return int(bound)

    def walk(self, name: str, times: int = 1, switch: bool = False):
        """Instructions of a computation and of all that it calls, each with how often it runs.

        Fusions are one instruction. What is within a conditional is left out, but for ``switch``.
        """
        for each in self.computations[name]:
            yield times, each
            if each.operation == "while":
                condition, body = each.called
                yield from self.walk(body, times * self.trips(condition), switch)
            elif each.operation in ("call", "async-start") or (
                switch and each.operation == "conditional"
            ):
                for called in each.called:
                    yield from self.walk(called, times, switch)

    def switches(self) -> list[Instruction]:
        return [e for _, e in self.walk(self.entry, switch=True) if e.operation == "conditional"]


def _parse(line: str) -> Instruction:
    match = re.match(r"\s+(?:ROOT )?%\S+ = (.*?[\])}]) ([a-z][\w-]*)\(", line)
    kind, operation = (match[1], match[2]) if match else ("", "")
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    names = []
    if operation == "while":
        names = [re.search(rf"{k}=%([\w.-]+)", line)[1] for k in ("condition", "body")]
    elif operation == "conditional":
        if match := re.search(r"branch_computations=\{([^}]*)\}", line):
            names = re.findall(r"%([\w.-]+)", match[1])
        else:
            names = [re.search(rf"{k}_computation=%([\w.-]+)", line)[1] for k in ("false", "true")]
    elif operation in ("call", "async-start"):
        names = re.findall(r"(?:to_apply|calls)=%([\w.-]+)", line)
    copied = 0
    if operation in ("copy-start", "slice-start"):
        result = re.match(r"\(?\(?(\w+)\[([\d,]*)\]", kind)
        if result and "S(1)" in kind:
            shape = [int(n) for n in result[2].split(",") if n]
            copied = _BYTES.get(result[1], 4) * math.prod(shape)
    return Instruction(int(cycles[1]) if cycles else 0, copied, tuple(names), operation, line)


def most_expensive(instructions: list[tuple[int, Instruction]], count: int) -> None:
    """Prints the instructions that take longest, alike ones of all blocks together."""
    cycles, number = collections.Counter(), collections.Counter()
    for times, each in instructions:
        source = re.search(r'op_name="([^"]*)"', each.line)
        source = re.sub(r"block_\d+", "block", source[1] if source else "")
        source = "/".join(source.split("/")[-3:])
        kind = re.match(r"\s+(?:ROOT )?%([a-zA-Z_-]+)\S* = \(?(\w+\[[\d,]*\])", each.line)
        key = source, *(kind.groups() if kind else ("", ""))
        cycles[key] += times * each.cycles
        number[key] += times
    for key, total in cycles.most_common(count):
        print(f"    {total / 1e3:9.0f} k in {number[key]:4}: {' '.join(key)}")


def report(
    topology: str, size: int, images: int, decode: bool, ops: int, save: str, check: bool,
    of_text: bool,
) -> None:  # fmt: skip
    chip = CHIPS[topology.split(":")[0]]
    compiled, seconds, macs = compile_sampler(topology, size, images, decode, of_text)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if save:
        with open(save, "w") as file:
            file.write(text)
    program = Program(text)
    arguments, temporaries = (
        n / 1e9 for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    )
    print(
        f"{topology} {size} px, {images} images a device: compiled in {seconds:.0f} s; arguments "
        f"{arguments:.2f} GB + temporaries {temporaries:.2f} GB = {arguments + temporaries:.2f} "
        f"GB; collectives: {', '.join(sorted(set(COLLECTIVES.findall(text)))) or 'none'}",
        flush=True,
    )
    (switch,) = program.switches()
    if check:
        assert not COLLECTIVES.search(text), "the program has collectives"
        assert arguments + temporaries < 2.5, "the program does not fit 2.5 GB"
        assert re.search(rf"s32\[{STEPS}\]\S* parameter\(", text), "the plan is no argument"
    shares = []
    names = TEXT_NAMES if of_text else NAMES
    for name, work, branch in zip(names, macs, switch.called, strict=True):
        found = list(program.walk(branch, switch=True))
        cycles = sum(times * each.cycles for times, each in found)
        copied = sum(times * each.copied for times, each in found)
        ideal = 2 * work * 2 * images / chip.flops
        took, beside = cycles / chip.clock, copied / chip.bandwidth
        shares.append(ideal / took)
        print(
            f"  {name}, {2 * images} rows: {cycles / 1e6:.2f} M cycles, {took * 1e3:.2f} ms, "
            f"{ideal / took:.1%} of the roofline; copies {beside * 1e3:.2f} ms, with them "
            f"{ideal / (took + beside):.1%}",
            flush=True,
        )
        most_expensive(found, ops)
    if check:
        goals = SHARES.get((topology, size), (0, 0))
        for name, share, least in zip(NAMES, shares, goals, strict=True):
            assert share >= least, f"{name} is below {least:.0%} of the roofline"
        return
    rest = list(program.walk(program.entry))
    if ops:
        print("  all else:")
        most_expensive(rest, ops)
    loop = [
        sum(times * each.cycles for times, each in program.walk(each.called[1]))
        for each in program.computations[program.entry]
        if each.operation == "while" and switch in [e for _, e in program.walk(each.called[1])]
    ]
    loop = sum(loop) * STEPS
    other = sum(times * each.cycles for times, each in rest) - loop
    print(
        f"  the steps' own work: {loop / STEPS / chip.clock * 1e3:.3f} ms a step; all before and "
        f"after the loop{', with decoding' * decode}: {other / chip.clock * 1e3:.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="*", default=["v5e:2x2"], help=", ".join(TOPOLOGIES))
    parser.add_argument("--size", nargs="*", type=int, help="side of the images (256; texts: 512)")
    parser.add_argument("--images", nargs="*", type=int, help="a device (8 and 32; texts: 1)")
    parser.add_argument("--latents", action="store_true", help="without the decoder")
    parser.add_argument("--ops", type=int, default=0, help="how many instructions to list")
    parser.add_argument("--save", default="", help="where to write the program's text")
    parser.add_argument("--check", action="store_true", help="that the goals are met")
    parser.add_argument("--text", action="store_true", help="of Stable Diffusion instead of DiT")
    given = parser.parse_args()
    if given.text and given.check:
        parser.error("--check is of DiT; leave out --text")
    given.size = given.size or ([512] if given.text else [256])
    given.images = given.images or ([1] if given.text else [8, 32])
    if given.check:
        given.topology, given.size, given.images = TOPOLOGIES, [256, 512], [8]
    for topology in given.topology:
        if given.text:
            report_encoder(topology, given.images[0])
        for size in given.size:
            for images in given.images:
                report(
                    topology, size, images, not given.latents, given.ops, given.save, given.check,
                    given.text,
                )  # fmt: skip
