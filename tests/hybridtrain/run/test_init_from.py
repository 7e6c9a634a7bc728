"""New runs that start from old weights: the tensors there are taken, an engram may be new, every other
difference is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors, write_tensors
from hybridtrain.data.prepare import ensure_prepared, prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import CheckpointError, DataError
from hybridtrain.formats.hf_import import import_hf
from hybridtrain.model.init import init_table
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.generate import evaluate_checkpoint, open_checkpoint
from hybridtrain.run.init_from import start_from
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.run_folder import find_checkpoint
from hybridtrain.settings.tree import Settings
from tests.console import hybridtrain, refused
from tests.hybridtrain.conftest import TWO_RANKS
from tests.hybridtrain.formats.tiny import save_theirs, their_model
from tests.training import ci_settings, loss_curve, train_on

WITH_ENGRAM = (
    'model.layers=["attention+dense", "engram+attention+dense", "attention+dense"]',
    "engram.rows_per_head=500",
)


@pytest.fixture(scope="module")
def imported(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama model of transformers as a folder of ours. Read only."""
    folder = tmp_path_factory.mktemp("imported")
    import_hf(save_theirs(their_model("llama"), folder / "theirs", ci_data), folder / "ours", seq_len=64)
    return folder / "ours"


def new_settings(imported: Path, run: Path, data: Path, *overrides: str) -> Settings:
    from hybridtrain.settings.load import load_settings

    steps = (
        "train.steps=3",
        "train.global_batch=8",
        "train.micro_batches=1",
        "train.eval_every=0",
        "train.log_every=1",
    )
    return load_settings(
        imported / "settings.toml", [f"run.dir={run}", f"data.path={data}", *steps, *overrides]
    )


def start(settings: Settings, folder: Path) -> Run:
    dataset = TokenDataset.open(settings.data.path)
    vocabulary = Vocabulary.of(dataset, settings.model.vocab_size)
    mesh = make_mesh(resolve_layout(settings, 1), 0, torch.device("cpu"), 60)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    folder.mkdir(exist_ok=True)
    start_from(run, Path(settings.train.init_from), folder, dataset.manifest)
    return run


def test_all_that_is_there_is_taken_and_a_new_engram_drawn(
    imported: Path, ci_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = (*WITH_ENGRAM, "model.attention.rope_theta=1000")
    run = start(new_settings(imported, tmp_path, ci_data, *overrides), tmp_path)
    old, _, _ = open_checkpoint(imported)
    new = run.model.state_dict()
    for name, value in old.model.state_dict().items():
        assert torch.equal(new[name], value), name
    assert run.table is not None
    assert torch.equal(run.table.weight, init_table(0, 0, len(run.table.weight), 32, 0.02))
    said = capfd.readouterr().err
    assert (
        f"{len(old.model.state_dict())} tensors taken, {len(new) - len(old.model.state_dict())} of new "
        "Engram layers drawn" in said
    )
    assert "model.attention.rope_theta=1000.0, and the weights were trained with 500.0" in said


def test_training_goes_on_from_the_weights_at_any_layout(
    imported: Path, ci_data: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for nproc, run in enumerate(runs, 1):
        extra = ("parallel.mem=2",) if nproc == 2 else ()
        # a small step: random weights of this size have steep losses
        train_on(
            nproc,
            new_settings(
                imported, run, ci_data, *WITH_ENGRAM, "optim.lr=1e-5", "optim.warmup_steps=0", *extra
            ),
        )
    one, two = (loss_curve(run) for run in runs)
    assert two == pytest.approx(one, rel=1e-4)
    before = evaluate_checkpoint(imported, "train", ci_data, batches=2)["loss"]
    assert one[0] == pytest.approx(
        before, rel=0.05
    )  # other windows of the same texts; a new model would have ln 1032 = 6.9
    assert before > 7.5


def test_a_trained_table_is_taken_with_the_decay_that_it_owes(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    decayed = ("engram.weight_decay=0.5", "train.steps=10", "train.eval_every=0")
    source = trained(1, *decayed)
    run = start(ci_settings(tmp_path, ci_data, *decayed, f"train.init_from={source}"), tmp_path)
    old, _, _ = open_checkpoint(source)
    assert run.table is not None
    assert old.table is not None
    assert not torch.equal(run.table.weight, old.table.weight)
    old.table.optimizer.catch_up(torch.arange(len(old.table.weight)))
    assert torch.equal(run.table.weight, old.table.weight)
    assert run.table.optimizer.step_count == 0
    with pytest.raises(
        CheckpointError, match="engram: the table cannot be taken over: layers, orders, multipliers, primes"
    ):
        start(ci_settings(tmp_path, ci_data, f"train.init_from={source}", "engram.hash_seed=3"), tmp_path)


def test_a_validation_split_that_the_weights_may_have_been_trained_on_is_told(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained(1)
    start(ci_settings(tmp_path, ci_data, f"train.init_from={run}"), tmp_path)
    assert "validation split" not in capfd.readouterr().err
    other = tmp_path / "other"
    prepare(
        [ci_data.with_suffix(".jsonl")],
        other,
        tokenizer=ci_data / "tokenizer.json",
        validation_fraction=0.5,
        progress=False,
    )
    start(ci_settings(tmp_path, other, f"train.init_from={run}"), tmp_path)
    said = (
        f"data.path={other}: its validation split is not that of the weights' run, which may have been "
        "trained on some of it"
    )
    assert said in capfd.readouterr().err


def test_other_shapes_are_refused_all_at_once_on_every_rank(
    imported: Path, ci_data: Path, tmp_path: Path
) -> None:
    settings = new_settings(imported, tmp_path / "run", ci_data)
    overrides = ["model.dense.hidden=100", 'model.layers=["4*attention+dense"]', "model.tie_embeddings=false"]
    arguments = [f"run.dir={tmp_path / 'run'}", f"data.path={ci_data}", *overrides]
    lines = refused(hybridtrain("train", imported / "settings.toml", *arguments)).splitlines()
    assert f"error: train.init_from={settings.train.init_from}: {3 * 3 + 10} problem(s)" in lines
    assert (
        "  model.layers.1.feedforward.w_up.weight: the checkpoint has [96, 64], this model [100, 64]" in lines
    )
    assert "  model.layers.3.mixer.wq.weight: the checkpoint lacks it; only an engram may be new" in lines
    assert "  model.head.weight: the checkpoint lacks it; only an engram may be new" in lines


def rewrite(run: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Write the checkpoint of an import again, with what `change` makes of its tensors and with right
    checksums.
    """
    saved = find_checkpoint(run)[1]
    stored, info = StoredTensors(saved), checkpoint.read_info(saved)
    tensors = {name: stored.read(name) for name in stored.shapes}
    change(tensors)
    for name in info["files"]:
        (saved / name).unlink()
    lazy = {
        name: LazyTensor(tuple(value.shape), value.dtype, partial(torch.clone, value))
        for name, value in tensors.items()
    }
    checkpoint.write_info(
        saved,
        {key: value for key, value in info.items() if key != "xxh3"} | {"files": write_tensors(saved, lazy)},
    )
    return run


def test_tensors_are_looked_at_and_not_taken_by_name(imported: Path, ci_data: Path, tmp_path: Path) -> None:
    head, norm = "model.head.weight", "model.norm.weight"  # the import's head is its embedding

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[head] = tensors["model.embed.weight"] + 1
        tensors[norm] = tensors[norm].to(torch.int8)

    run = rewrite(Path(shutil.copytree(imported, tmp_path / "run")), change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(run)
    assert f"{head}: a model of its settings has none" in str(caught.value)
    assert f"{norm} is int8: weights may be float32, bfloat16, float16, float64" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        start(new_settings(imported, tmp_path / "new", ci_data, f"train.init_from={run}"), tmp_path / "new")
    assert f"{head}: this model lacks it" in str(caught.value)
    assert f"{norm} is int8: weights may be float32, bfloat16, float16, float64" in str(caught.value)


def test_imported_weights_are_no_run_to_resume(imported: Path, ci_data: Path) -> None:
    arguments = [f"run.dir={imported}", f"data.path={ci_data}"]
    message = refused(hybridtrain("train", imported / "settings.toml", *arguments, "--resume"))
    assert (
        "holds imported weights and no optimizer state; start a new run from it with "
        f"train.init_from={imported}" in message
    )
    assert "go on with --resume or choose another run.dir" in refused(
        hybridtrain("train", imported / "settings.toml", *arguments)
    )


def test_an_import_trains_and_is_evaluated_with_its_own_separator(
    imported: Path, ci_data: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    import_hf(imported.parent / "theirs", ours, separator="ÿ", seq_len=64)  # byte 255: in no text
    made = new_settings(
        ours, tmp_path / "run", tmp_path / "data", f'data.source=["{ci_data.with_suffix(".jsonl")}"]'
    )
    ensure_prepared(made.data, progress=False)
    manifest = TokenDataset.open(made.data.path).manifest
    assert manifest.separator == made.data.separator == "ÿ"
    assert manifest.separator_id != 0
    start(made, tmp_path / "run")
    with pytest.raises(
        CheckpointError,
        match=rf"the checkpoint has token {manifest.separator_id} before each document, the data 0",
    ):
        start(new_settings(ours, tmp_path / "run", ci_data), tmp_path / "run")
    message = (
        r"has token 0 \('<\|endoftext\|>'\) before each document, the checkpoint was trained with "
        rf"{manifest.separator_id}"
    )
    with pytest.raises(DataError, match=message):
        evaluate_checkpoint(ours, "train", ci_data, batches=1)


def test_two_ranks_take_a_run_of_one(trained: Callable[..., Path], ci_data: Path, tmp_path: Path) -> None:
    run = trained(1)
    train_on(
        2,
        ci_settings(
            tmp_path / "run", ci_data, f"train.init_from={run}", "train.steps=1", "optim.lr=1e-9", *TWO_RANKS
        ),
    )
    old = evaluate_checkpoint(run, "validation", None, 0)
    new = evaluate_checkpoint(tmp_path / "run", "validation", None, 0)
    assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
