"""`make test-gpu`: the kernels on the device against their definitions, and the miniature hybrid trained
there with NCCL.

Nobody has run this on a GPU yet. Its own bodies run on the CPU, interpreted and with gloo, in the fast suite.
With TRITON_INTERPRET=0, which `make test-gpu` sets, conftest.py also puts the tensors of every test_kernel.py
on the device.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from hybridtrain.kernels import choose
from hybridtrain.kernels.segment_sum.reference import segment_sum
from hybridtrain.run import loop
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import KernelSettings
from tests.training import loss_curve, make_data

CI_GPU = Path(__file__).parents[2] / "configs" / "ci_gpu.toml"
has_triton = importlib.util.find_spec("triton") is not None
ready = torch.cuda.is_available() and has_triton and os.environ["TRITON_INTERPRET"] == "0"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ready, reason="needs a CUDA device, triton and TRITON_INTERPRET=0"),
]
gpu = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731


@gpu
@pytest.mark.parametrize("size", [(257, 100), (2048, 512)])
def test_kernels_with_gradients(size: tuple[int, int]) -> None:
    from hybridtrain.kernels.report import bench

    assert bench.wrong("cuda", *size) == {}


@gpu
def test_segment_sum_is_bit_exact() -> None:
    from hybridtrain.kernels.segment_sum import kernel

    values, segment = torch.randn(3000, 80, device="cpu"), torch.randint(0, 200, (3000,), device="cpu")
    assert torch.equal(
        kernel.segment_sum(values.cuda(), segment.cuda(), 200).cpu(), segment_sum(values, segment, 200)
    )


def miniature(folder: Path, data: Path, *overrides: str) -> tuple[list[float], dict[str, str]]:
    """Losses of configs/ci_gpu.toml, and what carried each op, in this process, alone in a world of one
    rank.
    """
    with torch.device("cpu"):  # what the run puts elsewhere it says itself
        loop.train(
            load_settings(CI_GPU, [f"run.dir={folder}", f"data.path={data}", "data.source=[]", *overrides])
        )
    return loss_curve(folder), choose.table()


def within_noise(losses: list[float], half: list[float], single: list[float]) -> None:
    """Raises AssertionError where losses in bfloat16 are further from those in float32 than three times what
    `half`, computed in bfloat16 on the CPU, was at the worst of its steps so far, or three times 1e-4 of the
    loss."""
    noise = 0.0
    for step, (mine, rounded, exact) in enumerate(zip(losses, half, single, strict=True), 1):
        noise = max(noise, abs(rounded - exact), 1e-4 * exact)
        assert abs(mine - exact) <= 3 * noise, (
            f"step {step}: loss {mine}, {exact} in float32; bfloat16 is off by {noise:.2g} here"
        )


def stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.run.process_setup.choose_device", lambda: torch.device("cpu"))


@gpu
def test_the_miniature_trains_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    losses, table = miniature(tmp_path / "gpu", data)
    assert table == choose.ON_GPU
    stay_on_the_cpu(monkeypatch)
    half, plain = miniature(tmp_path / "half", data)
    assert set(plain.values()) == {"torch"}
    within_noise(losses, half, miniature(tmp_path / "single", data, "train.precision=float32")[0])
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.skipif(not has_triton, reason="needs triton")
def test_the_same_on_the_cpu_with_what_a_gpu_would_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, evaluate = make_data(tmp_path / "data"), loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda parts, split, *_: evaluate(parts, split, 1)
    )  # not all of it, interpreted
    stay_on_the_cpu(monkeypatch)
    small = ["train.steps=3", "train.seq_len=16", "train.global_batch=2"]
    small += ['model.layers=["engram+attention+moe", "attention+dense"]']
    single, _ = miniature(tmp_path / "single", data, *small, "train.precision=float32")
    half, _ = miniature(tmp_path / "half", data, *small)
    there = [f"kernels.{op}={choose.ON_GPU[op]}" for op in KernelSettings.model_fields]
    losses, table = miniature(tmp_path / "gpu", data, *small, *there)
    assert {op: table[op] for op in KernelSettings.model_fields}.items() <= choose.ON_GPU.items()
    eighth, _ = miniature(tmp_path / "fp8", data, *small, *there, "kernels.grouped_mlp=fp8", "train.steps=1")
    choose.use({})
    assert losses != half
    assert 0 < abs(eighth[0] - losses[0]) < 0.01 * losses[0]
    within_noise(losses, half, single)
    with pytest.raises(AssertionError, match=r"step 2: loss .* in float32; bfloat16 is off by"):
        within_noise([losses[0], losses[1] + 0.05, losses[2]], half, single)
