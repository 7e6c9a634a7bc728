"""Reads pickles that somebody else may have made: as values and names, without importing or calling anything
that they name.

A pickle is a program for a machine with a stack. This machine knows the instructions of protocols 2 to 5 that
data need. Where one names a class or function, the name itself is the value; where one would call it or set
an object's state, the call is noted down as a `Made`. So no constructor, `__setstate__` or function ever
runs, whatever the file says, and all that is held is in proportion to the file's length: lengths and memo
numbers that it claims allocate nothing. Whoever wants an object of what was read makes it of the parts that
it looked at (checkpoint/index.py, checkpoint/chunk.py, formats/torch_dist.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from hybridtrain.files.untrusted import UntrustedFileError


@dataclass(frozen=True, slots=True)
class Named:
    """A class, function or constant, by its name; `torch.float32` is Named("torch", "float32")."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What a pickle wants to be called or built: `of(*args)`, then given `state` and, where it is a
    collection, `items`.
    """

    of: Any
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The full name of what it is made of; "" where that is not a name."""
        return str(self.of) if type(self.of) is Named else ""


def unpickle(content: bytes, source: str, known: Collection[str] | None, persistent: bool = False) -> Any:
    """The value of a pickle: numbers, strings, lists (also for sets), tuples and dicts as they are, all else
    as Named and Made.

    `known`: full names that may occur; None: any. `persistent`: allow what `torch.save` says of storages; it
    is given as a Made of "" with the tuple in `args`. Raises UntrustedFileError naming `source`, and every
    name that is not known.
    """
    machine = _Machine(content, persistent)
    try:
        value = machine.run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise UntrustedFileError(
            f"{source}: is damaged or no pickle of data: byte {machine.at - 1}: {error}"
        ) from None
    finally:
        unknown = sorted({str(name) for name in machine.names} - set(known)) if known is not None else []
        if unknown:
            shown = ", ".join(unknown[:8]) + ("…" if len(unknown) > 8 else "")
            raise UntrustedFileError(
                f"{source}: names {shown[:500]}, which is not part of such a file"
            ) from None
    return value


_MAX_NAME = 1000
_HASHED = (str, int, float, bool, bytes, type(None), Named, Made)


class _Machine:
    def __init__(self, content: bytes, persistent: bool) -> None:
        self.content, self.at, self.persistent = content, 0, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.names: dict[Named, Named] = {}

    def run(self) -> Any:
        content, act = self.content, _ACTIONS
        while True:
            code = content[self.at]
            self.at += 1
            if code == _STOP:
                break
            action = act.get(code)
            if action is None:
                raise ValueError(f"the instruction {chr(code)!r} has no place in data")
            action(self)
        if len(self.stack) != 1 or self.outer:
            raise ValueError("it ends with more or less than one value")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        low, self.at = self.at, self.at + count
        if self.at > len(self.content):
            raise ValueError("it is cut short")
        return self.content[low : self.at]

    def number(self, form: str, size: int) -> int:
        value: int = struct.unpack(form, self.take(size))[0]
        return value

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text, self.at = self.content[self.at : end].decode("utf-8"), end + 1
        return text

    def name(self, module: Any, name: Any) -> Named:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _MAX_NAME:
            raise ValueError(
                "a name is not a string, or too long"
            )  # one long module may be that of many names
        found = Named(module, name)
        return self.names.setdefault(found, found)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items


def _pack(count: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        if len(m.stack) < count:
            raise ValueError("the stack is empty")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return act


def _text(form: str, size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.stack.append(m.take(m.number(form, size)).decode("utf-8", "surrogatepass"))

    return act


def _bytes(form: str, size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.stack.append(m.take(m.number(form, size)))

    return act


def _integer(form: str, size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.stack.append(m.number(form, size))

    return act


def _put(form: str, size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.memo[m.number(form, size)] = m.stack[-1]

    return act


def _get(form: str, size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.stack.append(m.memo[m.number(form, size)])

    return act


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _skip(count: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.take(count)

    return act


def _mark(m: _Machine) -> None:
    m.outer.append(m.stack)
    m.stack = []


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _tuple(m: _Machine) -> None:
    items = m.since_mark()
    m.stack.append(tuple(items))


def _set(m: _Machine) -> None:
    items = m.since_mark()
    m.stack.append(items)


def _pop_mark(m: _Machine) -> None:
    m.since_mark()


def _add(m: _Machine, items: list[Any]) -> None:
    into = m.stack[-1]
    if type(into) is Made:
        into.items += items
    elif type(into) is list:
        into += items
    else:
        raise ValueError("items are added to what is not a list")


def _put_in(m: _Machine, pairs: list[Any]) -> None:
    into = m.stack[-1]
    keys, values = pairs[::2], pairs[1::2]
    for key in keys:  # hashing a tuple of tuples goes as deep as they are
        if type(key) not in _HASHED and not (
            type(key) is tuple and all(type(part) in _HASHED for part in key)
        ):
            raise ValueError(f"a {type(key).__name__} is the key of a dict")
    if type(into) is Made:
        into.items += zip(keys, values, strict=True)
    elif type(into) is dict:
        into.update(zip(keys, values, strict=True))
    else:
        raise ValueError("keys are set in what is not a dict")


def _append(m: _Machine) -> None:
    _add(m, [m.stack.pop()])


def _appends(m: _Machine) -> None:
    items = m.since_mark()
    _add(m, items)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _put_in(m, [key, value])


def _set_items(m: _Machine) -> None:
    items = m.since_mark()
    _put_in(m, items)


def _long(m: _Machine) -> None:
    m.stack.append(int.from_bytes(m.take(m.content[m.at : m.at + 1][0] + 1)[1:], "little", signed=True))


def _global(m: _Machine) -> None:
    m.stack.append(m.name(m.line(), m.line()))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.name(module, name))


def _call(m: _Machine) -> None:
    args, of = m.stack.pop(), m.stack.pop()
    if type(args) is not tuple:
        raise ValueError("arguments are no tuple")
    m.stack.append(Made(of, args))


def _call_with_names(m: _Machine) -> None:
    names = m.stack.pop()
    _call(m)
    m.stack[-1].state = names


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    made = m.stack[-1]
    if type(made) is not Made or made.state is not None:
        raise ValueError("a state is set of what has one or can have none")
    made.state = state


def _storage(m: _Machine) -> None:
    if not m.persistent:
        raise ValueError("it refers to something outside")
    what = m.stack.pop()
    m.stack.append(Made("", what if type(what) is tuple else (what,)))


_STOP = ord(".")
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _skip(1),  # PROTO
    0x95: _skip(8),  # FRAME
    ord("("): _mark,
    ord("1"): _pop_mark,
    ord("0"): lambda m: m.stack.pop(),
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("J"): _integer("<i", 4),
    ord("K"): _integer("<B", 1),
    ord("M"): _integer("<H", 2),
    0x8A: _long,
    ord("G"): _integer(">d", 8),  # BINFLOAT
    ord("X"): _text("<I", 4),
    0x8C: _text("<B", 1),
    0x8D: _text("<Q", 8),
    ord("B"): _bytes("<I", 4),
    ord("C"): _bytes("<B", 1),
    0x8E: _bytes("<Q", 8),
    ord(")"): _constant(()),
    0x85: _pack(1),
    0x86: _pack(2),
    0x87: _pack(3),
    ord("t"): _tuple,
    ord("]"): lambda m: m.stack.append([]),
    0x8F: lambda m: m.stack.append([]),  # EMPTY_SET
    0x90: _appends,  # ADDITEMS
    0x91: _set,  # FROZENSET
    ord("}"): lambda m: m.stack.append({}),
    ord("a"): _append,
    ord("e"): _appends,
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("q"): _put("<B", 1),
    ord("r"): _put("<I", 4),
    ord("h"): _get("<B", 1),
    ord("j"): _get("<I", 4),
    0x94: _memoize,
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _call,
    0x81: _call,  # NEWOBJ
    0x92: _call_with_names,  # NEWOBJ_EX
    ord("b"): _build,
    ord("Q"): _storage,
}
