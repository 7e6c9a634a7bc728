"""What a page names exists: commands, options, settings, make targets, scripts, files and folders."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tools.docs.pages import Code, Page
from tools.reference.commands import option_names, subcommands
from tools.reference.settings import names as setting_names

SETTINGS = setting_names()
COMMANDS = {name: option_names(command) for name, command in subcommands()}
GROUPS = {name.rpartition(" ")[0] for name in COMMANDS if " " in name}

# Dotted names that begin like a setting but are not one, and options of other programs: by whom.
OTHER_NAMES = {
    "deepspeed.initialize": "a function of DeepSpeed",
    "table.rows": "the table's name in a checkpoint",
}
OTHER_OPTIONS = {
    "--num_gpus": "deepspeed",
    "--nproc-per-node": "torchrun",
    "--use-checkpoint-args": "Megatron-LM",
    "--qk-layernorm": "Megatron-LM",
    "--norm-epsilon": "Megatron-LM",
    "--moe-router-num-groups": "Megatron-LM",
    "--moe-router-group-topk": "Megatron-LM",
    "--moe-router-dtype": "Megatron-LM",
}

_OUTPUT = re.compile(r"(runs|checkpoints|site|build|dist)/|curves\.svg$")  # what commands write
_MADE = {"settings.toml"}  # a name of files that runs write
_FILE = re.compile(r"[\w.*/-]*(?:/|\.(?:py|toml|md|sh|lock|json|ya?ml|cff|svg))")
_SOURCE = re.compile(r"[\w-]+\.(?:py|toml|md|sh|lock)")  # names without a folder that are looked for
_SUFFIXES = ("json", "toml", "safetensors", "pt", "py", "npy", "jsonl", "model", "txt", "md")
_SETTING = re.compile(rf"(?:{'|'.join(sorted({name.partition('.')[0] for name in SETTINGS}))})(?:\.\w+)+")
_ASSIGNED = re.compile(r"[A-Z_]+=\S*")
_MEMBER = re.compile(r"(\w+)\.(\w+)(?:\(.*)?")  # a name in a module beside the page, as `op.partial_sums`
_EDGES = "\"'“”,;:()[]{}…"
_FOLDERS = ("hybridtrain", "parallel", "kernels", "launch", "tests", "tools", "configs", "docs", "examples")


def name_problems(page: Page) -> list[str]:
    """Everything that a page names in code and that does not exist, with its line."""
    checked = checked_lines(page)
    problems = []
    for code in [*page.spans, *page.blocks]:
        if code.line in checked and not _is_old(page, code):
            problems += [page.at(line, problem) for line, problem in _in_code(page, code, code in page.spans)]
    return problems


def checked_lines(page: Page) -> range | set[int]:
    """The lines whose names must exist: of CHANGELOG.md those of its newest version, of docs/log.md and the
    decisions in docs/adr none, of other pages all.

    Entries of older versions, the log and decisions tell what was true when they were written. In the newest
    version "Removed" lists what is gone.
    """
    lines = page.text.splitlines()
    if page.path.name == "log.md" or page.path.parent.name == "adr":
        return set()
    if page.path.name != "CHANGELOG.md":
        return range(1, len(lines) + 1)
    wanted: set[int] = set()
    versions, removed = 0, False
    for number, line in enumerate(lines, start=1):
        if line.startswith("## "):
            versions += "[Unreleased]" not in line
            removed = False
        elif line.startswith("### "):
            removed = line.strip() == "### Removed"
        if versions > 1:
            break
        if not removed:
            wanted.add(number)
    return wanted


def _is_old(page: Page, code: Code) -> bool:
    """Whether this is the old name of "`old` → `new`" in CHANGELOG.md. The new one is checked."""
    line = page.text.splitlines()[code.line - 1]
    return page.path.name == "CHANGELOG.md" and f"`{code.text}` → `" in line


def _in_code(page: Page, code: Code, inline: bool) -> Iterator[tuple[int, str]]:
    if code.language == "python":
        return
    if code.language == "toml":
        yield from ((code.line, problem) for problem in _toml(code.text))
        return
    for number, line in _joined(code.text, code.line):
        words = [word for word in (word.strip(_EDGES) for word in line.split()) if word]
        yield from ((number, problem) for problem in _command(words, page.root))
        yield from ((number, f"no setting {name}") for name in _unknown_settings(words))
        if inline:
            yield from ((number, problem) for problem in _paths(page, words))
            yield from ((number, problem) for problem in _bare_options(words, page.root))
            yield from ((number, problem) for problem in _members(page, words))


def _joined(text: str, first: int) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, those that end in a backslash with the next one; shell comments left out."""
    begun, start = "", first
    for number, line in enumerate(text.splitlines(), start=first):
        begun, start = (begun + line, start) if begun else (line, number)
        if begun.endswith("\\"):
            begun = begun[:-1]
            continue
        yield start, re.sub(r"(^|\s)#\s.*", "", begun)
        begun = ""


def _command(words: list[str], root: Path) -> Iterator[str]:
    """What is wrong with the command that these words are, if they are one of ours."""
    while words and (_ASSIGNED.fullmatch(words[0]) or words[0] == "$"):
        words = words[1:]
    if not words:
        return
    if "hybridtrain" in words and (words[0] == "hybridtrain" or "-m" in words or "--module" in words):
        yield from _hybridtrain(words[words.index("hybridtrain") + 1 :])
    elif words[0] == "make":
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
        yield from (f"no make target {word}" for word in targets if word not in _make_targets(root))
    elif words[0] in ("python", "python3"):
        yield from _script(words[1:], root)


def _hybridtrain(words: list[str]) -> Iterator[str]:
    if not words or not re.match(r"[a-z-]", words[0]):  # the program itself, a version, a placeholder
        return
    name = " ".join(words[:2]) if words[0] in GROUPS and len(words) > 1 else words[0]
    if name in GROUPS or name == "--help":
        return
    if name not in COMMANDS:
        yield f"no command hybridtrain {name}; there are {', '.join(COMMANDS)}"
        return
    for option in _options(words):
        if option not in COMMANDS[name]:
            yield f"hybridtrain {name} has no option {option}; it has {', '.join(sorted(COMMANDS[name]))}"


def _script(words: list[str], root: Path) -> Iterator[str]:
    """`python tools/x.py …` and `python -m tools.x …`."""
    if words[:1] == ["-m"] and len(words) > 1 and words[1].split(".")[0] in ("tools", "tests"):
        module = root / words[1].replace(".", "/")
        script = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        name, *rest = words[1:]
    elif words and words[0].startswith("tools/"):
        name, *rest = words
        script = root / name
    else:
        return
    if script.is_file():
        unknown = (option for option in _options(rest) if option not in script_options(script))
        yield from (f"{script.relative_to(root)} has no option {option}" for option in unknown)
    else:
        yield f"no script {name}"


def _options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--\w", word)]


def _bare_options(words: list[str], root: Path) -> Iterator[str]:
    """Options by themselves, as `--resume`: some command or script has them."""
    if words and words[0].startswith("--"):
        scripts = map(script_options, (root / "tools").rglob("*.py"))
        known = set().union(*COMMANDS.values(), OTHER_OPTIONS, *scripts)
        unknown = (option for option in _options(words) if option not in known)
        yield from (f"no command and no script has an option {option}" for option in unknown)


def _unknown_settings(words: list[str]) -> Iterator[str]:
    for word in words:
        name = word.partition("=")[0]
        last = name.rpartition(".")[2]
        known = name in SETTINGS or name in OTHER_NAMES or last in _SUFFIXES or last.isupper()  # model.NAME
        if _SETTING.fullmatch(name) and not known:
            yield name


def _toml(text: str) -> Iterator[str]:
    """Keys of a TOML block that are not settings."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        yield f"not TOML: {error}"
        return

    def walk(table: dict[str, Any], before: str) -> Iterator[str]:
        for key, value in table.items():
            name = f"{before}.{key}".lstrip(".")
            if name not in SETTINGS:
                yield f"no setting {name}"
            elif isinstance(value, dict):
                yield from walk(value, name)

    yield from walk(tree, "")


def _paths(page: Page, words: list[str]) -> Iterator[str]:
    places = (page.root, page.root / "hybridtrain", page.path.parent)
    for word in words:
        if not _FILE.fullmatch(word) or "//" in word or word.startswith("/") or _OUTPUT.match(word):
            continue
        if "/" in word:
            found = any((p / word).exists() or ("*" in word and any(p.glob(word))) for p in places)
        else:  # among others it is an argument, e.g. of a command
            found = (
                len(words) > 1
                or not _SOURCE.fullmatch(word)
                or word in _MADE
                or word in _file_names(page.root)
                or (page.root / word).exists()
            )
        if not found:
            yield f"no file or folder {word}"


def _members(page: Page, words: list[str]) -> Iterator[str]:
    """Names in a module that lies beside the page and does not have them, as in the pages of kernels."""
    for word in words:
        member = _MEMBER.fullmatch(word)
        if member is None or member[2] in _SUFFIXES:
            continue
        module = page.path.parent / f"{member[1]}.py"
        if module.is_file() and member[2] not in _module_names(module):
            yield f"{module.relative_to(page.root)} has no {member[2]}"


@cache
def _module_names(module: Path) -> set[str]:
    """Names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = (part for target in targets for part in ast.walk(target))
            names.update(part.id for part in parts if isinstance(part, ast.Name))
    return names


@cache
def _make_targets(root: Path) -> set[str]:
    return set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M))


@cache
def _file_names(root: Path) -> set[str]:
    return {path.name for folder in _FOLDERS for path in (root / folder).rglob("*.*")}


@cache
def script_options(script: Path) -> set[str]:
    """Options that a script of tools/ declares by `add_argument`."""
    names = {"--help"}
    for call in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            names.update(text for text in texts if isinstance(text, str) and text.startswith("--"))
    return names
