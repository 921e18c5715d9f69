"""Records as a worker hands them out itself: for machines that share no memory and have no store between them.

Each is a file of the worker's, sent as it is; what comes is verified as from a directory.
"""

from __future__ import annotations

from torchspec.core.errors import FeatureStoreError, MissingRecordError, StoreLostError
from torchspec.core.features.directory import record_of
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage
from torchspec.core.workers import protocol
from torchspec.core.workers.client import EngineLostError, WorkerClient

SECONDS = 300.0
"""For one record to come."""


class RecordStream:
    """A `FeatureStore` of one worker, in its clients: they take records out and remove them."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client
        self._closed = False

    def put(self, record_id: str, features: Features) -> RecordRef:
        raise RuntimeError(f"only the worker at {self._client.url} puts records there")

    def get(self, ref: RecordRef) -> Features:
        """StoreLostError when the worker is gone: what it had is gone with it."""
        self._check_open()
        try:
            data = self._client.fetch(protocol.RECORD, {"id": ref.record_id}, seconds=SECONDS)
        except EngineLostError as error:
            raise StoreLostError(str(error)) from error
        if data is None:
            raise MissingRecordError(
                f"record {ref.record_id!r} is not at the worker {self._client.url}: never captured, or already taken"
            )
        return record_of(ref, data, self._client.url)

    def remove(self, ref: RecordRef) -> None:
        """Nothing of a worker that is gone."""
        self._check_open()
        try:
            self._client.call(protocol.DROP, {"id": ref.record_id}, seconds=30.0, what="to drop a record")
        except EngineLostError as error:
            raise FeatureStoreError(str(error)) from error

    def usage(self) -> StoreUsage:
        self._check_open()
        told = self._client.call(protocol.USAGE, {}, seconds=30.0, what="what it holds")
        return StoreUsage(records=told["records"], nbytes=told["nbytes"])

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the records of {self._client.url} are closed")
