"""What a target of this process writes after prompts: alone, or with the draft that a training hands over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from torchspec.core.decoding.generation import DecodeSettings, Generation
from torchspec.core.decoding.pushed import PushedDraft
from torchspec.core.decoding.speculative import decode
from torchspec.core.interfaces.engine import DraftSource, Images, ServedText, TargetEngine

Follow = Callable[[DraftSource], PushedDraft]


class TextWriter:
    """Implements `Author`. `follow` opens what a source leaves; it is asked once for each."""

    def __init__(self, engine: TargetEngine, follow: Follow) -> None:
        self._engine, self._follow = engine, follow
        self._followed: dict[DraftSource, PushedDraft] = {}

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        source: DraftSource | None = None,
        images: Sequence[Images] = (),
    ) -> list[ServedText]:
        """See `Author`; `images` as of `TextGenerator.generate`. ValueError for images with a `source`.

        With a draft, what is drawn at temperature > 0 depends on the draft and on all the prompts as well.
        """
        drafter = None
        if source is not None:
            if any(images):
                raise ValueError("prompts with images are written without drafts")
            if source not in self._followed:
                self._followed[source] = self._follow(source)
            drafter = self._followed[source].drafter()
        if source is None or drafter is None:
            texts = self._engine.generate(
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                **({"images": images} if any(images) else {}),
            )
            return [ServedText(tokens=tuple(tokens)) for tokens in texts]
        settings = DecodeSettings(max_new_tokens=max_new_tokens, draft_length=source.length, temperature=temperature)
        decoded = decode(self._engine, drafter, prompts, settings, seed=_mixed(seed, prompts))
        return [_served(generation) for generation in decoded.generations]


def _served(generation: Generation) -> ServedText:
    accepted = tuple(each.accepted for each in generation.rounds)
    return ServedText(tokens=generation.tokens, accepted=accepted, rounds=len(accepted), accepted_tokens=sum(accepted))


def _mixed(seed: int, prompts: Sequence[Sequence[int]]) -> int:
    """Batches draw independently."""
    digest = hashlib.sha256(f"{seed}:{[list(prompt) for prompt in prompts]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
