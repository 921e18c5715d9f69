"""How a record lies in a store of keys and bytes: a head that describes it, and its hidden states.

    head    HEAD_BYTES of JSON behind their length, then the token ids and the row sums, int64 [T] each
    body    the taps, then the last hidden states, as they are in memory

Whoever holds a reference knows the head's size, and from the head everything about the body: each in one read.

Shape letters: T tokens of the sample, N taps, H target hidden size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.interfaces.features import Features, NormState

FORMAT = 1
HEAD_BYTES = 4096
_READABLE_ID = 200


@dataclass(frozen=True, kw_only=True)
class Facts:
    """JSON. `writer` names the mark of who wrote it; `record_id` is for people, and cut short."""

    format: int
    record_id: str
    writer: str
    taps: int
    hidden: int
    dtype: str
    tap_layers: tuple[int, ...]
    norm_state: NormState
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Head:
    facts: Facts
    input_ids_T: Tensor
    sums_T: Tensor

    @property
    def body_bytes(self) -> int:
        itemsize: int = getattr(torch, self.facts.dtype).itemsize
        return len(self.sums_T) * (self.facts.taps + 1) * self.facts.hidden * itemsize

    def features(self, body: Tensor) -> Features:
        """Views of the body, uint8 [body_bytes], whatever it holds."""
        facts, tokens = self.facts, len(self.sums_T)
        rows = body.view(getattr(torch, facts.dtype))
        cut = tokens * facts.taps * facts.hidden
        return Features(
            input_ids_T=self.input_ids_T,
            taps_TNH=rows[:cut].view(tokens, facts.taps, facts.hidden),
            last_TH=rows[cut:].view(tokens, facts.hidden),
            tap_layers=facts.tap_layers,
            norm_state=facts.norm_state,
        )


def head_bytes(length: int) -> int:
    """Of a record of so many tokens."""
    return HEAD_BYTES + 2 * length * torch.int64.itemsize


def tokens_of(nbytes: int) -> int:
    """The tokens of a record whose head has so many bytes."""
    return (nbytes - HEAD_BYTES) // (2 * torch.int64.itemsize)


def describe(record_id: str, features: Features, writer: str) -> Head:
    sums_T = row_sums(features)
    return Head(
        facts=Facts(
            format=FORMAT,
            record_id=record_id[:_READABLE_ID],
            writer=writer,
            taps=features.taps_TNH.shape[1],
            hidden=features.last_TH.shape[1],
            dtype=str(features.last_TH.dtype).removeprefix("torch."),
            tap_layers=features.tap_layers,
            norm_state=features.norm_state,
            checksum=checksum(features, sums_T),
        ),
        input_ids_T=features.input_ids_T,
        sums_T=sums_T,
    )


def write_head(head: Head, place: Tensor) -> None:
    """Into uint8 [head_bytes(T)]; ValueError when it cannot be described in so little."""
    text = json.dumps(asdict(head.facts)).encode()
    if len(text) + 4 > HEAD_BYTES:
        raise ValueError(f"record {head.facts.record_id!r}: {len(head.facts.tap_layers)} taps are too many to describe")
    padded = (len(text).to_bytes(4, "little") + text).ljust(HEAD_BYTES, b"\0")
    place[:HEAD_BYTES] = torch.frombuffer(bytearray(padded), dtype=torch.uint8)
    numbers_2T = place[HEAD_BYTES:].view(torch.int64).view(2, -1)
    numbers_2T[0] = head.input_ids_T
    numbers_2T[1] = head.sums_T


def read_head(place: Tensor) -> Head:
    """A copy of what lies in uint8 [head_bytes(T)]; ValueError, KeyError or TypeError when it is no head."""
    start = place[:HEAD_BYTES].numpy().tobytes()
    facts = json.loads(start[4 : 4 + int.from_bytes(start[:4], "little")])
    if facts["format"] != FORMAT:
        raise ValueError(f"it is of format {facts['format']}, this torchspec reads {FORMAT}")
    facts["tap_layers"] = tuple(facts["tap_layers"])
    found = Facts(**facts)
    if not isinstance(getattr(torch, found.dtype, None), torch.dtype) or found.taps < 0 or found.hidden < 1:
        raise ValueError(f"it describes {found.taps} taps of {found.hidden} numbers of type {found.dtype!r}")
    input_ids_T, sums_T = place[HEAD_BYTES:].clone().view(torch.int64).view(2, -1)
    return Head(facts=found, input_ids_T=input_ids_T, sums_T=sums_T)
