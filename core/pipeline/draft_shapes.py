"""A draft of which only the shapes are known, and the target's embedding and output head that it is built from.

Shape letters: V target vocabulary, H target hidden size, T tokens, N rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards


@dataclass(frozen=True, kw_only=True)
class ShapesOfEnds:
    """Implements `TargetHead`. What it multiplies is what a head does; a final norm multiplies no matrices."""

    embedding_VH: Tensor
    head_VH: Tensor

    @classmethod
    def of(cls, target: TargetSpec) -> ShapesOfEnds:
        """On the device that is current: `meta`, or under `ShapesOnly` any."""
        ends = torch.empty(target.vocab_size, target.hidden_size)
        return cls(embedding_VH=ends, head_VH=ends)

    @property
    def shard_VH(self) -> Tensor:
        return self.head_VH

    @property
    def shards(self) -> VocabularyShards | None:
        return None

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.head_VH[ids_N]

    def normed(self, last_TH: Tensor, state: NormState) -> Tensor:
        return last_TH

    def logits(self, normed_TH: Tensor, rows_NH: Tensor | None = None) -> Tensor:
        return normed_TH @ (self.head_VH if rows_NH is None else rows_NH).T

    def finished(self, products: Tensor) -> Tensor:
        return products


def draft_of_shapes(algorithm: Algorithm, target: TargetSpec) -> nn.Module:
    """The draft without storage, on the meta device; its vocabulary map is real: the first ids."""
    with torch.device("meta"):
        ids_N = torch.arange(algorithm.vocabulary_size, device="cpu")
        vocabulary = VocabularyMap(ids_N=ids_N, target_size=target.vocab_size)
        return algorithm.build_draft(vocabulary, ShapesOfEnds.of(target))
