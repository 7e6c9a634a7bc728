"""Runs that are cut off, stopped or moved to other ranks go on as if nothing had happened; what cannot go on
says why.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.launch.local import run_ranks
from hybridtrain.run.generate import open_checkpoint
from tests.console import hybridtrain, refused
from tests.ranks import PRELOAD
from tests.training import CI, ci_settings, loss_curve, train_on

TWO = ("parallel.ep=2", "parallel.mem=2")


def launch(settings: object, resume: bool, rank: int, step: int, during: str) -> int:
    return run_ranks(
        "tests.training:train_and_kill", (settings, resume, rank, step, during), 2, threads=1, preload=PRELOAD
    )


def assert_same_end(run: Path, reference: Path) -> None:
    """Bitwise the same loss at every step, parameters and table."""
    assert loss_curve(run) == loss_curve(reference)
    states = []
    for folder in (run, reference):
        opened, _, _ = open_checkpoint(folder)
        assert opened.table is not None
        table = {f"table.{k}": v for k, v in opened.table.state().items()}
        states.append(opened.model.state_dict() | table)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_killed_in_a_step_and_in_a_save_a_run_resumes_bitwise(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, *TWO)
    step = random.Random(1).randint(11, 19)
    assert launch(settings, False, 1, step, "step") == 128 + 9
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000010"]

    assert (
        launch(settings, True, 0, 20, "save") == 128 + 9
    )  # resumed, and killed when rank 0 begins the last checkpoint
    assert checkpoint.latest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000010"

    assert [s["steps"] for s in train_on(2, settings, resume=True)] == [20, 20]
    assert_same_end(tmp_path / "run", trained(2, *TWO))
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(ci_data: Path, tmp_path: Path) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, *TWO)
    assert launch(settings, False, 0, 3, "step") == 128 + 9
    arguments = [CI, f"run.dir={tmp_path / 'run'}", f"data.path={ci_data}"]
    message = refused(hybridtrain("train", *arguments, "--resume"))
    assert (
        f"{tmp_path / 'run/checkpoints'}: no finished checkpoint to resume from; start without --resume"
        in message
    )


def test_auto_resume_goes_on_where_there_is_a_checkpoint(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained(1), tmp_path / "run")
    outcome = hybridtrain("train", CI, f"run.dir={run}", f"data.path={ci_data}", "--auto-resume")
    assert outcome.status == 0, outcome
    assert f"{run} has done 20 steps of train.steps=20: nothing is left to do" in outcome.out


def test_a_signal_stops_cleanly_and_the_run_resumes_bitwise(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, *TWO)
    step = random.Random(2).randint(3, 7)
    assert launch(settings, False, 1, step, "sigterm") == 0
    assert checkpoint.latest(tmp_path / "run/checkpoints") == tmp_path / f"run/checkpoints/step-{step:08d}"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["stopped"]) == (step, True)

    train_on(2, settings, resume=True)
    assert_same_end(tmp_path / "run", trained(2, *TWO))
    assert json.loads((tmp_path / "run/summary.json").read_text())["stopped"] is False


def at_step_10(source: Path, target: Path) -> Path:
    """A copy of the run as it was after step 10."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints/step-00000020")
    (target / "checkpoints/latest").write_text("step-00000010")
    return target


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path, before: int, after: int
) -> None:
    layouts = {1: (), 2: TWO}
    run = at_step_10(trained(before, *layouts[before]), tmp_path / "run")
    train_on(after, ci_settings(run, ci_data, *layouts[after]), resume=True)
    assert loss_curve(run)[:10] == loss_curve(trained(before, *layouts[before]))[:10]
    # a sample in another place, or a moment that was lost, changes the loss by 1e-3 and more
    assert loss_curve(run) == pytest.approx(loss_curve(trained(before, *layouts[before])), rel=1e-5)


@pytest.fixture
def resumable(trained: Callable[..., Path], ci_data: Path, tmp_path: Path) -> Callable[..., str]:
    """`resumable(*overrides)`: the refusal when a run at step 10 is resumed with other settings."""
    run = at_step_10(trained(1), tmp_path / "run")

    def resume(*overrides: str, resume: bool = True) -> str:
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
        arguments = [
            CI,
            f"run.dir={run}",
            f"data.path={ci_data}",
            "data.source=[]",
            *overrides,
            *(["--resume"] if resume else []),
        ]
        message = refused(hybridtrain("train", *arguments))
        after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
        assert after == before  # a refusal leaves the run as it was
        return message

    return resume


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(
    resumable: Callable[..., str], tmp_path: Path
) -> None:
    message = resumable(
        "model.dim=32",
        'model.layers=["engram+attention+moe"]',
        "engram.heads=2",
        'optim.backbone="muon"',
        "engram.beta2=0.9",
    )
    lines = message.splitlines()
    assert lines[0] == f"error: {tmp_path / 'run/checkpoints/step-00000010'} is a checkpoint of another model"
    assert lines[1:] == [
        "  model.dim: the checkpoint has 48, the settings say 32",
        '  model.layers: the checkpoint has ["attention+dense", "engram+attention+moe", "attention+moe", '
        '"engram+attention+dense"], the settings say ["engram+attention+moe"]',
        "  engram.heads: the checkpoint has 4, the settings say 2",
        '  optim.backbone: the checkpoint has "adamw", the settings say "muon"',
    ]


def test_other_primes_of_the_same_size_are_refused(resumable: Callable[..., str]) -> None:
    assert "engram: the checkpoint's multipliers, primes or compression map differ" in resumable(
        "engram.hash_seed=7"
    )


def test_a_new_run_does_not_overwrite_an_old_one(resumable: Callable[..., str]) -> None:
    message = resumable(resume=False)
    assert (
        "holds a run with the checkpoint step-00000010; go on with --resume or choose another run.dir"
        in message
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda data: flip(data / "train-00000.tokens"), "train-00000.tokens: is damaged (xxh3"),
        (lambda data: (data / "train-00000.tokens").unlink(), "train-00000.tokens: is missing"),
        (
            lambda data: flip(data / "tokenizer.json"),
            "tokenizer.json: is not the one this data was made with",
        ),
        (shutil.rmtree, "no such data folder; make it with `hybridtrain data SOURCE --out"),
    ],
    ids=["damaged shard", "missing shard", "changed tokenizer", "no data"],
)
def test_data_that_cannot_be_used_is_refused(
    ci_data: Path, tmp_path: Path, harm: Callable[[Path], None], expected: str
) -> None:
    data = shutil.copytree(ci_data, tmp_path / "data")
    harm(data)
    arguments = [CI, f"run.dir={tmp_path / 'run'}", f"data.path={data}", "data.source=[]"]
    assert expected in refused(hybridtrain("train", *arguments))


def test_another_tokenizer_is_refused(resumable: Callable[..., str], ci_data: Path, tmp_path: Path) -> None:
    from hybridtrain.data.prepare import prepare

    prepare([ci_data.with_suffix(".jsonl")], tmp_path / "other", vocab_size=900, progress=False)
    message = resumable(f"data.path={tmp_path / 'other'}")
    assert "tokenizer.json is another tokenizer than the one this run was trained with" in message


def test_another_token_before_each_document_is_refused(
    resumable: Callable[..., str], ci_data: Path, tmp_path: Path
) -> None:
    from hybridtrain.data.prepare import prepare

    source, tokenizer = ci_data.with_suffix(".jsonl"), ci_data / "tokenizer.json"
    other = prepare(
        [source], tmp_path / "other", tokenizer=tokenizer, separator="ÿ", progress=False
    )  # byte 255: in no text
    message = resumable(f"data.path={tmp_path / 'other'}")
    assert (
        f"separator: the checkpoint has token 0 before each document, the data {other.separator_id}"
        in message
    )


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda c: cut_in_half(c / "__0_0.distcp"), "__0_0.distcp: is damaged: it has "),
        (lambda c: flip(c / "__0_0.distcp"), "__0_0.distcp: is damaged: it has "),
        (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp: is missing; it had "),
        (lambda c: (c / ".metadata").unlink(), ".metadata: is missing; it had "),
        (lambda c: cut_in_half(c / "checkpoint.json"), "checkpoint.json is damaged"),
        (lambda c: (c / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    ],
    ids=["truncated", "flipped", "missing part", "no metadata", "truncated info", "no info"],
)
def test_a_damaged_checkpoint_is_refused(
    trained: Callable[..., Path],
    tmp_path: Path,
    resumable: Callable[..., str],
    harm: Callable[[Path], None],
    expected: str,
) -> None:
    harm(tmp_path / "run/checkpoints/step-00000010")
    message = resumable()
    assert expected in message
    assert str(tmp_path / "run/checkpoints") in message


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained(1), tmp_path / "run")
    last, before = (run / f"checkpoints/step-000000{step}" for step in (20, 10))
    flip(last / "__0_0.distcp")
    arguments = [CI, f"run.dir={run}", f"data.path={ci_data}", "data.source=[]", "--resume"]
    outcome = hybridtrain("train", *arguments)
    assert outcome.status == 0, outcome.err
    record = checkpoint.read_info(trained(1) / "checkpoints/step-00000020")["files"]["__0_0.distcp"]
    assert re.search(
        rf"{last} cannot be used\n  {last}/__0_0.distcp: is damaged: it has {record['size']} bytes with "
        rf"xxh3 (?!{record['xxh3']})[0-9a-f]{{32}}, must have {record['size']} with xxh3 {record['xxh3']}\n"
        rf"going on from {before}, the one before",
        outcome.err,
    ), outcome.err
    assert_same_end(run, trained(1))

    for path in (last, before):
        flip(path / ".metadata")
    message = refused(hybridtrain("train", *arguments))
    assert message.startswith(f"error: {run}/checkpoints: no good checkpoint to resume from\n")
    for path in (last, before):
        assert f"{path} cannot be used\n  {path}/.metadata: is damaged: it has " in message


def test_a_run_that_saves_in_the_background_elsewhere_and_in_parts_is_the_same(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    ways = (
        "checkpoint.background=true",
        "checkpoint.table_full_every=3",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
    )
    settings = ci_settings(
        tmp_path / "run",
        ci_data,
        *TWO,
        *ways,
        "checkpoint.keep_every=6",
        f"checkpoint.dir={tmp_path / 'there'}",
    )
    assert launch(settings, False, 1, 10, "sigterm") == 0
    assert checkpoint.latest(tmp_path / "there") == tmp_path / "there/step-00000010"
    train_on(2, settings, resume=True)
    assert_same_end(tmp_path / "run", trained(2, *TWO))
    assert not (tmp_path / "run/checkpoints").exists()
    # whole ones after 2, 8, 14 and 20 steps: an incremental one keeps its base, 6 that of 2 and 12 that of 8
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == [
        "latest", *(f"step-000000{step:02d}" for step in (2, 6, 8, 12, 14, 18, 20))
    ]  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """Mount a file system of that size there; False where that is not permitted."""
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "disk/run"
    with small_disk(tmp_path / "disk", "8m") as mounted:  # a checkpoint has 4.8 MiB
        if not mounted:
            pytest.skip(
                "mounting a small file system is not permitted here; the next test fakes the full disk"
            )
        message = refused(hybridtrain("train", CI, f"run.dir={run}", f"data.path={ci_data}"))
        assert f"{run}/checkpoints/step-00000020: the checkpoint of step 20 could not be written (" in message
        assert f"the last good one stays: {run}/checkpoints/step-00000010" in message
        assert "rank 0: " in message
        assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["latest", "step-00000010"]
        shutil.copytree(run, tmp_path / "moved")
    train_on(1, ci_settings(tmp_path / "moved", ci_data), resume=True)
    assert_same_end(tmp_path / "moved", trained(1))


def test_a_disk_that_is_full_on_one_rank_ends_all_with_one_message(
    ci_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, "checkpoint.every=2", "train.steps=6", *TWO)
    assert (
        run_ranks("tests.training:train_on_a_full_disk", (settings, 1, 4), 2, threads=1, preload=PRELOAD) == 2
    )
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert (
        f"error: {tmp_path}/run/checkpoints/step-00000004: the checkpoint of step 4 could not be written ("
        in err
    )
    assert f"the last good one stays: {tmp_path}/run/checkpoints/step-00000002" in err
    assert "rank 1: " in err
    assert "No space left on device" in err
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["latest", "step-00000002"]


def test_a_save_in_the_background_that_fails_ends_all_ranks_after_the_same_step(
    ci_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = ("checkpoint.background=true", "checkpoint.every=20", "train.steps=500", "train.eval_every=0")
    settings = ci_settings(tmp_path / "run", ci_data, *ways, *TWO)
    assert (
        run_ranks("tests.training:train_on_a_full_disk", (settings, 1, 20), 2, threads=1, preload=PRELOAD)
        == 2
    )
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert (
        f"error: {tmp_path}/run/checkpoints/step-00000020: the checkpoint of step 20 could not be written ("
        in err
    )
    assert "the last good one stays: none\n  rank 1: OSError: [Errno 28] No space left on device" in err
    assert 20 < len(loss_curve(tmp_path / "run")) < 40  # it did not wait for the next one
    assert not list((tmp_path / "run/checkpoints").iterdir())
