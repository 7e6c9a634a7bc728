"""Commands on the fused kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hybridtrain.cli.options import Json
from hybridtrain.errors import UserError

kernels_app = typer.Typer(
    help="What the fused kernels compile to, and how fast they are.", no_args_is_help=True
)


@kernels_app.command(name="report")
def kernels_report(
    ops: Annotated[str, typer.Option(help="ops to compile, e.g. rms_norm,rope; all where not given")] = "",
    targets: Annotated[
        str, typer.Option(help="targets to compile for, e.g. sm_90; all where not given")
    ] = "",
    page: Annotated[
        Path | None, typer.Option(help="a checkout: write its docs/kernels.md and .json instead of printing")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel for real GPUs, with none here: registers, spills, memory accesses, tensor cores,
    roofline.
    """
    from hybridtrain.kernels.ops import TRITON_OPS
    from hybridtrain.kernels.report.command import requirements, unknown, write_page
    from hybridtrain.kernels.report.hardware import TARGETS
    from hybridtrain.kernels.report.table import markdown, report, to_json

    chosen = tuple(ops.split(",")) if ops else TRITON_OPS
    places = tuple(targets.split(",")) if targets else tuple(TARGETS)
    if problems := [*requirements(), *unknown(chosen, places)]:
        raise UserError("\n".join(problems))
    rows = report(chosen, places)
    if page is not None:
        write_page(page, markdown(rows), to_json(rows))
    else:
        print(to_json(rows) if as_json else markdown(rows))


@kernels_app.command(name="bench")
def kernels_bench(as_json: Json = False) -> None:
    """Time every kernel on this machine's GPU against torch, torch.compile and the libraries installed."""
    from hybridtrain.kernels.report.bench import bench, requirements, show

    if problems := requirements():
        raise UserError("\n".join(problems))
    rows = bench()
    print(json.dumps(rows) if as_json else show(rows))
