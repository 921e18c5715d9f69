"""The chunked loss with gradients made in its forward, against the eager terms under autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives import eager
from torchspec.core.objectives.chunks import chunk_rows, plan_chunks
from torchspec.core.objectives.distillation import PairTerms, Supervision, distil
from torchspec.core.objectives.teacher import OUTSIDE, Teacher

Heads = Callable[..., TargetHead]


@dataclass(frozen=True, kw_only=True)
class Case:
    """R target rows; step k is taught by rows k, k+1, ... but for a few that are left out."""

    head: TargetHead
    vocabulary: VocabularyMap
    normed_RH: Tensor
    hidden_MH: Tensor
    head_NH: Tensor
    row_M: Tensor
    sizes: tuple[int, ...]
    weight_M: Tensor

    @classmethod
    def random(cls, head: TargetHead, vocabulary: VocabularyMap, rows: int, steps: int, scale: float = 1.0) -> Case:
        generator = torch.Generator().manual_seed(rows)
        size, dtype = head.head_VH.shape[1], head.head_VH.dtype

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        taught = [torch.tensor([r for r in range(k, rows) if k == 0 or (r + k) % 4]) for k in range(steps)]
        row_M = torch.cat(taught)
        return cls(
            head=head,
            vocabulary=vocabulary,
            normed_RH=random(rows, size).to(dtype),
            hidden_MH=random(len(row_M), size).to(dtype),
            head_NH=(scale * random(vocabulary.size, size)).to(dtype),
            row_M=row_M,
            sizes=tuple(len(r) for r in taught),
            weight_M=torch.rand(len(row_M), generator=generator, dtype=torch.promote_types(dtype, torch.float32)),
        )

    def run(self, most_rows: int) -> tuple[Tensor, PairTerms, Tensor, Tensor]:
        """(loss, terms, d hidden, d head)."""
        hidden, head = self.hidden_MH.clone().requires_grad_(), self.head_NH.clone().requires_grad_()
        teacher = Teacher(self.head, self.normed_RH, self.vocabulary, survey_rows=7)
        chunks = plan_chunks(self.row_M, self.sizes, len(self.normed_RH), most_rows)
        supervision = Supervision(teacher=teacher, chunks=chunks, row_M=self.row_M, weight_M=self.weight_M)
        loss, terms = distil(hidden, head, supervision, FusedOps())
        (3 * loss).backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return loss.detach(), terms, hidden.grad / 3, head.grad / 3

    def reference(self) -> tuple[Tensor, PairTerms, Tensor, Tensor]:
        """The same in float64, every pair's logits alive at once."""
        hidden, head = (x.double().requires_grad_() for x in (self.hidden_MH, self.head_NH))
        full_RV = (self.normed_RH.double() @ self.head.head_VH.double().T).softmax(-1)
        inside_RN = full_RV[:, self.vocabulary.ids_N]
        probs_MN = (inside_RN / inside_RN.sum(-1, keepdim=True))[self.row_M]
        logits_MN = hidden @ head.T
        loss = (self.weight_M.double() * eager.cross_entropy(logits_MN, probs_MN)).sum()
        loss.backward()
        terms = PairTerms(
            cross_entropy_M=eager.cross_entropy(logits_MN, probs_MN).detach(),
            entropy_M=eager.entropy(probs_MN),
            alpha_M=eager.acceptance(logits_MN, probs_MN, inside_RN.sum(-1)[self.row_M]).detach(),
            agree_M=self.vocabulary.ids_N[logits_MN.argmax(-1)] == full_RV.argmax(-1)[self.row_M],
        )
        assert hidden.grad is not None
        assert head.grad is not None
        return loss.detach(), terms, hidden.grad, head.grad


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def every_third(target: int) -> VocabularyMap:
    return VocabularyMap(ids_N=torch.arange(0, target, 3), target_size=target)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("most_rows", [1, 4, 100])
def test_value_terms_and_gradients_in_float64(make_head: Heads, pruned: bool, most_rows: int) -> None:
    vocabulary = every_third(60) if pruned else VocabularyMap.identity(60)
    case = Case.random(make_head(60, 8), vocabulary, rows=17, steps=3)
    loss, terms, dhidden, dhead = case.run(most_rows)
    want_loss, want_terms, want_dhidden, want_dhead = case.reference()
    assert relative(loss, want_loss) < 1e-13
    assert relative(dhidden, want_dhidden) < 1e-13
    assert relative(dhead, want_dhead) < 1e-13
    for name in ("cross_entropy_M", "entropy_M", "alpha_M", "agree_M"):
        torch.testing.assert_close(getattr(terms, name), getattr(want_terms, name), rtol=1e-12, atol=1e-12)
    assert int(terms.agree_M.sum()) > 0 or pruned


# Logits up to about 1e4: one token has all the probability, most others underflow to nothing in fp32.
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_saturated_logits_stay_finite_and_right(make_head: Heads, scale: float) -> None:
    case = Case.random(
        make_head(60, 8, scale, torch.float32), VocabularyMap.identity(60), rows=17, steps=3, scale=scale
    )
    loss, terms, dhidden, dhead = case.run(4)
    want_loss, want_terms, want_dhidden, want_dhead = case.reference()
    # fp32 logits of size 1e4 are known to 1e-3: that is the error of a difference of two of them.
    assert relative(loss, want_loss) < 1e-5
    assert relative(dhidden, want_dhidden) < 1e-4
    assert relative(dhead, want_dhead) < 1e-4
    assert torch.isfinite(terms.cross_entropy_M).all()
    assert torch.isfinite(terms.entropy_M).all()
    torch.testing.assert_close(terms.alpha_M.double(), want_terms.alpha_M, rtol=0, atol=1e-3)


def test_bfloat16_compute_keeps_fp32_logits(make_head: Heads) -> None:
    """Rounding the logits themselves to bf16 is four times worse than this bound; rounding dz to bf16 is not."""
    case = Case.random(make_head(600, 64, 0.3, torch.bfloat16), every_third(600), rows=64, steps=3, scale=0.3)
    loss, _, dhidden, dhead = case.run(16)
    assert loss.dtype == torch.float32
    # The teacher's head multiplies in bf16, as the target itself does; its own rounding is not this loss's error.
    full_RV = case.head.logits(case.normed_RH).double().softmax(-1)
    inside_RN = full_RV[:, case.vocabulary.ids_N]
    probs_MN = (inside_RN / inside_RN.sum(-1, keepdim=True))[case.row_M]
    hidden, head = (x.double().requires_grad_() for x in (case.hidden_MH, case.head_NH))
    want = (case.weight_M.double() * eager.cross_entropy(hidden @ head.T, probs_MN)).sum()
    want.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert relative(loss, want.detach()) < 1e-5
    assert relative(dhidden, hidden.grad) < 4e-3
    assert relative(dhead, head.grad) < 4e-3


def test_real_vocabulary(make_head: Heads) -> None:
    """151,936 target tokens, 32,000 drafted ones, fp32."""
    target = 151_936
    ids = torch.randperm(target, generator=torch.Generator().manual_seed(0))[:32_000].sort().values
    case = Case.random(
        make_head(target, 8, 1.0, torch.float32), VocabularyMap(ids_N=ids, target_size=target), rows=6, steps=2
    )
    loss, terms, dhidden, dhead = case.run(4)
    want_loss, want_terms, want_dhidden, want_dhead = case.reference()
    assert relative(loss, want_loss) < 1e-6
    assert relative(dhidden, want_dhidden) < 1e-5
    assert relative(dhead, want_dhead) < 1e-5
    torch.testing.assert_close(terms.alpha_M.double(), want_terms.alpha_M, rtol=1e-4, atol=0)


def test_no_pair_at_all_gives_zero_gradients(make_head: Heads) -> None:
    head = make_head(60, 8)
    for vocabulary in (VocabularyMap.identity(60), every_third(60)):
        hidden = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(vocabulary.size, 8, dtype=torch.float64, requires_grad=True)
        nothing = torch.zeros(0, dtype=torch.int64)
        teacher = Teacher(head, torch.zeros(0, 8, dtype=torch.float64), vocabulary, survey_rows=7)
        supervision = Supervision(
            teacher=teacher, chunks=plan_chunks(nothing, (0, 0), 0, 4), row_M=nothing, weight_M=teacher.weight_R("drop")
        )
        loss, _ = distil(hidden, rows, supervision, FusedOps())
        loss.backward()
        assert loss.item() == 0.0
        assert rows.grad is not None
        assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_gradients_survive_a_second_backward_and_are_not_made_in_evaluation(make_head: Heads) -> None:
    case = Case.random(make_head(60, 8), VocabularyMap.identity(60), rows=9, steps=2)
    teacher = Teacher(case.head, case.normed_RH, case.vocabulary, survey_rows=7)
    chunks = plan_chunks(case.row_M, case.sizes, 9, 4)
    supervision = Supervision(teacher=teacher, chunks=chunks, row_M=case.row_M, weight_M=case.weight_M)
    hidden, head = case.hidden_MH.clone().requires_grad_(), case.head_NH.clone().requires_grad_()
    loss, _ = distil(hidden, head, supervision, FusedOps())
    loss.backward(retain_graph=True)
    assert head.grad is not None
    first = head.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.grad, 2 * first, rtol=1e-14, atol=0)
    with torch.no_grad():
        again, _ = distil(hidden, head, supervision, FusedOps())
    assert not again.requires_grad
    assert again == loss


def test_survey_names_the_tokens_a_draft_can_say(make_head: Heads) -> None:
    head, vocabulary = make_head(60, 8), every_third(60)
    normed_RH = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    full_RV = (normed_RH @ head.head_VH.T).softmax(-1)
    teacher = Teacher(head, normed_RH, vocabulary, survey_rows=7)
    best = [v // 3 if v % 3 == 0 else OUTSIDE for v in full_RV.argmax(-1).tolist()]
    assert teacher.chunk(0, 40).best_C.tolist() == best
    assert teacher.weight_R("drop").tolist() == [float(b != OUTSIDE) for b in best]
    assert teacher.weight_R("renormalise").tolist() == [1.0] * 40
    torch.testing.assert_close(teacher.weight_R("weight"), full_RV[:, ::3].sum(-1), rtol=1e-12, atol=0)


def test_chunks_never_fall_below_128_rows() -> None:
    assert chunk_rows(151_936, 2 << 20) == 128
    assert chunk_rows(32_000, 256 << 20) == 2048
    assert chunk_rows(1_000, 2 << 20) == 524
