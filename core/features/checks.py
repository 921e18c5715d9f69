"""What every record of features must satisfy before it is stored."""

from __future__ import annotations

import torch

from torchspec.core.interfaces.features import Features


def check_features(record_id: str, features: Features) -> None:
    """Raise ValueError naming the record when its tensors disagree in length, tap count, hidden size or kind."""
    ids, taps, last = features.input_ids_T, features.taps_TNH, features.last_TH
    if ids.ndim != 1 or taps.ndim != 3 or last.ndim != 2:
        raise ValueError(
            f"record {record_id!r}: input_ids, taps and last must have 1, 3 and 2 axes, got shapes "
            f"{list(ids.shape)}, {list(taps.shape)}, {list(last.shape)}"
        )
    if not ids.shape[0] == taps.shape[0] == last.shape[0] > 0:
        raise ValueError(
            f"record {record_id!r}: {ids.shape[0]} token ids, {taps.shape[0]} rows of taps and {last.shape[0]} of last "
            "must be the same positive number"
        )
    if taps.shape[1] != len(features.tap_layers):
        raise ValueError(f"record {record_id!r}: {taps.shape[1]} taps for tap layers {features.tap_layers}")
    if taps.shape[1] and taps.shape[2] != last.shape[1]:
        raise ValueError(f"record {record_id!r}: taps have hidden size {taps.shape[2]}, last {last.shape[1]}")
    if ids.dtype != torch.int64 or taps.dtype != last.dtype or not last.is_floating_point():
        raise ValueError(f"record {record_id!r}: wrong dtypes {ids.dtype}, {taps.dtype}, {last.dtype}")
    if features.norm_state not in ("pre_norm", "post_norm"):
        raise ValueError(f"record {record_id!r}: norm state {features.norm_state!r}")
    if taps.requires_grad or last.requires_grad:
        raise ValueError(f"record {record_id!r}: features must be detached")
