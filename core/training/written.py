"""Answers that the target writes while the draft is trained: prompts become samples, one forward pass at a time.

What is written for a prompt depends on the seed, the step and the prompt; with a draft at a temperature above 0 on the
draft as well. Prompts that are captured together in the trainer's own process are written for together wherever the
target is, so that the text is the same to the last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchspec.core.errors import LostOnTextError
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import Author, DraftSource, ServedText
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.capturing import Documents, Texts, assigned


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How it is written. `max_length`: of prompt and answer together; `context`: what the target reads at most.
    `source`: the draft to write with, if any."""

    max_new_tokens: int
    max_length: int
    context: int
    temperature: float = 0.0
    seed: int = 0
    source: DraftSource | None = None


def groups_of(prompts: Documents, ranks: int) -> list[list[int]]:
    """Numbers of the documents that are written for together: those of each rank that shares the sequences."""
    owners = assigned(prompts.samples, ranks) if prompts.indices else []
    return [[number for number, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]


def write_texts(author: Author, prompts: Mapping[int, TrainingSample], writing: Writing, step: int) -> Texts:
    """For each prompt a text, or the reason of an author that is lost on it alone too. TargetError from an author that
    fails otherwise."""
    found: dict[int, ServedText | str] = {}
    for numbers, room in _by_room(prompts, writing):
        try:
            found |= _written(author, prompts, numbers, room, writing, step)
        except LostOnTextError as error:
            if len(numbers) == 1:
                found[numbers[0]] = str(error)
                continue
            for number in numbers:
                try:
                    found |= _written(author, prompts, [number], room, writing, step)
                except LostOnTextError as again:
                    found[number] = str(again)
    return found


def _by_room(prompts: Mapping[int, TrainingSample], writing: Writing) -> Iterator[tuple[list[int], int]]:
    """Numbers, and how many tokens are asked for together: where that is beyond the target's context a prompt goes
    alone. What a sample has no room for is cut."""
    lengths = {number: sample.input_ids_T.numel() for number, sample in prompts.items()}
    rooms = {number: writing.max_length - length for number, length in lengths.items()}
    limit = min(writing.max_new_tokens, max(rooms.values(), default=0))
    together = [number for number, length in lengths.items() if length + limit <= writing.context]
    if together:
        yield together, limit
    for number in lengths.keys() - together:
        yield [number], min(limit, rooms[number])


def _written(
    author: Author, prompts: Mapping[int, TrainingSample], numbers: list[int], room: int, writing: Writing, step: int
) -> dict[int, ServedText | str]:
    texts = author.write(
        [prompts[number].input_ids_T.tolist() for number in numbers],
        max_new_tokens=room,
        temperature=writing.temperature,
        seed=(writing.seed * 1_000_003 + step) % 2**31,
        source=writing.source,
    )
    rooms = {number: writing.max_length - prompts[number].input_ids_T.numel() for number in numbers}
    return {
        number: replace(text, tokens=text.tokens[: rooms[number]]) if text.tokens else "nothing was written"
        for number, text in zip(numbers, texts, strict=True)
    }


def answered(prompts: Documents, texts: Texts) -> Documents:
    """Samples whose answers are supervised; a prompt without one supervises nothing."""
    samples = [
        _answered(sample, texts[number]) if number in texts else sample for number, sample in enumerate(prompts.samples)
    ]
    return replace(prompts, samples=samples, texts=texts)


def _answered(prompt: TrainingSample, text: ServedText | str) -> TrainingSample:
    tokens_T = torch.tensor([] if isinstance(text, str) else text.tokens, dtype=torch.int64)
    return replace(
        prompt,
        input_ids_T=torch.cat([prompt.input_ids_T, tokens_T]),
        loss_mask_T=torch.cat([torch.zeros_like(prompt.loss_mask_T), torch.ones_like(tokens_T, dtype=torch.bool)]),
    )


def texts_to_json(texts: Texts) -> dict[str, Any]:
    return {
        str(number): text if isinstance(text, str) else [text.tokens, text.rounds, text.accepted_tokens]
        for number, text in texts.items()
    }


def texts_from_json(told: Mapping[str, Any]) -> Texts:
    """Without what each round accepted."""
    return {
        int(number): text
        if isinstance(text, str)
        else ServedText(tokens=tuple(text[0]), rounds=text[1], accepted_tokens=text[2])
        for number, text in told.items()
    }


class WrittenNow:
    """By the target of this process, when a forward pass needs them."""

    def __init__(self, author: Author, writing: Writing, context: ParallelContext) -> None:
        self._author, self._writing, self._context = author, writing, context

    def __call__(self, step: int, given: Mapping[int, Documents]) -> dict[int, Documents]:
        """Collective. Ranks that hold a target together write for all its micro-batches; others each for their part."""
        context = self._context
        if context.tensor.size() > 1:
            return {index: answered(prompts, self._all_of(step, prompts)) for index, prompts in given.items()}
        prompts = given[context.data_rank]
        texts = self._of(step, prompts, groups_of(prompts, context.sequence_size)[context.sequence_rank])
        if context.sequence_size > 1:
            first = context.data_rank * context.sequence_size
            told = context.gather(texts_to_json(texts))[first : first + context.sequence_size]
            texts = {number: text for part in told for number, text in texts_from_json(part).items()}
        return {context.data_rank: answered(prompts, texts)}

    def _all_of(self, step: int, prompts: Documents) -> Texts:
        groups = groups_of(prompts, self._context.sequence_size)
        return {number: text for group in groups for number, text in self._of(step, prompts, group).items()}

    def _of(self, step: int, prompts: Documents, numbers: Sequence[int]) -> Texts:
        return write_texts(self._author, {n: prompts.samples[n] for n in numbers}, self._writing, step)
