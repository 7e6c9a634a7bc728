"""The choice of implementations: what is refused and why, and that what is chosen carries the run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.kernels import choose
from hybridtrain.kernels.norms import op as rms_norm_op
from hybridtrain.kernels.norms import reference as rms_norm
from hybridtrain.kernels.swiglu import op as swiglu_op
from hybridtrain.kernels.swiglu import reference as swiglu
from hybridtrain.settings.tree import KernelSettings
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
        "kernels.rope=triton needs a CUDA device (or TRITON_INTERPRET=1, which is for tests); it may be "
        "auto or torch here",
        "kernels.permute=apex does not exist; it may be auto, torch, triton",
    ]


def test_fp8_needs_an_nvidia_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(
        choose.KernelChoiceError,
        match=r"grouped_mlp=fp8 needs an NVIDIA GPU of compute capability 8.9 or higher",
    ):
        choose.resolve({"grouped_mlp": "fp8"}, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose.resolve({"grouped_mlp": "fp8"}, "cuda")["grouped_mlp"] == "fp8"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(choose.KernelChoiceError, match="fp8 needs an NVIDIA GPU"):
        choose.resolve({"grouped_mlp": "fp8"}, "cuda")


def libraries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for liger-kernel 0.8.5 and apex, with their signatures; returns the calls made of them, in
    order, as they come.
    """
    calls: list[str] = []

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):  # type: ignore[no-untyped-def]
        calls.append(
            f"liger_rms_norm {in_place=}"
        )  # in place it would write the gradient over what others may still read
        return rms_norm.rms_norm(X, W, eps)

    def liger_swiglu(a, b):  # type: ignore[no-untyped-def]
        calls.append("liger_swiglu")
        return swiglu.swiglu(a, b)

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):  # type: ignore[no-untyped-def]
        calls.append(f"fused_rms_norm_affine {list(normalized_shape)}")
        return rms_norm.rms_norm(input, weight, eps)

    modules = {
        "liger_kernel.transformers.functional": (liger_rms_norm, liger_swiglu),
        "apex.normalization.fused_layer_norm": (fused_rms_norm_affine,),
    }
    for path, functions in modules.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:length]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for function in functions:
            setattr(module, function.__name__, function)
    return calls


def test_a_chosen_library_gets_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = libraries(monkeypatch)
    x, w, up = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    wanted = rms_norm.rms_norm(x, w, 1e-6)
    for how, said in (("liger", "liger_rms_norm in_place=False"), ("apex", "fused_rms_norm_affine [8]")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        table = choose.resolve({"rms_norm": how, "swiglu": "liger"}, "cuda")
        assert (table["rms_norm"], table["swiglu"]) == (how, "liger")
        choose.use(table)  # on the CPU, where the ops below are called
        assert torch.equal(rms_norm_op.rms_norm(x, w, 1e-6), wanted)
        assert torch.equal(swiglu_op.swiglu(x, up), swiglu.swiglu(x, up))
        assert calls == [said, "liger_swiglu"]
        calls.clear()
    choose.use({})


def test_a_run_refuses_what_is_missing(tmp_path: Path) -> None:
    from hybridtrain.run.loop import train

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
