"""Choosing tokens, and verifying drafted ones so that the output is the target's own.

Sources: speculative sampling (2211.17192, 2302.01318). Greedy verification is the limit of temperature 0.

Shape letters: B sequences, L drafted tokens, n = L + 1 verified rows, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.interfaces.algorithm import Proposal


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """accepted_B int64: leading drafted tokens kept; next_B int64: the target's token after them."""

    accepted_B: Tensor
    next_B: Tensor


def target_probs(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) over the last axis, at least in float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide / temperature, dim=-1)


def choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """The target's next token for each row [B]: the argmax at temperature 0, else a sample."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(target_probs(logits_BV, temperature), 1, generator=generator)[:, 0]


def acceptance_probability(p_BLV: Tensor, tokens_BL: Tensor, q_BLV: Tensor | None) -> Tensor:
    """min(1, p(v) / q(v)) for every drafted token v [B, L]; q None is one-hot, which leaves p(v)."""
    p_BL = p_BLV.gather(2, tokens_BL[..., None])[..., 0]
    if q_BLV is None:
        return p_BL
    q_BL = q_BLV.gather(2, tokens_BL[..., None])[..., 0].to(p_BL.dtype)
    # A drafted token has q > 0; a drafter that says 0 all the same is held to p > 0.
    return (p_BL / q_BL.clamp_min(torch.finfo(p_BL.dtype).tiny)).clamp_max(1.0)


def residual(p_BV: Tensor, token_B: Tensor, q_BV: Tensor | None) -> Tensor:
    """max(0, p - q) normalised [B, V]: what a rejected token is replaced from; q None is one-hot at `token_B`.

    Where rounding leaves nothing of it (p equal to q) the row is p.
    """
    rest_BV = p_BV.scatter(1, token_B[:, None], 0.0) if q_BV is None else (p_BV - q_BV.to(p_BV.dtype)).clamp_min(0.0)
    mass_B1 = rest_BV.sum(-1, keepdim=True)
    return torch.where(mass_B1 > 0, rest_BV / mass_B1.clamp_min(torch.finfo(p_BV.dtype).tiny), p_BV)


def leading(kept_BL: Tensor, lengths_B: Tensor | None) -> Tensor:
    """How many leading entries of each row are True [B], none counted at or beyond its length."""
    if lengths_B is not None:
        position_L = torch.arange(kept_BL.shape[1], device=kept_BL.device)
        kept_BL = kept_BL & (position_L < lengths_B[:, None])
    return kept_BL.long().cumprod(dim=1).sum(dim=1)


def verify_greedy(logits_BnV: Tensor, proposal: Proposal) -> Verdict:
    """Keep the longest prefix that the target's argmax agrees with, then the target's own token."""
    best_Bn = logits_BnV.argmax(dim=-1)
    accepted_B = leading(best_Bn[:, :-1] == proposal.tokens_BL, proposal.lengths_B)
    return Verdict(accepted_B=accepted_B, next_B=best_Bn.gather(1, accepted_B[:, None])[:, 0])


def verify_sampled(
    logits_BnV: Tensor, proposal: Proposal, temperature: float, generator: torch.Generator | None = None
) -> Verdict:
    """Exact rejection sampling: whatever q is, the kept and added tokens are distributed as the target's.

    Drafted token v stays with probability min(1, p(v) / q(v)); the first refused one is replaced from the
    normalised max(0, p - q) of its position; when none is refused one more token is drawn from p.
    """
    p_BnV = target_probs(logits_BnV, temperature)
    tokens_BL, q_BLV = proposal.tokens_BL, proposal.probs_BLV
    rows, width = tokens_BL.shape
    stay_BL = acceptance_probability(p_BnV[:, :-1], tokens_BL, q_BLV)
    uniform_BL = torch.rand(stay_BL.shape, dtype=stay_BL.dtype, device=stay_BL.device, generator=generator)
    # Strictly less: the uniform can be 0, and a token the target never says has probability 0 to stay.
    accepted_B = leading(uniform_BL < stay_BL, proposal.lengths_B)

    row_B = torch.arange(rows, device=tokens_BL.device)
    next_BV = p_BnV[row_B, accepted_B]
    lengths_B = proposal.lengths_B if proposal.lengths_B is not None else torch.full_like(accepted_B, width)
    if width:
        at_B = accepted_B.clamp_max(width - 1)
        rest_BV = residual(next_BV, tokens_BL[row_B, at_B], None if q_BLV is None else q_BLV[row_B, at_B])
        next_BV = torch.where((accepted_B < lengths_B)[:, None], rest_BV, next_BV)
    return Verdict(accepted_B=accepted_B, next_B=torch.multinomial(next_BV, 1, generator=generator)[:, 0])


def verify(
    logits_BnV: Tensor, proposal: Proposal, temperature: float, generator: torch.Generator | None = None
) -> Verdict:
    """Verify a proposal against the target's logits after the pending token and after every drafted one."""
    if temperature == 0.0:
        return verify_greedy(logits_BnV, proposal)
    return verify_sampled(logits_BnV, proposal, temperature, generator)
