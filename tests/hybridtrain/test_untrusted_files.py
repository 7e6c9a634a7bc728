"""No file of a folder that somebody sent runs code: every command, with every file that it reads replaced by
a pickle.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint.files import METADATA
from hybridtrain.errors import UserError
from hybridtrain.files.durable import file_record
from hybridtrain.formats.command import ExportOptions, export_model, import_model
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.reshard import reshard
from hybridtrain.run.generate import evaluate_checkpoint, generate_text
from hybridtrain.run.loop import train
from hybridtrain.run.run_folder import SETTINGS, find_checkpoint
from hybridtrain.settings.load import load_settings
from tests.fuzz.harness import Trap
from tests.training import TINY, ci_settings

NO_ENGRAM = 'model.layers=["attention+moe", "attention+dense"]'
STEPS = ("train.steps=2", "checkpoint.every=1", "checkpoint.table_full_every=2", "data.verify=false")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on what the machine could do."""
    monkeypatch.setattr("hybridtrain.run.report.measure_matmul_peak", lambda _: 1e12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> dict[str, Path]:
    """Finished runs of two steps, with an engram (its second checkpoint is an incremental one) and without.
    Read only.
    """
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("engram", ()), ("plain", (NO_ENGRAM, "model.moe.bias_rate=0.0"))):
        settings = ci_settings(root / name, ci_data, *TINY, *STEPS, *more)
        train(settings)
    return {name: root / name for name in ("engram", "plain")}


def resume(run: Path, out: Path) -> Any:
    return train(load_settings(out / SETTINGS, [f"run.dir={run}"]), resume=True)


def init_from(run: Path, out: Path) -> Any:
    return train(
        load_settings(out / SETTINGS, [f"run.dir={out / 'new'}", "train.steps=1", f"train.init_from={run}"])
    )


READERS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "eval": ("engram", lambda run, out: evaluate_checkpoint(run, "validation", None, 1)),
    "generate": ("engram", lambda run, out: generate_text(run, "The", 1, 0.0, 0, 0)),
    "export to hf": (
        "engram",
        lambda run, out: export_model(run, out / "hf", ExportOptions("hf", dtype="float32")),
    ),
    "export to megatron": (
        "plain",
        lambda run, out: export_model(run, out / "m", ExportOptions("megatron", dtype="float32")),
    ),
    "reshard": ("engram", lambda run, out: reshard(run, out / "resharded")),
    "train.init_from": ("engram", init_from),
    "--resume": ("engram", resume),
}
NOT_READ = ("addressing.json", "tensorboard")


def seal(run: Path) -> None:
    """Write every `checkpoint.json` anew, so that all checksums are right."""
    seals: dict[str, str] = {}
    for saved in sorted((run / "checkpoints").glob("step-*")):
        info = checkpoint.read_info(saved)
        files = {name: vars(file_record(saved / name)) for name in info["files"]}
        base = {"base": info["base"] | {"xxh3": seals[info["base"]["name"]]}} if "base" in info else {}
        seals[saved.name] = checkpoint.write_info(saved, info | base | {"files": files})


def hidden(folder: Path, trap: Trap) -> bytes:
    """The folder's own index, with the trap in a place that nobody looks at."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    return pickle.dumps(replace(metadata, planner_data={"x": [trap]}))


def in_an_archive(folder: Path, file: str, trap: Trap) -> bytes:
    """A file of tensors, in whose largest chunk an archive of torch holds the trap."""
    places = pickle.loads((folder / METADATA).read_bytes()).storage_data.values()
    place = max((p for p in places if p.relative_path == file), key=lambda p: p.length)
    archive, content = io.BytesIO(), bytearray((folder / file).read_bytes())
    torch.save(trap, archive)
    content[place.offset : place.offset + place.length] = archive.getvalue().rjust(place.length, b"\0")
    return bytes(content)


def traps(root: Path, folder: Path, trap: Trap) -> dict[str, tuple[Path, bytes]]:
    """What to replace in a copy of `root`, by name: each file by the trap, each index and file of tensors
    also by one around it.
    """
    out = {
        str(path.relative_to(root)): (path.relative_to(root), pickle.dumps(trap)) for path in files_of(root)
    }
    for index in folder.rglob(METADATA):
        below = index.parent.relative_to(root)
        out[f"hidden in {below / METADATA}"] = below / METADATA, hidden(index.parent, trap)
        for file in sorted(index.parent.glob("*.distcp")):
            out[f"in an archive in {below / file.name}"] = (
                below / file.name,
                in_an_archive(index.parent, file.name, trap),
            )
    return out


def files_of(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not set(path.relative_to(root).parts) & set(NOT_READ)
    )


def harmless(act: Callable[[], Any], trap: Trap, where: str) -> bool:
    """Whether `act` went through; fails where it ran the trap, or ended by anything but a message."""
    message = "-"
    try:
        act()
    except (UserError, LayoutError) as error:
        message = str(error)
    assert message.strip(), where
    assert not trap.sprang, where
    return message == "-"


@pytest.mark.parametrize("name", READERS)
def test_no_file_of_a_run_folder_runs_code(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    which, read = READERS[name]
    trap, went_through = Trap(tmp_path / "sprung"), set()
    shutil.copy(runs[which] / SETTINGS, tmp_path / SETTINGS)
    for number, (what, (file, content)) in enumerate(
        traps(runs[which], runs[which] / "checkpoints", trap).items()
    ):
        run, out = Path(shutil.copytree(runs[which], tmp_path / f"run-{number}")), tmp_path / f"out-{number}"
        (run / file).write_bytes(content)
        if file.name != checkpoint.INFO and "checkpoints" in file.parts:
            seal(run)
        out.mkdir()
        shutil.copy(runs[which] / SETTINGS, out / SETTINGS)
        if harmless(lambda run=run, out=out: read(run, out), trap, f"{name}: {what}"):  # type: ignore[misc]
            went_through.add(what)
    last = Path("checkpoints") / "step-00000002"
    read_by_all = {str(last / METADATA), f"hidden in {last / METADATA}", str(last / checkpoint.INFO)}
    assert name == "--resume" or not went_through & read_by_all  # a resume takes the checkpoint before
    assert not trap.sprang


@pytest.mark.parametrize("file", [METADATA, "__0_0.distcp", checkpoint.INFO])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    file: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["plain"], tmp_path / "run"))
    saved = find_checkpoint(run)[1]
    (saved / file).unlink()
    os.mkfifo(saved / file)
    with pytest.raises(
        UserError, match=rf"{re.escape(file)}.* is not a regular file|{re.escape(file)} is missing"
    ):
        evaluate_checkpoint(run, "validation", None, 1)


def test_the_traps_would_run_where_they_were_unpickled(runs: dict[str, Path], tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    pickle.loads(hidden(find_checkpoint(runs["plain"])[1], trap))
    assert trap.sprang


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_no_file_of_anothers_folder_runs_code(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    trap, went_through = Trap(tmp_path / "sprung"), set()
    whole = tmp_path / "whole"
    export_model(runs["plain"], whole, ExportOptions(kind, dtype="float32"))
    for number, (what, (file, content)) in enumerate(traps(whole, whole, trap).items()):
        folder = Path(shutil.copytree(whole, tmp_path / f"folder-{number}"))
        (folder / file).write_bytes(content)
        out = tmp_path / f"imported-{number}"
        if harmless(
            lambda folder=folder, out=out: import_model(folder, out, None, None, None, None), trap, what
        ):  # type: ignore[misc]
            went_through.add(what)
    # a generation config is passed on, and names in Megatron's index may be foreign ones
    passed = {
        "hf": {"generation_config.json", "tokenizer_config.json", "special_tokens_map.json"},
        "megatron": {"hidden in release/.metadata"},
    }
    assert went_through <= passed[kind]
