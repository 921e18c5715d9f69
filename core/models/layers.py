"""Pieces of a Llama-style decoder layer that drafts are built from. Parameter names are the checkpoints' own.

Elementwise work goes through the device's `FusedOps`; linear maps are applied together with their neighbours
where that saves memory (`core.models.fused`).

Shape letters: B rows, S positions, Hq query heads, Hk key/value heads, D head size, I MLP width, P angles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.models import fused

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the length of the text, so that keys can be rotated once and kept."""

_ROPE_KEYS = frozenset(
    {
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
    }
)


class RMSNorm(nn.Module):
    """A weight for `FusedOps.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, ops: FusedOps) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps, ops)

    def then(
        self, x: Tensor, weights_ZH: Sequence[Tensor], ops: FusedOps, adds: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Linear maps of the norm of x, `adds` added; see `fused.normed_linear`."""
        given = adds if adds is not None else [None] * len(weights_ZH)
        return fused.normed_linear(x, self.weight, self.eps, weights_ZH, given, ops)


class LinearMap(nn.Linear):
    """A weight [outputs, inputs] for a device's `LinearMaps`, by way of `core.models.fused`.

    `called`: the module is called as well, which multiplies in the weight's own precision in any case.
    """

    def __init__(self, inputs: int, outputs: int, *, called: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.called = called


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), 2002.05202, of a normed x and added to it."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = LinearMap(size, intermediate_size)
        self.up_proj = LinearMap(size, intermediate_size)
        self.down_proj = LinearMap(intermediate_size, size)

    def forward(self, x: Tensor, norm: RMSNorm, ops: FusedOps) -> Tensor:
        """x + mlp(norm(x))."""
        gate, up = norm.then(x, (self.gate_proj.weight, self.up_proj.weight), ops)
        return fused.gated_linear(gate, up, self.down_proj.weight, x, ops)


class AttentionProjections(nn.Module):
    """q, k, v from `input_size` features and o back to `output_size`; grouped queries when Hk < Hq."""

    def __init__(self, input_size: int, output_size: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = LinearMap(input_size, heads * head_dim)
        self.k_proj = LinearMap(input_size, kv_heads * head_dim)
        self.v_proj = LinearMap(input_size, kv_heads * head_dim)
        self.o_proj = LinearMap(heads * head_dim, output_size)

    def input_columns(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the q, k and v maps that read these input features."""
        return tuple(proj.weight[:, first:last] for proj in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore[return-value]

    @property
    def scale(self) -> float:
        """Of q.k."""
        scale: float = self.head_dim**-0.5
        return scale

    def heads(self, x: Tensor) -> Tensor:
        """[..., heads * D] -> [..., heads, D]."""
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def query(self, part: Tensor, angle_BS: Tensor, tables_PD: tuple[Tensor, Tensor], ops: FusedOps) -> Tensor:
        """[B, S, Hq, D], rotated, of what the map of q made."""
        return fused.rotate(self.heads(part), angle_BS, tables_PD, ops)

    def keys_values(
        self, key: Tensor, value: Tensor, angle_BS: Tensor, tables_PD: tuple[Tensor, Tensor], ops: FusedOps
    ) -> tuple[Tensor, Tensor]:
        """[B, S, Hk, D] each, of what the maps of k and v made; keys rotated."""
        return fused.rotate(self.heads(key), angle_BS, tables_PD, ops), self.heads(value)

    def add_output(self, residual: Tensor, x_BSHD: Tensor, ops: FusedOps) -> Tensor:
        """residual + o(x)."""
        return fused.linear(x_BSHD.flatten(-2), self.o_proj.weight, ops, residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotary:
    """Rotary position embedding (2104.09864) with the frequencies stock transformers computes for a Llama."""

    inv_freq_d: Tensor  # fp32 [D / 2], on the CPU
    attention_scaling: float

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object], head_dim: int, max_positions: int) -> Rotary:
        """From a checkpoint's `rope_parameters`. Raises ValueError for a kind that is not static."""
        kind = str(parameters.get("rope_type", "default"))
        if kind not in STATIC_ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not supported; known: {', '.join(STATIC_ROPE_TYPES)}")
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters=dict(parameters) | {"rope_type": kind},
        )
        initial = (
            LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        )
        with torch.device("cpu"):  # also where a draft of shapes alone is being built
            inv_freq_d, scaling = initial(config)
        return cls(inv_freq_d=inv_freq_d.float(), attention_scaling=float(scaling))

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., D] at these positions; angles in fp32 (fp64 for fp64), the result in `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        half = positions[..., None].to(wide) * self.inv_freq_d.to(positions.device, wide, non_blocking=True)
        angle = torch.cat((half, half), dim=-1)
        return (
            (angle.cos() * self.attention_scaling).to(dtype),
            (angle.sin() * self.attention_scaling).to(dtype),
        )


def llama_rope(parameters: Mapping[str, object]) -> dict[str, object]:
    """A target's rope parameters as a Llama-style draft takes them over.

    Base and length scaling stay; what only the target's own architecture reads (a partial rotary factor, sections of
    multimodal positions) goes: a Llama layer rotates whole heads by text positions.
    """
    return {key: value for key, value in parameters.items() if key in _ROPE_KEYS}
