"""The sizes of an EAGLE-3 or EAGLE-3.1 draft."""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.core.errors import Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import LayerGeometry
from torchspec.core.models.latent import LatentAttention
from torchspec.core.models.layers import AttentionProjections

DEFAULT_DRAFT_VOCABULARY = 32000

NORMS = ("fc_norm", "norm_before_fc", "norm_output")
"""What EAGLE-3.1 adds, by the names of options, of fields of the geometry, and of fields of published configs."""


@dataclass(frozen=True, kw_only=True)
class AttentionValues:
    """Values per token, beside q, k, v and the output of attention as it is computed.

    parts       that the embedding adds to, of which q, k and v are made
    queries     kept for the backward pass at every step for the queries' and the output's sake
    keys        the same for keys and values
    gradients   that are there together in the backward pass of a step
    """

    parts: int
    queries: int = 0
    keys: int = 0
    gradients: int = 0


@dataclass(frozen=True, kw_only=True)
class Geometry(LayerGeometry):
    """Everything that fixes the draft's parameters and arithmetic, beside the weights. Its attention has grouped
    queries; `latent.LatentGeometry` has the other kind.

    fc_norm          each tap is normed, with its own weight, before fc
    norm_before_fc   instead, all taps side by side are normed together
    norm_output      a step's feature is the output of the step before after the final norm
    With none it is EAGLE-3 (2503.01840), with any EAGLE-3.1 (2605.09992).
    """

    draft_vocab_size: int
    vocab_size: int
    target_hidden_size: int
    num_taps: int
    norm_before_residual: bool
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    attention: str = "gqa"

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft trains its own embedding: the target's does not fit its hidden size."""
        return self.hidden_size != self.target_hidden_size

    @property
    def attention_values(self) -> AttentionValues:
        return AttentionValues(parts=self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads))

    def projections(self) -> AttentionProjections | LatentAttention:
        """The layer's `self_attn`: from [embedding ; feature] to q, k and v, and back from the heads."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return AttentionProjections(2 * self.hidden_size, self.hidden_size, heads, kv_heads, self.head_dim)


def default_taps(num_layers: int) -> tuple[int, ...]:
    """One early, one middle, one late layer, as the engines default to (formats of the field)."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def misfits(geometry: Geometry, target: TargetSpec) -> list[Problem]:
    """Where the draft does not belong to the target."""
    problems = []
    for name, wanted, what in (
        ("vocab_size", target.vocab_size, "the target's"),
        ("target_hidden_size", target.hidden_size, "the target's hidden size"),
    ):
        value = getattr(geometry, name)
        if value != wanted:
            problems.append(
                Problem(
                    field="draft.config",
                    value=value,
                    message=f"its {name} must be {what}, {wanted}",
                    remedy="take a draft that was made for this target",
                )
            )
    if geometry.draft_vocab_size > target.vocab_size:
        problems.append(
            Problem(
                field="draft.vocab_size",
                value=geometry.draft_vocab_size,
                message=f"the draft cannot have more tokens than the target's {target.vocab_size}",
            )
        )
    return problems
