"""What every kernel's tests have in common: bounds from float64, poisoned buffers, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TOKENS = (1, 63, 257)
WIDTHS = (60, 96, 100)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, uninitialised tensors hold NaN, or the least integer: an element that a kernel leaves out
    shows.
    """

    def wrap(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.device.type == "meta" or out.dtype == torch.bool:
                return out
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return made

    with (
        mock.patch.object(torch, "empty", wrap(torch.empty)),
        mock.patch.object(torch, "empty_like", wrap(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", wrap(Tensor.new_empty)),
    ):
        yield


def check(
    fast: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Sequence[Tensor],
    *others: Any,
    times: float = 4.0,
) -> None:
    """Outputs and every gradient of `fast(*inputs, *others)`, run twice, against the definition in float64.

    The error may be `times` that of the definition in the inputs' own dtype, plus one rounding of the
    greatest element; two runs must agree bit for bit. `others` are handed on as they are. Raises
    AssertionError naming the output or gradient.
    """
    cotangents: list[Tensor] = []
    exact = _run(definition, [x.double() for x in inputs], others, cotangents)
    plain = _run(definition, inputs, others, cotangents)
    with poisoned():
        mine, again = _run(fast, inputs, others, cotangents), _run(fast, inputs, others, cotangents)
    for name, wanted in exact.items():
        assert torch.equal(mine[name], again[name]), f"{name}: two runs differ"
        assert mine[name].shape == wanted.shape, (
            f"{name}: shape {list(mine[name].shape)}, must be {list(wanted.shape)}"
        )
        if wanted.numel() == 0:
            continue
        error, own = ((a[name].double() - wanted).abs().max().item() for a in (mine, plain))
        bound = times * own + torch.finfo(mine[name].dtype).eps * wanted.abs().max().item()
        assert error <= bound, (
            f"{name}: error {error:.3g}, must be at most {bound:.3g} (plain torch: {own:.3g})"
        )


def _run(
    function: Callable[..., Any], inputs: Sequence[Tensor], others: Sequence[Any], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    """Floating-point outputs and gradients by name; fills `cotangents` at the first call."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, *others)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    if not cotangents:
        generator = torch.Generator().manual_seed(1)
        cotangents += [
            torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(inputs[0])
            for o in outputs
        ]
    gradients = torch.autograd.grad(
        outputs, leaves, [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient of input {i}": g for i, g in enumerate(gradients)}
