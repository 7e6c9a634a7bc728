"""Our own architecture in transformers: same logits from the exported folder alone, and text generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridtrain.data.shards import TokenDataset
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.modeling_hybridtrain import HybridTrainConfig, HybridTrainForCausalLM
from hybridtrain.run.generate import open_checkpoint
from tests.hybridtrain.formats.tiny import our_logits, random_run

USE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert not any(name.startswith("hybridtrain") for name in sys.modules)
tokens = torch.load("tokens.pt")
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tokens).logits
        ids = tokens[0, :20]
        padded = torch.stack([torch.cat([torch.full((7,), 3), ids[:13]]), ids])
        mask = torch.ones_like(padded)
        mask[0, :7] = 0
        of_padded = model(padded, attention_mask=mask).logits[0, 7:]
        alone = model(ids[None, :13]).logits[0]
        loss = model(tokens, labels=tokens).loss
    own = sys.modules[type(model).__module__]
    grads = []
    for masked, block in ((own.MASKED_TOKENS, 256), (1, 7)):  # and as texts too long for a mask of all pairs
        own.MASKED_TOKENS, own.by_blocks.__defaults__ = masked, (block,)
        long = model(tokens, labels=tokens)
        grads.append(torch.autograd.grad(long.loss, model.layers[0].mixer.wk.weight)[0])
    own.MASKED_TOKENS = 2048
    beyond = list(range(1024, model.config.vocab_size)) or None  # rows that no token has
    grown = model.generate(ids[None, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, suppress_tokens=beyond)
    text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).decode(grown[0])
    long = {"long": long.logits.detach(), "grads": grads}
    outputs = long | {"logits": logits, "padded": of_padded, "alone": alone, "loss": loss, "grown": grown, "text": text}
    torch.save(outputs, folder / "outputs.pt")
"""


def use_in_transformers(folders: list[Path], tokens_BT: Tensor, home: Path) -> None:
    """What transformers make of the folders in a process that cannot see this project, offline: `outputs.pt`
    in each.
    """
    torch.save(tokens_BT, home / "tokens.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", USE, *map(str, folders)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


VARIANTS = {
    "softmax, documents": (),
    "sigmoid in groups, stream": (
        'model.moe.score="sigmoid"',
        "model.moe.num_groups=4",
        "model.moe.top_groups=2",
        "model.moe.num_shared=1",
        "model.moe.gate_scale=2.5",
        "model.attention.num_kv_heads=2",
        "model.attention.qk_norm=false",
        "model.tie_embeddings=true",
        "model.vocab_size=1088",
        'engram.boundary="stream"',
        "engram.orders=[2,4]",
        "engram.gate_floor=1e-6",
        "model.moe.capacity=1.1",
    ),
}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> tuple[Path, Tensor]:
    """(a folder with a run and its export for each variant, the tokens), used in transformers by one process."""
    home = tmp_path_factory.mktemp("hybrid")
    for name, overrides in VARIANTS.items():
        random_run(home / f"{name} run", ci_data, *overrides)
        assert export_hf(home / f"{name} run", home / name, max_shard_bytes=100_000) == "hybridtrain"
        assert len(list((home / name).glob("*.safetensors"))) > 3
    separator = TokenDataset.open(ci_data).manifest.separator_id
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (3, 80)))
    tokens_BT[:, 0], tokens_BT[0, 30], tokens_BT[1, 31], tokens_BT[2, 0] = separator, separator, separator, 5
    use_in_transformers([home / name for name in VARIANTS], tokens_BT, home)
    return home, tokens_BT


@pytest.mark.parametrize("name", VARIANTS)
def test_the_exported_folder_alone_gives_our_logits(
    name: str, used: tuple[Path, Tensor], ci_data: Path
) -> None:
    home, tokens_BT = used
    theirs = torch.load(home / name / "outputs.pt")
    run, _, separator = open_checkpoint(home / f"{name} run")
    ours = our_logits(run, tokens_BT, separator)
    # float32 noise: the order of sums differs in experts and norms; a wrong row, gate or boundary changes
    # logits by 1e-2 and more
    noise = 2e-5 * float(ours.abs().max())
    assert float((theirs["logits"] - ours).abs().max()) < noise
    assert float((theirs["long"] - ours).abs().max()) < noise
    of_masked, of_blocks = theirs["grads"]
    assert float((of_blocks - of_masked).norm()) < 1e-4 * float(of_masked.norm())
    assert float((theirs["padded"] - theirs["alone"]).abs().max()) < noise
    expected = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert float(theirs["loss"]) == pytest.approx(float(expected), rel=1e-5)

    grown = tokens_BT[:1, :5]
    for _ in range(6):
        grown = torch.cat([grown, our_logits(run, grown, separator)[:, -1:, :1024].argmax(-1)], 1)
        if int(grown[0, -1]) == separator:
            break
    assert torch.equal(theirs["grown"], grown)
    assert theirs["text"].startswith(TokenDataset.open(ci_data).manifest.separator)


def test_a_stored_head_beside_tied_embeddings_counts(ci_data: Path, tmp_path: Path) -> None:
    run = random_run(
        tmp_path / "run", ci_data, "model.tie_embeddings=true", 'model.layers=["attention+dense"]'
    )
    export_hf(run, tmp_path / "out", family="hybridtrain")
    config = HybridTrainConfig.from_pretrained(tmp_path / "out")
    tokens_BT = torch.arange(1, 9)[None]
    tied = HybridTrainForCausalLM.from_pretrained(tmp_path / "out", config=config)
    assert tied.head.weight is tied.embed.weight
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file(
        tensors | {"head.weight": 2 * tensors["embed.weight"]},
        tmp_path / "out/model.safetensors",
        {"format": "pt"},
    )
    untied = HybridTrainForCausalLM.from_pretrained(tmp_path / "out", config=config)
    with torch.no_grad():
        assert torch.allclose(untied(tokens_BT).logits, 2 * tied(tokens_BT).logits, rtol=1e-5)


def test_rows_are_exported_with_the_decay_that_they_owe(trained: Callable[..., Path], tmp_path: Path) -> None:
    source = trained(1, "engram.weight_decay=0.5", "train.steps=10", "train.eval_every=0")
    export_hf(source, tmp_path / "out")
    run, _, separator = open_checkpoint(source)
    assert run.table is not None
    before = run.table.table.clone()
    run.table.optimizer.catch_up(torch.arange(len(before)))
    assert not torch.equal(before, run.table.table)
    tensors = load_file(tmp_path / "out/model.safetensors")
    names = [
        f"layers.{layer}.engram.tables.{slot}" for layer in run.table.addressing.layers for slot in range(8)
    ]
    assert torch.equal(torch.cat([tensors[name] for name in names]), run.table.table)
    assert torch.equal(tensors["layers.1.engram.conv"], run.model.state_dict()["layers.1.engram.conv"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["engram"]["primes"] == json.loads((source / "addressing.json").read_text())["primes"]
    assert config["eos_token_id"] == separator
