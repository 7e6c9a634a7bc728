"""Components from outside of the package: they train, resume on other ranks, and are not imported unasked."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.model.build import model_parameters
from hybridtrain.model.cost import count_parameters
from hybridtrain.model.lm import HybridLM
from hybridtrain.model.registry import BUILT_IN, Components, ComponentsError, allowing
from hybridtrain.parallel.layout import ExpertFacts
from hybridtrain.run.init_from import model_tensors
from hybridtrain.run.process_setup import model_facts
from hybridtrain.settings.load import dump_settings, load_settings, parse_settings
from hybridtrain.settings.tree import Settings
from tests.console import Outcome, hybridtrain, refused
from tests.ranks import run_on_ranks
from tests.training import Trace, drawn_whole_and_in_halves, loss_curve, trace, train_on

ROOT = Path(__file__).parents[2]
PROJECT = ("hybridtrain", "parallel", "kernels", "launch", "tools")
EXAMPLE = ROOT / "examples" / "gated_recurrence.py"
Of = Callable[..., Settings]


@pytest.mark.parity  # eight ranks do so below
def test_a_run_trains_and_goes_on_at_another_layout(settings_of: Of) -> None:
    same = ("checkpoint.every=3", "optim.schedule=wsd", "optim.decay_fraction=0.0")
    whole = settings_of("whole", *same, "train.steps=6")
    train_on(1, whole)
    train_on(1, settings_of("moved", *same, "train.steps=3"))
    moved = settings_of("moved", *same, "train.steps=6", "parallel.tp=2")
    train_on(2, moved, resume=True)
    ours, theirs = loss_curve(Path(moved.run.dir)), loss_curve(Path(whole.run.dir))
    assert ours[:3] == theirs[:3]
    assert ours == pytest.approx(theirs, rel=1e-4)


def losses_of(outcome: Outcome, run: Path) -> list[float]:
    assert outcome.status == 0, outcome
    return loss_curve(run)


def test_the_commands_train_at_pp_tp_cp_ep_and_resume_elsewhere(
    train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """As a user runs them, on all axes and then on one rank, against one rank from the start."""
    same = ["train.micro_batches=2", "checkpoint.every=3", "optim.schedule=wsd", "optim.decay_fraction=0.0"]
    axes = ["parallel.pp=2", "parallel.tp=2", "parallel.cp=2", "parallel.ep=2"]
    alone = hybridtrain("train", *train_command("alone", *same, "train.steps=6"))
    expected = losses_of(alone, tmp_path / "alone")
    spread = train_command("spread", *same, *axes, "train.steps=3")
    ours = losses_of(hybridtrain("launch", "--nproc", "8", *spread, timeout=280), tmp_path / "spread")
    assert ours == pytest.approx(expected[:3], rel=1e-4)
    moved = train_command("spread", *same, "train.steps=6")
    ours = losses_of(hybridtrain("train", *moved, "--resume"), tmp_path / "spread")
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parity  # each axis with each example by itself is in test_on_ranks.py
@pytest.mark.parametrize(
    "axes",
    [("pp=2",), ("tp=2",), ("cp=2",), ("ep=2", "mem=2")],
    ids=lambda axes: axes[0],
)
def test_two_ranks_make_the_losses_and_parameters_of_one(settings_of: Of, axes: tuple[str, ...]) -> None:
    more = [f"parallel.{axis}" for axis in axes] + ["train.micro_batches=2"]
    one: Trace = trace(settings_of("one", "train.micro_batches=2"))
    ranks: list[Trace] = run_on_ranks(trace, 2, settings_of("two", *more))
    for rank in ranks:
        assert rank.losses == pytest.approx(one.losses, rel=1e-5)
    if axes != ("pp=2",):
        for name, value in ranks[0].state.items():
            if name != "table":
                assert (value - one.state[name]).abs().max() < 2e-4, name


def test_initial_values_do_not_depend_on_the_cut(settings_of: Of) -> None:
    settings = settings_of("run")
    whole, halves = drawn_whole_and_in_halves(settings)
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (whole.layers["0"].mixer.decay == -4).all()
    assert (whole.layers["0"].residual.scale == 0.1).all()


def test_counts_and_keys_are_those_of_the_module(settings_of: Of) -> None:
    settings = settings_of("run")
    model = HybridLM(settings, 64)
    count = count_parameters(settings, 64, table_rows=0)
    assert count.total == sum(p.numel() for p in model.parameters())
    idle = 2 * 2 * 3 * 16 * 16  # in two layers two of four experts, of 3 * dim * hidden each
    assert count.active == count.total - idle + count.table_active
    assert model_parameters(settings).keys() == {name for name, _ in model.named_parameters()}
    assert model_tensors(settings, 64).keys() == model.state_dict().keys()


def test_settings_with_components_are_written_and_pickled(settings_of: Of, tmp_path: Path) -> None:
    settings = settings_of("run")
    (tmp_path / "settings.toml").write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "settings.toml") == settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.model_dump()["model"]["gated_recurrence"]["width"] == 32


def test_a_layout_is_checked_against_the_experts_of_all_components(settings_of: Of) -> None:
    settings = settings_of(
        "run",
        'model.components=["examples.gated_recurrence", "tests.components.fakes"]',
        'model.layers=["attention+moe", "attention+fake_keeps_tokens"]',
        "model.residual=add",
        "model.fake_keeps_tokens.num_experts=3",
        "model.fake_keeps_tokens.hidden=20",
    )
    assert model_facts(settings).experts == (
        ExpertFacts(4, 16),
        ExpertFacts(3, 20, "model.fake_keeps_tokens"),
    )


def test_keys_of_a_mounted_section_are_known(settings_of: Of) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of("run", "model.gated_recurrence.widht=3", "model.gated_recurrence.rate=0")
    assert caught.value.problems == [
        "model.gated_recurrence.widht: unknown key; did you mean model.gated_recurrence.width?",
        "model.gated_recurrence.rate=0: input should be greater than 0",
    ]


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A copy of the example that leaves a file beside itself when it is imported."""
    path = tmp_path / "trap.py"
    shutil.copy(EXAMPLE, path)
    with path.open("a", encoding="utf-8") as file:
        file.write('\nfrom pathlib import Path\n\n(Path(__file__).parent / "sprung").touch()\n')
    return path


def test_what_reads_a_checkpoint_imports_nothing_unasked(
    settings_of: Of, trap: Path, tmp_path: Path, data: Path
) -> None:
    settings = settings_of(
        "run", f'model.components=["{trap}"]', "model.residual=add", "train.steps=1", "train.eval_every=0"
    )
    train_on(1, settings)
    sprung, run = tmp_path / "sprung", settings.run.dir
    sprung.unlink()
    commands: list[list[str]] = [
        ["eval", run, "--batches", "1"],
        ["generate", run, "--tokens", "1"],
        ["export", run, str(tmp_path / "out")],
        ["reshard", run, str(tmp_path / "laid-out"), "--nproc", "1"],
    ]
    for command in commands:
        message = refused(hybridtrain(*command))
        assert str(trap) in message
        assert f"--components {trap}" in message
        assert not sprung.exists(), command
    done = hybridtrain("eval", run, "--batches", "1", "--components", str(trap))
    assert done.status == 0, done
    assert sprung.exists()


def test_a_launched_rank_starts_from_a_run_with_its_own_components(settings_of: Of) -> None:
    first = settings_of("first", "train.steps=1", "train.eval_every=0")
    train_on(1, first)
    train_on(
        1, settings_of("second", "train.steps=1", "train.eval_every=0", f"train.init_from={first.run.dir}")
    )


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_format_without_its_names_refuses_a_component_by_name(
    settings_of: Of, tmp_path: Path, to: str
) -> None:
    settings = settings_of("run", "train.steps=1", "train.eval_every=0")
    train_on(1, settings)
    named = [part for name in settings.model.components for part in ("--components", name)]
    out = tmp_path / "out"
    message = refused(hybridtrain("export", settings.run.dir, out, "--format", to, *named))
    assert f"gated_recurrence: the format {to} has no names for its parameters" in message
    assert f"scaled_residual: the format {to} has no names for its parameters" in message
    assert not out.exists()


def test_a_stored_tree_may_name_only_what_its_user_named(trap: Path, tmp_path: Path) -> None:
    stored = {"model": {"components": [str(trap)]}}
    with pytest.raises(SettingsError, match="to import them is to run their code"):
        parse_settings(dict(stored))
    with allowing([str(EXAMPLE)]), pytest.raises(SettingsError, match="to import them is to run their code"):
        parse_settings(dict(stored))
    assert not (tmp_path / "sprung").exists()
    with allowing([str(trap)]):
        assert parse_settings(dict(stored)).model.components == (str(trap),)
    assert (tmp_path / "sprung").exists()
    with pytest.raises(SettingsError, match="to import them is to run their code"):
        parse_settings(dict(stored))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "has no Mixer, FeedForward or Residual at its top level"),
        ("import nowhere_at_all", "cannot be imported: No module named 'nowhere_at_all'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def", "cannot be imported: SyntaxError"),
        (
            "from hybridtrain.model.mixers.attention import ATTENTION\nfrom dataclasses import replace\n"
            "OURS = replace(ATTENTION, flops=lambda *_: 0.0)",
            'has a component "attention", and so has this package; each needs a name of its own',
        ),
        (
            "from hybridtrain.model.mixers.attention import ATTENTION\nfrom dataclasses import replace\n"
            "OURS = replace(ATTENTION, name='dim')",
            'has a component "dim"; a name is of small letters',
        ),
    ],
)
def test_what_cannot_be_a_component_is_told(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        parse_settings({}, [f'model.components=["{path}"]'])
    (problem,) = caught.value.problems
    assert problem.startswith(f'model.components: "{path}" ')
    assert expected in problem


def test_two_files_with_one_name_are_refused_and_a_missing_one_named(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path / "twin.py")
    with pytest.raises(
        ComponentsError, match=r'twin\.py" has a component "gated_recurrence", and so has ".*'
    ):
        Components.load((str(EXAMPLE), str(tmp_path / "twin.py")))
    with pytest.raises(ComponentsError, match=r"there is no file .*/nowhere\.py"):
        Components.load((str(tmp_path / "nowhere.py"),))
    with pytest.raises(ComponentsError, match=r"it may be an importable module or the path of a \.py file"):
        Components.load(("no_such_module",))
    assert "gated_recurrence" not in BUILT_IN.mixers


def test_importable_modules_are_components_too() -> None:
    names = Components.load(("examples.gated_recurrence",)).mixers
    assert [*names] == ["attention", "gated_recurrence"]


def test_no_file_of_the_project_knows_the_examples() -> None:
    """So the change that adds one touches none."""
    names = [path.stem for path in EXAMPLE.parent.glob("*.py")]
    assert len(names) == 2
    files = [path for folder in PROJECT for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in (*files, *(ROOT / "configs").glob("*.toml"), ROOT / "pyproject.toml"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if name in text], path
        assert "import examples" not in text
        assert "from examples" not in text


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_the_commands_are_listed_without_importing_torch() -> None:
    """Components import it, and so do the settings; `hybridtrain --help` waits for neither."""
    code = "import sys, hybridtrain.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0
