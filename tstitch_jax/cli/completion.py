"""Completion for shells: ``tstitch --completion bash``."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")

FILES = {"FILE", "SRC", "CONFIG", "SAMPLES", "REFERENCE", "SPEC"}
FOLDERS = {"DIR", "OUT"}
"""What an argument is called that is the path of a file, or of a folder."""


def _names() -> dict[str, list[str]]:
    """The known values of arguments that have names for values."""
    from checkpoints_convert import families
    from tstitch_jax.core.grids import SPACINGS
    from tstitch_jax.core.solvers import SOLVERS
    from tstitch_jax.evaluation import METRICS
    from tstitch_jax.hub import catalog, resolve
    from tstitch_jax.jobs.export import PLATFORMS

    embedded = resolve.embedded_names()

    def public(*families: str) -> list[str]:
        return [name for name, entry in catalog.PUBLIC.items() if entry.family in families]

    return {
        "networks": [
            *(name for name in embedded if "features" not in name),
            *public("dit", "sit", "unet"),
        ],
        "features": [
            *public("inception", "clip"),
            *(name for name in embedded if "features" in name),
        ],
        "autoencoder": public("autoencoder"),
        "text_encoder": public("text_encoder"),
        "solver": list(SOLVERS),
        "spacing": list(SPACINGS),
        "metrics": list(METRICS),
        "platforms": list(PLATFORMS),
        "family": list(families()),
    }


def _describe(parser: argparse.ArgumentParser, names: dict[str, list[str]]) -> None:
    """Tells shtab what each argument may be. The parser is of no other use after that."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _describe(each, names)
        elif action.dest in names:
            action.choices = names[action.dest]
        elif action.metavar in FILES | FOLDERS:
            what = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
            action.complete = what  # pyright: ignore[reportAttributeAccessIssue]


class PrintCompletion(argparse.Action):
    """Prints the script of a shell, and exits."""

    def __init__(self, option_strings: list[str], dest: str, **more: Any) -> None:
        super().__init__(
            option_strings, dest, metavar="SHELL", choices=SHELLS, default=argparse.SUPPRESS,
            help="print the completion script of bash, zsh or tcsh",
        )  # fmt: skip

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        import shtab

        _describe(parser, _names())
        print(shtab.complete(parser, values))
        parser.exit()
