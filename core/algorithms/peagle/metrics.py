"""What P-EAGLE counts in training: additive sums of a micro-batch.

Shape letters: B rows, S slots of this rank, T positions, K depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.algorithms.metrics import step_sums
from torchspec.core.algorithms.peagle.batch import Batch
from torchspec.core.objectives.acceptance import first_rounds, hits, prefix_lengths, walked_slots, whole_slots
from torchspec.core.objectives.distillation import PairTerms
from torchspec.core.parallel.sequence import gather_sequence


def element_sums(batch: Batch, terms: PairTerms) -> dict[str, Tensor]:
    """Sums over this micro-batch: `step_sums`, and

    tokens                     scalar: positions of all rows
    whole_slots, whole_hits    slots that can stand for a round and were drawn at every depth, and how many [K] of them
                               accepted at least k + 1 tokens
    walk_rounds, walk_hits     the same of the slots that decoding would come to, in documents that kept every element:
                               elsewhere no walk is known
    """
    sizes = batch.pairs.sizes
    slots = (batch.tokens.document_BT.shape[0], batch.inputs.layout.rows)
    agree_BSK = torch.zeros((*slots, len(sizes)), dtype=torch.bool, device=terms.agree_M.device)
    agree_BSK.view(-1)[batch.pairs.cell_M] = terms.agree_M
    return step_sums(batch.pairs, terms) | _acceptance_sums(batch, prefix_lengths(agree_BSK), len(sizes))


def _acceptance_sums(batch: Batch, accepted_BS: Tensor, depths: int) -> dict[str, Tensor]:
    """What is counted over whole sequences: on the first of the ranks that share them, 0 on the others."""
    tokens, sequence = batch.tokens, batch.inputs.sequence
    assert depths < 256, "a prefix length travels in a byte"
    accepted_BT = gather_sequence(accepted_BS.to(torch.uint8), batch.inputs.layout, sequence).long()
    whole_BT = whole_slots(tokens.loss_mask_BT, tokens.document_BT, depths) & batch.deep_BT
    start_BT = first_rounds(tokens.loss_mask_BT, tokens.document_BT)
    walked_BT = walked_slots(accepted_BT, start_BT, whole_BT & batch.whole_BT)
    sums = {
        "walk_rounds": walked_BT.sum(),
        "walk_hits": hits(accepted_BT, walked_BT, depths),
        "whole_slots": whole_BT.sum(),
        "whole_hits": hits(accepted_BT, whole_BT, depths),
        "tokens": (tokens.document_BT >= 0).sum(),
    }
    counts_here = sequence is None or sequence.rank == 0
    return {name: value if counts_here else torch.zeros_like(value) for name, value in sums.items()}
