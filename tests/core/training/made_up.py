"""Features that can be looked up: every token says which sample's and which place it is, and what was captured of it.

Loaded by path, in tests and in the processes they start. Shape letters: B rows, T places of a row, S rows of a rank,
X the same with halos, N taps, F = N x H, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.core.features.parts import part_of
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import Captured, Features, FeatureSink, NormState, Quarantined
from torchspec.core.parallel.shards import Layout
from torchspec.core.training.capturing import Documents, Model

H, TAPS = 2, (1, 4)
EACH = 1000
"""Tokens of a sample are its number x EACH + place + 1: none is 0, which stands for padding."""


def sample(number: int, length: int) -> TrainingSample:
    ids_T = number * EACH + torch.arange(1, length + 1)
    return TrainingSample(sample_id=f"row-{number}", input_ids_T=ids_T, loss_mask_T=ids_T % 3 > 0)


@dataclass(frozen=True)
class Ragged:
    """A dataset of samples of these lengths."""

    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TrainingSample:
        return sample(index, self.lengths[index])


def captured(ids: Sequence[int], state: NormState = "pre_norm") -> Features:
    """Of a whole sample. What is `post_norm` is twice what is `pre_norm`."""
    ids_T = torch.tensor(list(ids))
    wide = ids_T.double()
    return Features(
        input_ids_T=ids_T,
        taps_TNH=torch.stack([tap_states(wide, tap) for tap in TAPS], dim=1),
        last_TH=last_states(wide) * (1 if state == "post_norm" else 0.5),
        tap_layers=TAPS,
        norm_state=state,
    )


def tap_states(ids_T: Tensor, tap: int) -> Tensor:
    return torch.stack([ids_T + tap / 8, -ids_T - tap / 8], dim=-1) * (ids_T > 0)[..., None]


def last_states(ids_T: Tensor) -> Tensor:
    """As the trainer reads them, normalised."""
    return torch.stack([ids_T + 0.5, ids_T / 2], dim=-1) * (ids_T > 0)[..., None]


@dataclass(frozen=True)
class Algorithm:
    halo: int
    taps: tuple[int, ...] = TAPS


class Head:
    embedding_VH = torch.zeros(3, H, dtype=torch.float64)

    def normed(self, last_TH: Tensor, state: NormState) -> Tensor:
        return last_TH if state == "post_norm" else 2 * last_TH


def model(halo: int) -> Model:
    unused: Any = None
    algorithm: Any = Algorithm(halo)
    head: Any = Head()
    return Model(algorithm=algorithm, draft=unused, head=head, engine=None)


class Engine:
    """Takes parts as a worker does; `asked` are its calls. Samples whose number is in `refused` cannot be captured."""

    def __init__(self, refused: Sequence[int] = ()) -> None:
        self.refused = refused
        self.asked: list[list[CaptureRequest]] = []

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        assert tuple(taps) == TAPS
        self.asked.append(list(batch))
        return [self._one(request, sink) for request in batch]

    def _one(self, request: CaptureRequest, sink: FeatureSink) -> Captured:
        number = request.input_ids[0] // EACH
        if number in self.refused:
            return Quarantined(record_id=request.record_id, reason=f"sample {number} is refused")
        features = captured(request.input_ids)
        return sink.put(
            request.record_id, part_of(features, request.parts[request.part]) if request.parts else features
        )

    def close(self) -> None:
        return None


def looked_up(documents: Documents, layout: Layout, rank: int, halo: int) -> dict[str, Tensor]:
    """What a rank's rows are, place by place: its tokens are looked up in the whole row, and what was captured of each.

    ids_BT, mask_BT, taps_BSF, last_BXH; zeros where there is no token.
    """
    rows = [[int(token) for n in pack for token in documents.samples[n].input_ids_T] for pack in documents.packs]
    masks = [[bool(kept) for n in pack for kept in documents.samples[n].loss_mask_T] for pack in documents.packs]

    def token(row: list[int], place: int) -> int:
        return row[place] if place < len(row) else 0

    own = [[token(row, p) for piece in layout.pieces(rank) for p in range(*piece)] for row in rows]
    wide = [
        [token(row, p) for piece in layout.pieces(rank) for p in range(piece.start, piece.stop + halo)] for row in rows
    ]
    own_BS, wide_BX = (torch.tensor(each, dtype=torch.float64) for each in (own, wide))
    return {
        "ids_BT": torch.tensor([[token(row, place) for place in range(layout.length)] for row in rows]),
        "mask_BT": torch.tensor([mask + [False] * (layout.length - len(mask)) for mask in masks]),
        "taps_BSF": torch.cat([tap_states(own_BS, tap) for tap in TAPS], dim=-1),
        "last_BXH": last_states(wide_BX),
    }


def emptied(expected: Mapping[str, Tensor], missing: Sequence[int], holes: Sequence[int]) -> dict[str, Tensor]:
    """The same where the samples `missing` are not here, and those of `holes` nowhere to be trained."""

    def of(values: Tensor, numbers: Sequence[int]) -> Tensor:
        return torch.isin(values.abs().long() // EACH, torch.tensor(list(numbers), dtype=torch.int64))

    gone_BS, gone_BX = (of(expected[name][..., 0], missing) for name in ("taps_BSF", "last_BXH"))
    return {
        "ids_BT": expected["ids_BT"],
        "mask_BT": expected["mask_BT"] & ~of(expected["ids_BT"], holes),
        "taps_BSF": expected["taps_BSF"].masked_fill(gone_BS[..., None], 0),
        "last_BXH": expected["last_BXH"].masked_fill(gone_BX[..., None], 0),
    }


def tensors(rows: FeatureRows) -> dict[str, Tensor]:
    return {
        "ids_BT": rows.tokens.input_ids_BT,
        "mask_BT": rows.tokens.loss_mask_BT,
        "taps_BSF": rows.taps_BSF,
        "last_BXH": rows.last_BXH,
    }


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def check_alone(found: Mapping[str, Tensor], documents: Documents, missing: Sequence[int] = ()) -> None:
    """Of a rank that has its sequences whole: whoever computes with the rows applies the norm."""
    layout = Layout(length=found["ids_BT"].shape[1])
    expected = emptied(looked_up(documents, layout, 0, 0), missing, missing)
    check({**found, "last_BXH": 2 * found["last_BXH"]}, expected)
