"""Hidden states of whole sequences, for training.

Shape letters: B sequences, T tokens of the longest, N taps, H target hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchspec.backends.api import (
    Captured,
    CaptureRequest,
    Features,
    FeatureSink,
    Images,
    NormState,
    Quarantined,
    TargetError,
)
from torchspec.backends.hf.taps import TapRecorder
from torchspec.backends.hf.target import HfTarget
from torchspec.core.features.checks import check_features
from torchspec.core.models.images import ImageError


@torch.no_grad()
def capture(
    target: HfTarget, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink, norm_state: NormState
) -> list[Captured]:
    """Run the target once over the batch and put one record per request; the output head never runs.

    Sequences are padded on the right. A causal target cannot see what stands to the right, so no padding mask is
    needed, the unmasked attention kernel applies (no [T, T] mask), and what is padded does not reach a record.
    A sample with images runs by itself, since how several are put together differs from processor to processor.
    A sample whose states are not finite, or whose images are not those that were tokenised, is quarantined.
    """
    target.check_taps(taps)
    for request in batch:
        target.check_tokens(f"sample {request.record_id!r}", request.input_ids)
    found: dict[str, Captured] = {}
    texts = [request for request in batch if not request.images]
    groups: list[tuple[list[CaptureRequest], dict[str, Tensor]]] = [(texts, {})] if texts else []
    for request in batch:
        if request.images:
            try:
                groups.append(
                    (
                        [request],
                        image_inputs(target, f"sample {request.record_id!r}", request.input_ids, request.images),
                    )
                )
            except ImageError as error:
                found[request.record_id] = Quarantined(record_id=request.record_id, reason=str(error))
    for group, images in groups:
        for request, features, finite in zip(group, *_run(target, group, images, taps, norm_state), strict=True):
            if finite:
                found[request.record_id] = sink.put(request.record_id, features)
            else:
                found[request.record_id] = Quarantined(record_id=request.record_id, reason=_not_finite(target))
    return [found[request.record_id] for request in batch]


def _run(
    target: HfTarget,
    batch: Sequence[CaptureRequest],
    images: Mapping[str, Tensor],
    taps: Sequence[int],
    norm_state: NormState,
) -> tuple[list[Features], list[bool]]:
    """One forward pass; the features of each request, and whether they are finite."""
    ids_BT = pad_right([request.input_ids for request in batch]).to(target.device)
    last_layer = len(target.layers) - 1
    recorder = TapRecorder(target, taps, also=(last_layer,) if norm_state == "pre_norm" else ())
    with recorder:
        output = target.base(input_ids=ids_BT, use_cache=False, **images)
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
    return records, _finite(records)


def image_inputs(target: HfTarget, name: str, input_ids: Sequence[int], images: Images) -> dict[str, Tensor]:
    """What the processor makes of a sequence's images, on the target's device and in its dtype.

    Raises ImageError for images that cannot be used, TargetError when this target cannot take any.
    """
    accepted = inspect.signature(target.base.forward).parameters
    inputs = target.processor.inputs(input_ids, images)
    unknown = [name for name in inputs if name not in accepted]
    # What a forward pass does not name it may swallow, and give features of the text alone.
    if any(inputs[name].is_floating_point() for name in unknown):
        raise TargetError(
            f"{name} has images, which {type(target.base).__name__} of {target.spec.path} does not take "
            f"({', '.join(unknown)})"
        )
    return {
        name: value.to(target.device, target.model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if name in accepted
    }


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
