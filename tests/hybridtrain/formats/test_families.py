"""Published architectures, both ways: the logits are transformers', and what was imported is exported bit for
bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain.errors import FormatError
from hybridtrain.formats.families import FAMILIES
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.hf_import import import_hf
from hybridtrain.run.generate import evaluate_checkpoint, open_checkpoint
from hybridtrain.settings.load import load_settings
from tests.hybridtrain.formats.tiny import (
    OURS,
    THEIRS,
    edit_config,
    our_logits,
    random_run,
    random_tokens,
    save_theirs,
    their_model,
)

import transformers  # isort: skip  (after tiny, which takes it off line)

NO_SEPARATOR = -1


def own_error(model: Any, tokens_BT: Tensor) -> tuple[Tensor, float]:
    """The model's float32 logits, and how far they are from its own in float64."""
    with torch.no_grad():
        logits = model(tokens_BT).logits
        model.set_experts_implementation("eager")  # the grouped product knows no float64
        exact = model.double()(tokens_BT).logits
    model.float()
    return logits, float((logits - exact).abs().max())


@pytest.mark.parametrize("case", THEIRS)
def test_an_imported_model_has_their_logits_and_goes_back_bit_for_bit(
    case: str, ci_data: Path, tmp_path: Path
) -> None:
    model = their_model(case)
    folder = save_theirs(model, tmp_path / "theirs", ci_data)
    assert len(list(folder.glob("*.safetensors"))) > 1
    import_hf(folder, tmp_path / "ours")
    tokens_BT = random_tokens()
    run, _, _ = open_checkpoint(tmp_path / "ours")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs, noise = own_error(model, tokens_BT)
    # the other order of sums, and nothing else: a permuted head or a wrong expert changes logits by their own
    # size
    assert float((our_logits(run, tokens_BT, NO_SEPARATOR) - theirs).abs().max()) < 4 * noise

    family = case.partition(",")[0]
    assert export_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=200_000) == family
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    after = back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():
        assert float((back.eval()(tokens_BT).logits - theirs).abs().max()) < 4 * noise


NO_ENGRAM = "engram.enabled=false"


@pytest.mark.parametrize("family", OURS)
def test_an_exported_model_has_our_logits(family: str, ci_data: Path, tmp_path: Path) -> None:
    source = random_run(tmp_path / "run", ci_data, NO_ENGRAM, *OURS[family])
    assert export_hf(source, tmp_path / "out") == family
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens_BT = random_tokens()
    run, _, separator = open_checkpoint(source)
    theirs, noise = own_error(model, tokens_BT)
    assert float((our_logits(run, tokens_BT, NO_SEPARATOR) - theirs).abs().max()) < 4 * noise
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The people of the United States, in 1862."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == separator


def test_half_precision_halves_the_matrices(ci_data: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ci_data, NO_ENGRAM, *OURS["llama"])
    sizes = []
    for dtype in ("float32", "bfloat16"):
        export_hf(run, tmp_path / dtype, dtype=dtype)
        sizes.append((tmp_path / dtype / "model.safetensors").stat().st_size)
    assert 0.49 < sizes[1] / sizes[0] < 0.53
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert model.dtype == torch.bfloat16


def test_the_imported_folder_is_evaluated_and_says_how_to_go_on(ci_data: Path, tmp_path: Path) -> None:
    folder = save_theirs(their_model("llama"), tmp_path / "theirs", ci_data)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    settings = import_hf(folder, tmp_path / "ours", seq_len=64)
    assert load_settings(tmp_path / "ours/settings.toml") == settings
    assert (settings.train.init_from, settings.train.seq_len) == (str(tmp_path / "ours"), 64)
    assert settings.model.layers == ("3*attention+dense",)
    values = evaluate_checkpoint(tmp_path / "ours", "validation", ci_data, batches=1)
    assert values["tokens"] == 32 * 64
    assert values["perplexity"] > 100  # of random weights
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back/chat_template.jinja").read_text() == "{{ messages }}"


def refusal(folder: Path, out: Path) -> list[str]:
    with pytest.raises(FormatError) as caught:
        import_hf(folder, out)
    assert not out.exists()
    return caught.value.problems


def test_what_our_model_lacks_is_refused_by_name_all_at_once(ci_data: Path, tmp_path: Path) -> None:
    folder = save_theirs(their_model("llama"), tmp_path / "theirs", ci_data)
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    scaled["original_max_position_embeddings"] = 64
    edit_config(
        folder,
        attention_bias=True,
        hidden_act="gelu",
        num_key_value_heads=3,
        vocab_size=1000,
        rope_parameters=scaled,
    )
    assert refusal(folder, tmp_path / "ours") == [
        "attention_bias=true: biases in attention",
        'hidden_act="gelu": an activation other than SiLU',
        'rope_parameters.rope_type="llama3": scaled rotations',
        "model.attention.num_kv_heads=3 does not divide num_heads=4; it may be 1, 2 or 4",
        "tokenizer.json has 1024 entries, the embedding 1000 rows",
    ]


def test_deepseek_v3_is_refused_for_its_attention(tmp_path: Path) -> None:
    transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(
        tmp_path / "theirs"
    )
    problems = refusal(tmp_path / "theirs", tmp_path / "ours")
    assert problems[0].startswith("architecture DeepseekV3ForCausalLM is not one of LlamaForCausalLM, ")
    assert problems[1:] == [
        "kv_lora_rank=512: multi-head latent attention (MLA): keys and values here have full width",
        "q_lora_rank=1536: low-rank queries (MLA)",
    ]


def test_tensors_that_are_not_the_configs_are_all_named(ci_data: Path, tmp_path: Path) -> None:
    model = their_model("qwen3")
    model.model.layers[1].self_attn.extra = torch.nn.Linear(2, 3, bias=False)
    folder = save_theirs(model, tmp_path / "theirs", ci_data)
    edit_config(folder, intermediate_size=100, num_hidden_layers=4, layer_types=None)
    problems = refusal(folder, tmp_path / "ours")
    assert "model.layers.3.self_attn.q_norm.weight is missing" in problems
    assert "model.layers.0.mlp.down_proj.weight has shape [64, 96], must have [64, 100]" in problems
    assert "model.layers.1.self_attn.extra.weight has no place in our model" in problems
    assert len(problems) == 11 + 3 * 3 + 1


def test_a_family_that_is_another_model_is_refused_with_every_reason(ci_data: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ci_data, 'model.moe.score="sigmoid"', "model.moe.num_shared=1")
    with pytest.raises(FormatError) as caught:
        export_hf(run, tmp_path / "out", family="mixtral")
    name = "MixtralForCausalLM"
    assert caught.value.problems == [
        f"layers 1, 3 are Engram layers; {name} has none",
        f"model.attention.qk_norm=true: {name} has false",
        f'model.moe.score="sigmoid": {name} has "softmax"',
        f"model.moe.num_shared=1: {name} has 0",
        'model.layers=["attention+dense", "engram+attention+moe", "attention+moe", '
        '"engram+attention+dense"]: '
        f"{name} has every layer moe",
        f"the routers have selection biases (model.moe.bias_rate); {name} has none",
    ]
    assert not (tmp_path / "out").exists()


def test_no_tensor_is_left_behind_unsaid(
    ci_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = FAMILIES["llama"]
    layer = {ours: theirs for ours, theirs in llama.layer.items() if ours != "mixer.wo.weight"}
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(llama, layer=layer))
    run = random_run(tmp_path / "run", ci_data, NO_ENGRAM, *OURS["llama"])
    with pytest.raises(FormatError) as caught:
        export_hf(run, tmp_path / "out")
    assert caught.value.problems == [
        f"layers.{i}.mixer.wo.weight has no place in LlamaForCausalLM" for i in (0, 1)
    ]
