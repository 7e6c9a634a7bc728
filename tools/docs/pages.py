"""A page of Markdown as the checks see it: code, links, headings and prose, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_PARSER = MarkdownIt("commonmark").enable("table")
_GENERATED = re.compile(r"^`python -m tools\.reference` writes this page", re.M)


@dataclass(frozen=True)
class Code:
    """Inline code or a code block: its text, its 1-based line, a block's language ("" if none is given)."""

    text: str
    line: int
    language: str = ""


@dataclass(frozen=True)
class Link:
    """The target of a link or an image, as it is written, and its 1-based line."""

    target: str
    line: int


@dataclass
class Page:
    """One page. `path` is absolute; `root` is the folder of the project, to which messages are relative."""

    path: Path
    root: Path = ROOT
    spans: list[Code] = field(default_factory=list)
    blocks: list[Code] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    headings: list[tuple[str, int]] = field(default_factory=list)
    prose: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.path.read_text(encoding="utf-8")
        self._lines = self.text.splitlines()
        heading, row = False, 0
        for token in _PARSER.parse(self.text):
            if token.type == "fence" or token.type == "code_block":
                first = token.map[0] + (2 if token.type == "fence" else 1) if token.map else 1
                self.blocks.append(Code(token.content, first, token.info.strip()))
            elif token.type in ("heading_open", "heading_close"):
                heading = token.type == "heading_open"
            elif token.type in ("tr_open", "tr_close"):
                row = token.map[0] + 1 if token.map and token.type == "tr_open" else 0
            elif token.type == "inline":
                self._take(token, heading, row)

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def generated(self) -> bool:
        return bool(_GENERATED.search(self.text))

    def at(self, line: int, problem: str) -> str:
        """A problem as it is printed."""
        return f"{self.name}:{line}: {problem}"

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may have after its #: a slug a heading, as on GitHub, and ids of HTML elements."""
        found = set(re.findall(r'<\w+ [^>]*\b(?:id|name)="([^"]+)"', self.text))
        for title, _ in self.headings:
            slug = base = slugify(title)
            count = 0
            while slug in found:
                count += 1
                slug = f"{base}-{count}"
            found.add(slug)
        return found

    def _take(self, token: Token, heading: bool, row: int) -> None:
        """Code, links and text of one inline token; `row`: the line of its row of a table, or 0."""
        begin, end = (token.map[0] + 1, token.map[1]) if token.map else (1, 1)
        if row:
            begin = end = row
        line = begin
        title = ""
        for child in token.children or ():
            if child.type == "code_inline":
                line = self._find(f"`{child.content}`", line, end)
                self.spans.append(Code(child.content, line))
                title += child.content
            elif child.type in ("link_open", "image"):
                target = str(child.attrs.get("href" if child.type == "link_open" else "src"))
                line = self._find(f"]({target}", line, end)
                self.links.append(Link(target, line))
            elif child.type == "text":
                title += child.content
        if heading:
            self.headings.append((title, begin))
        elif not row:
            self.prose += [(text, begin + offset) for offset, text in enumerate(token.content.splitlines())]

    def _find(self, text: str, line: int, end: int) -> int:
        """The first line from `line` to `end` that has `text`; `line` where none has it (it is wrapped)."""
        return next((n for n in range(line, end + 1) if text in self._lines[n - 1]), line)


def slugify(title: str) -> str:
    """A heading's anchor by GitHub's rule: lower case; letters, digits, - and _ stay, spaces become -."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def pages(root: Path = ROOT) -> Iterator[Page]:
    """Every page that is checked."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        yield Page(root / name, root)
    for path in sorted((root / "docs").rglob("*.md")):
        yield Page(path, root)
    for path in sorted((root / "kernels").glob("*/README.md")):
        yield Page(path, root)
    yield Page(root / "examples" / "README.md", root)
