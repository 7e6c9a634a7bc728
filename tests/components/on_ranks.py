"""What every component keeps to on several ranks and over a restart, as checks of what its runs came to; each
raises AssertionError where it does not.

One start of ranks makes all runs (`evidence_of`, `restarts_of`): of a tiny model around each component. On
two ranks every parameter is drawn anew, so that nothing is zero or one.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.checkpoint import StoredTensors
from hybridtrain.data.batches import BatchLoader, BatchShare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import FormatError
from hybridtrain.formats.command import ExportOptions, export_model, import_model
from hybridtrain.model.component import Engram, FeedForward, Mixer, Parameter, Residual
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.init import draw
from hybridtrain.model.registry import BUILT_IN, allowing
from hybridtrain.parallel.apply import write_local
from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.mesh import Mesh, make_mesh
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.run_folder import find_checkpoint
from hybridtrain.run.step import StepInput, train_step
from hybridtrain.settings.tree import Settings
from tests.components.contract import DIM, Case
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, complete_gradients

AXES = {
    "tp": ("parallel.tp=2",),
    "cp": ("parallel.cp=2",),
    "pp": ("parallel.pp=2",),
    "ep": ("parallel.ep=2", "parallel.mem=2"),
}
PAIRS = {
    "tp cp": ("parallel.tp=2", "parallel.cp=2"),
    "pp tp": ("parallel.pp=2", "parallel.tp=2"),
    "pp cp": ("parallel.pp=2", "parallel.cp=2"),
    "tp ep": ("parallel.tp=2", "parallel.ep=4"),
    "cp ep": ("parallel.cp=2", "parallel.ep=4", "parallel.mem=2"),
}
"""Of four ranks."""
OUTSIDE = ("examples.gated_recurrence", "examples.scaled_residual", "tests.components.fakes")
SMALL = (
    *TINY,
    f"model.dim={DIM}",
    "model.init_std=0.3",
    "train.seq_len=48",
    "train.micro_batches=2",
    "optim.clip_norm=1e6",
)


def settings_of(case: Case, data: Path, *overrides: str, run: Path = Path("unused")) -> Settings:
    """A run of two layers, both with the component, one with experts and one with Engram."""
    name, component = case.component.name, case.component
    feedforwards = (name, name) if isinstance(component, FeedForward) else ("dense", "moe")
    if component.name == "moe":
        feedforwards = ("dense", "moe")
    mixer = name if isinstance(component, Mixer) else "attention"
    layers = f"{mixer}+{feedforwards[0]}", f"engram+{mixer}+{feedforwards[1]}"
    return _settings(case, data, layers, *overrides, run=run)


def plain_settings_of(case: Case, data: Path, *overrides: str, run: Path) -> Settings:
    """A run of two equal layers, as published models have them; with Engram only where that is the
    component."""
    name, component = case.component.name, case.component
    feedforward = name if isinstance(component, FeedForward) else "dense"
    mixer = name if isinstance(component, Mixer) else "attention"
    layer = f"{'engram+' * isinstance(component, Engram)}{mixer}+{feedforward}"
    # with its shared experts and selection biases it is GLM's
    published = ["model.moe.score=sigmoid"] if name == "moe" else []
    return _settings(case, data, (layer, layer), *published, *overrides, run=run)


def _settings(case: Case, data: Path, layers: tuple[str, str], *overrides: str, run: Path) -> Settings:
    component = case.component
    home = "engram" if isinstance(component, Engram) else f"model.{component.name}"
    own = [f"{home}.{k}={v}".lower() for k, v in case.section.model_dump(exclude_unset=True).items()]
    outside = [] if component in (*BUILT_IN.all, ENGRAM) else list(OUTSIDE)
    ours = [f"model.components={outside}", f"model.layers={list(layers)}", *own]
    if isinstance(component, Residual):
        ours.append(f"model.residual={component.name}")
    return ci_settings(run, data, *SMALL, *ours, *overrides)


@dataclass(frozen=True)
class Evidence:
    """What one step came to on a rank: whole tensors, by the parameters' names."""

    initial: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def take_evidence(settings: Settings, mesh: Mesh) -> Evidence:
    """Of one step. Collective over the ranks of the mesh."""
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    initial = {name: whole(p) for name, (p, _) in _parameters(run).items()}
    for name, (parameter, declared) in _parameters(run).items():
        _draw(name, parameter, declared)
    gradients: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        complete_gradients(run)
        named = {name: p.grad for name, (p, _) in _parameters(run).items()}
        gradients.update({name: whole(grad) for name, grad in named.items() if grad is not None})

    for optimizer in run.engine.optimizers:
        optimizer.register_step_pre_hook(note)
    train, layout = settings.train, mesh.layout
    place = layout.coordinate(mesh.rank, "dp")
    split = dataset.split("train")
    share = BatchShare(train.global_batch, train.micro_batches, place, layout.dp)
    loader = BatchLoader(split, train.seq_len, share, seed=0)
    batch = loader.load(0)
    plan = run.table.plan(batch) if run.table is not None else None
    totals = train_step(run, 0, StepInput(batch.at(run.positions), plan))
    statistics = {name: torch.tensor(value) for name, value in totals.statistics.items()}
    return Evidence(initial, totals.loss, gradients, statistics)


def _parameters(run: Run) -> dict[str, tuple[torch.nn.Parameter, Parameter]]:
    return {name: both for part in run.model_parts for name, both in part.declared_parameters().items()}


def _draw(name: str, parameter: Tensor, declared: Parameter) -> None:
    """A value whose mean is that of the declared initial value, however the parameter is cut."""
    means = {"normal": 0.0, "residual": 0.0, "zeros": 0.0, "ones": 1.0}
    mean = means[declared.init] if isinstance(declared.init, str) else declared.init

    def drawn(rows: slice | None = None, within: tuple[slice, ...] = ()) -> Tensor:
        return mean + draw(f"contract:{name}", tuple(parameter.shape), 0, 0.3, rows, within)

    with torch.no_grad():
        write_local(parameter, drawn)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


Outcome = Evidence | str
"""Of a run, or the traceback of what it failed with."""
Job = tuple[str, Settings]
"""An axis of AXES or PAIRS, or "alone", and the run of a component."""


@dataclass(frozen=True)
class OnRanks:
    """What runs of one component came to: on one rank, and on each of several."""

    alone: Outcome
    ranks: Sequence[Outcome]


def evidence_here(jobs: list[Job]) -> list[Outcome | None]:
    """On a rank: one run after the other, on one mesh for each axis; those alone on rank 0.

    A component that fails must do so on all ranks, or those that do not wait for it in vain.
    """
    meshes: dict[str, Mesh] = {}
    out: list[Outcome | None] = []
    for axis, settings in jobs:
        if axis not in meshes:
            here = dist.get_rank() if axis != "alone" else 0
            layout = resolve_layout(settings, dist.get_world_size()) if axis != "alone" else Layout.resolve(1)
            meshes[axis] = make_mesh(layout, here, torch.device("cpu"), 60)
        if axis == "alone" and dist.get_rank() != 0:
            out.append(None)
            continue
        try:
            out.append(take_evidence(settings, meshes[axis]))
        except Exception:
            out.append(traceback.format_exc())
    return out


def evidence_of(
    wanted: dict[tuple[str, str], Case], data: Path, nproc: int = 2
) -> dict[tuple[str, str], OnRanks]:
    """By name and axis what the runs came to, all in one start of ranks."""
    alone: dict[str, Settings] = {name: settings_of(case, data) for (name, _), case in wanted.items()}
    jobs: list[Job] = [("alone", settings) for settings in alone.values()]
    axes = AXES | PAIRS
    jobs += [(axis, settings_of(case, data, *axes[axis])) for (_, axis), case in wanted.items()]
    ranks = run_on_ranks(evidence_here, nproc, jobs, timeout=280)
    one = dict(zip(alone, ranks[0], strict=False))
    every = zip(*(rank[len(alone) :] for rank in ranks), strict=True)
    return {key: OnRanks(one[key[0]], outcomes) for key, outcomes in zip(wanted, every, strict=True)}


def _made(found: OnRanks) -> tuple[Evidence, list[Evidence]]:
    made = []
    for outcome in (found.alone, *found.ranks):
        assert not isinstance(outcome, str), outcome
        made.append(outcome)
    return made[0], made[1:]


def _same_names(one: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> None:
    """Under pp a rank has some of them."""
    assert {name for rank in ranks for name in rank} == one.keys()


def check_initial_values(found: OnRanks) -> None:
    """A parameter begins with the same bits however it is cut."""
    one, ranks = _made(found)
    _same_names(one.initial, [rank.initial for rank in ranks])
    for rank in ranks:
        for name, value in rank.initial.items():
            assert torch.equal(value, one.initial[name]), name


def check_loss(found: OnRanks) -> None:
    """Ranks come to the loss of one rank."""
    one, ranks = _made(found)
    for rank in ranks:
        assert rank.loss == pytest.approx(one.loss, rel=1e-5)


def check_gradients(found: OnRanks) -> None:
    """And to its gradient of every parameter."""
    one, ranks = _made(found)
    _same_names(one.gradients, [rank.gradients for rank in ranks])
    for rank in ranks:
        for name, value in rank.gradients.items():
            expected = one.gradients[name]
            assert float((value - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6, name


def check_statistics(found: OnRanks) -> None:
    """And to its running sums: every token counts once."""
    one, ranks = _made(found)
    for rank in ranks:
        assert rank.statistics.keys() == one.statistics.keys()
        for name, value in rank.statistics.items():
            torch.testing.assert_close(value, one.statistics[name], rtol=1e-4, atol=1e-5)


RANK_CHECKS: tuple[Callable[[OnRanks], None], ...] = (
    check_initial_values,
    check_loss,
    check_gradients,
    check_statistics,
)


STEPS, STOP = 2, 1


@dataclass(frozen=True)
class Restart:
    """The folders of a run of STEPS steps and of one that went on from its checkpoint after STOP steps."""

    whole: Path
    resumed: Path


def restart_here(runs: list[Settings]) -> None:
    """On a rank that is alone: each run, and its end once more from a checkpoint, in the folder beside."""
    from hybridtrain.run.loop import train

    dist.destroy_process_group()
    for settings in runs:
        train(settings)
        first, again = Path(settings.run.dir), Path(f"{settings.run.dir}-resumed")
        shutil.copytree(first, again)
        shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
        (again / "checkpoints" / "latest").write_text(f"step-{STOP:08d}", encoding="utf-8")
        run = settings.run.model_copy(update={"dir": str(again)})
        train(settings.model_copy(update={"run": run}), resume=True)


def restarts_of(cases: dict[str, Case], data: Path, folder: Path) -> dict[str, Restart]:
    """What runs of the cases leave in `folder`, all in one start of a rank."""
    every = (f"train.steps={STEPS}", f"checkpoint.every={STOP}", "train.eval_every=0")
    runs = {name: plain_settings_of(case, data, *every, run=folder / name) for name, case in cases.items()}
    run_on_ranks(restart_here, 1, list(runs.values()), timeout=280)
    return {name: Restart(folder / name, folder / f"{name}-resumed") for name in cases}


def _tensors(run: Path) -> dict[str, Tensor]:
    stored = StoredTensors(find_checkpoint(run)[1])
    return {name: stored.read(name) for name in stored.shapes}


def check_resume(restart: Restart) -> None:
    """A run that goes on from a checkpoint has the losses and all tensors of one that was not interrupted."""
    lines = []
    for run in (restart.whole, restart.resumed):
        read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in read if line.get("step") == STEPS and "loss" in line][-1]
        lines.append((last["loss"], last["grad_norm"]))
    assert lines[0] == lines[1]
    ours, theirs = _tensors(restart.whole), _tensors(restart.resumed)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def check_export(case: Case, run: Path, to: str, folder: Path) -> None:
    """A format that the component declares has all its tensors and gives them back; another one refuses it by
    its name."""

    def export() -> None:
        with allowing(OUTSIDE):
            export_model(run, folder / "out", ExportOptions(to, max_shard_size="1GB", dtype="float32"))

    if to not in case.component.formats:
        with pytest.raises(FormatError) as caught:
            export()
        assert f"{case.component.name}: the format {to} has no names for its parameters" in str(caught.value)
        assert not (folder / "out").exists()
        return
    try:
        export()
        theirs = _read_back(folder)
    except FormatError as error:
        raise AssertionError(f"{to} does not take {case.component.name}, which declares it") from error
    ours = {n: x for n, x in _tensors(run).items() if n.startswith("model.") and not n.endswith("load_E")}
    assert ours.keys() <= theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def _read_back(folder: Path) -> dict[str, Tensor]:
    """The tensors of the export in `folder`, by their names in checkpoints."""
    config = folder / "out" / "config.json"
    if config.is_file() and json.loads(config.read_text())["model_type"] == "hybridtrain":
        # no published model, so nothing imports it; it has our names
        files = (folder / "out").glob("*.safetensors")
        return {f"model.{name}": x for file in files for name, x in load_file(file).items()}
    import_model(folder / "out", folder / "back", None, None, None, None)
    return _tensors(folder / "back")
