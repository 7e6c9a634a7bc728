"""One sentence a line: a change of a sentence is then a change of one line, and a review shows it."""

from __future__ import annotations

import re

from tools.docs.pages import Page

LONGEST = 160  # characters of a line, without targets of links

_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\([^)\s]*\)")
_SHORT = re.compile(r"\b(?:e\.g|i\.e|cf|vs|etc|approx|Fig|Sec|Eq|No|[A-Z])\.")  # dots that end no sentence
_NEXT = re.compile(r"[.!?][)\"”*_]*\s+[(\"“*_\[]*[A-Z`0-9]")


def prose_problems(page: Page) -> list[str]:
    """Lines of prose (no headings, tables and code) that are too long or have more than one sentence."""
    problems = []
    for text, line in page.prose:
        plain = _LINK.sub("]", text)
        if len(plain) > LONGEST:
            problems.append(page.at(line, f"{len(plain)} characters on a line, more than {LONGEST}"))
        elif sentences(text) > 1:
            problems.append(page.at(line, f"{sentences(text)} sentences on a line; write one a line"))
    return problems


def sentences(text: str) -> int:
    """How many sentences are on a line of Markdown. Dots in code, link targets, abbreviations end none."""
    plain = _SHORT.sub("x", _LINK.sub("]", _CODE.sub("`", text)))
    return 1 + len(_NEXT.findall(plain))
