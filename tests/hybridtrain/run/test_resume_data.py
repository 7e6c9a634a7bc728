"""A resumed run reads on where it stood, says what changed, and refuses what cannot go on: real runs of
tokens all different.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers

from hybridtrain import checkpoint
from hybridtrain.data.prepare import prepare
from hybridtrain.errors import CheckpointError, SettingsError
from hybridtrain.monitor.loss_spikes import SpikeGuard
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.reshard import reshard
from hybridtrain.run import loop as module
from hybridtrain.run.resume import parse_allow
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings
from tests.console import hybridtrain, refused
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings

WORDS = 730  # so many targets, with the separator first
EPOCH = 720  # of windows of 16


def words_in_order(folder: Path, name: str, shift: int = 0, **held_out: Any) -> Path:
    """A data folder whose train split is every word of the vocabulary once: a token's id says where it
    stands.
    """
    tokenizer = Tokenizer(
        models.WordLevel({"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, WORDS + 1)}}, unk_token="w1")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    (folder / f"{name}.txt").write_text(" ".join(f"w{(i + shift) % WORDS + 1}" for i in range(WORDS)))
    source, held_out = folder / f"{name}.txt", {"validation_fraction": 0.0} | held_out
    prepare([source], folder / name, tokenizer=folder / "words.json", progress=False, **held_out)
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_in_order(tmp_path_factory.mktemp("words"), "data")


def words_settings(run: Path, data: Path, *overrides: str) -> Settings:
    small = [
        'model.layers=["engram+attention+moe"]',
        "checkpoint.every=0",
        "data.vocab_size=4096",
        "engram.rows_per_head=50",
    ]
    return ci_settings(
        run, data, *TINY, "train.eval_every=0", "train.global_batch=6", "train.seq_len=16", *small, *overrides
    )


def read_by(settings: Settings, resume: bool, allow: Collection[str] = ()) -> list[list[int]]:
    """Train here, alone or as a rank; the targets of each step on this rank."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()
    read: list[list[int]] = []
    real = module.train_step

    def train_step(parts: Any, step: int, data: Any, *rest: Any) -> Any:
        read.append(data.batch.targets[data.batch.targets >= 0].tolist())
        return real(parts, step, data, *rest)

    module.train_step = train_step  # type: ignore[assignment]
    try:
        module.train(settings, resume, allow)
    finally:
        module.train_step = real
    return read


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run of two steps, and what it read. Copy it before it goes on."""
    run = tmp_path_factory.mktemp("begun") / "run"
    return run, list(itertools.chain(*read_by(words_settings(run, data, "train.steps=2"), False)))


def test_batches_lengths_and_layouts_may_change_and_each_target_of_an_epoch_is_read_once(
    begun: tuple[Path, list[int]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, seen = shutil.copytree(begun[0], tmp_path / "run"), list(begun[1])
    assert len(seen) == 2 * 6 * 16
    seen += itertools.chain(
        *read_by(words_settings(run, data, "train.steps=3", "train.global_batch=12"), True)
    )
    assert capsys.readouterr().err.splitlines()[:5] == [
        f"note: data.path={data} holds nothing out: this run is not validated",
        f"going on from {run}/checkpoints/step-00000002 with changes:",
        f'  run.dir="{run}", and the checkpoint was written with "{begun[0]}"',
        "  train.steps=3, and the checkpoint was written with 2",
        "  train.global_batch=12, and the checkpoint was written with 6",
    ]
    two = words_settings(
        run, data, "train.steps=5", "train.seq_len=20", "train.global_batch=4", "parallel.ep=2"
    )
    for steps in zip(*run_on_ranks(read_by, 2, two, True), strict=True):
        seen += itertools.chain(*steps)
    longer = ("train.seq_len=48", "train.global_batch=2", "train.micro_batches=2")
    while len(seen) < EPOCH:
        done = len(read_metrics(run)) and checkpoint.read_info(checkpoint.latest(run / "checkpoints"))["step"]
        seen += itertools.chain(*read_by(words_settings(run, data, f"train.steps={done + 2}", *longer), True))
    assert sorted(seen[:EPOCH]) == list(range(1, EPOCH + 1))
    said = re.findall(
        r"the last ([\d,]+) tokens of epoch 0 come in their old order, of windows of 16 tokens, cut into "
        r"sequences of 48"
        r"(?:; the last one has (\d+) tokens of padding)?",
        capsys.readouterr().err,
    )
    assert said
    assert all(-int(left.replace(",", "")) % 48 == int(padding or 0) for left, padding in said)
    info = checkpoint.Consumed.of(checkpoint.read_info(checkpoint.latest(run / "checkpoints")))
    assert info.tokens == len(seen) == [line["tokens"] for line in read_metrics(run) if "tokens" in line][-1]


def test_a_rollback_behind_a_change_of_batch_reads_nothing_twice_and_counts_what_stayed(
    begun: tuple[Path, list[int]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are made, 5 is refused: back to the checkpoint after 2, of another batch, and 3 to 5 are
    made again.
    """
    run = shutil.copytree(begun[0], tmp_path / "run")
    judged = itertools.count(1)
    monkeypatch.setattr(SpikeGuard, "accepts", lambda *_: next(judged) != 3)
    more = ("train.global_batch=4", "train.steps=5", "train.on_spike=rollback", "checkpoint.every=100")
    read = list(itertools.chain(*read_by(words_settings(run, data, *more), True)))
    assert len({*begun[1], *read}) == len(begun[1]) + len(read) == (2 * 6 + 6 * 4) * 16
    consumed = checkpoint.Consumed.of(checkpoint.read_info(run / "checkpoints/step-00000005"))
    assert consumed.tokens == (2 * 6 + 3 * 4) * 16
    assert consumed.sequences == 2 * 6 + 6 * 4


@pytest.fixture
def refusal(begun: tuple[Path, list[int]], data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The lines that refuse a resume with these settings; the run stays as it was."""

    def refusal(*overrides: str, data: Path = data, allow: str = "") -> list[str]:
        run = shutil.copytree(begun[0], tmp_path / "run")
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
        with pytest.raises(CheckpointError) as error:
            module.train(
                words_settings(run, data, "train.steps=3", *overrides), True, parse_allow(allow, True)
            )
        assert {
            p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts
        } == before
        shutil.rmtree(run)
        first, *lines = str(error.value).splitlines()
        assert first == f"{run}/checkpoints/step-00000002: its data and their order cannot go on"
        return lines

    return refusal


def test_what_cannot_go_on_is_refused_by_name(refusal: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("w1 w2 w3 w4")
    other = words_in_order(tmp_path, "other", 1)
    held = words_in_order(tmp_path, "held out", validation_sources=[tmp_path / "held.txt"])
    both = words_in_order(tmp_path, "both", 2, validation_sources=[tmp_path / "held.txt"])
    seed = "  run.seed=5: the samples come in another order than with the checkpoint's 0"
    train = "its train split is not the one (or not in the same shards) that the checkpoint was trained on"
    validation = "its validation split is not the checkpoint's, and may hold texts that were trained on"
    ask = "set it back, or go on all the same with --allow "
    assert refusal("run.seed=5") == [seed, f"{ask}seed"]
    assert refusal(data=other) == [f"  data.path={other}: {train}", f"{ask}data"]
    assert refusal(data=held) == [f"  data.path={held}: {validation}", f"{ask}validation"]
    named = [f"  data.path={both}: {train}", f"  data.path={both}: {validation}"]
    assert refusal("run.seed=5", data=both) == [seed, *named, f"{ask}seed,data,validation"]
    assert refusal("run.seed=5", data=both, allow="seed, data") == [named[1], f"{ask}validation"]


def test_what_is_allowed_goes_on_with_a_new_epoch_and_says_so(
    begun: tuple[Path, list[int]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(begun[0], tmp_path / "run")
    read = read_by(words_settings(run, data, "run.seed=5", "train.steps=9"), True, {"seed"})
    said = capsys.readouterr().err
    assert "  allowed: run.seed=5: the samples come in another order" in said
    assert "  the rest of the epoch is left out; the new order begins with epoch 1" in said
    flat = list(itertools.chain(*read))
    assert len(set(flat)) == len(flat) == 7 * 6 * 16  # no sample of the new order twice
    consumed = checkpoint.Consumed.of(checkpoint.read_info(run / "checkpoints/step-00000009"))
    assert (consumed.seed, consumed.epoch, consumed.read, consumed.tokens) == (5, 1, 7 * 6 * 16, 9 * 6 * 16)
    module.train(
        words_settings(run, data, "run.seed=5", "train.steps=10"), True
    )  # it is this run's own from now on


def test_a_checkpoint_that_does_not_say_what_it_read_goes_on_where_it_stood(
    begun: tuple[Path, list[int]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, seen = shutil.copytree(begun[0], tmp_path / "run"), begun[1]
    saved = run / "checkpoints/step-00000002"
    info = checkpoint.read_info(saved)
    del info["data"]
    checkpoint.write_info(saved, info)
    more = read_by(words_settings(run, data, "train.steps=5", "train.global_batch=12"), True)
    assert sorted([*seen, *itertools.chain(*more)][:EPOCH]) == list(range(1, EPOCH + 1))
    assert (
        "  the checkpoint does not say which data it was trained on, so they could not be compared"
        in capsys.readouterr().err
    )


def test_an_unchanged_resume_says_nothing(
    begun: tuple[Path, list[int]], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_by(load_settings(begun[0] / "settings.toml"), True)
    told = capsys.readouterr().err
    assert "with changes" not in told
    assert f"note: data.path={data} holds nothing out: this run is not validated" in told


def test_a_change_of_beta2_at_a_resume_counts_from_there_on(
    begun: tuple[Path, list[int]], data: Path, tmp_path: Path
) -> None:
    """Rows that are not touched any more keep, in the checkpoint, the moments of their own steps."""
    run = shutil.copytree(begun[0], tmp_path / "run")
    scalars = checkpoint.read_info(run / "checkpoints/step-00000002")["table_scalars"]
    assert (scalars["beta2"], scalars["beta2_since"]) == (0.95, 0)
    before = checkpoint.StoredTensors(run / "checkpoints/step-00000002")
    module.train(words_settings(run, data, "train.steps=3", "engram.beta2=0.5"), True)
    saved = run / "checkpoints/step-00000003"
    scalars, after = checkpoint.read_info(saved)["table_scalars"], checkpoint.StoredTensors(saved)
    assert (scalars["beta2"], scalars["beta2_since"]) == (0.5, 2)
    assert scalars["weight_before"] == pytest.approx(1 - 0.95**2)
    v, last, rows = ("table.state.v", "table.state.last", after.shapes["table.state.v"][0])
    untouched = after.read(last, 0, rows) == 2
    assert untouched.any()
    aged = before.read(v, 0, rows) * 0.95 ** (2 - before.read(last, 0, rows)).double()
    assert after.read(v, 0, rows)[untouched].tolist() == pytest.approx(aged[untouched].tolist(), rel=1e-6)


def test_names_that_cannot_be_allowed_are_refused() -> None:
    assert parse_allow(" seed,validation,", True) == {"seed", "validation"}
    with pytest.raises(
        Exception, match="--allow sed,data: sed cannot be allowed; it may be seed, data, validation"
    ):
        parse_allow("sed,data", True)
    with pytest.raises(
        Exception, match="--allow data says what a resumed run may do; it goes with --resume or --auto-resume"
    ):
        parse_allow("data", False)


def test_folders_that_cannot_be_written_to_are_refused_before_anything_is_made(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError) as error:
        module.train(words_settings(tmp_path / "file", data, f"checkpoint.dir={tmp_path / 'file/below'}"))
    assert error.value.problems == [
        f"run.dir={tmp_path / 'file'}: {tmp_path / 'file'} is not a folder; choose another run.dir",
        f"checkpoint.dir={tmp_path / 'file/below'}: {tmp_path / 'file'} is not a folder; choose another "
        "checkpoint.dir",
    ]


def test_the_command_takes_what_is_allowed_to_the_ranks(
    begun: tuple[Path, list[int]], tmp_path: Path
) -> None:
    run = shutil.copytree(begun[0], tmp_path / "run")
    arguments = [run / "settings.toml", f"run.dir={run}", "run.seed=5", "train.steps=3"]
    assert "--allow seed says what a resumed run may do" in refused(
        hybridtrain("train", *arguments, "--allow", "seed")
    )
    outcome = hybridtrain("launch", *arguments, "--resume", "--allow", "seed")
    assert outcome.status == 0, outcome
    assert checkpoint.Consumed.of(checkpoint.read_info(run / "checkpoints/step-00000003")).seed == 5


def test_a_reshard_with_other_settings_hides_nothing_of_what_was_read(
    begun: tuple[Path, list[int]], tmp_path: Path
) -> None:
    run = shutil.copytree(begun[0], tmp_path / "run")
    info = checkpoint.read_info(run / "checkpoints/step-00000002")
    reshard(run, tmp_path / "out", ["run.seed=5", "train.seq_len=20", "engram.beta2=0.5"], nproc=1)
    moved = checkpoint.read_info(tmp_path / "out/checkpoints/step-00000002")
    assert (moved["data"], moved["table_scalars"]["beta2"]) == (info["data"], 0.95)
    with pytest.raises(
        CheckpointError, match=r"run\.seed=5: the samples come in another order than with the checkpoint's 0"
    ):
        module.train(load_settings(tmp_path / "out/settings.toml", ["train.steps=3"]), True)
