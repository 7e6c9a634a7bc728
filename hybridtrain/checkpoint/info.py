"""The description of a checkpoint: `checkpoint.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import xxhash
from pydantic import BaseModel, Field, model_validator

from hybridtrain import __version__
from hybridtrain.checkpoint.consumed import Consumed, Count
from hybridtrain.checkpoint.storage import write_whole
from hybridtrain.errors import CheckpointError, DamagedCheckpoint
from hybridtrain.files.untrusted import UntrustedFileError, parse_json, read_bytes, validated
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import Settings

if TYPE_CHECKING:
    from hybridtrain.run.assemble import Run, Vocabulary

FORMAT = 2
INFO = "checkpoint.json"
MAX_INFO = 1 << 28  # bytes: the log of weight decay has about 20 a step

FileName = Annotated[str, Field(pattern=r"^\.?[^/\\:.\x00][^/\\:\x00]*$", max_length=255)]


class _File(BaseModel):
    size: Count
    xxh3: str


class _Base(BaseModel):
    name: Annotated[str, Field(pattern=r"^step-[0-9]{1,18}$")]
    xxh3: str
    age: Count


class _Guard(BaseModel):
    losses: list[float]
    skipped_batches: Count


class _Scalars(BaseModel):
    step_count: Count
    beta2: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    beta2_since: Count = 0
    weight_before: Annotated[float, Field(ge=0.0)] = 0.0
    decay_log: list[float] = []

    @model_validator(mode="after")
    def _as_long_as_the_steps(self) -> _Scalars:
        if "decay_log" in self.model_fields_set and len(self.decay_log) != self.step_count + 1:
            raise ValueError(
                f"decay_log has {len(self.decay_log)} entries, must have step_count + 1 = "
                f"{self.step_count + 1}"
            )
        return self


class _Description(BaseModel):
    """The entries of checkpoint.json that are used; it may have more."""

    step: Count
    files: dict[FileName, _File]
    sequences: Count
    identity: dict[str, Any]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31)]
    separator_id: Count
    tokenizer_digest: str
    addressing: str | None
    table_scalars: _Scalars | None
    settings: dict[str, Any]
    guard: _Guard | None = None
    base: _Base | None = None
    tensors: dict[str, str] = {}
    weights_only: bool = False
    data: Consumed | None = None
    xxh3: str

    @model_validator(mode="after")
    def _separator_is_a_token(self) -> _Description:
        if self.separator_id >= self.vocab_size:
            raise ValueError(f"separator_id {self.separator_id} is not one of the {self.vocab_size} tokens")
        return self


def read_info(path: Path) -> dict[str, Any]:
    """The description of a checkpoint: step, settings, addressing, tokenizer digest, files.

    Raises CheckpointError where `path` is not a finished checkpoint, of another format or of a version before
    0.1, DamagedCheckpoint where it was changed.
    """
    try:
        info = parse_json(read_bytes(path / INFO, MAX_INFO), "its content", dict[str, Any])
        if info.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {info.get('format')!r:.50}; this version reads format {FORMAT}"
            )
        if (found := _seal(info)) != info.get("xxh3"):
            raise DamagedCheckpoint(
                f"{path / INFO} is damaged: its content has xxh3 {found}, it says {info.get('xxh3')}"
            )
        if _before_the_renames(info):
            raise CheckpointError(
                f"{path} was written by a version from before 0.1, whose settings and tensors have other "
                "names: "
                "train anew, or export it with that version and import the export with this one"
            )
        validated(info, "its content", _Description)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a finished checkpoint: {path / INFO} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path / INFO} cannot be read: {error.strerror or error}") from None
    except UntrustedFileError as error:
        raise DamagedCheckpoint(f"{path / INFO} is damaged: {error}") from None
    return info


def write_info(path: Path, info: dict[str, Any]) -> str:
    """Write `checkpoint.json`, which makes the files of the folder `path` a finished checkpoint; returns its
    checksum.
    """
    xxh3 = _seal(info)
    write_whole(path / INFO, json.dumps(info | {"xxh3": xxh3}, indent=1).encode())
    return xxh3


def _before_the_renames(info: dict[str, Any]) -> bool:
    """Whether it has the names of versions before 0.1: the table was called memory then."""
    settings = info.get("settings")
    return "memory_scalars" in info or (isinstance(settings, dict) and "memory" in settings)


def _seal(info: dict[str, Any]) -> str:
    """The xxh3 of the description without its entry `xxh3`."""
    rest = json.loads(
        json.dumps({key: value for key, value in info.items() if key != "xxh3"})
    )  # as it will be read
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe(run: Run, step: int, tokenizer_digest: str) -> dict[str, Any]:
    """The description of a checkpoint of the run after `step` steps.

    The data that the run has read, the files and the base are added when they are known.
    """
    table = run.table
    return {
        "format": FORMAT,
        "step": step,
        "guard": run.guard.state(),
        "sequences": 0,
        "version": __version__,
        "torch": torch.__version__,
        "layout": run.mesh.layout.describe(),
        "identity": identity(run.settings),
        "vocab_size": run.vocabulary.size,
        "separator_id": run.vocabulary.separator_id,
        "tokenizer_digest": tokenizer_digest,
        "addressing": table.addressing.to_json() if table is not None else None,
        "table_scalars": table.scalars() if table is not None else None,
        "settings": run.settings.model_dump(mode="json"),
    }


def row_scalars(info: dict[str, Any]) -> dict[str, Any] | None:
    """The row optimizer's numbers, if any; older checkpoints have the beta2 of their settings."""
    scalars: dict[str, Any] | None = info["table_scalars"]
    if scalars is None or "beta2" in scalars:
        return scalars
    return {
        "beta2": parse_settings(info["settings"], source="the checkpoint's settings").engram.beta2
    } | scalars


def check_fits(
    path: Path,
    info: dict[str, Any],
    settings: Settings,
    vocabulary: Vocabulary,
    tokenizer_digest: str,
    addressing: str | None,
) -> None:
    """Raise CheckpointError listing every way in which the checkpoint `path`, with the description `info`,
    belongs to another model.
    """
    if info.get("weights_only"):
        raise CheckpointError(
            f"{path} holds imported weights and no optimizer state; "
            f"start a new run from it with train.init_from={path.parent.parent}"
        )
    problems = [
        f"{key}: the checkpoint has {json.dumps(theirs)}, the settings say {json.dumps(ours)}"
        for key, ours, theirs in _differences(identity(settings), info["identity"])
    ]
    if info["vocab_size"] != vocabulary.size:
        problems.append(
            f"vocabulary: the checkpoint has {info['vocab_size']} tokens, the data {vocabulary.size}"
        )
    elif info["tokenizer_digest"] != tokenizer_digest:
        problems.append(
            f"tokenizer: the checkpoint was trained with {info['tokenizer_digest']}, the data has "
            f"{tokenizer_digest}"
        )
    elif (theirs := info["separator_id"]) != vocabulary.separator_id:
        problems.append(
            f"separator: the checkpoint has token {theirs} before each document, the data "
            f"{vocabulary.separator_id}"
        )
    elif info["addressing"] != addressing and not problems:
        problems.append("engram: the checkpoint's multipliers, primes or compression map differ")
    if problems:
        raise CheckpointError(
            "\n".join([f"{path} is a checkpoint of another model", *(f"  {p}" for p in problems)])
        )


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that say what the model and its optimizer state are, flat; a checkpoint fits where they
    are equal.
    """
    kept = {
        "enabled",
        "orders",
        "heads",
        "head_dim",
        "rows_per_head",
        "boundary",
        "conv",
        "conv_kernel",
        "gate_floor",
        "optimizer",
    }
    rates = ("bias_rate", "aux_weight", "z_weight")
    tree = {
        "model": settings.model.model_dump(
            mode="json", exclude={"init_std": True, "vocab_size": True, "components": True, "moe": set(rates)}
        ),
        "engram": settings.engram.model_dump(mode="json", include=kept),
        "optim": {"backbone": settings.optim.backbone},
    }
    return dict(_flatten(tree))


def changed_settings(ours: Settings, theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every setting that differs from `theirs`, a checkpoint's; a setting that it
    lacks had the default.
    """
    was = dict(_flatten(type(ours)().model_dump(mode="json"))) | dict(_flatten(theirs))
    now = dict(_flatten(ours.model_dump(mode="json")))
    return [(key, value, was[key]) for key, value in now.items() if value != was[key]]


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*ours, *theirs])
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]
