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
