"""Commands on a trained model: use it, give it away, take one in, lay it out anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hybridtrain.cli.options import RUN, Components, Json, Overrides, Run, print_values
from hybridtrain.errors import UserError


def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="train or validation")] = "validation",
    data_path: Annotated[
        Path | None, typer.Option("--data", help="another data folder made with the same tokenizer")
    ] = None,
    batches: Annotated[int, typer.Option(min=0, help="global batches; 0: the whole split")] = 0,
    as_json: Json = False,
    components: Components = None,
) -> None:
    """Loss, perplexity and bits per byte of a checkpoint."""
    from hybridtrain.checkpoint import open_storage
    from hybridtrain.run.generate import evaluate_checkpoint

    values = evaluate_checkpoint(open_storage(run, "RUN"), split, data_path, batches)
    print_values(values, as_json)


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="sample among the k likeliest; 0: all")] = 40,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    components: Components = None,
) -> None:
    """Continue a text with a checkpoint."""
    from hybridtrain.checkpoint import open_storage
    from hybridtrain.run.generate import generate_text

    print(generate_text(open_storage(run, "RUN"), prompt, tokens, temperature, top_k, seed))


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="folder that receives the model")],
    to: Annotated[
        str, typer.Option("--format", help="hf: a Hugging Face folder; megatron: a torch_dist checkpoint")
    ] = "hf",
    family: Annotated[
        str | None, typer.Option(help="architecture of hf; auto: the first that is the same model")
    ] = None,
    transformer_impl: Annotated[
        str | None, typer.Option(help="of megatron: transformer_engine or local")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a file of weights, e.g. 5GB")] = "5GB",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: that of the import, else float32")
    ] = "auto",
    components: Components = None,
) -> None:
    """Write a checkpoint in another format."""
    from hybridtrain.checkpoint import open_storage
    from hybridtrain.formats.command import ExportOptions, export_model

    options = ExportOptions(to, family, transformer_impl, max_shard_size, dtype)
    print(f"{out}: {export_model(open_storage(run, 'RUN'), out, options)}")


def import_(
    folder: Annotated[
        Path, typer.Argument(help="Hugging Face folder, or a torch_dist checkpoint of Megatron-LM")
    ],
    out: Annotated[Path, typer.Argument(help="folder that receives the weights; runs start from it")],
    separator: Annotated[str | None, typer.Option(help="token that stands before each document")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="train.seq_len to write; at most 1024 if not given")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="of Megatron: a tokenizer.json; else the folder's")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="of Megatron: TOML with its [model]; else its args")
    ] = None,
) -> None:
    """Take the weights of a published model."""
    from hybridtrain.formats.command import import_model

    made = import_model(folder, out, separator, seq_len, tokenizer, settings)
    print(f"{out}: {', '.join(made.model.layers)}; train from it with hybridtrain train {out}/settings.toml")


def reshard(
    run: Annotated[str, typer.Argument(metavar="IN", help=RUN)],
    out: Annotated[str, typer.Argument(help="run folder to write; one that was begun is gone on with")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="ranks to lay it out for; as few as the axes need if not given")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="of the tensors' bytes, what may be in memory, e.g. 512M or 2G")
    ] = "512M",
    grow_experts: Annotated[
        int | None, typer.Option(min=1, help="number of experts to grow to; new ones are copies")
    ] = None,
    router_noise: Annotated[
        float, typer.Option(min=0.0, help="on the new experts' router rows, relative to their size")
    ] = 0.0,
    extend_vocab: Annotated[
        int | None, typer.Option(min=1, help="rows of embedding and head to extend to")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer.json with more tokens behind those of the run's")
    ] = None,
    components: Components = None,
) -> None:
    """Lay a checkpoint out for another layout, without its ranks; every tensor's checksum stays the same."""
    from hybridtrain.checkpoint import open_storage
    from hybridtrain.formats.folder import parse_size
    from hybridtrain.reshard import CopyOptions, Growth
    from hybridtrain.reshard import reshard as lay_out
    from hybridtrain.run.process_setup import keep_freed_memory

    if "://" in out:
        raise UserError(
            f"{out}: OUT is a folder of this machine; its checkpoints may be copied to where checkpoint.dir "
            "will be"
        )
    keep_freed_memory()  # blocks of the same sizes follow one another
    done = lay_out(
        open_storage(run, "RUN"),
        Path(out),
        overrides or [],
        nproc=nproc,
        growth=Growth(grow_experts, extend_vocab, router_noise, tokenizer),
        copying=CopyOptions(parse_size("--max-memory", max_memory), show=sys.stderr.isatty()),
    )
    print(
        f"{out}: {done.tensors} tensors, {done.bytes:,} bytes for {done.layout}; every tensor's xxh3 is "
        "unchanged"
    )
