"""The components that a model may be made of: those of this package, a line each, and those of
`model.components`, which are imported.

To import is to run code. A settings file that the user names may ask for it; a checkpoint's own settings may
not, unless the user named the same components: `allowing` says which those are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType

from hybridtrain.errors import UserError
from hybridtrain.model.component import Component, FeedForward, Mixer, Residual
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.feedforwards.dense import DENSE
from hybridtrain.model.feedforwards.moe import MOE
from hybridtrain.model.mixers.attention import ATTENTION
from hybridtrain.model.residuals.add import ADD
from hybridtrain.model.residuals.dense_former import DENSE_FORMER

MIXERS: tuple[Mixer, ...] = (ATTENTION,)
FEEDFORWARDS: tuple[FeedForward, ...] = (DENSE, MOE)
RESIDUALS: tuple[Residual, ...] = (ADD, DENSE_FORMER)

_TAKEN = (
    "engram",
    "dim",
    "layers",
    "residual",
    "components",
    "vocab_size",
    "tie_embeddings",
    "norm_eps",
    "init_std",
)
"""Names that a component cannot have: other keys of [model], and the word for an Engram layer."""


class ComponentsError(UserError):
    """Components cannot be imported or do not go together; `problems` has a line each, with the name."""

    def __init__(self, problems: Collection[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Components:
    """By the names that `model.layers` and `model.residual` know them by."""

    mixers: Mapping[str, Mixer]
    feedforwards: Mapping[str, FeedForward]
    residuals: Mapping[str, Residual]

    @staticmethod
    def load(names: tuple[str, ...]) -> Components:
        """Those of this package, and those of the modules `names`: importable names or paths of .py files.

        Every module-level value that is a Mixer, FeedForward or Residual counts. Raises ComponentsError
        listing what cannot be imported, has no component, or has one of a name that is taken.
        """
        return _load(names)

    @property
    def all(self) -> tuple[Component, ...]:
        return (*self.mixers.values(), *self.feedforwards.values(), *self.residuals.values())

    @property
    def added(self) -> tuple[Component, ...]:
        """Those that are not of this package."""
        return tuple(c for c in self.all if not any(c is ours for ours in _OURS))


_OURS: tuple[Component, ...] = (*MIXERS, *FEEDFORWARDS, *RESIDUALS, ENGRAM)


@functools.cache
def _load(names: tuple[str, ...]) -> Components:
    found: dict[str, tuple[str, Component]] = {c.name: ("hybridtrain", c) for c in _OURS}
    problems: list[str] = []
    for name in dict.fromkeys(names):
        try:
            components = _declared_in(_module(name))
        except ComponentsError as error:
            problems += error.problems
            continue
        if not components:
            problems.append(
                f'model.components: "{name}" has no Mixer, FeedForward or Residual at its top level'
            )
        for component in components:
            home, other = found.setdefault(component.name, (name, component))
            if other is not component:
                problems.append(_taken(name, component, home))
            elif component.name in _TAKEN or not re.fullmatch("[a-z][a-z0-9_]*", component.name):
                problems.append(
                    f'model.components: "{name}" has a component "{component.name}"; a name is of small '
                    f"letters, digits and _, begins with a letter and is not one of {', '.join(_TAKEN)}"
                )
            else:
                problems += _section_problems(name, component)
    if problems:
        raise ComponentsError(problems)
    every = [component for _, component in found.values()]
    return Components(
        MappingProxyType({c.name: c for c in every if isinstance(c, Mixer)}),
        MappingProxyType({c.name: c for c in every if isinstance(c, FeedForward)}),
        MappingProxyType({c.name: c for c in every if isinstance(c, Residual)}),
    )


def _declared_in(module: ModuleType) -> list[Component]:
    """The components at the module's top level, but for those of this package that it imports."""
    values = [v for v in vars(module).values() if isinstance(v, Mixer | FeedForward | Residual)]
    return [v for v in values if not any(v is ours for ours in _OURS)]


def _taken(name: str, component: Component, home: str) -> str:
    where = "this package" if home == "hybridtrain" else f'"{home}"'
    return (
        f'model.components: "{name}" has a component "{component.name}", and so has {where}; each needs a '
        "name of its own"
    )


def _section_problems(name: str, component: Component) -> list[str]:
    try:
        component.section()
    except ValueError as error:
        return [f'model.components: "{name}": {component.section.__name__} needs a default for all: {error}']
    return []


def _module(name: str) -> ModuleType:
    """The module of an importable name or of a path that ends in .py."""
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        if not path.is_file():
            raise ComponentsError([f'model.components: "{name}": there is no file {path}'])
        # under a name of its own in sys.modules, where pydantic and dataclasses look annotations up
        known = f"hybridtrain_components_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None  # for the type checker: the path ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
        return module
    except ComponentsError:
        raise
    except ModuleNotFoundError as error:
        hint = "; it may be an importable module or the path of a .py file" if error.name == name else ""
        raise ComponentsError([f'model.components: "{name}" cannot be imported: {error}{hint}']) from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ComponentsError([f'model.components: "{name}" cannot be imported: {what}']) from error


BUILT_IN = Components.load(())
"""Those of this package alone."""

_ALLOWED: ContextVar[frozenset[str]] = ContextVar("components that the user named", default=frozenset())


@contextmanager
def allowing(names: Collection[str]) -> Iterator[None]:
    """Inside, a checkpoint's own settings may name these components, which its user named as well."""
    token = _ALLOWED.set(_ALLOWED.get() | {_place(name) for name in names})
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def not_allowed(names: Collection[str]) -> list[str]:
    """The components that settings of unknown origin may not import."""
    return [name for name in names if _place(name) not in _ALLOWED.get()]


def _place(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith(".py") else name
