"""From a run's checkpoint to a run folder whose one checkpoint is laid out for the ranks of another
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from hybridtrain import __version__, checkpoint
from hybridtrain.checkpoint.files import Records, Writer
from hybridtrain.checkpoint.history import LATEST, folder_of, staging_of
from hybridtrain.checkpoint.storage import flush_folder, free_space, make_folder, write_whole
from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.data.compress import to_npy
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.errors import CheckpointError, DamagedCheckpoint
from hybridtrain.files.lock import locked
from hybridtrain.monitor.metrics import METRICS
from hybridtrain.parallel.collectives import Group
from hybridtrain.reshard.copy import Copy, CopyOptions, plan_segments, plan_threads
from hybridtrain.reshard.digest import digest_of
from hybridtrain.reshard.journal import Journal
from hybridtrain.reshard.placement import place_model
from hybridtrain.reshard.progress import CopyProgress
from hybridtrain.reshard.source import Source, grown_shapes
from hybridtrain.reshard.target import Growth, Target, plan_target
from hybridtrain.reshard.tokens import NewTokenizer, take_tokenizer
from hybridtrain.run.init_from import ORIGIN, VOCABULARY, check_tensors, copy_companions, model_tensors
from hybridtrain.run.run_folder import ADDRESSING, CHECKPOINTS, SETTINGS, find_checkpoint
from hybridtrain.settings.load import dump_settings, parse_settings
from hybridtrain.settings.tree import VerifyLevel

ALONE = Group("world", (0,), 0)
NO_GROWTH = Growth()
DEFAULT_COPYING = CopyOptions()


@dataclass(frozen=True)
class Outcome:
    """What was written: logical tensors and their bytes, for the ranks of a layout."""

    tensors: int
    bytes: int
    ranks: int
    layout: str


def reshard(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    growth: Growth = NO_GROWTH,
    copying: CopyOptions = DEFAULT_COPYING,
) -> Outcome:
    """Write the run folder or checkpoint `path` as the run folder `out`, for `nproc` ranks of its settings
    with `overrides`.

    Every rank's part of every tensor is a chunk of a file of its own. A reshard that was ended goes on when
    it is called again. Raises LayoutError or UserError where the target is impossible or is another model,
    DamagedCheckpoint where files differ from what was written, CheckpointError where `out` cannot be written.
    """
    run, saved = find_checkpoint(path)
    opened = checkpoint.Saved(saved)
    info = opened.info
    target = plan_target(info, out, overrides, nproc, growth)
    tokenizer = take_tokenizer(growth.tokenizer, run, info, target) if growth.tokenizer is not None else None
    source = _source(opened, target, growth)
    threads = plan_threads(source, copying.max_memory)
    segments = plan_segments(source, target.layout.world)
    verified = _verify_beside(opened, target.settings.checkpoint.verify)
    placement = place_model(target.settings, target.layout, target.vocab_size)
    boxes = {name: placement.boxes(name, shape) for name, shape in source.shapes.items()}
    sizes = [
        sum(source.num_bytes(span.name, span.low, span.high) for span in segment) for segment in segments
    ]
    outcome = Outcome(len(source.shapes), sum(sizes), target.layout.world, target.layout.describe())
    final = folder_of(out / CHECKPOINTS, info["step"])
    staging = staging_of(final)
    job = _job(info, target, growth, tokenizer)
    with locked(out), Journal(out, job) as journal:
        try:
            if (final / checkpoint.INFO).is_file():  # ended behind the commit
                write_whole(final.parent / LATEST, final.name.encode())
                journal.remove()
                return outcome
            _begin(staging, journal)
            with CopyProgress(sum(sizes), sum(sizes[: len(journal.done)]), copying.show) as progress:
                Copy(source, boxes, segments, staging, progress.advance).run(journal, threads, verified)
            digests = _digests(source, journal)
            _compare(saved, info, digests, source)
            files = _write_index(staging, source, journal)
            _write_companions(run, out, target, tokenizer)
            said = _describe(info, target, tokenizer) | {"files": files, "tensors": digests}
            checkpoint.commit_folder(staging, final, said)
            journal.remove()
        except OSError as error:
            where = f"{error.filename or out}: cannot be written{free_space(out)}: {error.strerror}"
            raise CheckpointError(f"{where}; call it again to go on") from None
    return outcome


def _job(
    info: dict[str, Any], target: Target, growth: Growth, tokenizer: NewTokenizer | None
) -> dict[str, Any]:
    """The job as the journal has it: a reshard that was ended goes on only where its job is the same."""
    return {
        "source": info["xxh3"],
        "settings": target.settings.model_dump(mode="json"),
        "ranks": target.layout.world,
        "growth": [
            growth.experts,
            growth.vocab,
            growth.router_noise,
            tokenizer.digest if tokenizer is not None else None,
        ],
        "version": __version__,
    }


def _source(saved: checkpoint.Saved, target: Target, growth: Growth) -> Source:
    """The checkpoint's tensors as the target has them; CheckpointError where they are not those of its
    settings.
    """
    info = saved.info
    stored, own = StoredTensors(saved), parse_settings(info["settings"], source=str(saved.path))
    check_tensors(stored, own, info)
    before, after = (
        {name: tuple(value.shape) for name, value in model_tensors(settings, vocab_size).items()}
        for settings, vocab_size in (
            (own, info["vocab_size"]),
            (target.settings, target.vocab_size),
        )
    )
    settings = target.settings
    softmax = settings.model.moe.score == "softmax"
    return Source(
        stored, grown_shapes(stored.shapes, before, after), growth.router_noise, settings.run.seed, softmax
    )


def _verify_beside(saved: checkpoint.Saved, level: VerifyLevel) -> Future[None]:
    """Compare the files of a checkpoint with their checksums, in a thread that does not keep the process from
    ending.
    """
    done: Future[None] = Future()

    def verify() -> None:
        try:
            checkpoint.verify(saved, level, ALONE)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    Thread(target=verify, name="verify", daemon=True).start()
    return done


def _begin(staging: Path, journal: Journal) -> None:
    """Make the folder ready to go on: files of finished segments stay, all others are removed."""
    make_folder(staging)
    done = {name: record for segment in journal.done for name, record in segment.files.items()}
    for name, record in done.items():
        file = staging / name
        if not file.is_file() or file.stat().st_size != record["size"]:
            raise DamagedCheckpoint(
                f"{file}: is missing or has another size than in {journal.path}; remove "
                f"{journal.path.parent} and start anew"
            )
    for file in staging.iterdir():
        if file.name not in done:
            file.unlink()


def _digests(source: Source, journal: Journal) -> dict[str, str]:
    blocks: dict[str, bytearray] = {name: bytearray() for name in source.shapes}
    for segment in journal.done:
        for name, some in segment.blocks.items():
            blocks[name] += some
    return {name: digest_of(bytes(all_of_it)) for name, all_of_it in blocks.items()}


def _compare(saved: Path, info: dict[str, Any], digests: dict[str, str], source: Source) -> None:
    """Raise DamagedCheckpoint where a tensor that did not grow has another digest than in its checkpoint."""
    theirs = info.get("tensors", {})
    if others := [name for name in theirs if name not in source.changed and theirs[name] != digests[name]]:
        raise DamagedCheckpoint(
            "\n".join(
                [
                    f"{saved}: these tensors have other xxh3s than when they were written",
                    *(f"  {n}" for n in others),
                ]
            )
        )


def _write_index(staging: Path, source: Source, journal: Journal) -> Records:
    """Write torch's index of all chunks; returns the records of all files."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in source.shapes}
    results = []
    for chunk in (chunk for segment in journal.done for chunk in segment.chunks):
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        chunks[chunk.name].append(ChunkStorageMetadata(offsets, sizes))
        results.append(WriteResult(MetadataIndex(chunk.name, chunk.offsets), chunk.length, chunk.place))
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(source.dtype(name)), torch.Size(source.shapes[name]), parts
        )
        for name, parts in chunks.items()
    }
    writer = Writer(staging)
    writer.finish(Metadata(dict(tensors), planner_data={name: (name,) for name in tensors}), [results])
    flush_folder(staging)
    return {
        name: record for segment in journal.done for name, record in segment.files.items()
    } | writer.records


def _describe(info: dict[str, Any], target: Target, tokenizer: NewTokenizer | None) -> dict[str, Any]:
    """The description of the new checkpoint: that of the old one, without the place of its parts, and with
    its own tokenizer.
    """
    gone = ("xxh3", "files", "base", "tensors")
    tokens: dict[str, Any] = {}
    if tokenizer is not None:
        tokens = {"tokenizer_digest": tokenizer.digest, "addressing": tokenizer.addressing}
        if "guard" in info:
            tokens["guard"] = info["guard"] | {"losses": []}  # losses a token, of other tokens
    kept = {key: value for key, value in info.items() if key not in gone}
    if not info.get("weights_only"):  # what older checkpoints leave to settings that may change here
        kept["data"] = checkpoint.Consumed.of(info).model_dump()
    if info["table_scalars"]:
        kept["table_scalars"] = checkpoint.row_scalars(info)
    return (
        kept
        | tokens
        | {
            "version": __version__,
            "torch": torch.__version__,
            "layout": target.layout.describe(),
            "identity": checkpoint.identity(target.settings),
            "vocab_size": target.vocab_size,
            "settings": target.settings.model_dump(mode="json"),
        }
    )


def _write_companions(run: Path, out: Path, target: Target, tokenizer: NewTokenizer | None) -> None:
    """Write the files that belong to a run beside its checkpoints, its curve included."""
    copy_companions(run, out, TOKENIZER, COMPRESSION, ADDRESSING, METRICS, ORIGIN)
    if tokenizer is not None:
        for name in VOCABULARY:  # of the old tokenizer
            (out / name).unlink(missing_ok=True)
        (out / TOKENIZER).write_bytes(tokenizer.content)
        (out / COMPRESSION).write_bytes(to_npy(tokenizer.compression))
        if tokenizer.addressing is not None:
            (out / ADDRESSING).write_text(tokenizer.addressing, encoding="utf-8")
    (out / SETTINGS).write_text(dump_settings(target.settings), encoding="utf-8")
    flush_folder(out)
