"""What becomes of the rows: the settings that decide it, the counts, and how far the work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchspec.core.config.schema import DataConfig, RunConfig
from torchspec.core.data.chat import LastTurnOnly, Rendered
from torchspec.core.data.rows import BadRow
from torchspec.core.errors import DataError

ProgressSink = Callable[[str, int, int], None]  # stage, done, total

BAD_ROWS_KEPT = 100
FILES_NAMED = 3
_INTERVAL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Which part of the data is used.

    `last_turn_only` concerns conversations: pre-rendered and tokenised rows have no turns and keep their whole mask.
    `answer_tokens`: samples are prompts alone, whose answers of at most so many tokens are written later; None: they
    are whole and have their answers. `cache_dir` None is the user's cache.
    """

    max_length: int = 2048
    min_supervised_tokens: int = 1
    last_turn_only: LastTurnOnly = "auto"
    answer_tokens: int | None = None
    cache_dir: Path | None = None

    @classmethod
    def of_training(cls, config: RunConfig) -> DatasetSettings:
        """Of what a run trains on."""
        written = config.on_policy
        return replace(cls.from_config(config.data), answer_tokens=written.max_new_tokens if written.enabled else None)

    @classmethod
    def from_config(cls, config: DataConfig) -> DatasetSettings:
        return cls(
            max_length=config.max_length,
            min_supervised_tokens=config.min_supervised_tokens,
            last_turn_only=config.last_turn_only,
            cache_dir=config.cache_dir,
        )


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of rows and of tokens; read = kept + filtered + bad_count.

    filtered    rows with fewer supervised tokens than asked for, after cutting (prompts: longer than max_length)
    bad         the first rows that could not be used, at most 100 of `bad_count`
    truncated   kept rows that were cut to max_length
    tokens, supervised_tokens    of the kept rows, after cutting
    """

    read: int
    kept: int
    filtered: int
    bad: tuple[BadRow, ...]
    bad_count: int
    truncated: int
    tokens: int
    supervised_tokens: int

    def __post_init__(self) -> None:
        assert self.read == self.kept + self.filtered + self.bad_count, "a row vanished without a count"

    def describe(self, bad_rows: int = 5) -> str:
        """The counts in a line, and the first bad rows in one each."""
        parts = [f"{self.read} rows read", f"{self.kept} kept"]
        parts += [f"{self.truncated} of them cut to the maximum length"] if self.truncated else []
        parts += [f"{self.filtered} filtered"] if self.filtered else []
        parts += [f"{self.bad_count} bad"] if self.bad_count else []
        supervised = f", {self.supervised_tokens} supervised" if self.supervised_tokens else ""
        parts.append(f"{self.tokens} tokens{supervised}")
        shown = [f"  {row}" for row in self.bad[:bad_rows]]
        if self.bad_count > len(shown) and shown:
            shown.append(f"  and {self.bad_count - len(shown)} more")
        return "\n".join([", ".join(parts), *shown])

    def to_json(self, files: tuple[Path, ...]) -> dict[str, Any]:
        """Bad rows name their file by its place in `files`, so that a report survives the files being moved."""
        numbers = {file: number for number, file in enumerate(files)}
        values = {name: value for name, value in vars(self).items() if name != "bad"}
        return values | {"bad": [[numbers[row.file], row.line, row.reason] for row in self.bad]}

    @classmethod
    def from_json(cls, values: dict[str, Any], files: tuple[Path, ...]) -> DataReport:
        bad = tuple(BadRow(file=files[number], line=line, reason=reason) for number, line, reason in values["bad"])
        return cls(**{**values, "bad": bad})


class Progress:
    """Passes on how far a stage is, a few times a second, and always its beginning and its end."""

    def __init__(self, sink: ProgressSink | None, stage: str, total: int) -> None:
        self._sink, self._stage, self._total = sink, stage, total
        self._next = 0.0
        self.show(0)

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self._sink is not None and now >= self._next:
            self._sink(self._stage, min(done, self._total), self._total)
            self._next = now + _INTERVAL_S

    def finish(self) -> None:
        if self._sink is not None:
            self._sink(self._stage, self._total, self._total)


class UniqueIds:
    """Ids name records, so the second sample with an id gets another one."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}

    def __call__(self, sample_id: str) -> str:
        unique = sample_id
        while unique in self._uses:
            self._uses[sample_id] += 1
            unique = f"{sample_id}#{self._uses[sample_id]}"
        self._uses[unique] = 1
        return unique


class Tally:
    """The counts of a `DataReport` while rows come in."""

    def __init__(self) -> None:
        self.filtered = self.truncated = self._kept = self._bad_count = self._tokens = self._supervised = 0
        self._bad: list[BadRow] = []

    def refuse(self, row: BadRow) -> None:
        self._bad_count += 1
        if self._bad_count <= BAD_ROWS_KEPT:
            self._bad.append(row)

    def keep(self, sample: Rendered) -> None:
        self._kept += 1
        self._tokens += sample.input_ids.size
        self._supervised += int(sample.loss_mask.sum())

    def report(self) -> DataReport:
        return DataReport(
            read=self._kept + self.filtered + self._bad_count,
            kept=self._kept,
            filtered=self.filtered,
            bad=tuple(self._bad),
            bad_count=self._bad_count,
            truncated=self.truncated,
            tokens=self._tokens,
            supervised_tokens=self._supervised,
        )


def nothing_left(report: DataReport, files: Sequence[Path], filtered: str) -> DataError:
    """The error when no row of the files is left; `filtered` says of the filtered ones why they are."""
    named = ", ".join(map(str, files[:FILES_NAMED]))
    named += f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
    reasons = [f"{report.bad_count} bad"] if report.bad_count else []
    reasons += [f"{report.filtered} {filtered}"] if report.filtered else []
    shown = "".join(f"\n  {row}" for row in report.bad[:5])
    return DataError(f"no row of {named} can be used, of {report.read} read: {', '.join(reasons)}{shown}")
