"""Having the target write the assistant turns of conversations itself, so that a draft learns the target's own text.

Every conversation that is read ends up counted once: generated, failed (with its reason in a file beside the output)
or skipped because an earlier run generated it. A run that was killed continues, and ends with the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from torchspec.core.data.chat import Renderer
from torchspec.core.data.messages import RowError
from torchspec.core.data.report import UniqueIds
from torchspec.core.data.rows import BadRow, ChatRow, Row, read_rows
from torchspec.core.data.tokenizer import template_digest
from torchspec.core.decoding.conversation import Conversation, Writer
from torchspec.core.decoding.journal import Journal
from torchspec.core.errors import DataError
from torchspec.core.interfaces.engine import TextGenerator
from torchspec.core.models.target_weights import weights_fingerprint

Progress = Callable[[str, int, int], None]

WINDOW = 64  # batches whose conversations are sorted by length together
REASONS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class RegenerateSettings:
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens and batch_size must be at least 1, got {self.max_new_tokens} and {self.batch_size}"
            )
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class RegenerateReport:
    """Conversations: read = ok + failed + skipped. `failures` names the file with the reasons, None if there are none.

    cut      those of `ok` that end before their last turn was written to its end: by max_new_tokens, by the target's
             context, or because the chat template refuses what the target said
    turns    assistant turns written by this run, with `tokens` tokens
    """

    read: int
    ok: int
    failed: int
    skipped: int
    cut: int
    turns: int
    tokens: int
    failures: Path | None


def regenerate(
    engine: TextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path],
    output: Path,
    settings: RegenerateSettings,
    *,
    dtype: torch.dtype | None = None,
    images: bool = False,
    progress: Progress | None = None,
) -> RegenerateReport:
    """Write `output` (JSON Lines): each conversation with its assistant turns replaced by the target's own.

    Earlier turns, as regenerated, are the context of later ones; a last message that waits for an answer gets one.
    A row holds `messages` (and `tools`) to read and `input_ids` with `loss_mask` to train on, exactly the tokens the
    target read and wrote, and `metadata`: a digest of what was asked, turns written and asked for, why it ended, and
    the settings. A conversation has several rows where the chat template rewrites earlier turns.

    `images`: whether the engine takes any; if not, conversations with images fail. `dtype` is the precision that the
    target runs in; None: that of its weights. At temperature > 0 what is drawn
    depends on the seed and on the prompt: equal conversations get equal answers. A run that is killed and repeated ends
    with the same file, byte for byte; another batch size may change the order of rows, and what rounding tips over.

    Raises DataError when files cannot be read or written, when `output` holds something else than an earlier run of
    the same target, weights and precision included, with the same settings and on the same messages, and when not a
    single conversation could be used; TargetError without a chat template.
    """
    if output.resolve() in {Path(file).resolve() for file in files}:
        raise DataError(f"the output {output} is one of the files that are read: name another output")
    target = engine.describe()
    writer = Writer(
        renderer=Renderer(tokenizer),
        tokenizer=tokenizer,
        eos=frozenset(target.eos_token_ids),
        context=target.max_position_embeddings,
        images=images,
    )
    identity = {
        "target": target.path.resolve().name,
        "weights": weights_fingerprint(target.path)[:16],
        "dtype": str(dtype or target.dtype).removeprefix("torch."),
        "template": template_digest(tokenizer)[:16],
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    total = sum(1 for _ in read_rows(files)) if progress is not None else 0
    failures = _Failures(output.with_name(output.name + ".failed.jsonl"))
    ok = skipped = cut = turns = tokens = 0
    if progress is not None:
        progress("generate", 0, total)
    with Journal(output, identity) as journal, failures:
        for batch in _batches(read_rows(files), writer, failures, settings.batch_size):
            fresh = [each for each in batch if not journal.holds(each.sample_id, each.asked_digest)]
            skipped += len(batch) - len(fresh)
            if fresh:
                # The whole batch, as the run that was killed did: in another shape sums are rounded otherwise.
                _write_turns(engine, batch, writer, settings)
                journal.append([conversation.rows() for conversation in fresh])
            ok += len(fresh)
            cut += sum(conversation.finish != "eos" for conversation in fresh)
            turns += sum(len(conversation.said) for conversation in fresh)
            tokens += sum(conversation.written for conversation in fresh)
            if progress is not None:
                progress("generate", ok + skipped + failures.count, total)
    if not ok + skipped:
        raise DataError(f"none of the {failures.count} rows is a conversation that could be used:\n{failures.shown()}")
    return RegenerateReport(
        read=ok + skipped + failures.count,
        ok=ok,
        failed=failures.count,
        skipped=skipped,
        cut=cut,
        turns=turns,
        tokens=tokens,
        failures=failures.path if failures.count else None,
    )


class _Failures:
    """What could not be used, one JSON object per line; the file appears with the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._first: list[str] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row | BadRow, reason: str) -> None:
        self.count += 1
        if len(self._first) < REASONS_SHOWN:
            self._first.append(f"  - {row.file}:{row.line}: {reason}")
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        name = None if isinstance(row, BadRow) else row.sample_id
        entry = {"id": name, "file": str(row.file), "line": row.line, "reason": reason}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def shown(self) -> str:
        return "\n".join(self._first)


def _batches(
    rows: Iterator[Row | BadRow], writer: Writer, failures: _Failures, size: int
) -> Iterator[list[Conversation]]:
    """Conversations that are ready for their first turn, those alike in turns and length together.

    Depends on the files and `size` alone, never on what an earlier run has done.
    """
    unique = UniqueIds()
    while window := list(islice(rows, size * WINDOW)):
        ready = [conversation for row in window if (conversation := _start(row, writer, failures, unique))]
        ready.sort(key=lambda conversation: (len(conversation.turns), len(conversation.ids)))
        for start in range(0, len(ready), size):
            yield ready[start : start + size]


def _start(row: Row | BadRow, writer: Writer, failures: _Failures, unique: UniqueIds) -> Conversation | None:
    if isinstance(row, BadRow):
        failures.add(row, row.reason)
        return None
    if not isinstance(row, ChatRow):
        failures.add(row, "not a conversation: only rows with messages have turns to generate")
        return None
    try:
        conversation = Conversation(row, unique(row.sample_id))
        conversation.ask(writer)
    except RowError as error:
        failures.add(row, str(error))
        return None
    return conversation


def _write_turns(
    engine: TextGenerator, batch: Sequence[Conversation], writer: Writer, settings: RegenerateSettings
) -> None:
    """Every turn of every conversation, turn by turn, so that earlier ones are the context of later ones."""
    waiting = list(batch)
    while waiting:
        for group, room in _groups(waiting, writer.context, settings.max_new_tokens):
            shown = [conversation.images for conversation in group]
            answers = engine.generate(
                [conversation.ids for conversation in group],
                max_new_tokens=room,
                temperature=settings.temperature,
                seed=settings.seed,
                **({"images": shown} if any(shown) else {}),
            )
            for conversation, tokens in zip(group, answers, strict=True):
                conversation.answer(tokens, writer)
                if conversation.finish is None:
                    conversation.ask(writer)
        waiting = [conversation for conversation in waiting if conversation.finish is None]


def _groups(
    waiting: Sequence[Conversation], context: int, max_new_tokens: int
) -> Iterator[tuple[list[Conversation], int]]:
    """Conversations to generate for together, with their limit: those near the end of the context go alone."""
    # All measured before any is answered: an answer uses up room.
    rooms = [(conversation, context - len(conversation.ids)) for conversation in waiting]
    roomy = [conversation for conversation, room in rooms if room >= max_new_tokens]
    if roomy:
        yield roomy, max_new_tokens
    for conversation, room in rooms:
        if room < max_new_tokens:
            yield [conversation], room
