"""vLLM's plug-in point for what it keeps of a request: hidden states go straight into the feature store.

vLLM's speculative method `extract_hidden_states` keeps the chosen layers' outputs of every token in its paged cache,
beside keys and values; so they are whole after chunked prefill, and there for tokens that the prefix cache held. When
a request has finished, a KV connector may read the cache before its blocks are used again.
The base class is vLLM's own example of one; what is replaced is where it writes, and how it says that it has.

Shape letters: T tokens of the request, I layers kept, N taps, H target hidden size.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)

from torchspec.backends.vllm.worker.arguments import layer_ids
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.features import Features
from torchspec.core.workers.reports import report_failure

log = logging.getLogger(__name__)

RECORD = "torchspec_record"
"""The request's transfer parameter that names its record; a request without one is not kept."""


class TorchspecConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Writes records; of ranks that hold the target together the first one does, each having the whole states."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        ours = self._kv_transfer_config.get_from_extra_config("torchspec", {})
        self._taps: tuple[int, ...] = tuple(ours["taps"])
        ids = layer_ids(self._taps, ours["layers"])
        self._tap_places = [ids.index(tap + 1) for tap in self._taps]
        self._last_place = ids.index(ours["layers"])
        self._store = SharedMemoryStore(root=Path(ours["store"]), capacity=ours["store_bytes"])

    def wait_for_save(self) -> None:
        """No lock files: a record appears when it is whole."""

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks until they are read, unless nobody asked for the hidden states."""
        keep, _ = super().request_finished(request, block_ids)
        record_id = (request.kv_transfer_params or {}).get(RECORD)
        pending = self._pending_saves.get(request.request_id)
        if not keep or pending is None or record_id is None:
            self._pending_saves.pop(request.request_id, None)
            return False, None
        pending.filename = record_id
        return True, None

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        slots = torch.tensor(pending.block_ids)[:, None] * self._block_size + torch.arange(self._block_size)
        length = len(pending.token_ids)
        # A copy, in the order of the device's own work: the blocks may be used again after it.
        states_TIH = extract_from_kv_cache(self._kv_cache, slots.flatten()[:length].to(self._kv_cache.device), length)
        self._req_copy_events[pending.req_id] = _Copied()
        copied = None
        if states_TIH.device.type != "cpu":  # the writing thread has another stream than the one that copies
            copied = torch.get_device_module(states_TIH.device).Event()
            copied.record()
        self._executor.submit(self._put, pending.filename, pending.token_ids, states_TIH, copied)

    def _put(self, record_id: str, token_ids_T: Tensor, states_TIH: Tensor, copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            states_TIH = states_TIH.cpu()
            if not bool(states_TIH.isfinite().all()):
                report_failure(self._store, record_id, f"hidden states that are not finite in {states_TIH.dtype}")
                return
            features = Features(
                input_ids_T=token_ids_T.to(torch.int64),
                taps_TNH=states_TIH[:, self._tap_places],
                last_TH=states_TIH[:, self._last_place],
                tap_layers=self._taps,
                norm_state="pre_norm",
            )
            self._store.put(record_id, features)
        except Exception as error:  # it must reach whoever waits for the record, whatever it is
            log.exception("record %s could not be written", record_id)
            report_failure(self._store, record_id, f"{type(error).__name__}: {error}")


class _Copied:
    """Stands where vLLM expects an event of its copy stream."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
