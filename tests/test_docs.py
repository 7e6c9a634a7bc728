"""The pages that people read name what exists, link to what exists, and the generated ones are current."""

from __future__ import annotations

import pytest
import yaml

from tools.docs.links import link_problems
from tools.docs.names import checked_lines, name_problems
from tools.docs.pages import ROOT, Page, pages
from tools.docs.prose import prose_problems
from tools.reference.__main__ import FOLDER, stale
from tools.reference.tree import OTHER_PAGES

PAGES = list(pages())
# Pages with one sentence a line. A page that is rewritten so is added here and stays so.
ONE_SENTENCE_A_LINE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "docs/adr/0001-lagged-load.md",
    "docs/adr/0002-one-packed-table.md",
    "docs/adr/0003-muon.md",
    "docs/adr/0004-forkserver-launch.md",
    "docs/adr/0005-rows-ahead.md",
    "docs/adr/0006-replayed-exchanges.md",
    "docs/adr/0007-capacity-per-sequence.md",
    "docs/adr/0008-narrow-rows.md",
    "docs/adr/0009-links-of-the-package.md",
    "docs/adr/0010-saves-beside-training.md",
    "docs/adr/0011-rollback-goes-past-the-data.md",
    "docs/adr/0012-mesh-on-paper.md",
    "docs/adr/0013-position-of-the-data.md",
    "docs/adr/0014-streams-across-stages.md",
    "docs/adr/0015-components-are-declared-once.md",
    "docs/architecture.md",
    "docs/checkpoints.md",
    "docs/data.md",
    "docs/deepspeed.md",
    "docs/formats.md",
    "docs/kernels.md",
    "docs/table.md",
    "docs/parallelism.md",
    "docs/performance.md",
    "docs/reference/commands.md",
    "docs/reference/settings.md",
    "docs/reliability.md",
    "docs/resharding.md",
    "docs/scaling.md",
    "docs/security.md",
    "examples/README.md",
    *(f"kernels/{path.parent.name}/README.md" for path in sorted((ROOT / "kernels").glob("*/README.md"))),
)


def test_links_and_anchors_exist() -> None:
    known = {page.path.resolve(): page for page in PAGES}
    problems = [problem for page in PAGES for problem in link_problems(page, known)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Page) -> None:
    problems = name_problems(page)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", ONE_SENTENCE_A_LINE)
def test_one_sentence_a_line(name: str) -> None:
    problems = prose_problems(Page(ROOT / name))
    assert not problems, "\n".join(problems)


def test_generated_pages_are_current() -> None:
    assert not stale(FOLDER), "run: python -m tools.reference"


def test_every_page_is_in_the_navigation() -> None:
    listed = _targets(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    # the site lists decisions by itself
    missing = {name for name in there - listed if not name.startswith("adr/")}
    assert not missing, f"mkdocs.yml: nav lacks {sorted(missing)}"
    gone = listed - there - {*OTHER_PAGES.values(), "adr/index.md"}
    assert not gone, f"mkdocs.yml: nav has {sorted(gone)}, which do not exist"


def test_the_pages_are_many_and_have_what_is_checked() -> None:
    assert len(PAGES) > 25
    assert sum(len(page.links) for page in PAGES) > 80
    assert sum(len(page.spans) for page in PAGES) > 1000
    changelog = next(page for page in PAGES if page.name == "CHANGELOG.md")
    assert any(span.line in checked_lines(changelog) for span in changelog.spans)


def _targets(nav: object) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return set().union(*map(_targets, parts))
