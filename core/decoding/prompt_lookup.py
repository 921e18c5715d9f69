"""Drafting by copying: find the sequence's last few tokens earlier in it and propose what followed then.

The draftless baseline that a trained draft must beat (known as prompt lookup or n-gram speculation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.core.interfaces.algorithm import DraftSession, Proposal


class _Sequence:
    """One row's tokens, and where each n-gram was last followed by something."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            # Indexed only once something follows, so that the suffix never finds itself.
            for size in self._sizes:
                if size <= end:
                    self._follower[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def continuation(self, length: int) -> list[int]:
        """`length` tokens, or none when no n-gram matches. A copy that reaches the end goes on with itself."""
        end = len(self._tokens)
        for size in reversed(self._sizes):
            start = self._follower.get(tuple(self._tokens[end - size :])) if size <= end else None
            if start is not None:
                drafted: list[int] = []
                for at in range(start, start + length):
                    drafted.append(self._tokens[at] if at < end else drafted[at - end])
                return drafted
        return []


class _PromptLookupSession:
    def __init__(self, rows: int, sizes: range) -> None:
        self._rows = [_Sequence(sizes) for _ in range(rows)]

    def propose(
        self,
        taps: Sequence[Tensor],
        next_tokens: Sequence[Tensor],
        length: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        device = next_tokens[0].device
        drafts = []
        for row, tokens in zip(self._rows, next_tokens, strict=True):
            row.append(tokens.tolist())
            drafts.append(row.continuation(length))
        width = max(map(len, drafts))
        padded = [draft + [0] * (width - len(draft)) for draft in drafts]
        return Proposal(
            tokens_BL=torch.tensor(padded, dtype=torch.int64, device=device).view(len(drafts), width),
            lengths_B=torch.tensor([len(draft) for draft in drafts], device=device),
        )

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]


class PromptLookupDrafter:
    """A `Drafter` without a model: the longest matching n-gram wins, and of its occurrences the latest.

    Where nothing matches it proposes nothing and the target takes a plain step. **That round counts**, with no
    token accepted: acceptance lengths are then comparable with a trained draft's, which drafts every time
    (vLLM's counter leaves such steps out and so reports higher figures for n-gram drafting).
    The proposal is deterministic, hence one-hot at any temperature. A prompt's first token is never matched: the
    draft's side of decoding is told the tokens after the first position.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, *, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-gram sizes need 1 <= shortest <= longest, got {shortest} and {longest}")
        self._sizes = range(shortest, longest + 1)

    def open(self, batch_size: int) -> DraftSession:
        return _PromptLookupSession(batch_size, self._sizes)
