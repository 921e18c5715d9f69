"""ledger.jsonl: which samples each step trained and which it could not capture, along the history that survived.

A row belongs to a step, and a resumed run first removes the rows of the steps that it will run again: so each sample
of an epoch must stand in it once, whatever was killed meanwhile.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchspec.core.errors import TorchspecError

KIND = "ledger"


class LedgerError(TorchspecError):
    """Samples were lost or trained twice."""


def ledger_row(step: int, epoch: int, batch: Sequence[int], quarantined: Iterable[int]) -> dict[str, Any]:
    """Of one step, which counts from 1; samples by their number in the dataset."""
    lost = sorted(quarantined)
    return {
        "kind": KIND,
        "step": step,
        "epoch": epoch,
        "trained": [index for index in batch if index not in lost],
        "quarantined": lost,
    }


@dataclass(frozen=True, kw_only=True)
class EpochBalance:
    """Of an epoch's samples: trained + quarantined + left = all of them. `left`: the run ended before their step."""

    epoch: int
    trained: int
    quarantined: int
    left: int


@dataclass(frozen=True, kw_only=True)
class Balance:
    """`samples` are those of the dataset, after filtering. `wrong`: what does not add up, in words."""

    samples: int
    epochs: tuple[EpochBalance, ...]
    wrong: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        if self.wrong:
            raise LedgerError("the ledger of the run does not balance: " + "; ".join(self.wrong))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The rows, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def balance(rows: Sequence[dict[str, Any]], *, samples: int, steps: int, steps_per_epoch: int) -> Balance:
    """Of a run of `steps` steps over `samples` samples."""
    wrong = []
    found = [row["step"] for row in rows]
    if found != list(range(1, steps + 1)):
        gaps = sorted(set(range(1, steps + 1)) ^ set(found))
        wrong.append(f"its rows are not those of the steps 1 to {steps}: look at step {(gaps or found)[0]}")
    epochs = []
    for epoch in range(-(-steps // steps_per_epoch)):
        mine = [row for row in rows if (row["step"] - 1) // steps_per_epoch == epoch]
        trained = Counter(index for row in mine for index in row["trained"])
        lost = Counter(index for row in mine for index in row["quarantined"])
        twice = sorted(index for index, count in (trained + lost).items() if count > 1)
        foreign = sorted(index for index in trained | lost if not 0 <= index < samples)
        left = samples - len(trained | lost)
        whole = (epoch + 1) * steps_per_epoch <= steps
        if twice:
            wrong.append(f"epoch {epoch}: samples {twice[:8]} stand in it more than once")
        if foreign:
            wrong.append(f"epoch {epoch}: samples {foreign[:8]} are not in the data")
        if whole and left:
            missing = sorted(set(range(samples)) - set(trained | lost))
            wrong.append(f"epoch {epoch}: {left} samples are missing, the first {missing[:8]}")
        epochs.append(EpochBalance(epoch=epoch, trained=len(trained), quarantined=len(lost), left=left))
    return Balance(samples=samples, epochs=tuple(epochs), wrong=tuple(wrong))
