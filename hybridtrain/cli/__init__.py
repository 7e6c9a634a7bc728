"""The `hybridtrain` command. A command reads its arguments and calls the module that does the work; what it
calls is imported when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys

import typer

from hybridtrain.cli import data, kernels, models, training
from hybridtrain.errors import UserError
from hybridtrain.launch.cores import let_openmp_sleep
from hybridtrain.parallel.layout import LayoutError

app = typer.Typer(
    name="hybridtrain",
    help="Train hybrid-sparse language models: Mixture-of-Experts and Engram lookup tables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(training.train)
app.command()(training.launch)
app.command()(data.data)
app.command()(data.engram)
app.command(name="eval")(models.evaluate)
app.command()(models.generate)
app.command()(models.export)
app.command(name="import")(models.import_)
app.command()(models.reshard)
app.add_typer(kernels.kernels_app, name="kernels")


def main() -> None:
    """Run the command; what the user can mend is one message on stderr and exit status 2."""
    let_openmp_sleep(os.environ)  # before a command imports torch
    try:
        app()
    except (UserError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:500]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: this machine does not have the memory that was asked for: {error}", file=sys.stderr)
        raise SystemExit(2) from None
