"""How fast a device multiplies and moves its memory: measured where it is here, else as its vendor or the user says.

The rate that a run reaches is a part of that: what is not a large product (elementwise work, short rows, padding,
communication, waiting) takes its time too. So `Rates` are ranges; docs/sizing.md says where their ends come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from torchspec.core.config.accelerators import accelerators
from torchspec.core.config.schema import RunConfig
from torchspec.core.interfaces.device import Device

REACHED = (0.25, 0.85)
"""Of the rate at which the run's own products were measured, or which the user gives."""
PEAK_REACHED = (0.15, 0.45)
"""Of a vendor's peak."""
BANDWIDTH_REACHED = (0.5, 0.9)
SECONDS, LEAST_CALLS = 0.15, 5
"""For which each product is repeated; the fastest counts."""
MOST_ROWS, COPIED_BYTES = 4096, 64 << 20
HOST_ROWS, HOST_COPIED_BYTES = 128, 16 << 20
"""On a CPU: so little that it ends before other processes have their turn."""
MOST_WIDTH, MOST_WEIGHTS = 1 << 16, 1 << 28
"""Of a larger matrix a part is multiplied, whose pace is taken for the whole: a plan finds out whether it fits."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """From the least to the most."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(low=self.low + other.low, high=self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device (of a CPU: of all its cores). Matrix products in operations a second, `draft` in the draft's
    precision and `target` in the target's; `memory` in bytes a second, None where nothing says it; `how` in words."""

    draft: Range
    target: Range
    memory: Range | None
    how: str


@dataclass(frozen=True, kw_only=True)
class Products:
    """Matrix products of a run, by the shapes [out, in] of weights that a micro-batch of `rows` rows passes."""

    rows: int
    draft: Sequence[tuple[int, int]]
    target: Sequence[tuple[int, int]]
    draft_dtype: torch.dtype
    target_dtype: torch.dtype


def given_rates(tflops: float) -> Rates:
    """As the user says."""
    rate = Range(low=REACHED[0] * tflops * 1e12, high=REACHED[1] * tflops * 1e12)
    how = f"{tflops:g} TFLOP/s a device (device_tflops), of which {_part(REACHED)} are taken to be reached"
    return Rates(draft=rate, target=rate, memory=None, how=how)


def stated_rates(name: str, *, draft_fp8: bool, target_fp8: bool) -> Rates:
    """Of a device of this name. What may run in FP8 is at best as fast as that, at worst as bfloat16."""
    facts = accelerators()[name]

    def rate(fp8: bool) -> Range:
        best = facts.fp8 if fp8 and facts.fp8 is not None else facts.bf16
        return Range(low=PEAK_REACHED[0] * facts.bf16 * 1e12, high=PEAK_REACHED[1] * best * 1e12)

    memory = Range(
        low=BANDWIDTH_REACHED[0] * facts.bandwidth * 1e12, high=BANDWIDTH_REACHED[1] * facts.bandwidth * 1e12
    )
    peaks = f"{facts.bf16:,.0f} TFLOP/s in bfloat16"
    peaks += f" and {facts.fp8:,.0f} in FP8" if (draft_fp8 or target_fp8) and facts.fp8 is not None else ""
    how = f"{name} (device_name): {peaks}, of which {_part(PEAK_REACHED)} are taken to be reached"
    return Rates(draft=rate(draft_fp8), target=rate(target_fp8), memory=memory, how=how)


def measured_rates(device: Device, products: Products, *, cores: int) -> Rates:
    """Of the device that is here, by products of the run's own shapes, for a second or so."""
    place = device.runtime.bind(0)
    share = cores if place.type == "cpu" else 1
    with _one_thread():
        draft = _products(device, place, products.draft, products.rows, products.draft_dtype) * share
        target = draft
        if products.target:
            target = _products(device, place, products.target, products.rows, products.target_dtype) * share
        memory = _copies(device, place)
    kind = str(products.draft_dtype).removeprefix("torch.")
    where = f"on {cores} core(s) of this CPU" if place.type == "cpu" else f"on this {device.name} device"
    how = f"{_rate(draft)} for products of the draft's shapes in {kind}, measured {where}; {_part(REACHED)} are taken"
    return Rates(
        draft=Range(low=REACHED[0] * draft, high=REACHED[1] * draft),
        target=Range(low=REACHED[0] * target, high=REACHED[1] * target),
        memory=Range(low=BANDWIDTH_REACHED[0] * memory, high=memory),
        how=f"{how} to be reached",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several wait for each other, and on a machine with other work one of them always waits for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _part(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.0%} to {ends[1]:.0%}"


def _rate(operations: float) -> str:
    return f"{operations / 1e12:,.0f} TFLOP/s" if operations >= 1e13 else f"{operations / 1e9:,.0f} GFLOP/s"


def _products(
    device: Device, place: torch.device, shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype
) -> float:
    """Operations a second over all shapes, each as often as it is named."""
    operations = seconds = 0.0
    rows = min(rows, HOST_ROWS if place.type == "cpu" else MOST_ROWS)
    once: dict[tuple[int, int], float] = {}
    for shape in shapes:
        if shape not in once:
            width = min(shape[1], MOST_WIDTH)
            height = min(shape[0], MOST_WEIGHTS // width)
            weight_ZH = torch.ones(height, width, dtype=dtype, device=place)
            rows_RH = torch.ones(rows, width, dtype=dtype, device=place)
            part = height * width / (shape[0] * shape[1])
            once[shape] = _fastest(device, partial(torch.mm, rows_RH, weight_ZH.T)) / part
        operations += 2.0 * rows * shape[0] * shape[1]
        seconds += once[shape]
    return operations / seconds


def _copies(device: Device, place: torch.device) -> float:
    """Bytes read and written a second."""
    count = HOST_COPIED_BYTES if place.type == "cpu" else COPIED_BYTES
    source = torch.ones(count // 4, device=place)
    into = torch.empty_like(source)
    return 2 * count / _fastest(device, partial(into.copy_, source))


def _fastest(device: Device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    work()
    device.runtime.synchronize()
    found, calls, end = float("inf"), 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end or calls < LEAST_CALLS:
        calls += 1
        begin = time.perf_counter()
        work()
        device.runtime.synchronize()
        found = min(found, time.perf_counter() - begin)
    return found


def rates_of(
    config: RunConfig, device: Device | None, products: Products, *, cores: int, target_fp8: bool
) -> Rates | None:
    """Of the device that is to run it: as given, measured, or stated; None where nothing says how fast it is."""
    if config.device_tflops is not None:
        return given_rates(config.device_tflops)
    if device is not None:
        return measured_rates(device, products, cores=cores)
    if config.device_name is not None and config.precision.compute != "float32":
        return stated_rates(config.device_name, draft_fp8=config.precision.compute == "fp8", target_fp8=target_fp8)
    return None
