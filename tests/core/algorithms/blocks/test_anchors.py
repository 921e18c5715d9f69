"""Where blocks stand: eligible positions by definition, subsets drawn evenly, from the document's number alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.anchors import draw_anchors, eligible_anchors
from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import Moment

LENGTHS = (19, 7, 12, 2, 1)


def mask_of(length: int, seed: int) -> Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.7


def token_rows(numbers: Sequence[int], packs: Sequence[Sequence[int]]) -> TokenRows:
    """Of the documents with these numbers, whose mask depends on their number."""
    ids = [torch.arange(LENGTHS[n]) for n in numbers]
    return TokenRows.of(ids, [mask_of(LENGTHS[n], n) for n in numbers], packs)


def by_document(chosen_BT: Tensor, tokens: TokenRows, numbers: Sequence[int]) -> dict[int, list[int]]:
    """Positions within each document."""
    return {
        number: [
            int(t - tokens.starts_BT[b, t]) for b, t in chosen_BT.nonzero() if int(tokens.document_BT[b, t]) == place
        ]
        for place, number in enumerate(numbers)
    }


def test_a_position_and_the_next_are_supervised_and_of_one_document() -> None:
    tokens = token_rows(range(5), [[0, 1], [2, 3, 4]])
    mask, document = tokens.loss_mask_BT.tolist(), tokens.document_BT.tolist()
    want = [
        [t + 1 < tokens.length and m[t] and m[t + 1] and d[t] == d[t + 1] and d[t] >= 0 for t in range(tokens.length)]
        for m, d in zip(mask, document, strict=True)
    ]
    assert eligible_anchors(tokens).tolist() == want
    chosen_BT, whole_BT = draw_anchors(tokens, (), most=100)
    assert chosen_BT.tolist() == want
    assert whole_BT.tolist() == [[d >= 0 for d in row] for row in document]


def test_every_subset_is_equally_likely() -> None:
    """Chi-square over the subsets of 2 of 5, whose 0.1 % quantile is 27.9 at 9 degrees of freedom."""
    tokens = TokenRows.of([torch.arange(6)], [torch.ones(6, dtype=torch.bool)])
    times = 2000
    seen: Counter[tuple[int, ...]] = Counter()
    for draw in range(times):
        chosen_BT, whole_BT = draw_anchors(tokens, (draw,), most=2)
        seen[tuple(chosen_BT[0].nonzero()[:, 0].tolist())] += 1
        assert not whole_BT.any()
    subsets = list(combinations(range(5), 2))
    assert set(seen) == set(subsets)
    expected = times / len(subsets)
    assert sum((seen[subset] - expected) ** 2 / expected for subset in subsets) < 27.9


@pytest.mark.parametrize(
    ("numbers", "packs"),
    [
        ((0, 1, 2, 3, 4), [[0], [1], [2], [3], [4]]),
        ((0, 1, 2, 3, 4), [[0, 1, 2, 3, 4]]),
        ((4, 2, 0), [[1], [0, 2]]),
        ((1, 0), [[0, 1]]),
        ((2,), [[0]]),
    ],
)
def test_what_is_drawn_of_a_document_depends_on_its_number_alone(
    numbers: Sequence[int], packs: Sequence[Sequence[int]]
) -> None:
    draws = [10 + n for n in range(5)]
    alone = {}
    for number in range(5):
        tokens = token_rows([number], [[0]])
        chosen_BT, _ = draw_anchors(tokens, (draws[number],), most=3)
        alone |= by_document(chosen_BT, tokens, [number])
        eligible = by_document(eligible_anchors(tokens), tokens, [number])[number]
        assert len(alone[number]) == min(3, len(eligible))
        assert set(alone[number]) <= set(eligible)
    tokens = token_rows(numbers, packs)
    chosen_BT, whole_BT = draw_anchors(tokens, tuple(draws[n] for n in numbers), most=3)
    assert by_document(chosen_BT, tokens, numbers) == {number: alone[number] for number in numbers}
    wholes = by_document(whole_BT, tokens, numbers)
    for number in numbers:
        every = by_document(eligible_anchors(token_rows([number], [[0]])), token_rows([number], [[0]]), [number])
        assert wholes[number] == (list(range(LENGTHS[number])) if len(every[number]) <= 3 else [])


def test_other_numbers_draw_other_anchors() -> None:
    tokens = token_rows([0], [[0]])
    assert len({tuple(draw_anchors(tokens, (n,), most=4)[0][0].tolist()) for n in range(10)}) > 5


def ones(*lengths: int) -> list[Tensor]:
    return [torch.ones(length, dtype=torch.bool) for length in lengths]


def test_blocks_stand_in_order_and_the_rest_only_fill_the_rows(make_world: Callable[..., Any]) -> None:
    world = make_world(num_anchors=4)
    features = [world.features(world.tokens(n, n), n) for n in (12, 3)]
    batch = world.batch(FeatureRows.of(features, ones(12, 3)), Moment(draws=(1, 2)))
    blocks = batch.blocks
    assert blocks.real_BA.tolist() == [[True] * 4, [True, True, False, False]]
    anchors = blocks.anchor_BA[0].tolist()
    assert anchors == sorted(set(anchors))
    assert blocks.anchor_BA[1].tolist() == [0, 1, 0, 0]
    limits = [mask.key_start_BQ == mask.key_end_BQ for mask in batch.inputs.masks.values()]
    for empty_BQ in limits:
        assert empty_BQ[1, 8:].all()
    assert not set(batch.pairs.slot_M.tolist()) & {6, 7}


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        ({}, [[0] * 9, [0] * 4]),
        ({}, [[0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1]]),
        ({"weighting": "dpace", "normalisation": "per_sequence"}, [[0] * 9, [1, 0, 0, 0]]),
        ({"sliding_window": 3, "sample_from_anchor": True}, [[0] * 9]),
    ],
    ids=["nothing", "single tokens", "dpace", "sliding"],
)
def test_without_an_anchor_every_parameter_has_a_gradient_of_zero(
    make_world: Callable[..., Any], options: dict[str, Any], masks: list[list[int]]
) -> None:
    world = make_world(**options)
    features = [world.features(world.tokens(len(mask), n), n) for n, mask in enumerate(masks)]
    rows = FeatureRows.of(features, [torch.tensor(mask, dtype=torch.bool) for mask in masks])
    sums, grads = world.gradients([rows], [Moment(draws=(1, 2))])
    assert all(not grad.any() for grad in grads.values())
    assert float(sums["loss_denominator"]) == float(sums["loss_numerator"]) == 0
    assert int(sums["supervised"].sum()) == int(sums["walk_rounds"]) == int(sums["whole_slots"]) == 0
    assert int(sums["tokens"]) == sum(map(len, masks))
    figures = world.algorithm.summarise(sums)
    assert figures["loss"] == 0


@pytest.mark.parametrize("from_anchor", [False, True])
def test_the_halo_reaches_the_last_teacher(make_world: Callable[..., Any], from_anchor: bool) -> None:
    """Of a block whose every step is supervised, the last row that teaches is `halo` behind the anchor."""
    world = make_world(sample_from_anchor=from_anchor, block_size=5, num_anchors=1)
    feature = world.features(world.tokens(30))
    batch = world.batch(FeatureRows.of([feature], ones(30)), Moment(draws=(3,)))
    assert len(batch.pairs.sizes) == (5 if from_anchor else 4)
    (anchor,) = batch.blocks.anchor_BA[0].tolist()
    assert batch.pairs.place_R.tolist() == list(range(anchor, anchor + world.algorithm.halo + 1))
