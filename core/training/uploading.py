"""The features of the next forward pass go to the device while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from torchspec.core.interfaces.device import Runtime
from torchspec.core.interfaces.features import Features, Quarantined

Found = dict[int, Features | Quarantined]
"""Of a document's number."""


class Uploader:
    """One pass at a time, in a thread: copying into memory that a device can read takes the host's time, too."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def start(self, brought: Callable[[], Found]) -> Future[Callable[[], Found]]:
        """Of features that `brought` waits for -> what gives them on the device, to be called where they are used."""
        return self._thread.submit(self._upload, brought)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _upload(self, brought: Callable[[], Found]) -> Callable[[], Found]:
        found = brought()
        features = {
            number: each
            for number, each in found.items()
            if isinstance(each, Features) and each.last_TH.device.type == "cpu"  # a store may give them on the device
        }
        wait = self._runtime.upload([x for each in features.values() for x in (each.taps_TNH, each.last_TH)])
        return lambda: _on_device(found, features, wait())


def _on_device(found: Found, features: Mapping[int, Features], copies: list[Tensor]) -> Found:
    pairs = zip(copies[::2], copies[1::2], strict=True)
    moved = {
        number: replace(each, taps_TNH=taps_TNH, last_TH=last_TH)
        for (number, each), (taps_TNH, last_TH) in zip(features.items(), pairs, strict=True)
    }
    return {**found, **moved}
