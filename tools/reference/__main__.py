"""Write the pages of docs/reference anew: `python -m tools.reference [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tools.reference import commands, settings

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
PAGES: dict[str, Callable[[], str]] = {"commands.md": commands.page, "settings.md": settings.page}


def stale(folder: Path) -> list[str]:
    """Names of the generated pages that `folder` lacks or that are not what would be written."""
    return [name for name, page in PAGES.items() if not _holds(folder / name, page())]


def write(folder: Path) -> list[str]:
    """Write every page that is not current; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = stale(folder)
    for name in names:
        (folder / name).write_text(PAGES[name](), encoding="utf-8")
    return names


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not current")
    if parser.parse_args().check:
        if names := stale(FOLDER):
            print(f"not current: {', '.join(names)}; run: python -m tools.reference", file=sys.stderr)
            raise SystemExit(1)
        return
    print(f"written: {', '.join(write(FOLDER)) or 'nothing, all pages are current'}")


if __name__ == "__main__":
    main()
