"""What a target engine hands to the trainer for one sample, and where it is put.

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
    """Names a stored record. Control messages carry these, never tensors.

    `checksum` is that of the content (`features.checksums`), "" where the record never leaves its process.
    """

    record_id: str
    length: int
    checksum: str = ""


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """Stands for a record that could not be made, in the place of its reference. `reason` is for people."""

    record_id: str
    reason: str


Captured = RecordRef | Quarantined


class FeatureSink(Protocol):
    """Where an engine writes. `put` of an id that is already present is an error."""

    def put(self, record_id: str, features: Features) -> RecordRef: ...


@dataclass(frozen=True, kw_only=True)
class StoreUsage:
    records: int
    nbytes: int


class FeatureStore(FeatureSink, Protocol):
    """Records of features between their capture and their use. One process may write what another reads.

    A record is there whole or not at all. Every method may be called from several threads. `features.conformance`
    holds the contract as checks that any implementation can be put through.

    put     ValueError for features that disagree with each other, and for an id that is already there;
            StoreFullError when it does not fit, and nothing of it is left
    get     the record, on the host or where it was put; MissingRecordError when it is not there;
            DamagedRecordError when it is not what was put, or not of the length and content that `ref` promises
    remove  forget the record, so that its id may be used again; MissingRecordError when it is not there.
            Features taken out before stay valid
    close   let go of what the store holds in this process; a closed store raises RuntimeError
    """

    def get(self, ref: RecordRef) -> Features: ...
    def remove(self, ref: RecordRef) -> None: ...
    def usage(self) -> StoreUsage: ...
    def close(self) -> None: ...
