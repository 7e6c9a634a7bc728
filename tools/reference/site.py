"""Hooks of mkdocs, which mkdocs.yml names: pages that do not lie in docs/, and a page for each module."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from tools.reference import tree

MIRROR = tree.ROOT / "build" / "reference"  # mkdocs.yml: paths of mkdocstrings
_KNOWN = tree.places()
_SOURCES = {place: path for path, place in _KNOWN.items()}


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors by GitHub's rule, so that links work in both; what mkdocstrings reads; more navigation."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    tree.mirror(MIRROR)
    for entry in config.nav or []:
        for title, parts in entry.items():
            if title == "Decisions":
                parts += [f"adr/{path.name}" for path in sorted((tree.ROOT / "docs" / "adr").glob("0*.md"))]
            elif title == "Reference":
                parts.append({"Kernels": [{_title(place): place} for place in tree.readmes().values()]})
                parts.append({"Modules": ["reference/api/index.md", *_modules()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {place: (tree.ROOT / name).read_text(encoding="utf-8") for name, place in tree.OTHER_PAGES.items()}
    made |= {place: path.read_text(encoding="utf-8") for path, place in tree.readmes().items()}
    made |= {tree.api_page(name): f"# {name}\n\n::: {name}\n" for name in tree.modules()}
    made["reference/api/index.md"] = _index()
    made["adr/index.md"] = "# Decisions\n\nEach page has a decision with its context and its consequences.\n"
    for place, text in made.items():
        if files.get_file_from_path(place) is None:  # docs/ may have a page of its own there
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of a page to files of the project lead to where the site has them."""
    source = _SOURCES.get(page.file.src_uri)
    if source is None or source.suffix != ".md":
        return markdown
    return tree.relink(markdown, source, page.file.src_uri, _KNOWN)


def _title(place: str) -> str:
    return place.rpartition("/")[2].removesuffix(".md")


def _modules() -> list[Any]:
    """The navigation of the modules: those at the top, then a list a package."""
    top: list[Any] = []
    packages: dict[str, list[Any]] = {}
    for name in tree.modules():
        first, _, rest = name.removeprefix(f"{tree.PACKAGE}.").partition(".")
        inside = rest or any(other.startswith(f"{tree.PACKAGE}.{first}.") for other in tree.modules())
        (packages.setdefault(first, []) if inside else top).append({rest or first: tree.api_page(name)})
    return [*top, *({package: pages} for package, pages in packages.items())]


def _index() -> str:
    """A table of the modules, each with what its first sentence says."""
    text = "# Modules\n\nFrom the docstrings of the code.\n\n| module | |\n|---|---|\n"
    for name, path in tree.modules().items():
        text += f"| [{name}]({name}.md) | {tree.summary(path).replace('|', '&#124;')} |\n"
    return text
