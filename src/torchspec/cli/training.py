"""Running a training from the command line: progress with figures, the exit code of a stopped run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchspec.cli.console import TRAINING, ProgressDisplay, announce, counted, span
from torchspec.cli.figures import RunFigures
from torchspec.core.config.schema import RunConfig

if TYPE_CHECKING:
    from torchspec.core.pipeline.inprocess import RunOutcome


class TrainingDisplay(ProgressDisplay):
    """With the figures of the run, whichever process trains."""

    def __init__(self, config: RunConfig, *, silent: bool = False) -> None:
        super().__init__(silent=silent)
        output = config.output
        self._figures = RunFigures(output / "metrics.jsonl", output / "checkpoints", epochs=config.train.epochs)

    def __exit__(self, *raised: Any) -> None:
        self._figures.look_again()
        super().__exit__(*raised)

    def _refresh(self, now: float) -> None:
        """Another process says seldom how far it is; its metrics do with every step."""
        stage = self._stages.get(TRAINING)
        if stage is not None:
            stage.advance(min(self._figures.step, stage.total), now)

    def _current(self, stage: str) -> str:
        return self._figures.line() if stage == TRAINING else ""

    def _details(self, stage: str) -> list[list[str]]:
        return self._figures.sections() if stage == TRAINING else []


def train(config: RunConfig, provenance: Mapping[str, str], *, silent: bool = False) -> int:
    """Train in this process; -> 0, or 128 + the signal that stopped the run."""
    from torchspec.core.pipeline.inprocess import train as run

    with TrainingDisplay(config, silent=silent) as progress:
        outcome = run(config, provenance=provenance, progress=progress)
    if not silent:
        _say_how_it_ended(outcome)
    return outcome.exit_code


def _say_how_it_ended(outcome: RunOutcome) -> None:
    if outcome.signal:
        announce(f"stopped at step {outcome.step} of {outcome.total_steps}; the same command continues the run")
        return
    length = outcome.acceptance_length
    decoded = "" if length is None else f", best decoded acceptance length {length:.2f}"
    if outcome.planned is not None:
        announce(f"the steps took {span(outcome.seconds)}, {outcome.planned} by the plan")
    announce(f"trained {counted(outcome.step, 'step')}{decoded}; draft in {outcome.draft}, report in {outcome.report}")
