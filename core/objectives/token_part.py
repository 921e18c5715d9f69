"""Which of the tokens that log-probabilities are asked for count, where they are in a vocabulary that ranks may share,
and what the ranks exchange about them.

Shape letters: N tokens, K of them that count, C of a slice, V vocabulary (with ranks: this one's part), S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives.token_statistics import Slopes, Whole, merged_parts, part_statistics
from torchspec.core.ops.given import no_numbers
from torchspec.core.ops.slices import row_slices
from torchspec.core.parallel.vocabulary import gather_vectors

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; `temporary_bytes` is how large a temporary should be."""

    shards: VocabularyShards | None
    entropy: bool
    temperature: float
    ignore_index: int
    temporary_bytes: int

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, object],
        ops: FusedOps,
        *,
        shards: VocabularyShards | None,
        entropy: bool,
        temperature: float,
        ignore_index: int,
        budget: int | None = None,
    ) -> Request:
        """Raises TypeError with every argument that is of another kind than it must be."""
        wrong = [f"{name}: {fault}" for name, x in tensors.items() if (fault := no_numbers(x)) is not None]
        expected: dict[str, tuple[object, type | UnionType, str]] = {
            "ops": (ops, FusedOps, "the `ops` of a device"),
            "shards": (shards, VocabularyShards | None, "VocabularyShards or None"),
            "entropy": (entropy, bool, "True or False"),
            "temperature": (temperature, float | int | Tensor, "a number"),
            "ignore_index": (ignore_index, int, "a whole number"),
            "budget": (budget, int | None, "a whole number of bytes or None"),
        }
        wrong += [
            f"{name}: {type(value).__name__}, expected {what}"
            for name, (value, kind, what) in expected.items()
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ]
        if wrong:
            raise TypeError("; ".join(wrong))
        number: object = temperature
        if isinstance(number, Tensor) and number.numel() == 1 and not number.requires_grad:
            temperature = float(number)
        return cls(
            shards=shards,
            entropy=entropy,
            temperature=temperature,
            ignore_index=ignore_index,
            temporary_bytes=ops.temporary_bytes,
        )

    def problems(self, rows: Tensor, name: str, tokens_N: Tensor, columns: int) -> Iterator[str]:
        """What is wrong with the rows that the tokens belong to, and with a part of so many columns."""
        if rows.dim() != 2 or not rows.is_floating_point() or rows.dtype.itemsize < 2:
            yield f"{name} are a matrix of floats, of 16 bits or more, with a row for each token, not {told(rows)}"
        if tokens_N.shape != rows.shape[:1] or tokens_N.dtype not in _INTEGERS or tokens_N.device != rows.device:
            yield f"tokens are one integer for each row of {name} ({told(rows)}), not {told(tokens_N)}"
        if self.shards is not None:
            start, stop = self.shards.bounds(self.shards.rank)
            if columns != stop - start:
                yield f"rank {self.shards.rank} has {columns} tokens of the vocabulary, the shards say {stop - start}"
        number: object = self.temperature
        if isinstance(number, Tensor) or not 0 < self.temperature < math.inf:
            yield f"a temperature is one number, positive and finite and not trained, not {self.temperature!r}"


@dataclass(frozen=True, kw_only=True)
class TokenPart:
    """This rank's part of the vocabulary, and the tokens that count.

    tokens    N
    rows_K    which of them count; None if all do
    place_K   their columns in this part, 0 if they are in another
    here_K    whether they are in this one
    owner_K   which part they are in
    scale     1 / temperature
    """

    tokens: int
    rows_K: Tensor | None
    place_K: Tensor
    here_K: Tensor
    owner_K: Tensor
    scale: float
    request: Request

    @classmethod
    def of(cls, tokens_N: Tensor, columns: int, request: Request) -> TokenPart:
        """Waits for the device. Raises ValueError where a token is in no part."""
        shards = request.shards
        stops = [columns] if shards is None else [shards.bounds(rank)[1] for rank in range(shards.size)]
        rank, size = 0 if shards is None else shards.rank, stops[-1]
        tokens_N = tokens_N.long()  # small integers would be compared with what they cannot hold
        counts_N = tokens_N != request.ignore_index
        outside_N = ((tokens_N < 0) | (tokens_N >= size)) & counts_N
        counted, outside = torch.stack((counts_N.sum(), outside_N.sum())).tolist()
        if outside:
            row = int(outside_N.nonzero()[0, 0])
            raise ValueError(
                f"{outside} of {len(tokens_N)} tokens are not in 0..{size - 1}; the first is {int(tokens_N[row])}, in "
                f"row {row} (tokens that do not count are {request.ignore_index})"
            )
        rows_K = None if counted == len(tokens_N) else counts_N.nonzero()[:, 0]
        tokens_K = tokens_N if rows_K is None else tokens_N[rows_K]
        owner_K = torch.bucketize(tokens_K, torch.tensor(stops, device=tokens_K.device), right=True)
        here_K = owner_K == rank
        return cls(
            tokens=len(tokens_N),
            rows_K=rows_K,
            place_K=(tokens_K - (stops[rank] - columns)).where(here_K, 0),
            here_K=here_K,
            owner_K=owner_K,
            scale=1 / request.temperature,
            request=request,
        )

    @property
    def shards(self) -> VocabularyShards | None:
        """Those with whom there is something to exchange."""
        shards = self.request.shards
        return None if shards is None or shards.size == 1 else shards

    @property
    def every(self) -> slice:
        """The K tokens."""
        return slice(0, len(self.place_K))

    def slices(self, x: Tensor, span: slice) -> Iterator[slice]:
        """`span` of the K tokens in slices of as many rows of x as a temporary should hold, in fp32."""
        row_bytes = x.shape[1] * wide(x.dtype).itemsize
        return row_slices(span.start, span.stop, row_bytes, self.request.temporary_bytes)

    def statistics(self, x_CV: Tensor, part: slice) -> Tensor:
        """[S, C] of this part of the vocabulary and the K tokens `part`."""
        return part_statistics(x_CV, self.place_K[part], self.scale, with_entropy=self.request.entropy)

    def whole(self, found: Sequence[Tensor], dtype: torch.dtype) -> Whole:
        """Of all parts together, from the statistics of slices one after the other; they are in the wide `dtype`.

        A collective, unless no token counts.
        """
        if not found:
            found = [torch.empty(4 if self.request.entropy else 3, 0, dtype=wide(dtype), device=self.place_K.device)]
        part_SK = torch.cat(list(found), 1)
        parts_PSK = part_SK[None]
        if self.shards is not None and part_SK.shape[1]:
            parts_PSK = gather_vectors(part_SK.flatten(), self.shards).view(-1, *part_SK.shape)
        return merged_parts(parts_PSK, self.owner_K, self.scale)

    def slopes(self, kept: Sequence[Tensor], dlog_K: Tensor | None, dentropy_K: Tensor | None) -> Slopes:
        """Of a loss with these gradients of the outputs; `kept` are the largest logit, the mass and, with the entropy,
        the mean."""
        top_K, mass_K, *mean = kept
        dlog_K = torch.zeros_like(top_K) if dlog_K is None else dlog_K * self.scale
        return Slopes(
            top_C=top_K,
            share_C=-dlog_K / mass_K,
            own_C=dlog_K.masked_fill(~self.here_K, 0.0),
            place_C=self.place_K,
            spread_C=None if dentropy_K is None else dentropy_K * (-self.scale / mass_K),
            mean_C=mean[0] if mean else None,
        )

    def spread(self, value_K: Tensor) -> Tensor:
        """[N]: zeros for tokens that do not count."""
        if self.rows_K is None:
            return value_K
        return value_K.new_zeros(self.tokens).index_copy(0, self.rows_K, value_K)


def told(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
