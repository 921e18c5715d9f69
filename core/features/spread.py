"""From features of whole documents to each sequence-parallel rank's share of them.

Shape letters: T rows of a document, F = taps x target hidden size, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows, Packs, Slice, TokenRows, placed, slices
from torchspec.core.parallel.sequence import SequenceGroup


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Of one document: its taps, and the last hidden states after the target's final norm."""

    taps_TF: Tensor
    last_TH: Tensor


def spread_features(
    captured: Mapping[int, Hidden],
    tokens: TokenRows,
    packs: Packs,
    sequence: SequenceGroup,
    *,
    halo: int,
    like: Hidden,
    owners: Sequence[int] | None = None,
) -> FeatureRows:
    """This rank's share of a micro-batch whose documents have been captured whole by ranks of the group.

    `captured` are this rank's documents by number. `owners[d]` is the group rank that has document d and sends every
    other rank its slices: a collective, in which every row moves once. Without `owners` every rank has every document
    (a target that they run together) and cuts for itself. `like` has no rows: the sizes, dtypes and device.
    """
    layout = sequence.layout(tokens.length)
    lengths = torch.bincount(tokens.document_BT[tokens.document_BT >= 0]).tolist()

    def share(documents: Mapping[int, Tensor], shape: Tensor, beyond: int) -> Tensor:
        wanted = [slices(lengths, packs, layout, rank, beyond) for rank in range(sequence.size)]
        mine = wanted[sequence.rank]
        if owners is None:
            parts = [documents[part.document][part.start : part.stop] for part in mine]
        else:
            parts = _exchanged(documents, wanted, owners, sequence, shape)
        places = layout.pieces_per_rank * (layout.piece_length + beyond)
        return placed(mine, lambda n: parts[n], len(packs), places, shape)

    return FeatureRows(
        tokens=tokens,
        layout=layout,
        taps_BSF=share({n: hidden.taps_TF for n, hidden in captured.items()}, like.taps_TF, 0),
        last_BXH=share({n: hidden.last_TH for n, hidden in captured.items()}, like.last_TH, halo),
        norm_state="post_norm",
        sequence=sequence,
    )


def _exchanged(
    documents: Mapping[int, Tensor],
    wanted: Sequence[Sequence[Slice]],
    owners: Sequence[int],
    sequence: SequenceGroup,
    like: Tensor,
) -> list[Tensor]:
    """The rows of each of this rank's slices, from the ranks that own them."""
    me = sequence.rank
    sent = []
    for reads in wanted:
        own = [documents[part.document][part.start : part.stop] for part in reads if owners[part.document] == me]
        sent.append(torch.cat(own) if own else like)
    counts = [0] * sequence.size
    for part in wanted[me]:
        counts[owners[part.document]] += part.stop - part.start
    received = sequence.communication.all_to_all(sent, sequence.group, counts)
    by_owner = {}
    for owner, rows in enumerate(received):
        ends = accumulate((s.stop - s.start for s in wanted[me] if owners[s.document] == owner), initial=0)
        by_owner[owner] = iter([rows[lo:hi] for lo, hi in pairwise(ends)])
    return [next(by_owner[owners[part.document]]) for part in wanted[me]]
