"""What the exchanges of step-0 keys and values cost, in bytes, and which one to choose (docs/long-sequences.md).

Sent are bytes that one rank sends to others for one micro-batch, forward and backward. Held are bytes of keys, values
and their gradients that a rank has beyond those of its own rows. With S rows of a rank, Q of its queries running, e
bytes per value, w in fp32 (fp64 for fp64), n steps, L layers, H query and K key heads of size D, and k = max(1, K / U):

              sent, by a layer                                           held
    gather    2 (P-1) S K D (e + w)                                      2 P S K D ((L + 1) e + w)
    ulysses   4 (U-1) S k D e  +  n (U-1)/U Q H (6 D e + 2 w)            2 U S k D (L + 1) e
    ring      2 n S K D (2 (R-1) e + R w)                                2 S K D (2 e + 2 w)
    usp       those of ulysses, and of ring with U S rows of k heads

Every layer's keys and values wait for the backward pass; then their gradients take their place, one layer's at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.core.attention.ulysses import heads_fit
from torchspec.core.interfaces.algorithm import AttentionShape
from torchspec.core.parallel.sequence import Exchange


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A micro-batch of one rank: its rows, the queries that run in a step, bytes per value."""

    rows: int
    queries: int
    itemsize: int
    shape: AttentionShape
    ulysses: int
    ring: int

    @property
    def wide(self) -> int:
        return max(4, self.itemsize)

    @property
    def _spread_heads(self) -> int:
        """Key heads of a rank after they have been spread."""
        return max(1, self.shape.key_heads // self.ulysses)

    def sent(self, exchange: Exchange) -> int:
        """Bytes sent by a rank."""
        return self.shape.layers * self._sent_by_a_layer(exchange)

    def _sent_by_a_layer(self, exchange: Exchange) -> int:
        shape, e, w = self.shape, self.itemsize, self.wide
        ranks = self.ulysses * self.ring
        size = shape.head_size
        if exchange == "gather":
            return 2 * (ranks - 1) * self.rows * shape.key_heads * size * (e + w)
        total = 0
        rows, heads = self.rows, shape.key_heads
        if exchange in ("ulysses", "usp"):
            heads = self._spread_heads
            total += 4 * (self.ulysses - 1) * rows * heads * size * e
            moved = self.queries * shape.query_heads * (self.ulysses - 1) // self.ulysses
            total += shape.steps * moved * (6 * size * e + 2 * w)
            rows *= self.ulysses
        if exchange in ("ring", "usp") and self.ring > 1:
            total += 2 * shape.steps * rows * heads * size * (2 * (self.ring - 1) * e + self.ring * w)
        return total

    def kept(self, exchange: Exchange) -> int:
        """Bytes of keys and values that wait for the backward pass, as the exchange left them."""
        return self.shape.layers * self._spread_values(exchange) * self.itemsize

    def held(self, exchange: Exchange) -> int:
        """Bytes of keys, values and gradients beyond those of the rank's own rows, at the most."""
        shape, e, w = self.shape, self.itemsize, self.wide
        spread = self._spread_values(exchange)
        total = self.kept(exchange) + spread * (e + w if exchange == "gather" else e)
        if exchange in ("ring", "usp") and self.ring > 1:
            values = spread or 2 * self.rows * shape.key_heads * shape.head_size
            total += values * (2 * e + 2 * w)
        return total

    def _spread_values(self, exchange: Exchange) -> int:
        """Keys and values of a layer that `AttentionForm.spread` makes on a rank; those of a ring go by."""
        size = self.rows * self.shape.head_size
        if exchange == "gather":
            return 2 * self.ulysses * self.ring * size * self.shape.key_heads
        changed = exchange in ("ulysses", "usp") and self.ulysses > 1
        return 2 * self.ulysses * size * self._spread_heads if changed else 0


def possible(shape: AttentionShape, ulysses: int, ring: int) -> tuple[Exchange, ...]:
    """The exchanges that these groups and heads allow; gather always does."""
    found: list[Exchange] = ["gather"]
    fits = heads_fit(shape.query_heads, shape.key_heads, ulysses)
    if ring == 1 and fits:
        found.append("ulysses")
    if ulysses == 1:
        found.append("ring")
    if fits:
        found.append("usp")
    return tuple(found)


def choose(traffic: Traffic, activations: int) -> tuple[Exchange, str]:
    """The exchange that sends least, of those that hold no more than the rank's other `activations`; and why.

    Where none holds so little, the one that holds least.
    """
    allowed = possible(traffic.shape, traffic.ulysses, traffic.ring)
    small = [name for name in allowed if traffic.held(name) <= activations]
    best = min(small, key=traffic.sent) if small else min(allowed, key=traffic.held)
    others = [f"{name} {_size(traffic.sent(name))}" for name in allowed if name in small and name != best]
    against = f" (against {', '.join(others)})" if others else ""
    large = [f"{name} {_size(traffic.held(name))}" for name in allowed if name not in small and name != best]
    kept_out = f"; too much to hold: {', '.join(large)}" if large else ""
    reason = (
        f"a rank sends {_size(traffic.sent(best))} per micro-batch{against} and holds {_size(traffic.held(best))} of "
        f"keys and values beside {_size(activations)} of activations{kept_out}"
    )
    return best, reason


def _size(count: int) -> str:
    """Decimal, as in the rest of a plan."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
