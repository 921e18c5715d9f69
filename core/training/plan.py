"""What every forward pass of a run holds, on every rank, known before the first: the order depends on (seed, epoch).

So features can be made before they are needed, anywhere, and a resumed run asks for the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torchspec.core.config.schema import TrainConfig
from torchspec.core.data.batches import MicroBatch, global_batches, packed_micro_batches, rank_micro_batches


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How global batches are cut into forward passes: at most so many samples, or one packed row of so many tokens."""

    micro_batch_size: int
    row_tokens: int | None = None
    equal_length: float = math.inf

    @classmethod
    def of(cls, config: TrainConfig, *, parameters: int, hidden: int, ranks: int = 1) -> Cut:
        """As configured, of a draft with so many trained parameters; `ranks` share a sequence."""
        tokens = config.tokens_per_rank
        return cls(
            micro_batch_size=config.micro_batch_size,
            row_tokens=None if tokens is None else tokens * ranks,
            # Attention takes T H products per token, everything else as many as the draft has parameters.
            equal_length=parameters / hidden,
        )

    def micro_batches(self, batch: Sequence[int], lengths: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
        """Those of one data index."""
        if self.row_tokens is None:
            return rank_micro_batches(batch, rank=rank, world_size=ranks, micro_batch_size=self.micro_batch_size)
        return packed_micro_batches(
            batch,
            lengths,
            rank=rank,
            world_size=ranks,
            row_tokens=self.row_tokens,
            equal_length=self.equal_length,
        )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One forward pass: the micro-batch of each data index that this rank's target runs.

    `number` counts the forward passes of its step. `some` is a sample of the step, for a rank that has none.
    """

    step: int
    number: int
    micro_batches: Mapping[int, MicroBatch]
    some: int


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Which data indices a rank's target runs, of how many."""

    indices: Sequence[int] = (0,)
    of: int = 1


class Plan:
    """The global batches of every step, and how this rank cuts them. Steps count from 0, over the epochs."""

    def __init__(
        self,
        lengths: Sequence[int],
        cut: Cut,
        shares: Shares,
        *,
        batch_size: int,
        bucket_size: int,
        seed: int,
        alike: Sequence[int] | None = None,
    ) -> None:
        """`lengths` are what samples may become; `alike`: lengths by which similar ones share a batch, if others."""
        self.lengths, self.cut, self.shares = lengths, cut, shares
        self._alike = lengths if alike is None else alike
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._batch_size, self._bucket_size, self._seed = batch_size, bucket_size, seed
        self._epochs: dict[int, list[list[int]]] = {}

    def batch(self, step: int) -> list[int]:
        """The samples of a step, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._batches(epoch)[position]

    def turns(self, step: int) -> list[Turn]:
        """The step's forward passes; the same number on every rank."""
        batch = self.batch(step)
        cuts = {i: self.cut.micro_batches(batch, self.lengths, i, self.shares.of) for i in self.shares.indices}
        counts = {len(parts) for parts in cuts.values()}
        assert len(counts) == 1, f"ranks would run {counts} forward passes"
        return [
            Turn(
                step=step,
                number=number,
                micro_batches={index: parts[number] for index, parts in cuts.items()},
                some=batch[0],
            )
            for number in range(counts.pop())
        ]

    def turns_from(self, step: int, stop: int) -> Iterator[Turn]:
        """Those of the steps from `step` to before `stop`, in order."""
        for each in range(step, stop):
            yield from self.turns(each)

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            # Whoever looks ahead reaches the next epoch before the present one has ended.
            self._epochs = {known: batches for known, batches in self._epochs.items() if abs(known - epoch) == 1}
            self._epochs[epoch] = global_batches(
                self._alike,
                batch_size=self._batch_size,
                bucket_size=self._bucket_size,
                seed=self._seed,
                epoch=epoch,
            )
            assert len(self._epochs[epoch]) == self.steps_per_epoch
        return self._epochs[epoch]
