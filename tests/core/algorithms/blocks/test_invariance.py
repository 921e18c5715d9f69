"""However documents are put into rows and micro-batches, and whatever stands behind their ends: the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import PADDING, FeatureRows
from torchspec.core.interfaces.algorithm import Moment, StepMemory

LENGTHS = (23, 9, 14, 2)
DRAWS = (7, 8, 9, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"num_anchors": 5},
    "sliding": {"num_anchors": 5, "layer_types": ("full", "sliding"), "sliding_window": 6},
    "sliding, pruned": {
        "num_anchors": 5,
        "layer_types": ("full", "sliding"),
        "sliding_window": 6,
        "sliding_window_non_causal": True,
        "ids_N": torch.arange(0, 300, 2),
        "coverage": "weight",
        "objective": {"kl": 1.0, "ground_truth": 0.3},
    },
    "dpace": {"num_anchors": 4, "weighting": "dpace", "sample_from_anchor": True},
    "per sequence": {"normalisation": "per_sequence", "sliding_window": 3, "sliding_window_non_causal": True},
}


def mask_of(number: int) -> Tensor:
    return torch.rand(LENGTHS[number], generator=torch.Generator().manual_seed(number)) < 0.85


def rows(world: Any, numbers: Sequence[int], packs: Sequence[Sequence[int]] | None = None) -> FeatureRows:
    features = [world.features(world.tokens(LENGTHS[n], n), n) for n in numbers]
    return FeatureRows.of(features, [mask_of(n) for n in numbers], packs)


def moment(numbers: Sequence[int]) -> Moment:
    return Moment(draws=tuple(DRAWS[n] for n in numbers))


def compare(got: tuple[dict[str, Tensor], ...], want: tuple[dict[str, Tensor], ...]) -> None:
    for found, expected in zip(got, want, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


WAYS: dict[str, list[tuple[tuple[int, ...], list[list[int]] | None]]] = {
    "each alone": [((n,), None) for n in range(4)],
    "one row": [((0, 1, 2, 3), [[0, 1, 2, 3]])],
    "other order": [((3, 1, 0), [[0, 2], [1]]), ((2,), None)],
    "two and two": [((0, 1), None), ((2, 3), [[1, 0]])],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_micro_batches_and_packing_change_nothing(make_world: Callable[..., Any], options: dict[str, Any]) -> None:
    world = make_world(**options)
    want = world.gradients([rows(world, range(4))], [moment(range(4))])
    assert all(grad.any() for grad in want[1].values())
    for way in WAYS.values():
        parts = [rows(world, numbers, packs) for numbers, packs in way]
        compare(world.gradients(parts, [moment(numbers) for numbers, _ in way]), want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_what_stands_behind_a_rows_end_changes_nothing(make_world: Callable[..., Any], options: dict[str, Any]) -> None:
    world = make_world(**options)
    given = rows(world, range(4))
    padding_BT = given.tokens.document_BT == PADDING
    ids_BT = given.tokens.input_ids_BT.masked_fill(padding_BT, 77)
    rubbish = replace(
        given,
        tokens=replace(given.tokens, input_ids_BT=ids_BT, loss_mask_BT=given.tokens.loss_mask_BT | padding_BT),
        taps_BSF=given.taps_BSF.masked_fill(padding_BT[..., None], 1e3),
        last_BXH=given.last_BXH.masked_fill(padding_BT[..., None], float("nan")),
    )
    compare(world.gradients([rubbish], [moment(range(4))]), world.gradients([given], [moment(range(4))]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_recomputing_and_small_chunks_change_nothing(make_world: Callable[..., Any], options: dict[str, Any]) -> None:
    world = make_world(**options)
    given = [rows(world, range(4))]
    want = world.gradients(given, [moment(range(4))])
    for memory in (
        StepMemory(recompute=True),
        StepMemory(recompute=True, loss_bytes=1),
        StepMemory(loss_bytes=1 << 30),
    ):
        compare(world.gradients(given, [moment(range(4))], memory), want)


def test_a_documents_blocks_see_nothing_of_its_future_or_of_other_documents(make_world: Callable[..., Any]) -> None:
    """A block's outputs hang on the taps before its anchor alone; its pairs' teachers on the rows behind it."""
    world = make_world(layer_types=("full", "sliding"), sliding_window=4)
    given = rows(world, (0, 1), [[0, 1]])
    taps_BSF = given.taps_BSF.clone().requires_grad_()
    batch = world.batch(replace(given, taps_BSF=taps_BSF), moment((0, 1)))
    states_BAKH = world.draft.states(batch.inputs, world.head.embedding_VH, world.device)
    for block in range(batch.blocks.count):
        anchor, first = int(batch.blocks.anchor_BA[0, block]), int(batch.blocks.first_BA[0, block])
        (grad_BSF,) = torch.autograd.grad(states_BAKH[0, block].square().sum(), taps_BSF, retain_graph=True)
        assert grad_BSF[0].any(-1).nonzero()[:, 0].tolist() == list(range(first, anchor))


def test_no_graph_is_made_where_none_is_wanted(make_world: Callable[..., Any]) -> None:
    world = make_world(weighting="dpace")
    with torch.no_grad():
        result = world.step(rows(world, (0, 1)), moment((0, 1)), StepMemory(recompute=True))
    assert not result.numerator.requires_grad
    assert float(result.numerator) > 0
