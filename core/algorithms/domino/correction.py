"""What Domino adds to the logits of a block (2605.29707), as SGLang 0.5 computes it (`speculative/domino_utils.py`).

With e the target's embedding of the token x before, h the step's output after the final norm, and g the state of a GRU
without biases that has read the block's tokens from the anchor up to x,

    g <- (1 - z) tanh(Wn e + r * (Un g)) + z g,   r = sigmoid(Wr e + Ur g),   z = sigmoid(Wz e + Uz g),   g = 0 at first
    the logits of a step get E silu(P [h; g])

but for the first step, whose token depends on none of the block. Parameters are named as in published checkpoints.

Shape letters: B rows, A blocks, K steps, H hidden size, G width of the state, X width of the correction, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.algorithms.blocks.body import BlockDraft, Correction
from torchspec.core.algorithms.domino.geometry import DominoGeometry
from torchspec.core.interfaces.target import VocabularyMap


class PrefixGRU(nn.Module):
    """The parameters of `nn.GRU`, which keeps a list of its own of them that sharding would not know of."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * width, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * width, width))

    def forward(self, embedded: Tensor, state: Tensor | None) -> Tensor:
        """The next state [..., G], of one token's embedding [..., H]; None: that of a block's start."""
        if state is None:
            state = embedded.new_zeros(*embedded.shape[:-1], self.weight_hh_l0.shape[1])
        rows, states = embedded.flatten(0, -2), state.flatten(0, -2)
        return torch.gru_cell(rows, states, self.weight_ih_l0, self.weight_hh_l0).view(state.shape)


class DominoDraft(BlockDraft):
    """Implements `blocks.body.Correction` for itself: its modules stand at the top of published checkpoints."""

    def __init__(self, geometry: DominoGeometry, vocabulary: VocabularyMap) -> None:
        super().__init__(geometry, vocabulary)
        size, width = geometry.hidden_size, geometry.gru_hidden_dim
        self.prefix_gru = PrefixGRU(size, width)
        self.embed_proj = nn.Sequential(
            nn.Linear(size + width, geometry.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(geometry.emb_dim, geometry.vocab_size, bias=False),
        )

    @property
    def correction(self) -> Correction:
        return self

    @property
    def map_NX(self) -> Tensor:
        return self.embed_proj[2].weight  # type: ignore[return-value]

    def features(self, normed_BAKH: Tensor, before_BAK: Tensor, embedding_VH: Tensor) -> Tensor:
        """See `Correction.features`."""
        embedded_BAKH = F.embedding(before_BAK, embedding_VH).to(normed_BAKH.dtype)
        state: Tensor | None = None
        states = []
        for embedded_BAH in embedded_BAKH.unbind(2):
            state = self.prefix_gru(embedded_BAH, state)
            states.append(state)
        later_BAKX = self._read(normed_BAKH[:, :, 1:], torch.stack(states[1:], 2)) if states[1:] else None
        first_BAKX = normed_BAKH.new_zeros(*before_BAK.shape[:2], 1, self.map_NX.shape[1])
        return first_BAKX if later_BAKX is None else torch.cat((first_BAKX, later_BAKX), 2)

    def follow(
        self, state: Tensor | None, normed_BH: Tensor, token_B: Tensor, embedding_VH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Correction.follow`."""
        read_BG = self.prefix_gru(F.embedding(token_B, embedding_VH).to(normed_BH.dtype), state)
        if state is None:
            return normed_BH.new_zeros(len(normed_BH), self.map_NX.shape[1]), read_BG
        return self._read(normed_BH, read_BG), read_BG

    def _read(self, normed: Tensor, state: Tensor) -> Tensor:
        """silu(P [h; g]), which are not copied side by side."""
        weight: Tensor = self.embed_proj[0].weight  # type: ignore[assignment]
        size = normed.shape[-1]
        return F.silu(F.linear(normed, weight[:, :size]) + F.linear(state, weight[:, size:]))


@torch.no_grad()
def start_correction(draft: DominoDraft) -> None:
    """In place, from torch's global random state: nothing is added at first, so that the draft starts as one of blocks
    alone; other maps keep the size of what they read."""
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    for weight in (draft.prefix_gru.weight_ih_l0, draft.prefix_gru.weight_hh_l0):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    nn.init.zeros_(draft.map_NX)
