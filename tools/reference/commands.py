"""Every command of `hybridtrain` as markdown: arguments and options, from their declarations."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from hybridtrain.cli import app

HEAD = """# Commands

`python -m tools.reference` writes this page from the declarations of the commands.
`hybridtrain COMMAND --help` prints the same in the terminal.
What the user can correct is one message on stderr and exit status 2.
"""
_WORDS = {int: "integer", float: "number", str: "string", Path: "path"}


def subcommands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, as ("kernels report", its command), in order of declaration."""
    # typer has a class of its own for groups, which is not click's in every version: both have `commands`
    group = group if group is not None else typer.main.get_command(app)
    for name, command in group.commands.items():
        path = f"{before} {name}".strip()
        if hasattr(command, "commands"):
            yield from subcommands(command, path)
        else:
            yield path, command


def option_names(command: Any) -> set[str]:
    """Every option of a command, e.g. {"--bind", "--no-bind", "--help"}."""
    names = {"--help"}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            names.update(parameter.opts, parameter.secondary_opts)
    return names


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, command) for name, command in subcommands())


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["hybridtrain", name, *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    lines = [f"\n## hybridtrain {name}\n\n{inspect.cleandoc(command.help)}\n\n```text\n{usage}\n```\n"]
    if arguments:
        lines += ["\n| argument | type | meaning |\n", "|---|---|---|\n"]
        lines += [f"| `{_display(p)}` | {_kind(hints[p.name])} | {_cell(p.help)} |\n" for p in arguments]
    if options:
        lines += ["\n| option | type | default | meaning |\n", "|---|---|---|---|\n"]
        lines += [_option(p, hints[p.name]) for p in options]
    return "".join(lines)


def _option(parameter: Any, hint: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return f"| {names} | {_kind(hint)} | {_default(parameter)} | {_cell(parameter.help)} |\n"


def _display(parameter: Any) -> str:
    name: str = parameter.metavar or parameter.name.upper()
    return name


def _usage(parameter: Any) -> str:
    text = _display(parameter) + ("..." if parameter.nargs == -1 else "")
    return text if parameter.required else f"[{text}]"


def _kind(hint: Any) -> str:
    """A parameter's type and bounds in words: `integer >= 1`, `strings`."""
    bounds = ""
    if get_origin(hint) is Annotated:
        hint, info = get_args(hint)[:2]
        signs = ((">=", info.min), ("<=", info.max))
        bounds = " and ".join(f"{sign} {value:g}" for sign, value in signs if value is not None)
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if hint is bool:
        return "flag"
    if get_origin(hint) is list:
        return f"{_WORDS[get_args(hint)[0]]}s"
    return f"{_WORDS[hint]} {bounds}".strip()


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
