"""The choice of implementations: what is refused and why, and that what is chosen carries the run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.kernels import ops
from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.norms import op as rms_norm_op
from hybridtrain.kernels.norms import reference as rms_norm
from hybridtrain.kernels.norms.op import ROPE
from hybridtrain.kernels.swiglu import op as swiglu_op
from hybridtrain.kernels.swiglu import reference as swiglu
from hybridtrain.settings.tree import KernelSettings
from tests.training import ci_settings, make_data


def test_every_op_is_listed_with_its_key_and_its_kernels() -> None:
    folder = Path(ops.__file__).parent
    declared = sum(path.read_text(encoding="utf-8").count(" = Op(\n") for path in folder.glob("*/op.py"))
    declared += sum(path.read_text(encoding="utf-8").count(' = Op("') for path in folder.glob("*/op.py"))
    assert len(ops.OPS) == declared > 10
    assert tuple(KernelSettings.model_fields) == tuple(op.name for op in ops.OPS.values() if op.has_key)
    for name, key in KernelSettings.model_fields.items():
        assert key.annotation.__args__ == ("auto", *ops.OPS[name].implementations)  # type: ignore[union-attr]
    sources = {
        f"{path.parent.name}.{path.stem}"
        for path in folder.glob("*/*.py")
        if "def cases(" in path.read_text()
    }
    assert sorted(sources) == sorted(source for op in ops.OPS.values() for source in op.sources)


def test_recompute_keeps_what_ops_declare() -> None:
    from hybridtrain.parallel.recompute import PRODUCTS

    assert torch.ops.aten._grouped_mm.default in PRODUCTS
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in PRODUCTS


def test_auto_is_torch_on_the_cpu() -> None:
    assert set(ops.resolve({}, "cpu").chosen.values()) == {"torch"}


def test_auto_on_a_gpu_takes_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    there = {name: op.on_gpu for name, op in ops.OPS.items() if len(op.implementations) > 1}
    assert ops.resolve({"swiglu": "torch"}, "cuda") == Backends(there | {"swiglu": "torch"}, "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(ops.resolve({}, "cuda").chosen.values()) == {"torch"}


def test_what_is_missing_is_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    with pytest.raises(ops.KernelChoiceError) as caught:
        ops.resolve({"rms_norm": "apex", "swiglu": "liger", "rope": "triton", "permute": "apex"}, "cpu")
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
        ops.KernelChoiceError,
        match=r"grouped_mlp=fp8 needs an NVIDIA GPU of compute capability 8.9 or higher",
    ):
        ops.resolve({"grouped_mlp": "fp8"}, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert ops.resolve({"grouped_mlp": "fp8"}, "cuda").chosen["grouped_mlp"] == "fp8"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ops.KernelChoiceError, match="fp8 needs an NVIDIA GPU"):
        ops.resolve({"grouped_mlp": "fp8"}, "cuda")


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
        chosen = ops.resolve({"rms_norm": how, "swiglu": "liger"}, "cuda").chosen
        assert (chosen["rms_norm"], chosen["swiglu"]) == (how, "liger")
        backends = Backends(chosen)  # on the CPU, where the ops below are called
        assert torch.equal(rms_norm_op.rms_norm(x, w, 1e-6, backends), wanted)
        assert torch.equal(swiglu_op.swiglu(x, up, backends), swiglu.swiglu(x, up))
        assert calls == [said, "liger_swiglu"]
        calls.clear()


def test_a_run_refuses_what_is_missing(tmp_path: Path) -> None:
    from hybridtrain.run.loop import train

    with pytest.raises(SettingsError, match=r"kernels\.rms_norm=apex needs the package apex"):
        train(ci_settings(tmp_path / "run", make_data(tmp_path / "data"), "kernels.rms_norm=apex"))


def test_a_dtensor_is_torchs_and_so_are_other_devices() -> None:
    class Sharded(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return self

    backends = Backends({"rope": "triton"})
    assert backends.of(ROPE, torch.ones(1)) == "triton"
    assert backends.of(ROPE, torch.ones(1).as_subclass(Sharded)) == "torch"
    assert backends.of(ROPE, torch.ones(1, device="meta")) == "torch"
    assert TORCH.of(ROPE, torch.ones(1)) == "torch"
