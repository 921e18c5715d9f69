"""EAGLE-3 training step in FP8 beside bf16, time and memory, at the sizes of a draft for an 8B target.

    python benchmarks/fp8.py --tokens 8192 32768 --json benchmarks/results/fp8.json
    python benchmarks/fp8.py --device cpu --check --tokens 256 --hidden 256 --intermediate 512 --vocabulary 2048 \
        --draft-vocabulary 1024 --heads 4 --kv-heads 2

Losses and gradients are compared first: FP8 against bf16, and on hardware its products against the emulation. Where FP8
is emulated nothing is timed: emulated products are slower than bf16's and say nothing of FP8. With --check nothing is
timed anywhere. The optimizer, the target and sharding are not in a step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Figures, Step, compare, machine, write
from problem import Inputs, Problem, make_draft, memory
from torch import Tensor

from torchspec.core import registry
from torchspec.core.errors import TorchspecError
from torchspec.core.interfaces.device import Device
from torchspec.core.ops.fp8 import E4M3, E5M2, Scaling, emulated_scaled_mm, scaled
from torchspec.core.training.fp8 import Fp8Compute

VARIANTS: dict[str, Scaling | None] = {"bf16": None, "fp8, row": "row", "fp8, tensor": "tensor"}
LOSS, GRADIENTS, PRODUCTS = 0.02, 0.25, 0.01
"""Relative: how far a step in FP8 may be from bf16, and hardware's bf16 products from the emulated ones."""


def prepare(problem: Problem, scaling: Scaling | None, recompute: bool) -> Step:
    run = _runner(problem, scaling, recompute)

    def step() -> float:
        run()
        return 0.0

    return step


def _runner(problem: Problem, scaling: Scaling | None, recompute: bool) -> Any:
    """A step -> (loss, gradients by name)."""
    inputs = Inputs.of(problem)
    algorithm, draft = make_draft(problem, inputs)
    device = registry.load_device(problem.device)
    compute = None if scaling is None else Fp8Compute(scaling=scaling)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad()
        own: Device = device if compute is None else compute.device(device)
        result = algorithm.step(draft, inputs.head, inputs.rows, own, memory(recompute=recompute))
        result.numerator.backward()
        return result.numerator.detach() / result.denominator, {n: p.grad for n, p in draft.named_parameters()}

    return run


def check(problem: Problem) -> dict[str, Any]:
    """SystemExit where FP8 is not what it should be; -> how far it is from bf16."""
    small = Problem(**(vars(problem) | {"tokens": min(problem.tokens, 1024)}))
    ops = registry.load_device(problem.device).ops
    if ops.fp8.kind == "native":
        torch.manual_seed(0)
        for left in (E4M3, E5M2):
            for scaling in ("row", "tensor"):
                a, b = (
                    scaled(torch.randn(rows, small.hidden, device=small.torch_device), dtype, scaling, 1 << 28)
                    for rows, dtype in ((1000, left), (small.intermediate, E4M3))
                )
                for dtype in (torch.bfloat16, torch.float32):
                    there, here = ops.scaled_mm(a, b, dtype), emulated_scaled_mm(a, b, dtype)
                    off = float((there - here).float().norm() / here.float().norm())
                    if not off <= PRODUCTS:
                        raise SystemExit(f"a product of {left} ({scaling}, {dtype}) is off by {off:.2g}")
    base_loss, base = _runner(small, None, False)()
    found = {}
    for name, scaling in VARIANTS.items():
        if scaling is None:
            continue
        loss, grads = _runner(small, scaling, False)()
        far = sum(float((grads[n] - g).float().square().sum()) for n, g in base.items())
        gradients = (far / sum(float(g.float().square().sum()) for g in base.values())) ** 0.5
        row = {"loss": float(loss / base_loss - 1), "gradients": gradients}
        print(f"{name}: loss {row['loss']:+.2%}, gradients {row['gradients']:.3f} from bf16's", flush=True)
        if not (abs(row["loss"]) <= LOSS and row["gradients"] <= GRADIENTS):
            raise SystemExit(f"{name} is too far from bf16; nothing was timed")
        found[name] = row
    return {"tokens": small.tokens, "relative to bf16": found}


def measure(problem: Problem, *, rounds: int, recompute: bool) -> dict[str, Any]:
    variants = {name: partial(prepare, problem, scaling, recompute) for name, scaling in VARIANTS.items()}
    found = compare(variants, weighed=list(variants), rounds=rounds, device=problem.device)

    def row(figures: Figures) -> dict[str, float]:
        return {
            "seconds": figures.wall_seconds,
            "peak_mb_over_base": figures.peak_mb_over_base,
            "speed over bf16": found["bf16"].wall_seconds / figures.wall_seconds,
        }

    return {"settings": vars(problem) | {"rounds": rounds, "recompute": recompute}} | {
        name: row(figures) for name, figures in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of the one sequence")
    parser.add_argument("--check", action="store_true", help="compare numbers, time nothing")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    sizes = {
        "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_size": 0, "vocabulary": 128256,
        "draft_vocabulary": 32000, "unroll": 7,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in sizes}
    problems = [Problem(tokens=tokens, dtype="bfloat16", device=options.device, **given) for tokens in options.tokens]
    try:
        support = registry.load_device(options.device).ops.fp8
    except TorchspecError as error:
        raise SystemExit(str(error)) from None
    if support.kind == "absent" or (support.kind != "native" and not options.check):
        raise SystemExit(
            f"fp8 is {support.kind} on {options.device} ({support.reason}): times would not be those of FP8, and "
            "nothing was timed. --check compares numbers where it is emulated"
        )
    checked = check(problems[0])
    measured = (
        [] if options.check else [measure(p, rounds=options.rounds, recompute=options.recompute) for p in problems]
    )
    body = {
        "command": shlex.join(["python", "benchmarks/fp8.py", *sys.argv[1:]]),
        "machine": machine(),
        "fp8": support.kind,
        "checked": checked,
        "steps": measured,
    }
    for row in measured:
        for name in VARIANTS:
            figures = row[name]
            print(f"{row['settings']['tokens']:6d} {name:12s} {figures['seconds']:8.3f} s "
                  f"{figures['peak_mb_over_base']:8.0f} MB {figures['speed over bf16']:6.2f}")  # fmt: skip
    write(options.json, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
