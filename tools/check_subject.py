"""Check a commit message: `python tools/check_subject.py FILE`, as git's commit-msg hook calls it."""

from __future__ import annotations

import sys
from pathlib import Path

LONGEST = 72  # characters of a subject: `git log --oneline` shows it whole in 80 columns
# git drops all from here on (commit --verbose)
_SCISSORS = "# ------------------------ >8 ------------------------"


def problems(message: str) -> list[str]:
    """What is wrong with a message, comments of git left out; an empty list where nothing is."""
    text = message.partition(_SCISSORS)[0]
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        del lines[0]
    if not lines:
        return ["the message has no subject"]
    subject = lines[0]
    found = []
    if len(subject) > LONGEST:
        found.append(f"the subject has {len(subject)} characters, at most {LONGEST} are legal")
    if len(lines) > 1 and lines[1]:
        found.append("line 2 is not empty; an empty line parts subject and body")
    return found


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python tools/check_subject.py FILE", file=sys.stderr)
        raise SystemExit(2)
    found = problems(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
