"""Drafting with DSpark: a block's tokens one after the other, and no further than the draft is confident.

Shape letters: B sequences, K steps, L drafted tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.drafter import BlockDrafter, BlockSession
from torchspec.core.algorithms.dspark.model import DSparkDraft
from torchspec.core.interfaces.algorithm import Proposal
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import TargetHead


class DSparkDrafter(BlockDrafter):
    """`min_confidence`: see `DSparkOptions`."""

    def __init__(
        self, draft: DSparkDraft, head: TargetHead, device: Device, taps: tuple[int, ...], min_confidence: float
    ) -> None:
        super().__init__(draft, head, device, taps)
        self.spark, self.min_confidence = draft, min_confidence

    def open(self, batch_size: int) -> DSparkSession:
        return DSparkSession(self, batch_size)


class DSparkSession(BlockSession):
    def __init__(self, drafter: DSparkDrafter, batch_size: int) -> None:
        super().__init__(drafter, batch_size)
        self._spark = drafter

    def _choose(
        self, normed_BKH: Tensor, anchor_B: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """A token's confidence is known before the token is drawn: where a block ends depends on the tokens before
        alone, so that the text stays distributed as the target's."""
        proposal = super()._choose(normed_BKH, anchor_B, temperature, generator)
        if self._spark.min_confidence == 0:
            return proposal
        before_BL = torch.cat((anchor_B[:, None], proposal.tokens_BL[:, :-1]), 1)
        chance_BL = torch.sigmoid(self._spark.spark.confidence(normed_BKH, before_BL).float()).cumprod(1)
        return replace(proposal, lengths_B=(chance_BL >= self._spark.min_confidence).sum(1))
