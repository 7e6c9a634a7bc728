"""A run's folder: settings.toml, tokenizer, addressing, checkpoints. What belongs to a run is found there
again.

settings.toml     every setting, resolved        metrics.jsonl, tensorboard/   written by metrics.py
tokenizer.json    copies from the data folder,   checkpoints/step-…, latest    written by checkpoint.py
compression.npy   so that the run stands alone   summary.json                  written at the end
addressing.json   multipliers and primes

The checkpoints are elsewhere where `checkpoint.dir` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridtrain import checkpoint
from hybridtrain.console import say
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import CheckpointError, DamagedCheckpoint, DataError, SettingsError
from hybridtrain.files.durable import file_digest, write_atomically
from hybridtrain.files.lock import NAME, POLL, Attempt, FolderInUse, FolderLock, in_use, waiting
from hybridtrain.files.untrusted import UntrustedFileError, read_toml
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.parallel.collectives import Group, barrier, gather_objects
from hybridtrain.run.assemble import Run, Vocabulary
from hybridtrain.settings.load import dump_settings, parse_settings
from hybridtrain.settings.tree import Settings

SETTINGS, ADDRESSING, SUMMARY = "settings.toml", "addressing.json", "summary.json"
CHECKPOINTS = "checkpoints"


class RunLocks:
    """What a run writes to, held by its rank 0 against other runs: `run.dir`, and `checkpoint.dir` where that
    is elsewhere.
    """

    def __init__(self, settings: Settings, world: Group) -> None:
        self._settings, self._world = settings, world
        self._locks: dict[str, FolderLock] = {}

    def take(self) -> None:
        """Take them all. Raises FolderInUse on every rank where another process holds one, or one cannot be
        written.

        Whether a holder lives is asked on every rank: one of them may be on its host.
        """
        self._locks = {name: FolderLock(file) for name, file in self._files().items()}
        for name, lock in self._locks.items():
            dead, told = "", False
            while True:
                outcome = gather_objects(
                    _attempt(lock, name, dead) if self._world.rank == 0 else None, self._world
                )[0]
                if isinstance(outcome, str):
                    raise FolderInUse(outcome)
                if outcome.taken:
                    break
                gone = outcome.holder is not None and outcome.holder.lives() is False
                if any(gather_objects(gone, self._world)):
                    dead = outcome.holder.token
                    continue
                if outcome.lives:
                    raise FolderInUse(in_use(name, outcome.holder))
                if self._world.rank == 0 and not told and outcome.holder is not None:
                    say(waiting(name, outcome))
                    told = True
                time.sleep(POLL)

    def confirm(self, at_once: bool = False) -> None:
        """Raise LockLost, on rank 0 alone, where another process has taken one of them; see FolderLock."""
        if self._world.rank == 0:
            for lock in self._locks.values():
                lock.confirm(at_once)

    def release(self) -> None:
        for lock in self._locks.values():
            lock.release()

    def _files(self) -> dict[str, Path]:
        """The locks' files by what they are told as."""
        run, where = Path(self._settings.run.dir), self._settings.checkpoint.dir
        files = {f"run.dir={run}": run / NAME}
        there = checkpoint.open_storage(where) if where else run / CHECKPOINTS
        if isinstance(there, Path):
            there = there.resolve()  # a link may lead to another run's, or both runs' links to one folder
        told = f"checkpoint.dir={where}" if where else f"{run / CHECKPOINTS}, a link to {there},"
        ours = there == run.resolve() / CHECKPOINTS
        if ours or (
            there.name == CHECKPOINTS and any((there.parent / name).is_file() for name in (SETTINGS, NAME))
        ):
            there = there.parent  # a run holds its folder, and so its own checkpoints
        if there != run.resolve():
            files[told] = there / NAME
        return files


def _attempt(lock: FolderLock, name: str, dead: str) -> Attempt | str:
    try:
        return lock.attempt(dead)
    except OSError as error:
        return f"{name}: cannot be written: {error.strerror or error}"


class RunFolder:
    """The folder `run.dir` of this run."""

    def __init__(self, path: Path, world: Group, checkpoints: str = "") -> None:
        self.path, self.world = path, world
        self.checkpoints = checkpoint.open_storage(checkpoints) if checkpoints else path / CHECKPOINTS
        self.base: checkpoint.Base | None = None  # of the checkpoint that the run was restored from
        self.restored = path  # that checkpoint
        self.confirm: Callable[..., None] = lambda *_: (
            None
        )  # that the folders are still this run's: see RunLocks

    @classmethod
    def of(cls, settings: Settings, world: Group) -> RunFolder:
        """The folder as it is, new or old."""
        return cls(Path(settings.run.dir), world, settings.checkpoint.dir)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from, damaged or not."""
        return bool(checkpoint.candidates(self.checkpoints))

    @classmethod
    def open(cls, settings: Settings, world: Group, resume: bool) -> RunFolder:
        """A new run's folder, or with `resume` an old one's.

        Raises SettingsError where a new run would overwrite an old one's checkpoints, CheckpointError where
        there is none to resume.
        """
        folder = cls.of(settings, world)
        last = next(iter(checkpoint.candidates(folder.checkpoints)), None)
        barrier(world)  # every rank has looked before rank 0 writes
        if resume and last is None:
            raise CheckpointError(
                f"{folder.checkpoints}: no finished checkpoint to resume from; start without --resume"
            )
        if not resume and last is not None:
            key, where = (
                ("checkpoint.dir", folder.checkpoints)
                if settings.checkpoint.dir
                else ("run.dir", folder.path)
            )
            raise SettingsError(
                f"{key}={where}",
                [f"holds a run with the checkpoint {last.name}; go on with --resume or choose another {key}"],
            )
        if world.rank == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                folder._write_settings(settings)
        return folder

    def prepare_data(self, settings: Settings) -> tuple[Vocabulary, TokenDataset]:
        """Make the data folder where it is missing, open it, and copy the tokenizer here.

        Raises DataError for damaged shards, or where a resumed run's tokenizer is another than the data's.
        """
        if self.world.rank == 0:
            ensure_prepared(settings.data)
        barrier(self.world)
        dataset = TokenDataset.open(settings.data.path, verify=settings.data.verify and self.world.rank == 0)
        ours = self.path / TOKENIZER
        if (
            ours.is_file()
            and file_digest(ours) != dataset.manifest.tokenizer_xxh3
            and checkpoint.candidates(self.checkpoints)
        ):
            raise DataError(
                f"{dataset.tokenizer_path} is another tokenizer than the one this run was trained with, "
                f"{ours}"
            )
        barrier(self.world)
        if self.world.rank == 0:
            if not dataset.manifest.validation.tokens:
                say(f"note: data.path={dataset.folder} holds nothing out: this run is not validated")
            for name in (TOKENIZER, COMPRESSION):
                write_atomically(self.path / name, (dataset.folder / name).read_bytes())
        return Vocabulary.of(dataset, settings.model.vocab_size), dataset

    def restore(
        self,
        run: Run,
        addressing: Addressing | None,
        check: Callable[[Path, dict[str, Any]], None] = lambda path, info: None,
    ) -> dict[str, Any]:
        """Load the latest good checkpoint into the parts; returns its description.

        The problems of a damaged checkpoint are printed, and the one before it is taken. Raises
        CheckpointError where the checkpoint does not fit, or none is good. `check` gets the checkpoint and
        its description before it is loaded, and may raise.
        """
        tokenizer = file_digest(self.path / TOKENIZER)
        hashes = addressing.to_json() if addressing is not None else None
        problems: list[str] = []
        for path in gather_objects(checkpoint.candidates(self.checkpoints), self.world)[0]:
            try:
                saved = checkpoint.Saved(path)
                checkpoint.verify(saved, run.settings.checkpoint.verify, self.world)
                checkpoint.check_fits(path, saved.info, run.settings, run.vocabulary, tokenizer, hashes)
                check(path, saved.info)
                checkpoint.load(run, saved)
            except DamagedCheckpoint as error:
                problems.append(str(error))
                continue
            self.base, self.restored = checkpoint.Base.of(saved), path
            if self.world.rank == 0:
                if problems:
                    say("\n".join([*problems, f"going on from {path}, the one before"]))
                self._write_settings(run.settings)  # not before: a refused resume leaves the run as it was
            return saved.info
        raise CheckpointError(
            "\n".join([f"{self.checkpoints}: no good checkpoint to resume from", *problems])
        )

    def saver(self, run: Run, reading: Callable[[int], dict[str, Any]]) -> checkpoint.Saver:
        """The saver of the run's checkpoints, once the run was restored or begun; collective. `reading` is
        that of `Saver`.
        """
        if self.world.rank == 0 and run.table is not None:
            write_atomically(self.path / ADDRESSING, run.table.addressing.to_json().encode())
        return checkpoint.Saver(
            run, self.checkpoints, file_digest(self.path / TOKENIZER), self.base, reading, self.confirm
        )

    def _write_settings(self, settings: Settings) -> None:
        write_atomically(self.path / SETTINGS, dump_settings(settings).encode())


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) for a run folder, for one of its checkpoints, or for the folder or URL of
    `checkpoint.dir`.

    Raises CheckpointError where there is none, where a folder or the run folder's settings cannot be read,
    and where they name a URL.
    """
    try:
        return _find(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}"
        ) from None


def _find(path: Path) -> tuple[Path, Path]:
    if (path / checkpoint.INFO).is_file():
        return _run_of(path), path
    if checkpoint.latest(path) is not None:
        saved = checkpoint.candidates(path)[0]
        return _run_of(saved), saved
    found = checkpoint.candidates(_checkpoints_of(path))
    if not found:
        raise CheckpointError(f"{path} is neither a run folder with a finished checkpoint nor a checkpoint")
    last, *before = found
    if not (last / checkpoint.INFO).is_file():
        instead = f"; the one before it is {before[0]}" if before else ""
        raise CheckpointError(
            f"{last}, the latest of this run, is damaged: {checkpoint.INFO} is missing{instead}"
        )
    return path, last


def _run_of(saved: Path) -> Path:
    """The run folder in which a checkpoint lies; of one that `checkpoint.dir` put elsewhere, the one that it
    names.
    """
    around = saved.parent.parent
    if (around / SETTINGS).is_file():
        return around
    named = Path(parse_settings(checkpoint.read_info(saved)["settings"], source=str(saved)).run.dir)
    return named if (named / SETTINGS).is_file() else around


def _checkpoints_of(run: Path) -> Path:
    """Where a run folder's settings say that its checkpoints lie. A URL is not opened: whoever made the
    folder chose it.
    """
    try:
        tree = read_toml(run / SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        return run / CHECKPOINTS
    except (OSError, UntrustedFileError) as error:
        raise CheckpointError(f"{run / SETTINGS} cannot be read: {error}") from None
    section = tree.get("checkpoint", {})
    where = section.get("dir", "") if isinstance(section, dict) else ""
    if not isinstance(where, str) or "\0" in where:
        raise CheckpointError(f"{run / SETTINGS}: checkpoint.dir={where!r:.100} is not a folder")
    if "://" in where and not where.startswith("file://"):
        raise CheckpointError(
            f"{run / SETTINGS} says that the checkpoints lie at {where}, which is not opened "
            f"because a file names it; if you trust it, give {where} itself in the place of {run}"
        )
    return checkpoint.open_storage(where) if where else run / CHECKPOINTS
