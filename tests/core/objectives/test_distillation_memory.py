"""What the loss does not do: gradients in evaluation, and buffers that grow with the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import LossShape, chunk_rows
from torchspec.core.objectives.distillation import PairTerms, distil
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
    given = replace(case, weights={"cross_entropy": 1.0, "jsd": 0.5, "tv": 0.5, "argmax": 0.1}).with_extras()
    want = given.run(4)
    leaves, ops = given.leaves(), Recording()
    with torch.no_grad():
        loss, terms = distil(leaves.outputs, leaves.head(), given.supervision(4, ops), ops, leaves.extras)
    assert not loss.requires_grad
    assert set(ops.with_grad) == {False}
    assert ops.backwards == 0
    torch.testing.assert_close(loss, want.loss, rtol=1e-13, atol=0)
    for each in fields(PairTerms):
        got_M = getattr(terms, each.name)
        if each.name == "truth_M":
            assert got_M is None
            continue
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
    for count, extra in ((rows, False), (3 * rows, False), (rows, True)):
        given = cases.Case.random(make_head(target, size, 1.0, torch.float32), vocabulary, rows=count, steps=steps)
        leaves = (given.with_extras() if extra else given).leaves()
        supervision = given.supervision(rows, ops)
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves.trained())
        run = partial(distil, leaves.outputs, leaves.head(), supervision, ops, leaves.extras)
        measured.append(peak_bytes(run) - gradients)
    assert measured[0] > budget // 2, "what was measured was the pass"
    assert max(measured) < budget
    assert max(measured) < 1.05 * measured[0]


class Making(TorchDispatchMode):
    """Counts the tensors of a shape that operators make; views of those given are not made."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.shapes = {given[0].shape, given[0].T.shape}
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for out in found if isinstance(found, tuple | list) else (found,):
            if isinstance(out, Tensor) and out.shape in self.shapes:
                self.made += out.untyped_storage().data_ptr() not in self.given
        return found


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_has_no_gradient_and_no_room_for_one(cases: ModuleType, make_head: Heads, frozen: bool) -> None:
    target = make_head(97, 29)
    given = cases.Case.random(target, VocabularyMap.identity(97), rows=17, steps=3).with_extras()
    given = replace(given, frozen=frozen)
    leaves, ops = given.leaves(), FusedOps()
    supervision = given.supervision(4, ops)
    with Making(leaves.head_NH, target.head_VH) as making:
        loss, _ = distil(leaves.outputs, leaves.head(), supervision, ops, leaves.extras)
        loss.backward()
    assert (making.made == 0) == frozen
    assert (leaves.head_NH.grad is None) == frozen
