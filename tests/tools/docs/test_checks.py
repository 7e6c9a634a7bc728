"""Each check of the pages finds a fault planted in a page, at its line, and lets the mended page pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.docs.links import link_problems
from tools.docs.names import COMMANDS, SETTINGS, name_problems
from tools.docs.pages import Page, pages, slugify
from tools.docs.prose import prose_problems, sentences


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a page to link to, a Makefile, a script and a module."""
    for folder in ("docs", "tools/kit", "hybridtrain"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Makefile").write_text("test:\n\techo\n")
    (tmp_path / "tools" / "plot.py").write_text('parser.add_argument("-k", "--key")\n')
    (tmp_path / "tools" / "kit" / "__main__.py").write_text("")
    (tmp_path / "hybridtrain" / "train.py").write_text("")
    headings = ("# Other", "## One, *two* `three.x`", "## Twice", "## Twice", "<a id='x'></a>")
    (tmp_path / "docs" / "other.md").write_text("\n\n".join(headings))
    return tmp_path


def read(project: Path, text: str, name: str = "docs/page.md") -> Page:
    path = project / name
    path.write_text(f"# Page\n\n{text}\n", encoding="utf-8")  # what is tested begins on line 3
    return Page(path, project)


@pytest.mark.parametrize(
    ("bad", "good", "problem"),
    [
        ("[a](gone.md)", "[a](other.md)", "docs/page.md:3: link to gone.md, which does not exist"),
        ("![a](gone.svg)", "![a](other.md)", "docs/page.md:3: link to gone.svg, which does not exist"),
        ("[a](../../x)", "[a](..)", "docs/page.md:3: link to ../../x, which"),
        ("text\n[a](other.md#gone)", "[a](other.md#one-two-threex)", "docs/page.md:4: link to other.md#gone"),
        (
            "[a](other.md#twice-2)",
            "[a](other.md#twice-1)",
            "docs/page.md:3: link to other.md#twice-2: docs/other.md has no heading",
        ),
        ("[a](#gone)", "[a](#page)", "docs/page.md:3: link to #gone: docs/page.md has no heading #gone"),
        ("| a |\n|---|\n| [a](gone.md) |", "```sh\n[a](gone.md)\n```", "docs/page.md:5: link to gone.md, "),
    ],
)
def test_links(project: Path, bad: str, good: str, problem: str) -> None:
    (found,) = link_problems(read(project, bad), {})
    assert found.startswith(problem)
    assert link_problems(read(project, good), {}) == []


NAMES = [
    ("`hybridtrain trian x.toml`", "`hybridtrain train x.toml`", "3: no command hybridtrain trian; "),
    (
        "```sh\n\nhybridtrain launch --nprocs 2 \\\n  x\n```",
        "`hybridtrain launch --nproc 2`",
        "5: hybridtrain launch has no option --nprocs",
    ),
    (
        "```sh\nhybridtrain train x \\\n  --resum\n```",
        "`hybridtrain train --resume`",
        "4: hybridtrain train has no option --resum;",
    ),
    ("`torchrun -m hybridtrain trian`", "`torchrun -m hybridtrain train`", "3: no command hybridtrain"),
    ("`hybridtrain kernels rebort`", "`hybridtrain kernels report`", "3: no command hybridtrain kernels"),
    ("`make tset`", "`make test PYTHON=python3.13`", "3: no make target tset"),
    ("`python tools/gone.py`", "`X=1 python tools/plot.py --key a`", "3: no script tools/gone.py"),
    ("`python -m tools.gone`", "`python -m tools.kit`", "3: no script tools.gone"),
    ("    python tools/plot.py --kez", "    python tools/plot.py --key", "3: tools/plot.py has no option"),
    ("`--gone 3`", "`--resume` and `--key`", "3: no command and no script has an option --gone"),
    ("`engram.fetsch`", "`engram.fetch`", "3: no setting engram.fetsch"),
    ('a\n`engram.fetsch = "step"`', '`engram.fetch = "step"`', "4: no setting engram.fetsch"),
    ("| `x` | `parallel.epp=2` |\n|--|--|\n", "`parallel.ep=2`", "3: no setting parallel.epp"),
    (
        "```sh\nhybridtrain train c.toml train.stepz=5\n```",
        "```sh\nhybridtrain train c.toml train.steps=5\n```",
        "4: no setting train.stepz",
    ),
    ("```toml\n[model.moe]\ntop = 2\n```", "```toml\n[model.moe]\n```", "4: no setting model.moe.top"),
    ("`hybridtrain/gone.py`", "`hybridtrain/train.py`", "3: no file or folder hybridtrain/gone.py"),
    ("`gone/`", "`tools/`", "3: no file or folder gone/"),
    ("`gone.py`", "`train.py`", "3: no file or folder gone.py"),
    ("`tools/*.sh`", "`tools/*.py`", "3: no file or folder tools/*.sh"),
]


@pytest.mark.parametrize(("bad", "good", "problem"), NAMES)
def test_names(project: Path, bad: str, good: str, problem: str) -> None:
    found = name_problems(read(project, bad))
    assert found
    assert found[0].startswith(f"docs/page.md:{problem}")
    assert name_problems(read(project, good)) == []


def test_what_is_not_a_name_of_ours_is_left_alone(project: Path) -> None:
    files = ("checkpoint.json", "runs/x/settings.toml", "s3://bucket/x.json", "/proc/x.json")
    words = (*files, "[model.NAME]", "deepspeed.initialize", "torch.save", "hybridtrain COMMAND --help")
    assert name_problems(read(project, "\n".join(f"`{word}`" for word in words))) == []
    assert name_problems(read(project, "```text\nhybridtrain 0.1.0\n```")) == []
    assert name_problems(read(project, "```python\nmemory.gone\n```")) == []


@pytest.mark.parametrize(
    ("bad", "good", "problem"),
    [
        ("`kernels.gone`", "`kernels.swiglu`", "no setting kernels.gone"),
        ("`op.gone`", "`op.mix`", "kernels/op.py has no gone"),
        ("`op.Gone(x)`", "`op.LIMIT` and `op.Mix(x)`", "kernels/op.py has no Gone"),
        ("`gone.py`", "`op.py`", "no file or folder gone.py"),
    ],
)
def test_names_beside_a_page(project: Path, bad: str, good: str, problem: str) -> None:
    (project / "kernels").mkdir()
    (project / "kernels" / "op.py").write_text("LIMIT: int = 1\ndef mix(): ...\nclass Mix: ...\n")
    assert name_problems(read(project, bad, "kernels/README.md")) == [f"kernels/README.md:3: {problem}"]
    assert name_problems(read(project, good, "kernels/README.md")) == []


def test_pages_of_kernels_and_examples_are_checked(project: Path) -> None:
    checked = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/other.md")
    checked += ("kernels/mix/README.md", "examples/README.md")
    for name in checked:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("`make gone`\n")
    assert [page.name for page in pages(project)] == list(checked)
    assert all(name_problems(page) for page in pages(project))


def test_changelog_may_name_what_is_gone(project: Path) -> None:
    newest = "## [Unreleased]\n\n- `train.gone`\n\n### Removed\n\n- `train.removed`\n\n"
    newest += "### Changed\n\n- `train.old` → `train.new`\n"
    first = "\n## [0.2.0] - 2026-01-01\n\n- `train.first`\n"
    older = "\n## [0.1.0] - 2025-01-01\n\n- `train.older`\n"
    found = name_problems(read(project, newest + first + older, "CHANGELOG.md"))
    assert [line.rpartition(" ")[2] for line in found] == ["train.gone", "train.new", "train.first"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One sentence.", 1),
        ("One. Two.", 2),
        ("One (with brackets). `code` begins the second.", 2),
        ("Is it so? Yes! **Bold.** More.", 4),
        ("What e.g. Adam does, i.e. A. B. Smith's 0.5 of `a. B`, in [x](y.Z).", 1),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


def test_prose_of_several_sentences_and_long_lines_is_told(project: Path) -> None:
    text = f"One. Two.\n\n- {'word ' * 40}\n\n| One. Two. |\n|---|\n\n```text\nOne. Two.\n```\n"
    text += f"\n[a](docs/{'x' * 200}.md)\n"
    assert prose_problems(read(project, text)) == [
        "docs/page.md:3: 2 sentences on a line; write one a line",
        "docs/page.md:5: 199 characters on a line, more than 160",
    ]


def test_slugs_are_those_of_github() -> None:
    assert slugify("What FP8 costs, in `kernels/` (and why)") == "what-fp8-costs-in-kernels-and-why"
    assert slugify("1F1B · zero-bubble") == "1f1b--zero-bubble"


def test_commands_and_settings_are_those_of_the_program() -> None:
    assert "--resume" in COMMANDS["train"]
    assert "--no-bind" in COMMANDS["launch"]
    assert "kernels bench" in COMMANDS
    assert SETTINGS["model.moe"]
