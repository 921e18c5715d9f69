"""Rows as token ids with a loss mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from torchspec.core.data.messages import REASONING_FIELDS, Message, RowError, check_text
from torchspec.core.data.rows import ChatRow, Row, TextRow, TokenRow
from torchspec.core.data.spans import find_turns, shift_spans, tidy_spans, token_mask
from torchspec.core.data.template import ChatTemplate, Span
from torchspec.core.data.tokenizer import exact_backend, id_limit
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference
from torchspec.core.models.images import ImageError, refer_to_image
from torchspec.core.models.target_processor import TargetProcessor, takes_images

LastTurnOnly = Literal["never", "always", "auto"]

_REASONING_BLOCK = re.compile(r"<think>(?!\s*</think>)\s*\S")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One sample: `input_ids` int32 [T], and `loss_mask` bool [T], true for the tokens to be predicted.

    `images` stand among its first `image_end` tokens.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    images: tuple[ImageReference, ...] = ()
    image_end: int = 0


@dataclass(frozen=True, kw_only=True)
class RenderedText:
    """A row as text, and the characters of it that are supervised. `images` stand in its first `image_end` ones."""

    text: str
    spans: tuple[Span, ...]
    images: tuple[ImageReference, ...] = ()
    image_end: int = 0


class Renderer:
    """Renders rows with one tokenizer. Conversations need its chat template, other rows don't; images need the
    processor that the tokenizer came with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, last_turn_only: LastTurnOnly = "never") -> None:
        self.tokenizer = tokenizer
        self.id_limit = id_limit(tokenizer)
        self._backend = exact_backend(tokenizer)
        self._last_turn_only = last_turn_only
        self._templates: dict[str, ChatTemplate] = {}
        self._processor: TargetProcessor | None = None

    def prepare(self, row: Row) -> RenderedText | Rendered:
        """The row as text, or as tokens where it holds those already.

        Raises RowError for a row that cannot be used, TargetError when a conversation meets a tokenizer without a
        chat template, or one whose template cannot be understood.
        """
        if isinstance(row, TokenRow):
            return self._tokens(row)
        if isinstance(row, TextRow):
            return RenderedText(text=row.text, spans=((0, len(row.text)),))
        template = self._template(row)
        text, spans = template.render(row.messages, row.tools)
        check_text(text, "the rendered conversation")
        if template.has_generation_spans:
            spans = tidy_spans(text, spans, template.marks)
        else:
            spans = find_turns(text, row.messages, template.marks)
        spans = spans[-1:] if self._only_last(row.messages) else spans
        return self._with_images(row, text, spans) if row.images else RenderedText(text=text, spans=tuple(spans))

    def encode(self, texts: Sequence[RenderedText]) -> list[Rendered]:
        """Tokenise a batch, each text in one pass; no special token is added to what the text holds."""
        encodings = self._backend.encode_batch([item.text for item in texts], add_special_tokens=False)
        return [
            Rendered(
                input_ids=np.array(encoding.ids, dtype=np.int32),
                loss_mask=token_mask(item.text, encoding, item.spans),
                images=item.images,
                image_end=_end_of(encoding, item.image_end) if item.images else 0,
            )
            for item, encoding in zip(texts, encodings, strict=True)
        ]

    def prompt(self, row: Row) -> RenderedText | Rendered:
        """What the target is to answer: everything before the last assistant turn, with the generation prompt.

        A conversation that ends with another's message is a prompt as a whole; of a tokenised row the prompt is the
        part before the last supervised run. RowError for rows that have no such cut.
        """
        if isinstance(row, TextRow):
            raise RowError("a pre-rendered text has no turns, so no prompt can be cut from it")
        if isinstance(row, TokenRow):
            return self._token_prompt(row)
        messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
        if not messages:
            raise RowError("nothing stands before the assistant's turn")
        text, _ = self._template(row).render(messages, row.tools, prompt=True)
        check_text(text, "the rendered prompt")
        return self._with_images(row, text, ()) if row.images else RenderedText(text=text, spans=())

    def _with_images(self, row: ChatRow, text: str, spans: Sequence[Span]) -> RenderedText:
        """The text with the tokens that stand for its images, which are read here."""
        processor = self._image_processor()
        try:
            images = tuple(refer_to_image(source) for source in row.images)
            expanded, placed = processor.expand(text, images)
        except ImageError as error:
            raise RowError(str(error)) from error
        shifted = shift_spans(spans, placed)
        return RenderedText(text=expanded, spans=tuple(shifted), images=images, image_end=placed[-1].placed_stop)

    def _image_processor(self) -> TargetProcessor:
        if self._processor is None:
            # Where the tokenizer was loaded from; one that was made otherwise has no processor beside it.
            place = self.tokenizer.name_or_path
            if not place or not takes_images(Path(place)):
                raise RowError("it has images, and the target takes none: no processor of images came with it")
            self._processor = TargetProcessor.load(Path(place))
        return self._processor

    def _template(self, row: ChatRow) -> ChatTemplate:
        if not self.tokenizer.chat_template:
            raise TargetError(
                "the target's tokenizer has no chat template, which conversations need\n"
                "    remedy: give one (target.chat_template), or pre-rendered rows {text} or {input_ids, loss_mask}"
            )
        try:
            text = self.tokenizer.get_chat_template(tools=list(row.tools) if row.tools else None)
        except ValueError as error:
            raise TargetError(f"the target's tokenizer: {error}") from error
        if text not in self._templates:
            self._templates[text] = ChatTemplate(text, self.tokenizer)
        return self._templates[text]

    def _tokens(self, row: TokenRow) -> Rendered:
        outside = [token for token in (min(row.input_ids), max(row.input_ids)) if not 0 <= token < self.id_limit]
        if outside:
            raise RowError(f"token id {outside[0]} is outside the tokenizer's vocabulary of {self.id_limit}")
        images: tuple[ImageReference, ...] = ()
        image_end = 0
        if row.images:
            try:
                images = tuple(refer_to_image(source) for source in row.images)
                image_end = self._image_processor().image_end(row.input_ids, images)
            except ImageError as error:
                raise RowError(str(error)) from error
        return Rendered(
            input_ids=np.array(row.input_ids, dtype=np.int32),
            loss_mask=np.array(row.loss_mask, dtype=np.bool_),
            images=images,
            image_end=image_end,
        )

    def _token_prompt(self, row: TokenRow) -> Rendered:
        whole = self._tokens(row)
        supervised = np.flatnonzero(whole.loss_mask)
        if not supervised.size:
            return whole
        before = np.flatnonzero(~whole.loss_mask[: supervised[-1]])
        if not before.size:
            raise RowError("nothing stands before the supervised tokens")
        cut = int(before[-1]) + 1
        if whole.image_end > cut:
            raise RowError("an image stands among or behind the supervised tokens")
        return replace(whole, input_ids=whole.input_ids[:cut], loss_mask=np.zeros(cut, dtype=np.bool_))

    def _only_last(self, messages: Sequence[Message]) -> bool:
        if self._last_turn_only == "auto":
            return any(_reasons(message) for message in messages)
        return self._last_turn_only == "always"


def render(row: Row, tokenizer: PreTrainedTokenizerBase, *, last_turn_only: LastTurnOnly = "never") -> Rendered:
    """One row on its own; RowError if it cannot be used. Many rows are faster through a `Renderer`."""
    renderer = Renderer(tokenizer, last_turn_only)
    prepared = renderer.prepare(row)
    return prepared if isinstance(prepared, Rendered) else renderer.encode([prepared])[0]


def _reasons(message: Message) -> bool:
    """Whether the assistant thinks aloud: templates drop that from earlier turns, so only the last one is faithful."""
    if message["role"] != "assistant":
        return False
    return any(message.get(field, "").strip() for field in REASONING_FIELDS) or bool(
        _REASONING_BLOCK.search(message["content"])
    )


def _end_of(encoding: Encoding, characters: int) -> int:
    """How many tokens the first `characters` of the text take."""
    last: int | None = encoding.char_to_token(characters - 1)
    assert last is not None, "every character of an image belongs to a token"
    return last + 1
