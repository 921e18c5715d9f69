"""Every attention kernel that can be had on a device, forward and backward, under the masks of training.

    python benchmarks/attention.py --json attention.json
    python benchmarks/attention.py --device cuda --tokens 8192 --dtype bfloat16

Each kernel's time is given over that of the device's own choice; a tile that a kernel does not take goes to those that
take every tile. `equal` work is what a mask leaves of the causal one: what its time would be over `causal` if a kernel
lost nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Step, compare, machine, write

from torchspec.core import registry
from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.devices.api import UnavailableError
from torchspec.devices.parts import MathKernel, TiledAttention

CHOICE = "device's choice"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    tokens: int
    documents: int
    window: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    device: str

    def masks(self) -> dict[str, MaskSpec]:
        """`packed`: documents of random lengths; `blocks`: drafted blocks of 16 slots, each with the keys before it."""
        generator = torch.Generator().manual_seed(0)
        cuts_D = torch.randperm(self.tokens - 1, generator=generator)[: self.documents - 1].sort().values + 1
        starts_D = torch.cat([cuts_D.new_zeros(1), cuts_D])
        row_T = torch.arange(self.tokens)
        start_T = starts_D[torch.searchsorted(starts_D, row_T, right=True) - 1]
        anchor_T = torch.randperm(self.tokens, generator=generator)[: -(-self.tokens // 16)].sort().values
        anchor_T = anchor_T.repeat_interleave(16)[: self.tokens]
        return {
            "causal": MaskSpec.causal(),
            "packed": MaskSpec.limits(start_T[None], row_T[None] + 1),
            "window": MaskSpec.sliding(self.window),
            "blocks": MaskSpec.limits(torch.zeros_like(anchor_T)[None], anchor_T[None]),
        }

    def pairs(self, mask: MaskSpec) -> int:
        """How many (row, key) pairs it keeps."""
        start_BQ, end_BQ = mask.bounds(self.tokens, self.tokens, torch.device("cpu"))
        return int((end_BQ - start_BQ).sum())


def kernels(device: str) -> dict[str, Attention]:
    """By name; those of the device, and the one that runs anywhere."""
    chosen = registry.load_device(device).attention
    found = {CHOICE: chosen}
    if device == "cuda":
        from torchspec.devices.cuda.attention import ladder
        from torchspec.devices.cuda.attention.ladder import RUNGS

        for name in RUNGS:
            try:
                rungs = ladder(torch.cuda.get_device_capability(), [name, "efficient", "math"])
            except UnavailableError as error:
                print(f"{name}: {error}", file=sys.stderr)
            else:
                found[name] = TiledAttention(rungs, temporary_bytes=chosen.temporary_bytes)
    else:
        found["math"] = TiledAttention(MathKernel(), temporary_bytes=chosen.temporary_bytes)
    return found


def prepare(case: Case, mask: str, kernel: str) -> Step:
    attention, spec = kernels(case.device)[kernel], case.masks()[mask]
    options: dict[str, Any] = {"dtype": DTYPES[case.dtype], "device": case.device}
    q, dout = (torch.randn(1, case.tokens, case.heads, case.head_size, **options) for _ in range(2))
    k, v = (torch.randn(1, case.tokens, case.kv_heads, case.head_size, **options) for _ in range(2))
    scale = case.head_size**-0.5

    def step() -> float:
        out, lse = attention.forward(q, k, v, spec, scale)
        attention.backward(dout, q, k, v, out, lse, spec, scale)
        return 0.0

    return step


def measure(case: Case, *, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """For each mask and kernel seconds, peak memory and the ratio to the device's own choice."""
    body: dict[str, dict[str, Any]] = {}
    masks = case.masks()
    for mask in masks:
        names = list(kernels(case.device))
        variants = {name: partial(prepare, case, mask, name) for name in names}
        found = compare(variants, weighed=names, rounds=rounds, threads=threads, device=case.device)
        seconds = {n: f.cpu_seconds if case.device == "cpu" else f.wall_seconds for n, f in found.items()}
        body[mask] = {
            "pairs_over_causal": case.pairs(masks[mask]) / case.pairs(masks["causal"]),
            "kernels": {
                name: figures.plain() | {"over_choice": seconds[name] / seconds[CHOICE]}
                for name, figures in found.items()
            },
        }
    for mask in masks:
        for name, row in body[mask]["kernels"].items():
            key = "cpu_seconds" if case.device == "cpu" else "wall_seconds"
            row["over_causal"] = row[key] / body["causal"]["kernels"][name][key]
    return body


def show(body: dict[str, dict[str, Any]]) -> None:
    print(f"{'':8s} {'':16s} {'over choice':>11s} {'over causal':>11s} {'peak MB':>8s}")
    for mask, facts in body.items():
        for name, row in facts["kernels"].items():
            ratios = f"{row['over_choice']:11.2f} {row['over_causal']:11.2f}"
            print(f"{mask:8s} {name:16s} {ratios} {row['peak_mb_over_base']:8.0f}")
        print(f"{mask:8s} {'equal work':16s} {'':11s} {facts['pairs_over_causal']:11.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    defaults = {"tokens": 2048, "documents": 16, "window": 256, "heads": 8, "kv-heads": 4, "head-size": 64}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each kernel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    case = Case(**{name: getattr(args, name) for name in Case.__dataclass_fields__})
    body = measure(case, rounds=args.rounds, threads=args.threads)
    show(body)
    command = shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]])
    settings = vars(case) | {"threads": args.threads, "rounds": args.rounds}
    write(args.json, {"command": command, "machine": machine(), "settings": settings, "masks": body})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
