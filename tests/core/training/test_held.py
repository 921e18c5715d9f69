"""Which held samples make a window, on which rank, and in which forward passes."""

from __future__ import annotations

import random

import pytest
import torch

from torchspec.core.config.schema import TrainConfig
from torchspec.core.training.held import window_shares, window_turns
from torchspec.core.training.plan import Cut


def in_turns(lengths: list[list[int]]) -> list[tuple[int, int]]:
    """(rank, length) of every sample, the ranks taking turns as long as they have any."""
    left = [list(held) for held in lengths]
    order = []
    while any(left):
        for rank, held in enumerate(left):
            if held:
                order.append((rank, held.pop(0)))
    return order


@pytest.mark.parametrize("seed", range(40))
def test_windows_take_the_ranks_samples_in_turns_until_they_are_full(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 9) for _ in range(draw.randint(0, 6))] for _ in range(draw.randint(1, 4))]
    order = in_turns(lengths)
    for wanted in range(1, 12):
        full = order[:wanted]
        shares = [sum(rank == owner for owner, _ in full) for rank in range(len(lengths))]
        enough = len(full) == wanted
        assert window_shares(lengths, samples=wanted, tokens=None, partial=False) == (shares if enough else None)
        assert window_shares(lengths, samples=wanted, tokens=None, partial=True) == (shares if full else None)
    for tokens in range(1, 60, 7):
        sums = [sum(length for _, length in order[:count]) for count in range(len(order) + 1)]
        count = next((count for count, total in enumerate(sums) if total >= tokens), None)
        shares = [sum(rank == owner for owner, _ in order[:count]) for rank in range(len(lengths))]
        found = window_shares(lengths, samples=None, tokens=tokens, partial=False)
        assert found == (None if count is None else shares)
        assert window_shares(lengths, samples=None, tokens=tokens, partial=True) == (shares if order else None)


@pytest.mark.parametrize("row_tokens", [None, 9])
@pytest.mark.parametrize("seed", range(20))
def test_all_ranks_run_as_many_passes_and_each_sample_once(seed: int, row_tokens: int | None) -> None:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 9) for _ in range(draw.randint(0, 7))] for _ in range(3)]
    cut = Cut.of(TrainConfig(micro_batch_size=2, tokens_per_rank=row_tokens), parameters=10, hidden=1)
    turns = [window_turns(lengths, rank, cut, step=4) for rank in range(3)]
    assert len({len(each) for each in turns}) == 1
    for rank, mine in enumerate(turns):
        parts = [turn.micro_batches[rank] for turn in mine]
        assert sorted(index for part in parts for index in part.samples) == list(range(len(lengths[rank])))
        for turn, part in zip(mine, parts, strict=True):
            held = [lengths[rank][index] for index in part.samples]
            assert turn.step == 4
            assert len(held) <= 2 if row_tokens is None else sum(held) <= 9
    assert any(turn.micro_batches[rank].samples for rank, mine in enumerate(turns) for turn in mine) == any(lengths)


def test_a_draft_that_is_not_sharded_adds_up_gradients_in_its_own_precision() -> None:
    """Each pass in bfloat16 from a parameter in float32, as the definition of mixed precision has it."""
    from torchspec.core.training.sharding import cast_alone

    draft = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False))
    draft[1].weight = draft[0].weight  # shared
    weight = draft[0].weight
    expected = torch.zeros(6, 6)
    for seed in (1, 2):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        copy = weight.detach().bfloat16().requires_grad_()
        ((x @ copy.T) @ copy.T).sum().backward()
        assert copy.grad is not None
        expected += copy.grad.float()
        with cast_alone(draft, torch.bfloat16):
            draft(x).sum().backward()
            assert draft[0].weight.dtype == torch.bfloat16
    assert draft[0].weight is draft[1].weight is weight
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, expected)
