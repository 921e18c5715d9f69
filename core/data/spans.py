"""From what an assistant says, in characters, to the tokens that are supervised.

The end-of-turn token belongs to the turn, white space behind it doesn't. A conversation is tokenised once, as a
whole: encoding prefixes of it would be quadratic, and merges across a prefix's end would shift the mask.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache, partial

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from torchspec.core.data.messages import Message, RowError
from torchspec.core.data.template import Span, TurnMarks
from torchspec.core.models.target_processor import Placed


def tidy_spans(text: str, spans: Sequence[Span], marks: TurnMarks) -> list[Span]:
    """A template's `{% generation %}` spans, each ending with its end-of-turn token, adjoining ones joined.

    Templates differ in whether the span holds that token and the white space behind it.
    """
    tidied: list[Span] = []
    for start, end in spans:
        said = text[start:end].rstrip()
        if said.endswith(marks.ends):
            end = start + len(said)
        else:
            end += next((len(mark) for mark in marks.ends if text.startswith(mark, end)), 0)
        if tidied and tidied[-1][1] >= start:
            tidied[-1] = (tidied[-1][0], end)
        elif start < end:
            tidied.append((start, end))
    return tidied


def find_turns(text: str, messages: Sequence[Message], marks: TurnMarks) -> list[Span]:
    """Where each assistant message stands in the rendered text, for templates that don't say so themselves.

    A turn reaches from behind its header to the end of its end-of-turn token, so what the template adds in between
    (an empty reasoning block, a tool call) belongs to it. RowError when a message cannot be found.
    """
    spans: list[Span] = []
    at = 0
    for number, message in enumerate(messages, start=1):
        content = message["content"]
        if message["role"] != "assistant":
            # Only a message that quotes the header can be taken for a turn, and has to be passed by.
            quoting = [form for form in _forms(content) if marks.header.strip() in form]
            places = [place + len(form) for form in quoting if (place := text.find(form, at)) >= 0]
            at = places[0] if places else at
            continue
        span = _find_turn(text, at, message, marks)
        if span is None:
            raise RowError(
                f"message {number} (assistant) is not found in the rendered conversation: the chat template drops or "
                "rewrites it; a template with {% generation %} spans would say where it stands"
            )
        spans.append(span)
        at = span[1]
    return spans


def shift_spans(spans: Sequence[Span], placed: Sequence[Placed]) -> list[Span]:
    """Spans of a text as they are once images have been placed in it, none of them inside a span."""

    def shifted(character: int) -> int:
        before = [each for each in placed if each.stop <= character]
        return character + before[-1].placed_stop - before[-1].stop if before else character

    return [(shifted(start), shifted(end)) for start, end in spans]


def _forms(content: str) -> list[str]:
    """What templates make of a message's content: as it is, trimmed, or without the reasoning in front of it."""
    forms = [content, content.strip()]
    if "</think>" in content:
        answer = content.rpartition("</think>")[2]
        forms += [answer, answer.strip()]
    return list(dict.fromkeys(forms))


def _find_turn(text: str, at: int, message: Message, marks: TurnMarks) -> Span | None:
    """The first place behind `at` where a header is followed by this message and by the end of its turn."""
    tail = _tails(marks)["tool_calls" in message]
    for head in _occurrences(text, marks.header, at, len(text)):
        first = head + len(marks.header)
        start = head + len(marks.prompt) if marks.prompt and text.startswith(marks.prompt, head) else first
        # Content that begins behind an end of turn, or behind the next header, belongs to another turn.
        limits = [stop for mark in marks.ends if (stop := text.find(mark, first)) >= 0]
        following = text.find(marks.header, first)
        limits += [following + len(marks.header) - 1] if following >= 0 else []
        limit = min(limits, default=len(text))
        for form in _forms(message["content"]):
            for found in _occurrences(text, form, first, limit):
                end = found + len(form)
                # The end is looked for too: a short content may also occur in what the template puts before it.
                closing = tail.match(text, end)
                if closing:
                    return start, max(start, end if closing["mark"] is None else closing.end())
    return None


@cache
def _tails(marks: TurnMarks) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What stands behind the content of a turn: its end-of-turn token or the end of the text, after white space only,
    or after anything but another turn's header where tool calls are rendered behind the content.
    """
    ends = "|".join(re.escape(mark) for mark in marks.ends)
    if not ends:
        return re.compile(r"(?P<mark>(?!))?"), re.compile(r"(?P<mark>(?!))?")
    closing = rf"(?P<mark>{ends})"
    call = rf"(?:(?!{re.escape(marks.header)}).)*?"
    return re.compile(rf"\s*?(?:{closing}|\Z)"), re.compile(rf"{call}(?:{closing}|\Z)", re.DOTALL)


def _occurrences(text: str, part: str, at: int, last: int) -> Iterator[int]:
    """Where `part` begins in `text`, from `at` to `last`."""
    while 0 <= (at := text.find(part, at)) <= last:
        yield at
        at += 1


def token_mask(text: str, encoding: Encoding, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens lie inside the spans, bool [T].

    A token that reaches over a span's edge counts as inside if only white space is outside: spaces in front, which
    many vocabularies write into the word behind them, or any white space behind, which some special tokens absorb.
    """
    tokens = range(len(encoding))
    mask = np.zeros(len(encoding), dtype=np.bool_)
    starts, ends = (partial(_edge, encoding, side) for side in (0, 1))
    for start, end in spans:
        first = bisect_left(tokens, start, key=starts)
        last = bisect_left(tokens, end + 1, key=ends)  # one past the last token that ends inside
        if first > 0 and ends(first - 1) > start and not text[starts(first - 1) : start].strip(" "):
            first -= 1
        if last < len(tokens) and first <= last and starts(last) < end and not text[end : ends(last)].strip():
            last += 1
        mask[first:last] = True
    return mask


def _edge(encoding: Encoding, side: int, token: int) -> int:
    edges = encoding.token_to_chars(token)
    assert edges is not None, "no token is added to the text, so each has its characters"
    return edges[side]
