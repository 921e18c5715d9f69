"""The heads that DSpark adds to a draft of blocks (2607.05147).

With e = W1[x] of the token x before, h the step's output after the final norm and W2 [N, r], the logits of a step get
W2 f, where f [r] is

    vanilla   e
    gated     sigmoid(Wg [h; e] + b) * e
    rnn       tanh(o), with (g, c, o) = Wj [s; e; h] + b and s <- sigmoid(g) s + (1 - sigmoid(g)) tanh(c), s = 0 at the
              start of a block

and the confidence, the chance that the step's token is accepted, is sigmoid(w [h; e] + b), or that of h alone. W1 has a
row for every token of the target; its gradient is dense. Parameters are named and laid out as in published
checkpoints.

Shape letters: B rows, A blocks, K steps, H hidden size, R = r the heads' rank, G = 3 R, N draft vocabulary,
V target vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.algorithms.dspark.geometry import DSparkGeometry


class MarkovHead(nn.Module):
    """The vanilla head; implements `blocks.body.Correction`."""

    def __init__(self, geometry: DSparkGeometry) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(geometry.vocab_size, geometry.markov_rank)
        self.markov_w2 = nn.Linear(geometry.markov_rank, geometry.draft_vocab_size, bias=False)

    @property
    def map_NX(self) -> Tensor:
        return self.markov_w2.weight

    def embed(self, token: Tensor) -> Tensor:
        """e [..., R] of tokens of the target."""
        embedded: Tensor = self.markov_w1(token)
        return embedded

    def features(self, normed_BAKH: Tensor, before_BAK: Tensor, embedding_VH: Tensor) -> Tensor:
        """See `Correction.features`."""
        return self.embed(before_BAK)

    def follow(
        self, state: Tensor | None, normed_BH: Tensor, token_B: Tensor, embedding_VH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Correction.follow`."""
        return self.embed(token_B), None


class GatedHead(MarkovHead):
    def __init__(self, geometry: DSparkGeometry) -> None:
        super().__init__(geometry)
        self.gate_proj = nn.Linear(geometry.hidden_size + geometry.markov_rank, geometry.markov_rank)

    def features(self, normed_BAKH: Tensor, before_BAK: Tensor, embedding_VH: Tensor) -> Tensor:
        """See `Correction.features`."""
        return self._gated(normed_BAKH, self.embed(before_BAK))

    def follow(
        self, state: Tensor | None, normed_BH: Tensor, token_B: Tensor, embedding_VH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Correction.follow`."""
        return self._gated(normed_BH, self.embed(token_B)), None

    def _gated(self, normed: Tensor, embedded: Tensor) -> Tensor:
        return torch.sigmoid(both(self.gate_proj, normed, embedded)) * embedded


class RecurrentHead(MarkovHead):
    def __init__(self, geometry: DSparkGeometry) -> None:
        super().__init__(geometry)
        rank = geometry.markov_rank
        self.joint_proj = nn.Linear(2 * rank + geometry.hidden_size, 3 * rank)

    def features(self, normed_BAKH: Tensor, before_BAK: Tensor, embedding_VH: Tensor) -> Tensor:
        """See `Correction.features`; what does not depend on the state is one product for all steps."""
        read_BAKG = self._read(normed_BAKH, self.embed(before_BAK))
        state = read_BAKG.new_zeros(*before_BAK.shape[:2], self.markov_w1.embedding_dim)
        outputs = []
        for read_BAG in read_BAKG.unbind(2):
            output, state = self._step(state, read_BAG)
            outputs.append(output)
        return torch.stack(outputs, 2)

    def follow(
        self, state: Tensor | None, normed_BH: Tensor, token_B: Tensor, embedding_VH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `Correction.follow`."""
        embedded_BR = self.embed(token_B)
        return self._step(torch.zeros_like(embedded_BR) if state is None else state, self._read(normed_BH, embedded_BR))

    def _read(self, normed: Tensor, embedded: Tensor) -> Tensor:
        """[..., G]: the part of the joint map that reads e and h."""
        rank, weight = self.markov_w1.embedding_dim, self.joint_proj.weight
        return F.linear(embedded, weight[:, rank : 2 * rank], self.joint_proj.bias) + F.linear(
            normed, weight[:, 2 * rank :]
        )

    def _step(self, state: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """(f, the next state), both [..., R]."""
        joint = read + F.linear(state, self.joint_proj.weight[:, : state.shape[-1]])
        gate, candidate, output = joint.chunk(3, -1)
        return torch.tanh(output), torch.lerp(torch.tanh(candidate), state, torch.sigmoid(gate))


MARKOV_HEADS: dict[str, type[MarkovHead]] = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RecurrentHead}


class ConfidenceHead(nn.Module):
    """How likely a step's token is to be accepted, given those before it."""

    def __init__(self, geometry: DSparkGeometry) -> None:
        super().__init__()
        self.with_markov = geometry.confidence_head_with_markov
        rank = geometry.markov_rank if self.with_markov else 0
        self.proj = nn.Linear(geometry.hidden_size + rank, 1)

    def forward(self, normed: Tensor, markov: MarkovHead, before: Tensor) -> Tensor:
        """The logit of every step [...], from its output after the final norm [..., H] and the token before it."""
        if self.with_markov:
            return both(self.proj, normed, markov.embed(before))[..., 0]
        logit: Tensor = self.proj(normed)[..., 0]
        return logit


def both(linear: nn.Linear, first: Tensor, second: Tensor) -> Tensor:
    """The map of [first; second], which are not copied side by side."""
    width = first.shape[-1]
    return F.linear(first, linear.weight[:, :width], linear.bias) + F.linear(second, linear.weight[:, width:])
