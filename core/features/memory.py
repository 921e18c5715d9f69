"""Features handed over inside one process: the engine puts, the trainer takes."""

from __future__ import annotations

from torchspec.core.features.checks import check_features
from torchspec.core.interfaces.features import Features, RecordRef


class MemoryFeatureSink:
    """A `FeatureSink` whose records stay where the engine made them; taking one removes it."""

    def __init__(self) -> None:
        self._records: dict[str, Features] = {}

    def put(self, record_id: str, features: Features) -> RecordRef:
        """Store checked features; ValueError when they are inconsistent or the id is already present."""
        check_features(record_id, features)
        if record_id in self._records:
            raise ValueError(f"record {record_id!r} is already stored: every sample is captured once, then taken")
        self._records[record_id] = features
        return RecordRef(record_id=record_id, length=features.input_ids_T.shape[0])

    def take(self, ref: RecordRef) -> Features:
        """The record, which is then forgotten; LookupError when it is not there, or not of the promised length."""
        features = self._records.get(ref.record_id)
        if features is None:
            raise LookupError(f"record {ref.record_id!r} is not stored: never captured, or already taken")
        length = features.input_ids_T.shape[0]
        if length != ref.length:
            raise LookupError(f"record {ref.record_id!r} has {length} tokens, its reference promises {ref.length}")
        del self._records[ref.record_id]
        return features

    def __len__(self) -> int:
        return len(self._records)
