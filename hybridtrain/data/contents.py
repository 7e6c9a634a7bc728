"""The contents of a data folder: reported at the end of a preparation, and compared with the settings of a
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridtrain.console import say
from hybridtrain.data.manifest import Manifest, PrepareSettings
from hybridtrain.data.sources import LeftOut, list_files, summary
from hybridtrain.errors import DataError
from hybridtrain.files.durable import file_digest
from hybridtrain.settings.tree import DataSettings


def report(manifest: Manifest, left_out: Sequence[LeftOut]) -> str:
    """Files, documents, bytes and tokens of a folder, and the sources that were left out, with the reason."""
    splits = (manifest.train, manifest.validation)
    lines = [
        f"read        {len(manifest.sources):,} files ({sum(s.size for s in manifest.sources):,} bytes), "
        f"{sum(s.documents for s in splits):,} documents, {sum(s.bytes for s in splits):,} bytes of text",
        *(
            f"{name:11} {split.documents:,} documents, {split.bytes:,} bytes of text, {split.tokens:,} "
            f"tokens, {len(split.shards):,} shards"
            for name, split in zip(("train", "validation"), splits, strict=True)
        ),
        f"vocabulary  {manifest.vocab_size:,} tokens; {manifest.separator!r} ({manifest.separator_id}) "
        "before each document",
    ]
    blank = manifest.left_out.get("blank lines", 0)
    left = [summary(left_out)] if left_out else []
    left += [f"{blank:,} blank lines"] if blank else []
    lines.append(f"left out    {'; '.join(left) or 'nothing'}")
    return "\n".join(lines)


def compare(data: DataSettings, manifest: Manifest) -> None:
    """Compare a finished folder with the settings.

    Raises DataError where it has another tokenizer or separator than they name. Other differences are only
    printed, unless the setting has its default: the folder may have been made by hand.
    """
    problems = []
    if data.separator and data.separator != manifest.separator:
        problems.append(
            f"data.separator={data.separator!r}, and the folder has {manifest.separator!r} before each "
            "document"
        )
    given = Path(data.tokenizer)
    if data.tokenizer and given.is_file() and (digest := file_digest(given)) != manifest.tokenizer_xxh3:
        problems.append(
            f"data.tokenizer={given} is another one (xxh3 {digest}, the folder's {manifest.tokenizer_xxh3})"
        )
    if problems:
        listed = [
            f"  {problem}"
            for problem in [*problems, "choose another data.path, or set them to what it was made with"]
        ]
        raise DataError(
            "\n".join([f"data.path={data.path} was made with other settings than those of the run", *listed])
        )
    if others := [*_other_settings(data, manifest.settings), *_other_sources(data, manifest)]:
        say(
            f"data.path={data.path} is used as it is; it was made with other settings than those of the run: "
            f"{'; '.join(others)}"
        )


def _other_settings(data: DataSettings, made: PrepareSettings) -> list[str]:
    out = []
    for key in ("vocab_size", "text_field", "validation_fraction"):
        ours, theirs, default = getattr(data, key), getattr(made, key), DataSettings.model_fields[key].default
        unused = (key == "vocab_size" and data.tokenizer) or (
            key == "validation_fraction" and data.validation
        )
        if ours not in (default, theirs) and not unused:
            out.append(f"data.{key} is {ours}, and was {theirs}")
    return out


def _other_sources(data: DataSettings, manifest: Manifest) -> list[str]:
    """Compares sizes: reading the texts takes as long as making the folder."""
    try:
        corpus, held_out, _ = list_files(data.source, data.validation)
        ours = [
            (use, f.kind, f.path.stat().st_size)
            for use, files in (("corpus", corpus), ("validation", held_out))
            for f in files
        ]
    except (DataError, OSError) as error:
        return [f"its sources cannot be compared: {' '.join(str(error).split())}"]
    theirs = [(s.use, s.kind, s.size) for s in manifest.sources]
    if ours == theirs:
        return []
    counts = [
        f"{len(files)} files of {sum(size for _, _, size in files):,} bytes" for files in (ours, theirs)
    ]
    return [f"data.source is {counts[0]}, and was {counts[1]}"]
