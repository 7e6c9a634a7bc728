"""Arguments and options that several commands share, and how they print numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Argument(help="TOML file of settings, e.g. configs/quickstart.toml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, e.g. train.steps=50 parallel.ep=2")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the run folder's latest checkpoint")]
AutoResume = Annotated[
    bool,
    typer.Option(
        "--auto-resume",
        help="go on from the latest checkpoint where there is one, else start: for torchrun --max-restarts",
    ),
]
RUN = "run folder, one of its checkpoints, or the URL of its checkpoints"
Run = Annotated[str, typer.Argument(help=RUN)]
Allow = Annotated[
    str,
    typer.Option(
        help="of a resumed run, what may be another than the checkpoint's: seed, data, validation, joined by "
        "commas. With another seed or other data it goes on with a new epoch"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def _allow_components(context: typer.Context, names: list[str] | None) -> list[str]:
    """Let what this command reads name these components, until it ends."""
    if names:
        from hybridtrain.model.registry import allowing

        context.with_resource(allowing(names))
    return names or []


Components = Annotated[
    list[str] | None,
    typer.Option(
        "--components",
        metavar="NAME",
        callback=_allow_components,
        help="module or .py file that the checkpoint's own model.components may import, which runs its code; "
        "once for each",
    ),
]


def print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:16s} {value:.6g}" if isinstance(value, float) else f"{name:16s} {value}")
