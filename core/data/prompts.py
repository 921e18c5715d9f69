"""Conversations as prompts to answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from torchspec.core.data.chat import Rendered, RenderedText, Renderer
from torchspec.core.data.messages import RowError
from torchspec.core.data.report import DatasetSettings, ProgressSink, Tally, UniqueIds, nothing_left
from torchspec.core.data.rows import BadRow, Row, RowReader, TextRow
from torchspec.core.data.tokenise import tokenise
from torchspec.core.interfaces.engine import Images

logger = logging.getLogger(__name__)


def text_prompt(renderer: Renderer, row: Row) -> RenderedText | Rendered:
    """`Renderer.prompt` for whoever answers text alone: RowError for a row with images."""
    if not isinstance(row, TextRow) and row.images:
        raise RowError(
            "it has images, and what answers here takes text alone (what answers them: docs/targets.md#images)"
        )
    return renderer.prompt(row)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens for a target to continue; `images` stand among them already, in this order."""

    sample_id: str
    input_ids: tuple[int, ...]
    images: Images = ()


def load_prompts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: DatasetSettings,
    progress: ProgressSink | None = None,
    *,
    count: int | None = None,
    images: bool = False,
) -> list[Prompt]:
    """Every conversation cut before its last assistant turn, with the generation prompt added.

    `count` takes that many of them at even distances, not the first ones: neighbours in a file are often alike.

    A conversation that ends with another's message is a prompt as it is. Prompts longer than `settings.max_length`
    are left out, never cut: a cut one would ask something else. `images`: whether who answers takes any; if not, those
    with images are bad rows. Bad rows are skipped; what was left out goes to the log. Raises DataError for files that
    cannot be read at all and when no prompt is left.
    """
    reader, renderer = RowReader(files), Renderer(tokenizer)
    tally, unique = Tally(), UniqueIds()
    prompts: list[Prompt] = []
    prepare = renderer.prompt if images else partial(text_prompt, renderer)
    for outcome in tokenise(reader, renderer, prepare, progress):
        if isinstance(outcome, BadRow):
            tally.refuse(outcome)
        elif outcome[1].input_ids.size > settings.max_length:
            tally.filtered += 1
        else:
            tally.keep(outcome[1])
            prompts.append(
                Prompt(
                    sample_id=unique(outcome[0].sample_id),
                    input_ids=tuple(outcome[1].input_ids.tolist()),
                    images=outcome[1].images,
                )
            )
    report = tally.report()
    if not prompts:
        raise nothing_left(report, reader.files, f"prompts of more than {settings.max_length} tokens (max_length)")
    if report.bad_count or report.filtered:
        logger.warning("prompts: %s", report.describe())
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // count] for place in range(count)]
