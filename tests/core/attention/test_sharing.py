"""Which heads and blocks ranks take, and in which order a ring works; that the numbers are right is shown on real ranks
(tests/core/parallel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.attention.ring import RingAttention, below
from torchspec.core.attention.ulysses import heads_fit, key_heads_of
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout, Piece


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 32))
def test_a_rank_has_the_key_heads_that_its_query_heads_read(key_heads: int, group: int, ranks: int) -> None:
    query_heads = key_heads * group
    if not heads_fit(query_heads, key_heads, ranks):
        return
    each = query_heads // ranks
    for rank in range(ranks):
        read = [head // group for head in range(rank * each, (rank + 1) * each)]
        has = list(range(key_heads))[key_heads_of(rank, key_heads, ranks)]
        assert sorted(set(read)) == has
        # The attention of the rank pairs them as the whole does: the same number of query heads for each key head.
        assert [has[place * len(has) // each] for place in range(each)] == read


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 50))
def test_an_interval_of_positions_is_an_interval_of_a_blocks_keys(gaps: list[tuple[int, int]], position: int) -> None:
    segments, at = [], 0
    for gap, length in gaps:
        segments.append(Piece(at + gap, at + gap + length))
        at += gap + length
    rows = [p for piece in segments for p in range(*piece)]
    assert int(below(torch.tensor(position), tuple(segments))) == sum(row < position for row in rows)


class Group:
    """Stands for a process group: a ring of `ranks`, or a group of one."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


class Recorded:
    """Attention and communication that write down what they are asked."""

    temporary_bytes = 1 << 20

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        self.calls.append("attend")
        return torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("attend")
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def ring_exchange(self, tensor: Tensor, group: Any) -> tuple[Tensor, Callable[[], None]]:
        self.calls.append("send")
        return tensor, lambda: self.calls.append("wait")


def ring_of_three(recorded: Recorded, rank: int = 0) -> RingAttention:
    sequence: Any = SequenceGroup(
        communication=recorded,  # type: ignore[arg-type]
        group=Group(rank, 3),  # type: ignore[arg-type]
        ulysses=Group(0, 1),  # type: ignore[arg-type]
        ring=Group(rank, 3),  # type: ignore[arg-type]
        exchange="ring",
    )
    return RingAttention(attention=recorded, sequence=sequence, layout=Layout(length=12, ring=3))


def limits(starts: list[int], positions: list[int]) -> MaskSpec:
    return MaskSpec.limits(torch.tensor([starts]), torch.tensor([positions]) + 1)


def test_the_next_block_travels_while_this_one_is_worked_on() -> None:
    recorded = Recorded()
    ring = ring_of_three(recorded)
    rows = torch.ones(1, 4, 1, 2)
    mask = limits([0, 0, 0, 0], [0, 1, 10, 11])
    out, lse = ring.forward(rows, rows, rows, mask, 1.0)
    assert recorded.calls == ["send", "attend", "wait", "send", "attend", "wait", "attend"]
    recorded.calls.clear()
    ring.backward(rows, rows, rows, rows, out, lse, mask, 1.0)
    # Keys go on before, gradients after the work; a block adds its own when its gradients have come.
    assert recorded.calls == [
        "send", "attend", "send", "wait",
        "send", "attend", "wait", "send", "wait",
        "attend", "wait", "send", "wait",
    ]  # fmt: skip


def test_a_block_that_is_hidden_from_everyone_is_skipped() -> None:
    recorded = Recorded()
    ring = ring_of_three(recorded)  # has positions 0, 1, 10 and 11; rank 2 has 4 to 7, rank 1 the rest
    rows = torch.ones(1, 4, 1, 2)
    apart = limits([0, 0, 8, 8], [0, 1, 10, 11])  # two documents, 0 to 1 and 8 to 11
    ring.forward(rows, rows, rows, apart, 1.0)
    assert recorded.calls.count("attend") == 2  # rank 2's block holds nothing of them


def test_rows_that_see_nothing_have_no_output_and_no_weight() -> None:
    rows = torch.ones(1, 4, 1, 2)
    nothing = MaskSpec.limits(torch.tensor([[3, 3, 3, 3]]), torch.tensor([[3, 3, 3, 3]]))
    out, lse = ring_of_three(Recorded()).forward(rows, rows, rows, nothing, 1.0)
    assert not out.any()
    assert torch.isneginf(lse).all()
