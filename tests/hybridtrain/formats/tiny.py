"""Small models with random weights: transformers' of every family, and ours."""

from __future__ import annotations

import copy
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.data.batches import Batch
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import FormatError
from hybridtrain.files.durable import file_digest
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.torch_dist import COMMON, RELEASE, Region, TorchDist
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.run_folder import find_checkpoint
from tests.training import ci_settings

VOCABULARY = 1032  # more than the 1024 entries of the tokenizer, as many published models have
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
GLM = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 1.0,
}
THEIRS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama, untied": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
    },
    "glm4_moe": {**GLM, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "use_qk_norm": True},
    "glm4_moe, one group": {**GLM, "first_k_dense_replace": 0, "n_shared_experts": 1},
}

OURS = {  # overrides of models of ours that are also a family's
    "llama": (
        'model.layers=["2*attention+dense"]',
        "model.attention.qk_norm=false",
        "model.attention.num_kv_heads=2",
    ),
    "qwen3": ('model.layers=["2*attention+dense"]', "model.tie_embeddings=true", "model.norm_eps=1e-5"),
    "mixtral": ('model.layers=["2*attention+moe"]', "model.attention.qk_norm=false"),
    "qwen3_moe": ("model.attention.rope_theta=500", "model.vocab_size=1100"),
    "glm4_moe": (
        'model.layers=["attention+dense", "2*attention+moe"]',
        'model.moe.score="sigmoid"',
        "model.moe.num_shared=1",
        "model.moe.num_groups=2",
        "model.moe.gate_scale=1.5",
    ),
}

MEGATRON_RUNS = {  # and Megatron's
    "llama": OURS["llama"],
    "qwen3": (*OURS["qwen3"], "model.vocab_size=1100"),
    "mixtral": (*OURS["mixtral"], "model.attention.rope_theta=500"),
    "softmax first": ('model.layers=["2*attention+moe"]', "model.moe.normalize_gates=false"),
    "glm4_moe": (*OURS["glm4_moe"], "model.attention.num_kv_heads=2"),
}


def their_model(case: str, **changes: Any) -> Any:
    """transformers' model of a case of THEIRS in which nothing is zero or one, in float32."""
    family = case.partition(",")[0]
    torch.manual_seed(0)
    # copies: transformers write into the dicts that they are given
    config = transformers.CONFIG_MAPPING[family](**copy.deepcopy({**BASE, **THEIRS[case], **changes}))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and not name.endswith("e_score_correction_bias"):
                value.copy_(1 + 0.3 * torch.randn_like(value))
            else:
                value.normal_(0, 0.15)
    return model


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SMALL |= {"intermediate_size": 16, "moe_intermediate_size": 8}


def small_folder(case: str, folder: Path, data: Path, **changes: Any) -> Path:
    """A folder of transformers of a model of two narrow layers."""
    sizes = {
        key: size for key, size in SMALL.items() if key != "moe_intermediate_size" or key in THEIRS[case]
    }
    return save_theirs(their_model(case, **{**sizes, **changes}), folder, data, shard="1GB")


def edit_config(folder: Path, **changes: Any) -> None:
    """Other values of keys of config.json; None is null, "absent" takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "absent"})
    )


def save_theirs(model: Any, folder: Path, data: Path, shard: str = "200KB") -> Path:
    """The model as a Hugging Face folder with the tokenizer of the data."""
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copyfile(data / TOKENIZER, folder / TOKENIZER)
    return folder


def random_run(folder: Path, data: Path, *overrides: str) -> Path:
    """The run folder of a model of ci.toml in which nothing is zero or one; routers have biases where their
    scores are sigmoids.
    """
    settings = ci_settings(folder, data, *overrides)
    vocabulary = Vocabulary.of(TokenDataset.open(data), settings.model.vocab_size)
    mesh = make_mesh(resolve_layout(settings, 1), 0, torch.device("cpu"), 60)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in run.model.state_dict().items():
            noise = torch.empty(value.shape).normal_(0, 0.15, generator=generator)
            if name.endswith("bias_E") and settings.model.moe.score == "softmax":
                noise.zero_()
            value.copy_(1 + noise if name.endswith("norm.weight") else noise)
        if run.table is not None:
            run.table.weight.normal_(0, 0.3, generator=generator)
    folder.mkdir()
    for name in (TOKENIZER, COMPRESSION):
        shutil.copyfile(data / name, folder / name)
    saved = checkpoint.Saver(run, folder / "checkpoints", file_digest(folder / TOKENIZER)).save(0)
    checkpoint.write_info(
        saved, checkpoint.read_info(saved) | {"weights_only": True}
    )  # optimizers make their state at a first step
    return folder


def our_logits(run: Run, tokens_BT: Tensor, separator: int) -> Tensor:
    """Logits of whole texts, as the training loop would compute them."""
    batch = Batch(tokens_BT[None], tokens_BT[None], tokens_BT[None] == separator)
    index = None
    if run.table is not None:
        plan = run.table.plan(batch, evaluate=True)
        run.table.fetch(plan, plan.exchanges[0])
        index = plan.exchanges[0].index[0]
    with torch.no_grad():
        logits: Tensor = run.model.eval()(tokens_BT, batch.starts[0].cumsum(-1), index)
    return logits


def random_tokens(seed: int = 0) -> Tensor:
    """[2, 96] tokens of the tokenizer, no separator among them."""
    return torch.randint(1, 1024, (2, 96), generator=torch.Generator().manual_seed(seed))


def whole(weights: TorchDist, key: str) -> Tensor:
    """All of a tensor of a torch_dist checkpoint."""
    shape = weights.shapes[key]
    return weights.read(Region(key, shape, (0,) * len(shape), shape))


def equal_weights(one: Path, other: Path) -> bool:
    """Whether the parameters and selection biases of two runs' checkpoints are the same bits."""
    a, b = (StoredTensors(find_checkpoint(run)[1]) for run in (one, other))
    names = {name for name in a.shapes if not name.endswith("load_E")}
    assert names == {name for name in b.shapes if not name.endswith("load_E")}
    return all(torch.equal(a.read(name), b.read(name)) for name in names)


def write_args(folder: Path, **changes: Any) -> None:
    """Other values of arguments in an export to Megatron's format."""
    common = torch.load(folder / RELEASE / COMMON, weights_only=False)
    torch.save(
        {**common, "args": Namespace(**{**vars(common["args"]), **changes})}, folder / RELEASE / COMMON
    )


def megatron_refusal(folder: Path, out: Path, **options: Any) -> list[str]:
    """The problems for which an import is refused; it leaves nothing."""
    with pytest.raises(FormatError) as caught:
        import_megatron(folder, out, **options)
    assert not out.exists()
    return caught.value.problems
