"""How queries meet keys that other ranks hold: one interface over the strategies (docs/long-sequences.md).

A form is a way to `spread` step-0 keys and values once per micro-batch, and an `Attention` over what came of it, whose
queries are this rank's rows. Everything else of a step, the diagonals too, is local.

| exchange | keys and values are spread | queries |
|---|---|---|
| gather | to every rank, whole | stay |
| ulysses | to heads, all rows of the group | change to heads and back at every call |
| ring | not; they go round at every call | stay |
| usp | to heads, within the Ulysses group | change to heads; the heads' keys go round |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.attention.ring import RingAttention
from torchspec.core.attention.ulysses import UlyssesAttention, spread_heads
from torchspec.core.interfaces.device import Attention
from torchspec.core.parallel.sequence import SequenceGroup, gather_sequence
from torchspec.core.parallel.shards import Layout


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """`attention` takes this rank's queries, the keys that `spread` returned, and a mask in positions of the whole
    sequence, of the queries of all `SequenceGroup.peers` in their order."""

    attention: Attention
    layout: Layout
    sequence: SequenceGroup | None = None

    def spread(self, key_BSKD: Tensor, value_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's keys and values as the attention reads them; a collective, differentiable once."""
        sequence = self.sequence
        if sequence is None or sequence.exchange == "ring":
            return key_BSKD, value_BSKD
        if sequence.exchange == "gather":
            both = torch.cat((key_BSKD, value_BSKD), dim=2)  # one message
            key_BTKD, value_BTKD = gather_sequence(both, self.layout, sequence, unpad=False).chunk(2, dim=2)
            return key_BTKD, value_BTKD
        return spread_heads(key_BSKD, value_BSKD, self.layout, sequence)


def attention_form(attention: Attention, layout: Layout, sequence: SequenceGroup | None) -> AttentionForm:
    """The form of the group's exchange over a device's attention; the device's own without a group."""
    form = attention
    if sequence is not None and sequence.exchange in ("ring", "usp"):
        form = RingAttention(attention=attention, sequence=sequence, layout=layout)
    if sequence is not None and sequence.exchange in ("ulysses", "usp"):
        form = UlyssesAttention(attention=form, sequence=sequence)
    return AttentionForm(attention=form, layout=layout, sequence=sequence)
