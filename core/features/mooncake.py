"""Features between machines: a Mooncake store, whose segments lie in processes and whose master knows what is where.

A record is two objects (`mooncake_record`). The head is claimed first, which only one writer can, and written last; so
a record is there whole or not at all. Both are pinned: what is acknowledged stays until it is removed.

A writer keeps a mark beside its records, and each head names it. A mark that is gone says that the master has forgotten
what it knew, or that the writer's segment is gone: then a missing record is a lost one.

Mooncake's data ports listen on every interface whatever they are told, and know no password: this is for networks whose
machines trust each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType

from torchspec.core import settings
from torchspec.core.errors import FeatureStoreError, UnavailableError
from torchspec.core.features.mooncake_link import Link, body_key, head_key
from torchspec.core.features.mooncake_read import Reader
from torchspec.core.features.mooncake_record import tokens_of
from torchspec.core.features.mooncake_settings import MooncakeSettings, probe
from torchspec.core.features.mooncake_write import usage, write_records
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage

__all__ = ["MooncakeSettings", "MooncakeStore"]

_POLL_SECONDS = 0.1


class MooncakeStore:
    """A `FeatureStore` for processes of any machines that share a master. `namespace` keeps runs apart.

    Features that are read lie in memory that is used again once no tensor refers to it. Where the master or a process
    that holds records is gone, every method raises StoreLostError, after `timeout` at most in each of its questions.
    """

    def __init__(self, config: MooncakeSettings, namespace: str) -> None:
        """UnavailableError without Mooncake; StoreLostError when no master answers."""
        self.config, self.namespace = config, namespace
        self._link = Link(_library(config), config, namespace)
        self._reader = Reader(self._link)
        self._prune_at = 1024

    def put(self, record_id: str, features: Features) -> RecordRef:
        return self.put_many([(record_id, features)])[0]

    def put_many(self, records: Sequence[tuple[str, Features]]) -> list[RecordRef]:
        """All of them or none; errors as `put`'s."""
        refs = write_records(self._link, records)
        if len(self._link.own) > self._prune_at:
            self.usage()
            self._prune_at = 2 * len(self._link.own) + 1024
        return refs

    def find(self, record_id: str) -> RecordRef:
        """The reference of a record that another process put, read from its head; its content is not checked."""
        with self._link.use() as client:
            nbytes = client.get_size(head_key(self._link.name(record_id)))
            self._link.check(nbytes, record_id)
            head = self._reader.heads([RecordRef(record_id=record_id, length=tokens_of(nbytes))])[0]
        if isinstance(head, FeatureStoreError):
            raise head
        return RecordRef(record_id=record_id, length=len(head.sums_T), checksum=head.facts.checksum)

    def get(self, ref: RecordRef) -> Features:
        found = self.get_many([ref])[0]
        if isinstance(found, FeatureStoreError):
            raise found
        return found

    def get_many(self, refs: Sequence[RecordRef]) -> list[Features | FeatureStoreError]:
        """In order; an error stands in the place of the record that it concerns, and costs no other."""
        found: list[Features | FeatureStoreError] = []
        with self._link.use():
            for ref, head in zip(refs, self._reader.heads(refs), strict=True):
                try:
                    if isinstance(head, FeatureStoreError):
                        raise head
                    found.append(self._reader.record(ref, head))
                except FeatureStoreError as error:
                    found.append(error)
        return found

    def remove(self, ref: RecordRef) -> None:
        name = self._link.name(ref.record_id)
        with self._link.use() as client:
            # The head last: until then nobody can claim the id and write a body that would be removed here.
            _, code = client.batch_remove(
                [body_key(name), head_key(name)], True
            )  # by force: reading leaves a lease behind
            if code != 0:
                raise self._link.error(code, ref.record_id)
            self._link.own.pop(name, None)

    def remove_all(self) -> None:
        """Every record that this process put and that is still there."""
        with self._link.use() as client:
            names = list(self._link.own)
            client.batch_remove([key for name in names for key in (body_key(name), head_key(name))], True)
            for name in names:
                self._link.own.pop(name, None)

    def usage(self) -> StoreUsage:
        """Of the records that this process put and nobody has removed."""
        return usage(self._link)

    def reconnect(self) -> None:
        """After StoreLostError: wait until the master answers and takes records again. Those from before are gone.

        StoreLostError when that is not so within `timeout`.
        """
        with self._link.use() as client:
            until = time.monotonic() + self.config.timeout
            self._retry(until, lambda: probe(self.config))
            self._retry(until, lambda: self._link.check(client.batch_is_exist([self.namespace])[0]))
            self._link.own.clear()
            self._link.writers.clear()
            self._link.mark = ""
            if self.config.segment_bytes:  # which the master has to hear of again before it places anything there
                self._retry(until, self._link.make_mark)

    @staticmethod
    def _retry(until: float, work: Callable[[], object]) -> None:
        while True:
            try:
                work()
                return
            except FeatureStoreError:
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """The segment goes, and with it every record in it. Features that were read stay valid."""
        self._link.close()


def _library(config: MooncakeSettings) -> ModuleType:
    """The client, told when to give up: by itself it waits 30 s for an answer and 90 s for a master."""
    milliseconds = str(int(config.timeout * 1000))
    seconds = str(max(1, round(config.timeout)))
    settings.set_defaults(
        {
            "MC_RPC_TIMEOUT_MS": milliseconds,
            "MC_RPC_CONNECT_TIMEOUT_MS": str(min(1000, int(milliseconds))),
            "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
            "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
            "MC_STORE_CLIENT_SETUP_RETRIES": "1",
            "MC_TCP_BIND_ADDRESS": config.hostname,
            "MC_LOG_LEVEL": "ERROR",
        }
    )
    try:
        from mooncake import store
    except ImportError as error:
        raise UnavailableError(
            f'Mooncake is not available ({error}): pip install "torchspec[mooncake]"; it also wants libibverbs1, '
            "libnuma1 and libcurl4 of the system"
        ) from error
    library: ModuleType = store
    return library
