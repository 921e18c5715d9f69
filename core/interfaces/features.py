"""What a target engine hands to the trainer for one sample.

Layer convention: tap `l` is the output of decoder layer `l`, 0-based, which is Hugging Face `hidden_states[l + 1]`
for every layer but the last (where Hugging Face has already applied the final norm).

Shape letters: T tokens of the sample, N taps, H target hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

NormState = Literal["pre_norm", "post_norm"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Hidden states of one sample, detached, on the engine's device; the ids on the host, where steps are planned.

    `last_TH` is the last decoder layer's output; `norm_state` says whether the target's final norm has
    been applied to it. The trainer applies that norm exactly once.
    """

    input_ids_T: Tensor
    taps_TNH: Tensor
    last_TH: Tensor
    tap_layers: tuple[int, ...]
    norm_state: NormState


@dataclass(frozen=True, kw_only=True)
class RecordRef:
    """Names a stored record. Control messages carry these, never tensors."""

    record_id: str
    length: int


class FeatureSink(Protocol):
    """Where an engine writes. `put` of an id that is already present is an error."""

    def put(self, record_id: str, features: Features) -> RecordRef: ...
