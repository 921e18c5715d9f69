"""A micro-batch of the loss, the way through the product, and the same in float64 with every logit alive at once.

The reference runs the eager terms under autograd and knows nothing of chunks, tiles, runs or stacks. Loaded by path.

Shape letters: R target rows, S slots, M supervised pairs grouped by step, H hidden size, N draft vocabulary, X width of
what is added to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

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
    """What a pass leaves: gradients are those of the loss itself; none of a frozen head or of what is not added."""

    loss: Tensor
    terms: PairTerms
    doutputs: tuple[Tensor, ...]
    dnorm_H: Tensor
    dhead_NH: Tensor | None
    dextras: tuple[Tensor, ...] = ()
    dextra_NX: Tensor | None = None

    def gradients(self) -> dict[str, Tensor]:
        steps = {f"outputs[{step}]": grad for step, grad in enumerate(self.doutputs)}
        steps |= {f"extras[{step}]": grad for step, grad in enumerate(self.dextras)}
        others = {"norm": self.dnorm_H, "head": self.dhead_NH, "extra": self.dextra_NX}
        return steps | {name: grad for name, grad in others.items() if grad is not None}


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """What gradients are asked of."""

    outputs: list[Tensor]
    norm_H: Tensor
    head_NH: Tensor
    extras: list[Tensor] | None
    extra_NX: Tensor | None

    def head(self, *, is_part: bool = False) -> Head:
        return Head(norm_H=self.norm_H, head_NH=self.head_NH, eps=EPS, extra_NX=self.extra_NX, is_part=is_part)

    def trained(self) -> list[Tensor]:
        every = [*self.outputs, *(self.extras or ()), self.norm_H, self.head_NH, self.extra_NX]
        return [leaf for leaf in every if leaf is not None and leaf.requires_grad]

    def found(self, loss: Tensor, terms: PairTerms, *, scale: float) -> Found:
        """After a backward pass of `scale` times the loss."""

        def gradient(leaf: Tensor) -> Tensor:
            assert leaf.grad is not None
            return leaf.grad / scale

        assert self.head_NH.requires_grad or self.head_NH.grad is None
        return Found(
            loss=loss.detach(),
            terms=terms,
            doutputs=tuple(gradient(leaf) for leaf in self.outputs),
            dnorm_H=gradient(self.norm_H),
            dhead_NH=gradient(self.head_NH) if self.head_NH.requires_grad else None,
            dextras=tuple(gradient(leaf) for leaf in self.extras or ()),
            dextra_NX=None if self.extra_NX is None else gradient(self.extra_NX),
        )


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
    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: {"cross_entropy": 1.0})
    """Of all pairs, or of each, [M]."""
    shard_logits: ShardLogits = "tokens"
    document_M: Tensor | None = None
    """With it and a survey every document counts alike."""
    extras: tuple[Tensor, ...] | None = None
    extra_NX: Tensor | None = None
    """What is added to the logits of each step, [S, X], and its map."""
    frozen: bool = False
    """The head wants no gradient."""
    is_part: bool = False
    """`head_NH` are this rank's rows alone."""

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

    def with_extras(self, width: int = 5) -> Case:
        """What is added is as large as the logits, so that it decides as much as they do."""
        generator, dtype = torch.Generator().manual_seed(width), self.norm_H.dtype
        size = self.head_NH.double().norm(dim=-1).mean() / width**0.5

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return replace(
            self,
            extras=tuple(random(len(output_SH), width).to(dtype) for output_SH in self.outputs),
            extra_NX=(size * random(len(self.head_NH), width)).to(dtype),
        )

    def weighing_each(self, names: Sequence[str]) -> Case:
        """Terms whose weights differ from pair to pair, and more so from step to step."""
        generator = torch.Generator().manual_seed(len(self.row_M))
        step_M = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        each = {}
        for place, name in enumerate(names):
            weight_M = torch.rand(len(self.row_M), generator=generator, dtype=torch.float64)
            each[name] = (weight_M + step_M * (1 + place)).to(self.base_M.dtype)
        return replace(self, weights={**self.weights, **each})

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

    def leaves(self, dtype: torch.dtype | None = None) -> Leaves:
        def leaf(value: Tensor, *, trained: bool = True) -> Tensor:
            return value.to(dtype).clone().requires_grad_(trained)

        return Leaves(
            outputs=[leaf(output_SH) for output_SH in self.outputs],
            norm_H=leaf(self.norm_H),
            head_NH=leaf(self.head_NH, trained=not self.frozen),
            extras=None if self.extras is None else [leaf(extra_SX) for extra_SX in self.extras],
            extra_NX=None if self.extra_NX is None else leaf(self.extra_NX),
        )

    def run(self, most_rows: int, ops: FusedOps | None = None, *, survey: bool = False) -> Found:
        ops = ops or SmallSlices()
        leaves = self.leaves()
        head = leaves.head(is_part=self.is_part)
        loss, terms = distil(leaves.outputs, head, self.supervision(most_rows, ops, survey), ops, leaves.extras)
        (4 * loss).backward()
        return leaves.found(loss, terms, scale=4)

    def _at_pairs(self, values: Sequence[Tensor]) -> Tensor:
        slots = self.slot_M.split(list(self.sizes))
        return torch.cat([value[slot_m] for value, slot_m in zip(values, slots, strict=True)])

    def reference(self) -> Found:
        """In float64. The normed output has compute precision, as in Llama, and is the loss's input all the same."""
        leaves = self.leaves(torch.float64)
        raw_MH = self._at_pairs(leaves.outputs)
        unit_MH = raw_MH / (raw_MH.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed_MH = unit_MH * leaves.norm_H
        if self.norm_H.dtype == torch.bfloat16:
            rounded_MH = unit_MH.to(torch.bfloat16) * self.norm_H
            normed_MH = normed_MH + (rounded_MH - normed_MH).detach()
        logits_MN = normed_MH @ leaves.head_NH.T
        if leaves.extras is not None:
            assert leaves.extra_NX is not None
            logits_MN = logits_MN + self._at_pairs(leaves.extras) @ leaves.extra_NX.T

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
            truth_M=forms["ground_truth"]().detach() if "ground_truth" in self.weights else None,
        )
        return leaves.found(loss, terms, scale=1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def compare(
    got: Found, want: Found, *, loss: float, gradient: float, terms: float, ordinary: Found | None = None
) -> None:
    """Relative tolerances; `terms` is absolute below 1. Gradients smaller than the `ordinary` ones are measured by
    those."""
    assert relative(got.loss, want.loss) < loss
    wanted, least = want.gradients(), {} if ordinary is None else ordinary.gradients()
    assert got.gradients().keys() == wanted.keys()
    for name, value in got.gradients().items():
        size = torch.maximum(wanted[name].norm(), least[name].norm() if least else wanted[name].new_zeros(()))
        assert (value.double() - wanted[name].double()).norm() <= gradient * size.double(), name
    for each in fields(PairTerms):
        got_M, want_M = getattr(got.terms, each.name), getattr(want.terms, each.name)
        if want_M is None:
            assert got_M is None, each.name
        elif each.name == "agree_M":
            assert torch.equal(got_M, want_M)
        else:
            torch.testing.assert_close(got_M.double(), want_M.double(), rtol=terms, atol=terms, msg=each.name)


def exactly(got: Found, want: Found) -> None:
    compare(got, want, loss=1e-12, gradient=1e-12, terms=1e-12)


def every_third(target: int) -> VocabularyMap:
    return VocabularyMap(ids_N=torch.arange(0, target, 3), target_size=target)


def vocabularies(target: int) -> dict[str, VocabularyMap]:
    return {"whole": VocabularyMap.identity(target), "pruned": every_third(target)}
