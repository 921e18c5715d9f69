"""HCCL behind torch.distributed, and what it does not take.

all-to-all   torch_npu's list of supported APIs names fp32 alone, and HCCL's own more: what is only moved is sent as
             fp32 words wherever its rows are whole words
sums         no fp64, and averages are no operation of its own: core only ever sums, in fp32 or narrower
0-dim        refused in all-to-all, where every part has rows anyway
any source   there is no receiving from whoever sends first; core always names the peer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torchspec.devices._collectives import TorchCommunication

BACKEND = "cpu:gloo,npu:hccl"
_WORD = torch.float32


class HcclCommunication(TorchCommunication):
    """Collectives of NPUs over HCCL, of the host's tensors over gloo."""

    def __init__(self, backend: str = BACKEND) -> None:
        super().__init__(backend)

    def all_to_all(
        self, parts: Sequence[Tensor], group: ProcessGroup, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        dtype, shape = parts[0].dtype, parts[0].shape[1:]
        received = super().all_to_all([_as_words(part) for part in parts], group, rows)
        return [part.view(dtype).view(len(part), *shape) for part in received]


def _as_words(part: Tensor) -> Tensor:
    """[rows, words] fp32 of the same bytes, or [rows, values] as they are where a row is no whole number of words."""
    flat = part.reshape(len(part), part.shape[1:].numel()).contiguous()
    if flat.shape[1] * flat.element_size() % _WORD.itemsize:
        return flat
    if flat.storage_offset() * flat.element_size() % _WORD.itemsize:
        flat = flat.clone()
    return flat.view(_WORD)
