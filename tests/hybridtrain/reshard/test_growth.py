"""More experts and more tokens: what the model computes, what training goes on with, and that layouts do not
matter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint import StoredTensors
from hybridtrain.data.prepare import prepare
from hybridtrain.data.tokenizer import load_tokenizer
from hybridtrain.errors import UserError
from hybridtrain.files.durable import file_digest
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.reshard import Growth, reshard
from hybridtrain.run.generate import next_token_logits, open_checkpoint
from hybridtrain.settings.load import load_settings
from tests.hybridtrain.conftest import TWO_RANKS
from tests.hybridtrain.reshard.layouts import digests, latest, overrides
from tests.training import train_on

ROUTER = "layers.1.feedforward.router"
EXPERTS = "layers.1.feedforward.experts.w_up"
TOKENS = list(range(40, 70))


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained(2, *TWO_RANKS)


def logits(folder: Path) -> torch.Tensor:
    run, _, separator = open_checkpoint(folder)
    return next_token_logits(run, TOKENS, separator)


def test_with_all_copies_chosen_the_model_computes_what_it_did(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard(run, out, [*overrides("tp 2"), "model.moe.top_k=4"], nproc=2, growth=Growth(experts=16))
    torch.testing.assert_close(logits(out), logits(run), rtol=1e-5, atol=1e-6)
    before, after = StoredTensors(latest(run)), StoredTensors(latest(out))
    for name in (f"model.{EXPERTS}", f"optim.{EXPERTS}.exp_avg_sq", f"model.{ROUTER}.weight"):
        old, new = before.read(name), after.read(name)
        assert torch.equal(new, torch.cat([old, old])), name
    assert torch.equal(
        after.read(f"model.{ROUTER}.bias_E"), before.read(f"model.{ROUTER}.bias_E").repeat(2) / 2
    )
    load = after.read(f"model.{ROUTER}.load_E")
    assert torch.equal(load, before.read(f"model.{ROUTER}.load_E").repeat(2) / 2)
    assert after.shapes[f"optim.{EXPERTS}.step"] == ()


def test_noise_is_on_new_rows_alone_and_the_same_at_every_layout(run: Path, tmp_path: Path) -> None:
    growth = Growth(experts=11, router_noise=0.01)
    reshard(run, tmp_path / "a", overrides("tp 2"), nproc=2, growth=growth)
    reshard(run, tmp_path / "b", overrides("one rank"), nproc=1, growth=growth)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    before, after = StoredTensors(latest(run)), StoredTensors(latest(tmp_path / "a"))
    old, new = before.read(f"model.{ROUTER}.weight"), after.read(f"model.{ROUTER}.weight")
    assert torch.equal(new[:8], old)
    relative = (new[8:] - old[:3]).norm(dim=1) / old[:3].norm(dim=1)
    assert (relative > 0.005).all()
    assert (relative < 0.02).all()
    moments = after.read(f"optim.{ROUTER}.weight.exp_avg")
    assert torch.equal(moments[8:], moments[:3])
    load = after.read(f"model.{ROUTER}.load_E")  # experts 0 to 2 have two copies
    torch.testing.assert_close(load.sum(), before.read(f"model.{ROUTER}.load_E").sum())


def test_new_tokens_are_the_mean_of_all_and_training_goes_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    growth = Growth(experts=16, vocab=1040, router_noise=0.01)
    more = ["train.steps=22", "model.moe.top_k=4"]
    reshard(run, out, [*overrides("tp 2"), *more], nproc=2, growth=growth)
    reshard(run, tmp_path / "tokens", overrides("one rank"), nproc=1, growth=Growth(vocab=1040))
    old, new = logits(run), logits(tmp_path / "tokens")
    torch.testing.assert_close(new[:1024], old, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new[1024:], old.mean().expand(16), rtol=1e-4, atol=1e-5)
    stored = StoredTensors(latest(out))
    embed = stored.read("model.embed.weight")
    torch.testing.assert_close(embed[1024:], embed[:1024].mean(0).expand(16, -1))
    assert not stored.read("optim.embed.weight.exp_avg")[1024:].any()
    train_on(2, load_settings(out / "settings.toml"), resume=True)
    curve = [line["loss"] for line in read_metrics(out) if "loss" in line]
    assert len(curve) == 22
    assert curve[20] == pytest.approx(curve[19], rel=0.02)


def larger_tokenizer(run: Path, file: Path, *tokens: str) -> Path:
    tokenizer = load_tokenizer(run / "tokenizer.json")
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(file))
    return file


def test_a_larger_tokenizer_keeps_every_row_of_the_table_and_training_goes_on(
    run: Path, ci_data: Path, tmp_path: Path
) -> None:
    file = larger_tokenizer(run, tmp_path / "more.json", "THE", "zzyx", "Zzyx")
    data, out = tmp_path / "data", tmp_path / "out"
    prepare([ci_data.with_suffix(".jsonl")], data, tokenizer=file, validation_fraction=0.1, progress=False)
    overrides_there = [*overrides("one rank"), f"data.path={data}", "train.steps=22"]
    run = shutil.copytree(run, tmp_path / "run")
    for name in ("vocab.json", "tokenizer_config.json", "origin.json"):
        (run / name).write_text("{}")
    reshard(run, out, overrides_there, nproc=1, growth=Growth(vocab=1040, tokenizer=file))
    assert not (out / "vocab.json").exists()  # of the old tokenizer
    assert (out / "tokenizer_config.json").read_text() == (out / "origin.json").read_text() == "{}"
    before, after = np.load(run / "compression.npy"), np.load(out / "compression.npy")
    assert (after[:1024] == before).all()
    the = load_tokenizer(file).token_to_id("Ġthe")
    assert after[1024:].tolist() == [before[the], before.max() + 1, before.max() + 1]
    was, now = (checkpoint.read_info(latest(folder)) for folder in (run, out))
    old, new = Addressing.from_json(was["addressing"], before), Addressing.from_json(now["addressing"], after)
    tokens, starts = torch.arange(1024).view(4, 256), torch.zeros(4, 256, dtype=torch.bool)
    assert torch.equal(row_ids(new, tokens, starts), row_ids(old, tokens, starts))
    torch.testing.assert_close(logits(out)[:1024], logits(run), rtol=1e-5, atol=1e-6)
    train_on(1, load_settings(out / "settings.toml"), resume=True)
    curve = [line["loss"] for line in read_metrics(out) if "loss" in line]
    assert len(curve) == 22
    assert curve[20] == pytest.approx(curve[19], rel=0.02)
    assert checkpoint.read_info(latest(out))["tokenizer_digest"] == file_digest(file)


def test_another_tokenizer_is_refused_with_what_it_does_not_keep(run: Path, tmp_path: Path) -> None:
    file = larger_tokenizer(run, tmp_path / "more.json", "zzyx")
    with pytest.raises(UserError) as error:
        reshard(run, tmp_path / "out", nproc=2, growth=Growth(tokenizer=file))
    assert "it has 1025 tokens, the model rows for 1024; give --extend-vocab 1025 or more" in str(error.value)
    assert "is of another tokenizer; give that of data made with `hybridtrain data --tokenizer" in str(
        error.value
    )
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    file.write_text(json.dumps(tree))
    with pytest.raises(
        UserError,
        match=rf"'Ġthe' is {vocabulary['Ġthe']} of its tokens, and {vocabulary['Ġof']} of the run's",
    ):
        reshard(run, tmp_path / "out", nproc=2, growth=Growth(vocab=1040, tokenizer=file))
    tree["model"]["vocab"] = json.loads((run / "tokenizer.json").read_text())["model"]["vocab"]
    tree["decoder"] = None  # the same tokens, read otherwise
    file.write_text(json.dumps(tree))
    with pytest.raises(
        UserError, match=r"(?s)token \d+, '\S+', is spelt differently from the run's.*\n  and \d+ more"
    ):
        reshard(run, tmp_path / "out", nproc=2, growth=Growth(vocab=1040, tokenizer=file))
    assert not (tmp_path / "out").exists()
