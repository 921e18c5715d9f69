"""Putting records into a Mooncake store: claimed, written, acknowledged; all of a call or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchspec.core.features.checks import check_features
from torchspec.core.features.mooncake_link import FULL, PRESENT, Link, body_key, head_key
from torchspec.core.features.mooncake_record import describe, head_bytes, write_head
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage


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


def write_records(link: Link, records: Sequence[tuple[str, Features]]) -> list[RecordRef]:
    """All of them or none; errors as `FeatureStore.put`'s."""
    with link.use() as client:
        names = [link.name(record_id) for record_id, _ in records]
        for (record_id, features), name in zip(records, names, strict=True):
            check_features(record_id, features)
            if names.count(name) > 1:
                raise ValueError(f"record {record_id!r} is given twice")
        link.make_mark()
        drafts = [_draft(link, record_id, features) for record_id, features in records]
        _check_room(link, drafts)
        _claim(link, names, drafts)
        try:
            _write(link, names, drafts)
        except BaseException:
            client.batch_put_session_revoke([head_key(name) for name in names])
            client.batch_remove([body_key(name) for name in names], True)
            raise
        for name, draft in zip(names, drafts, strict=True):
            link.own[name] = draft.nbytes
    return [draft.ref for draft in drafts]


def usage(link: Link) -> StoreUsage:
    """Of the records that this process put and nobody has removed."""
    with link.use() as client:
        names = list(link.own)
        codes = client.batch_is_exist([head_key(name) for name in names]) if names else []
        for name, code in zip(names, codes, strict=True):
            link.check(code)
            if code == 0:
                link.own.pop(name, None)
        sizes = list(link.own.values())
    return StoreUsage(records=len(sizes), nbytes=sum(sizes))


def _draft(link: Link, record_id: str, features: Features) -> _Draft:
    head = describe(record_id, features, link.mark)
    place = link.regions.lease(head_bytes(len(head.sums_T)))
    write_head(head, place)
    tensors = features.taps_TNH, features.last_TH
    # TCP sends from any memory of the host; other ways want it registered, which costs more than a copy.
    if link.config.protocol != "tcp" or not all(each.is_cpu and each.is_contiguous() for each in tensors):
        staged = head.features(link.regions.lease(head.body_bytes))
        staged.taps_TNH.copy_(features.taps_TNH)
        staged.last_TH.copy_(features.last_TH)
        features = staged
    body = tuple(each for each in (features.taps_TNH, features.last_TH) if each.nbytes)
    ref = RecordRef(record_id=record_id, length=len(head.sums_T), checksum=head.facts.checksum)
    return _Draft(ref=ref, head=place, body=body, kept=features)


def _check_room(link: Link, drafts: Sequence[_Draft]) -> None:
    """In this process's share: the master would place what does not fit in the segments of others."""
    need, share = sum(draft.nbytes for draft in drafts), link.config.segment_bytes
    if share and need + sum(link.own.values()) > share and need + usage(link).nbytes > share:
        raise link.error(FULL, drafts[0].ref.record_id, nbytes=need)


def _claim(link: Link, names: Sequence[str], drafts: Sequence[_Draft]) -> None:
    """A plain put of a key that is there says that all is well and keeps the old value; a claim does not."""
    heads = [head_key(name) for name in names]
    codes = link.client.batch_put_session_start(heads, [draft.head.nbytes for draft in drafts], link.placing)
    bad = [(code, draft) for code, draft in zip(codes, drafts, strict=True) if code != 0]
    if not bad:
        return
    claimed = [head for head, code in zip(heads, codes, strict=True) if code == 0]
    if claimed:
        link.client.batch_put_session_revoke(claimed)
    code, draft = bad[0]
    if code in PRESENT:
        raise ValueError(
            f"record {draft.ref.record_id!r} is already stored in {link.namespace}, or being written: remove it before"
        )
    raise link.error(code, draft.ref.record_id, nbytes=draft.head.nbytes)


def _write(link: Link, names: Sequence[str], drafts: Sequence[_Draft]) -> None:
    client, heads, bodies = link.client, [head_key(name) for name in names], [body_key(name) for name in names]
    mark, *stale = client.batch_is_exist([link.mark, *bodies])
    if mark <= 0:
        raise link.forgotten() if mark == 0 else link.error(mark)
    leftover = [body for body, code in zip(bodies, stale, strict=True) if code]
    if leftover:
        client.batch_remove(leftover, True)
    lengths = [[part.nbytes for part in draft.body] for draft in drafts]
    places = [[part.data_ptr() for part in draft.body] for draft in drafts]
    codes = client.batch_put_from_multi_buffers(bodies, places, lengths, link.placing)
    for code, draft, sizes in zip(codes, drafts, lengths, strict=True):
        if code < 0:
            raise link.error(code, draft.ref.record_id, nbytes=sum(sizes))
    codes = client.batch_put_from_multi_buffer_ranges(
        heads,
        [[draft.head.data_ptr()] for draft in drafts],
        [[draft.head.nbytes] for draft in drafts],
        [[0]] * len(heads),
    )
    codes += client.batch_put_session_end(heads)
    for code in codes:
        link.check(code, drafts[0].ref.record_id)
