"""Settings from a TOML file and dotted overrides, and back to TOML; every problem is reported at once."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hybridtrain.errors import SettingsError
from hybridtrain.files.untrusted import UntrustedFileError, read_toml
from hybridtrain.model.registry import ComponentsError, not_allowed
from hybridtrain.settings.rules import contradictions
from hybridtrain.settings.tree import Settings, settings_class

RENAMED = {"memory": "engram"}
"""Sections that had other names before version 0.1."""

RENAMED_VALUES = {"parallel.mem_placement": {"near": "contiguous", "far": "strided"}}
"""Values that had other names before version 0.1, by their key."""


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """The settings in the TOML file `path` with `section.key=value` overrides applied in order.

    The components that it names are imported: the user named the file. Raises SettingsError listing every
    unknown key, wrong type and contradiction, each with its key.
    """
    try:
        tree = read_toml(Path(path))
    except OSError as error:
        raise SettingsError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UntrustedFileError as error:
        raise SettingsError(str(path), [str(error).removeprefix(f"{path}: ")]) from None
    return parse_settings(tree, overrides, source=str(path), vouched=True)


def parse_settings(
    tree: dict[str, Any], overrides: Sequence[str] = (), source: str = "settings", vouched: bool = False
) -> Settings:
    """The settings in a nested dict, with overrides; raises SettingsError as `load_settings` does.

    Where the tree is of unknown origin, as a checkpoint's own, `model.components` in it may name only what
    the user named too: in an override, or in `registry.allowing`.
    """
    problems = [p for override in overrides if (p := _apply_override(tree, override))]
    names = _components(tree)
    vouched = vouched or any(o.startswith("model.components=") for o in overrides)
    if not vouched and (refused := not_allowed(names)):
        raise SettingsError(source, [*problems, _refusal(refused)])
    try:
        kind = settings_class(names)
    except ComponentsError as error:
        raise SettingsError(source, [*problems, *error.problems]) from error
    known = set(_leaf_keys(kind)) | set(_section_keys(kind))
    unknown = [key for key in _dict_keys(tree) if key not in known]
    problems += [f"{key}: {_renamed(key, known) or f'unknown key{_suggest(key, known)}'}" for key in unknown]
    for key in unknown:
        _remove(tree, key)
    try:
        settings = kind.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise SettingsError(source, problems + _messages(error)) from None
    problems += contradictions(settings)
    if problems:
        raise SettingsError(source, problems)
    return settings


def _components(tree: dict[str, Any]) -> tuple[str, ...]:
    """`model.components` of a tree that nothing was checked in; none where it is of another kind."""
    model = tree.get("model")
    names = model.get("components") if isinstance(model, dict) else None
    fine = isinstance(names, list) and all(isinstance(n, str) and n and "\0" not in n for n in names)
    return tuple(names) if fine and names is not None else ()


def _refusal(names: Sequence[str]) -> str:
    how = " ".join(f"--components {name}" for name in names)
    return (
        f"model.components={json.dumps(names)}: these settings are not yours to vouch for by naming their "
        f"folder, and to import them is to run their code; if you trust it, name it: {how}, or in your own "
        "run's model.components"
    )


def dump_settings(settings: Settings) -> str:
    """The whole tree as TOML, every default written out; `load_settings` reads it back to an equal tree."""
    lines: list[str] = []

    def section(name: str, values: dict[str, Any]) -> None:
        lines.append(f"\n[{name}]")
        lines.extend(f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict))
        for k, v in values.items():
            if isinstance(v, dict):
                section(f"{name}.{k}", v)

    for name, values in settings.model_dump(mode="json").items():
        section(name, values)
    return "\n".join(lines).lstrip() + "\n"


def _toml(value: Any) -> str:
    """A value as TOML: JSON but for the one character that only TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Put `section.key=value` into the tree; the value is read as TOML, else as a bare string. Returns a
    problem or None.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return f'"{override}" is not an override; write section.key=value, e.g. train.steps=50'
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    node = tree
    *sections, leaf = key.split(".")
    for name in sections:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return f"{key}: {name} is a value, not a section"
    node[leaf] = value
    return None


def _messages(error: ValidationError) -> list[str]:
    """pydantic's errors as `key: what is wrong (got …)`; the tree-wide ones already carry their keys."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        key, what = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        if not key:
            lines += what.splitlines()
        elif new := RENAMED_VALUES.get(key, {}).get(str(item["input"])):
            lines.append(f'{key}="{item["input"]}" is called "{new}" now')
        else:
            lines.append(f"{key}={json.dumps(item['input'], default=str)}: {what[0].lower()}{what[1:]}")
    return lines


def _renamed(key: str, known: set[str]) -> str:
    """The present name of a key of earlier versions; empty for any other key."""
    section, _, leaf = key.partition(".")
    new = ".".join(filter(None, (RENAMED.get(section, ""), leaf)))
    return f"is called {new} now" if section in RENAMED and new in known else ""


def _suggest(key: str, known: set[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    close = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        or [k for k in sorted(known) if k.rsplit(".", 1)[-1] == leaf][:1]
    )
    return f"; did you mean {close[0]}?" if close else ""


def _models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        yield name, kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _leaf_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, section in _models(model):
        if section is None:
            yield prefix + name
        else:
            yield from _leaf_keys(section, f"{prefix}{name}.")


def _section_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, section in _models(model):
        if section is not None:
            yield prefix + name
            yield from _section_keys(section, f"{prefix}{name}.")


def _dict_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _dict_keys(value, f"{prefix}{name}.")


def _remove(tree: dict[str, Any], key: str) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        tree = tree.get(name, {})
    tree.pop(leaf, None)
