"""What the plan says of a run that is about to begin: in one line, so that who waits knows for how long."""

from __future__ import annotations

import logging

import torch

from torchspec.core import settings
from torchspec.core.pipeline.assembly import Data
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan_load import lengths_of
from torchspec.core.pipeline.plan_texts import known_texts
from torchspec.core.pipeline.plan_time import about
from torchspec.core.pipeline.plan_work import Planned, plan_time
from torchspec.core.pipeline.preflight import Checked
from torchspec.core.training.random_state import untouched
from torchspec.core.training.schedule import warmup_warning
from torchspec.core.training.trainer import Trainer

logger = logging.getLogger(__name__)


def say_planned(checked: Checked, trainer: Trainer, data: Data) -> str | None:
    """Log what the plan says of the time of the steps that come, and a warm-up that they do not get through.

    -> the time in words, None where the plan cannot say it. Random states stay as they are. Rank 0 only.
    """
    if trainer.counters.step >= trainer.total_steps:
        return None
    if (warning := warmup_warning(checked.config.train, trainer.total_steps)) is not None:
        logger.warning(warning)
    place = settings.launch()
    planned = Planned(
        config=checked.config,
        subject=checked.subject(lengths_of(torch.tensor(data.train.lengths))),
        weights=checked.weights,
        ranks=Ranks(all=place.world_size, here=place.local_world_size, launched=place.world_size > 1),
        per_epoch=trainer.steps_per_epoch,
        steps=trainer.total_steps,
        done=trainer.counters.step,
    )
    with untouched(trainer.context.device.runtime):
        found = plan_time(planned, known_texts(data.train))
    logger.info("as planned (--dry-run says more): %s", found.verdict())
    return None if found.run is None else about(found.run)
