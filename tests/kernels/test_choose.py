"""The choice of implementations: what is refused and why, and that what is chosen carries the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.kernels import choose
from hybridtrain.settings import KernelSettings
from tests.training import ci_settings, make_data


def test_every_op_has_a_key_and_every_kernel_is_listed() -> None:
    assert (*KernelSettings.model_fields, "depth_attention") == tuple(choose.OPS)
    for op in KernelSettings.model_fields:
        known = choose.OPS[op]
        assert set(KernelSettings.model_fields[op].annotation.__args__) == {"auto", *known}  # type: ignore[union-attr]
    folder = Path(choose.__file__).parent
    assert set(choose.TRITON_OPS) == {path.parent.name for path in folder.glob("*/kernel.py")}


def test_auto_is_torch_on_the_cpu() -> None:
    assert set(choose.resolve({}, "cpu").values()) == {"torch"}


def test_auto_on_a_gpu_takes_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    assert choose.resolve({"swiglu": "torch"}, "cuda") == choose.ON_GPU | {"swiglu": "torch"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(choose.resolve({}, "cuda").values()) == {"torch"}


def test_what_is_missing_is_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    with pytest.raises(choose.KernelChoiceError) as caught:
        choose.resolve({"rms_norm": "apex", "swiglu": "liger", "rope": "triton", "permute": "apex"}, "cpu")
    assert caught.value.problems == [
        "kernels.rms_norm=apex needs the package apex; it may be auto or torch here",
        "kernels.swiglu=liger needs the package liger-kernel; it may be auto or torch here",
        "kernels.rope=triton needs a CUDA device (or TRITON_INTERPRET=1, which is for tests); it may be auto or torch here",
        "kernels.permute=apex does not exist; it may be auto, torch, triton",
    ]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Path, *overrides: str) -> tuple[float, dict[str, str]]:
    """(loss of a step, what carried it), on one rank in this process."""
    from hybridtrain import train as loop
    from tests.training import loss_curve

    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda parts, split, batches: evaluate(parts, split, 1))  # not all of it, interpreted

    small = ["train.steps=1", "train.seq_len=8", "train.global_batch=1", "checkpoint.every=0"]
    small += ['model.layers=["memory+attention+moe", "attention+dense"]', "model.moe.num_experts=2", "data.vocab_size=1024"]
    loop.train(ci_settings(folder, data, *small, *overrides))
    (loss,) = loss_curve(folder)
    return loss, choose.table()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_run_on_triton_alone_equals_one_on_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "data")
    plain, _ = run(monkeypatch, tmp_path / "torch", data)
    fused, table = run(monkeypatch, tmp_path / "triton", data, *(f"kernels.{op}=triton" for op in choose.OPS))
    choose.use({})
    assert set(table.values()) == {"triton"}
    assert fused == pytest.approx(plain, rel=1e-5)
    assert "op swiglu" in capsys.readouterr().out


def test_a_run_refuses_what_is_missing(tmp_path: Path) -> None:
    from hybridtrain.train import train

    with pytest.raises(SettingsError, match=r"kernels\.rms_norm=apex needs the package apex"):
        train(ci_settings(tmp_path / "run", make_data(tmp_path / "data"), "kernels.rms_norm=apex"))


def test_a_dtensor_is_torchs_and_so_are_other_devices() -> None:
    class Sharded(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return self

    choose.use({"rope": "triton"})
    assert choose.chosen("rope", torch.ones(1)) == "triton"
    assert choose.chosen("rope", torch.ones(1).as_subclass(Sharded)) == "torch"
    assert choose.chosen("rope", torch.ones(1, device="meta")) == "torch"
    choose.use({})
    assert choose.chosen("rope", torch.ones(1)) == "torch"
