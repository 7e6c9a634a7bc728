"""Our own architecture in transformers: same logits from the exported folder alone, and text generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hybridtrain.data.shards import TokenDataset
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.use import open_checkpoint
from tests.hybridtrain.formats.tiny import our_logits, random_run

USE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert not any(name.startswith("hybridtrain") for name in sys.modules)
folder = Path(sys.argv[1])
inputs = torch.load(folder / "inputs.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(inputs["tokens"]).logits
    ids = inputs["tokens"][0, :20]
    padded = torch.stack([torch.cat([torch.full((7,), 3), ids[:13]]), ids])
    mask = torch.stack([torch.cat([torch.zeros(7, dtype=torch.int64), torch.ones(13, dtype=torch.int64)]), torch.ones_like(ids)])
    of_padded = model(padded, attention_mask=mask).logits[0, 7:]
    alone = model(ids[None, :13]).logits[0]
    loss = model(inputs["tokens"], labels=inputs["tokens"]).loss
own = sys.modules[type(model).__module__]
grads = []
for masked, block in ((own.MASKED_TOKENS, 256), (1, 7)):  # and as texts too long for a mask of all pairs
    own.MASKED_TOKENS, own.by_blocks.__defaults__ = masked, (block,)
    long = model(inputs["tokens"], labels=inputs["tokens"])
    grads.append(torch.autograd.grad(long.loss, model.layers[0].mixer.wk.weight)[0])
own.MASKED_TOKENS = 2048
beyond = list(range(1024, model.config.vocab_size)) or None  # rows that no token has
grown = model.generate(ids[None, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, suppress_tokens=beyond)
text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).decode(grown[0])
long = {"long": long.logits.detach(), "grads": grads}
outputs = long | {"logits": logits, "padded": of_padded, "alone": alone, "loss": loss, "grown": grown, "text": text}
torch.save(outputs, folder / "outputs.pt")
"""


def use_in_transformers(folder: Path, tokens_BT: Tensor, home: Path) -> dict[str, Any]:
    """What transformers make of the folder in a process that cannot see this project, offline."""
    torch.save({"tokens": tokens_BT}, folder / "inputs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder)], cwd=home, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    outputs: dict[str, Any] = torch.load(folder / "outputs.pt")
    return outputs


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
        'memory.boundary="stream"',
        "memory.orders=[2,4]",
        "memory.gate_floor=1e-6",
        "model.moe.capacity=1.1",
    ),
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_exported_folder_alone_gives_our_logits(ci_data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = random_run(tmp_path / "run", ci_data, *overrides)
    assert export_hf(run, tmp_path / "out", max_shard_bytes=100_000) == "hybridtrain"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    dataset = TokenDataset.open(ci_data)
    separator = dataset.manifest.separator_id
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (3, 80)))
    tokens_BT[:, 0], tokens_BT[0, 30], tokens_BT[1, 31], tokens_BT[2, 0] = separator, separator, separator, 5

    theirs = use_in_transformers(tmp_path / "out", tokens_BT, tmp_path)
    parts, _, _ = open_checkpoint(run)
    ours = our_logits(parts, tokens_BT, separator)
    # float32 noise: the order of sums differs in experts and norms; a wrong row, gate or boundary changes logits by 1e-2 and more
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
        grown = torch.cat([grown, our_logits(parts, grown, separator)[:, -1:, :1024].argmax(-1)], 1)
        if int(grown[0, -1]) == separator:
            break
    assert torch.equal(theirs["grown"], grown)
    assert theirs["text"].startswith(dataset.manifest.separator)


def test_rows_are_exported_with_the_decay_that_they_owe(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(1, "memory.weight_decay=0.5", "train.steps=10", "train.eval_every=0")
    export_hf(run, tmp_path / "out")
    parts, _, separator = open_checkpoint(run)
    assert parts.memory is not None
    before = parts.memory.table.clone()
    parts.memory.optimizer.catch_up(torch.arange(len(before)))
    assert not torch.equal(before, parts.memory.table)
    tensors = load_file(tmp_path / "out/model.safetensors")
    names = [f"layers.{layer}.memory.tables.{slot}" for layer in parts.memory.addressing.layers for slot in range(8)]
    assert torch.equal(torch.cat([tensors[name] for name in names]), parts.memory.table)
    assert torch.equal(tensors["layers.1.memory.conv"], parts.model.state_dict()["layers.1.memory.conv"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["memory"]["primes"] == json.loads((run / "addressing.json").read_text())["primes"]
    assert config["eos_token_id"] == separator
