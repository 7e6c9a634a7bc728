"""Relative links and their anchors exist."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from tools.docs.pages import Page


def link_problems(page: Page, known: dict[Path, Page]) -> list[str]:
    """Links of a page to files, folders and headings that do not exist.

    `known` has pages that were read already, by their resolved paths; pages that a link leads to are added.
    """
    problems = []
    known.setdefault(page.path.resolve(), page)
    for link in page.links:
        if "://" in link.target or link.target.startswith("mailto:"):
            continue
        path, _, anchor = unquote(link.target).partition("#")
        target = (page.path.parent / path).resolve() if path else page.path.resolve()
        if not target.exists():
            problems.append(page.at(link.line, f"link to {path}, which does not exist"))
        elif not target.is_relative_to(page.root):
            problems.append(page.at(link.line, f"link to {path}, which is outside of the project"))
        elif anchor and target.suffix == ".md":
            there = known.setdefault(target, known.get(target) or Page(target, page.root))
            if anchor not in there.anchors:
                problem = f"link to {link.target}: {there.name} has no heading #{anchor}"
                problems.append(page.at(link.line, problem))
    return problems
