"""Features between machines: a Mooncake store, whose segments lie in processes and whose master knows what is where.

A record is two objects (`mooncake_record`). The head is claimed first, which only one writer can, and written last; so
a record is there whole or not at all. Both are pinned: what is acknowledged stays until it is removed.

A writer keeps a mark beside its records, and each head names it. A mark that is gone says that the master has forgotten
what it knew, or that the writer's segment is gone: then a missing record is a lost one.

Mooncake's data ports listen on every interface whatever they are told, and know no password: this is for networks whose
machines trust each other.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from torchspec.core import settings
from torchspec.core.errors import (
    DamagedRecordError,
    FeatureStoreError,
    MissingRecordError,
    StoreFullError,
    StoreLostError,
    UnavailableError,
)
from torchspec.core.features.checks import check_features
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.mooncake_record import (
    Head,
    describe,
    head_bytes,
    read_head,
    tokens_of,
    write_head,
)
from torchspec.core.features.registered import Regions
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage

_FULL, _BUSY, _REFUSED = -200, -703, -600
_ABSENT = (-704, _BUSY)  # a claim that is not finished is no record yet
_PRESENT = (-705, _REFUSED)  # claimed by another process, or by this one
_CHUNK_BYTES = 64 << 20  # smaller ones cost more in answers than sums over cached memory save
_INNER_BYTES = 1 << 20  # the client's own buffer, which registered memory does without
_LEAST_SEGMENT = 16 << 20
_MARK_BYTES = 64
_POLL_SECONDS = 0.1
_UNREADABLE = (ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class MooncakeSettings:
    """JSON. What a process needs to join the store.

    master         HOST:PORT of `mooncake_master`
    metadata       "P2PHANDSHAKE": processes ask each other; or the URL of a metadata server that somebody runs
    rdma_devices   comma-separated; "" finds them
    hostname       the address under which other machines reach this one
    segment_bytes  memory for records that this process offers; 0 for one that only reads
    buffer_bytes   registered memory that is kept for further reads and writes while it is not in use
    timeout        seconds that one question to the master, or a transfer that stands still, may take

    The first store of a process sets Mooncake's timeouts for all of them.
    """

    master: str
    metadata: str = "P2PHANDSHAKE"
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""
    hostname: str = "127.0.0.1"
    segment_bytes: int = 0
    buffer_bytes: int = 256 << 20
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if 0 < self.segment_bytes < _LEAST_SEGMENT:
            raise ValueError(f"a segment of Mooncake has {_LEAST_SEGMENT} bytes at least, got {self.segment_bytes}")


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A record about to be written: where its parts lie now. `kept` holds that memory."""

    ref: RecordRef
    head: Tensor
    body: tuple[Tensor, ...]
    kept: Features

    @property
    def nbytes(self) -> int:
        return self.head.nbytes + sum(part.nbytes for part in self.body)


class MooncakeStore:
    """A `FeatureStore` for processes of any machines that share a master. `namespace` keeps runs apart.

    Features that are read lie in memory that is used again once no tensor refers to it. Where the master or a process
    that holds records is gone, every method raises StoreLostError, after `timeout` at most in each of its questions.
    """

    def __init__(self, config: MooncakeSettings, namespace: str) -> None:
        """UnavailableError without Mooncake; StoreLostError when no master answers."""
        self.config, self.namespace = config, namespace
        self._closed = False
        self._inside = 0
        self._calm = threading.Condition()
        self._own: dict[str, int] = {}
        self._prune_at = 1024
        self._writers: set[str] = set()
        self._mark = ""
        self._reading: dict[str, int] = {}
        library = _library(config)
        _probe(config)
        self._client = library.MooncakeDistributedStore()
        code = self._client.setup(
            config.hostname, config.metadata, config.segment_bytes, _INNER_BYTES, config.protocol, config.rdma_devices,
            config.master,
        )  # fmt: skip
        if code != 0:
            raise FeatureStoreError(
                f"the Mooncake store of master {config.master} cannot be joined with a segment of "
                f"{config.segment_bytes / 1e6:.0f} MB over {config.protocol} (code {code})"
            )
        self._placing = library.ReplicateConfig()
        self._placing.with_hard_pin = True
        if config.segment_bytes:
            self._placing.preferred_segment = self._client.get_hostname()
        self._regions = Regions(self._register, self._client.unregister_buffer, keep_bytes=config.buffer_bytes)

    def put(self, record_id: str, features: Features) -> RecordRef:
        return self.put_many([(record_id, features)])[0]

    def put_many(self, records: Sequence[tuple[str, Features]]) -> list[RecordRef]:
        """All of them or none; errors as `put`'s."""
        with self._use() as client:
            names = [self._name(record_id) for record_id, _ in records]
            for (record_id, features), name in zip(records, names, strict=True):
                check_features(record_id, features)
                if names.count(name) > 1:
                    raise ValueError(f"record {record_id!r} is given twice")
            self._make_mark()
            drafts = [self._draft(record_id, features) for record_id, features in records]
            self._check_room(drafts)
            self._claim(names, drafts)
            try:
                self._write(names, drafts)
            except BaseException:
                client.batch_put_session_revoke([_head(name) for name in names])
                client.batch_remove([_body(name) for name in names], True)
                raise
            for name, draft in zip(names, drafts, strict=True):
                self._own[name] = draft.nbytes
        if len(self._own) > self._prune_at:
            self.usage()
            self._prune_at = 2 * len(self._own) + 1024
        return [draft.ref for draft in drafts]

    def find(self, record_id: str) -> RecordRef:
        """The reference of a record that another process put, read from its head; its content is not checked."""
        with self._use() as client:
            nbytes = client.get_size(_head(self._name(record_id)))
            self._check(nbytes, record_id)
            head = self._heads([RecordRef(record_id=record_id, length=tokens_of(nbytes))])[0]
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
        with self._use():
            for ref, head in zip(refs, self._heads(refs), strict=True):
                try:
                    if isinstance(head, FeatureStoreError):
                        raise head
                    found.append(self._body_of(ref, head))
                except FeatureStoreError as error:
                    found.append(error)
        return found

    def remove(self, ref: RecordRef) -> None:
        name = self._name(ref.record_id)
        with self._use() as client:
            # The head last: until then nobody can claim the id and write a body that would be removed here.
            _, code = client.batch_remove([_body(name), _head(name)], True)  # by force: reading leaves a lease behind
            if code != 0:
                raise self._error(code, ref.record_id)
            self._own.pop(name, None)

    def remove_all(self) -> None:
        """Every record that this process put and that is still there."""
        with self._use() as client:
            names = list(self._own)
            client.batch_remove([key for name in names for key in (_body(name), _head(name))], True)
            for name in names:
                self._own.pop(name, None)

    def usage(self) -> StoreUsage:
        """Of the records that this process put and nobody has removed."""
        with self._use() as client:
            names = list(self._own)
            codes = client.batch_is_exist([_head(name) for name in names]) if names else []
            for name, code in zip(names, codes, strict=True):
                self._check(code)
                if code == 0:
                    self._own.pop(name, None)
            sizes = list(self._own.values())
        return StoreUsage(records=len(sizes), nbytes=sum(sizes))

    def reconnect(self) -> None:
        """After StoreLostError: wait until the master answers and takes records again. Those from before are gone.

        StoreLostError when that is not so within `timeout`.
        """
        with self._use() as client:
            until = time.monotonic() + self.config.timeout
            self._retry(until, lambda: _probe(self.config))
            self._retry(until, lambda: self._check(client.batch_is_exist([self.namespace])[0]))
            self._own.clear()
            self._writers.clear()
            self._mark = ""
            if self.config.segment_bytes:  # which the master has to hear of again before it places anything there
                self._retry(until, self._make_mark)

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
        with self._calm:
            if self._closed:
                return
            self._closed = True
            # The library crashes when it is used after this; what is going on ends by its own timeouts.
            self._calm.wait_for(lambda: self._inside == 0)
        self._regions.close()
        self._client.close()

    @contextmanager
    def _use(self) -> Iterator[Any]:
        with self._calm:
            if self._closed:
                raise RuntimeError(f"the feature store {self.namespace} is closed")
            self._inside += 1
        try:
            yield self._client
        finally:
            with self._calm:
                self._inside -= 1
                self._calm.notify_all()

    def _name(self, record_id: str) -> str:
        digest = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f"{self.namespace}/{digest}"

    def _register(self, address: int, nbytes: int) -> None:
        code = self._client.register_buffer(address, nbytes)
        if code != 0:
            raise FeatureStoreError(
                f"Mooncake cannot register {nbytes / 1e6:.0f} MB for {self.config.protocol} ({code})"
            )

    def _make_mark(self) -> None:
        if self._mark:
            return
        mark = f"{self.namespace}/writer-{secrets.token_hex(8)}"
        code = self._client.put_from(mark, self._regions.lease(_MARK_BYTES).data_ptr(), _MARK_BYTES, self._placing)
        if code != 0:
            raise self._error(code, nbytes=_MARK_BYTES)
        self._mark = mark

    def _draft(self, record_id: str, features: Features) -> _Draft:
        head = describe(record_id, features, self._mark)
        place = self._regions.lease(head_bytes(len(head.sums_T)))
        write_head(head, place)
        tensors = features.taps_TNH, features.last_TH
        # TCP sends from any memory of the host; other ways want it registered, which costs more than a copy.
        if self.config.protocol != "tcp" or not all(each.is_cpu and each.is_contiguous() for each in tensors):
            staged = head.features(self._regions.lease(head.body_bytes))
            staged.taps_TNH.copy_(features.taps_TNH)
            staged.last_TH.copy_(features.last_TH)
            features = staged
        body = tuple(each for each in (features.taps_TNH, features.last_TH) if each.nbytes)
        ref = RecordRef(record_id=record_id, length=len(head.sums_T), checksum=head.facts.checksum)
        return _Draft(ref=ref, head=place, body=body, kept=features)

    def _check_room(self, drafts: Sequence[_Draft]) -> None:
        """In this process's share: the master would place what does not fit in the segments of others."""
        need, share = sum(draft.nbytes for draft in drafts), self.config.segment_bytes
        if share and need + sum(self._own.values()) > share and need + self.usage().nbytes > share:
            raise self._error(_FULL, drafts[0].ref.record_id, nbytes=need)

    def _claim(self, names: Sequence[str], drafts: Sequence[_Draft]) -> None:
        """A plain put of a key that is there says that all is well and keeps the old value; a claim does not."""
        heads = [_head(name) for name in names]
        codes = self._client.batch_put_session_start(heads, [draft.head.nbytes for draft in drafts], self._placing)
        bad = [(code, draft) for code, draft in zip(codes, drafts, strict=True) if code != 0]
        if not bad:
            return
        claimed = [head for head, code in zip(heads, codes, strict=True) if code == 0]
        if claimed:
            self._client.batch_put_session_revoke(claimed)
        code, draft = bad[0]
        if code in _PRESENT:
            raise ValueError(
                f"record {draft.ref.record_id!r} is already stored in {self.namespace}, or being written: remove it "
                "before"
            )
        raise self._error(code, draft.ref.record_id, nbytes=draft.head.nbytes)

    def _write(self, names: Sequence[str], drafts: Sequence[_Draft]) -> None:
        client, heads, bodies = self._client, [_head(name) for name in names], [_body(name) for name in names]
        mark, *stale = client.batch_is_exist([self._mark, *bodies])
        if mark <= 0:
            raise self._forgotten() if mark == 0 else self._error(mark)
        leftover = [body for body, code in zip(bodies, stale, strict=True) if code]
        if leftover:
            client.batch_remove(leftover, True)
        lengths = [[part.nbytes for part in draft.body] for draft in drafts]
        places = [[part.data_ptr() for part in draft.body] for draft in drafts]
        codes = client.batch_put_from_multi_buffers(bodies, places, lengths, self._placing)
        for code, draft, sizes in zip(codes, drafts, lengths, strict=True):
            if code < 0:
                raise self._error(code, draft.ref.record_id, nbytes=sum(sizes))
        codes = client.batch_put_from_multi_buffer_ranges(
            heads,
            [[draft.head.data_ptr()] for draft in drafts],
            [[draft.head.nbytes] for draft in drafts],
            [[0]] * len(heads),
        )
        codes += client.batch_put_session_end(heads)
        for code in codes:
            self._check(code, drafts[0].ref.record_id)

    def _heads(self, refs: Sequence[RecordRef]) -> list[Head | FeatureStoreError]:
        places = [self._regions.lease(head_bytes(ref.length)) for ref in refs]
        keys = [_head(self._name(ref.record_id)) for ref in refs]
        codes = self._client.batch_get_into(
            keys, [each.data_ptr() for each in places], [each.nbytes for each in places]
        )
        return [self._head_of(*each) for each in zip(refs, keys, places, codes, strict=True)]

    def _head_of(self, ref: RecordRef, key: str, place: Tensor, code: int) -> Head | FeatureStoreError:
        if code == _REFUSED:  # it is larger than the place for it
            code = self._client.get_size(key)
        if code < 0:
            return self._error(code, ref.record_id)
        if code != place.nbytes:
            return self._damaged(ref, f"has {tokens_of(code)} tokens, its reference promises {ref.length}")
        try:
            head = read_head(place)
        except _UNREADABLE as error:
            return self._damaged(ref, f"cannot be read: {error}")
        self._writers.add(head.facts.writer)
        return head

    def _body_of(self, ref: RecordRef, head: Head) -> Features:
        place = self._regions.lease(head.body_bytes)
        features = head.features(place)
        if head.facts.checksum != ref.checksum:
            promise = f"checksum {head.facts.checksum}, promised {ref.checksum or 'none'}"
            raise self._damaged(ref, f"is another one than its reference promises: {promise}")
        intact = checksum(features, head.sums_T) == ref.checksum
        if not intact or not self._read_rows(ref, features, head.sums_T):
            raise self._damaged(ref, "changed since it was written (checksum)")
        return features

    def _read_rows(self, ref: RecordRef, features: Features, sums_T: Tensor) -> bool:
        """Fill the features chunk by chunk, and stop at the first that is wrong; -> are they right?"""
        key = _body(self._name(ref.record_id))
        taps, last = features.taps_TNH.flatten(1), features.last_TH
        rows = max(1, _CHUNK_BYTES // (taps[0].nbytes + last[0].nbytes))
        with self._session(key, ref):
            for first in range(0, len(last), rows):
                part = _rows(features, first, first + rows)
                pieces = [each for each in (part.taps_TNH, part.last_TH) if each.nbytes]
                offsets = [first * taps[0].nbytes, taps.nbytes + first * last[0].nbytes][-len(pieces) :]
                code = self._client.batch_get_into_multi_buffer_ranges(
                    [key], [[each.data_ptr() for each in pieces]], [[each.nbytes for each in pieces]], [offsets]
                )[0]
                if code == _REFUSED:
                    raise self._damaged(ref, "is shorter than it says")
                self._check(code, ref.record_id)
                if not row_sums(part).equal(sums_T[first : first + rows]):
                    return False
        return True

    @contextmanager
    def _session(self, key: str, ref: RecordRef) -> Iterator[None]:
        """The client asks the master once where the object lies. Threads that read the same one share the answer."""
        with self._calm:
            self._reading[key] = self._reading.get(key, 0) + 1
        try:
            self._check(self._client.batch_get_session_start([key])[0], ref.record_id)
            yield
        finally:
            with self._calm:
                self._reading[key] -= 1
                if not self._reading[key]:
                    del self._reading[key]
                    self._client.batch_get_session_end([key])

    def _check(self, code: int, record_id: str = "") -> None:
        if code < 0:
            raise self._error(code, record_id)

    def _error(self, code: int, record_id: str = "", *, nbytes: int = 0) -> FeatureStoreError:
        """What a negative code means."""
        if code in _ABSENT:
            marks = list(self._writers | ({self._mark} if self._mark else set()))
            codes = self._client.batch_is_exist(marks) if marks else []
            if not all(each > 0 for each in codes):
                return self._forgotten(record_id)
            return MissingRecordError(
                f"record {record_id!r} is not in the feature store {self.namespace} of {self.config.master}: never "
                "captured, already taken, or lost with a process that held it"
            )
        if code == _FULL:
            held = sum(self._own.values())
            return StoreFullError(
                f"record {record_id!r} takes {nbytes / 1e6:.1f} MB, and there is no room for it: this process offers "
                f"{self.config.segment_bytes / 1e6:.1f} MB to the feature store {self.namespace} and has put "
                f"{held / 1e6:.1f} MB"
            )
        if code == -800:
            return StoreLostError(
                f"record {record_id!r} cannot be transferred: the process that holds it has ended or cannot be reached "
                f"(code {code}). Its records must be captured again; then `reconnect`"
            )
        if code <= -900:
            return StoreLostError(
                f"the Mooncake master at {self.config.master} does not answer (code {code}): start it again, then "
                "`reconnect`; what was stored must be captured again"
            )
        return FeatureStoreError(f"record {record_id!r}: Mooncake fails with code {code}")

    def _forgotten(self, record_id: str = "") -> StoreLostError:
        about = f"record {record_id!r} is lost: " if record_id else ""
        return StoreLostError(
            f"{about}the Mooncake master at {self.config.master} was started again, or a process that held records has "
            f"ended: records of {self.namespace} must be captured again; `reconnect` before"
        )

    def _damaged(self, ref: RecordRef, what: str) -> DamagedRecordError:
        return DamagedRecordError(f"record {ref.record_id!r} in the feature store {self.namespace} {what}")


def _head(name: str) -> str:
    return f"{name}/head"


def _body(name: str) -> str:
    return f"{name}/body"


def _rows(features: Features, start: int, stop: int) -> Features:
    return Features(
        input_ids_T=features.input_ids_T[start:stop],
        taps_TNH=features.taps_TNH[start:stop],
        last_TH=features.last_TH[start:stop],
        tap_layers=features.tap_layers,
        norm_state=features.norm_state,
    )


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


def _probe(config: MooncakeSettings) -> None:
    host, _, port = config.master.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=config.timeout).close()
    except OSError as error:
        raise StoreLostError(
            f"no Mooncake master answers at {config.master} ({error}): start one, or correct its address"
        ) from error
    except ValueError:
        raise ValueError(f"the address of a Mooncake master is HOST:PORT, got {config.master!r}") from None
