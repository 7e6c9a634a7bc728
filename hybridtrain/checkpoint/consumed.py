"""Which data a checkpoint's run has read and was trained on: the entry `data` of `checkpoint.json`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hybridtrain.data.position import Position
from hybridtrain.files.untrusted import validated
from hybridtrain.settings.load import parse_settings

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class Consumed(BaseModel):
    """`sequences` were read at whatever lengths, those that rollbacks left out included; the model was
    trained on `tokens` targets.

    The next sample is the one at `position` in the order of `seed` over the data whose splits have the
    digests `train` and `validation` (None: not known).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: Count
    tokens: Count
    seed: int
    train: str | None
    validation: str | None
    epoch: Count
    window: Annotated[Count, Field(ge=1)]
    read: Count

    @classmethod
    def of(cls, info: dict[str, Any]) -> Consumed:
        """What the run of a checkpoint with the description `info` has read.

        Older checkpoints give only the number of sequences, all of one length, and nothing about the data.
        Raises UntrustedFileError or SettingsError where the entry is not what it should be.
        """
        if "data" in info:
            return validated(info["data"], "the entry data of checkpoint.json", cls)
        settings = parse_settings(info["settings"], source="the checkpoint's settings")
        train, sequences = settings.train, info["sequences"]
        return cls(
            sequences=sequences,
            tokens=info["step"] * train.global_batch * train.seq_len,
            seed=settings.run.seed,
            train=None,
            validation=None,
            epoch=0,
            window=train.seq_len,
            read=sequences * train.seq_len,
        )

    def position(self, num_targets: int) -> Position | None:
        """Where it stands in a train split of so many targets; None where such a split has no such place."""
        whole = max(0, num_targets) // self.window * self.window
        epochs, read = divmod(self.read, whole) if whole and self.train is None else (0, self.read)
        position = Position(self.epoch + epochs, self.window, read)
        return position if position.fits(num_targets) else None
