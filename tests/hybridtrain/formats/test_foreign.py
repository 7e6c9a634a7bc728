"""What a Hugging Face folder of somebody else may hold: tensors that are not taken by name alone, odd
indexes, odd configs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridtrain.errors import DataError, FormatError, UserError
from hybridtrain.files.untrusted import UntrustedFileError
from hybridtrain.formats.command import import_model
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.hf_import import import_hf
from hybridtrain.formats.shards import INDEX, SINGLE, SafetensorsFolder
from hybridtrain.run.generate import open_checkpoint
from tests.hybridtrain.formats.tiny import edit_config, our_logits, random_tokens, small_folder

import transformers  # isort: skip  (after tiny, which takes it off line)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FAMILIES = ("llama", "qwen3", "mixtral", "qwen3_moe", "glm4_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> dict[str, Path]:
    """A small folder of every family, untied."""
    root = tmp_path_factory.mktemp("foreign")
    return {name: small_folder(name, root / name, ci_data, tie_word_embeddings=False) for name in FAMILIES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them to change."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def refusal(folder: Path) -> str:
    out = folder.with_name("refused")
    with pytest.raises(UserError) as caught:
        import_hf(folder, out)
    assert not list(out.parent.glob("*refused*")), "a refused import left something"
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stored_head_beside_tied_embeddings_counts_as_in_transformers(
    name: str, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name)
    edit_config(folder, tie_word_embeddings=True)
    settings = import_hf(folder, tmp_path / "untied")
    assert not settings.model.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight: imported untied" in capsys.readouterr().err
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            random_tokens()
        ).logits
    ours = our_logits(open_checkpoint(tmp_path / "untied")[0], random_tokens(), -1)
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
    export_hf(tmp_path / "untied", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False

    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert import_hf(folder, tmp_path / "tied").model.tie_embeddings
    assert "untied" not in capsys.readouterr().err
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:-1].clone()}))
    assert f"{HEAD} has shape [1031, 16], must have [1032, 16]" in refusal(folder)


def test_tensors_are_looked_at_and_not_taken_by_name(copied: Callable[[str], Path]) -> None:
    folder = copied("glm4_moe")
    layer = "model.layers.1."
    up, norm, bias = (
        f"{layer}mlp.experts.3.up_proj.weight",
        f"{layer}input_layernorm.weight",
        f"{layer}mlp.gate.e_score_correction_bias",
    )

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[up] = tensors[up].to(torch.int8)
        tensors[norm] = tensors[norm].to(torch.float8_e4m3fn)
        tensors[bias] = tensors[bias].bool()
        tensors[HEAD] = tensors[HEAD].to(torch.complex64)
        tensors[f"{layer}mlp.experts.8.up_proj.weight"] = torch.zeros(8, 16)
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(16)
        tensors[f"{up}_scale_inv"] = torch.ones(1)
        tensors["extra.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(folder, change)
    message = refusal(folder)
    for name, dtype in ((up, "I8"), (norm, "F8_E4M3"), (bias, "BOOL"), (HEAD, "C64")):
        assert f"{name} is {dtype}: weights may be float32, bfloat16, float16, float64" in message
    for name in (
        f"{layer}mlp.experts.8.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        f"{up}_scale_inv",
    ):
        assert f"{name} has no place in our model" in message
    assert "extra.rotary_emb.inv_freq has no place in our model" in message


def test_values_that_are_no_numbers_are_refused_with_their_tensor_and_number(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("mixtral")
    gate, down = (
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    )

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[gate][0, :3] = torch.nan
        tensors[down] = tensors[down].double()
        tensors[down][1, 1] = 1e300  # infinite in float32

    edit_tensors(folder, change)
    message = refusal(folder)
    assert f"{gate} has 3 NaN and 0 infinite values" in message
    assert f"{down} has 0 NaN and 1 infinite values" in message


def test_halves_are_carried_and_doubles_with_a_word(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].double()}))
    import_hf(folder, tmp_path / "double")
    assert "1 float64 tensors are rounded to float32" in capsys.readouterr().err
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        edit_tensors(
            folder, lambda tensors, dtype=dtype: tensors.update({k: v.to(dtype) for k, v in tensors.items()})
        )
        edit_config(folder, dtype=name)
        import_hf(folder, tmp_path / name)
        export_hf(tmp_path / name, tmp_path / f"{name} back")
        before, after = load_file(folder / SINGLE), load_file(tmp_path / f"{name} back" / SINGLE)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key].float(), value.float()) for key, value in before.items())
        assert {value.dtype for value in after.values() if value.ndim > 1} == {dtype}
        assert json.loads((tmp_path / f"{name} back/config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )


def test_stored_rotation_frequencies_must_be_those_of_the_config(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, name = copied("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    edit_tensors(folder, lambda tensors: tensors.update({name: right.bfloat16()}))
    import_hf(folder, tmp_path / "ours")
    edit_tensors(folder, lambda tensors: tensors.update({name: right**1.1}))
    assert f"{name} holds other rotation frequencies than rope_theta=500.0 gives" in refusal(folder)


def shard(folder: Path) -> dict[str, str]:
    """Cut model.safetensors in two with an index; returns its weight_map."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_of_a_single_file_and_an_index_that_is_read_which_transformers_read(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    shard(folder)
    edit_tensors(folder, lambda tensors: tensors[HEAD].zero_())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not theirs.lm_head.weight.any()
    read = SafetensorsFolder(folder)
    assert not read.read(HEAD).any()
    assert (
        f"{SINGLE} is read, as transformers do; not read: a.safetensors, b.safetensors, {INDEX}"
        in capsys.readouterr().err
    )
    (folder / SINGLE).unlink()
    assert SafetensorsFolder(folder).read(HEAD).any()


def test_the_weight_map_says_where_a_tensor_is(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    weight_map = shard(folder)
    (folder / SINGLE).unlink()
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map[HEAD]]
    tensors = load_file(folder / other)
    save_file(tensors | {HEAD: torch.zeros(1032, 16)}, folder / other, {"format": "pt"})
    assert f"{HEAD}: is in {other}, and {INDEX} does not name it there" in refusal(folder)
    save_file(tensors, folder / other, {"format": "pt"})
    changed = {"weight_map": weight_map | {HEAD: other, "more": other}}
    (folder / INDEX).write_text(json.dumps(changed))
    message = refusal(folder)
    assert f"{HEAD}: is not in {other}, where {INDEX} says it is" in message
    assert f"more: is not in {other}" in message
    assert f"{HEAD}: is in {weight_map[HEAD]}, and {INDEX} does not name it there" in message


ODD_INDEXES: tuple[tuple[Any, str], ...] = (
    ([], "the whole: Input should be"),
    ({}, "weight_map: Field required"),
    ({"weight_map": {}}, "weight_map: Dictionary should have at least 1 item"),
    ({"weight_map": {"t": 1, "u": None}}, "weight_map.u: Input should be a valid string"),
    ({"weight_map": {"t": "../other/model.safetensors"}}, "which is not one below"),
    ({"weight_map": {"t": "/etc/passwd"}}, "which is not one below"),
    ({"weight_map": {"t": "config.json"}}, "only .safetensors files are read"),
    (
        {"weight_map": {"t": "no.safetensors"}},
        "no.safetensors: is named in model.safetensors.index.json and missing",
    ),
    ({"weight_map": {"t": "folder.safetensors"}}, "folder.safetensors: is damaged: is not a file"),
)


@pytest.mark.parametrize(("index", "message"), ODD_INDEXES, ids=[message for _, message in ODD_INDEXES])
def test_odd_indexes_end_in_a_message(index: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises((DataError, UntrustedFileError), match=re.escape(message)):
        SafetensorsFolder(tmp_path)


THREE_ODD = '{"num_attention_heads": 0, "hidden_size": -4, "rms_norm_eps": "1e-5"}'
ODD_CONFIGS: tuple[tuple[str, str, str], ...] = (
    ("llama", "[]", "the whole: Input should be a valid dictionary"),
    ("llama", '{"model_type": ["llama"]}', "model_type: Input should be a valid string"),
    (
        "llama",
        '{"model_type": "llama", "architectures": "LlamaForCausalLM"}',
        "architectures: Input should be a valid list",
    ),
    ("llama", '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}", "is not JSON"),
    (
        "llama",
        '{"num_attention_heads": 0, "hidden_size": -4, "rms_norm_eps": "1e-5"}',
        "num_attention_heads: Input should be greater",
    ),
    ("llama", THREE_ODD, "hidden_size: Input should be greater"),
    (
        "llama",
        '{"num_attention_heads": 0, "hidden_size": -4, "rms_norm_eps": "1e-5"}',
        "rms_norm_eps: Input should be a valid number",
    ),
    ("llama", '{"num_hidden_layers": null}', "num_hidden_layers: Input should be a valid integer"),
    (
        "llama",
        '{"max_position_embeddings": null, "tie_word_embeddings": null}',
        "tie_word_embeddings: Input should be a valid bool",
    ),
    (
        "llama",
        '{"num_hidden_layers": 9000}',
        "config.json promises 9000 layers or experts, and 21 tensors are stored",
    ),
    ("llama", '{"num_hidden_layers": 1e3}', "num_hidden_layers: Input should be a valid integer"),
    ("llama", '{"head_dim": 7}', "RoPE requires an even rotary dimension"),
    ("llama", '{"vocab_size": true}', "vocab_size: Input should be a valid integer"),
    ("llama", '{"rope_parameters": [1]}', "rope_parameters: Input should be a valid dictionary"),
    ("llama", '{"rope_parameters": {"rope_theta": "10000"}}', "rope_theta: Input should be a valid number"),
    ("llama", '{"rope_parameters": {"rope_theta": 10000.0, "rope_type": ["default"]}}', "rope"),
    ("llama", '{"rope_scaling": "linear"}', "rope_scaling: Input should be a valid dictionary"),
    (
        "llama",
        '{"rope_scaling": {"type": "linear", "factor": 2.0}}',
        'rope_parameters.rope_type="linear": scaled rotations',
    ),
    ("llama", '{"dtype": "no such"}', "dtype: Value error, is not a dtype of torch"),
    ("llama", '{"rms_norm_eps": NaN}', "rms_norm_eps: Input should be"),
    (
        "qwen3_moe",
        '{"decoder_sparse_step": 0}',
        "decoder_sparse_step: Input should be greater than or equal to 1",
    ),
    ("qwen3_moe", '{"mlp_only_layers": [true]}', "mlp_only_layers.0: Input should be a valid integer"),
    ("qwen3_moe", '{"mlp_only_layers": 1}', "mlp_only_layers: Input should be a valid list"),
    (
        "glm4_moe",
        '{"first_k_dense_replace": -1}',
        "first_k_dense_replace: Input should be greater than or equal to 0",
    ),
    ("glm4_moe", '{"n_group": 3}', "num_groups"),
    ("mixtral", '{"num_local_experts": 50000}', "config.json promises 50000 layers or experts"),
)


@pytest.mark.parametrize(
    ("name", "changes", "message"), ODD_CONFIGS, ids=[f"{n} {c[:40]}" for n, c, _ in ODD_CONFIGS]
)
def test_odd_configs_end_in_a_message(
    name: str, changes: str, message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(name)
    config = json.loads((folder / "config.json").read_text())
    if "model_type" in changes or not changes.startswith("{"):
        (folder / "config.json").write_text(changes)
    else:
        kept = {key: value for key, value in config.items() if f'"{key}"' not in changes}
        (folder / "config.json").write_text(json.dumps(kept)[:-1] + ", " + changes[1:])
    assert message in refusal(folder)


def test_a_damaged_generation_config_is_refused_at_import(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert "generation_config.json: is not what it should be" in refusal(folder)


def test_keys_that_nobody_knows_are_told(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("llama")
    edit_config(folder, clip_qkv=8.0, use_turbo=False, temperature=0.7)
    import_hf(folder, tmp_path / "ours")
    said = capsys.readouterr().err
    assert (
        "keys of config.json that transformers' LlamaForCausalLM does not know either: clip_qkv=8.0\n" in said
    )


def test_an_adapter_and_code_of_its_own_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "metadata.json").write_text("{}")  # which makes it no checkpoint of Megatron
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"})
    with pytest.raises(FormatError) as caught:
        import_model(folder, folder.with_name("ours"), None, None, None, None)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        'auto_map={"AutoModelForCausalLM"',
        "adapter_config.json",
    ]


def test_no_tensor_of_an_unknown_architecture_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "attribute_map": 5}')
    with pytest.raises(FormatError, match="architecture gpt2 is not one of LlamaForCausalLM"):
        import_hf(tmp_path, tmp_path / "ours")
