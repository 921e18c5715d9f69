"""Which keys a query may see. One polarity everywhere: True means *keep*; adapters translate.

Shape letters: B batch, Q query rows, S key rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MaskKind = Literal["full", "causal", "window", "limits", "dense"]
Alignment = Literal["upper_left", "lower_right"]


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A description of an attention mask that never needs a [Q, S] tensor (except `dense`, which is one).

    kind       keys that query row i sees (with `offset` = 0 for upper_left, S - Q for lower_right)
    full       all
    causal     j <= i + offset
    window     i + offset - window < j <= i + offset
    limits     key_start[b, i] <= j < key_end[b, i]   (packing, block anchors, right padding)
    dense      keep[b, i, j]

    A query row that sees no key gets output 0 and log-sum-exp -inf, on every device.
    """

    kind: MaskKind
    alignment: Alignment = "upper_left"
    window: int = 0
    key_start_BQ: Tensor | None = None
    key_end_BQ: Tensor | None = None
    keep_BQS: Tensor | None = None

    @classmethod
    def full(cls) -> MaskSpec:
        return cls(kind="full")

    @classmethod
    def causal(cls, alignment: Alignment = "upper_left") -> MaskSpec:
        return cls(kind="causal", alignment=alignment)

    @classmethod
    def sliding(cls, window: int, alignment: Alignment = "upper_left") -> MaskSpec:
        if window < 1:
            raise ValueError(f"a sliding window needs at least 1 key, got {window}")
        return cls(kind="window", window=window, alignment=alignment)

    @classmethod
    def limits(cls, key_start_BQ: Tensor, key_end_BQ: Tensor) -> MaskSpec:
        """Integer tensors [B, Q]; a batch of 1 broadcasts. An empty interval is a row without keys.

        Best kept on the host: attention is planned there, and reads limits that lie on a device by waiting for it.
        """
        return cls(kind="limits", key_start_BQ=key_start_BQ, key_end_BQ=key_end_BQ)

    @classmethod
    def dense(cls, keep_BQS: Tensor) -> MaskSpec:
        """Boolean tensor [B, Q, S], shared by all heads; a batch of 1 broadcasts. For small S only."""
        return cls(kind="dense", keep_BQS=keep_BQS)

    def bounds(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and one-past-last visible key of each query row, int64 [1 or B, Q]; not for `dense`.

        On `device`, but limits stay where they are.
        """
        if self.kind == "limits":
            assert self.key_start_BQ is not None
            assert self.key_end_BQ is not None
            return self.key_start_BQ.clamp(0, keys), self.key_end_BQ.clamp(0, keys)  # where they lie
        row = torch.arange(queries, device=device)[None]
        if self.kind == "full":
            return torch.zeros_like(row), torch.full_like(row, keys)
        if self.kind == "dense":
            raise ValueError("a dense mask has no interval bounds")
        last = row + (keys - queries if self.alignment == "lower_right" else 0)
        start = last - self.window + 1 if self.kind == "window" else torch.zeros_like(last)
        return start.clamp(0, keys), (last + 1).clamp(0, keys)

    def to_dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask written out, bool [1 or B, Q, S]: the oracle's form, never used on a training path."""
        if self.kind == "dense":
            assert self.keep_BQS is not None
            return self.keep_BQS.to(device)
        start_BQ, end_BQ = (bound_BQ.to(device) for bound_BQ in self.bounds(queries, keys, device))
        key = torch.arange(keys, device=device)
        return (key >= start_BQ[..., None]) & (key < end_BQ[..., None])
