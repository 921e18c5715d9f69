"""One conversation whose assistant turns the target writes anew, one after the other.

The tokens of a finished row are the very ones the target read and wrote. So a turn's prompt is made by appending
to the tokens so far, instead of encoding the text again, which may give others. Where the chat template rewrites what
was said before (dropping earlier reasoning, say) the next turn starts a row of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from transformers import PreTrainedTokenizerBase

from torchspec.core.data.chat import RenderedText, Renderer
from torchspec.core.data.messages import Message, RowError
from torchspec.core.data.prompts import text_prompt
from torchspec.core.data.rows import ChatRow
from torchspec.core.decoding.journal import Entry
from torchspec.core.interfaces.engine import Images

Finish = Literal["eos", "length", "context", "template", "vocabulary"]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """What turns text into the target's tokens and back. `context` is how many tokens the target can hold; `images`:
    whether it is asked with images, too."""

    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    context: int
    images: bool = False

    def encode(self, text: str, start: int) -> list[int] | None:
        """The tokens of `text` from character `start` on; None if a token reaches across that place."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if any(first < start < last for first, last in offsets):
            return None
        return [token for token, (first, _) in zip(ids, offsets, strict=True) if first >= start]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Conversation:
    """Grows turn by turn: `ask` for the prompt of the next one, `answer` with what the target wrote.

    turns     places of the messages to write, one past the last where that waits for an answer. Messages that call
              tools stay as they are: what the tools said belongs to those calls.
    said      the messages written so far
    ids       what the target has read and written: after `ask`, the prompt
    images    those that stand among the ids
    written   tokens the target wrote
    finish    why nothing more comes: every turn was written ("eos"), or one was cut by its limit ("length") or before
              a token that the tokenizer does not have ("vocabulary"), or the next one does not fit the target's
              context or is refused by the chat template
    """

    def __init__(self, row: ChatRow, sample_id: str) -> None:
        """RowError if there is nothing to write."""
        self.sample_id = sample_id
        self.said: list[Message] = []
        self.ids: list[int] = []
        self.images: Images = ()
        self.written = 0
        self.finish: Finish | None = None
        self._row = row
        self._mask: list[int] = []
        self._text = ""  # what ids say
        self._rows: list[Entry] = []
        self.turns = [place for place, message in enumerate(row.messages) if _is_text_of_assistant(message)]
        if row.messages[-1]["role"] != "assistant":
            self.turns.append(len(row.messages))
        if not self.turns:
            raise RowError("no assistant turn to generate: every one calls a tool")

    @property
    def asked_digest(self) -> str:
        """Of all that the answers depend on: the messages that are not written anew, their places, and the tools."""
        given = [message for place, message in enumerate(self._row.messages) if place not in self.turns]
        text = json.dumps([given, self.turns, self._row.tools], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def ask(self, writer: Writer) -> None:
        """Bring `ids` up to the next turn, or set `finish`. RowError if there is no way to the first one."""
        try:
            rendered = self._render(writer)
            text = rendered.text
            more = writer.encode(text, len(self._text)) if self.ids and text.startswith(self._text) else None
            ids = writer.encode(text, 0) if more is None else [*self.ids, *more]
        except RowError:
            if not self.said:
                raise
            self.finish = "template"
            return
        assert ids is not None
        if len(ids) >= writer.context:
            if not self.said:
                raise RowError(f"its prompt of {len(ids)} tokens fills the target's context of {writer.context}")
            self.finish = "context"
            return
        if more is None:
            self._close_row()
        self.ids, self._text, self.images = ids, text, rendered.images
        self._mask += [0] * (len(ids) - len(self._mask))

    def answer(self, tokens: Sequence[int], writer: Writer) -> None:
        """Take in what the target wrote, its end-of-turn token included if it came to one."""
        limit = writer.renderer.id_limit
        known = list(takewhile(lambda token: token < limit, tokens))
        unknown, tokens = len(known) < len(tokens), known
        ended = bool(tokens) and tokens[-1] in writer.eos
        self.said.append({"role": "assistant", "content": writer.decode(tokens[:-1] if ended else tokens)})
        self.ids = [*self.ids, *tokens]
        self._mask += [1] * len(tokens)
        self.written += len(tokens)
        self._text += writer.decode(tokens)
        if unknown:
            self.finish = "vocabulary"
        elif not ended:
            self.finish = "context" if len(self.ids) >= writer.context else "length"
        elif len(self.said) == len(self.turns):
            self.finish = "eos"

    def rows(self) -> list[Entry]:
        """The finished conversation, ready to train on: usually one row."""
        assert self.finish is not None
        self._close_row()
        facts = {
            "conversation": self.sample_id,
            "prompt": self.asked_digest,
            "turns": len(self.said),
            "asked": len(self.turns),
        }
        return [
            {
                "id": self.sample_id if number == 1 else f"{self.sample_id}~{number}",
                **row,
                "metadata": {**facts, "finish": self.finish},
            }
            for number, row in enumerate(self._rows, start=1)
        ]

    def _history(self, end: int) -> tuple[Message, ...]:
        """The first `end` messages, those already written in their new form."""
        messages = dict(enumerate(self._row.messages[:end]))
        messages.update(zip(self.turns, self.said, strict=False))
        return tuple(message for _, message in sorted(messages.items()))

    def _render(self, writer: Writer) -> RenderedText:
        """The conversation up to the next turn, with the generation prompt."""
        history = self._history(self.turns[len(self.said)])
        waiting = replace(self._row, messages=(*history, {"role": "assistant", "content": ""}))
        rendered = writer.renderer.prompt(waiting) if writer.images else text_prompt(writer.renderer, waiting)
        assert isinstance(rendered, RenderedText)
        return rendered

    def _close_row(self) -> None:
        if self.ids:
            row: Entry = {"messages": list(self._history(self.turns[len(self.said) - 1]))}
            if self._row.tools:
                row["tools"] = list(self._row.tools)
            if self.images:
                row["images"] = [image.source for image in self.images]
            self._rows.append({**row, "input_ids": self.ids, "loss_mask": self._mask})
        self._mask = []


def _is_text_of_assistant(message: Message) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message
