"""What the site takes from outside of docs/: modules, READMEs, and links that lead to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.reference.tree import PACKAGE, mirror, modules, places, readmes, relink, summary


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with a part that is a link to a folder without an __init__.py."""
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / "docs" / "adr").mkdir(parents=True)
    (tmp_path / "kernels" / "rope").mkdir(parents=True)
    (tmp_path / PACKAGE / "kernels").symlink_to("../kernels")
    (tmp_path / PACKAGE / "__init__.py").write_text('"""The package.\n\nMore."""\n')
    (tmp_path / PACKAGE / "__main__.py").write_text("")
    (tmp_path / PACKAGE / "train.py").write_text('"""The loop: e.g. one\nstep. And more."""\n')
    (tmp_path / "kernels" / "rope" / "op.py").write_text("")
    (tmp_path / "kernels" / "rope" / "README.md").write_text("# rope\n")
    (tmp_path / "docs" / "table.md").write_text("# Memory\n")
    return tmp_path


def test_modules_behind_links_are_found_and_mirrored_as_packages(project: Path, tmp_path: Path) -> None:
    found = modules(project)
    assert list(found) == ["hybridtrain", "hybridtrain.kernels.rope.op", "hybridtrain.train"]
    target = tmp_path / "build"
    (target / PACKAGE).mkdir(parents=True)
    (target / PACKAGE / "gone.py").write_text("")
    mirror(target, project)
    files = {path.relative_to(target).as_posix() for path in target.rglob("*.py")}
    inits = {f"hybridtrain/{folder}__init__.py" for folder in ("", "kernels/", "kernels/rope/")}
    assert files == {*inits, "hybridtrain/train.py", "hybridtrain/kernels/rope/op.py"}
    assert (target / PACKAGE / "__init__.py").read_text().startswith('"""The package.')


def test_summary_is_the_first_sentence(project: Path) -> None:
    assert summary(project / PACKAGE / "train.py") == "The loop: e.g. one step"
    assert summary(project / PACKAGE / "__init__.py") == "The package"
    assert summary(project / "kernels" / "rope" / "op.py") == ""


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../kernels/rope/README.md)", "[a](reference/kernels/rope.md)"),
        ("[a `b`](../kernels/rope/op.py#x)", "[a `b`](reference/api/hybridtrain.kernels.rope.op.md#x)"),
        ("[a](../README.md)", "[a](index.md)"),
        ("[a](adr)", "[a](adr/index.md)"),
        ("[the licence](../LICENSE)", "the licence"),
        ("[a](https://x.org/y) [b](#c)", "[a](https://x.org/y) [b](#c)"),
        ("```sh\n[a](adr)\n```", "```sh\n[a](adr)\n```"),
    ],
)
def test_links_lead_to_pages_of_the_site(project: Path, link: str, expected: str) -> None:
    assert relink(link, project / "docs" / "table.md", "table.md", places(project)) == expected


def test_links_are_relative_to_the_page_of_the_site(project: Path) -> None:
    (readme,) = readmes(project)
    text = "[m](../../docs/table.md)"
    # its own folder is reached through the link of the package as well
    page = "reference/kernels/rope.md"
    assert relink(text, readme.resolve(), page, places(project)) == "[m](../../table.md)"


def test_this_project_has_pages_for_its_kernels_and_modules() -> None:
    assert "hybridtrain.kernels.norms.op" in modules()
    assert "reference/kernels/norms.md" in readmes().values()
