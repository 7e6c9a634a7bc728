"""What a data folder holds: told at the end of a preparation, and compared with what a run's settings say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridtrain.data.manifest import Manifest
from hybridtrain.data.progress import say
from hybridtrain.data.sources import LeftOut, file_digest, list_files, summary
from hybridtrain.errors import DataError
from hybridtrain.settings import DataSettings


def report(manifest: Manifest, left_out: Sequence[LeftOut]) -> str:
    """Files, documents, bytes and tokens of a folder, and what of the sources was left out with why."""
    splits = (manifest.train, manifest.validation)
    lines = [
        f"read        {len(manifest.sources):,} files ({sum(s.size for s in manifest.sources):,} bytes), "
        f"{sum(s.documents for s in splits):,} documents, {sum(s.bytes for s in splits):,} bytes of text",
        *(
            f"{name:11} {split.documents:,} documents, {split.bytes:,} bytes of text, {split.tokens:,} tokens, "
            f"{len(split.shards):,} shards"
            for name, split in zip(("train", "validation"), splits, strict=True)
        ),
        f"vocabulary  {manifest.vocab_size:,} tokens; {manifest.separator!r} ({manifest.separator_id}) before each document",
    ]
    blank = manifest.left_out.get("blank lines", 0)
    left = [summary(left_out)] if left_out else []
    left += [f"{blank:,} blank lines"] if blank else []
    lines.append(f"left out    {'; '.join(left) or 'nothing'}")
    return "\n".join(lines)


def contradictions(data: DataSettings, manifest: Manifest) -> list[str]:
    """In what a finished folder is not what the settings say: sources, and settings that are not left at their defaults.

    Sources are compared by their sizes, as reading them takes as long as making the folder; where some are not there any more, that
    is said and the folder taken as it is.
    """
    made, default = manifest.settings, DataSettings()
    problems = []
    if data.separator and data.separator != manifest.separator:
        problems.append(f"data.separator={data.separator!r}, and the folder has {manifest.separator!r} before each document")
    if data.tokenizer and Path(data.tokenizer).is_file():
        if (digest := file_digest(Path(data.tokenizer))) != manifest.tokenizer_xxh3:
            problems.append(f"data.tokenizer={data.tokenizer} is another one (xxh3 {digest}, manifest {manifest.tokenizer_xxh3})")
    elif data.vocab_size != default.vocab_size and data.vocab_size != made.vocab_size:
        theirs = f"{made.vocab_size}" if made.vocab_size else f"a given tokenizer of {manifest.vocab_size} entries"
        problems.append(f"data.vocab_size={data.vocab_size}, and the folder was made with {theirs}")
    for key in ("text_field", "validation_fraction"):
        ours, theirs = getattr(data, key), getattr(made, key)
        if ours not in (getattr(default, key), theirs) and not (key == "validation_fraction" and data.validation):
            problems.append(f"data.{key}={ours}, and the folder was made with {theirs}")
    try:
        corpus, held_out, _ = list_files(data.source, data.validation)
        wanted = [
            (use, f.kind, f.path.stat().st_size) for use, files in (("corpus", corpus), ("validation", held_out)) for f in files
        ]
    except (DataError, OSError) as error:
        say(f"data.path={data.path} is used as it is; its sources are not there to be compared: {error}")
        return problems
    if wanted != [(s.use, s.kind, s.size) for s in manifest.sources]:
        theirs = f"{len(manifest.sources)} files of {sum(s.size for s in manifest.sources):,} bytes"
        ours = f"{len(wanted)} files of {sum(size for _, _, size in wanted):,} bytes"
        problems.append(f"data.source and data.validation are {ours}, and the folder was made of {theirs}, or of others")
    return problems
