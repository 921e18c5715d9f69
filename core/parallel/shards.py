"""Which rows of a sequence each sequence-parallel rank owns: the one function for shard bounds.

Writers, readers, trainer and tests ask here. A rank owns contiguous pieces of the padded sequence. Padding stands at
the global end alone, so no piece has any inside, and the true length travels beside the bounds.

Rank r of P = U x R has the Ulysses index u = r mod U and the ring index w = r div U. With the balance `zigzag` the
sequence is cut into 2 R segments; ring index w owns segments w and 2R-1-w, and u takes the sub-slice u of the first and
U-1-u of the second: every rank owns an early and an equally late piece, so causal attention costs every rank the same
(docs/long-sequences.md). With `contiguous` rank r owns the r-th piece of P.

Shape letters: B batch, T positions of the whole sequence, S rows that a rank owns, N pieces of a rank, L rows of a
piece, X = L + halo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Balance = Literal["zigzag", "contiguous"]


class Piece(NamedTuple):
    """Rows [start, stop) of the padded sequence."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A sequence of `length` rows over `ulysses` x `ring` ranks; every piece is a multiple of `alignment` rows long.

    What a rank owns is a multiple of `slab` rows too: its number of rows is one of lcm(pieces x alignment, slab).

    Raises ValueError for sizes below 1.
    """

    length: int
    ulysses: int = 1
    ring: int = 1
    alignment: int = 1
    balance: Balance = "zigzag"
    slab: int = 1

    def __post_init__(self) -> None:
        if min(self.length, self.ulysses, self.ring, self.alignment, self.slab) < 1:
            raise ValueError(f"sizes of a layout are at least 1, got {self}")

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def pieces_per_rank(self) -> int:
        return 2 if self.ranks > 1 and self.balance == "zigzag" else 1

    @property
    def piece_length(self) -> int:
        each = math.lcm(self.alignment, self.slab // math.gcd(self.slab, self.pieces_per_rank))
        return -(-self.length // (self.pieces_per_rank * self.ranks * each)) * each

    @property
    def rows(self) -> int:
        """What a rank owns, S; the same on every rank."""
        return self.pieces_per_rank * self.piece_length

    @property
    def padded(self) -> int:
        return self.ranks * self.rows

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The pieces of a rank, in order of position."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is none of the {self.ranks} that share the sequence")
        first = rank * self.piece_length
        if self.pieces_per_rank == 1:
            return (Piece(first, first + self.piece_length),)
        # The mirrored sub-slice of the mirrored segment is the mirror of the whole.
        return Piece(first, first + self.piece_length), Piece(
            self.padded - first - self.piece_length, self.padded - first
        )

    def segments(self, ring_index: int) -> tuple[Piece, ...]:
        """What a Ulysses group owns together: the pieces of its ranks, neighbours joined, in order of position."""
        ranks = range(ring_index * self.ulysses, (ring_index + 1) * self.ulysses)
        pieces = sorted(piece for rank in ranks for piece in self.pieces(rank))
        joined = [pieces[0]]
        for piece in pieces[1:]:
            if piece.start == joined[-1].stop:
                joined[-1] = Piece(joined[-1].start, piece.stop)
            else:
                joined.append(piece)
        return tuple(joined)

    def true_rows(self, rank: int) -> int:
        """How many of the rank's rows are not padding."""
        return sum(max(0, min(piece.stop, self.length) - piece.start) for piece in self.pieces(rank))

    def positions(self, rank: int) -> Tensor:
        """Position of each of the rank's rows, int64 [S], ascending."""
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.pieces(rank)])

    def reads(self, rank: int, halo: int) -> tuple[Piece, ...]:
        """The true rows that each piece needs with `halo` rows to its right; empty where all of them are padding."""
        wanted = ((piece.start, min(piece.stop + halo, self.length)) for piece in self.pieces(rank))
        return tuple(Piece(min(start, stop), stop) for start, stop in wanted)

    def among(self, place: Tensor, rows: int) -> Tensor:
        """Where the rank's rows `place` stand among `rows` in which each piece is followed by a halo."""
        return place + place // self.piece_length * (rows // self.pieces_per_rank - self.piece_length)

    def cut(self, x_BT: Tensor, rank: int, halo: int = 0, fill: Any = 0) -> Tensor:
        """The rank's rows of a whole [B, T, ...], each piece followed by its halo: [B, N, X, ...].

        Rows beyond T, the layout's length, are `fill`.
        """
        assert x_BT.shape[1] == self.length, f"{x_BT.shape[1]} rows for a layout of {self.length}"
        behind = self.padded + halo - self.length
        filled = F.pad(x_BT, (*(0, 0) * (x_BT.ndim - 2), 0, behind), value=fill) if behind else x_BT
        return torch.stack([filled[:, piece.start : piece.stop + halo] for piece in self.pieces(rank)], dim=1)

    def whole(self, shards: list[Tensor]) -> Tensor:
        """The padded sequence [B, padded, ...] from the rows [B, S, ...] of every rank, in rank order."""
        assert len(shards) == self.ranks, f"{len(shards)} shards of {self.ranks}"
        return self._ordered(dict(enumerate(shards)))

    def segment_rows(self, ring_index: int, shards: list[Tensor]) -> Tensor:
        """The rows of `segments(ring_index)` from those of the Ulysses group's ranks, in rank order."""
        first = ring_index * self.ulysses
        return self._ordered({first + u: shard for u, shard in enumerate(shards)})

    def split(self, x_BT: Tensor, ring_index: int | None = None) -> list[Tensor]:
        """What `whole` (or, of one ring index, `segment_rows`) joined: each rank's rows, in rank order."""
        owners = range(self.ranks)
        if ring_index is not None:
            owners = range(ring_index * self.ulysses, (ring_index + 1) * self.ulysses)
        parts: dict[int, list[Tensor]] = {rank: [] for rank in owners}
        order = sorted((piece, rank) for rank in owners for piece in self.pieces(rank))
        for place, (_, rank) in enumerate(order):
            parts[rank].append(x_BT.narrow(1, place * self.piece_length, self.piece_length))
        return [torch.cat(parts[rank], dim=1) if len(parts[rank]) > 1 else parts[rank][0] for rank in owners]

    def _ordered(self, shards: dict[int, Tensor]) -> Tensor:
        """The pieces of these ranks in order of position."""
        placed = []
        for rank, shard in shards.items():
            pieces = torch.split(shard, self.piece_length, dim=1)
            placed += [(piece.start, rows) for piece, rows in zip(self.pieces(rank), pieces, strict=True)]
        return torch.cat([rows for _, rows in sorted(placed, key=lambda entry: entry[0])], dim=1)
