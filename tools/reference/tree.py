"""What the site shows beside docs/: the package's modules, READMEs of its folders, the project's pages."""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "hybridtrain"
# Pages at the top of the project, and where the site has them.
OTHER_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name, in order, with its file.

    Modules in folders without an __init__.py count as well.
    """
    found: dict[str, Path] = {}
    for folder, inner, files in os.walk(root / PACKAGE, followlinks=True):  # parts of the package are links
        inner[:] = sorted(name for name in inner if name != "__pycache__")
        parts = Path(folder).relative_to(root).parts
        for file in files:
            stem = file.removesuffix(".py")
            if file.endswith(".py") and stem != "__main__":
                found[".".join(parts if stem == "__init__" else (*parts, stem))] = Path(folder) / file
    return dict(sorted(found.items()))


def readmes(root: Path = ROOT) -> dict[Path, str]:
    """READMEs within the package by path, and their pages, as "reference/kernels/rope.md"."""
    found: dict[Path, str] = {}
    for folder, _, files in os.walk(root / PACKAGE, followlinks=True):
        if "README.md" in files:
            place = Path(folder).relative_to(root / PACKAGE).as_posix()
            found[Path(folder) / "README.md"] = f"reference/{place}.md"
    return dict(sorted(found.items()))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line, without its dot; "" where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"\.(?= [A-Z]|$)", first)[0]


def mirror(target: Path, root: Path = ROOT) -> None:
    """Copy the package's sources to `target`, every folder with an __init__.py.

    What reads docstrings passes over folders of a package that have none, as some of this package.
    """
    shutil.rmtree(target, ignore_errors=True)
    for name, path in modules(root).items():
        inner = path.name == "__init__.py"
        place = target.joinpath(*name.split("."))
        copy = place / "__init__.py" if inner else place.with_suffix(".py")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for folder in [target / PACKAGE, *(path for path in (target / PACKAGE).rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()


def places(root: Path = ROOT) -> dict[Path, str]:
    """Where the site has a file or a folder of the project, by its resolved path."""
    docs = root / "docs"
    files = (path for path in docs.rglob("*") if path.is_file())
    found = {path.resolve(): path.relative_to(docs).as_posix() for path in files}
    found |= {(root / name).resolve(): place for name, place in OTHER_PAGES.items()}
    found |= {path.resolve(): place for path, place in readmes(root).items()}
    found |= {path.resolve(): api_page(name) for name, path in modules(root).items()}
    found[(docs / "adr").resolve()] = "adr/index.md"
    return found


def api_page(module: str) -> str:
    return f"reference/api/{module}.md"


def relink(text: str, source: Path, page: str, known: dict[Path, str]) -> str:
    """The text of the file `source` for the site's page `page`: links lead to pages of the site.

    A link to a file that the site does not have, as the licence, becomes its text.
    `known` is what `places` returned.
    """

    def replace(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        place = known.get((source.parent / path).resolve())
        if place is None:
            return label
        link = os.path.relpath(place, Path(page).parent)
        return f"{image}[{label}]({link}{'#' + anchor if anchor else ''})"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)
