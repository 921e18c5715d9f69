"""trackio: on this machine, or in the Space that TRACKIO_SPACE_ID names, which is made private."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from torchspec.core.interfaces.tracker import Result, TrackedRun, TrackerSpec
from torchspec.core.trackers.packages import PROJECT, installed

logger = logging.getLogger(__name__)


class Trackio:
    """trackio knows runs by their names, so the run's has a part of its id."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        _keep_quiet()
        self._run = trackio.init(
            project=run.project or PROJECT,
            name=f"{run.name}-{run.id[:8]}",
            config={**run.config, **{f"environment.{name}": value for name, value in run.environment.items()}},
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._last = run.step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._last = max(self._last, step)
        self._run.log(dict(values), step=step)

    def results(self, values: Mapping[str, Result]) -> None:
        self._run.log({f"results/{name}": value for name, value in values.items()}, step=self._last)

    def close(self) -> None:
        self._run.finish()


def _keep_quiet() -> None:
    """Its words go to the log instead of stdout, where results are."""
    for name, module in sys.modules.items():
        if name == "trackio" or name.startswith("trackio."):
            vars(module)["print"] = _say


def _say(*words: object, **_: object) -> None:
    logger.debug(" ".join(map(str, words)))


SPEC = TrackerSpec(name="trackio", probe=lambda: installed("trackio"), open=Trackio)
