"""One process's place in a Mooncake store: its client, its registered memory, and what the client's codes mean."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torchspec.core.errors import (
    DamagedRecordError,
    FeatureStoreError,
    MissingRecordError,
    StoreFullError,
    StoreLostError,
)
from torchspec.core.features.mooncake_settings import MooncakeSettings, probe
from torchspec.core.features.registered import Regions
from torchspec.core.interfaces.features import RecordRef

FULL, REFUSED, _BUSY = -200, -600, -703
PRESENT = (-705, REFUSED)  # claimed by another process, or by this one
_ABSENT = (-704, _BUSY)  # a claim that is not finished is no record yet
_INNER_BYTES = 1 << 20  # the client's own buffer, which registered memory does without
_MARK_BYTES = 64


class Link:
    """What reading and writing share. `own` are the bytes of the records that this process put, by name; `mark` is the
    key of its own mark, and `writers` are those of the marks that were met in heads."""

    def __init__(self, library: ModuleType, config: MooncakeSettings, namespace: str) -> None:
        """StoreLostError when no master answers."""
        self.config, self.namespace = config, namespace
        self.own: dict[str, int] = {}
        self.writers: set[str] = set()
        self.mark = ""
        self._closed = False
        self._inside = 0
        self._calm = threading.Condition()
        probe(config)
        self.client = library.MooncakeDistributedStore()
        code = self.client.setup(
            config.hostname, config.metadata, config.segment_bytes, _INNER_BYTES, config.protocol, config.rdma_devices,
            config.master,
        )  # fmt: skip
        if code != 0:
            raise FeatureStoreError(
                f"the Mooncake store of master {config.master} cannot be joined with a segment of "
                f"{config.segment_bytes / 1e6:.0f} MB over {config.protocol} (code {code})"
            )
        self.placing = library.ReplicateConfig()
        self.placing.with_hard_pin = True
        if config.segment_bytes:
            self.placing.preferred_segment = self.client.get_hostname()
        self.regions = Regions(self._register, self.client.unregister_buffer, keep_bytes=config.buffer_bytes)

    def close(self) -> None:
        """The segment goes, and with it every record in it. Features that were read stay valid."""
        with self._calm:
            if self._closed:
                return
            self._closed = True
            # The library crashes when it is used after this; what is going on ends by its own timeouts.
            self._calm.wait_for(lambda: self._inside == 0)
        self.regions.close()
        self.client.close()

    @contextmanager
    def use(self) -> Iterator[Any]:
        """The client, which stays open meanwhile; RuntimeError when it is closed."""
        with self._calm:
            if self._closed:
                raise RuntimeError(f"the feature store {self.namespace} is closed")
            self._inside += 1
        try:
            yield self.client
        finally:
            with self._calm:
                self._inside -= 1
                self._calm.notify_all()

    def name(self, record_id: str) -> str:
        """What the keys of a record begin with."""
        digest = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f"{self.namespace}/{digest}"

    def make_mark(self) -> None:
        """Once; FeatureStoreError when there is no room for it, or no master."""
        if self.mark:
            return
        mark = f"{self.namespace}/writer-{secrets.token_hex(8)}"
        code = self.client.put_from(mark, self.regions.lease(_MARK_BYTES).data_ptr(), _MARK_BYTES, self.placing)
        if code != 0:
            raise self.error(code, nbytes=_MARK_BYTES)
        self.mark = mark

    def check(self, code: int, record_id: str = "") -> None:
        """Raise what a negative code means."""
        if code < 0:
            raise self.error(code, record_id)

    def error(self, code: int, record_id: str = "", *, nbytes: int = 0) -> FeatureStoreError:
        """What a negative code means."""
        if code in _ABSENT:
            marks = list(self.writers | ({self.mark} if self.mark else set()))
            codes = self.client.batch_is_exist(marks) if marks else []
            if not all(each > 0 for each in codes):
                return self.forgotten(record_id)
            return MissingRecordError(
                f"record {record_id!r} is not in the feature store {self.namespace} of {self.config.master}: never "
                "captured, already taken, or lost with a process that held it"
            )
        if code == FULL:
            held = sum(self.own.values())
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

    def forgotten(self, record_id: str = "") -> StoreLostError:
        about = f"record {record_id!r} is lost: " if record_id else ""
        return StoreLostError(
            f"{about}the Mooncake master at {self.config.master} was started again, or a process that held records has "
            f"ended: records of {self.namespace} must be captured again; `reconnect` before"
        )

    def damaged(self, ref: RecordRef, what: str) -> DamagedRecordError:
        return DamagedRecordError(f"record {ref.record_id!r} in the feature store {self.namespace} {what}")

    def _register(self, address: int, nbytes: int) -> None:
        code = self.client.register_buffer(address, nbytes)
        if code != 0:
            raise FeatureStoreError(
                f"Mooncake cannot register {nbytes / 1e6:.0f} MB for {self.config.protocol} ({code})"
            )


def head_key(name: str) -> str:
    return f"{name}/head"


def body_key(name: str) -> str:
    return f"{name}/body"
