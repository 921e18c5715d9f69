"""D-PACE's weights against the definition, slot by slot in float64 (2605.18810)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchspec.core.objectives.dpace import dpace_weights


def by_loops(cross_entropy_AK: Tensor, supervised_AK: Tensor, smoothing: float) -> Tensor:
    blocks, slots = cross_entropy_AK.shape
    weight_AK = torch.zeros(blocks, slots, dtype=torch.float64)
    for block in range(blocks):
        for slot in range(slots):
            if not supervised_AK[block, slot]:
                continue
            for later in range(slot, slots):
                if not supervised_AK[block, later]:
                    continue
                reached = 1.0
                for earlier in range(later + 1):
                    if supervised_AK[block, earlier]:
                        right = math.exp(-float(cross_entropy_AK[block, earlier]))
                        reached *= (1 - smoothing) * right + smoothing
                weight_AK[block, slot] += reached
    return weight_AK


def drawn(blocks: int, slots: int, share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(blocks + slots)
    cross_AK = -torch.rand(blocks, slots, generator=generator, dtype=torch.float64).log() * 3
    return cross_AK, torch.rand(blocks, slots, generator=generator) < share


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(("blocks", "slots"), [(7, 15), (3, 1), (0, 5)])
def test_weights_are_the_definitions(blocks: int, slots: int, share: float, smoothing: float) -> None:
    cross_AK, supervised_AK = drawn(blocks, slots, share)
    got = dpace_weights(cross_AK, supervised_AK, smoothing)
    torch.testing.assert_close(got, by_loops(cross_AK, supervised_AK, smoothing), rtol=1e-13, atol=0)


def test_half_is_the_smoothing_unless_told() -> None:
    cross_AK, supervised_AK = drawn(4, 7, 0.8)
    assert torch.equal(dpace_weights(cross_AK, supervised_AK), dpace_weights(cross_AK, supervised_AK, 0.5))


def test_a_sure_draft_weighs_by_places_alone() -> None:
    weight_AK = dpace_weights(torch.zeros(1, 5), torch.tensor([[True, True, False, True, True]]))
    assert weight_AK.tolist() == [[4.0, 3.0, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize("unsupervised", [math.nan, math.inf, -5.0])
def test_what_stands_at_an_unsupervised_slot_is_not_looked_at(unsupervised: float) -> None:
    cross_AK, supervised_AK = drawn(6, 9, 0.6)
    want = dpace_weights(cross_AK, supervised_AK)
    assert torch.equal(dpace_weights(cross_AK.masked_fill(~supervised_AK, unsupervised), supervised_AK), want)


def test_a_token_the_draft_excludes_is_no_trouble() -> None:
    cross_AK = torch.tensor([[0.1, math.inf, 0.2]])
    got = dpace_weights(cross_AK, torch.ones(1, 3, dtype=torch.bool), 0.25)
    want = by_loops(cross_AK, torch.ones(1, 3, dtype=torch.bool), 0.25)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_weights_are_constants_in_fp32_at_least_and_the_loss_is_left_alone() -> None:
    cross_AK, supervised_AK = drawn(6, 15, 0.9)
    given = cross_AK.to(torch.bfloat16).requires_grad_()
    got = dpace_weights(given, supervised_AK)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), by_loops(given.detach(), supervised_AK, 0.5), rtol=1e-6, atol=0)
    before = cross_AK.clone()
    dpace_weights(cross_AK, supervised_AK)
    assert torch.equal(cross_AK, before)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_a_smoothing_outside_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        dpace_weights(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), smoothing)
