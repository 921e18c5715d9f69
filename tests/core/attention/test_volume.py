"""Which exchanges there are, and which of them is chosen.

The formulas are held against counted bytes in tests/core/parallel/test_sequence_parity.py.
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.attention.volume import Traffic, choose, possible
from torchspec.core.interfaces.algorithm import AttentionShape


def shape(query_heads: int = 8, key_heads: int = 8, steps: int = 7, head_size: int = 64) -> AttentionShape:
    return AttentionShape(query_heads=query_heads, key_heads=key_heads, head_size=head_size, steps=steps)


def traffic(given: AttentionShape, ulysses: int, ring: int, rows: int = 1024) -> Traffic:
    return Traffic(rows=rows, queries=rows, itemsize=2, shape=given, ulysses=ulysses, ring=ring)


def heads_can_be_shared(query_heads: int, key_heads: int, ranks: int) -> bool:
    """Whether grouped attention of a rank's query heads over a few key heads of its own is that of all of them.

    Query head g reads key head g K / H. A rank has the H / U heads from u H / U on and k = max(1, K / U) key heads, of
    which its j-th query head reads the (j k U / H)-th.
    """
    here, keys = query_heads // ranks, max(1, key_heads // ranks)
    if query_heads % ranks or here % keys:
        return False
    for rank in range(ranks):
        read = [query * key_heads // query_heads for query in range(rank * here, (rank + 1) * here)]
        if [read[0] + own // (here // keys) for own in range(here)] != read:
            return False
    return True


@pytest.mark.parametrize(
    ("query_heads", "key_heads"), [(h, k) for h in range(1, 25) for k in range(1, h + 1) if not h % k]
)
def test_ulysses_is_possible_where_each_rank_reads_key_heads_of_its_own(query_heads: int, key_heads: int) -> None:
    for ulysses, ring in product(range(1, query_heads + 2), (1, 2, 3)):
        fits = heads_can_be_shared(query_heads, key_heads, ulysses)
        expected = {"gather"}
        expected |= {"usp"} if fits else set()
        expected |= {"ulysses"} if fits and ring == 1 else set()
        expected |= {"ring"} if ulysses == 1 else set()
        assert set(possible(shape(query_heads, key_heads), ulysses, ring)) == expected


@given(
    heads=st.sampled_from([(8, 1), (8, 2), (8, 8), (12, 4), (32, 8)]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rows=st.integers(1, 5000),
    steps=st.integers(1, 8),
    share=st.floats(0, 3),
)
def test_least_is_sent_of_what_holds_little_and_else_least_is_held(
    heads: tuple[int, int], sizes: tuple[int, int], rows: int, steps: int, share: float
) -> None:
    """Beside activations from none to three times what the gathered keys take."""
    moved = traffic(shape(*heads, steps=steps), *sizes, rows=rows)
    allowed = possible(moved.shape, *sizes)
    activations = int(share * moved.held("gather"))
    best, reason = choose(moved, activations)
    assert best in allowed
    for other in allowed:
        if moved.held(best) <= activations:
            assert moved.held(other) > activations or moved.sent(other) >= moved.sent(best)
        else:
            assert moved.held(other) >= moved.held(best)
        assert other == best or f" {other} " in reason


def test_what_is_large_decides() -> None:
    """Much to hold beside: one shared key head is best gathered, many are best exchanged for heads. Little: the ring,
    or whatever holds least."""
    plenty, nothing = 1 << 40, 0
    for steps in (1, 7):
        assert choose(traffic(shape(32, 1, steps), 4, 1), plenty)[0] == "gather"
    assert choose(traffic(shape(8, 8, steps=1), 8, 1), plenty)[0] in ("ulysses", "usp")
    assert choose(traffic(shape(8, 8, steps=7), 1, 8), plenty)[0] == "gather"
    assert choose(traffic(shape(8, 8, steps=7), 1, 8), nothing)[0] == "ring"
    assert choose(traffic(shape(8, 8, steps=7), 2, 4), nothing)[0] == "usp"


def test_the_reason_gives_the_bytes() -> None:
    """Of 1024 rows of 8 key heads of 64 bf16 values over 8 ranks, worked out by hand from the table."""
    moved = traffic(shape(8, 8, steps=1), 1, 8)
    values = 1024 * 8 * 64  # of the keys of a rank
    gathered, round_trip = 2 * 7 * values * (2 + 4), 2 * values * (2 * 7 * 2 + 8 * 4)
    best, reason = choose(moved, 10**12)
    assert best == "gather"
    assert f"a rank sends {gathered / 1e6:.2f} MB" in reason
    assert f"against ring {round_trip / 1e6:.2f} MB" in reason
    held = 2 * 8 * values * (2 * 2 + 4)
    assert f"holds {held / 1e6:.2f} MB of keys and values beside 1000.00 GB" in reason
    assert choose(moved, held)[0] == "gather"
    best, reason = choose(moved, held - 1)
    assert best == "ring"
    assert f"too much to hold: gather {held / 1e6:.2f} MB" in reason
