"""Commands that train: in this process, and on several ranks of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridtrain.cli.options import Allow, AutoResume, Config, Overrides, Resume


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    allow: Allow = "",
) -> None:
    """Train on this process, or as one rank of a torchrun launch."""
    from hybridtrain.run.loop import train as run
    from hybridtrain.run.resume import parse_allow
    from hybridtrain.settings.load import load_settings

    allowed = parse_allow(allow, resume or auto_resume)
    settings = load_settings(config, overrides or [])
    run(settings, resume or (None if auto_resume else False), allowed)


def launch(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="ranks to start on this machine")] = 1,
    resume: Resume = False,
    auto_resume: AutoResume = False,
    allow: Allow = "",
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="times that ranks which died are all started again, from the latest checkpoint"
        ),
    ] = 0,
    bind: Annotated[
        bool,
        typer.Option(help="keep each rank to its share of the cores, where there is one for each thread"),
    ] = True,
) -> None:
    """Start N training ranks on this machine."""
    from hybridtrain.data.prepare import ensure_prepared
    from hybridtrain.launch.local import Launcher
    from hybridtrain.run.process_setup import check_compiler, resolve_layout
    from hybridtrain.run.resume import parse_allow
    from hybridtrain.run.writable import check_folders
    from hybridtrain.settings.load import load_settings

    allowed = parse_allow(allow, resume or auto_resume)
    settings = load_settings(config, overrides or [])
    resolve_layout(settings, nproc)  # refuse before anything starts
    check_compiler(settings)
    check_folders(settings)
    ensure_prepared(settings.data)
    arguments = (settings, resume or (None if auto_resume else False), allowed)
    again = settings, None, allowed
    launcher = Launcher(nproc, settings.run.threads, bind)
    raise typer.Exit(launcher.run("hybridtrain.run.loop:train", arguments, max_restarts, again))
