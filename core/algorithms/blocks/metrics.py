"""What training on blocks reports: additive sums of a micro-batch, and readable figures from added sums.

Shape letters: B rows, S positions of this rank, T positions, A blocks of a row, K steps, M supervised (block, step)
pairs grouped by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.batch import Batch
from torchspec.core.algorithms.metrics import step_sums
from torchspec.core.objectives.acceptance import first_rounds, hits, prefix_lengths, walked_slots, whole_slots
from torchspec.core.objectives.distillation import PairTerms
from torchspec.core.parallel.sequence import gather_sequence


def block_sums(batch: Batch, terms: PairTerms) -> dict[str, Tensor]:
    """Sums over this micro-batch: `step_sums`, and

    tokens                     scalar: positions of all rows
    whole_slots, whole_hits    blocks that could be accepted whole, and how many [K] accepted at least k + 1 tokens
    walk_rounds, walk_hits     the same of the blocks that decoding would come to, in documents of which every eligible
                               anchor was drawn: elsewhere no walk is known
    """
    sizes, blocks = batch.pairs.sizes, batch.blocks
    agree_BAK = torch.zeros((*blocks.anchor_BA.shape, len(sizes)), dtype=torch.bool, device=terms.agree_M.device)
    agree_BAK.view(-1)[batch.pairs.cell_M] = terms.agree_M
    return step_sums(batch.pairs, terms) | _acceptance_sums(batch, prefix_lengths(agree_BAK), len(sizes))


def _acceptance_sums(batch: Batch, accepted_BA: Tensor, steps: int) -> dict[str, Tensor]:
    """What is counted over whole sequences: on the first of the ranks that share them, 0 on the others."""
    tokens, blocks, sequence = batch.tokens, batch.blocks, batch.inputs.sequence
    assert steps < 255, "a prefix length travels in a byte"
    # 1 + A where a block stands; stand-ins write nothing.
    own_BS = torch.zeros(len(accepted_BA), batch.inputs.layout.rows, dtype=torch.uint8, device=accepted_BA.device)
    own_BS.scatter_reduce_(
        1, blocks.place_BA, ((accepted_BA + 1) * blocks.real_BA).to(torch.uint8), reduce="amax", include_self=True
    )
    found_BT = gather_sequence(own_BS, batch.inputs.layout, sequence).long()
    # The round of anchor a is slot a - 1, as `core.objectives.acceptance` counts them.
    at_BT = torch.zeros_like(found_BT)
    at_BT[:, :-1] = found_BT[:, 1:]
    whole_BT = whole_slots(tokens.loss_mask_BT, tokens.document_BT, steps)
    drawn_BT = whole_BT & (at_BT > 0)
    accepted_BT = (at_BT - 1).clamp_min(0)
    start_BT = first_rounds(tokens.loss_mask_BT, tokens.document_BT) & batch.whole_BT
    walked_BT = walked_slots(accepted_BT, start_BT, whole_BT & batch.whole_BT)
    sums = {
        "walk_rounds": walked_BT.sum(),
        "walk_hits": hits(accepted_BT, walked_BT, steps),
        "whole_slots": drawn_BT.sum(),
        "whole_hits": hits(accepted_BT, drawn_BT, steps),
        "tokens": (tokens.document_BT >= 0).sum(),
    }
    counts_here = sequence is None or sequence.rank == 0
    return {name: value if counts_here else torch.zeros_like(value) for name, value in sums.items()}
