"""Which target tokens a draft can say."""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.errors import ConfigError, DataError, Problem
from torchspec.core.interfaces.target import VocabularyMap


def build_vocabulary(token_counts_V: Tensor, size: int, target_size: int) -> VocabularyMap:
    """The `size` tokens supervised most often (ties: the lower id), unused ones filled in by lowest id, ascending.

    `token_counts_V` counts supervised tokens by id; a target's vocabulary may be larger than its tokenizer's.
    Raises ConfigError when `size` does not fit the target, DataError when the counts name ids that it does not have.
    """
    if not 1 <= size <= target_size:
        raise ConfigError(
            [
                Problem(
                    field="draft.vocab_size",
                    value=size,
                    message=f"must be from 1 to the target's vocabulary of {target_size}",
                    remedy="leave it out for the default",
                )
            ]
        )
    if token_counts_V[target_size:].any():
        raise DataError(
            f"the data holds token ids up to {int(token_counts_V.nonzero().max())}, the target's vocabulary ends at "
            f"{target_size - 1}: tokenise it with the target's own tokenizer"
        )
    counts = torch.zeros(target_size, dtype=torch.int64)
    known = min(target_size, token_counts_V.numel())
    counts[:known] = token_counts_V[:known]
    # A stable order puts the lower id first among equals, hence unused ids (all zero) last and by id.
    by_use = torch.sort(counts, descending=True, stable=True).indices
    return VocabularyMap(ids_N=by_use[:size].sort().values, target_size=target_size)


def coverage(token_counts_V: Tensor, vocabulary: VocabularyMap) -> float:
    """Fraction of the supervised tokens that the draft can say; 1.0 when nothing was counted."""
    total = int(token_counts_V.sum())
    known = vocabulary.ids_N[vocabulary.ids_N < token_counts_V.numel()]
    return int(token_counts_V[known].sum()) / total if total else 1.0
