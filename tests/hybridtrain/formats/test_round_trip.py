"""What came with an import goes out again: config.json key by key, companions byte for byte, also after
training.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.errors import FormatError
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.hf_import import import_hf
from hybridtrain.formats.megatron_export import export_megatron
from hybridtrain.formats.megatron_import import import_megatron
from hybridtrain.formats.torch_dist import COMMON, RELEASE, TorchDist, read_common
from hybridtrain.run.init_from import COMPANIONS, ORIGIN, TEMPLATES
from hybridtrain.run.loop import train
from hybridtrain.settings.load import load_settings
from tests.hybridtrain.formats.tiny import MEGATRON_RUNS, OURS, THEIRS, edit_config, random_run, small_folder

import transformers  # isort: skip  (after tiny, which takes it off line)

FAMILIES = {case: case.partition(",")[0] for case in THEIRS}
ABSENT = "absent"  # of edit_config
# what real folders say in other words, or beyond their class
SPELLED: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": None,
        "rope_theta": 500.0,
        "rope_scaling": None,
        "dtype": None,
        "torch_dtype": "float32",
        "pretraining_tp": 1,
        "_name_or_path": "somebody/something",
        "head_dim": None,
        "bos_token_id": 3,
        "eos_token_id": [2, 4, 5],
        "pad_token_id": 0,
        "initializer_range": 0.006,
        "attention_dropout": 0.1,
        "temperature": 0.6,
        "custom_note": "kept",
        "custom_number": math.inf,
    },
    "qwen3": {
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": None,
        "eos_token_id": [7, 8],
    },
    "llama, untied": {"dtype": "bfloat16"},  # beside float32 weights
    "mixtral": {
        "max_position_embeddings": ABSENT,
        "vocab_size": 1032,
        "rms_norm_eps": ABSENT,
        "dtype": ABSENT,
        "router_jitter_noise": 0.1,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "eos_token_id": 5,
    },
    "qwen3_moe": {
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "num_local_experts": 8,
        "eos_token_id": [3],
    },
    "glm4_moe": {
        "num_nextn_predict_layers": 1,
        "eos_token_id": [1, 2, 3],
        "pad_token_id": 9,
        "routed_scaling_factor": 2.5,
    },
}


def their_folder(case: str, folder: Path, data: Path) -> Path:
    """A small folder with every companion and the keys of SPELLED."""
    changes = SPELLED.get(case, {})
    widths = {"head_dim": None} if case == "llama" else {}
    made = {key: changes[key] for key in ("mlp_only_layers", "decoder_sparse_step") if key in changes}
    small_folder(case, folder, data, **widths, **made)
    edit_config(folder, **{"max_position_embeddings": 4096} | changes)
    for name in COMPANIONS:
        (folder / name).write_text("{}" if name.endswith(".json") else f"{name} of somebody\n")
    ids = {key: value for key, value in changes.items() if key.endswith("_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids | {"temperature": 0.6}))
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "tools.jinja").write_text("{{ tools }}")
    return folder


def companions(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".safetensors"
    }


@pytest.mark.parametrize("case", THEIRS)
def test_config_and_companions_come_back_as_they_came(case: str, ci_data: Path, tmp_path: Path) -> None:
    folder = their_folder(case, tmp_path / "theirs", ci_data)
    import_hf(folder, tmp_path / "ours", seq_len=32)
    assert export_hf(tmp_path / "ours", tmp_path / "back") == FAMILIES[case]
    before, after = companions(folder), companions(tmp_path / "back")
    assert after.keys() == before.keys()
    assert json.loads(after.pop("config.json")) == json.loads(before.pop("config.json"))
    assert after == before


def test_of_a_trained_model_only_what_training_changed_is_another(ci_data: Path, tmp_path: Path) -> None:
    folder = their_folder("llama", tmp_path / "theirs", ci_data)
    import_hf(folder, tmp_path / "ours", seq_len=32)
    changes = (
        "train.steps=1",
        "train.global_batch=1",
        "train.micro_batches=1",
        f"data.path={ci_data}",
        "train.eval_every=0",
    )
    for name in (TOKENIZER, COMPRESSION):  # the data were made with the tokenizer of the import
        assert (ci_data / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    train(load_settings(tmp_path / "ours/settings.toml", changes))
    export_hf(tmp_path / "ours-train", tmp_path / "back")
    assert companions(tmp_path / "back") | {"config.json": ""} == companions(folder) | {"config.json": ""}
    came, back = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert back == came


def test_what_a_model_changed_is_written_and_nothing_else(ci_data: Path, tmp_path: Path) -> None:
    came = json.loads((their_folder("llama", tmp_path / "theirs", ci_data) / "config.json").read_text())
    came["torch_dtype"] = "bfloat16"
    overrides = (
        *OURS["llama"],
        "engram.enabled=false",
        "model.attention.rope_theta=700",
        "train.seq_len=8192",
    )
    run = random_run(tmp_path / "run", ci_data, *overrides, 'model.layers=["3*attention+dense"]')
    (run / ORIGIN).write_text(json.dumps({"config": came, "dtype": "bfloat16", "positions": 4096}))
    export_hf(run, tmp_path / "out", dtype="float32")
    out = json.loads((tmp_path / "out/config.json").read_text())
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 96,
    }
    changed = {
        "num_hidden_layers": 3,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "torch_dtype": "float32",
    }
    changed |= {
        "tie_word_embeddings": False,
        "rope_theta": 700.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    }
    changed |= sizes | {"rms_norm_eps": 1e-6}
    assert {key: value for key, value in out.items() if came.get(key) != value} == {
        key: value for key, value in changed.items() if came.get(key) != value
    }
    assert came.keys() - out.keys() == {"rope_scaling"}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 700
    assert export_hf(run, tmp_path / "hybrid", family="hybridtrain") == "hybridtrain"
    hybrid = json.loads((tmp_path / "hybrid/config.json").read_text())
    assert [hybrid[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [3, [2, 4, 5], 0]
    assert hybrid["max_position_embeddings"] == 8192


def test_without_an_origin_the_config_agrees_with_the_generation_config_of_the_folder(
    ci_data: Path, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", ci_data, "engram.enabled=false", *OURS["qwen3"])
    (run / "generation_config.json").write_text('{"eos_token_id": [3, 4], "pad_token_id": 1}')
    export_hf(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, [3, 4], 1)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [3, 4]


def test_megatrons_arguments_come_back_as_they_came(ci_data: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ci_data, *MEGATRON_RUNS["softmax first"])
    export_megatron(run, tmp_path / "theirs", dtype="bfloat16")
    common = torch.load(tmp_path / "theirs" / RELEASE / COMMON, weights_only=False)
    said = {
        "max_position_embeddings": 4096,
        "seq_length": 2048,
        "init_method_std": 0.008,
        "hidden_dropout": 0.1,
    }
    said |= {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss", "vocab_size": 1000}
    torch.save(
        {**common, "args": Namespace(**{**vars(common["args"]), **said})},
        tmp_path / "theirs" / RELEASE / COMMON,
    )
    import_megatron(tmp_path / "theirs", tmp_path / "ours", seq_len=32)
    export_megatron(tmp_path / "ours", tmp_path / "back")
    came, back = (vars(read_common(tmp_path / name / RELEASE)["args"]) for name in ("theirs", "back"))
    assert back == came
    assert TorchDist(tmp_path / "back" / RELEASE).dtype("embedding.word_embeddings.weight") == torch.bfloat16
    assert export_hf(tmp_path / "ours", tmp_path / "hf", family="hybridtrain") == "hybridtrain"
    assert json.loads((tmp_path / "hf/config.json").read_text())["max_position_embeddings"] == 4096


def edit_origin(run: Path, part: str, **changes: Any) -> None:
    origin = json.loads((run / ORIGIN).read_text())
    origin[part] |= changes
    (run / ORIGIN).write_text(json.dumps(origin))


def test_an_origin_that_no_import_wrote_is_refused(ci_data: Path, tmp_path: Path) -> None:
    import_hf(small_folder("llama", tmp_path / "theirs", ci_data), tmp_path / "ours")
    edit_origin(
        tmp_path / "ours",
        "config",
        auto_map={"AutoModelForCausalLM": "else--where.Model"},
        attention_bias=True,
    )
    with pytest.raises(FormatError, match=r"origin\.json") as caught:
        export_hf(tmp_path / "ours", tmp_path / "back")
    assert [problem.partition("=")[0] for problem in caught.value.problems] == ["attention_bias", "auto_map"]

    export_megatron(random_run(tmp_path / "run", ci_data, *MEGATRON_RUNS["mixtral"]), tmp_path / "megatron")
    import_megatron(tmp_path / "megatron", tmp_path / "imported")
    edit_origin(tmp_path / "imported", "args", moe_router_load_balancing_type="sinkhorn")
    with pytest.raises(FormatError, match="routing by Sinkhorn's algorithm"):
        export_megatron(tmp_path / "imported", tmp_path / "back")
    assert not (tmp_path / "back").exists()
