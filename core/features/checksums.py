"""Is a record what was put? One number for each row, so that whoever reads a part of the rows can check its part.

A row's number is the sum of its bytes taken as integers, modulo 2**64: one pass over the data at the speed of memory,
on any device. It finds rows that are cut short, stale, zeroed or of another record. Which rows belong together and in
which order is fixed by the record's checksum, a cryptographic digest of the ids and of all those numbers.

Shape letters: T tokens of the sample.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from torchspec.core.interfaces.features import Features

_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


def row_sums(features: Features) -> Tensor:
    """int64 [T], on the features' device."""
    return _sums(features.taps_TNH.flatten(1)) + _sums(features.last_TH)


def checksum(features: Features, sums_T: Tensor) -> str:
    """Hexadecimal digest of everything in the record; of its hidden states through their row sums."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([list(features.tap_layers), features.norm_state, str(features.last_TH.dtype)]).encode())
    for tensor in (features.input_ids_T, sums_T):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _sums(rows: Tensor) -> Tensor:
    """Of each row [T, bytes], in the widest words that divide it."""
    data = rows.detach().contiguous().view(torch.uint8) if rows.shape[1] else rows.new_zeros(len(rows), 0)
    if not data.shape[1]:
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    word = next(kind for kind in _WORDS if data.shape[1] % kind.itemsize == 0)
    return data.view(word).sum(1, dtype=torch.int64)
