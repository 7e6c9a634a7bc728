"""Every setting as markdown, from the settings' own definitions."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybridtrain.settings.tree import settings_class

HEAD = """# Settings

`python -m tools.reference` writes this page from the definitions of the settings.
A run's settings are a TOML file with these sections and, on the command line, overrides `section.key=value`.
A key that is left out has its default.
Unknown keys, wrong types and contradictions are reported all at once.
The run folder's `settings.toml` holds every value of a run.

Lengths are in tokens, batches in sequences, learning rates per optimizer step.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section("", settings_class(())))


def names(model: type[BaseModel] = settings_class(()), before: str = "") -> dict[str, bool]:
    """Every dotted name, e.g. `model.moe` and `model.moe.top_k`, and whether it is a section."""
    found: dict[str, bool] = {}
    for key, field in model.model_fields.items():
        name = f"{before}.{key}".lstrip(".")
        inner = field.annotation
        found[name] = isinstance(inner, type) and issubclass(inner, BaseModel)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= names(inner, name)
    return found


def section(name: str, model: type[BaseModel]) -> list[str]:
    """The lines of one section's table and of those inside it."""
    lines: list[str] = []
    inner: list[str] = []
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner += section(f"{name}.{key}".lstrip("."), field.annotation)
        else:
            default = _toml(field.get_default(call_default_factory=True))
            cells = (f"`{key}`", describe_type(field), f"`{default}`", _text(field))
            lines.append(f"| {' | '.join(cells)} |\n")
    if lines:
        lines = [f"\n## {name}\n\n", "| key | type | default | meaning |\n", "|---|---|---|---|\n", *lines]
    return lines + inner


def describe_type(field: FieldInfo) -> str:
    """A field's type and bounds in words: `integer >= 1`, `"cosine"` or `"wsd"`, `list of strings`."""
    bounds = [text for item in field.metadata if (text := _bound(item))]
    return " ".join([_kind(field.annotation), " and ".join(bounds)]).strip()


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [text for item in args[1:] for text in _bounds_of(item)]
        return " ".join([_kind(args[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in args)
    if origin is tuple:
        first, _, rest = _kind(args[0]).partition(" ")
        return f"list of {first}s {rest}".strip()
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(arg) for arg in args)
    return {int: "integer", float: "number", str: "string", bool: "true or false"}[annotation]


def _bounds_of(item: Any) -> list[str]:
    parts = item.metadata if isinstance(item, FieldInfo) else [item]
    return [text for part in parts if (text := _bound(part))]


def _bound(item: Any) -> str:
    if isinstance(item, MinLen):
        return "not empty"
    for kind, sign, value in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
        if isinstance(item, kind):
            return f"{sign} {getattr(item, value):g}"
    return ""


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _text(field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    return text.replace("][", "]\\[")  # which would be a link by reference
