"""Decoded texts for people: which tokens the draft had right, and which prompts were asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torchspec.core.decoding.result import PromptRecord

SAMPLES = 4
LONGEST, PROMPT_END = 160, 400
"""Tokens of a text, characters of its prompt's end."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Sequence[int]], str]


def places(record: PromptRecord) -> list[int]:
    """Of each token of the text: its position among those that its round drafted, counted from 1; 0 for the target's
    own. The first token comes from the prompt's prefill; a round is what was accepted and one of the target's, and the
    last may be cut where the text ended.
    """
    of_tokens = [0]
    for accepted in record.accepted:
        of_tokens += [*range(1, accepted + 1), 0]
    return of_tokens[: len(record.tokens)]


def sample(record: PromptRecord, decode: Decode) -> dict[str, Any]:
    """For eval.json: `id`, the end of the `prompt`, and the text as `pieces` [text, place].

    A character that several tokens make belongs to the last of them.
    """
    pieces: list[list[Any]] = []
    said, tokens = "", record.tokens[:LONGEST]
    for count, place in enumerate(places(record)[: len(tokens)], start=1):
        text = decode(tokens[:count])
        whole = text if count == len(tokens) else text.rstrip(_BROKEN)
        pieces.append([whole[len(said) :], place])
        said = whole
    return {"id": record.sample_id, "prompt": decode(record.prompt)[-PROMPT_END:], "pieces": pieces}


def samples(records: Sequence[PromptRecord], decode: Decode) -> list[dict[str, Any]]:
    """Some of them, at even distances."""
    count = min(SAMPLES, len(records))
    return [sample(records[number * len(records) // count], decode) for number in range(count)]


def prompts_digest(records: Sequence[PromptRecord]) -> str:
    """16 hexadecimal digits of which prompts were asked, in whatever order."""
    asked = sorted(",".join(map(str, record.prompt)) for record in records)
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]
