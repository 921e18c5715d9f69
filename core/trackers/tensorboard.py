"""TensorBoard: event files in OUTPUT/tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchspec.core.interfaces.tracker import Result, TrackedRun, TrackerSpec
from torchspec.core.trackers.packages import installed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Figures as scalars at their step. A resumed run hides what an earlier session wrote behind the step that it goes
    on from (TensorBoard's own purge)."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._last = run.step
        purge = run.step + 1 if run.step else None
        self._writer: SummaryWriter = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", _code(run.config), run.step)
        self._writer.add_text("environment", _code(run.environment), run.step)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._last = max(self._last, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def results(self, values: Mapping[str, Result]) -> None:
        self._writer.add_text("results", _code(values), self._last)
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"results/{name}", value, self._last)

    def close(self) -> None:
        self._writer.close()


def _code(values: Mapping[str, object]) -> str:
    """As TensorBoard's Markdown leaves it alone: indented by a tab."""
    return "".join(f"\t{line}\n" for line in json.dumps(dict(values), indent=1, default=str).splitlines())


SPEC = TrackerSpec(name="tensorboard", probe=lambda: installed("tensorboard"), open=TensorBoard)
