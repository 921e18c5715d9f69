"""Log-probabilities and entropies, forward and backward, beside the plain form: time and peak memory.

    python benchmarks/log_probabilities.py --json log_probabilities.json

`logits` starts from logits that are there: log_softmax, gather and, with entropy, -sum p log p under autograd, beside
`token_log_probabilities`. `hidden` starts from hidden states and a head that wants its gradient: the plain form makes
all logits first, `hidden_log_probabilities` those of a chunk. Each pair is timed in turn in one run, and its values and
gradients are compared before that. Peak memory is over what is there before the step (states, head, logits) and
includes the gradients.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Figures, Step, compare, machine, write
from torch import Tensor

from torchspec.core import registry
from torchspec.core.objectives import hidden_log_probabilities, token_log_probabilities

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


CASES = {
    "logits": ("logits", False),
    "logits+entropy": ("logits", True),
    "hidden": ("hidden", False),
    "hidden+entropy": ("hidden", True),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    device: str

    def leaves(self, form: str) -> dict[str, Tensor]:
        """Logits, or hidden states and a head; the same numbers every time."""
        generator = torch.Generator().manual_seed(0)
        shapes = {"logits": (self.tokens, self.vocabulary)}
        if form == "hidden":
            shapes = {"hidden": (self.tokens, self.hidden), "weight": (self.vocabulary, self.hidden)}
        scale = 2.0 if form == "logits" else 2.0 * self.hidden**-0.25
        made = {name: (scale * torch.randn(shape, generator=generator)).to(self.device, DTYPES[self.dtype])
                for name, shape in shapes.items()}  # fmt: skip
        return {name: leaf.requires_grad_() for name, leaf in made.items()}

    def tokens_N(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (self.tokens,), generator=generator).to(self.device)


def plain(leaves: dict[str, Tensor], tokens_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits_NV = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].T
    log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
    chosen_N = log_probs_NV.gather(1, tokens_N[:, None])[:, 0]
    return chosen_N, -(log_probs_NV.exp() * log_probs_NV).sum(-1) if entropy else None


def ours(leaves: dict[str, Tensor], tokens_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    ops = registry.load_device(tokens_N.device.type).ops
    if "logits" in leaves:
        found = token_log_probabilities(leaves["logits"], tokens_N, ops, entropy=entropy)
    else:
        found = hidden_log_probabilities(leaves["hidden"], leaves["weight"], tokens_N, ops, entropy=entropy)
    return found.log_probability_N, found.entropy_N


FORMS = {"plain": plain, "ours": ours}


def loss_of(log_probability_N: Tensor, entropy_N: Tensor | None) -> Tensor:
    """A policy's: what tokens are worth is random, and entropy is wanted a little."""
    generator = torch.Generator().manual_seed(2)
    advantage_N = torch.randn(len(log_probability_N), generator=generator).to(log_probability_N.device)
    loss = -torch.dot(advantage_N, log_probability_N)
    return loss if entropy_N is None else loss - 0.01 * entropy_N.sum()


def prepare(problem: Problem, form: str, name: str, entropy: bool) -> Step:
    registry.load_device(problem.device)  # the same handling of memory
    leaves, tokens_N = problem.leaves(form), problem.tokens_N()

    def step() -> float:
        loss_of(*FORMS[name](leaves, tokens_N, entropy)).backward()
        for leaf in leaves.values():
            leaf.grad = None  # so that the next step's counts as memory of that step
        return 0.0

    return step


def agree(problem: Problem, form: str, entropy: bool) -> None:
    """Stop if the two differ, on the first tokens, by more than what they are rounded to."""
    small, found = replace(problem, tokens=min(problem.tokens, 256)), []
    for run in FORMS.values():
        leaves = small.leaves(form)
        loss = loss_of(*run(leaves, small.tokens_N(), entropy))
        found.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    limit = 1e-4 if problem.dtype == "float32" else 3e-2
    for one, other in zip(*found, strict=True):
        difference = float((one - other).abs().max() / one.abs().max())
        if not difference <= limit:
            raise SystemExit(f"{form}: values or gradients differ by {difference:.1e}; nothing was timed")


def measure(problem: Problem, form: str, entropy: bool, *, rounds: int, threads: int) -> dict[str, Any]:
    agree(problem, form, entropy)
    variants = {name: partial(prepare, problem, form, name, entropy) for name in FORMS}
    found = compare(variants, weighed=list(FORMS), rounds=rounds, threads=threads, device=problem.device)

    def time(figures: Figures) -> float:
        return figures.cpu_seconds if problem.device == "cpu" else figures.wall_seconds

    return {
        "form": form,
        "entropy": entropy,
        **{name: figures.plain() for name, figures in found.items()},
        "times_plain": time(found["ours"]) / time(found["plain"]),
        "memory_of_plain": found["ours"].peak_mb_over_base / max(1e-9, found["plain"].peak_mb_over_base),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':18s} {'plain s':>8s} {'ours s':>8s} {'ratio':>6s} {'plain MB':>9s} {'ours MB':>9s} {'ratio':>6s}")
    for row in rows:
        name = f"{row['form']}{'+entropy' if row['entropy'] else ''}"
        plain, ours = row["plain"], row["ours"]
        print(
            f"{name:18s} {plain['cpu_seconds']:8.2f} {ours['cpu_seconds']:8.2f} {row['times_plain']:6.2f} "
            f"{plain['peak_mb_over_base']:9.0f} {ours['peak_mb_over_base']:9.0f} {row['memory_of_plain']:6.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    problem = Problem(**{name: getattr(args, name) for name in Problem.__dataclass_fields__})
    rows = [measure(problem, *CASES[name], rounds=args.rounds, threads=args.threads) for name in args.cases]
    show(rows)
    settings = vars(problem) | {"threads": args.threads, "rounds": args.rounds}
    command = shlex.join(["python", "benchmarks/log_probabilities.py", *sys.argv[1:]])
    write(args.json, {"command": command, "machine": machine(), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
