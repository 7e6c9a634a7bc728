"""Learning curves of runs, and their final figures.

    python tools/plot_runs.py curves.svg runs/quickstart runs/quickstart-plain --label with --label without
    python tools/plot_runs.py --table runs/quickstart runs/quickstart-plain

The picture (.svg or .png) shows a metric of metrics.jsonl against training tokens; `--table` prints markdown
instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError
from hybridtrain.monitor.metrics import METRICS, read_metrics
from hybridtrain.run.run_folder import SETTINGS, SUMMARY

COLORS = ("#0b62a4", "#d1571b", "#3a7d34", "#7b4fa0", "#8a6d1f", "#4d4d4d")
TITLES = {
    "validation_bits_per_byte": "validation bits per byte",
    "validation_loss": "validation loss (nats per token)",
    "loss": "training loss (nats per token)",
}


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    label: str
    tokens_per_step: int
    lines: list[dict[str, Any]]
    summary: dict[str, Any]  # empty while the run has not ended

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(tokens seen, value) wherever the metric was logged. Raises UserError where it never was."""
        points = [
            (line["step"] * self.tokens_per_step, line[key])
            for line in self.lines
            if isinstance(line.get(key), int | float)
        ]
        if not points:
            numbers = sorted(
                {k for line in self.lines for k, v in line.items() if isinstance(v, int | float)} - {"step"}
            )
            raise UserError(
                f'{self.label}: no "{key}" in {METRICS}; it has {", ".join(numbers) or "nothing yet"}'
            )
        tokens, values = zip(*points, strict=True)
        return list(tokens), list(values)


def read_run(folder: Path, label: str = "") -> Run:
    """Raises UserError where `folder` is not a run folder."""
    try:
        train = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))["train"]
        lines = read_metrics(folder)
        summary = (
            json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if (folder / SUMMARY).exists() else {}
        )
        return Run(label or folder.name, train["global_batch"] * train["seq_len"], lines, summary)
    except OSError as error:
        raise UserError(
            f"{folder} is not a run folder: {Path(error.filename).name}: {error.strerror}"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: {SETTINGS} or {SUMMARY} is damaged: {error}") from None


def draw(out: Path, runs: list[Run], key: str) -> None:
    """Write the curves to `out`; the same runs give the same bytes. Raises UserError where that cannot be."""
    curves = [run.curve(key) for run in runs]
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install hybridtrain[plot]") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "hybridtrain", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    )
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    for number, (run, (tokens, values)) in enumerate(zip(runs, curves, strict=True)):
        marker = "o" if len(tokens) <= 30 else None
        label = f"{run.label} ({values[-1]:.3f})"
        axes.plot(
            tokens,
            values,
            color=COLORS[number % len(COLORS)],
            marker=marker,
            markersize=4,
            linewidth=1.8,
            label=label,
        )
    axes.set_xlabel("training tokens")
    axes.set_ylabel(TITLES.get(key, key))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(out, dpi=120, metadata=metadata)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def table(runs: list[Run]) -> str:
    """The runs' final figures as markdown; "" stands where a run has none."""
    columns = (
        "run",
        "parameters",
        "active",
        "tokens",
        "validation loss",
        "bits per byte",
        "tokens/s",
        "layout",
    )
    lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 2)}---|"]
    for run in runs:
        last = {k: v for line in run.lines for k, v in line.items()} | run.summary
        steps = last.get("steps", last.get("step", 0))
        cells = (
            run.label,
            _short(last.get("params_total")),
            _short(last.get("params_active")),
            _short(steps * run.tokens_per_step),
            _fixed(last.get("validation_loss")),
            _fixed(last.get("validation_bits_per_byte")),
            f"{last['tokens_per_second']:,.0f}" if last.get("tokens_per_second") else "",
            last.get("layout", ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="[OUT] RUN...",
        help="the picture to write (not with --table), then run folders",
    )
    parser.add_argument("--key", default="validation_bits_per_byte", help="the metric to draw")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        help="name of a run, once per run in their order (default: its folder)",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the final figures as markdown instead of drawing"
    )
    args = parser.parse_args(argv)
    out, folders = (None, args.paths) if args.table else (args.paths[0], args.paths[1:])
    try:
        if out is not None and out.suffix not in (".svg", ".png"):
            raise UserError(f"{out}: the picture's name must end in .svg or .png")
        if not folders:
            raise UserError("name at least one run folder after the picture")
        if args.label and len(args.label) != len(folders):
            raise UserError(f"{len(args.label)} --label for {len(folders)} run(s); give one for each or none")
        runs = [
            read_run(folder, label)
            for folder, label in zip(folders, args.label or [""] * len(folders), strict=True)
        ]
        if out is None:
            print(table(runs))
        else:
            draw(out, runs, args.key)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _short(number: float | None) -> str:
    if number is None:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _fixed(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


if __name__ == "__main__":
    main()
