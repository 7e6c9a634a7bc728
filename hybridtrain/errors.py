"""The errors a user can cause. The command prints them without a traceback and exits with status 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: the message names the key or file, the number and what would be legal."""


class ListedProblems(UserError):
    """Several things are wrong with `source`; the message lists every one, one a line."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            "\n".join([f"{source}: {len(self.problems)} problem(s)", *(f"  {p}" for p in self.problems)])
        )


class SettingsError(ListedProblems):
    """The settings are wrong; the message lists every problem found, one a line."""


class DataError(UserError):
    """A source text, a token shard or a tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, could not be written, or belongs to another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint's files have changed since it was finished; an older checkpoint may still be good."""


class FormatError(ListedProblems):
    """A model cannot be carried to or from another format; the message lists every reason, one a line."""


class TrainingError(UserError):
    """The run cannot go on (for example: the loss is not finite)."""
