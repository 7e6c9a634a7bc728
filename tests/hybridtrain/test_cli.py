"""The console command: what a user can mend is one message on stderr and status 2; what it prints and writes
otherwise.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.settings.load import load_settings
from tests.console import hybridtrain, refused
from tests.training import CI, ci_settings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train.stepz=5", 'train.seq_len="long"', "model.moe.top_k=9", "modle.dim=3"],
            [
                f"error: {CI}: ",
                "  train.stepz: unknown key; did you mean train.steps?",
                "  modle: unknown key; did you mean model?",
                '  train.seq_len="long": input should be a valid integer',
            ],
        ),
        (["model.moe.top_k=9"], ["  model.moe.top_k=9 exceeds num_experts=8; it may be 1 to 8"]),
        (
            ["train.steps"],
            ['  "train.steps" is not an override; write section.key=value, e.g. train.steps=50'],
        ),
        (["train.steps=0"], ["  train.steps=0: input should be greater than or equal to 1"]),
        (
            ["parallel.dp_shard=2", "parallel.ep=3"],
            [
                "error: layout does not fit 1 rank",
                "  parallel: dp_shard 2 = 2 ranks, not 1; set dp_shard=1 or dp_shard=-1",
                "  parallel.ep=3 does not divide dp_shard x cp x tp = 2; ep may be 1 or 2",
            ],
        ),
    ],
    ids=["several at once", "contradiction", "no override", "out of range", "layout"],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    message = refused(hybridtrain("train", CI, f"run.dir={tmp_path / 'run'}", *arguments))
    lines = message.splitlines()
    for line in expected:
        assert any(found.startswith(line) for found in lines), message
    assert not (tmp_path / "run").exists()


def test_launch_refuses_before_any_rank_starts(tmp_path: Path) -> None:
    message = refused(
        hybridtrain(
            "launch", "--nproc", 3, CI, f"run.dir={tmp_path / 'run'}", "parallel.ep=2", "parallel.mem=2"
        )
    )
    assert message.splitlines() == [
        "error: layout does not fit 3 ranks",
        "  parallel.ep=2 does not divide dp_shard x cp x tp = 3; ep may be 1 or 3",
        "  parallel.mem=2 does not divide the 3 ranks; mem may be -1, 1 or 3",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read: No such file or directory"), ("[train\nsteps = 1", "is not TOML: ")],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_text(content)
    assert f"error: {path}: 1 problem(s)\n  {expected}" in refused(hybridtrain("train", path))


def test_wrong_usage_and_help() -> None:
    assert hybridtrain("train").status == 2
    assert hybridtrain("fly").status == 2
    outcome = hybridtrain("--help")
    assert outcome.status == 0
    for command in ("train", "launch", "data", "engram", "eval", "generate"):
        assert command in outcome.out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["kernels", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    command = f"""
import sys
from hybridtrain.cli import main
try:
    sys.argv = ["hybridtrain", *{arguments!r}]
    main()
except SystemExit:
    pass
print({{name.partition(".")[0] for name in sys.modules}} & {{"torch", "transformers", "pyarrow"}})
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_the_console_script_and_the_module_are_the_command() -> None:
    for command in (
        [str(Path(sys.executable).with_name("hybridtrain"))],
        [sys.executable, "-m", "hybridtrain"],
    ):
        done = subprocess.run(
            [*command, "train", "/no/such.toml"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert (
            done.stderr == "error: /no/such.toml: 1 problem(s)\n  cannot be read: No such file or directory\n"
        )
        assert done.stdout == ""


def test_engram_sizes_a_table() -> None:
    arguments = [
        "engram",
        "--rows-per-head",
        100,
        "--heads",
        2,
        "--orders",
        "2,3",
        "--dim",
        5,
        "--layers",
        "1,4",
    ]
    sized = json.loads(hybridtrain(*arguments, "--json").out)
    # the first eight primes from 100 on, each head its own
    assert [layer["primes"] for layer in sized["layers"]] == [
        {"2": [101, 103], "3": [107, 109]},
        {"2": [113, 127], "3": [131, 137]},
    ]
    assert (sized["rows"], sized["parameters"], sized["bytes"]["rows_fp32"]) == (928, 928 * 5, 928 * 5 * 4)
    assert "928" in hybridtrain(*arguments).out
    assert '--orders "2;3" is not a list of integers; write e.g. 2,3' in refused(
        hybridtrain(*arguments, "--orders", "2;3")
    )


def test_the_run_folder_is_complete(trained: Callable[..., Path], ci_data: Path) -> None:
    run = trained(2, "parallel.ep=2", "parallel.mem=2")
    assert {p.name for p in run.iterdir()} == {
        "settings.toml",
        "tokenizer.json",
        "compression.npy",
        "addressing.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "summary.json",
    }
    assert load_settings(run / "settings.toml") == ci_settings(
        run, ci_data, "parallel.ep=2", "parallel.mem=2"
    )
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "latest",
        "step-00000010",
        "step-00000020",
    ]

    summary = json.loads((run / "summary.json").read_text())
    lines = read_metrics(run)
    assert summary["steps"] == 20
    assert summary["tokens"] == 20 * 24 * 80  # steps, sequences and tokens of ci.toml
    assert summary["train_loss"] == lines[-2]["loss"]
    assert summary["validation_loss"] == lines[-1]["validation_loss"]
    assert summary["validation_perplexity"] == pytest.approx(math.exp(summary["validation_loss"]))
    assert 0 < summary["validation_bits_per_byte"] < 8
    assert summary["tokens_per_second"] > 0
    primes = json.loads((run / "addressing.json").read_text())["primes"]
    assert summary["params_table"] == 12 * sum(rows for layer in primes for order in layer for rows in order)
    assert summary["params_table"] < summary["params_total"]
    assert summary["params_active"] < summary["params_total"]
    assert (summary["world"], summary["layout"]) == (2, "dp_shard 2 · ep 2 · mem 2")

    first = lines[0]
    assert sum(first["layers.1/expert_load"]) == pytest.approx(1.0)
    assert len(first["layers.1/expert_load"]) == 8
    assert 1 <= first["layers.1/expert_load_max_over_mean"] <= 8
    assert 0 < first["layers.1/gate_mean"] < 1
    assert 0 < first["table/unique_share"] < 1
    assert first["table/lookups"] == 12 * 80 * 2 * 8  # this rank's tokens, Engram layers, slots
    assert first["bytes/mem"] > 0
    assert first["bytes/ep"] > 0
    assert {
        f"seconds/{p}" for p in ("data", "fetch", "forward", "backward", "push", "reduce", "optimizer")
    } <= first.keys()


def test_eval_and_generate(trained: Callable[..., Path], ci_data: Path, tmp_path: Path) -> None:
    run = trained(2, "parallel.ep=2", "parallel.mem=2")
    outcome = hybridtrain("eval", run, "--json")
    assert outcome.status == 0, outcome
    values = json.loads(outcome.out)
    lines = [line for line in read_metrics(run) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [10, 20]
    assert values["loss"] == pytest.approx(
        lines[1]["validation_loss"], rel=1e-6
    )  # one rank's sum and two ranks'
    assert values["tokens"] == lines[1]["validation_tokens"]
    # during the run over train.eval_batches global batches
    during = json.loads(hybridtrain("eval", run / "checkpoints/step-00000010", "--batches", 2, "--json").out)
    assert during["loss"] == pytest.approx(lines[0]["validation_loss"], rel=1e-6)
    assert during["tokens"] == lines[0]["validation_tokens"] == 2 * 24 * 80
    assert (
        f"loss             {during['loss']:.6g}"
        in hybridtrain("eval", run / "checkpoints/step-00000010", "--batches", 2).out
    )

    arguments = ["generate", run, "--prompt", "The people", "--tokens", 12]
    first, again, other = (hybridtrain(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first.out.startswith("The people")
    assert len(first.out) > len("The people\n")
    assert first.out == again.out != other.out
    assert (
        hybridtrain(*arguments, "--temperature", 0).out
        == hybridtrain(*arguments, "--temperature", 0, "--seed", 3).out
    )
    assert first.err == ""

    assert f"{tmp_path} is neither a run folder with a finished checkpoint nor a checkpoint" in refused(
        hybridtrain("eval", tmp_path)
    )
    assert '--split "test": it may be train or validation' in refused(
        hybridtrain("eval", run, "--split", "test")
    )


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    name = tmp_path / ("x" * 300)
    message = refused(hybridtrain("import", name, tmp_path / "out"))
    assert message.startswith(f"error: {name}")
    assert message.endswith(": File name too long\n")
