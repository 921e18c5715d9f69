"""Parts of a sample's features: what one of the ranks that share its sequence reads.

A part is a record like any other, of the rows that were asked for, in the order that they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.core.interfaces.features import Features


def part_of(features: Features, rows: Sequence[tuple[int, int]]) -> Features:
    """The rows [start, stop) of each pair; a single piece is a view."""

    def taken(tensor: Tensor) -> Tensor:
        pieces = [tensor[start:stop] for start, stop in rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Features(
        input_ids_T=taken(features.input_ids_T),
        taps_TNH=taken(features.taps_TNH),
        last_TH=taken(features.last_TH),
        tap_layers=features.tap_layers,
        norm_state=features.norm_state,
    )
