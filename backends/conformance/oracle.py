"""The target as transformers computes it, on the host in fp32: one sequence at a time, no cache, no padding.

Shape letters: T tokens, N taps, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.core.models.target_class import target_class
from torchspec.core.models.target_spec import load_target_config


@dataclass(frozen=True, kw_only=True)
class Exact:
    """`last_TH` has been through the final norm."""

    taps_TNH: Tensor
    last_TH: Tensor
    logits_TV: Tensor


class Oracle:
    def __init__(self, path: Path, taps: Sequence[int], *, trust_remote_code: bool) -> None:
        self._path = path
        self._taps = tuple(taps)
        self._trust = trust_remote_code
        self._known: dict[tuple[int, ...], Exact] = {}

    @cached_property
    def _model(self) -> Any:
        model = target_class(load_target_config(self._path, trust_remote_code=self._trust)).from_pretrained(
            self._path, dtype=torch.float32, trust_remote_code=self._trust, attn_implementation="eager"
        )
        return model.eval()

    @torch.no_grad()
    def of(self, ids: Sequence[int]) -> Exact:
        """Tap l is `hidden_states[l + 1]`; the last of them has the final norm applied."""
        key = tuple(ids)
        if key not in self._known:
            found = self._model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
            states = found.hidden_states
            taps_TNH = torch.stack([states[layer + 1][0] for layer in self._taps], dim=1)
            self._known[key] = Exact(taps_TNH=taps_TNH, last_TH=states[-1][0], logits_TV=found.logits[0])
        return self._known[key]

    @torch.no_grad()
    def turn(self, ids: Sequence[int], most: int, ends: Sequence[int]) -> list[int] | None:
        """Greedy text to the first token of `ends`, which is part of it; None where `most` tokens don't get there."""
        text: list[int] = []
        while len(text) < most:
            logits_TV = self._model(torch.tensor([[*ids, *text]]), use_cache=False).logits[0]
            text.append(int(logits_TV[-1].argmax()))
            if text[-1] in ends:
                return text
        return None
