"""What the loss does not do: gradients in evaluation, and buffers that grow with the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import LossShape, chunk_rows
from torchspec.core.objectives.distillation import Head, PairTerms, distil
from torchspec.core.ops.distillation import TilePairs, TileTeacher, TileTerms

Heads = Callable[..., TargetHead]


class Recording(FusedOps):
    """Notes what is asked for."""

    def __init__(self) -> None:
        self.with_grad: list[bool] = []
        self.tiles: list[Tensor] = []
        self.products: list[int] = []
        self.backwards = 0

    def distillation_tile(
        self, logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool
    ) -> TileTerms:
        self.with_grad.append(with_grad)
        self.tiles.append(logits_CN)
        return super().distillation_tile(logits_CN, teacher, pairs, with_grad=with_grad)

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        self.backwards += 1
        return super().rms_norm_backward(dy, x, weight, kept)

    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().wide_mm(a, b, out)
        self.products.append(product.numel())
        return product


def test_evaluation_makes_no_gradients(case: Any) -> None:
    given = replace(case, weights={"cross_entropy": 1.0, "jsd": 0.5, "tv": 0.5, "argmax": 0.1})
    want = given.run(4)
    outputs, norm_H, head_NH = given.leaves()
    ops = Recording()
    with torch.no_grad():
        loss, terms = distil(outputs, Head(norm_H=norm_H, head_NH=head_NH, eps=1e-3), given.supervision(4, ops), ops)
    assert not loss.requires_grad
    assert set(ops.with_grad) == {False}
    assert ops.backwards == 0
    torch.testing.assert_close(loss, want.loss, rtol=1e-13, atol=0)
    for each in fields(PairTerms):
        got_M = getattr(terms, each.name)
        assert not got_M.requires_grad
        torch.testing.assert_close(got_M, getattr(want.terms, each.name), rtol=1e-13, atol=1e-13)


def shape(steps: int, hidden: int, vocabulary: VocabularyMap) -> LossShape:
    return LossShape(
        steps=steps, hidden=hidden, draft_vocabulary=vocabulary.size, target_vocabulary=vocabulary.target_size
    )


def test_the_budget_bounds_every_buffer_whatever_the_rows(cases: ModuleType, make_head: Heads) -> None:
    steps, target, budget = 3, 300, 1 << 20
    vocabulary = cases.every_third(target)
    rows = chunk_rows(shape(steps, 8, vocabulary), budget)
    assert rows > 128
    largest = []
    for count in (rows + 1, 3 * rows + 5):
        given = cases.Case.random(make_head(target, 8, 1.0, torch.float32), vocabulary, rows=count, steps=steps)
        ops = Recording()
        given.run(rows, ops)
        assert set(ops.with_grad) == {True}
        assert ops.backwards == len(ops.tiles) == len(given.supervision(rows, ops).chunks)
        buffers = {tile.untyped_storage().data_ptr(): tile.untyped_storage().nbytes() for tile in ops.tiles}
        assert len(buffers) == 1, "one buffer for the logits of all chunks"
        (logits,) = buffers.values()
        assert logits <= 4 * steps * rows * vocabulary.size < budget
        assert 4 * max(ops.products) <= budget
        largest.append(max(ops.products))
    assert max(largest) <= rows * max(target, steps * vocabulary.size)


def test_the_pass_stays_within_its_budget_beside_the_gradients(
    cases: ModuleType, make_head: Heads, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    """Measured; the fp32 head is multiplied where it lies."""
    steps, target, size, budget = 5, 3000, 64, 16 << 20
    vocabulary = cases.every_third(target)
    rows = chunk_rows(shape(steps, size, vocabulary), budget)
    assert rows > 128
    ops, measured = FusedOps(), []
    for count in (rows, 3 * rows):
        given = cases.Case.random(make_head(target, size, 1.0, torch.float32), vocabulary, rows=count, steps=steps)
        outputs, norm_H, head_NH = given.leaves()
        head, supervision = Head(norm_H=norm_H, head_NH=head_NH, eps=1e-3), given.supervision(rows, ops)
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in (*outputs, norm_H, head_NH))
        measured.append(peak_bytes(lambda: distil(outputs, head, supervision, ops)) - gradients)  # noqa: B023
    assert measured[0] > budget // 2, "what was measured was the pass"
    assert max(measured) < budget
    assert measured[1] < 1.05 * measured[0]
