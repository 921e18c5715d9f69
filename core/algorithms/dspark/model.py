"""A draft of blocks with DSpark's heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.core.algorithms.blocks.body import BlockDraft, Correction
from torchspec.core.algorithms.dspark.geometry import DSparkGeometry
from torchspec.core.algorithms.dspark.heads import MARKOV_HEADS, ConfidenceHead
from torchspec.core.interfaces.target import VocabularyMap


class DSparkDraft(BlockDraft):
    """`confidence_head` is None where the geometry has none."""

    def __init__(self, geometry: DSparkGeometry, vocabulary: VocabularyMap) -> None:
        super().__init__(geometry, vocabulary)
        self.markov_head = MARKOV_HEADS[geometry.markov_head_type](geometry)
        self.confidence_head = ConfidenceHead(geometry) if geometry.enable_confidence_head else None

    @property
    def correction(self) -> Correction:
        return self.markov_head

    def confidence(self, normed: Tensor, before: Tensor) -> Tensor:
        """Logits [...] of the chance that each step's token is accepted; see `ConfidenceHead`."""
        assert self.confidence_head is not None
        logit: Tensor = self.confidence_head(normed, self.markov_head, before)
        return logit


@torch.no_grad()
def start_heads(draft: DSparkDraft) -> None:
    """In place, from torch's global random state: no bias and no opinion, so that the draft starts as one of blocks
    alone; maps that read features keep the size that `blocks.initialise` gave them."""
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    head = draft.markov_head
    nn.init.normal_(head.markov_w1.weight)
    nn.init.zeros_(head.markov_w2.weight)
    for module in head.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if draft.confidence_head is not None:
        nn.init.zeros_(draft.confidence_head.proj.weight)
        nn.init.zeros_(draft.confidence_head.proj.bias)
