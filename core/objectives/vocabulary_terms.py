"""The closed forms of `core.ops.distillation` over a part of the vocabulary: sums to be added over the parts, then the
gradient from the totals.

With z the logits less their largest and s = sum exp z, both over all parts: q = exp(z) / s. What the terms sum over the
vocabulary is additive; what they then need of other parts is in the totals alone:

    expected    sum p z               cross_entropy = log s - expected
    alpha       sum min(f, q)         tv, lk_alpha
    kept        sum of q <= f         the slope of alpha
    reverse     sum q log(q / p)      reverse_kl
    towards     sum q log(q / m)      jsd, with
    from_p      sum p log(p / m)
    a label     z[label]              log s - z[label]

Shape letters: A target rows, M pairs, both of all ranks, N this part of the draft vocabulary, S sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.ops.distillation import LOG_TERMS, Label, TileTeacher
from torchspec.core.ops.slices import row_slices


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the vocabulary; `weight` and `labels` as in `core.ops.distillation.TilePairs`.

    z_MN       logits less their row's largest over all parts; first `sums` and then `differentiate` overwrite them
    mass_M     s
    teacher    of the A rows; its probabilities are normalised over all parts
    row_M      each pair's among them
    first      draft index of the first column
    """

    z_MN: Tensor
    mass_M: Tensor
    teacher: TileTeacher
    row_M: Tensor
    weight: Mapping[str, Tensor]
    labels: Mapping[str, Label]
    first: int
    temporary_bytes: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sums."""
        found = ["expected", "alpha"]
        if not {"tv", "lk_alpha"}.isdisjoint(self.weight):
            found.append("kept")
        if "reverse_kl" in self.weight:
            found.append("reverse")
        if "jsd" in self.weight:
            found += ["towards", "from_p"]
        return (*found, *self.labels)

    def sums(self) -> Tensor:
        """[S, M]: this part's, in the order of `names`."""
        found = {name: self.z_MN.new_zeros(len(self.z_MN)) for name in self.names}
        for part in self._slices():
            z = self.z_MN[part]
            p, f, log_p = self._teacher(part)
            found["expected"][part] = torch.linalg.vecdot(p, z)
            for name, label in self.labels.items():
                place, here = self._place(label.index_C[part])
                found[name][part] = z.gather(1, place[:, None])[:, 0].masked_fill_(~here, 0.0)
            q, log_q = self._draft(part)
            found["alpha"][part] = torch.minimum(f, q).sum(-1)
            if "kept" in found:
                found["kept"][part] = q.masked_fill(q > f, 0.0).sum(-1)
            if "reverse" in found:
                found["reverse"][part] = (q * (log_q - log_p)).sum(-1)
            if "towards" in found:
                log_m = torch.logaddexp(log_q, log_p) - math.log(2)
                found["towards"][part] = (q * (log_q - log_m)).sum(-1)
                found["from_p"][part] = (p * (log_p - log_m)).nan_to_num_(nan=0.0).sum(-1)
        return torch.stack([found[name] for name in self.names])

    def values(self, totals_SM: Tensor) -> dict[str, Tensor]:
        """The terms by name, cross_entropy always, and alpha; from sums over all parts."""
        total = dict(zip(self.names, totals_SM, strict=True))
        log_mass_M, alpha_M = self.mass_M.log(), total["alpha"]
        value = {"cross_entropy": log_mass_M - total["expected"], "alpha": alpha_M}
        value["tv"] = 1 - alpha_M
        value["lk_alpha"] = -alpha_M.clamp_min(torch.finfo(alpha_M.dtype).tiny).log()
        if "reverse" in total:
            value["reverse_kl"] = total["reverse"]
        if "towards" in total:
            value["jsd"] = 0.5 * (total["towards"] + total["from_p"])
        for name, label in self.labels.items():
            value[name] = (log_mass_M - total[name]).masked_fill(label.index_C < 0, 0.0)
        return value

    def differentiate(self, totals_SM: Tensor) -> None:
        """z_MN, as `sums` left it, becomes d(sum of weight x term) / d logits."""
        total = dict(zip(self.names, totals_SM, strict=True))
        share_M = self._slope_of_tv(total["alpha"])
        for part in self._slices():
            p, f, log_p = self._teacher(part)
            q, log_q = self._draft(part) if self._keeps_z else (self.z_MN[part], p)
            direct = q.new_zeros(len(q))  # what multiplies q
            gradient = torch.zeros_like(q)
            if "cross_entropy" in self.weight:
                direct += self.weight["cross_entropy"][part]
                gradient -= p * self.weight["cross_entropy"][part, None]
            for label in self.labels.values():
                index = label.index_C[part]
                taught = label.weight_C[part].masked_fill(index < 0, 0.0)
                direct += taught
                place, here = self._place(index)
                gradient.scatter_add_(1, place[:, None], -taught.masked_fill(~here, 0.0)[:, None])
            if "kept" in total:
                direct += share_M[part] * total["kept"][part]
                gradient -= q.masked_fill(q > f, 0.0) * share_M[part, None]
            if "reverse" in total:
                log_ratio = (log_q - log_p).sub_(total["reverse"][part, None])
                gradient += q * log_ratio * self.weight["reverse_kl"][part, None]
            if "towards" in total:
                log_m = torch.logaddexp(log_q, log_p) - math.log(2)
                log_ratio = (log_q - log_m).sub_(total["towards"][part, None])
                gradient += q * log_ratio * (0.5 * self.weight["jsd"][part, None])
            torch.addcmul(gradient, q, direct[:, None], out=self.z_MN[part])

    def _slope_of_tv(self, alpha_M: Tensor) -> Tensor:
        share_M = torch.zeros_like(alpha_M)
        if "tv" in self.weight:
            share_M += self.weight["tv"]
        if "lk_alpha" in self.weight:
            limits = torch.finfo(alpha_M.dtype)
            # An infinite slope would turn the zeros that it multiplies into NaN.
            share_M += (self.weight["lk_alpha"] / alpha_M.clamp_min(limits.tiny)).clamp_max_(limits.max)
        return share_M

    def _slices(self) -> Iterator[slice]:
        rows, size = self.z_MN.shape
        if not size:
            return iter(())  # none of the draft's tokens is here
        return row_slices(0, rows, size * self.z_MN.element_size(), self.temporary_bytes)

    def _teacher(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(p, f, log p or nothing) of the slice's pairs."""
        row = self.row_M[part]
        p, inside_R, log_probs_RN = self.teacher.probs_RN[row], self.teacher.inside_R, self.teacher.log_probs_RN
        f = p if inside_R is None else p * inside_R[row][:, None]
        return p, f, p if log_probs_RN is None else log_probs_RN[row]

    @property
    def _keeps_z(self) -> bool:
        """Whether log q is wanted; otherwise q takes the place of z."""
        return not LOG_TERMS.isdisjoint(self.weight)

    def _draft(self, part: slice) -> tuple[Tensor, Tensor]:
        """(q, log q or nothing) of the slice's pairs."""
        z, mass = self.z_MN[part], self.mass_M[part, None]
        if self._keeps_z:
            return z.exp().div_(mass), z - mass.log()
        return z.exp_().div_(mass), z

    def _place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(column of the labels that are in this part, whether they are)."""
        place = index - self.first
        here = (place >= 0) & (place < self.z_MN.shape[1]) & (index >= 0)
        return place.where(here, 0), here
