"""What the loop does between two steps: saves and validations, and whether the ranks agree to stop."""

from __future__ import annotations

from collections.abc import Callable

from hybridtrain import checkpoint
from hybridtrain.monitor.signals import StopSignal, agree
from hybridtrain.run.assemble import Run
from hybridtrain.run.report import Report

Validate = Callable[[int, Callable[[], bool]], dict[str, float]]
"""(batches, go_on) to the values of a validation of so many global batches (0: all); see evaluate.py."""


class Pause:
    """Between steps of a run; every method is called by all ranks at the same step."""

    def __init__(
        self, run: Run, saver: checkpoint.Saver, signal: StopSignal, report: Report, validate: Validate
    ) -> None:
        self.run, self.saver, self.signal, self.report, self._validate = run, saver, signal, report, validate

    def after(self, done: int, stop: bool, save: bool) -> bool:
        """Save and then validate, where that is due after `done` steps; whether the run stops here, with a
        checkpoint of them.

        `stop` and `save`: whether the step was asked to stop or to save. A stop that is asked for meanwhile
        is not left for the next one.
        """
        train, every = self.run.settings.train, self.run.settings.checkpoint.every
        ended = done == train.steps
        saved = ended or stop or save or bool(every and done % every == 0)
        if saved:
            self.save(done)
        validated = not stop and self.validates(done)
        if validated:
            stop = self.validation(done)
        if not stop and not ended and (saved or validated):
            stop = self._asked()
        if stop and not saved:
            self.save(done)
        return stop

    def save(self, done: int) -> None:
        with self.report.outside_training("save"):
            self.saver.save(done, wait=False)
        self.signal.save = (
            False  # also where a request reached this rank a step later than the one that told all
        )

    def validates(self, done: int) -> bool:
        """Whether a validation is due after `done` steps."""
        train = self.run.settings.train
        return done == train.steps or bool(done and train.eval_every and done % train.eval_every == 0)

    def validation(self, done: int, again: bool = False) -> bool:
        """Validate; returns whether the ranks agreed to stop before its last batch. Then no part of it is
        reported.

        `again`: after a restore. The checkpoint was saved before the validation that was due, which may have
        been cut off, and which brings rows up to date as it reads them: with weight decay later steps have
        other last bits without it.
        """
        stopped = False

        def go_on() -> bool:
            nonlocal stopped
            self.report.clock.alive()
            stopped = self._asked()
            return not stopped

        with self.report.outside_training("validation"):
            values = self._validate(
                self.run.settings.train.eval_batches if done < self.run.settings.train.steps else 0, go_on
            )
            if not stopped:
                self.report.validation(done, values, again)
        return stopped

    def _asked(self) -> bool:
        return agree(self.signal.received or self.saver.failed, self.run.mesh)
