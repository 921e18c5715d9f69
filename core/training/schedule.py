"""Learning rates as pure functions of the optimizer update and the number of updates planned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torchspec.core.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then one of three shapes, as a factor of the peak rate.

    cosine    half a cosine from 1 to `min_ratio`
    wsd       1, then linear to `min_ratio` over the last `decay_fraction` of the run (warm-up, stable, decay)
    constant  1

    The warm-up takes `warmup` updates, or where that is None `warmup_ratio` of the run's, rounded up.
    """

    shape: Literal["cosine", "wsd", "constant"]
    warmup: int | None
    warmup_ratio: float
    decay_fraction: float
    min_ratio: float

    @classmethod
    def of(cls, config: TrainConfig) -> Schedule:
        return cls(
            shape=config.schedule,
            warmup=config.warmup_steps,
            warmup_ratio=config.warmup_ratio,
            decay_fraction=config.decay_fraction,
            min_ratio=config.min_lr_ratio,
        )

    def warmup_updates(self, total: int) -> int:
        """Of a run of so many updates. A ratio leaves the last one to the peak rate."""
        if self.warmup is not None:
            return self.warmup
        return min(math.ceil(self.warmup_ratio * total), max(total - 1, 0))

    def factor(self, update: int, total: int) -> float:
        """Rate of update 0 <= update < total over the peak rate. Never 0 during warm-up: no update is wasted."""
        warmup = self.warmup_updates(total)
        if update < warmup:
            return (update + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        if self.shape == "cosine":
            done = _share(update, warmup, total)
            return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        start = max(warmup, total - math.ceil(self.decay_fraction * total))
        return 1 - (1 - self.min_ratio) * _share(update, start, total)


def warmup_warning(config: TrainConfig, total: int) -> str | None:
    """One line about a warm-up that a run of so many steps does not get through; None if it does."""
    warmup = Schedule.of(config).warmup_updates(total)
    if not total or warmup < total:
        return None
    return (
        f"train.warmup_steps={warmup} is as long as the whole run of {total} steps, which never reaches train.lr: "
        "leave it out, and train.warmup_ratio follows the run"
    )


def _share(update: int, start: int, end: int) -> float:
    """How far `update` is from `start` to `end`, within [0, 1]."""
    return min(max((update - start) / max(end - start, 1), 0.0), 1.0)
