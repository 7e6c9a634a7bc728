"""Print what the pages name and does not exist: `python -m tools.docs [--prose] [PAGE ...]`.

Exit status 1 where there is something.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tools.docs.links import link_problems
from tools.docs.names import name_problems
from tools.docs.pages import Page, pages
from tools.docs.prose import prose_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="pages; all if none is given")
    parser.add_argument("--prose", action="store_true", help="also long lines, and several sentences a line")
    parser.add_argument("--count", action="store_true", help="print how many a page has instead of each")
    arguments = parser.parse_args()
    chosen = [Page(path.resolve()) for path in arguments.pages] or list(pages())
    known: dict[Path, Page] = {}
    problems = []
    for page in chosen:
        problems += link_problems(page, known) + name_problems(page)
        if arguments.prose and not page.generated:
            problems += prose_problems(page)
    if arguments.count:
        counts = Counter(problem.partition(":")[0] for problem in problems)
        print("\n".join(f"{count:5d}  {name}" for name, count in counts.most_common()))
    else:
        print("\n".join(problems))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
