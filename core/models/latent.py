"""Multi-head latent attention (MLA; DeepSeek-V2, 2405.04434) as serving engines read it, for drafts. Parameter names
are the checkpoints' own.

Of an input z, with N a root-mean-square norm with a weight:

    q          = q_b N(q_a z)                 [q_nope ; q_rope] of every head
    [c ; r]    = kv_a_with_mqa z              a latent, and one rotated part for all heads
    [k ; v]    = kv_b N(c)                    of every head
    key        = [k ; turn(r)],  query = [q_nope ; turn(q_rope)]

`turn` rotates *adjacent* pairs, entries 2i and 2i + 1 by the angle of frequency i, in engines always. Here entries 2i
and 2i + 1 are put at i and i + R/2 first, in queries and keys alike, which leaves their products as they are: then it
is the rotation of halves that devices have.

Devices know one head size for queries, keys and values. All are made as wide as the wider of the two kinds wants it,
with zeros: scores and sums stay what they are.

Under YaRN, engines multiply cos and sin by m(mscale) / m(mscale_all_dim) and scores by m(mscale_all_dim)^2 / sqrt(D),
where m(x) = 0.1 x ln(factor) + 1, and mscale is 1, mscale_all_dim 0 where it is missing. transformers differs where one
of them is missing, and has 1e-6 as the epsilon of the two norms, where engines take the config's.

Shape letters: B rows, S positions, Hq heads, D width of a head as attention is computed, C rank of the keys' latent,
R width of the rotated part, P angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.models import fused
from torchspec.core.models.layers import LinearMap, RMSNorm, Rotary

LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""What fixes such a layer beside its input, its output and the number of heads, by the names of configs."""


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """The widths of latents, and of the parts of one head."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Of a head as attention is computed, D: the first multiple of 8, which kernels want, that holds both kinds."""
        return -(-max(self.qk_head_dim, self.v_head_dim) // 8) * 8


class LatentAttention(nn.Module):
    """Has what `AttentionProjections` has; its parts are the query's latent, the keys' latent and the rotated part."""

    def __init__(
        self, input_size: int, output_size: int, heads: int, sizes: LatentSizes, eps: float, scale: float
    ) -> None:
        super().__init__()
        self.sizes, self.scale = sizes, scale
        self.q_a_proj = LinearMap(input_size, sizes.q_lora_rank)
        self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, eps)
        self.q_b_proj = LinearMap(sizes.q_lora_rank, heads * sizes.qk_head_dim)
        self.kv_a_proj_with_mqa = LinearMap(input_size, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, eps)
        self.kv_b_proj = LinearMap(sizes.kv_lora_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim))
        self.o_proj = LinearMap(heads * sizes.v_head_dim, output_size)

    def input_columns(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the maps to the query's latent, the keys' and the rotated part that read these features."""
        latent, turning = torch.split(
            self.kv_a_proj_with_mqa.weight[:, first:last], [self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim]
        )
        return self.q_a_proj.weight[:, first:last], latent, turning

    def query(self, part: Tensor, angle_BS: Tensor, tables_PR: tuple[Tensor, Tensor], ops: FusedOps) -> Tensor:
        """[B, S, Hq, D], rotated, of the query's latent."""
        (made,) = self.q_a_layernorm.then(part, (self.q_b_proj.weight,), ops)
        plain, turning = _heads(made, self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim)
        return self._wide(torch.cat((plain, fused.rotate(halves(turning), angle_BS, tables_PR, ops)), dim=-1))

    def keys_values(
        self, latent_BSC: Tensor, turning_BSR: Tensor, angle_BS: Tensor, tables_PR: tuple[Tensor, Tensor], ops: FusedOps
    ) -> tuple[Tensor, Tensor]:
        """[B, S, Hq, D] each; keys rotated."""
        (made,) = self.kv_a_layernorm.then(latent_BSC, (self.kv_b_proj.weight,), ops)
        plain, value = _heads(made, self.sizes.qk_nope_head_dim, self.sizes.v_head_dim)
        turned = fused.rotate(halves(turning_BSR)[..., None, :], angle_BS, tables_PR, ops)
        key = torch.cat((plain, turned.expand(*plain.shape[:-1], -1)), dim=-1)
        return self._wide(key), self._wide(value)

    def add_output(self, residual: Tensor, x_BSHD: Tensor, ops: FusedOps) -> Tensor:
        """residual + o(x)."""
        return fused.linear(x_BSHD[..., : self.sizes.v_head_dim].flatten(-2), self.o_proj.weight, ops, residual)

    def _wide(self, x_BSHX: Tensor) -> Tensor:
        """Its own memory in any case: a view of keys and values together would keep both."""
        missing = self.sizes.width - x_BSHX.shape[-1]
        return F.pad(x_BSHX, (0, missing)) if missing else x_BSHX.contiguous()


def _heads(made: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """[..., heads * sum] -> [..., heads, width] of each."""
    return torch.split(made.view(*made.shape[:-1], -1, sum(widths)), list(widths), dim=-1)


def halves(pairs: Tensor) -> Tensor:
    """Entries 2i and 2i + 1 of the last axis at i and i + D/2."""
    apart: Tensor = pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # type: ignore[no-untyped-call]
    return apart


def latent_rotary(rope: Mapping[str, object], size: int, max_positions: int) -> Rotary:
    """The frequencies of the rotated part, with engines' factor of cos and sin. Raises as `Rotary.from_parameters`."""
    rotary = Rotary.from_parameters(rope, size, max_positions)
    if rope.get("rope_type", "default") == "default":
        return rotary
    factor = _magnitude(rope, "mscale", 1.0) / _magnitude(rope, "mscale_all_dim", 0.0)
    return replace(rotary, attention_scaling=factor)


def latent_scale(rope: Mapping[str, object], qk_head_dim: int) -> float:
    """What engines multiply q.k with."""
    scale: float = qk_head_dim**-0.5
    if rope.get("rope_type", "default") == "default":
        return scale
    return scale * _magnitude(rope, "mscale_all_dim", 0.0) ** 2


def _magnitude(rope: Mapping[str, object], name: str, missing: float) -> float:
    """m(x). A factor of at most 1 stretches nothing."""
    factor, x = float(rope["factor"]), rope.get(name, missing)  # type: ignore[arg-type]
    return 0.1 * float(x) * math.log(factor) + 1.0 if factor > 1 else 1.0  # type: ignore[arg-type]
