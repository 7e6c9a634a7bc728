"""Training runs for tests: the shipped ci configuration on a small slice of the shipped texts, on any number of ranks."""

from __future__ import annotations

import errno
import json
import lzma
import os
import signal
from importlib import resources
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hybridtrain.config import load_settings
from hybridtrain.data.prepare import prepare
from hybridtrain.metrics import read_metrics
from hybridtrain.run_folder import RunFolder
from hybridtrain.settings import Settings
from tests.ranks import run_on_ranks

CI = Path(__file__).parents[1] / "configs" / "ci.toml"


def make_data(out: Path, documents: int = 12, paragraphs: int = 3) -> Path:
    """A data folder of a few shipped texts, cut into short documents so that most windows hold several; vocabulary 1024."""
    shipped = resources.files("hybridtrain.data") / "corpus" / "sotu.jsonl.xz"
    texts = [json.loads(line)["text"] for line in lzma.decompress(shipped.read_bytes()).decode().splitlines()[:documents]]
    source = out.with_suffix(".jsonl")
    with source.open("w", encoding="utf-8") as file:
        for text in texts:
            lines = text.split("\n")
            for i in range(0, len(lines), paragraphs):
                file.write(json.dumps({"text": "\n".join(lines[i : i + paragraphs])}) + "\n")
    prepare([source], out, vocab_size=1024, validation_fraction=0.1, progress=False)
    return out


def ci_settings(run_dir: Path, data: Path, *overrides: str) -> Settings:
    return load_settings(CI, [f"run.dir={run_dir}", f"data.path={data}", "data.source=[]", *overrides])


def train_here(settings: Settings, resume: bool) -> dict[str, Any]:
    """On a rank: `hybridtrain train`, which starts its own process groups or, alone, none."""
    from hybridtrain.train import train

    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    return train(settings, resume)


def train_on(nproc: int, settings: Settings, resume: bool = False, timeout: float = 120) -> list[dict[str, Any]]:
    """Every rank's summary of the run."""
    return run_on_ranks(train_here, nproc, settings, resume, timeout=timeout)


def loss_curve(run_dir: Path) -> list[float]:
    """The training loss of every step, exactly as written."""
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def train_and_kill(settings: Settings, resume: bool, rank: int, step: int, during: str) -> None:
    """On a rank of the launcher: train, and end this rank by SIGKILL in step `step` (from 1), or SIGTERM it as a user would.

    `during`: "step" and "save" kill it at the start of that step or of the checkpoint after it; "sigterm" signals it.
    """
    from hybridtrain import train as module

    real_step, real_save = module.train_step, RunFolder.save

    def train_step(parts: Any, number: int, *rest: Any) -> Any:
        if number + 1 == step and parts.mesh.rank == rank and during != "save":
            os.kill(os.getpid(), signal.SIGKILL if during == "step" else signal.SIGTERM)
        return real_step(parts, number, *rest)

    def save(folder: Any, parts: Any, done: int) -> None:
        if done == step and parts.mesh.rank == rank and during == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(folder, parts, done)

    module.train_step = train_step  # type: ignore[assignment]
    RunFolder.save = save  # type: ignore[assignment,method-assign]
    module.train(settings, resume)


def train_on_a_full_disk(settings: Settings, rank: int, step: int) -> None:
    """On a rank of the launcher: train; rank `rank` cannot write its part of the checkpoint after `step` steps."""
    from torch.distributed.checkpoint import FileSystemWriter

    from hybridtrain.train import train

    real = FileSystemWriter.write_data

    def write_data(self: Any, *rest: Any) -> Any:
        if dist.get_rank() == rank and f"{step:08d}" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *rest)

    FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    train(settings)
