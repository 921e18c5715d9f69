"""Decoded texts as people are shown them: each token where its round has it, each character once."""

from __future__ import annotations

from collections.abc import Sequence

from torchspec.core.decoding.result import PromptRecord
from torchspec.core.decoding.samples import LONGEST, SAMPLES, places, prompts_digest, sample, samples


def record(name: str = "a", tokens: Sequence[int] = (), accepted: Sequence[int] = (), prompt: int = 1) -> PromptRecord:
    return PromptRecord(
        sample_id=name, prompt=(prompt, 2), tokens=tuple(tokens), accepted=tuple(accepted), finish="length"
    )


def as_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def test_places_are_those_of_the_rounds() -> None:
    """The prefill's token; a round of two accepted; one of none; one whose end the text's limit cut off."""
    assert places(record(tokens=range(8), accepted=(2, 0, 3))) == [0, 1, 2, 0, 0, 1, 2, 3]
    assert places(record(tokens=[7])) == [0]


def test_characters_of_several_tokens_come_whole() -> None:
    text = "aé\N{SNOWMAN}<b>"
    tokens = list(text.encode())
    found = sample(record(tokens=tokens, accepted=[2, 1, 3]), as_bytes)
    assert "".join(piece for piece, _ in found["pieces"]) == text
    assert [piece for piece, _ in found["pieces"]] == ["a", "", "é", "", "", "\N{SNOWMAN}", "<", "b", ">"]
    assert [place for _, place in found["pieces"]] == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    # A text that ends within one shows what there is.
    assert (
        "".join(piece for piece, _ in sample(record(tokens=tokens[:2], accepted=[1]), as_bytes)["pieces"]) == "a\ufffd"
    )


def test_a_few_at_even_distances_none_too_long() -> None:
    records = [record(str(number), [65] * 300, [0] * 299) for number in range(9)]
    chosen = samples(records, as_bytes)
    assert [each["id"] for each in chosen] == ["0", "2", "4", "6"]
    assert len(chosen) == SAMPLES
    assert len(chosen[0]["pieces"]) == LONGEST
    assert samples([], as_bytes) == []


def test_the_digest_is_of_the_prompts_alone() -> None:
    asked = [record("a", prompt=1), record("b", prompt=2)]
    assert prompts_digest(asked) == prompts_digest([record("x", [5], [1], prompt=2), record("y", prompt=1)])
    assert prompts_digest(asked) != prompts_digest([record(prompt=1), record(prompt=3)])
    assert prompts_digest(asked) != prompts_digest(asked[:1])
