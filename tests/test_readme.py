"""Commands of the pages' sh blocks parse as they stand, with their settings and layouts; what the README says
of the project.

Names, links and paths of all pages: test_docs.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from hybridtrain.cli import app
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.settings.load import load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "kernels").glob("*/README.md")),
    ROOT / "examples" / "README.md",
]
SUBCOMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009  (typer's class for groups is its own)
ELSEWHERE = ("torchrun", "tensorboard")


def commands(page: Path) -> list[str]:
    """The lines of a page's ```sh blocks, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def unknown_options(words: list[str], known: set[str]) -> list[str]:
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def check_hybridtrain(words: list[str], world: int = 1) -> None:
    """A `hybridtrain` command line parses as it stands; its config and overrides are settings, and their
    layout fits the ranks.
    """
    assert words[0] in SUBCOMMANDS, f"no subcommand {words[0]}"
    command = SUBCOMMANDS[words[0]]
    context = command.make_context(words[0], words[1:], resilient_parsing=False)
    if "config" in context.params:
        assert not Path(context.params["config"]).is_absolute()
        settings = load_settings(ROOT / context.params["config"], context.params["overrides"] or [])
        resolve_layout(settings, context.params.get("nproc", world))


def check(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "hybridtrain":
        check_hybridtrain(words[1:])
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        assert words[1].startswith("tools/")
        options = set(
            re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / words[1]).read_text(encoding="utf-8"))
        )
        assert not unknown_options(words[2:], options)
    elif "torchrun" in words[:2]:
        options, _, rest = (part.split() for part in line.partition(" -m hybridtrain "))
        options = options[options.index("torchrun") + 1 :]
        assert not unknown_options(options, {"--nproc-per-node", "--max-restarts"})
        check_hybridtrain(rest, world=int(options[options.index("--nproc-per-node") + 1]))
    elif words[0] == "deepspeed":
        assert words[1:6] == ["--num_gpus", words[2], "--no_local_rank", "--module", "hybridtrain"]
        check_hybridtrain(words[6:], world=int(words[2]))
    else:
        assert words[0] in ELSEWHERE, f"a command that this test cannot check: {line}"


@pytest.mark.parametrize(
    ("page", "line"), [(p, line) for p in PAGES for line in commands(p)], ids=lambda v: getattr(v, "name", v)
)
def test_command_is_one(page: Path, line: str) -> None:
    check(line)


def test_architecture_names_files_that_exist() -> None:
    house = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"\b(\w+\.py)\b", house)
    present = {
        path.name
        for folder in ("hybridtrain", "parallel", "kernels", "launch", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(names) > 15
    assert not set(names) - present


def test_readme_shows_every_subcommand() -> None:
    shown = {line.split()[1] for line in commands(ROOT / "README.md") if line.startswith("hybridtrain ")}
    assert shown == set(SUBCOMMANDS)


def test_readme_is_short_and_filled_in() -> None:
    assert len(README.splitlines()) <= 180
    assert not re.findall(r"@@\w+@@", README)


def test_dead_commands_are_noticed() -> None:
    for line in (
        "hybridtrain trian configs/quickstart.toml",
        "hybridtrain launch --nprocs 2 configs/quickstart.toml",
        "hybridtrain train configs/quickstart.toml train.stepz=5",
        "hybridtrain train configs/quickstart.toml",  # its layout is for two ranks
        "make no-such-target",
        "python tools/plot_runs.py x.svg runs/a --keys loss",
        "curl something",
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011  (whatever the parser of that command raises)
            check(line)
