"""`hybridtrain import` and `hybridtrain export` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.errors import UserError
from hybridtrain.formats.hf_export import export_hf
from hybridtrain.formats.hf_import import import_hf
from tests.console import hybridtrain, refused
from tests.hybridtrain.formats.tiny import save_theirs, their_model


def test_there_and_back_and_what_is_refused(ci_data: Path, tmp_path: Path) -> None:
    theirs = save_theirs(their_model("llama"), tmp_path / "theirs", ci_data)
    done = hybridtrain("import", theirs, tmp_path / "ours", "--seq-len", 32)
    assert done.status == 0, done
    assert done.out.startswith(
        f"{tmp_path / 'ours'}: 3*attention+dense; train from it with hybridtrain train"
    )
    done = hybridtrain("export", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "100KB")
    assert (done.status, done.out) == (0, f"{tmp_path / 'back'}: llama\n"), done
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back")
    )
    assert after == before  # whatever length training would have

    ours, out = tmp_path / "ours", tmp_path / "other"
    assert '--format "gguf": it may be hf or megatron' in refused(
        hybridtrain("export", ours, out, "--format", "gguf")
    )
    assert "back exists and is not empty; choose another folder" in refused(
        hybridtrain("export", ours, tmp_path / "back")
    )
    with pytest.raises(UserError, match='--family "gpt": it may be auto, llama, qwen3'):
        export_hf(ours, out, family="gpt")
    with pytest.raises(UserError, match='--dtype "int8": it may be float32, bfloat16'):
        export_hf(ours, out, dtype="int8")
    with pytest.raises(UserError, match=r"config\.json: cannot be read: No such file"):
        import_hf(out, tmp_path / "new")
    assert not out.exists()
    assert not (tmp_path / "new").exists()
