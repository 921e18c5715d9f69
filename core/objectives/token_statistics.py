"""What the log-probability of a token and the entropy need of each part of a vocabulary, and their gradient.

With x a row of logits, T a temperature, top = max x, z = (x - top) / T, s = sum exp z and m = sum p z, all over the
whole vocabulary, and p = exp(z) / s:

    log p[y] = z[y] - log s
    H = log s - m               two terms of one sign: nothing cancels
    d (a log p[y] + b H) / dx = (a (onehot(y) - p) + b p (m - z)) / T

A logit of -inf has p = 0 and adds nothing to m: p log p is 0.

Shape letters: C tokens, N columns of a part, P parts in the order of their columns, S statistics: the part's largest
logit, sum exp and x[y], and sum z exp z if the entropy is wanted, z and the sums being over the part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1e4
"""exp is 0 there in any precision, and its products with that 0 are too: it stands for a z of -inf."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Over the whole vocabulary; `mean_C` is m, None without the entropy."""

    top_C: Tensor
    mass_C: Tensor
    log_probability_C: Tensor
    mean_C: Tensor | None

    @property
    def entropy_C(self) -> Tensor | None:
        return None if self.mean_C is None else self.mass_C.log() - self.mean_C


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """The gradient in a part is exp(z) (share + spread (z - mean)), and `own` more at column `place`.

    own_C     0 where the token is in another part, whose place is 0
    """

    top_C: Tensor
    share_C: Tensor
    own_C: Tensor
    place_C: Tensor
    spread_C: Tensor | None
    mean_C: Tensor | None

    def __getitem__(self, part: slice) -> Slopes:
        return Slopes(
            top_C=self.top_C[part],
            share_C=self.share_C[part],
            own_C=self.own_C[part],
            place_C=self.place_C[part],
            spread_C=None if self.spread_C is None else self.spread_C[part],
            mean_C=None if self.mean_C is None else self.mean_C[part],
        )


def part_statistics(x_CN: Tensor, place_C: Tensor, scale: float, *, with_entropy: bool) -> Tensor:
    """[S, C] in fp32 (fp64 for fp64); `place_C` is each token's column, any column if it is in another part. `scale`
    is 1 / T. Of no columns: the least finite number, zeros."""
    wide = torch.promote_types(x_CN.dtype, torch.float32)
    found_SC = x_CN.new_zeros(4 if with_entropy else 3, len(x_CN), dtype=wide)
    if not x_CN.shape[1]:
        found_SC[0] = torch.finfo(wide).min
        return found_SC
    top_C = _largest(x_CN, wide)
    z_CN = _less(x_CN, top_C[:, None], scale)
    found_SC[0], found_SC[2] = top_C, x_CN.gather(1, place_C[:, None])[:, 0]
    if with_entropy:
        exp_CN = z_CN.exp()
        found_SC[1], found_SC[3] = exp_CN.sum(-1), torch.linalg.vecdot(exp_CN, z_CN)
    else:
        found_SC[1] = z_CN.exp_().sum(-1)
    return found_SC


def merged_parts(parts_PSC: Tensor, owner_C: Tensor, scale: float) -> Whole:
    """`owner_C` says which part a token is in."""
    top_PC, mass_PC, label_PC = parts_PSC[:, 0], parts_PSC[:, 1], parts_PSC[:, 2]
    top_C = top_PC.amax(0)
    shift_PC = _less(top_PC, top_C, scale)
    share_PC = shift_PC.exp()
    mass_C = (mass_PC * share_PC).sum(0)
    mean_C = None
    if parts_PSC.shape[1] > 3:
        mean_C = ((parts_PSC[:, 3] + mass_PC * shift_PC) * share_PC).sum(0) / mass_C
    label_C = label_PC.gather(0, owner_C[None])[0]
    return Whole(top_C=top_C, mass_C=mass_C, log_probability_C=(label_C - top_C) * scale - mass_C.log(), mean_C=mean_C)


def write_gradient(x_CN: Tensor, slopes: Slopes, scale: float, out_CN: Tensor) -> None:
    """Into `out_CN`, which may be x_CN itself."""
    if not x_CN.shape[1]:
        return
    into = out_CN if out_CN.dtype == slopes.top_C.dtype else None
    z_CN = _less(x_CN, slopes.top_C[:, None], scale, out=into)
    if slopes.spread_C is None:
        gradient_CN = z_CN.exp_().mul_(slopes.share_C[:, None])
    else:
        assert slopes.mean_C is not None
        exp_CN = z_CN.exp()
        gradient_CN = z_CN.sub_(slopes.mean_C[:, None]).mul_(slopes.spread_C[:, None]).add_(slopes.share_C[:, None])
        gradient_CN.mul_(exp_CN)
    gradient_CN.scatter_add_(1, slopes.place_C[:, None], slopes.own_C[:, None])
    if gradient_CN.dtype != out_CN.dtype:
        out_CN.copy_(gradient_CN)


def _largest(x_CN: Tensor, wide: torch.dtype) -> Tensor:
    """A finite number for a row of -inf, so that what is less than it is not NaN."""
    return x_CN.amax(-1).to(wide).clamp_min_(torch.finfo(wide).min)


def _less(x: Tensor, top: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """z, or NOTHING where it is below that; NaN stays."""
    z = torch.sub(x, top, out=out)
    return (z if scale == 1.0 else z.mul_(scale)).clamp_min_(NOTHING)
