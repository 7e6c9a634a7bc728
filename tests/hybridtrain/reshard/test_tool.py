"""`hybridtrain reshard`: the same tensors for other ranks, resumable, in bounded memory, and what it
refuses.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint import LazyTensor, StoredTensors, write_tensors
from hybridtrain.errors import DamagedCheckpoint, UserError
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.reshard import CopyOptions, Growth, copy, reshard
from hybridtrain.reshard.journal import NAME
from hybridtrain.reshard.tool import ALONE
from hybridtrain.run.run_folder import find_checkpoint
from tests.console import hybridtrain, refused
from tests.hybridtrain.conftest import TWO_RANKS
from tests.hybridtrain.reshard.layouts import LAYOUTS, digests, latest, next_losses, overrides
from tests.ranks import RankFailure, run_on_ranks

CHAIN = {"tp 2 · etp 2 · ep 2": 4, "pp 4 · tp 2 · mem 4": 4, "replicas · mem 2 far": 2}
"""With the owners of the table."""


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained(2, *TWO_RANKS)


def test_every_tensor_and_the_next_step_stay_what_they_were(run: Path, tmp_path: Path) -> None:
    before, source = digests(run), run
    for name, mem in CHAIN.items():  # each from the one before
        out = tmp_path / name.replace(" ", "")
        outcome = reshard(source, out, overrides(name), nproc=LAYOUTS[name][0])
        assert outcome.ranks == LAYOUTS[name][0]
        assert digests(out) == before, name
        info = checkpoint.read_info(latest(out))
        assert info["tensors"] == before
        assert info["layout"] == outcome.layout
        assert not (out / NAME).exists()
        checkpoint.verify(latest(out), "full", ALONE)
        _assert_files_are_the_ranks_own(latest(out), outcome.ranks, mem)
        source = out
    name = "tp 2"
    reshard(source, tmp_path / "two", overrides(name), nproc=2)
    data = checkpoint.read_info(latest(run))["settings"]["data"]["path"]
    files = (tmp_path / "two" / "settings.toml", [run, tmp_path / "two"], (f"data.path={data}",))
    for losses in run_on_ranks(next_losses, 2, *files):
        assert losses[:2] == losses[2:]  # loaded from other files, not other numbers


def _assert_files_are_the_ranks_own(path: Path, ranks: int, mem: int) -> None:
    """There are files of these ranks alone, and the table's rows lie in as many of them as it has owners, in
    order.
    """
    places = pickle.loads((path / ".metadata").read_bytes()).storage_data
    assert {int(place.relative_path.split("_")[2]) for place in places.values()} <= set(range(ranks))
    rows = sorted(
        (index.offset[0], place.relative_path) for index, place in places.items() if index.fqn == "table.rows"
    )
    assert len(list(itertools.groupby(rows, lambda row: row[1]))) == len({file for _, file in rows}) == mem


def die_after(segments: int, run: Path, out: Path, extra: list[str]) -> None:
    """On a rank: reshard in many small segments, and be killed when so many are done."""
    torch.distributed.destroy_process_group()
    copy.SEGMENT, copy.PER_RANK = 1 << 18, 0
    real = copy.Journal.add

    def add(self: copy.Journal, segment: object) -> None:
        real(self, segment)  # type: ignore[arg-type]
        if len(self.done) == segments:
            os.kill(os.getpid(), signal.SIGKILL)

    copy.Journal.add = add  # type: ignore[method-assign,assignment]
    reshard(run, out, extra, nproc=4)


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_one_that_was_killed_goes_on_where_it_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, extra = tmp_path / "out", overrides("tp 2 · ep 4")
    with pytest.raises(RankFailure, match="died"):
        run_on_ranks(die_after, 1, 3, run, out, extra)
    assert checkpoint.latest(out / "checkpoints") is None
    staging = out / "checkpoints" / ".step-00000020.partial"
    first = (out / NAME).read_text().splitlines()
    files = {name for line in first[1:] for name in json.loads(line)["files"]}
    assert len(first) == 4
    stamps = {name: (staging / name).stat().st_mtime_ns for name in files}
    with (out / NAME).open("a") as journal:
        journal.write('{"segment": 3, "fil')  # a line that the kill cut
    (staging / "__0_9.distcp").write_text("half a file")
    monkeypatch.setattr(copy, "SEGMENT", 1 << 18)
    monkeypatch.setattr(copy, "PER_RANK", 0)
    with pytest.raises(UserError, match="unfinished reshard of something else, or with other arguments"):
        reshard(run, out, overrides("tp 2"), nproc=2)
    with monkeypatch.context() as patch:
        patch.setattr(copy.Journal, "remove", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            reshard(run, out, extra, nproc=4)
    (out / "checkpoints" / "latest").unlink()  # as a kill behind the rename leaves it
    reshard(run, out, extra, nproc=4)
    assert digests(out) == digests(run)
    assert {name: (latest(out) / name).stat().st_mtime_ns for name in files} == stamps  # not written again
    checkpoint.verify(latest(out), "full", ALONE)
    with pytest.raises(UserError, match="exists and is not empty"):
        reshard(run, out, extra, nproc=4)


def test_damage_is_noticed_before_and_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    file = sorted(latest(broken).glob("*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{file.name}: is damaged"):
        reshard(broken, tmp_path / "a", nproc=2)
    file.write_bytes(content[: len(content) // 2])  # what is missing is missed by who copies it, too
    with pytest.raises(DamagedCheckpoint, match=f"{file.name}: is damaged: it has {len(content) // 2} bytes"):
        reshard(broken, tmp_path / "a", nproc=2)
    assert checkpoint.latest(tmp_path / "a" / "checkpoints") is None
    assert len((tmp_path / "a" / NAME).read_text().splitlines()) == 1  # the job, and nothing that was done
    real = copy.Copy._read_back

    def flip(self: copy.Copy, name: str, *rest: object) -> torch.Tensor:
        rows = real(self, name, *rest)  # type: ignore[arg-type]
        if name == "table.rows":
            rows[7, 3] += 1
        return rows

    monkeypatch.setattr(copy.Copy, "_read_back", flip)
    with pytest.raises(
        DamagedCheckpoint, match=r"table.rows, rows 0 to \d+, was read back from __0_0.distcp"
    ):
        reshard(run, tmp_path / "b", nproc=2)
    assert checkpoint.latest(tmp_path / "b" / "checkpoints") is None


def test_another_model_and_an_impossible_layout_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        LayoutError,
        match=r"parallel.tp=3 does not divide model.attention.num_kv_heads=4; tp may be 1, 2 or 4",
    ):
        reshard(run, out, ["parallel.tp=3", "parallel.ep=1", "parallel.mem=-1"], nproc=3)
    others = [
        "model.moe.num_experts=16",
        "engram.rows_per_head=2000",
        "model.moe.top_k=3",
        "optim.backbone=muon",
        "run.dir=x",
    ]
    with pytest.raises(UserError) as error:
        reshard(run, out, others, nproc=2, growth=Growth(vocab=7))
    for line in (
        "model.moe.num_experts=16: the checkpoint has 8; use --grow-experts",
        "engram.rows_per_head=2000: the checkpoint has 1000; rows are found by their hash",
        "model.moe.top_k=3: the checkpoint has 2; another choice of experts is another model",
        'optim.backbone="muon": the checkpoint has "adamw"; its state cannot be made',
        "--extend-vocab 7: the model has 1024 tokens, and none can be taken away",
        "run.dir=x: the target is",
    ):
        assert line in str(error.value)
    with pytest.raises(UserError, match=r"--max-memory 1000 bytes: 8 blocks .* it may be 33554432 or more"):
        reshard(run, out, copying=CopyOptions(1000))
    assert not out.exists()
    assert "OUT is a folder of this machine" in refused(hybridtrain("reshard", run, "s3://bucket/run"))
    message = refused(hybridtrain("reshard", run, out, "parallel.ep=3", "--grow-experts", 4))
    assert "--grow-experts 4: the model has 8, and none can be taken away; it may be more" in message
    done = hybridtrain(
        "reshard",
        run,
        out,
        "parallel.tp=2",
        "parallel.pp=2",
        "parallel.ep=1",
        "train.micro_batches=2",
        "--max-memory",
        "64M",
    )
    assert done.status == 0, done
    assert "for pp 2 · tp 2 · edp 2 · mem 2 · mem_replicate 2; every tensor's xxh3 is unchanged" in done.out


def test_a_checkpoint_elsewhere_knows_its_run(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "strided" / "away"
    shutil.copytree(latest(run), elsewhere)
    assert find_checkpoint(elsewhere) == (run, elsewhere)
    reshard(elsewhere, tmp_path / "out", overrides("tp 2"), nproc=2)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def peak_of_a_large_table(run: Path, folder: Path, max_memory: int) -> tuple[int, int]:
    """On a rank: bytes at the peak of a small reshard, and of one of a large table."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.distributed.destroy_process_group()
    reshard(run, folder / "small", overrides("tp 2"), nproc=2, copying=CopyOptions(max_memory))
    before = peak()
    reshard(
        folder / "large", folder / "out", overrides("tp 2 · ep 4"), nproc=4, copying=CopyOptions(max_memory)
    )
    return before, peak()


def test_memory_is_bounded_for_a_table_larger_than_the_bound(run: Path, tmp_path: Path) -> None:
    rows, dim, bound = 4_000_037, 12, 64 * 10**6
    large = tmp_path / "large"
    shutil.copytree(run, large)
    path = latest(large)
    info, stored = checkpoint.read_info(path), StoredTensors(path)

    def tensor(name: str) -> LazyTensor:
        shape, dtype = stored.shapes[name], stored.dtype(name)
        if name.startswith("table."):
            wide = (rows, *shape[1:])
            return LazyTensor(
                wide, dtype, lambda: torch.arange(rows * (dim if len(wide) > 1 else 1)).view(wide).to(dtype)
            )
        return LazyTensor(shape, dtype, lambda: stored.read(name))

    tensors = {name: tensor(name) for name in stored.shapes}
    files = write_tensors(path.with_name("new"), tensors)
    checkpoint.commit_folder(path.with_name("new"), path, info | {"files": files})
    ((before, after),) = run_on_ranks(peak_of_a_large_table, 1, run, tmp_path, bound)
    assert sum(file.stat().st_size for file in latest(tmp_path / "out").iterdir()) > 3 * bound
    assert after - before < bound
    assert digests(tmp_path / "out")["table.rows"] == digests(large)["table.rows"]
