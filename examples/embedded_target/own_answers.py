"""The model's own greedy answers to training questions, and which of their tokens are repeats.

Left alone, the greedy answers of a small model end in loops. Training takes the repeats in its own answers
back: *sequence-level unlikelihood* (Welleck et al., 2020, "Neural Text Generation with Unlikelihood Training",
arXiv:1908.04319): every token that completes a ``GRAM``-gram which the answer has already had costs
``-log(1 - p)``, and nothing else of the answer counts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from evaluate import greedy
from network import BLOCKED
from transformers import Qwen3ForCausalLM

from torchspec.core.data.stdlib_corpus import Conversation

GRAM = 6
NEW_TOKENS = 256
IGNORED = -100


def repeats(answer: Sequence[int], gram: int = GRAM) -> list[bool]:
    """For each token whether the ``gram`` tokens that it ends stood in the answer before."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(answer) + 1):
        piece = tuple(answer[max(0, end - gram) : end])
        marks.append(len(piece) == gram and piece in seen)
        seen.add(piece)
    return marks


class OwnAnswers:
    """Asks the model as it is now, in batches, and makes rows of ``length`` tokens of the answers."""

    def __init__(self, model: Any, tokenizer: Any, conversations: Sequence[Conversation], *, length: int, seed: int):
        config = copy.deepcopy(model.config)
        assert config._attn_implementation == BLOCKED  # which cannot decode with a cache
        config._attn_implementation = "sdpa"
        self.speaker = Qwen3ForCausalLM(config).eval().to(model.device)
        self.model, self.tokenizer, self.length = model, tokenizer, length
        prompts = tokenizer.apply_chat_template(
            [c.messages[:-1] for c in conversations], add_generation_prompt=True, return_dict=False
        )
        short = [place for place, ids in enumerate(prompts) if len(ids) <= length // 2]
        self.conversations = [conversations[place] for place in short]
        self.prompts = [prompts[place] for place in short]
        self.generator = np.random.default_rng(seed)
        self.repeated = 1.0  # share of the last batch's tokens

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``ids_RT`` and ``avoid_RT``, the following token where it is a repeat, else -100; int64 [count, length]."""
        self.speaker.load_state_dict(self.model.state_dict())
        places = self.generator.choice(len(self.prompts), size=count, replace=False)
        places = sorted(places, key=lambda place: len(self.prompts[place]))
        answers = greedy(
            self.speaker, self.tokenizer, [self.conversations[place] for place in places], NEW_TOKENS, rows=count
        )
        ids_RT = np.full((count, self.length + 1), self.tokenizer.pad_token_id, dtype=np.int64)
        avoid_RT = np.full_like(ids_RT, IGNORED)
        for row, (place, answer) in enumerate(zip(places, answers, strict=True)):
            start = len(self.prompts[place])
            whole = [*self.prompts[place], *answer][: self.length + 1]
            ids_RT[row, : len(whole)] = whole
            marks = np.flatnonzero(repeats(answer)[: len(whole) - start]) + start
            avoid_RT[row, marks] = ids_RT[row, marks]
        self.repeated = float((avoid_RT != IGNORED).sum() / max(1, sum(map(len, answers))))
        return torch.from_numpy(ids_RT[:, :-1].copy()), torch.from_numpy(avoid_RT[:, 1:].copy())
