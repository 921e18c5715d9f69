"""The direction that tells tokens from the mask, from what it is to do."""

from __future__ import annotations

import pytest
import torch

from torchspec.core.algorithms.blocks.known_tokens import slow_direction, token_direction


def test_it_finds_tokens_and_not_the_mask() -> None:
    """Tokens that share a direction much smaller than what they differ in."""
    generator = torch.Generator().manual_seed(0)
    uneven_H = torch.logspace(-1, 1, 32)
    tokens_MH = torch.randn(400, 32, generator=generator) * uneven_H + 0.4
    mask_H = torch.randn(32, generator=generator) * uneven_H + 0.4
    told_H = token_direction(tokens_MH, mask_H)
    assert told_H is not None
    assert abs(float(told_H @ mask_H)) < 1e-5
    along_M = tokens_MH @ told_H
    assert float(along_M.mean()) == pytest.approx(1, abs=1e-5)
    # With the plain mean's direction a quarter of them would be taken for none.
    assert float((along_M > 0).float().mean()) > 0.95
    assert float((tokens_MH @ tokens_MH.mean(0) > 0).float().mean()) < 0.8


def test_tokens_without_a_common_direction_have_none() -> None:
    generator = torch.Generator().manual_seed(0)
    assert token_direction(torch.randn(400, 32, generator=generator), torch.ones(32)) is None


@pytest.mark.parametrize("width", [4, 16, 80])
def test_halves_of_a_head_turn_together(width: int) -> None:
    drawn_D = slow_direction(width)
    held = drawn_D.view(2, width // 2) != 0
    assert held.tolist() == [[False] * (width // 4) + [True] * (width // 4)] * 2
    assert float(drawn_D.square().mean()) == pytest.approx(1)
