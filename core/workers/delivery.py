"""How features come from a worker to those who asked for them: a store that both ends open.

The worker tells its clients, as JSON, which kind it is and what they need to open it:

    {"kind": "shared", "root": DIRECTORY}      a directory in this machine's shared memory
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec.core.errors import FeatureStoreError
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.features import FeatureStore


def make_delivery(wanted: Mapping[str, Any], nbytes: int) -> tuple[FeatureStore, dict[str, Any]]:
    """The worker's end, of at most so many bytes, and what clients need."""
    if wanted.get("kind") == "shared":
        store = SharedMemoryStore(capacity=nbytes)
        return store, {"kind": "shared", "root": str(store.root)}
    raise FeatureStoreError(f"no way of delivering features is called {wanted.get('kind')!r}")


def open_delivery(facts: Mapping[str, Any]) -> FeatureStore:
    """A client's end; FeatureStoreError says why it cannot be had here."""
    if facts.get("kind") == "shared":
        return SharedMemoryStore(root=Path(facts["root"]))
    raise FeatureStoreError(f"the worker delivers by {facts.get('kind')!r}, which this torchspec does not know")
