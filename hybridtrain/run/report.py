"""Turns a run's steps into its header, its lines of metrics, its progress bar and its summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hybridtrain import __version__
from hybridtrain.files.durable import write_atomically
from hybridtrain.files.untrusted import read_json
from hybridtrain.model.cost import count_parameters, flops_per_token
from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.metrics import METRICS, MetricsLog, measure_matmul_peak, read_metrics
from hybridtrain.monitor.stragglers import StepTimes, slowest
from hybridtrain.optim.schedule import lr_scale
from hybridtrain.parallel.collectives import all_reduce_
from hybridtrain.parallel.early_rows import late_rows
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run, resolve_stages
from hybridtrain.run.op_backends import implementations
from hybridtrain.run.resume import Reading
from hybridtrain.run.run_folder import SUMMARY
from hybridtrain.run.step import Totals
from hybridtrain.settings.rules import notices
from hybridtrain.settings.tree import SpikeAction

FETCH = {
    "step": "rows come before their step",
    "overlap": "rows that the step before leaves alone come during it",
    "stale": "all rows come during the step before, one update old",
}


class Report:
    """Collects what `train_step` returns and writes it out every `train.log_every` steps."""

    def __init__(
        self, run: Run, log: MetricsLog, folder: Path, clock: Clock, start: int, reading: Reading
    ) -> None:
        self.run, self.log, self.folder, self.reading = run, log, folder, reading
        self.clock = clock
        table_rows = run.table.addressing.num_rows if run.table is not None else 0
        self.counts = asdict(count_parameters(run.settings, run.vocabulary.size, table_rows))
        self.flops = flops_per_token(run.settings, run.vocabulary.size)
        peak = torch.tensor(measure_matmul_peak(run.mesh.device), dtype=torch.float64, device=run.mesh.device)
        self.peak = float(all_reduce_(peak, run.mesh.world))
        self.start = start
        self._total_seconds = 0.0
        self._times = StepTimes(run.mesh)
        self._logged_at = start
        self._traffic: dict[str, int] = {}
        self._fetch_seconds, self._exposed_seconds = 0.0, 0.0
        self._last: dict[str, Any] = {}
        self._validation: dict[str, float] = {}

    def header(self) -> None:
        """The layout, the parameters, what carries each operation and what is odd about the settings, before
        the first step.
        """
        s, mesh = self.run.settings, self.run.mesh
        grid = Table(title=f"hybridtrain {__version__}", show_header=False, title_justify="left")
        table = self.run.table
        rows = [
            (
                "layout",
                f"{mesh.layout.describe()} on {mesh.device.type}, {torch.get_num_threads()} thread(s) a rank",
            ),
            ("parameters", " · ".join(f"{name} {_short(n)}" for name, n in self.counts.items())),
            (
                "step",
                f"{s.train.global_batch} sequences x {s.train.seq_len} tokens in {s.train.micro_batches} "
                "micro-batch(es)",
            ),
            ("engine", self.run.engine.name),
            ("matmul peak", f"{self.peak / 1e9:.1f} GFLOP/s over all ranks"),
        ]
        if mesh.layout.pp > 1:
            rows.append(("pipeline", self._pipeline()))
        if table is not None:
            here = f"rows {table.low:,} to {table.high - 1:,} here"
            where = f"in {s.engram.device} memory ({table.weight.device.type})"
            size = f"{table.addressing.num_rows:,} rows x {s.engram.head_dim} {s.engram.dtype}"
            rows.append(("table", f"{size}, {here} {where}"))
            rows.append(("fetch", f"{s.engram.fetch}: {FETCH[s.engram.fetch]}"))
            rows.append(("wire", f"rows {s.engram.wire}, gradients {s.engram.wire_gradients}"))
        rows += [(f"op {name}", how) for name, how in implementations(self.run).items()]
        for row in rows:
            grid.add_row(*row)
        self.log.say(grid)
        for notice in notices(s):
            self.log.say(f"note: {notice}")
        self._times.skip()

    def _pipeline(self) -> str:
        """Schedule and layers of each stage, with the rank along pp that has it."""
        settings = self.run.settings
        stages = resolve_stages(settings, self.run.vocabulary.size)
        cuts = ", ".join(f"{stage.high - stage.low} on {stage.pp_rank}" for stage in stages)
        return f"{settings.parallel.schedule}, {len(stages)} stages; layers on pp rank: {cuts}"

    def step(self, done: int, totals: Totals, plan: StepPlan | None) -> None:
        """Take in a finished step; every `train.log_every` steps, and after the last, write a line."""
        self._times.add()
        settings = self.run.settings
        share = dropped_share(totals.statistics)
        dropped = f"  dropped {share:.2%}" if share is not None else ""
        self.log.step(done, f"loss {totals.loss:.4f}{dropped}")
        if done % settings.train.log_every and done != settings.train.steps and not totals.stop:
            return
        steps = done - self._logged_at
        phases = self.clock.take()
        seconds, own = self._times.take(steps)
        values: dict[str, Any] = {
            "loss": totals.loss,
            "learning_rate": settings.optim.lr * lr_scale(done - 1, settings.optim, settings.train.steps),
            "grad_norm": totals.grad_norm,
            "grad_norm_table": totals.table_grad_norm,
            "tokens": self.reading.tokens,
            **self._speed(steps, seconds),
            **self._slowest(own),
            **layer_statistics(totals.statistics),
            **{f"seconds/{name}": seconds / steps for name, seconds in phases.items()},
            **self._bytes(steps),
        }
        if plan is not None:
            values |= self._table(plan, phases["fetch"], steps)
        self.log.write(done, values)
        if not self.log.active or not self.log.console.is_terminal:
            self.log.say(
                f"step {done:6d}  loss {totals.loss:.4f}  grad norm {totals.grad_norm:.3f}  "
                f"{values['tokens_per_second']:,.0f} tokens/s{dropped}"
            )
        self._last = values
        self._total_seconds += seconds
        self._logged_at = done

    def _slowest(self, own: list[float]) -> dict[str, float]:
        """The slowest rank by every rank's own seconds per step; it is named where it is far behind."""
        mesh, bound = self.run.mesh, self.run.settings.run.slow_rank
        if mesh.world.size == 1:
            return {}
        rank, ratio = slowest(own, [mesh.layout.coordinate(r, "pp") for r in range(mesh.world.size)])
        if bound and ratio > bound:
            self.log.say(
                f"rank {rank} is slow: {1000 * own[rank]:.1f} ms a step without waiting for others, "
                f"{ratio:.1f} times the median of its pipeline stage"
            )
        return {"slowest/rank": rank, "slowest/seconds_per_step": own[rank], "slowest/over_median": ratio}

    def _table(self, plan: StepPlan, exposed: float, steps: int) -> dict[str, float]:
        """This rank's rows of the last step, and how long its fetches took: `exposed` seconds of them the
        loop waited.
        """
        assert self.run.table is not None
        seconds = exposed + self.run.table.hidden_seconds()
        self._fetch_seconds += seconds
        self._exposed_seconds += exposed
        values = {"table/fetch_seconds": seconds / steps, "table/fetch_exposed_seconds": exposed / steps}
        if plan.lookups:  # without an Engram layer in its stages there are none
            values |= {
                "table/lookups": plan.lookups,
                "table/unique_rows": plan.unique,
                "table/unique_share": plan.unique / plan.lookups,
            }
        if (late := late_rows(plan)) is not None:
            values["table/late_rows"] = late
        return values

    @contextmanager
    def outside_training(self, phase: str) -> Iterator[None]:
        """Time spent within counts neither as training nor in tokens per second."""
        with self.clock.phase(phase):
            yield
        self._times.skip()

    def refused(self, done: int, what: str, action: SpikeAction, loss: float) -> None:
        """A step whose update was not made, and what the run does about it."""
        self.log.write(done, {"refused": action, "refused_loss": loss if math.isfinite(loss) else None})
        self.log.say(f"step {done:6d}  {what}; {action}")
        self._times.skip()

    def rolled_back(self, to: int) -> None:
        """The steps after step `to` are made again: drop their lines."""
        self.log.rewind(to)
        self._logged_at, self._times = to, StepTimes(self.run.mesh)
        self.clock.take()

    def validation(self, done: int, values: dict[str, float], again: bool = False) -> None:
        """Write the result of a whole validation; `again`: an earlier run may have made it as well."""
        if values:
            if again:
                self.log.rewind(done, validated=False)
            self._validation = values
            self.log.write(done, {f"validation_{name}": value for name, value in values.items()})
            self.log.say(
                f"step {done:6d}  validation loss {values['loss']:.4f}  bits per byte "
                f"{values['bits_per_byte']:.4f}"
            )

    def ended(self) -> bool:
        """Whether the run has its summary: one that was cut off in its last validation has made all steps,
        and no more.
        """
        summary = self._old_summary()
        return (
            bool(summary)
            and not summary.get("stopped")
            and summary.get("steps", 0) >= self.run.settings.train.steps
        )

    def recall(self) -> None:
        """Take the last step's values from metrics.jsonl: nothing but the end of the run is left to do."""
        lines = read_metrics(self.folder) if (self.folder / METRICS).exists() else []
        self._last = next((line for line in reversed(lines) if "loss" in line), {})

    def nothing_left(self, start: int) -> dict[str, Any]:
        """The summary that the finished run left; training further takes a higher `train.steps`."""
        self.log.say(
            f"{self.folder} has done {start} steps of train.steps={self.run.settings.train.steps}: nothing "
            "is left to do"
        )
        return self._old_summary()

    def _old_summary(self) -> dict[str, Any]:
        old = self.folder / SUMMARY
        summary: dict[str, Any] = read_json(old, dict[str, Any]) if old.exists() else {}
        return summary

    def stopped(self, done: int, signal: str) -> dict[str, Any]:
        self.log.say(
            f"stopped after step {done} ({signal or 'another rank'} asked for it); the checkpoint is "
            "written, go on with --resume"
        )
        return self._summarise(done, stopped=True)

    def finish(self, done: int) -> dict[str, Any]:
        summary = self._summarise(done, stopped=False)
        if self.run.table is not None:
            self.log.say(
                f"table rows: {1000 * summary['table_fetch_seconds']:.1f} ms a step to fetch, of which the "
                f"step waited {1000 * summary['table_fetch_exposed_seconds']:.1f} ms "
                f"(engram.fetch={self.run.settings.engram.fetch})"
            )
        self.log.say(
            f"run files: {self.folder}    curves: tensorboard --logdir {self.folder / 'tensorboard'}"
        )
        return summary

    def _summarise(self, done: int, stopped: bool) -> dict[str, Any]:
        """The run in one flat dict, written to summary.json by rank 0."""
        tokens = (done - self.start) * self.run.tokens_per_step
        seconds = self._total_seconds + self._times.seconds
        summary = {
            "steps": done,
            "stopped": stopped,
            "tokens": self.reading.tokens,
            "sequences_read": self.reading.sequences(done),
            "train_loss": self._last.get("loss"),
            **{f"validation_{name}": value for name, value in self._validation.items()},
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "share_of_matmul_peak": tokens * self.flops / seconds / self.peak if seconds else None,
            **self._fetches(done - self.start),
            **{f"params_{name}": count for name, count in self.counts.items()},
            "layout": self.run.mesh.layout.describe(),
            "world": self.run.mesh.layout.world,
            "device": self.run.mesh.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }
        if self.log.active:
            self.log.confirm()
            write_atomically(self.folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
        return summary

    def _fetches(self, steps: int) -> dict[str, float]:
        if self.run.table is None:
            return {}
        steps = max(steps, 1)
        return {
            "table_fetch_seconds": self._fetch_seconds / steps,
            "table_fetch_exposed_seconds": self._exposed_seconds / steps,
        }

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        rate = steps * self.run.tokens_per_step / seconds
        return {
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self.flops,
            "share_of_matmul_peak": rate * self.flops / self.peak,
            "seconds_per_step": seconds / steps,
        }

    def _bytes(self, steps: int) -> dict[str, float]:
        now = self.run.mesh.traffic.bytes_by_group()
        before, self._traffic = self._traffic, now
        return {f"bytes/{group}": (sent - before.get(group, 0)) / steps for group, sent in now.items()}


def layer_statistics(totals: dict[str, list[float]]) -> dict[str, Any]:
    """The step's sums as readable figures: expert load (shares) and its spread, router entropy, gate mean,
    per layer.
    """
    out: dict[str, Any] = {}
    for name, value in totals.items():
        layer, _, what = name.rpartition(".")
        if what == "expert_tokens":
            pairs = sum(value)
            share = [tokens / pairs for tokens in value]
            out[f"{layer}/expert_load"] = share
            out[f"{layer}/expert_load_max_over_mean"] = max(share) * len(share)
        elif what == "router_entropy":
            out[f"{layer}/router_entropy"] = value[0] / totals[f"{layer}.router_tokens"][0]
        elif what == "gate_sum":
            out[f"{layer}/gate_mean"] = value[0] / totals[f"{layer}.gate_count"][0]
        elif what == "dropped_pairs":
            out[f"{layer}/dropped_share"] = value[0] / sum(totals[f"{layer}.expert_tokens"])
        elif what in ("aux_loss", "z_loss"):
            out[f"{layer}/{what}"] = value[0]
    return out


def dropped_share(totals: dict[str, list[float]]) -> float | None:
    """The share of the step's token-expert pairs, over all layers, that full experts dropped; None without a
    capacity.
    """
    dropped = [value[0] for name, value in totals.items() if name.endswith(".dropped_pairs")]
    if not dropped:
        return None
    return sum(dropped) / sum(sum(value) for name, value in totals.items() if name.endswith(".expert_tokens"))


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
