"""megatron-core loads what is exported, and what it saves is imported: the same keys, the same logits, the
same bits.
"""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.formats.megatron_export import export_megatron
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.torch_dist import RELEASE, TorchDist
from hybridtrain.run.generate import open_checkpoint
from tests.hybridtrain.formats import megatron_core
from tests.hybridtrain.formats.megatron_core import Job
from tests.hybridtrain.formats.tiny import (
    MEGATRON_RUNS,
    equal_weights,
    our_logits,
    random_run,
    random_tokens,
    whole,
)

pytestmark = [
    pytest.mark.parity,
    # looked for and not imported, which takes seconds: that is for the processes that use it
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]

NO_SEPARATOR = -1
BASE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 24,
    "qk_layernorm": False,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_base": 500,
    "max_position_embeddings": 128,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 1032,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "transformer_impl": "local",
}
SOFTMAX = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
SIGMOID = {
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 1,
}
MIXED = {"moe_layer_freq": [0, 1, 1, 1], "transformer_impl": "transformer_engine"}
THEIRS: dict[str, dict[str, Any]] = {
    "dense": {"qk_layernorm": True},
    "dense, tied": {
        "untie_embeddings_and_output_weights": False,
        "group_query_attention": False,
        "rotary_base": 10_000,
    },
    "softmax": SOFTMAX,
    "softmax first, apart": {
        **SOFTMAX,
        "moe_router_pre_softmax": True,
        "transformer_impl": "transformer_engine",
    },
    "sigmoid": {**SIGMOID, "qk_layernorm": True},
    "sigmoid, mixed": {**SIGMOID, **MIXED},
}
SPREAD = ("sigmoid", "sigmoid, mixed")
IMPLEMENTATIONS = {
    "mixtral": "transformer_engine",
    "glm4_moe": "transformer_engine",
}  # of ours; the others local


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(a folder with what both sides wrote, what megatron-core makes of it), from one start of its
    processes.
    """
    root = tmp_path_factory.mktemp("megatron")
    jobs = []
    for name, changes in THEIRS.items():
        layouts = tuple(megatron_core.LAYOUTS) if name in SPREAD else ()
        folder = root / "theirs" / name / "saved"
        jobs.append(
            Job(name, folder, Namespace(**{**BASE, **changes}), apart="apart" in name, layouts=layouts)
        )
    for name, overrides in MEGATRON_RUNS.items():
        run = random_run(root / f"our {name}", ci_data, *overrides)
        implementation = IMPLEMENTATIONS.get(name, "local")
        export_megatron(run, root / "exported" / name, implementation=implementation, max_file_bytes=300_000)
        jobs.append(Job(f"our {name}", root / "exported" / name / RELEASE))
    return root, megatron_core.run(jobs, random_tokens(), root)


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_has_their_logits_and_goes_back_bit_for_bit(
    name: str, given: tuple[Path, dict[str, dict[str, Any]]], ci_data: Path, tmp_path: Path
) -> None:
    root, results = given
    saved = root / "theirs" / name / "saved"
    settings = import_megatron(saved, tmp_path / "ours", tokenizer=ci_data / TOKENIZER)
    run, _, _ = open_checkpoint(tmp_path / "ours")
    theirs, noise = results[name]["logits"], results[name]["noise"]
    # the other order of sums, and nothing else: a permuted head or a wrong expert changes logits by their own
    # size
    assert float((our_logits(run, random_tokens(), NO_SEPARATOR) - theirs).abs().max()) < 4 * noise
    assert float(theirs.std()) > 1000 * noise

    implementation = {**BASE, **THEIRS[name]}["transformer_impl"]
    export_megatron(tmp_path / "ours", tmp_path / "back", implementation=implementation)
    before, after = TorchDist(saved), TorchDist(tmp_path / "back" / RELEASE)
    if "apart" not in name:  # which is not written
        assert before.shapes == after.shapes
        assert all(torch.equal(whole(before, key), whole(after, key)) for key in before.shapes)
    assert import_megatron(tmp_path / "back", tmp_path / "again").model == settings.model
    assert equal_weights(tmp_path / "ours", tmp_path / "again")
    for layout in megatron_core.LAYOUTS if name in SPREAD else ():
        assert list((saved.with_name(layout)).glob("__1_*.distcp")), "the second rank wrote nothing"
        import_megatron(saved.with_name(layout), tmp_path / layout, tokenizer=ci_data / TOKENIZER)
        assert equal_weights(tmp_path / "ours", tmp_path / layout)


@pytest.mark.parametrize("name", MEGATRON_RUNS)
def test_megatron_core_loads_every_key_of_an_export_and_has_our_logits(
    name: str, given: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    root, results = given
    assert len(list((root / "exported" / name / RELEASE).glob("*.distcp"))) > 1
    run, _, _ = open_checkpoint(root / f"our {name}")
    result = results[f"our {name}"]
    assert (
        float((our_logits(run, random_tokens(), NO_SEPARATOR) - result["logits"]).abs().max())
        < 4 * result["noise"]
    )
