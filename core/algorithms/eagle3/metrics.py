"""What EAGLE-3 counts in training: additive sums of a micro-batch.

Shape letters: B rows, S slots of this rank, T positions, K unroll steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.batch import Batch
from torchspec.core.algorithms.metrics import step_sums
from torchspec.core.objectives.acceptance import acceptance_sums, prefix_lengths
from torchspec.core.objectives.distillation import PairTerms
from torchspec.core.parallel.sequence import gather_sequence


def pair_sums(batch: Batch, terms: PairTerms) -> dict[str, Tensor]:
    """Sums over this micro-batch: `step_sums`, `acceptance_sums`, and `tokens`, the positions of all rows."""
    sizes = batch.pairs.sizes
    slots = (batch.tokens.document_BT.shape[0], batch.inputs.layout.rows)
    agree_BSK = torch.zeros((*slots, len(sizes)), dtype=torch.bool, device=terms.agree_M.device)
    agree_BSK.view(-1)[batch.pairs.cell_M] = terms.agree_M
    return step_sums(batch.pairs, terms) | _sequence_sums(batch, prefix_lengths(agree_BSK), len(sizes))


def _sequence_sums(batch: Batch, accepted_BS: Tensor, steps: int) -> dict[str, Tensor]:
    """What is counted over whole sequences: on the first of the ranks that share them, 0 on the others."""
    tokens, sequence = batch.tokens, batch.inputs.sequence
    assert steps < 256, "a prefix length travels in a byte"
    accepted_BT = gather_sequence(accepted_BS.to(torch.uint8), batch.inputs.layout, sequence).long()
    sums = acceptance_sums(accepted_BT, steps, tokens.loss_mask_BT, tokens.document_BT)
    sums["tokens"] = (tokens.document_BT >= 0).sum()
    counts_here = sequence is None or sequence.rank == 0
    return {name: value if counts_here else torch.zeros_like(value) for name, value in sums.items()}
