"""When rows are read, and where they lie: rows that come ahead of their step give the same bits, or those of
one update ago.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.kernels.rows.eight_bits import packed_width
from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.early_rows import late_rows
from hybridtrain.parallel.mesh import Joining, Mesh, make_mesh
from hybridtrain.parallel.row_exchange import AllToAllSplits, StepPlan
from hybridtrain.run.assemble import Vocabulary, assemble, make_addressing
from hybridtrain.run.generate import evaluate_checkpoint
from hybridtrain.run.process_setup import resolve_layout, table_device
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.run.validation import evaluate
from hybridtrain.settings.tree import Settings
from tests.console import hybridtrain
from tests.ranks import run_on_ranks
from tests.training import CI, ci_settings, loss_curve

DECAY = "engram.weight_decay=2.0"
FAR = "parallel.mem_placement=strided"
PIPELINE = ("parallel.pp=2", "train.micro_batches=2", "parallel.mem=2", DECAY)
# by world and name: the ways of engram.fetch, of which "stale" twice where its repetition is looked at, and
# the rest
CASES = {
    1: {
        "one": ("step overlap stale", DECAY),
        "one, two exchanges": ("step overlap", DECAY, "train.micro_batches=2", "engram.exchange_groups=2"),
    },
    2: {
        "two": ("step overlap stale stale", DECAY, "parallel.ep=2"),
        "two exchanges": ("step overlap", DECAY, "train.micro_batches=2", "engram.exchange_groups=2"),
        "checksum, adagrad": ("step overlap", "engram.optimizer=rowwise_adagrad", "engram.checksum=true"),
        "replicas": ("step overlap stale", DECAY, "parallel.mem=1"),
        "narrow": (
            "step overlap",
            DECAY,
            "engram.dtype=bfloat16",
            "engram.wire=float8",
            "engram.wire_gradients=bfloat16",
        ),
    },
    4: {
        "strided": ("step overlap stale", DECAY, "parallel.mem=2", FAR),
        "pp near": ("step overlap stale", *PIPELINE),
        "pp far": ("step overlap stale", *PIPELINE, FAR),
    },
}
STEPS, SAVED = 4, 2


@dataclass
class Seen:
    """What a rank saw of some steps."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # bytes by step, of rows and their gradients
    due: list[int] = field(default_factory=list)  # the same, by the plans
    late: list[int | None] = field(default_factory=list)
    low: int = 0
    state: dict[str, Tensor] = field(
        default_factory=dict
    )  # this rank's own part of everything that is trained


class Rig:
    """A run's parts on this rank, stepped by hand."""

    def __init__(self, settings: Settings, mesh: Mesh | None = None) -> None:
        """On the mesh of another run of the same layout, or one of its own."""
        self.settings, device = settings, torch.device("cpu")
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        mesh = mesh or make_mesh(
            resolve_layout(settings, world),
            rank,
            device,
            60,
            Joining(table_device=table_device(settings, device)),
        )
        self.dataset = TokenDataset.open(settings.data.path, verify=False)
        vocabulary = Vocabulary.of(self.dataset)
        self.run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
        assert self.run.table is not None
        self.table = self.run.table
        train, dp = settings.train, mesh.layout.coordinate(rank, "dp")
        split = self.dataset.split("train")
        share = BatchShare(train.global_batch, train.micro_batches, dp, mesh.layout.dp)
        self.loader = BatchLoader(split, train.seq_len, share, seed=0)
        self.clock = Clock(device)
        self.upcoming: tuple[Batch, StepPlan] | None = None

    def due(self, plan: StepPlan, following: StepPlan) -> int:
        """Bytes that a step sends to other ranks: rows of here that are fetched during it, and gradients of
        their rows.
        """
        mode = self.settings.engram.fetch
        (first, *others), ahead = plan.exchanges, following.exchanges[0]
        routes: dict[str, list[AllToAllSplits | None]] = {
            "step": [*plan.exchanges],
            "overlap": [first.late or first, *others, ahead.early],
            "stale": [ahead] if plan.number > 1 else [first, ahead],
        }
        own = self.run.mesh.mem.rank
        rows = sum(sum(route.receive) - route.receive[own] for route in routes[mode] if route is not None)
        grads = sum(sum(part.send) - part.send[own] for part in plan.exchanges)
        engram, width = self.settings.engram, self.settings.engram.head_dim
        bytes_of_row = {"exact": 4 * width, "bfloat16": 2 * width, "float8": packed_width(width)}
        return rows * bytes_of_row[engram.wire] + grads * bytes_of_row[engram.wire_gradients]

    def sent(self) -> int:
        entries = self.run.mesh.traffic.entries()
        return sum(
            sent
            for (group, what), (_, sent) in entries.items()
            if group in ("mem", "mem_ahead") and what == "all_to_all"
        )

    def plan(self, step: int) -> tuple[Batch, StepPlan]:
        batch = self.loader.load(step)
        return batch.at(self.run.positions), self.table.plan(batch)

    def steps(self, first: int, last: int, validate_after: int = -1) -> Seen:
        """Steps `first` to `last-1`, each with the plan of the one after it, as the training loop does
        them.
        """
        """Steps `first` to `last-1`, each with the plan of the one after it, as the training loop does."""
        run = Seen(low=self.table.low)
        self.upcoming = self.upcoming or self.plan(first)
        for step in range(first, last):
            (batch, plan), self.upcoming = self.upcoming, self.plan(step + 1)
            before = self.sent()
            run.losses.append(
                train_step(
                    self.run, step, StepInput(batch, plan, self.upcoming[1]), Hooks(self.clock.phase)
                ).loss
            )
            run.sent.append(self.sent() - before)
            run.due.append(self.due(plan, self.upcoming[1]))
            run.late.append(late_rows(plan))
            if step == validate_after:
                run.validation.append(evaluate(self.run, self.dataset.split("validation"), 1)["loss"])
        run.state = own_state(self.run)
        return run


def own_state(run: Seen) -> dict[str, Tensor]:
    assert run.table is not None
    tensors: dict[str, Any] = {"table": run.table.weight, **run.table.optimizer.state}
    for number, stage in enumerate(run.model_parts):
        tensors |= {f"{number}.{name}": value for name, value in stage.state_dict().items()}
    return {name: (v.to_local() if hasattr(v, "to_local") else v).clone() for name, v in tensors.items()}


def run_modes(cases: dict[str, list[Settings]], resumed: dict[str, Settings], folder: str) -> tuple[Any, Any]:
    """On a rank: every case in all its modes, and what the `resumed` do after a checkpoint of the first of
    them.
    """
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    modes: dict[str, list[Seen]] = {}
    for name, kinds in cases.items():
        mesh = Rig(kinds[0]).run.mesh
        modes[name] = [Rig(settings, mesh).steps(0, STEPS, validate_after=1) for settings in kinds]
    return modes, save_and_resume(resumed, folder) if resumed else {}


def save_and_resume(resumed: dict[str, Settings], folder: str) -> dict[str, Seen]:
    """What the first run does after step SAVED, and what every one does that goes on from its checkpoint
    there.
    """
    undisturbed = Rig(next(iter(resumed.values())))
    undisturbed.steps(0, SAVED)
    path = checkpoint.Saver(undisturbed.run, Path(folder), "digest").save(SAVED)
    runs = {"undisturbed": undisturbed.steps(SAVED, STEPS)}
    for name, settings in resumed.items():
        rig = Rig(settings)
        assert checkpoint.load(rig.run, path) == SAVED
        rig.upcoming = rig.plan(SAVED)
        rig.table.resume(rig.upcoming[1])
        runs[name] = rig.steps(SAVED, STEPS)
    return runs


def settings_of(data: Path, *overrides: str) -> Settings:
    return ci_settings(Path("unused"), data, "train.global_batch=8", "optim.warmup_steps=2", *overrides)


class Worlds(dict[int, tuple[Any, Any]]):
    """By world: by case and mode, and by resumed run, what every rank saw. A world is run when it is first
    asked for.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        super().__init__()
        self.data, self.folder = data, folder

    def __missing__(self, world: int) -> tuple[Any, Any]:
        settings = {
            name: [settings_of(self.data, f"engram.fetch={way}", *overrides) for way in ways.split()]
            for name, (ways, *overrides) in CASES[world].items()
        }
        resumed = {
            name: settings_of(self.data, *overrides) for name, overrides in RESUMED.get(world, {}).items()
        }
        ranks = run_on_ranks(run_modes, world, settings, resumed, str(self.folder / str(world)))
        by_mode = {
            name: [[rank[0][name][i] for rank in ranks] for i in range(len(kinds))]
            for name, kinds in settings.items()
        }
        self[world] = (
            by_mode,
            {name: [rank[1][name] for rank in ranks] for name in ("undisturbed", *resumed) if resumed},
        )
        return self[world]


@pytest.fixture(scope="module")
def runs(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(ci_data, tmp_path_factory.mktemp("saved"))


def assert_equal_bits(ours: list[Seen], theirs: list[Seen]) -> None:
    """Rank by rank."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.losses == other.losses
        assert mine.validation == other.validation
        assert mine.state.keys() == other.state.keys()
        for name, value in mine.state.items():
            assert torch.equal(value, other.state[name]), name


def marked(ids: list[tuple[int, str]]) -> list[Any]:
    """Those of four ranks run in the slow suite."""
    return [pytest.param(*case, marks=pytest.mark.parity) if case[0] == 4 else case for case in ids]


IDS = [(world, name) for world, cases in CASES.items() for name in cases]
STALE = [(world, name) for world, name in IDS if "stale" in CASES[world][name][0]]


@pytest.mark.parametrize(("world", "name"), marked(IDS))
def test_overlap_changes_no_bit(runs: Worlds, world: int, name: str) -> None:
    step, overlap, *_ = runs[world][0][name]
    assert_equal_bits(overlap, step)
    late = torch.tensor([run.late[1:] for run in overlap]).sum(0)
    assert late.min() > 0  # some rows had to wait for the update
    assert all(run.late[0] is None for run in overlap)  # no plan was made before it
    assert all(set(run.late) == {None} for run in step)


@pytest.mark.parametrize(
    ("world", "name"), marked([case for case in IDS if "checksum" not in case[1]])
)  # checksums travel too
def test_each_unique_row_travels_once_each_way(runs: Worlds, world: int, name: str) -> None:
    for mode in runs[world][0][name]:
        for run in mode:
            assert run.sent == run.due
        assert (sum(sum(run.due) for run in mode) > 0) == (world > 1 and name != "replicas")


def test_stale_repeats_bitwise(runs: Worlds) -> None:
    _, _, stale, again = runs[2][0]["two"]
    assert_equal_bits(stale, again)


@pytest.mark.parametrize(("world", "name"), marked(STALE))
def test_every_way_trains_alike_at_every_layout(runs: Worlds, world: int, name: str) -> None:
    for way in range(3):
        (one,) = runs[1][0]["one"][way]
        for run in runs[world][0][name][way]:
            assert run.losses == pytest.approx(one.losses, rel=1e-5)
            assert run.validation == pytest.approx(one.validation, rel=1e-5)
            whole = one.state["table"][run.low : run.low + len(run.state["table"])]
            torch.testing.assert_close(run.state["table"], whole, rtol=0, atol=5e-5)
    step, _, (stale, *_), *_ = runs[world][0][name]
    assert stale.losses[0] == step[0].losses[0]
    assert (
        abs(stale.losses[1] - step[0].losses[1]) > 1e-5
    )  # the first update has come to rows of the one only


RESUMED = {
    2: {"overlap": [DECAY, "engram.fetch=overlap"]},
    4: {
        "strided": [DECAY, "engram.fetch=stale", "parallel.mem=2", FAR],
        "contiguous": [DECAY, "engram.fetch=stale", "parallel.mem=2"],
        "mem 4": [DECAY, "engram.fetch=stale"],
    },
}


@pytest.mark.parametrize(("world", "name"), marked([(2, "overlap"), (4, "strided")]))
def test_a_resumed_run_goes_on_with_the_same_bits(runs: Worlds, world: int, name: str) -> None:
    assert_equal_bits(runs[world][1][name], runs[world][1]["undisturbed"])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["contiguous", "mem 4"])
def test_a_stale_run_resumes_with_other_owners(runs: Worlds, name: str) -> None:
    undisturbed, other = (runs[4][1][kind] for kind in ("undisturbed", name))
    assert other[0].losses == pytest.approx(undisturbed[0].losses, rel=1e-6)
    tables = {run.low: run.state["table"] for run in other}
    whole = torch.cat([tables[low] for low in sorted(tables)])
    for run in undisturbed:
        torch.testing.assert_close(
            run.state["table"], whole[run.low : run.low + len(run.state["table"])], rtol=0, atol=5e-5
        )


def test_stale_rows_are_those_of_one_update_ago(ci_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(settings_of(ci_data, DECAY, "engram.fetch=stale"))
    optimizer, everything = rig.table.optimizer, torch.arange(len(rig.table.weight))
    seen: list[list[Tensor]] = []
    real = rig.table.leaves.set
    monkeypatch.setattr(rig.table.leaves, "set", lambda leaves: (seen.append(list(leaves)), real(leaves)))
    before: list[Tensor] = []
    for step in range(4):
        before.append(optimizer.values(everything))
        _, plan = rig.upcoming = rig.upcoming or rig.plan(step)
        rig.steps(step, step + 1)
        expected = before[max(0, step - 1)][plan.touched_N]
        assert torch.equal(seen[step][0], expected), step
        assert step == 0 or not torch.equal(expected, before[step][plan.touched_N])


def test_a_run_reports_its_fetches_and_resumes_stale_bitwise(ci_data: Path, tmp_path: Path) -> None:
    """Through `hybridtrain train`: what the metrics and the summary say, and that a checkpoint of the loop
    has the rows too.
    """
    run, again = tmp_path / "run", tmp_path / "again"
    data = (f"data.path={ci_data}", "train.global_batch=8", "train.eval_every=4", "train.eval_batches=1")
    overrides = (*data, "engram.fetch=stale", "engram.device=host", "train.steps=8", "checkpoint.every=5")
    outcome = hybridtrain("train", CI, f"run.dir={run}", *overrides)
    assert outcome.status == 0, outcome.err
    written = [line for line in read_metrics(run) if "loss" in line]
    for line in written:
        assert (
            0 < line["table/fetch_exposed_seconds"] <= line["table/fetch_seconds"] < line["seconds_per_step"]
        )
        assert line["table/fetch_exposed_seconds"] == line["seconds/fetch"]
    mean = sum(line["table/fetch_seconds"] for line in written) / len(written)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["table_fetch_seconds"] == pytest.approx(mean)
    assert 0 < summary["table_fetch_exposed_seconds"] <= summary["table_fetch_seconds"]
    said = " ".join(outcome.out.split())
    assert "stale: all rows come during the step before, one update old" in said
    assert "here in host memory (cpu)" in said
    assert f"table rows: {1000 * mean:.1f} ms a step to fetch" in said

    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000008")
    (again / "checkpoints/latest").write_text("step-00000005")
    outcome = hybridtrain("train", CI, f"run.dir={again}", *overrides, "--resume")
    assert outcome.status == 0, outcome.err
    assert loss_curve(again) == loss_curve(run)
    assert evaluate_checkpoint(again, "validation", None, 1).keys() == {
        "loss",
        "perplexity",
        "bits_per_byte",
        "tokens",
    }
