"""How features come from a worker to those who asked for them: a store that both ends open.

What the worker is told, and what it tells its clients, as JSON:

    {"kind": "shared"}                                    files in this machine's shared memory
    {"kind": "device"}                                    buffers shared on the device that the engine runs on
    {"kind": "mooncake", "namespace", "settings": {...}}  a Mooncake store: see `features.mooncake`
    {"kind": "stream"}                                    the worker itself, over its protocol: needs nothing else

with the "root" of the store for the first two.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.core.errors import FeatureStoreError, StoreFullError, StoreLostError
from torchspec.core.features.mooncake import MooncakeSettings, MooncakeStore
from torchspec.core.features.pool import PooledStore
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features, FeatureStore, RecordRef
from torchspec.core.workers.client import WorkerClient
from torchspec.core.workers.record_stream import RecordStream
from torchspec.core.workers.runner import WorkerSettings

STREAM = "stream"
_POLL_SECONDS = 0.02


def make_delivery(wanted: Mapping[str, Any], settings: WorkerSettings) -> tuple[FeatureStore, dict[str, Any]]:
    """The worker's end, of at most `store_bytes`, and what clients need."""
    kind, nbytes = wanted.get("kind"), settings.store_bytes
    if kind == "shared":
        shared = SharedMemoryStore(capacity=nbytes)
        return shared, {"kind": kind, "root": str(shared.root)}
    if kind == "device":
        from torchspec.core import registry  # adapters are not in an engine's own environment

        pool = PooledStore(_shared_memory(registry.load_device(settings.device)), capacity=nbytes)
        return pool, {"kind": kind, "root": str(pool.root)}
    if kind == "mooncake":
        given = MooncakeSettings(**wanted["settings"])
        mine = replace(given, segment_bytes=nbytes, hostname=own_address(given.master))
        return MooncakeStore(mine, wanted["namespace"]), dict(wanted)
    raise FeatureStoreError(f"no way of delivering features is called {kind!r}")


def open_delivery(facts: Mapping[str, Any], device: Device, client: WorkerClient) -> FeatureStore:
    """A client's end; FeatureStoreError says why it cannot be had here."""
    kind = facts.get("kind")
    if kind == "shared":
        return SharedMemoryStore(root=Path(facts["root"]))
    if kind == "device":
        return PooledStore(_shared_memory(device), root=Path(facts["root"]))
    if kind == "mooncake":
        given = MooncakeSettings(**facts["settings"])
        return MooncakeStore(replace(given, segment_bytes=0, hostname=own_address(given.master)), facts["namespace"])
    if kind == STREAM:
        return RecordStream(client)
    raise FeatureStoreError(f"the worker delivers by {kind!r}, which this torchspec does not know")


def put_in_time(store: FeatureStore, record_id: str, features: Features, deadline: float) -> RecordRef:
    """Once there is room; StoreFullError at the deadline. A store that was lost is joined again once."""
    again = True
    while True:
        try:
            return store.put(record_id, features)
        except StoreFullError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
        except StoreLostError:
            if not again:
                raise
            again = False
            reconnect(store)


def reconnect(store: FeatureStore) -> None:
    """Where a store can be joined again; what was in it is gone."""
    if isinstance(store, MooncakeStore):
        store.reconnect()


def own_address(peer: str) -> str:
    """The address under which `peer` (HOST:PORT) reaches this machine. Nothing is sent."""
    host, _, port = peer.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        address: str = probe.getsockname()[0]
    return address


def _shared_memory(device: Device) -> Any:
    if device.shared_memory is None:
        raise FeatureStoreError(f"device {device.name} cannot share memory between processes: pipeline.store=shared")
    return device.shared_memory
