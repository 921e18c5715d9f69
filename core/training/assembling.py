"""From the features of a micro-batch's documents, made elsewhere, to what this rank computes with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchspec.core.features.rows import FeatureRows, Slice, TokenRows, placed, slices
from torchspec.core.interfaces.engine import Rows
from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.ops.transfer import to_device
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.training.capturing import Documents, Model, hidden_like, hidden_of, holes_of_all, nothing_of

Taken = Mapping[int, Features]
"""Of a document's number; whole, or this rank's part where ranks share sequences. Holes are not there."""


def parts_of(documents: Documents, sequence: SequenceGroup, halo: int) -> list[list[Rows]]:
    """For each document the rows that each rank of the sequence reads of it; none at a rank that reads nothing."""
    lengths = [sample.input_ids_T.numel() for sample in documents.samples]
    longest = max(sum(lengths[number] for number in pack) for pack in documents.packs)
    layout = sequence.layout(longest)
    reads = [slices(lengths, documents.packs, layout, rank, halo) for rank in range(sequence.size)]
    return [[_rows(wanted, number) for wanted in reads] for number in range(len(lengths))]


def _rows(wanted: list[Slice], number: int) -> Rows:
    return tuple((part.start, part.stop) for part in wanted if part.document == number)


def assembled(
    model: Model, documents: Documents, taken: Taken, holes: Mapping[int, str], sequence: SequenceGroup | None
) -> tuple[FeatureRows, dict[int, str]]:
    """This rank's share of the micro-batch, on its device, and the holes of all that share it."""
    samples = documents.samples
    found = dict(holes)
    if sequence is not None:
        found = holes_of_all(model, found, len(samples), sequence)
    masks = [s.loss_mask_T.new_zeros(s.loss_mask_T.shape) if n in found else s.loss_mask_T for n, s in
             enumerate(samples)]  # fmt: skip
    if sequence is None:
        state: NormState = next((features.norm_state for features in taken.values()), "post_norm")
        whole = [_on_device(model, taken[n]) if n in taken else nothing_of(model, sample, state)
                 for n, sample in enumerate(samples)]  # fmt: skip
        return FeatureRows.of(whole, masks, documents.packs, model.slab), found
    tokens = TokenRows.of([sample.input_ids_T for sample in samples], masks, documents.packs)
    return _shared_rows(model, documents, taken, tokens, sequence), found


def _shared_rows(
    model: Model, documents: Documents, taken: Taken, tokens: TokenRows, sequence: SequenceGroup
) -> FeatureRows:
    """Rows of parts. A part holds what is read for the last hidden states, of which the taps are the beginning of each
    piece: they need no halo."""
    layout, like, halo = sequence.layout(tokens.length), hidden_like(model), model.algorithm.halo
    lengths = [sample.input_ids_T.numel() for sample in documents.samples]
    hidden = {number: hidden_of(model, _on_device(model, features)) for number, features in taken.items()}
    wide = slices(lengths, documents.packs, layout, sequence.rank, halo)
    narrow = slices(lengths, documents.packs, layout, sequence.rank, 0)
    # Where each wide slice begins within its document's part, by the piece that reads it.
    begins: dict[tuple[int, int, int], int] = {}
    filled = [0] * len(lengths)
    for part in wide:
        begins[_reader(part, layout.piece_length + halo)] = filled[part.document]
        filled[part.document] += part.stop - part.start

    def last(n: int) -> Tensor:
        return read(wide[n], layout.piece_length + halo, {d: h.last_TH for d, h in hidden.items()}, like.last_TH)

    def taps(n: int) -> Tensor:
        return read(narrow[n], layout.piece_length, {d: h.taps_TF for d, h in hidden.items()}, like.taps_TF)

    def read(part: Slice, places: int, documents: Mapping[int, Tensor], like: Tensor) -> Tensor:
        rows = part.stop - part.start
        if part.document not in documents:
            return like.new_zeros(rows, like.shape[1])
        begin = begins[_reader(part, places)]
        return documents[part.document][begin : begin + rows]

    rows, pieces = len(documents.packs), layout.pieces_per_rank
    return FeatureRows(
        tokens=tokens,
        layout=layout,
        taps_BSF=placed(narrow, taps, rows, pieces * layout.piece_length, like.taps_TF),
        last_BXH=placed(wide, last, rows, pieces * (layout.piece_length + halo), like.last_TH),
        norm_state="post_norm",
        sequence=sequence,
    )


def _reader(part: Slice, places: int) -> tuple[int, int, int]:
    """(document, row, piece of the rank): `places` of the row's are each piece's."""
    return part.document, part.row, part.place // places


def _on_device(model: Model, features: Features) -> Features:
    device = model.head.embedding_VH.device
    if features.last_TH.device == device:
        return features
    return Features(
        input_ids_T=features.input_ids_T,
        taps_TNH=to_device(features.taps_TNH, device),
        last_TH=to_device(features.last_TH, device),
        tap_layers=features.tap_layers,
        norm_state=features.norm_state,
    )
