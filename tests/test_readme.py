"""What the README shows is run."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from tstitch_jax import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python(monkeypatch):
    names = {}
    shapes = []
    for block in blocks("python"):
        with jax.numpy_dtype_promotion("standard"):  # as users have it
            exec(block, names)
        images = np.asarray(names["images"])
        assert np.isfinite(images).all()
        shapes.append(images.shape)
    assert shapes == [(4, 28, 28, 1), (1, 28, 28, 1), (4, 28, 28, 1)]


COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("tstitch")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_ones_that_there_are(command):
    arguments = cli.make_parser().parse_args(command[1:])
    assert callable(arguments.run)


def test_the_two_commands_and_the_links():
    assert "make demo" in README
    assert "make test" in README
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
