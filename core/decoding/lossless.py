"""Is the text with a draft the text without one? And if not, was it rounding?

The target computes a token's logits from one token at a time, or from several at once; the sums are then taken in
another order, and where two tokens are (nearly) tied, the argmax may differ. Past the first difference the two texts
are different texts, so only that position is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchspec.core.decoding.generation import opened
from torchspec.core.interfaces.engine import Images, TargetEngine

TIE_ULPS = 4


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The first difference between two texts of one prompt.

    position         among the new tokens
    token            with the draft; None where that text ended before
    token_draftless  likewise without it
    gap              how far apart the target's logits of the two tokens are
    tie              the gap is within rounding: at most 4 units (eps of the dtype) of the larger of the two logits
    """

    sample_id: str
    position: int
    token: int | None
    token_draftless: int | None
    gap: float | None
    tie: bool


@dataclass(frozen=True, kw_only=True)
class Texts:
    """One prompt and what was generated after it, with and without a draft."""

    sample_id: str
    prompt: Sequence[int]
    tokens: Sequence[int]
    draftless: Sequence[int]
    images: Images = ()


def first_difference(texts: Texts) -> int | None:
    """The place among the new tokens where the two texts part; None if they are equal."""
    tokens, draftless = list(texts.tokens), list(texts.draftless)
    if tokens == draftless:
        return None
    shared = min(len(tokens), len(draftless))
    return next((place for place in range(shared) if tokens[place] != draftless[place]), shared)


@torch.no_grad()
def find_mismatch(engine: TargetEngine, texts: Texts, dtype: torch.dtype) -> Mismatch | None:
    """None if the texts are equal; else their first difference, judged by the target's logits at that place.

    `dtype` is the precision the target runs in.
    """
    tokens, draftless = texts.tokens, texts.draftless
    shared = first_difference(texts)
    if shared is None:
        return None
    token = tokens[shared] if shared < len(tokens) else None
    other = draftless[shared] if shared < len(draftless) else None
    gap, tie = None, False
    if token is not None and other is not None:
        logits_V = opened(engine, [[*texts.prompt, *tokens[:shared]]], (), [texts.images]).prefill.logits_BV[0]
        pair = logits_V[[token, other]].cpu().double()  # a device may have no float64
        gap = float((pair[0] - pair[1]).abs())
        tie = gap <= TIE_ULPS * torch.finfo(dtype).eps * float(pair.abs().max())
    return Mismatch(sample_id=texts.sample_id, position=shared, token=token, token_draftless=other, gap=gap, tie=tie)
