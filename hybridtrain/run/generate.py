"""Uses a checkpoint in one process: evaluation and generation, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.data.batches import Batch
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.data.shards import TokenDataset
from hybridtrain.data.tokenizer import for_texts, library_errors, load_tokenizer, vocabulary_size
from hybridtrain.errors import CheckpointError, DataError, UserError
from hybridtrain.files.durable import file_digest
from hybridtrain.parallel.layout import DENSE_AXES
from hybridtrain.parallel.mesh import Joining, choose_device, make_mesh
from hybridtrain.run.assemble import Run, Vocabulary, assemble
from hybridtrain.run.init_from import check_tensors, read_addressing, read_compression_of
from hybridtrain.run.process_setup import compute_dtype, resolve_layout, table_device
from hybridtrain.run.run_folder import find_checkpoint
from hybridtrain.run.validation import evaluate
from hybridtrain.settings.load import parse_settings

MAX_TOKENS = 1 << 28  # of a micro-batch on all ranks, which are one here
# compilation and engines are for training
ONE_RANK = [
    *(f"parallel.{axis}=1" for axis in (*DENSE_AXES, "ep", "etp", "mem")),
    "train.compile=false",
    "train.engine=native",
]


def open_checkpoint(path: Path) -> tuple[Run, Path, int]:
    """A checkpoint's run on this one process, the run's folder, and the separator's token id.

    Raises CheckpointError where `path` holds none, or the run folder lacks its tokenizer.
    """
    source, saved = find_checkpoint(path)
    opened = checkpoint.Saved(saved)
    info = opened.info
    settings = parse_settings(info["settings"], ONE_RANK, source=str(saved))
    missing = [name for name in (TOKENIZER, COMPRESSION) if not (source / name).is_file()]
    if missing:
        raise CheckpointError(f"{source} lacks {' and '.join(missing)}, which belong to its checkpoints")
    if file_digest(source / TOKENIZER) != info["tokenizer_digest"]:
        raise CheckpointError(
            f"{source / TOKENIZER} is another tokenizer than the one that {saved} was trained with"
        )
    checkpoint.verify(opened, settings.checkpoint.verify)
    compression, stored = read_compression_of(source, info), StoredTensors(opened)
    check_tensors(stored, settings, info)  # before memory is taken for a model of these settings
    at_once = settings.train.global_batch // settings.train.micro_batches * settings.train.seq_len
    if at_once > MAX_TOKENS:
        raise CheckpointError(
            f"{saved}: its settings have micro-batches of {at_once:,} tokens; at most {MAX_TOKENS:,} are "
            "evaluated"
        )
    vocabulary = Vocabulary(info["vocab_size"], info["separator_id"], compression)
    addressing = read_addressing(info, settings, compression, stored)
    device = choose_device()
    mixed, table = compute_dtype(settings, device) != torch.float32, table_device(settings, device)
    mesh = make_mesh(
        resolve_layout(settings, 1),
        0,
        device,
        settings.parallel.timeout,
        Joining(table_device=table, always=mixed),
    )
    run = assemble(settings, mesh, vocabulary, addressing)
    checkpoint.load(run, opened)
    return run, source, vocabulary.separator_id


def evaluate_checkpoint(path: Path, split: str, data: Path | None, batches: int) -> dict[str, float]:
    """Loss, perplexity and bits per byte of the checkpoint over a split of its own data, or of `data`.

    Raises DataError where the data were made with another tokenizer or separator, or the split is empty.
    """
    if split not in ("train", "validation"):
        raise UserError(f'--split "{split}": it may be train or validation')
    run, source, separator = open_checkpoint(path)
    dataset = TokenDataset.open(data or run.settings.data.path, verify=run.settings.data.verify)
    if dataset.manifest.tokenizer_xxh3 != file_digest(source / TOKENIZER):
        raise DataError(
            f"{dataset.folder} was made with another tokenizer than the checkpoint's, {source / TOKENIZER}"
        )
    if dataset.manifest.separator_id != separator:
        raise DataError(
            f"{dataset.folder} has token {dataset.manifest.separator_id} ({dataset.manifest.separator!r}) "
            f"before each document, the checkpoint was trained with {separator}; make the data with that one "
            "(--separator)"
        )
    return evaluate(run, dataset.split("train" if split == "train" else "validation"), batches)


@torch.no_grad()
def generate_text(path: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and up to `tokens` further tokens; ends early where the model ends the document.

    The window is the training length: of longer texts the model sees the last `train.seq_len` tokens.
    """
    run, source, separator = open_checkpoint(path)
    tokenizer = load_tokenizer(source / TOKENIZER)
    name = tokenizer.id_to_token(separator)
    if name is None:
        raise CheckpointError(
            f"{source / TOKENIZER}: has no token {separator}, which stands before each document of the "
            "checkpoint"
        )
    words = for_texts(load_tokenizer(source / TOKENIZER), name)
    with library_errors(f"{source / TOKENIZER}: cannot encode the prompt"):
        ids = [separator, *words.encode(prompt, add_special_tokens=False).ids]
    generator = torch.Generator().manual_seed(seed)
    entries = vocabulary_size(tokenizer)  # rows of the embedding beyond them stand for nothing
    if entries > len(run.vocabulary.compression):
        raise CheckpointError(
            f"{source / TOKENIZER} has {entries} tokens, {COMPRESSION} {len(run.vocabulary.compression)}"
        )
    for _ in range(tokens):
        logits = next_token_logits(run, ids[-run.settings.train.seq_len :], separator)[:entries]
        ids.append(_sample(logits, temperature, top_k, generator))
        if ids[-1] == separator:
            break
    with library_errors(f"{source / TOKENIZER}: cannot decode what was generated"):
        text: str = tokenizer.decode(ids[1:], skip_special_tokens=True)
    return text


def next_token_logits(run: Run, ids: list[int], separator: int) -> torch.Tensor:
    """Logits `[V]` of the token after `ids`, on the CPU."""
    tokens = torch.tensor(ids)[None, None]
    batch = Batch(tokens, tokens, tokens == separator)
    index = None
    if run.table is not None:
        plan = run.table.plan(batch, evaluate=True)
        run.table.fetch(plan, plan.exchanges[0])
        index = plan.exchanges[0].index[0]
    batch = batch.to(run.mesh.device)
    logits_BTV = run.model.eval()(batch.tokens[0], batch.starts[0].cumsum(-1), index)
    logits: torch.Tensor = logits_BTV[0, -1].float().cpu()
    return logits


def _sample(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        bound = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < bound, -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
