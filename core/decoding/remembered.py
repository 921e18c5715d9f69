"""Answers that a target has written before, so that it need not write them again.

A file of JSON Lines, xz-compressed: first `{"weights": ..., "max_new_tokens": ...}`, then one object per answer,
`{"prompt": digest of the prompt's token ids, "answer": token ids, the end of the turn included where it came}`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path

from torchspec.core.interfaces.engine import Images, TargetSpec, TextGenerator
from torchspec.core.models.target_weights import weights_fingerprint


def digest_of(prompt: Sequence[int]) -> str:
    """Of a prompt's token ids: 16 hexadecimal digits."""
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]


def write_answers(
    path: Path, target: Path, max_new_tokens: int, answers: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> int:
    """Write pairs of prompt and answer that `target` gave greedily; -> how many."""
    lines = [json.dumps({"weights": weights_fingerprint(target), "max_new_tokens": max_new_tokens})]
    for prompt, answer in answers:
        lines.append(json.dumps({"prompt": digest_of(prompt), "answer": list(answer)}, separators=(",", ":")))
    path.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    return len(lines) - 1


def read_answers(path: Path, target: Path, max_new_tokens: int) -> dict[str, list[int]]:
    """Answers by their prompt's digest; none where they are another target's, or were cut at another length."""
    if not path.is_file():
        return {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        head = json.loads(next(lines))
        if head != {"weights": weights_fingerprint(target), "max_new_tokens": max_new_tokens}:
            return {}
        return {row["prompt"]: row["answer"] for row in map(json.loads, lines)}


class RememberingWriter:
    """A `TextGenerator`: greedy answers it remembers, and the engine's own to all other prompts."""

    def __init__(self, engine: TextGenerator, answers: dict[str, list[int]]) -> None:
        self._engine, self._answers = engine, answers

    def describe(self) -> TargetSpec:
        return self._engine.describe()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[Images] = (),
    ) -> list[list[int]]:
        """See `TextGenerator.generate`. Answers to texts alone are remembered."""
        if any(images):
            raise ValueError("prompts with images have no answers that are remembered")
        known = [self._answers.get(digest_of(prompt)) if temperature == 0.0 else None for prompt in prompts]
        open_places = [place for place, answer in enumerate(known) if answer is None]
        written = self._engine.generate(
            [prompts[place] for place in open_places],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ) if open_places else []  # fmt: skip
        fresh = dict(zip(open_places, written, strict=True))
        return [fresh[place] if answer is None else answer[:max_new_tokens] for place, answer in enumerate(known)]
