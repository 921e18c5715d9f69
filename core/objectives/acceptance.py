"""How many drafted tokens would survive: per-slot prefix lengths, and the walk decoding takes (docs/concepts.md).

Shape letters: B rows, S slots (positions of the longest row), K unroll steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prefix_lengths(agree_BSK: Tensor) -> Tensor:
    """A [B, S]: the number of leading steps on which draft and target agree at each slot."""
    return agree_BSK.long().cumprod(-1).sum(-1)


def whole_slots(loss_mask_BS: Tensor, document_BS: Tensor, steps: int) -> Tensor:
    """Slots [B, S] that can stand for a whole drafting round inside one supervised span.

    Token i+1 is the round's first and i+2..i+1+K are drafted, so all of i+1..i+1+K must be supervised and of slot
    i's document.
    """
    whole_BS = torch.ones_like(loss_mask_BS)
    for ahead in range(1, steps + 2):
        fits_BS = torch.zeros_like(whole_BS)
        if ahead < whole_BS.shape[1]:
            fits_BS[:, :-ahead] = loss_mask_BS[:, ahead:] & (document_BS[:, ahead:] == document_BS[:, :-ahead])
        whole_BS &= fits_BS
    return whole_BS


def first_rounds(loss_mask_BS: Tensor, document_BS: Tensor) -> Tensor:
    """Slots [B, S] at which decoding of a supervised span [s, e] starts: s - 1, or s where the document starts at s."""
    new_BS = torch.ones_like(loss_mask_BS)
    new_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    before_BS = torch.zeros_like(loss_mask_BS)
    before_BS[:, :-1] = loss_mask_BS[:, 1:] & ~loss_mask_BS[:, :-1] & ~new_BS[:, 1:]
    return before_BS | (loss_mask_BS & new_BS)


def walked_slots(accepted_BS: Tensor, start_BS: Tensor, whole_BS: Tensor) -> Tensor:
    """The slots [B, S] where decoding drafts: from every start, i <- i + 1 + A_i while the slot is whole.

    Pointers only go right, so doubling them reaches every slot of every walk in log2(S) rounds, without looking at a
    value on the host.
    """
    slots = accepted_BS.shape[1]
    end = torch.full_like(accepted_BS[:, :1], slots)
    here_BS = torch.arange(slots, device=accepted_BS.device)
    jump_BP = torch.cat((torch.where(whole_BS, here_BS + 1 + accepted_BS, end).clamp_max(slots), end), dim=1)
    seen_BP = torch.cat((start_BS, torch.zeros_like(start_BS[:, :1])), dim=1).long()
    for _ in range(max(1, slots.bit_length())):
        reached_BP = torch.zeros_like(seen_BP).scatter_add_(1, jump_BP, seen_BP)
        seen_BP = (seen_BP + reached_BP).clamp_max(1)
        jump_BP = jump_BP.gather(1, jump_BP)
    return seen_BP[:, :-1].bool() & whole_BS


def acceptance_sums(accepted_BS: Tensor, steps: int, loss_mask_BS: Tensor, document_BS: Tensor) -> dict[str, Tensor]:
    """Additive int64 counts; `accepted_BS` are `prefix_lengths`, in which an unsupervised pair does not agree.

    walk_rounds, walk_hits [K]    rounds on the walk, and how many of them accepted at least k + 1 tokens
    whole_slots, whole_hits [K]   the same over all slots that can stand for a round
    """
    whole_BS = whole_slots(loss_mask_BS, document_BS, steps)
    start_BS = first_rounds(loss_mask_BS, document_BS)
    walked_BS = walked_slots(accepted_BS, start_BS, whole_BS)
    return {
        "walk_rounds": walked_BS.sum(),
        "walk_hits": hits(accepted_BS, walked_BS, steps),
        "whole_slots": whole_BS.sum(),
        "whole_hits": hits(accepted_BS, whole_BS, steps),
    }


def hits(accepted_BS: Tensor, chosen_BS: Tensor, steps: int) -> Tensor:
    """How many of the chosen slots accepted at least k + 1 tokens, [K]."""
    return torch.stack([((accepted_BS > step) & chosen_BS).sum() for step in range(steps)])


def summarise_acceptance(sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """From added `acceptance_sums`. Lengths count the bonus token; NaN where no round fitted a supervised span.

    simulated_acceptance_length          mean of 1 + A over the walk
    simulated_acceptance_per_position    share of rounds that accepted at least k + 1 tokens; they sum to length - 1
    joint_prefix_length                  mean of 1 + A over all whole slots; biased upward, since decoding lingers
                                         where drafting is hard
    """
    rounds, slots = int(sums["walk_rounds"]), int(sums["whole_slots"])
    per_position = [int(count) / max(1, rounds) for count in sums["walk_hits"]]
    return {
        "simulated_acceptance_length": 1 + sum(per_position) if rounds else math.nan,
        "simulated_acceptance_per_position": per_position,
        "joint_prefix_length": 1 + int(sums["whole_hits"].sum()) / slots if slots else math.nan,
    }
