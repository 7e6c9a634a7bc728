"""Make the shipped corpus `sotu-sentences` from `sotu`: the sentences of its first addresses, each a document
of its own.

    python -m tools.split_corpus

Its documents are so short (60 tokens in the mean, with a vocabulary of 1024) that most sequences of
configs/ci.toml have a border in them, and a layout that takes borders wrong computes another loss there.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "hybridtrain" / "data" / "corpus"
ADDRESSES = 25
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")


def sentences() -> Iterator[dict[str, str]]:
    """The lines of the corpus: after each of . ! ? ; : and white space a new document begins; the white space
    is left out.
    """
    with lzma.open(CORPUS / "sotu.jsonl.xz", "rt", encoding="utf-8") as lines:
        for _ in range(ADDRESSES):
            address = json.loads(next(lines))
            for number, text in enumerate(SENTENCE_END.split(address["text"].strip())):
                yield {"id": f"{address['id']}-{number}", "text": text}


def main() -> None:
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sentences()).encode()
    (CORPUS / "sotu-sentences.jsonl.xz").write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
