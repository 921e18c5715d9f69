"""Which anchors are trained at which depth, against the definition of docs/concepts.md, written out with sets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.peagle.sampling import DepthSampling, sample_document, sample_rows
from torchspec.core.features.rows import TokenRows

SAMPLING = DepthSampling(depths=6, ratio=0.7, least=0.2)


def rows_of(documents: list[list[int]], packs: list[list[int]] | None = None) -> TokenRows:
    """Documents by their masks."""
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in documents]
    return TokenRows.of([torch.arange(len(mask)) for mask in masks], masks, packs)


def masks(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (60, 3, 25, 1, 40)
    dense = [(torch.rand(length, generator=generator) < 0.85).long().tolist() for length in lengths]
    return [*dense, [0] * 30 + [1] * 30, [1] * 20, [0] * 12]


def valid_slots(mask: list[int]) -> set[int]:
    return {slot for slot in range(len(mask)) if slot + 2 < len(mask) and mask[slot + 2]}


def elements(deepest_L: Tensor, depth: int) -> set[int]:
    """Anchors of a depth."""
    return {anchor for anchor, most in enumerate(deepest_L.tolist()) if most >= depth}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ratio", "least"), [(0.7, 0.2), (0.5, 0.4), (0.9, 0.0), (1.0, 0.2)])
def test_counts_pools_and_nesting_are_the_definitions(seed: int, ratio: float, least: float) -> None:
    sampling = DepthSampling(depths=6, ratio=ratio, least=least)
    documents = masks(seed)
    deepest_BT, whole_BT = sample_rows(rows_of(documents), sampling, [100 * seed + n for n in range(len(documents))])
    cut = 0
    for mask, deepest_T, whole_T in zip(documents, deepest_BT, whole_BT, strict=True):
        valid = valid_slots(mask)
        places = set(range(len(mask)))
        assert not deepest_T[len(mask) :].any()
        everything = True
        for depth in range(1, sampling.depths):
            pool = {place + 1 for place in places} & valid
            anchors = elements(deepest_T, depth)
            places = {anchor + depth for anchor in anchors}
            assert places <= pool
            share = max(ratio**depth, least)
            wanted = len(pool) if share == 1 else min(max(0, int((len(valid) - depth) * share)), len(pool))
            assert len(places) == wanted
            everything &= wanted == len(pool)
            cut += len(pool) - wanted
            # Anchors never leave the document, and what they predict is supervised.
            assert all(anchor >= 0 and mask[anchor + depth + 2] for anchor in anchors)
        assert whole_T[: len(mask)].tolist() == [everything] * len(mask)
        assert not whole_T[len(mask) :].any()
    assert (cut == 0) == (ratio == 1)


def test_what_is_drawn_depends_on_the_documents_number_alone() -> None:
    documents = masks(1)
    draws = [7 * n + 1 for n in range(len(documents))]
    alone = [sample_rows(rows_of([mask]), SAMPLING, [draw])[0][0] for mask, draw in zip(documents, draws, strict=True)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    packed, _ = sample_rows(rows_of(documents, [[0, 2, 1], [4, 3], [6, 5], [7]]), SAMPLING, draws)
    assert torch.equal(torch.get_rng_state(), state)
    for row, pack in zip(packed, [[0, 2, 1], [4, 3], [6, 5], [7]], strict=True):
        expected = torch.cat([alone[number] for number in pack])
        assert torch.equal(row[: len(expected)], expected)
    again, _ = sample_rows(rows_of(documents), SAMPLING, draws)
    others, _ = sample_rows(rows_of(documents), SAMPLING, [draw + 1 for draw in draws])
    assert torch.equal(again[0][: len(alone[0])], alone[0])
    assert not torch.equal(again, others)


def test_documents_beyond_the_draws_take_the_number_zero() -> None:
    documents = masks(2)
    none, _ = sample_rows(rows_of(documents), SAMPLING, ())
    zero, _ = sample_rows(rows_of(documents), SAMPLING, [0] * len(documents))
    assert torch.equal(none, zero)


def test_every_subset_is_equally_likely() -> None:
    valid_L = torch.tensor([True] * 5 + [False] * 2)
    sampling = DepthSampling(depths=2, ratio=0.5, least=0.0)
    draws = 3000
    counts = Counter(
        tuple(sample_document(valid_L, sampling, draw)[0].nonzero()[:, 0].tolist()) for draw in range(draws)
    )
    # int((5 - 1) * 0.5) of the four slots 1..4.
    subsets = list(itertools.combinations(range(4), 2))
    assert set(counts) == set(subsets)
    expected = draws / len(subsets)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())
