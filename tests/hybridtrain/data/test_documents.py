"""Documents in every form that a source file may have, in bounded memory; damage is refused with its
place.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.data import documents as documents_module
from hybridtrain.data.documents import Tally, read_pieces, split_text
from hybridtrain.data.sources import list_files
from hybridtrain.data.tokenizer import train_tokenizer
from hybridtrain.errors import DataError
from tools.split_corpus import sentences

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".bz2": bz2.compress,
}


def documents(source: Path | str, text_field: str = "text") -> list[str]:
    """The whole documents behind one source."""
    texts: list[str] = []
    for file in list_files([source])[0]:
        for piece in read_pieces(file, text_field):
            if piece.first:
                texts.append("")
            texts[-1] += piece.text
    return texts


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_form_gives_its_documents(tmp_path: Path, compression: str) -> None:
    pack = COMPRESS[compression]
    lines = (
        "".join(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in ("one\r\n", "zw\u00f6lf")) + "\n"
    )
    (tmp_path / f"a.txt{compression}").write_bytes(pack(b"a text,\r\nwhole\n"))
    (tmp_path / f"b.jsonl{compression}").write_bytes(pack(b"\xef\xbb\xbf" + lines.encode()))
    (tmp_path / f"c.ndjson{compression}").write_bytes(pack(lines.rstrip("\n").encode()))
    assert documents(tmp_path / f"a.txt{compression}") == ["a text,\r\nwhole\n"]
    assert documents(tmp_path / f"b.jsonl{compression}") == ["one\r\n", "zw\u00f6lf"]
    assert documents(tmp_path / f"c.ndjson{compression}", "body") == ["ONE\r\n", "ZW\u00d6LF"]


def test_the_shipped_sentences_are_those_of_the_shipped_addresses() -> None:
    assert documents("shipped:sotu-sentences") == [line["text"] for line in sentences()]


LINE = b'{"text": "fine"}\n'
BAD_FILES = [
    ("a.txt", b"ab\xffcd", "a.txt: is not UTF-8 at byte 2 (0xff: invalid start byte)"),
    (
        "a.txt",
        b"x" * (1 << 20) + b"\xc3",
        "a.txt: is not UTF-8 at byte 1048576 (0xc3: unexpected end of data)",
    ),
    ("a.txt", "ä".encode() * 600_000 + b"\x80", "a.txt: is not UTF-8 at byte 1200000 (0x80"),
    ("a.txt", b" \n\t", "a.txt: has no text, only white space"),
    ("a.txt.gz", gzip.compress(b""), "a.txt.gz: is empty (0 bytes of text)"),
    ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be read beyond byte 0 of its text: Not a gzipped file"),
    ("a.jsonl", LINE + b'{"text": "\xe4"}\n', "a.jsonl: is not UTF-8 at byte 27 (0xe4"),
    (
        "a.jsonl",
        LINE + '{"text": "ä" oops}\n'.encode(),
        "a.jsonl:2: is not JSON at byte 31: Expecting ',' delimiter",
    ),
    ("a.jsonl", LINE + LINE + b'{"text": "cut', "a.jsonl:3: is not JSON at byte 43: Unterminated string"),
    ("a.jsonl", LINE + b'["text"]\n', "a.jsonl:2: (byte 17) is a JSON list, not an object"),
    (
        "a.jsonl",
        LINE + b'{"body": "x"}\n',
        "a.jsonl:2: (byte 17) has no field 'text'; its fields are 'body' (--text-field)",
    ),
    ("a.jsonl", LINE + b'{"text": " "}\n', "a.jsonl:2: (byte 17) field 'text' is empty"),
    ("a.jsonl", b'\n{"text": 3}\n', "a.jsonl:2: (byte 1) field 'text' is not a string"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: (byte 0) field 'text' has the lone surrogate \\ud800"),
    ("a.jsonl", b'{"text": "a", "id": 1, "text": "b"}\n', "a.jsonl:1: (byte 0) has the field 'text' twice"),
    (
        "a.jsonl",
        LINE + b'{"text": ' + b"[" * 100_000 + b"\n",
        "a.jsonl:2: (byte 17) is nested too deeply to be read",
    ),
    (
        "a.jsonl",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
        "a.jsonl:1: (byte 0) cannot be read: Exceeds the limit",
    ),
    ("a.jsonl", b"\n\n", "a.jsonl: has no documents, only blank lines"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[m for _, _, m in BAD_FILES])
def test_bad_contents_are_refused_with_their_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        documents(tmp_path / name)


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n \n\r\n{"text": "b"}\n\n')
    tally = Tally()
    assert len(list(read_pieces(list_files([tmp_path])[0][0], tally=tally))) == 2
    assert tally.blank_lines == 4


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".bz2"])
def test_a_line_that_unpacks_to_too_much_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / f"bomb.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](LINE + b'{"text": "' + b"a" * (24 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError,
            match=rf"bomb.jsonl{compression}:2: is longer than 1,048,576 bytes, the most that a line may",
        ):
            documents(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # of which xz has a dictionary of 8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [".xz", ".bz2"])
def test_what_follows_a_compressed_stream_is_read_or_refused(tmp_path: Path, compression: str) -> None:
    path, pack = tmp_path / f"a.txt{compression}", COMPRESS[compression]
    path.write_bytes(pack(b"one ") + pack(b"two"))
    assert documents(path) == ["one two"]
    damaged = bytearray(pack(b"two"))
    damaged[0] ^= 1
    path.write_bytes(pack(b"one ") + damaged)
    with pytest.raises(DataError, match="cannot be read beyond byte 4 of its text"):
        documents(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2"])
def test_cut_compressed_files_are_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"cut.txt{compression}"
    whole = COMPRESS[compression](str(list(range(500_000))).encode())
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(
        DataError,
        match=rf"cut.txt{compression}: the {compression} stream is truncated; its text ends at byte [1-9]\d+",
    ):
        documents(path)


@pytest.mark.parametrize(
    "words", ["It's 1,234  words —  and\n\n\tspaces 世界, naïve! ", "word" + " " * 30 + "and (word)!\n\n  "]
)
def test_pieces_encode_as_the_whole_text(words: str) -> None:
    text = words * 2000
    tokenizer = train_tokenizer([text], 400)
    pieces = list(split_text(text, 1000))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert len(pieces) > 50
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["x" * 5000, " " * 5000, "", "世" * 2500, "ab " * 1000])
def test_pieces_are_bounded_for_any_text(text: str) -> None:
    pieces = list(split_text(text, 100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert text == "" or all(pieces)


def test_memory_does_not_grow_with_a_text_file(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (8, 32):
        path = tmp_path / "huge.txt"
        path.write_bytes(b"some words of text " * (megabytes * 1_000_000 // 19))
        tracemalloc.start()
        try:
            assert (
                sum(len(piece.text) for piece in read_pieces(list_files([path])[0][0])) == path.stat().st_size
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 8_000_000
    assert peaks[1] < 1.2 * peaks[0]
