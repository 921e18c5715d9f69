"""Errors meant for people. The command line prints them without a traceback and exits with `exit_code`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TorchspecError(Exception):
    """Something the user can understand and act on. The message says what, where and what to do."""

    exit_code = 1


class DataError(TorchspecError):
    """The conversations cannot be used: unreadable, empty, or every row refused."""


class TargetError(TorchspecError):
    """The target model directory is missing something or is of a kind that is not supported."""


class LostOnTextError(TargetError):
    """An engine that died, or did not answer, every time that it was asked to write for the same prompts."""


class CheckpointError(TorchspecError):
    """A checkpoint or exported draft is missing, truncated, or belongs to something else."""


class FeatureStoreError(TorchspecError):
    """A record of features cannot be stored or given out."""


class MissingRecordError(FeatureStoreError):
    """There is no record of this id: never stored, already removed, or stored elsewhere."""


class DamagedRecordError(FeatureStoreError):
    """A record is not what was stored, or not what its reference promises."""


class StoreFullError(FeatureStoreError):
    """A record does not fit into what the store may hold."""


class StoreLostError(FeatureStoreError):
    """What keeps the records does not answer, or has forgotten them: they must be captured again."""


class SampleError(TorchspecError):
    """A sample that somebody brings cannot be trained on; the message says everything that is wrong with it."""


class NonFiniteError(TorchspecError):
    """A loss or gradient that is not a number. Raised before the update: parameters and schedule stay as they were."""


class PeerError(TorchspecError):
    """Another rank failed; the message is that rank's."""


class ClosedError(TorchspecError):
    """Something was asked of what has been closed."""


class UnavailableError(TorchspecError):
    """A device or engine was named explicitly and is not available here; says why and what to install."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a configuration."""

    field: str
    message: str
    value: object = None
    choices: tuple[str, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: " + self.message.replace("\n", "\n    ")
        if self.value is not None:
            shown = list(self.value) if isinstance(self.value, tuple) else self.value
            text += f" (got {shown!r})"
        if self.choices:
            text += f"\n    choices: {', '.join(self.choices)}"
        if self.remedy:
            text += f"\n    remedy: {self.remedy}"
        return text


class ConfigError(TorchspecError):
    """Every problem of a configuration, reported together."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} configuration error{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))
