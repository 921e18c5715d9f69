"""Hidden states of whole sequences, for training.

Shape letters: B sequences, T tokens of the longest, N taps, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.backends.api import Captured, CaptureRequest, Features, FeatureSink, NormState, Quarantined
from torchspec.backends.hf.taps import TapRecorder
from torchspec.backends.hf.target import HfTarget
from torchspec.core.features.checks import check_features


@torch.no_grad()
def capture(
    target: HfTarget, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink, norm_state: NormState
) -> list[Captured]:
    """Run the target once over the batch and put one record per request; the output head never runs.

    Sequences are padded on the right. A causal target cannot see what stands to the right, so no padding mask is
    needed, the unmasked attention kernel applies (no [T, T] mask), and what is padded does not reach a record.
    A sample whose states are not finite is quarantined.
    """
    target.check_taps(taps)
    for request in batch:
        target.check_tokens(f"sample {request.record_id!r}", request.input_ids)
    if not batch:
        return []
    ids_BT = pad_right([request.input_ids for request in batch]).to(target.device)
    last_layer = len(target.layers) - 1
    recorder = TapRecorder(target, taps, also=(last_layer,) if norm_state == "pre_norm" else ())
    with recorder:
        output = target.base(input_ids=ids_BT, use_cache=False)
    last_BTH = recorder.outputs[last_layer] if norm_state == "pre_norm" else output.last_hidden_state

    records = []
    for row, request in enumerate(batch):
        length = len(request.input_ids)
        features = Features(
            input_ids_T=torch.as_tensor(request.input_ids, dtype=torch.int64),
            taps_TNH=recorder.of_row(row, length),
            last_TH=last_BTH[row, :length].clone(),
            tap_layers=tuple(taps),
            norm_state=norm_state,
        )
        check_features(request.record_id, features)
        records.append(features)
    found: list[Captured] = []
    for request, features, finite in zip(batch, records, _finite(records), strict=True):
        if finite:
            found.append(sink.put(request.record_id, features))
        else:
            found.append(Quarantined(record_id=request.record_id, reason=_not_finite(target)))
    return found


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, T], short sequences filled up with token 0."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _finite(records: Sequence[Features]) -> list[bool]:
    finite_B = torch.stack([record.taps_TNH.isfinite().all() & record.last_TH.isfinite().all() for record in records])
    return list(finite_B.tolist())


def _not_finite(target: HfTarget) -> str:
    return (
        f"{target.spec.path} gives hidden states that are not finite in {target.model.dtype}: "
        "try target.dtype=bfloat16 or float32"
    )
