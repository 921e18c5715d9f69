"""A chat template rendered, and what it reveals of itself: where an assistant's turn begins and how it ends.

Templates say nothing about their own structure, so a conversation of marker words is rendered once and the text
around the markers is read. Nothing is known here of any one model family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from torchspec.core.data.messages import Message, RowError
from torchspec.core.errors import TargetError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKERS = ("torchspecfirstquestion", "torchspecfirstanswer", "torchspecsecondquestion", "torchspecsecondanswer")

# What Jinja and the Python expressions inside a template raise over a conversation that the template cannot take.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True, kw_only=True)
class TurnMarks:
    """The template's text around what an assistant says.

    header   text that precedes every assistant turn; empty if there is none to be found
    prompt   what `add_generation_prompt` appends: begins with `header`, may go on behind it (an opened reasoning
             block); empty if the template ignores it
    ends     text from the end of the content up to and including the end-of-turn token, in every variant seen
             (a template may end the last turn otherwise), longest first
    """

    header: str
    prompt: str
    ends: tuple[str, ...]


class ChatTemplate:
    """One Jinja template together with the tokenizer's special tokens."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.has_generation_spans = _GENERATION.search(text) is not None
        self._text = text
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._knows_developers = "developer" in text
        self._in_parts = False
        self._in_parts = self._loses_text()
        self.marks = self._learn(tokenizer)

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and its `{% generation %}` spans (none if the template has none).

        `prompt` adds the generation prompt. RowError when the template refuses the conversation.
        """
        chat = [self._taken(message) for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                tools=list(tools) if tools else None,
                chat_template=self._text,
                return_assistant_tokens_mask=self.has_generation_spans,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except _REFUSALS as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        texts, spans = cast("tuple[list[str], list[list[Span]]]", rendered)
        return texts[0], spans[0] if spans else []

    def _taken(self, message: Message) -> Message:
        """A message as the template takes it: with images its content is a list of parts, and so it is of every message
        where the template wants that."""
        taken = {key: value for key, value in message.items() if key != "parts"}
        if message["role"] == "developer" and not self._knows_developers:
            taken["role"] = "system"
        if "parts" in message:
            shown = ("type", "text")
            taken["content"] = [{key: part[key] for key in shown if key in part} for part in message["parts"]]
        elif self._in_parts:
            taken["content"] = [{"type": "text", "text": message["content"]}] if message["content"] else []
        return taken

    def _loses_text(self) -> bool:
        """Whether a content that is text gets lost, as in templates that go through its parts without a look."""
        try:
            text, _ = self.render(_dialogue()[:1], None)
        except RowError:
            return True
        return _MARKERS[0] not in text

    def _learn(self, tokenizer: PreTrainedTokenizerBase) -> TurnMarks:
        end_of_sequence = str(tokenizer.eos_token or "")
        first = {"role": "user", "content": _MARKERS[0]}
        try:
            text, _ = self.render(_dialogue(), None)
            asked, _ = self.render([first], None)
            prompted, _ = self.render([first], None, prompt=True)
            pieces = re.split("|".join(_MARKERS), text)
            if len(pieces) != len(_MARKERS) + 1:
                raise RowError("it does not render each message once, in order")
        except RowError as error:
            if self.has_generation_spans:
                return TurnMarks(header="", prompt="", ends=(end_of_sequence,) if end_of_sequence else ())
            raise TargetError(
                f"the chat template cannot be used to find what the assistant says: {error}\n"
                "    remedy: give one with {% generation %} spans around the assistant's text (target.chat_template)"
            ) from error
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        names = sorted({token.content for token in added} - {tokenizer.bos_token}, key=len, reverse=True)
        ends = {_end_of_turn(piece, names, end_of_sequence) for piece in (pieces[2], pieces[4])}
        ends |= {end_of_sequence, self._end_of_call([token.content for token in added if token.special])} - {""}
        prompt = prompted[len(_shared(asked, prompted)) :]
        header = _header(asked.partition(_MARKERS[0])[2], (pieces[1], pieces[3]), prompt)
        if not header.strip() and not self.has_generation_spans:
            raise TargetError(
                "the chat template puts nothing before an assistant's turn, so its words cannot be found\n"
                "    remedy: give one with {% generation %} spans around the assistant's text (target.chat_template)"
            )
        return TurnMarks(
            header=header,
            prompt=prompt if prompt.startswith(header) else "",
            ends=tuple(sorted(ends - {""}, key=len, reverse=True)),
        )

    def _end_of_call(self, special: Sequence[str]) -> str:
        """The special token behind a tool call, which may differ from the one behind text; empty if there is none."""
        call = {"type": "function", "id": "torchspec", "function": {"name": "f", "arguments": {"x": _MARKERS[1]}}}
        answer = {"role": "tool", "name": "f", "tool_call_id": "torchspec", "content": _MARKERS[2]}
        question, _, *rest = _dialogue()
        messages = [question, {"role": "assistant", "content": "", "tool_calls": [call]}, answer, rest[-1]]
        try:
            text, _ = self.render(messages, None)
        except RowError:  # the template knows no tools
            return ""
        behind = text.partition(_MARKERS[1])[2].partition(_MARKERS[2])[0]
        found = re.search("|".join(map(re.escape, special)), behind) if special else None
        return found.group() if found else ""


def _dialogue() -> list[Message]:
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": marker} for role, marker in zip(roles, _MARKERS, strict=True)]


def _shared(*texts: str) -> str:
    """The longest common prefix."""
    return "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    )


def _header(question_end: str, between: tuple[str, str], prompt: str) -> str:
    """What precedes an answer: the part that the generation prompt and every turn share.

    `between` is the text from a question to its answer, `question_end` what follows a question alone. A template
    whose answers have no mark of their own ("[/INST] answer") is recognised by the end of the question before.
    """
    heads = [text.removeprefix(question_end) for text in between]
    shared = _shared(*heads, prompt) if prompt else _shared(*heads)
    return shared if shared.strip() else _shared(*between).rstrip(" ")


def _end_of_turn(following: str, names: Sequence[str], end_of_sequence: str) -> str:
    """The beginning of `following` up to and including the end-of-turn token; empty if there is none.

    It is the added token that adjoins the answer, or the end of sequence behind white space.
    """
    adjoining = next((name for name in names if following.startswith(name)), "")
    gap = len(following) - len(following.lstrip())
    if adjoining or not end_of_sequence or not following.startswith(end_of_sequence, gap):
        return adjoining
    return following[:gap] + end_of_sequence
