"""The ledger of samples: what does not add up is said, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest

from torchspec.core.training.ledger import LedgerError, balance, ledger_row

SAMPLES, PER_EPOCH = 5, 3


def rows() -> list[dict[str, Any]]:
    """Two epochs of 5 samples in steps of 2, 2 and 1; sample 3 could not be captured in the second."""
    epochs = [[[0, 4], [2, 1], [3]], [[3, 1], [0, 2], [4]]]
    return [
        ledger_row(epoch * PER_EPOCH + place + 1, epoch, batch, [3] if epoch and 3 in batch else [])
        for epoch, batches in enumerate(epochs)
        for place, batch in enumerate(batches)
    ]


def of(made: list[dict[str, Any]], steps: int = 6) -> Any:
    return balance(made, samples=SAMPLES, steps=steps, steps_per_epoch=PER_EPOCH)


def test_it_balances() -> None:
    found = of(rows())
    found.check()
    assert [(e.trained, e.quarantined, e.left) for e in found.epochs] == [(5, 0, 0), (4, 1, 0)]
    assert rows()[3]["trained"] == [1]


def test_an_epoch_that_was_not_finished_has_samples_left() -> None:
    found = of(rows()[:4], steps=4)
    found.check()
    assert [(e.trained, e.quarantined, e.left) for e in found.epochs] == [(5, 0, 0), (1, 1, 3)]


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    made = rows()
    made[step - 1] = {**made[step - 1], **values}
    return made


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (changed(2, trained=[2]), r"epoch 0: 1 samples are missing, the first \[1\]"),
        (changed(2, trained=[2, 1, 0]), r"epoch 0: samples \[0\] stand in it more than once"),
        (changed(4, trained=[1, 3]), r"epoch 1: samples \[3\] stand in it more than once"),
        (changed(3, trained=[3, 9]), r"epoch 0: samples \[9\] are not in the data"),
        (rows()[:-1], "not those of the steps 1 to 6: look at step 6"),
        ([*rows(), rows()[-1]], "not those of the steps 1 to 6"),
    ],
)
def test_what_is_wrong_is_named(made: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(LedgerError, match=complaint):
        of(made).check()
