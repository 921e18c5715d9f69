"""Rows to tokens as a stream, in batches that keep the tokenizer's threads busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torchspec.core.data.chat import Rendered, RenderedText, Renderer
from torchspec.core.data.messages import RowError
from torchspec.core.data.report import Progress, ProgressSink
from torchspec.core.data.rows import BadRow, Row, RowReader

_BATCH_CHARACTERS = 1 << 17  # a tenth of a second of tokenising on a slow machine
_BATCH_ROWS = 1024

Outcome = tuple[Row, Rendered] | BadRow


def tokenise(
    reader: RowReader,
    renderer: Renderer,
    prepare: Callable[[Row], RenderedText | Rendered],
    progress: ProgressSink | None,
) -> Iterator[Outcome]:
    """Every row of `reader` in its order, `prepare`d (`renderer.prepare` or `renderer.prompt`) and tokenised.

    One batch is tokenised in the background, without the interpreter's lock, while the next one is rendered.
    `progress` counts bytes of the files.
    """
    watch = Progress(progress, "tokenise", reader.total_bytes)
    with ThreadPoolExecutor(1) as worker:
        pending: Future[list[Outcome]] | None = None
        for batch in _batches(reader, prepare, watch):
            following = worker.submit(_encode, renderer, batch)
            if pending is not None:
                yield from pending.result()
            pending = following
        if pending is not None:
            yield from pending.result()
    watch.finish()


Prepared = tuple[Row, RenderedText | Rendered] | BadRow


def _batches(
    reader: RowReader, prepare: Callable[[Row], RenderedText | Rendered], watch: Progress
) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    characters = 0
    for row in reader:
        watch.show(reader.bytes_read)
        if isinstance(row, BadRow):
            batch.append(row)
        else:
            try:
                prepared = prepare(row)
            except RowError as error:
                batch.append(BadRow(file=row.file, line=row.line, reason=str(error)))
            else:
                batch.append((row, prepared))
                characters += len(prepared.text) if isinstance(prepared, RenderedText) else 0
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(renderer: Renderer, batch: list[Prepared]) -> list[Outcome]:
    texts = [item[1] for item in batch if not isinstance(item, BadRow) and isinstance(item[1], RenderedText)]
    encoded = iter(renderer.encode(texts))
    outcomes: list[Outcome] = []
    for item in batch:
        if isinstance(item, BadRow):
            outcomes.append(item)
        else:
            row, prepared = item
            outcomes.append((row, prepared if isinstance(prepared, Rendered) else next(encoded)))
    return outcomes
