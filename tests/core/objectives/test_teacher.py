"""The target's distributions, read tile by tile, against sums over all V tokens in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.objectives import chunks
from torchspec.core.objectives.chunks import Chunk, plan_chunks
from torchspec.core.objectives.teacher import OUTSIDE, Coverage, Teacher

Heads = Callable[..., SafetensorsTargetHead]
V, H, ROWS = 60, 8, 11
WHOLE = VocabularyMap.identity(V)
PRUNED = VocabularyMap(ids_N=torch.arange(0, V, 3), target_size=V)
# With tiles of 7: none of these lie in the first, a few in two of them.
CLUSTERED = VocabularyMap(ids_N=torch.tensor([10, 12, 15, 45, 46, 47, 59]), target_size=V)


def rows(start: int, stop: int) -> Chunk:
    return Chunk(start=start, stop=stop, pairs=(), runs=())


def states() -> Tensor:
    return torch.randn(ROWS, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def row_by_hand(logits: list[float], ids: list[int]) -> tuple[list[float], float, float, int]:
    """(probabilities over ids, their entropy, the mass there, draft index of the first choice)."""
    total = sum(math.exp(x) for x in logits)
    inside = sum(math.exp(logits[v]) for v in ids)
    probs = [math.exp(logits[v]) / inside for v in ids]
    first = max(range(len(logits)), key=lambda v: (logits[v], -v))
    best = ids.index(first) if first in ids else OUTSIDE
    return probs, -sum(p * math.log(p) for p in probs), inside / total, best


@pytest.mark.parametrize("largest_tile", [7, 20, 8192])
@pytest.mark.parametrize("vocabulary", [WHOLE, PRUNED, CLUSTERED], ids=["whole", "pruned", "clustered"])
@pytest.mark.parametrize("surveyed", [False, True])
def test_a_chunk_is_the_definition(
    make_head: Heads, monkeypatch: pytest.MonkeyPatch, largest_tile: int, vocabulary: VocabularyMap, surveyed: bool
) -> None:
    monkeypatch.setattr(chunks, "LARGEST_TILE", largest_tile)
    head = replace(make_head(V, H), logit_factor=1.5, softcap=4.0)
    normed_RH = states()
    teacher = Teacher(head, normed_RH, vocabulary, FusedOps(), with_logs=True)
    if surveyed:
        teacher.survey(plan_chunks(torch.arange(ROWS), [ROWS], ROWS, 4))
    got = teacher.chunk(rows(2, 9))
    for place, row in enumerate(range(2, 9)):
        products = [float((head.head_VH[v] * normed_RH[row]).sum()) for v in range(V)]
        logits = [4.0 * math.tanh(1.5 * x / 4.0) for x in products]
        probs, entropy, inside, best = row_by_hand(logits, vocabulary.ids_N.tolist())
        assert got.tile.probs_RN[place].tolist() == pytest.approx(probs, rel=1e-12)
        assert got.tile.log_probs_RN is not None
        assert got.tile.log_probs_RN[place].exp().tolist() == pytest.approx(probs, rel=1e-12)
        assert got.entropy_C[place].item() == pytest.approx(entropy, rel=1e-12)
        assert got.best_C[place].item() == best
        if vocabulary is WHOLE:
            assert got.tile.inside_R is None
        else:
            assert got.tile.inside_R is not None
            assert got.tile.inside_R[place].item() == pytest.approx(inside, rel=1e-12)


@pytest.mark.parametrize("coverage", ["drop", "renormalise", "weight"])
@pytest.mark.parametrize("vocabulary", [WHOLE, PRUNED], ids=["whole", "pruned"])
def test_coverage_and_its_survey(make_head: Heads, coverage: Coverage, vocabulary: VocabularyMap) -> None:
    head, normed_RH = make_head(V, H), states()
    teacher = Teacher(head, normed_RH, vocabulary, FusedOps(), coverage=coverage)
    want = []
    for logits in (normed_RH @ head.head_VH.T).tolist():
        _, _, inside, best = row_by_hand(logits, vocabulary.ids_N.tolist())
        want.append({"drop": float(best != OUTSIDE), "renormalise": 1.0, "weight": inside}[coverage])
    assert vocabulary is WHOLE or coverage == "renormalise" or 0 < sum(want) < ROWS
    assert teacher.chunk(rows(0, ROWS)).coverage_C.tolist() == pytest.approx(want, rel=1e-12)
    surveyed = teacher.survey(plan_chunks(torch.arange(ROWS), [ROWS], ROWS, 4))
    assert surveyed.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("coverage", ["drop", "renormalise", "weight"])
def test_a_survey_of_nothing(make_head: Heads, coverage: Coverage) -> None:
    """A micro-batch of holes."""
    teacher = Teacher(make_head(V, H), states()[:0], PRUNED, FusedOps(), coverage=coverage)
    surveyed = teacher.survey(())
    assert surveyed.shape == (0,)
    assert surveyed.dtype == torch.float64


def stepped_head(heights: dict[int, float]) -> SafetensorsTargetHead:
    """Token v has logit heights[v] (else 0) at a state of ones; small integers, so that sums are exact."""
    rows_VH = torch.zeros(V, H, dtype=torch.float64)
    for token, height in heights.items():
        rows_VH[token] = height / H
    return SafetensorsTargetHead(embedding_VH=rows_VH, head_VH=rows_VH, final_norm=torch.nn.Identity())


@pytest.mark.parametrize(
    ("heights", "best"),
    [
        ({59: 8.0, 12: 4.0}, 59),  # the last tile
        ({12: 8.0, 47: 8.0}, 12),  # two tiles: the first wins
        ({15: 8.0, 16: 8.0, 47: 8.0}, 15),  # and within a tile
        ({13: 8.0, 45: 8.0}, None),  # the first cannot be said
        ({13: 4.0, 45: 8.0}, 45),
    ],
)
@pytest.mark.parametrize("surveyed", [False, True])
def test_the_first_choice_over_tiles(
    monkeypatch: pytest.MonkeyPatch, heights: dict[int, float], best: int | None, surveyed: bool
) -> None:
    monkeypatch.setattr(chunks, "LARGEST_TILE", 7)
    teacher = Teacher(stepped_head(heights), torch.ones(1, H, dtype=torch.float64), CLUSTERED, FusedOps())
    if surveyed:
        teacher.survey(plan_chunks(torch.arange(1), [1], 1, 1))
    got = teacher.chunk(rows(0, 1))
    ids = CLUSTERED.ids_N.tolist()
    assert got.best_C.tolist() == [OUTSIDE if best is None else ids.index(best)]
    assert got.coverage_C.tolist() == [float(best is not None)]


def test_tokens_without_probability_add_nothing_to_the_entropy() -> None:
    """A logit of -1e5 against 0: exp underflows to 0, and 0 log 0 is 0."""
    teacher = Teacher(
        stepped_head(dict.fromkeys(range(30, V), -1e5)), torch.ones(1, H, dtype=torch.float64), WHOLE, FusedOps()
    )
    assert teacher.chunk(rows(0, 1)).entropy_C.item() == pytest.approx(math.log(30), rel=1e-12)


def test_after_a_survey_only_the_rows_of_the_draft_are_multiplied(make_head: Heads) -> None:
    columns: list[int] = []

    class Counting(FusedOps):
        def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
            columns.append(b.shape[1])
            return super().wide_mm(a, b, out)

    teacher = Teacher(make_head(V, H), states(), PRUNED, Counting())
    teacher.survey(plan_chunks(torch.arange(ROWS), [ROWS], ROWS, 4))
    columns.clear()
    teacher.chunk(rows(0, 4))
    assert columns == [PRUNED.size]
