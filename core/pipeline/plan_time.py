"""How long a run takes, from what it multiplies and moves and how fast its devices do so: a range, never a promise.

    training    tokens x operations of the draft's step / (ranks x rate), and the optimizer's bytes / bandwidth
    capture     tokens x operations of the target's forward pass / (devices x rate); at most the target's weights, read
                in every pass, / bandwidth where that is longer
    either      no shorter than its passes x operators x what the host needs to start one: small batches wait for that
    the run     their sum where they share devices (`inprocess`, `colocated`), the longer one where they do not
                (`disaggregated`), training alone where features are stored (`offline`)

Not counted: loading, tokenising, validation by decoding, writing checkpoints, and what networks do to a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchspec.core.config.schema import RunConfig
from torchspec.core.pipeline.plan_fit import aligned, size
from torchspec.core.pipeline.plan_rates import Range, Rates

ADAMW_BYTES = 28
"""Of a parameter in a step: gradient, weight and two moments in fp32 read, the last three written."""
HOST_SECONDS = (8e-6, 40e-6)
"""In which a host starts an operator of PyTorch, its share of autograd included: 16 to 20 were measured on a CPU
(steps of four algorithms over six tokens), half of that and twice as much are the ends."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: its weight and two moments in fp32."""
SIGNIFICANT = 2
"""Digits of a figure that people read."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run is to do, of which the planner knows.

    tokens           of the run: every sample as often as it is trained on
    epoch_tokens     of one pass over the data
    epochs           passes over the data, or parts of one
    steps            optimizer steps
    counted          how the tokens are known, in words
    draft            floating-point operations of a token's training, on average
    target           those of a token's pass through the target, on average
    passes           micro-batches of a rank
    draft_operators, target_operators    that PyTorch starts in a pass
    parameters       trained
    feature_bytes    of a token's features
    target_bytes     of the target's weights as they are read
    ranks            that train
    engine_devices   on which the target runs
    """

    tokens: Range
    epoch_tokens: Range
    epochs: float
    steps: int
    counted: str
    draft: float
    target: float
    passes: int
    draft_operators: float
    target_operators: float
    parameters: int
    feature_bytes: int
    target_bytes: int
    ranks: int
    engine_devices: int


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Seconds, where nothing is `missing`; that says what to give for them. `shares`: target and draft run on the same
    devices."""

    topology: str
    work: Work | None
    rates: Rates | None = None
    training: Range | None = None
    capture: Range | None = None
    run: Range | None = None
    on_host: bool = False
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    disk: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        facts["bottleneck"] = self.bottleneck
        facts["verdict"] = self.verdict()
        return facts

    @property
    def bottleneck(self) -> str | None:
        """Which of the two takes more of the run; None where only one of them does, or nothing is known."""
        if self.training is None or self.capture is None or self.topology == "offline":
            return None
        return "training" if middle(self.training) >= middle(self.capture) else "capture"

    def verdict(self) -> str:
        """In one line."""
        if self.run is None or self.work is None:
            return "the time cannot be said: " + "; ".join(self.missing)
        if self.work.steps <= 0:
            return "no step is left"
        speed = self.work.tokens.low / self.run.high, self.work.tokens.high / self.run.low
        return f"{about(self.run)}: {self.work.steps:,} steps, {figures(*speed)} tokens a second"

    def lines(self) -> list[str]:
        if self.work is None or self.work.steps <= 0 or self.run is None or self.training is None or self.rates is None:
            return ["time (estimate)", f"  {self.verdict()}", *self._disk()]
        work, capture = self.work, self.capture
        a_token = f"draft {_operations(work.draft)} of training a token, target {_operations(work.target)} of capture"
        where = "on the same devices" if self.topology in ("inprocess", "colocated") else "on devices of its own"
        rows = [
            ("the run", about(self.run), f"{self.topology}{self._bound()}"),
            ("training", about(self.training), self._devices(work.ranks)),
        ]
        if capture is not None:
            again = "" if work.epochs <= 1 else ", in every epoch again"
            known = "before, by torchspec capture" if self.topology == "offline" else f"{where}{again}"
            rows.append(("capture", about(capture), f"{self._devices(work.engine_devices)}, {known}"))
        speed = figures(work.tokens.low / self.run.high, work.tokens.high / self.run.low)
        rows += [
            ("tokens a second", speed, f"{figures(work.tokens.low, work.tokens.high)} in all: {work.counted}"),
        ]
        return [
            f"time (estimate): {self.verdict()}",
            *aligned(rows),
            f"  operations: {a_token}",
            f"  rates: {self.rates.how}",
            *self._disk(),
            *(f"  {note}" for note in self.notes),
        ]

    def _devices(self, count: int) -> str:
        return "on this machine's CPU" if self.on_host else f"on {count} device(s)"

    def _bound(self) -> str:
        if self.bottleneck is None:
            return ", training alone"
        if self.topology == "disaggregated":
            return f", as long as the slower of the two: {self.bottleneck}"
        return f", the sum of the two; more of it is {self.bottleneck}"

    def _disk(self) -> list[str]:
        return (
            ["  disk: " + ", ".join(f"{name} {size(count)}" for name, count in self.disk.items())] if self.disk else []
        )


def time_plan(
    config: RunConfig,
    work: Work | None,
    rates: Rates | None,
    *,
    on_host: bool,
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TimePlan:
    """Of a run whose work and rates are known as far as they are."""
    topology = config.pipeline.topology
    disk = {} if work is None else disk_of(config, work)
    if work is None or rates is None or missing:
        return TimePlan(topology=topology, work=work, rates=rates, on_host=on_host, missing=tuple(missing), disk=disk)
    training, capture = _training(work, rates, on_host=on_host), _capture(work, rates, topology, on_host=on_host)
    return TimePlan(
        topology=topology, work=work, rates=rates, training=training, capture=capture,
        run=_run(topology, training, capture, on_host=on_host), on_host=on_host, notes=tuple(notes), disk=disk,
    )  # fmt: skip


def _training(work: Work, rates: Rates, *, on_host: bool) -> Range:
    ranks = 1 if on_host else work.ranks
    found = _longer(_seconds(work.tokens, work.draft, rates.draft, ranks), _started(work.passes * work.draft_operators))
    if rates.memory is None:
        return found
    return found + _moved(work.steps * ADAMW_BYTES * work.parameters / ranks, rates.memory)


def _capture(work: Work, rates: Rates, topology: str, *, on_host: bool) -> Range:
    """Of features stored before: of one pass over the data."""
    engines = 1 if on_host else work.engine_devices
    read = work.epoch_tokens if topology == "offline" else work.tokens
    passes = work.passes * (read.high / work.tokens.high) if work.tokens.high else 0.0
    found = _longer(_seconds(read, work.target, rates.target, engines), _started(passes * work.target_operators))
    if rates.memory is None:
        return found
    # At best an engine reads its weights for many passes at once.
    slow = _moved(passes * work.ranks * work.target_bytes / engines, rates.memory).high
    return Range(low=found.low, high=max(found.high, slow))


def _started(operators: float) -> Range:
    return Range(low=operators * HOST_SECONDS[0], high=operators * HOST_SECONDS[1])


def _moved(count: float, memory: Range) -> Range:
    return Range(low=count / memory.high, high=count / memory.low)


def _longer(one: Range, other: Range) -> Range:
    return Range(low=max(one.low, other.low), high=max(one.high, other.high))


def _seconds(tokens: Range, operations: float, rate: Range, devices: int) -> Range:
    return Range(
        low=tokens.low * operations / (rate.high * devices), high=tokens.high * operations / (rate.low * devices)
    )


def _run(topology: str, training: Range, capture: Range, *, on_host: bool) -> Range:
    if topology == "offline":
        return training
    if topology == "disaggregated" and not on_host:
        return Range(low=max(training.low, capture.low), high=max(training.high, capture.high))
    return training + capture


def disk_of(config: RunConfig, work: Work) -> dict[str, int]:
    """Bytes that a run keeps, and that its features would take: of one pass over the data."""
    kept = config.train.keep_last + (1 if config.data.validation else 0)
    count = min(kept, max(1, math.ceil(work.steps / config.train.checkpoint_every)))
    found = {f"{count} checkpoint(s)": count * STATE_BYTES * work.parameters}
    name = (
        "stored features" if config.pipeline.topology == "offline" else "features, if `torchspec capture` stored them,"
    )
    return {**found, name: int(work.epoch_tokens.high) * work.feature_bytes}


def middle(ends: Range) -> float:
    """The geometric mean: as many times the low end as the high end is of it."""
    return math.sqrt(ends.low * ends.high)


UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86400.0))


def about(seconds: Range) -> str:
    """`about 3 to 6 h`: in the largest unit of which there may be two, and no digit too many.

    Of seconds nothing is said: what the plan does not count takes as long.
    """
    if seconds.high < 60:
        return "less than a minute"
    unit, each = next(((name, each) for name, each in reversed(UNITS) if seconds.high >= 2 * each), UNITS[0])
    low, high = figures(seconds.low / each, seconds.high / each).split(" to ")
    return f"about {low} to {high} {unit}"


def figures(low: float, high: float) -> str:
    """`1,200 to 3,400`: the low end rounded down and the high end up, to the digits that they are worth."""
    return f"{_digits(low, math.floor)} to {_digits(high, math.ceil)}"


def _digits(value: float, rounded: Any) -> str:
    if value <= 0:
        return "0"
    digits = 1 if value < 10 else SIGNIFICANT
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    found = rounded(round(value / step, 6)) * step
    for name, each in (("billion", 1e9), ("million", 1e6)):
        if found >= each:
            return f"{found / each:g} {name}"
    return f"{found:,.0f}" if found >= 1 else f"{found:g}"


def _operations(count: float) -> str:
    return f"{count / 1e9:,.1f} GFLOP" if count >= 1e8 else f"{count / 1e6:,.1f} MFLOP"
