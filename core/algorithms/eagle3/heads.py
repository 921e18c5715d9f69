"""What a drafting session makes of a layer's attention: queries, keys and values of a unit-normed input, one class for
each kind of attention.

Shape letters: B sequences, M positions, H draft hidden size, Z width of what one product makes of the input, Hq / Hk
query and key-value heads, D width of a head as attention is computed, C rank of a latent, R width of the rotated part,
X anything else, S positions of a table.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.models.latent import LatentAttention, halves
from torchspec.core.models.layers import AttentionProjections, Rotary


class UnitNorm:
    """x / sqrt(sum(x^2) + H eps): an RMS norm without its weight and its sqrt(H), which belong to the next matrix.

    Statistics in fp32 (fp64 for fp64), as `FusedOps.rms_norm` has them; rounded once, to x's dtype.
    """

    def __init__(self, size: int, eps: float, like: Tensor) -> None:
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.floor = like.new_tensor(size * eps, dtype=self.wide)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.wide:
            return self(x.to(self.wide)).to(x.dtype)
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.floor, length, length).rsqrt()


def weight_after_unit(norm_weight_H: Tensor) -> Tensor:
    """What turns a unit-normed input into the norm's output, in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(norm_weight_H.dtype, torch.float32)
    scaled: Tensor = norm_weight_H.to(wide) * norm_weight_H.numel() ** 0.5
    return scaled


def folded(matrix_XH: Tensor, norm_weight_H: Tensor) -> Tensor:
    """[H, X], contiguous: the map of a norm, for a unit-normed input. Multiplied in fp32 and rounded once."""
    scale_H = weight_after_unit(norm_weight_H)
    matrix: Tensor = (matrix_XH.to(scale_H.dtype) * scale_H).to(matrix_XH.dtype).T.contiguous()
    return matrix


class RotaryRows:
    """cos and signed sin of every position so far needed: rotate(x) = x * cos + roll(x, R / 2) * sin."""

    def __init__(self, rotary: Rotary, like: Tensor) -> None:
        self._rotary, self._like, self._half = rotary, like, rotary.inv_freq_d.numel()
        self.reserve(256)

    def reserve(self, positions: int) -> None:
        position_S = torch.arange(positions, device=self._like.device)
        cos_SR, sin_SR = (rows[0] for rows in self._rotary.tables(position_S[None], self._like.dtype))
        sin_SR[:, : self._half].neg_()
        self.cos_SHR, self.sin_SHR = cos_SR[:, None], sin_SR[:, None]

    def __call__(self, x_BMHR: Tensor, where: slice | Tensor) -> Tensor:
        """`where`: one range of positions for all rows, or [B, M]."""
        turned = x_BMHR.roll(self._half, -1) * self.sin_SHR[where]
        return turned.addcmul_(x_BMHR, self.cos_SHR[where])


class Heads(Protocol):
    """input_ZX   the maps that read [embedding ; feature], one below the other, as the checkpoint has them
    output_XH  back from the heads' outputs side by side: [Hq D, H], contiguous
    scale      of q.k
    """

    input_ZX: Tensor
    output_XH: Tensor
    scale: float

    def __call__(self, made_BMZ: Tensor, rotary: RotaryRows, where: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `input_ZX` made -> rotated q [B, M, Hq, D], rotated k and v [B, M, Hk, D]."""
        ...


class GroupedHeads:
    """Implements `Heads`: what is made are q, k and v themselves."""

    def __init__(self, attention: AttentionProjections) -> None:
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.input_ZX = torch.cat([each.weight for each in maps])
        self.output_XH = attention.o_proj.weight.T.contiguous()
        self.scale, self._size = attention.scale, attention.head_dim
        self._queries, self._keys = (each.out_features // self._size for each in maps[:2])

    def __call__(self, made_BMZ: Tensor, rotary: RotaryRows, where: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads_BMHD = made_BMZ.view(*made_BMZ.shape[:2], -1, self._size)
        turning = self._queries + self._keys
        turned = rotary(heads_BMHD[:, :, :turning], where)
        return turned[:, :, : self._queries], turned[:, :, self._queries :], heads_BMHD[:, :, turning:]


class LatentHeads:
    """Implements `Heads`: what is made are the latents of queries and of keys, and the rotated part of keys.

    The norms of the latents are folded into the maps behind them, and rotated parts made as halves at once.
    """

    def __init__(self, attention: LatentAttention, eps: float) -> None:
        sizes = self._sizes = attention.sizes
        # Rows of the rotated parts, of which `halves` changes the last axis.
        turning_XR = attention.kv_a_proj_with_mqa.weight[sizes.kv_lora_rank :].T
        query_CHD = attention.q_b_proj.weight.T.unflatten(-1, (-1, sizes.qk_head_dim))  # type: ignore[no-untyped-call]
        plain, turning = torch.split(query_CHD, [sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        query_CX = torch.cat((plain, halves(turning)), dim=-1).flatten(1)
        latent_CX = attention.kv_a_proj_with_mqa.weight[: sizes.kv_lora_rank]
        self.input_ZX = torch.cat((attention.q_a_proj.weight, latent_CX, halves(turning_XR).T))
        self._query_CX = folded(query_CX.T, attention.q_a_layernorm.weight)
        self._key_value_CX = folded(attention.kv_b_proj.weight, attention.kv_a_layernorm.weight)
        self._query_unit = UnitNorm(sizes.q_lora_rank, eps, query_CX)
        self._key_unit = UnitNorm(sizes.kv_lora_rank, eps, query_CX)
        output_HXv = attention.o_proj.weight.unflatten(-1, (-1, sizes.v_head_dim))  # type: ignore[no-untyped-call]
        self.output_XH = F.pad(output_HXv, (0, sizes.width - sizes.v_head_dim)).flatten(1).T.contiguous()
        self.scale = attention.scale

    def __call__(self, made_BMZ: Tensor, rotary: RotaryRows, where: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self._sizes
        query_BMC, latent_BMC, turning_BMR = torch.split(
            made_BMZ, [sizes.q_lora_rank, sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        query_BMHX = self._apart(self._query_unit(query_BMC) @ self._query_CX, sizes.qk_head_dim)
        plain_q, turning_q = torch.split(query_BMHX, [sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        both_BMHX = self._apart(
            self._key_unit(latent_BMC) @ self._key_value_CX, sizes.qk_nope_head_dim + sizes.v_head_dim
        )
        plain_k, value = torch.split(both_BMHX, [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        turned_k = rotary(turning_BMR[:, :, None], where).expand(*plain_k.shape[:-1], -1)
        query = torch.cat((plain_q, rotary(turning_q, where)), dim=-1)
        return self._wide(query), self._wide(torch.cat((plain_k, turned_k), dim=-1)), self._wide(value)

    def _apart(self, x_BMX: Tensor, size: int) -> Tensor:
        return x_BMX.view(*x_BMX.shape[:2], -1, size)

    def _wide(self, x_BMHX: Tensor) -> Tensor:
        return F.pad(x_BMHX, (0, self._sizes.width - x_BMHX.shape[-1]))


def heads_of(attention: AttentionProjections | LatentAttention, eps: float) -> Heads:
    """For the kind of attention that a layer has; `eps` is that of its norms."""
    if isinstance(attention, LatentAttention):
        return LatentHeads(attention, eps)
    return GroupedHeads(attention)
