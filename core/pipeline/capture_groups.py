"""Which samples a capture runs through the target together: those that the first epoch of the training would."""

from __future__ import annotations

from typing import Any

from torchspec.core.data.dataset import TokenDataset
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.preflight import Checked
from torchspec.core.training.capturing import assigned
from torchspec.core.training.plan import Cut, Plan, Shares


def cut_of(checked: Checked) -> Cut:
    """As the trainer's (`Trainer._cut_of`)."""
    train = checked.config.train
    if train.tokens_per_rank is None:
        return Cut(micro_batch_size=train.micro_batch_size)
    draft = draft_of_shapes(checked.algorithm, checked.target)
    parameters = sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
    return Cut(
        micro_batch_size=train.micro_batch_size,
        row_tokens=train.tokens_per_rank,
        equal_length=parameters / checked.target.hidden_size,
    )


def groups_facts(checked: Checked, cut: Cut, ranks: int) -> dict[str, Any]:
    """JSON: on what the last bits of a feature depend beside the target and the sample."""
    config = checked.config
    size = {"micro_batch_size": cut.micro_batch_size}
    if cut.row_tokens is not None:
        size = {"row_tokens": cut.row_tokens, "equal_length": round(cut.equal_length)}
    return {
        "backend": config.backend,
        "device": checked.device.name,
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "bucket_size": config.data.bucket_size,
        **size,
        "sequence_ranks": ranks,
    }


def groups_of(checked: Checked, cut: Cut, ranks: int, data: TokenDataset) -> list[list[int]]:
    """Every sample once: what one rank's engine would be asked for together in the first epoch."""
    config = checked.config
    plan = Plan(
        data.lengths,
        cut,
        Shares(),
        batch_size=config.train.batch_size,
        bucket_size=config.data.bucket_size,
        seed=config.seed,
    )
    groups = []
    for turn in plan.turns_from(0, plan.steps_per_epoch):
        indices = turn.micro_batches[0].samples
        owners = assigned([data[index] for index in indices], ranks)
        parts = (
            [index for index, owner in zip(indices, owners, strict=True) if owner == rank] for rank in range(ranks)
        )
        groups += [part for part in parts if part]
    assert sorted(index for group in groups for index in group) == list(range(len(data)))
    return groups
