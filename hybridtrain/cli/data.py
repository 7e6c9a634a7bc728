"""Commands that prepare data, and that size the table for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hybridtrain.cli.options import Json
from hybridtrain.errors import UserError


def data(
    sources: Annotated[
        list[str],
        typer.Argument(help="text files, JSON lines or folders (also .gz, .xz, .bz2), or shipped:sotu"),
    ],
    out: Annotated[str, typer.Option("--out", help="folder that receives the shards")],
    vocab_size: Annotated[
        int | None, typer.Option(help="entries of the byte-level BPE to train; 4096 where not given")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer.json to use instead of training one")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="token that stands before each document")] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="share of whole documents held out; 0.05 where not given"),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="a source that is all held out; may be repeated")
    ] = None,
    text_field: Annotated[str, typer.Option(help="field of a JSON line that holds the text")] = "text",
    shard_tokens: Annotated[int, typer.Option(min=1, help="tokens per shard")] = 50_000_000,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what another preparation left in --out")
    ] = False,
) -> None:
    """Turn text into memory-mapped token shards."""
    from hybridtrain.data.prepare import prepare

    problems = [
        f"{name} is empty; name a folder or file"
        for name, values in (("--out", [out]), ("SOURCE", sources))
        if "" in values
    ]
    if vocab_size is not None and tokenizer is not None:
        problems.append(
            f"--vocab-size {vocab_size} and --tokenizer {tokenizer}: a loaded tokenizer has its own "
            "vocabulary, leave one out"
        )
    if validation_fraction is not None and validation:
        problems.append(
            f"--validation-fraction {validation_fraction} and --validation {validation[0]}: either is held "
            "out, leave one out"
        )
    if problems:
        raise UserError("\n".join(problems))
    prepare(
        sources,
        out,
        vocab_size=vocab_size or 4096,
        tokenizer=tokenizer,
        separator=separator,
        validation_fraction=0.05 if validation_fraction is None else validation_fraction,
        validation_sources=validation or (),
        text_field=text_field,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
        progress=True,
    )


def engram(
    rows_per_head: Annotated[int, typer.Option(help="a head has the first unused prime >= this many rows")],
    orders: Annotated[str, typer.Option(help="n-gram lengths")] = "2,3",
    heads: Annotated[int, typer.Option(help="hash heads per order")] = 8,
    dim: Annotated[int, typer.Option(help="width of a row")] = 80,
    layers: Annotated[str, typer.Option(help="0-based numbers of the Engram layers")] = "1",
    as_json: Json = False,
) -> None:
    """Size a lookup table: primes, packed rows, parameters and bytes."""
    from hybridtrain.table.sizing import TableShape, print_report, report

    shape = TableShape(
        rows_per_head, _integers("--orders", orders), heads, dim, _integers("--layers", layers)
    )
    sized = report(shape)
    if as_json:
        print(json.dumps(sized))
    else:
        print_report(sized)


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f'{option} "{text}" is not a list of integers; write e.g. 2,3') from None
