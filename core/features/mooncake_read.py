"""Reading records from a Mooncake store: heads in one question, then each body, verified as it comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from torchspec.core.errors import FeatureStoreError
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.mooncake_link import REFUSED, Link, body_key, head_key
from torchspec.core.features.mooncake_record import Head, head_bytes, read_head, tokens_of
from torchspec.core.interfaces.features import Features, RecordRef

_CHUNK_BYTES = 64 << 20  # smaller ones cost more in answers than sums over cached memory save
_UNREADABLE = (ValueError, KeyError, TypeError)


class Reader:
    """Its caller has entered `link.use()`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reading: dict[str, int] = {}
        self._lock = threading.Lock()

    def heads(self, refs: Sequence[RecordRef]) -> list[Head | FeatureStoreError]:
        """In order; an error stands in the place of the head that it concerns."""
        places = [self._link.regions.lease(head_bytes(ref.length)) for ref in refs]
        keys = [head_key(self._link.name(ref.record_id)) for ref in refs]
        codes = self._link.client.batch_get_into(
            keys, [each.data_ptr() for each in places], [each.nbytes for each in places]
        )
        return [self._head_of(*each) for each in zip(refs, keys, places, codes, strict=True)]

    def record(self, ref: RecordRef, head: Head) -> Features:
        """DamagedRecordError when it is not what the reference and the head promise."""
        place = self._link.regions.lease(head.body_bytes)
        features = head.features(place)
        if head.facts.checksum != ref.checksum:
            promise = f"checksum {head.facts.checksum}, promised {ref.checksum or 'none'}"
            raise self._link.damaged(ref, f"is another one than its reference promises: {promise}")
        intact = checksum(features, head.sums_T) == ref.checksum
        if not intact or not self._read_rows(ref, features, head.sums_T):
            raise self._link.damaged(ref, "changed since it was written (checksum)")
        return features

    def _head_of(self, ref: RecordRef, key: str, place: Tensor, code: int) -> Head | FeatureStoreError:
        if code == REFUSED:  # it is larger than the place for it
            code = self._link.client.get_size(key)
        if code < 0:
            return self._link.error(code, ref.record_id)
        if code != place.nbytes:
            return self._link.damaged(ref, f"has {tokens_of(code)} tokens, its reference promises {ref.length}")
        try:
            head = read_head(place)
        except _UNREADABLE as error:
            return self._link.damaged(ref, f"cannot be read: {error}")
        self._link.writers.add(head.facts.writer)
        return head

    def _read_rows(self, ref: RecordRef, features: Features, sums_T: Tensor) -> bool:
        """Fill the features chunk by chunk, and stop at the first that is wrong; -> are they right?"""
        key = body_key(self._link.name(ref.record_id))
        taps, last = features.taps_TNH.flatten(1), features.last_TH
        rows = max(1, _CHUNK_BYTES // (taps[0].nbytes + last[0].nbytes))
        with self._session(key, ref):
            for first in range(0, len(last), rows):
                part = _rows(features, first, first + rows)
                pieces = [each for each in (part.taps_TNH, part.last_TH) if each.nbytes]
                offsets = [first * taps[0].nbytes, taps.nbytes + first * last[0].nbytes][-len(pieces) :]
                code = self._link.client.batch_get_into_multi_buffer_ranges(
                    [key], [[each.data_ptr() for each in pieces]], [[each.nbytes for each in pieces]], [offsets]
                )[0]
                if code == REFUSED:
                    raise self._link.damaged(ref, "is shorter than it says")
                self._link.check(code, ref.record_id)
                if not row_sums(part).equal(sums_T[first : first + rows]):
                    return False
        return True

    @contextmanager
    def _session(self, key: str, ref: RecordRef) -> Iterator[None]:
        """The client asks the master once where the object lies. Threads that read the same one share the answer."""
        with self._lock:
            self._reading[key] = self._reading.get(key, 0) + 1
        try:
            self._link.check(self._link.client.batch_get_session_start([key])[0], ref.record_id)
            yield
        finally:
            with self._lock:
                self._reading[key] -= 1
                if not self._reading[key]:
                    del self._reading[key]
                    self._link.client.batch_get_session_end([key])


def _rows(features: Features, start: int, stop: int) -> Features:
    return Features(
        input_ids_T=features.input_ids_T[start:stop],
        taps_TNH=features.taps_TNH[start:stop],
        last_TH=features.last_TH[start:stop],
        tap_layers=features.tap_layers,
        norm_state=features.norm_state,
    )
