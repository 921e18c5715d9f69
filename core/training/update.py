"""What the sums of a window do to a draft: one update of its parameters, at the rate that the schedule says.

Both who owns a training's loop (`training.trainer`) and who is called from somebody else's (`pipeline.online`) take
their steps here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchspec.core.config.schema import TrainConfig
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.training.capturing import Model
from torchspec.core.training.optimizer import (
    build_optimizer,
    fill_optimizer,
    optimizer_codes,
    optimizer_tensors,
    set_learning_rate,
)
from torchspec.core.training.schedule import Schedule
from torchspec.core.training.window import Sums

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """How far a training is, as far as its next step depends on it."""

    step: int = 0
    updates: int = 0
    empty_windows: int = 0
    remembered: dict[str, list[float]] = field(default_factory=dict)
    """What the algorithm `remembers` of the last window with supervision."""


class Updater:
    """The optimizer of a draft, and its schedule."""

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.model = model
        self._config = config
        self.optimizer = build_optimizer(model.draft, config)
        self._schedule = Schedule.of(config)

    def moment(self, progress: Progress, share: float, draws: Sequence[int]) -> Moment:
        """Of a micro-batch of the step that comes; `share` of the steps that are planned are done."""
        remembered = {name: torch.tensor(values, dtype=torch.float64) for name, values in progress.remembered.items()}
        return Moment(progress=share, previous=remembered or None, draws=tuple(draws))

    def update(
        self, sums: Sums, progress: Progress, total_steps: int, refuse: Callable[[float], NoReturn]
    ) -> tuple[float | None, float | None]:
        """Divide by the global denominator, clip, step; (learning rate, gradient norm before clipping).

        A window without supervision does none of it and is counted. `refuse`, given the norm, raises NonFiniteError
        before anything changed. Rates end after `total_steps` steps; a constant one needs no end.
        """
        config = self._config
        if sums.denominator == 0:
            progress.empty_windows += 1
            logger.warning("step %d: no supervised position in the whole batch, no update", progress.step + 1)
            self.optimizer.zero_grad()
            return None, None
        parameters = [p for p in self.model.draft.parameters() if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        for grad in grads:
            grad.div_(sums.denominator)
        norm = global_norm(grads)
        if not math.isfinite(sums.numerator) or not math.isfinite(float(norm)):
            refuse(float(norm))
        if config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
        # Empty windows shorten the plan: the rate still ends where the schedule ends.
        rate = config.lr * self._schedule.factor(progress.updates, total_steps - progress.empty_windows)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.updates += 1
        progress.remembered = {name: sums.metrics[name].double().tolist() for name in self.model.algorithm.remembers}
        return rate, float(norm)

    def summary(self, sums: Sums) -> dict[str, Any]:
        """`loss`, None without supervision, and the algorithm's metrics."""
        if sums.denominator == 0:
            return {"loss": None}
        return {"loss": sums.numerator / sums.denominator, **self.model.algorithm.summarise(sums.metrics)}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state by name, as this rank holds them: `draft.*` and `optimizer.*`."""
        weights = {f"draft.{name}": tensor for name, tensor in self.model.draft.state_dict().items()}
        moments = optimizer_tensors(self.model.draft, self.optimizer)
        return weights | {f"optimizer.{name}": tensor for name, tensor in moments.items()}

    def codes(self) -> dict[str, Tensor]:
        """What this rank alone holds of state that is not in fp32."""
        return optimizer_codes(self.model.draft, self.optimizer)

    def filled(self, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """What `tensors` gave has been written into: the optimizer takes over what it holds otherwise."""
        moments = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
        fill_optimizer(self.model.draft, self.optimizer, moments, codes)


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """2-norm of gradients sharded over ranks, a plain scalar on every rank."""
    norm = torch.nn.utils.get_total_norm(grads)
    whole = getattr(norm, "full_tensor", None)
    return whole() if whole is not None else norm
