"""The in-memory store and the checks of every record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchspec.core.errors import DamagedRecordError, MissingRecordError
from torchspec.core.features.checks import check_features
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.features import Features, RecordRef


def features(length: int = 3) -> Features:
    return Features(
        input_ids_T=torch.arange(length),
        taps_TNH=torch.randn(length, 2, 4),
        last_TH=torch.randn(length, 4),
        tap_layers=(1, 5),
        norm_state="post_norm",
    )


def test_take_returns_what_was_put_and_removes_it() -> None:
    sink, stored = MemoryStore(), features()
    ref = sink.put("a", stored)
    assert ref == RecordRef(record_id="a", length=3)
    assert len(sink) == 1
    assert take(sink, ref) is stored
    assert len(sink) == 0
    with pytest.raises(MissingRecordError, match="'a' is not stored"):
        take(sink, ref)
    sink.put("a", stored)  # once taken, an id is free again


def test_duplicate_put_names_the_record_and_keeps_the_first() -> None:
    sink, first = MemoryStore(), features()
    ref = sink.put("a", first)
    with pytest.raises(ValueError, match="'a' is already stored"):
        sink.put("a", features())
    assert take(sink, ref) is first


def test_reference_of_another_length() -> None:
    sink = MemoryStore()
    sink.put("a", features())
    with pytest.raises(DamagedRecordError, match="'a' has 3 tokens, its reference promises 4"):
        take(sink, RecordRef(record_id="a", length=4))
    assert len(sink) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"input_ids_T": torch.arange(4)}, "4 token ids, 3 rows of taps"),
        ({"last_TH": torch.randn(2, 4)}, "2 of last"),
        ({"tap_layers": (1,)}, "2 taps for tap layers"),
        ({"last_TH": torch.randn(3, 5)}, "hidden size 4, last 5"),
        ({"taps_TNH": torch.randn(3, 8)}, "1, 3 and 2 axes"),
        ({"taps_TNH": torch.randn(3, 2, 4).bfloat16()}, "wrong dtypes"),
        ({"input_ids_T": torch.arange(3.0)}, "wrong dtypes"),
        ({"norm_state": "normed"}, "norm state 'normed'"),
        ({"last_TH": torch.randn(3, 4, requires_grad=True)}, "detached"),
    ],
)
def test_inconsistent_records_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        MemoryStore().put("sample-7", replace(features(), **change))  # type: ignore[arg-type]
    assert "sample-7" in str(caught.value)


def test_a_record_without_taps_is_fine() -> None:
    check_features("a", replace(features(), taps_TNH=torch.empty(3, 0, 4), tap_layers=()))
