"""What a GPU would be asked to do for a layer: no more than it is now, and no more than transformers asks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from tools.count_launches import main
from tools.launches import Counted, Launches, count
from tools.layer_subjects import META, SUBJECTS, Shape

AUTO, TORCH, MIXTRAL, _ = SUBJECTS
# kernels forward and backward, MB made and kept; a change that lowers one lowers it here and in
# docs/performance.md
BOUNDS = {AUTO: (33, 33, 248.3, 76.2), TORCH: (54, 63, 392.3, 72.0)}


def counted(name: str) -> Counted:
    package, make = SUBJECTS[name]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    shape = Shape()
    return count(*make(shape), shape.input())


@pytest.mark.parametrize("name", BOUNDS)
def test_a_layer_asks_for_no_more_than_it_does_now(name: str) -> None:
    forward, backward, made, kept = BOUNDS[name]
    result = counted(name)
    assert result.forward.total() <= forward, result.forward
    assert result.backward.total() <= backward, result.backward
    assert not result.waits
    assert result.made_bytes / 1e6 <= made
    assert result.saved_bytes / 1e6 <= kept


def test_auto_launches_every_kernel_that_the_layer_has() -> None:
    kernels = counted(AUTO).forward
    ours = {"combine": 1, "permute": 1, "rope": 2, "router_topk": 1, "swiglu": 1}
    assert {name: kernels[f"triton {name}"] for name in ours} == ours


@pytest.mark.parametrize("name", BOUNDS)
def test_a_layer_asks_for_no_more_than_that_of_transformers(name: str) -> None:
    theirs, ours = counted(MIXTRAL), counted(name)
    assert (ours.forward + ours.backward).total() < (theirs.forward + theirs.backward).total()
    assert ours.waits.total() <= theirs.waits.total()
    assert ours.made_bytes < theirs.made_bytes
    assert ours.saved_bytes < theirs.saved_bytes


def test_a_function_counted_by_hand() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, device=META))

        def forward(self, x_ND: Tensor) -> Tensor:
            # kept: x, since the weight is a parameter; the weight's view is no kernel
            y_ND = x_ND.view(4, 8) * self.weight[None]
            buffer_ND = torch.empty_like(y_ND)  # memory, and no kernel
            buffer_ND.copy_(y_ND.detach())
            if buffer_ND.sum().item() > 2:  # a sum, and a wait for its value
                raise AssertionError("a value that the host reads is 1")
            return y_ND

    x_P = torch.empty(32, device=META, requires_grad=True)
    module = Scaled()
    result = count(module, module, x_P)
    assert result.forward == {"mul": 1, "copy_": 1, "sum": 1}
    # by x and by the weight, whose gradient is summed over the rows
    assert result.backward == {"mul": 2, "sum": 1}
    assert result.waits == {"_local_scalar_dense": 1}
    row, whole = 4 * 8, 4 * 32
    assert result.made_bytes == (whole + whole + 4) + (whole + whole + row)
    assert result.saved_bytes == whole


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: bool(x[0]), "_local_scalar_dense"),
    ],
)
def test_every_way_to_read_a_value_is_a_wait(read: object, name: str) -> None:
    with Launches() as launches:
        assert callable(read)
        read(torch.empty(3, device=META))
    assert launches.waits == {name: 1}
    assert not launches.kernels


def test_an_operation_made_of_others_counts_as_they_do() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.linalg.vecdot(x, x)

    with Launches() as launches:
        Own.apply(torch.empty(2, 3, device=META, requires_grad=True))
    assert launches.kernels == {"mul": 1, "sum": 1}


def test_prints_a_line_for_each_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--dim 64 --heads 2 --experts 4 --hidden 32 --batch 1 --seq-len 16 --passes 1"
    main([*sizes.split(), "--names"])
    out, notes = capsys.readouterr()
    for name, (package, _) in SUBJECTS.items():
        assert (f"| {name} | " in out) == (find_spec(package) is not None)
        assert (f"{name}: left out, the package {package}" in notes) == (find_spec(package) is None)
    assert "_grouped_mm 3" in out
