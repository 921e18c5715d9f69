"""A micro-batch of the loss, the way through the product, and the same in float64 with every logit alive at once.

The reference runs the eager terms under autograd and knows nothing of chunks, tiles, runs or stacks. Loaded by path.

Shape letters: R target rows, S slots, M supervised pairs grouped by step, H hidden size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives import eager
from torchspec.core.objectives.chunks import ShardLogits, plan_chunks, plan_shared_chunks
from torchspec.core.objectives.distillation import Head, PairTerms, Supervision, distil
from torchspec.core.objectives.teacher import OUTSIDE, Coverage
from torchspec.core.objectives.teachers import teacher_of
from torchspec.core.objectives.weighting import per_sequence

EPS = 1e-3
DOCUMENTS = 500


class SmallSlices(FusedOps):
    """Two or three rows of 20 to 60 numbers at a time, so that slices cut runs."""

    temporary_bytes = 1000


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a pass leaves: gradients are those of the loss itself."""

    loss: Tensor
    terms: PairTerms
    doutputs: tuple[Tensor, ...]
    dnorm_H: Tensor
    dhead_NH: Tensor

    def gradients(self) -> dict[str, Tensor]:
        steps = {f"outputs[{step}]": grad for step, grad in enumerate(self.doutputs)}
        return steps | {"norm": self.dnorm_H, "head": self.dhead_NH}


@dataclass(frozen=True, kw_only=True)
class Case:
    """R target rows; step k is taught by rows k, k+1, ... but for a few; slots stand in no order and some are idle."""

    target: TargetHead
    vocabulary: VocabularyMap
    normed_RH: Tensor
    outputs: tuple[Tensor, ...]
    norm_H: Tensor
    head_NH: Tensor
    slot_M: Tensor
    row_M: Tensor
    sizes: tuple[int, ...]
    base_M: Tensor
    truth_M: Tensor
    coverage: Coverage = "drop"
    weights: Mapping[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0})
    shard_logits: ShardLogits = "tokens"
    document_M: Tensor | None = None
    """With it and a survey every document counts alike."""

    @classmethod
    def random(cls, target: TargetHead, vocabulary: VocabularyMap, rows: int, steps: int, scale: float = 1.0) -> Case:
        generator = torch.Generator().manual_seed(rows)
        size, dtype = target.head_VH.shape[1], target.head_VH.dtype

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        taught = [[r for r in range(k, rows) if k == 0 or (r + k) % 4] for k in range(steps)]
        slots = [torch.randperm(rows + 3, generator=generator)[: len(step)] for step in taught]
        normed_RH = random(rows, size)
        outputs = [random(rows + 3, size) for _ in range(steps)]
        for output_SH, step, slot_m in zip(outputs, taught, slots, strict=True):
            output_SH[slot_m] += 3 * normed_RH[step]  # so that draft and target often agree
        row_M = torch.tensor([row for step in taught for row in step], dtype=torch.int64)
        head_NH = random(vocabulary.size, size) * 0.3 + target.head_VH[vocabulary.ids_N].double() / scale
        truth_M = torch.randint(OUTSIDE, vocabulary.size, row_M.shape, generator=generator)
        truth_M[::4] = OUTSIDE
        return cls(
            target=target,
            vocabulary=vocabulary,
            normed_RH=normed_RH.to(dtype),
            outputs=tuple(output_SH.to(dtype) for output_SH in outputs),
            norm_H=(1 + 0.3 * random(size)).to(dtype),
            head_NH=(scale * head_NH).to(dtype),
            slot_M=torch.cat(slots),
            row_M=row_M,
            sizes=tuple(len(step) for step in taught),
            base_M=torch.rand(len(row_M), generator=generator, dtype=torch.promote_types(dtype, torch.float32)),
            truth_M=truth_M,
        )

    @property
    def with_logs(self) -> bool:
        return not {"reverse_kl", "jsd"}.isdisjoint(self.weights)

    def supervision(self, most_rows: int, ops: FusedOps, survey: bool = False) -> Supervision:
        teacher = teacher_of(
            self.target, self.normed_RH, self.vocabulary, ops, coverage=self.coverage, with_logs=self.with_logs,
            shard_logits=self.shard_logits,
        )  # fmt: skip
        cut, shards = (self.row_M, self.sizes, len(self.normed_RH), most_rows), self.target.shards
        planned = plan_chunks(*cut) if shards is None else plan_shared_chunks(*cut, shards)
        base_M = self.base_M
        if survey:
            coverage_R = teacher.survey(planned)
            if self.document_M is not None:
                base_M, _ = per_sequence(base_M, coverage_R[self.row_M], self.document_M, DOCUMENTS)
        return Supervision(
            teacher=teacher, chunks=planned, slot_M=self.slot_M, row_M=self.row_M, base_M=base_M,
            weights=self.weights, truth_M=self.truth_M,
        )  # fmt: skip

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
        outputs = [output_SH.to(dtype).clone().requires_grad_() for output_SH in self.outputs]
        norm_H, head_NH = (x.to(dtype).clone().requires_grad_() for x in (self.norm_H, self.head_NH))
        return outputs, norm_H, head_NH

    def run(self, most_rows: int, ops: FusedOps | None = None, *, survey: bool = False) -> Found:
        ops = ops or SmallSlices()
        outputs, norm_H, head_NH = self.leaves()
        head = Head(norm_H=norm_H, head_NH=head_NH, eps=EPS)
        loss, terms = distil(outputs, head, self.supervision(most_rows, ops, survey), ops)
        (4 * loss).backward()
        return found(loss, terms, outputs, norm_H, head_NH, scale=4)

    def reference(self) -> Found:
        """In float64. The normed output has compute precision, as in Llama, and is the loss's input all the same."""
        outputs, norm_H, head_NH = self.leaves(torch.float64)
        slots = self.slot_M.split(list(self.sizes))
        raw_MH = torch.cat([output_SH[slot_m] for output_SH, slot_m in zip(outputs, slots, strict=True)])
        unit_MH = raw_MH / (raw_MH.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed_MH = unit_MH * norm_H
        if self.norm_H.dtype == torch.bfloat16:
            rounded_MH = unit_MH.to(torch.bfloat16) * self.norm_H
            normed_MH = normed_MH + (rounded_MH - normed_MH).detach()
        logits_MN = normed_MH @ head_NH.T

        products_RV = self.normed_RH.double() @ self.target.head_VH.double().T
        if self.target.head_VH.dtype == torch.bfloat16:  # a target in bf16 decodes from logits rounded to bf16
            products_RV = products_RV.to(torch.bfloat16).double()
        full_RV = products_RV.log_softmax(-1)
        inside_R = full_RV[:, self.vocabulary.ids_N].logsumexp(-1).exp()
        best_R = full_RV.argmax(-1)
        can_say_R = torch.isin(best_R, self.vocabulary.ids_N)
        coverage_R = {"drop": can_say_R.double(), "renormalise": torch.ones_like(inside_R), "weight": inside_R}
        log_p_MN = full_RV[:, self.vocabulary.ids_N].log_softmax(-1)[self.row_M]
        p_MN, inside_M, coverage_M = log_p_MN.exp(), inside_R[self.row_M], coverage_R[self.coverage][self.row_M]
        forms: dict[str, Callable[[], Tensor]] = {
            "cross_entropy": lambda: eager.cross_entropy(logits_MN, p_MN),
            "kl": lambda: eager.kl_divergence(logits_MN, p_MN),
            "reverse_kl": lambda: eager.reverse_kl(logits_MN, log_p_MN),
            "jsd": lambda: eager.jensen_shannon(logits_MN, log_p_MN),
            "tv": lambda: eager.total_variation(logits_MN, p_MN, inside_M),
            "lk_alpha": lambda: eager.lk_alpha(logits_MN, p_MN, inside_M),
            "argmax": lambda: eager.label_cross_entropy(logits_MN, p_MN.argmax(-1)),
            "ground_truth": lambda: eager.label_cross_entropy(logits_MN, self.truth_M),
        }
        value_M = sum((weight * forms[name]() for name, weight in self.weights.items()), inside_M.new_zeros(()))
        loss = (self.base_M.double() * coverage_M * value_M).sum()
        loss.backward()
        terms = PairTerms(
            cross_entropy_M=eager.cross_entropy(logits_MN, p_MN).detach(),
            entropy_M=eager.entropy(p_MN),
            alpha_M=eager.acceptance(logits_MN, p_MN, inside_M).detach(),
            agree_M=self.vocabulary.ids_N[logits_MN.argmax(-1)] == best_R[self.row_M],
            coverage_M=coverage_M,
        )
        return found(loss, terms, outputs, norm_H, head_NH, scale=1)


def found(
    loss: Tensor, terms: PairTerms, outputs: Sequence[Tensor], norm_H: Tensor, head_NH: Tensor, *, scale: float
) -> Found:
    doutputs, others = [], []
    for leaf in outputs:
        assert leaf.grad is not None
        doutputs.append(leaf.grad / scale)
    for leaf in (norm_H, head_NH):
        assert leaf.grad is not None
        others.append(leaf.grad / scale)
    return Found(loss=loss.detach(), terms=terms, doutputs=tuple(doutputs), dnorm_H=others[0], dhead_NH=others[1])


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def compare(
    got: Found, want: Found, *, loss: float, gradient: float, terms: float, ordinary: Found | None = None
) -> None:
    """Relative tolerances; `terms` is absolute below 1. Gradients smaller than the `ordinary` ones are measured by
    those."""
    assert relative(got.loss, want.loss) < loss
    wanted, least = want.gradients(), {} if ordinary is None else ordinary.gradients()
    for name, value in got.gradients().items():
        size = torch.maximum(wanted[name].norm(), least[name].norm() if least else wanted[name].new_zeros(()))
        assert (value.double() - wanted[name].double()).norm() <= gradient * size.double(), name
    for each in fields(PairTerms):
        got_M, want_M = getattr(got.terms, each.name), getattr(want.terms, each.name)
        if each.name == "agree_M":
            assert torch.equal(got_M, want_M)
        else:
            torch.testing.assert_close(got_M.double(), want_M.double(), rtol=terms, atol=terms, msg=each.name)


def exactly(got: Found, want: Found) -> None:
    compare(got, want, loss=1e-12, gradient=1e-12, terms=1e-12)


def every_third(target: int) -> VocabularyMap:
    return VocabularyMap(ids_N=torch.arange(0, target, 3), target_size=target)


def vocabularies(target: int) -> dict[str, VocabularyMap]:
    return {"whole": VocabularyMap.identity(target), "pruned": every_third(target)}
