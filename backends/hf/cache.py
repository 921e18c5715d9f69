"""The target's key/value cache: appends without copying, forgets in constant time, closes gaps.

Shape letters: B sequences, Hk key/value heads, S columns of the cache, D head size, L columns kept.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

Rollback = Literal["full", "window", "none"]

_FIRST_COLUMNS = 256

_NAMES = ("cache", "past_key_values", "cache_params")
"""What forward passes call their cache: in newer releases of transformers; in older ones; there in recurrent models."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose keys and values are views of larger buffers, so that a step writes only its own columns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._columns = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hk, n, D] of each; all columns so far come back."""
        start, end = self._columns, self._columns + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            columns = max(_FIRST_COLUMNS, end + end // 2)
            self._buffers = (self._grown(0, key_states, columns), self._grown(1, value_states, columns))
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        return self._show(end)

    def _grown(self, which: int, new: Tensor, columns: int) -> Tensor:
        grown = new.new_empty(*new.shape[:2], columns, new.shape[-1])
        if self._buffers is not None and self._columns:
            grown[:, :, : self._columns] = self._buffers[which][:, :, : self._columns]
        return grown

    def _show(self, columns: int) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        self._columns = columns
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns (transformers counts downwards)."""
        assert tokens_to_remove <= 0
        if self._buffers is not None:
            self._show(self._columns + tokens_to_remove)

    def gather(self, column_BL: Tensor) -> None:
        """Row b keeps the columns column_BL[b], in that order."""
        if self._buffers is None:
            return
        index = column_BL[:, None, :, None]
        kept = [buffer.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[3])) for buffer in self._buffers]
        self._buffers = (kept[0], kept[1])
        self._show(column_BL.shape[1])

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        if self._buffers is not None:
            keys, values = (buffer[rows] for buffer in self._buffers)
            self._buffers = (keys, values)
            self._show(self._columns)


def rollback_of(model: PreTrainedModel) -> Rollback:
    """What the cache of this model can forget.

    full    every layer attends to everything: columns can be masked, moved and dropped, rows differ in length
    window  sliding windows among the layers: the last tokens of a single sequence can be dropped
    none    a recurrent state, or another that cannot be taken back
    """
    # Older releases of transformers give recurrent layers an ordinary cache layer, so its kind alone proves nothing.
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if model._is_stateful or not layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return "none"
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    if kinds == {DynamicLayer}:
        return "full"
    if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and hasattr(cache, "activate_past_recording"):
        return "window"
    return "none"


def cache_name(model: PreTrainedModel) -> str:
    """The name under which this model's forward takes its cache and hands it back."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in accepted), _NAMES[0])


def new_cache(config: PreTrainedConfig, rollback: Rollback, *, recording: bool) -> Cache | None:
    """An empty cache; `recording` keeps what a rollback of sliding windows needs. None: the model makes its own."""
    if rollback == "none":
        return None
    cache = DynamicCache(config=config)
    if rollback == "full":
        cache.layers = [GrowingLayer() for _ in cache.layers]
    elif recording:
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
    return cache


def compaction(keep_BS: Tensor, columns: int) -> Tensor:
    """Column indices [B, columns] that move every row's used columns to the right end, in order.

    `columns` is the longest row's count; shorter rows keep unused columns on the left.
    """
    order_BS = torch.argsort(keep_BS.to(torch.int8), dim=1, stable=True)
    return order_BS[:, keep_BS.shape[1] - columns :]
