"""The `hybridtrain` command. Each command only reads its arguments and calls the module that does the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridtrain.errors import UserError
from hybridtrain.parallel.layout import LayoutError

app = typer.Typer(
    name="hybridtrain",
    help="Train hybrid-sparse language models: Mixture-of-Experts and Engram lookup tables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

kernels_app = typer.Typer(
    help="What the fused kernels compile to, and how fast they are.", no_args_is_help=True
)
app.add_typer(kernels_app, name="kernels")

Config = Annotated[Path, typer.Argument(help="TOML file of settings, e.g. configs/quickstart.toml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, e.g. train.steps=50 parallel.ep=2")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the run folder's latest checkpoint")]
AutoResume = Annotated[
    bool,
    typer.Option(
        "--auto-resume",
        help="go on from the latest checkpoint where there is one, else start: for torchrun --max-restarts",
    ),
]
RUN = "run folder, one of its checkpoints, or the URL of its checkpoints"
Run = Annotated[str, typer.Argument(help=RUN)]
Allow = Annotated[
    str,
    typer.Option(
        help="of a resumed run, what may be another than the checkpoint's: seed, data, validation, joined by commas. With another "
        "seed or other data it goes on with a new epoch"
    ),
]


def _allow_components(context: typer.Context, names: list[str] | None) -> list[str]:
    """Let what this command reads name these components, until it ends."""
    if names:
        from hybridtrain.model.registry import allowing

        context.with_resource(allowing(names))
    return names or []


Components = Annotated[
    list[str] | None,
    typer.Option(
        "--components",
        metavar="NAME",
        callback=_allow_components,
        help="module or .py file that the checkpoint's own model.components may import, which runs its code; "
        "once for each",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    allow: Allow = "",
) -> None:
    """Train on this process, or as one rank of a torchrun launch."""
    from hybridtrain.model.registry import allowing
    from hybridtrain.run.loop import train as run
    from hybridtrain.run.resume import parse_allow
    from hybridtrain.settings.load import load_settings

    allowed = parse_allow(allow, resume or auto_resume)
    settings = load_settings(config, overrides or [])
    with allowing(settings.model.components):
        run(settings, resume or (None if auto_resume else False), allowed)


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="ranks to start on this machine")] = 1,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    allow: Allow = "",
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="times that ranks which died are all started again, from the latest checkpoint"
        ),
    ] = 0,
    bind: Annotated[
        bool,
        typer.Option(help="keep each rank to its share of the cores, where there is one for each thread"),
    ] = True,
) -> None:
    """Start N training ranks on this machine."""
    from hybridtrain.data.prepare import ensure_prepared
    from hybridtrain.launch.local import run_ranks
    from hybridtrain.run.process_setup import check_compiler, resolve_layout
    from hybridtrain.run.resume import parse_allow
    from hybridtrain.run.writable import check_folders
    from hybridtrain.settings.load import load_settings

    allowed = parse_allow(allow, resume or auto_resume)
    settings = load_settings(config, overrides or [])
    resolve_layout(settings, nproc)  # refuse before anything starts
    check_compiler(settings)
    check_folders(settings)
    ensure_prepared(settings.data)
    arguments = (settings, resume or (None if auto_resume else False), allowed)
    target, threads = "hybridtrain.run.loop:train", settings.run.threads
    again = settings, None, allowed
    raise typer.Exit(
        run_ranks(target, arguments, nproc, threads=threads, bind=bind, restarts=max_restarts, again=again)
    )


@app.command()
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


@app.command()
def engram(
    rows_per_head: Annotated[int, typer.Option(help="a head has the first unused prime >= this many rows")],
    orders: Annotated[str, typer.Option(help="n-gram lengths")] = "2,3",
    heads: Annotated[int, typer.Option(help="hash heads per order")] = 8,
    dim: Annotated[int, typer.Option(help="width of a row")] = 80,
    layers: Annotated[str, typer.Option(help="0-based ids of the memory layers")] = "1",
    as_json: Json = False,
) -> None:
    """Size a lookup table: primes, packed rows, parameters and bytes."""
    from hybridtrain.table.sizing import print_report, report

    sized = report(rows_per_head, _integers("--orders", orders), heads, dim, _integers("--layers", layers))
    if as_json:
        print(json.dumps(sized))
    else:
        print_report(sized)


@app.command(name="eval")
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
    _print_values(values, as_json)


@app.command()
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


@kernels_app.command(name="report")
def kernels_report(
    ops: Annotated[str, typer.Option(help="ops to compile, e.g. rms_norm,rope; all where not given")] = "",
    targets: Annotated[
        str, typer.Option(help="targets to compile for, e.g. sm_90; all where not given")
    ] = "",
    page: Annotated[
        Path | None, typer.Option(help="a checkout: write its docs/kernels.md and .json instead of printing")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel for real GPUs, with none here: registers, spills, memory accesses, tensor cores,
    roofline.
    """
    from hybridtrain.kernels.ops import TRITON_OPS
    from hybridtrain.kernels.report.command import requirements, unknown, write_page
    from hybridtrain.kernels.report.hardware import TARGETS
    from hybridtrain.kernels.report.table import markdown, report, to_json

    chosen = tuple(ops.split(",")) if ops else TRITON_OPS
    places = tuple(targets.split(",")) if targets else tuple(TARGETS)
    if problems := [*requirements(), *unknown(chosen, places)]:
        raise UserError("\n".join(problems))
    rows = report(chosen, places)
    if page is not None:
        write_page(page, markdown(rows), to_json(rows))
    else:
        print(to_json(rows) if as_json else markdown(rows))


@kernels_app.command(name="bench")
def kernels_bench(as_json: Json = False) -> None:
    """Time every kernel on this machine's GPU against torch, torch.compile and what libraries are installed."""
    from hybridtrain.kernels.report.bench import bench, requirements, show

    if problems := requirements():
        raise UserError("\n".join(problems))
    rows = bench()
    print(json.dumps(rows) if as_json else show(rows))


@app.command()
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
    from hybridtrain.formats.command import export_model

    print(
        f"{out}: "
        f"{export_model(open_storage(run, 'RUN'), out, to, family, transformer_impl, max_shard_size, dtype)}"
    )


@app.command(name="import")
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


@app.command()
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
    """Lay a checkpoint out for another layout, without its ranks; every tensor's checksum stays what it was."""
    from hybridtrain.checkpoint import open_storage
    from hybridtrain.formats.folder import parse_size
    from hybridtrain.reshard import Growth
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
        max_memory=parse_size("--max-memory", max_memory),
        growth=Growth(grow_experts, extend_vocab, router_noise, tokenizer),
        show=sys.stderr.isatty(),
    )
    print(
        f"{out}: {done.tensors} tensors, {done.bytes:,} bytes for {done.layout}; every tensor's xxh3 is what "
        "it was"
    )


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f'{option} "{text}" is no list of integers; write e.g. 2,3') from None


def _print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:16s} {value:.6g}" if isinstance(value, float) else f"{name:16s} {value}")


def main() -> None:
    """Run the command; what the user can mend is one message on stderr and exit status 2."""
    try:
        app()
    except (UserError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:500]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: this machine has not the memory that was asked for: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
