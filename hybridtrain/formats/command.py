"""What `hybridtrain import` and `hybridtrain export` call: the format chosen, and options of another one
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridtrain.errors import UserError
from hybridtrain.formats.folder import need_transformers, parse_size
from hybridtrain.formats.torch_dist import is_torch_dist
from hybridtrain.settings.tree import Settings


@dataclass(frozen=True)
class ExportOptions:
    """The format that a checkpoint is exported to, and the options of `hybridtrain export` about it.

    `family` is an option of hf alone, `transformer_impl` one of megatron; None: not given.
    """

    to: str = "hf"
    family: str | None = None
    transformer_impl: str | None = None
    max_shard_size: str = "5GB"
    dtype: str = "auto"


def export_model(run: Path, out: Path, options: ExportOptions) -> str:
    """Write a checkpoint in the format `options.to`; returns a description of what was written."""
    to, dtype = options.to, options.dtype
    max_bytes = parse_size("--max-shard-size", options.max_shard_size)
    if to not in ("hf", "megatron"):
        raise UserError(f'--format "{to}": it may be hf or megatron')
    for option, value, of in (
        ("--family", options.family, "hf"),
        ("--transformer-impl", options.transformer_impl, "megatron"),
    ):
        if value is not None and to != of:
            raise UserError(f'{option} "{value}": is of --format {of}, not of {to}')
    if to == "megatron":
        from hybridtrain.formats.megatron_export import export_megatron
        from hybridtrain.formats.megatron_names import TRANSFORMER_ENGINE

        implementation = options.transformer_impl or TRANSFORMER_ENGINE
        return export_megatron(run, out, implementation=implementation, max_file_bytes=max_bytes, dtype=dtype)
    need_transformers()
    from hybridtrain.formats.hf_export import AUTO, export_hf

    return export_hf(run, out, family=options.family or AUTO, max_shard_bytes=max_bytes, dtype=dtype)


def import_model(
    folder: Path,
    out: Path,
    separator: str | None,
    seq_len: int | None,
    tokenizer: Path | None,
    settings_file: Path | None,
) -> Settings:
    """Make a folder that runs start from, of whatever format `folder` is; returns its settings."""
    if is_torch_dist(folder):
        from hybridtrain.formats.megatron_import import import_megatron

        return import_megatron(
            folder,
            out,
            separator=separator,
            seq_len=seq_len,
            tokenizer=tokenizer,
            settings_file=settings_file,
        )
    if tokenizer is not None or settings_file is not None:
        raise UserError(f"--tokenizer and --settings are for Megatron's checkpoints; {folder} is not one")
    need_transformers()
    from hybridtrain.formats.hf_import import import_hf

    return import_hf(folder, out, separator=separator, seq_len=seq_len)
