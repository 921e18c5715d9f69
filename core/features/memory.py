"""Features handed over inside one process: the engine puts, the trainer takes."""

from __future__ import annotations

from torchspec.core.errors import DamagedRecordError, MissingRecordError
from torchspec.core.features.checks import check_features
from torchspec.core.interfaces.features import Features, FeatureStore, RecordRef, StoreUsage


class MemoryStore:
    """A `FeatureStore` whose records stay where the engine made them, uncopied."""

    def __init__(self) -> None:
        self._records: dict[str, Features] | None = {}

    @property
    def _open(self) -> dict[str, Features]:
        if self._records is None:
            raise RuntimeError("this store of features is closed")
        return self._records

    def put(self, record_id: str, features: Features) -> RecordRef:
        check_features(record_id, features)
        if self._open.setdefault(record_id, features) is not features:
            raise ValueError(f"record {record_id!r} is already stored: remove it before it is captured again")
        return RecordRef(record_id=record_id, length=features.input_ids_T.shape[0])

    def find(self, record_id: str) -> RecordRef:
        """The reference of a record that is there."""
        features = self._open.get(record_id)
        if features is None:
            raise MissingRecordError(f"record {record_id!r} is not stored: never captured, or already taken")
        return RecordRef(record_id=record_id, length=features.input_ids_T.shape[0])

    def get(self, ref: RecordRef) -> Features:
        features = self._open.get(ref.record_id)
        if features is None:
            raise MissingRecordError(f"record {ref.record_id!r} is not stored: never captured, or already taken")
        length = features.input_ids_T.shape[0]
        if length != ref.length:
            promised = f"its reference promises {ref.length}"
            raise DamagedRecordError(f"record {ref.record_id!r} has {length} tokens, {promised}")
        return features

    def remove(self, ref: RecordRef) -> None:
        if self._open.pop(ref.record_id, None) is None:
            raise MissingRecordError(f"record {ref.record_id!r} is not stored: never captured, or already taken")

    def usage(self) -> StoreUsage:
        tensors = [(f.input_ids_T, f.taps_TNH, f.last_TH) for f in self._open.values()]
        return StoreUsage(records=len(tensors), nbytes=sum(each.nbytes for record in tensors for each in record))

    def close(self) -> None:
        self._records = None

    def __len__(self) -> int:
        return len(self._open)


def take(store: FeatureStore, ref: RecordRef) -> Features:
    """The record, which is then forgotten."""
    features = store.get(ref)
    store.remove(ref)
    return features
