"""EAGLE-3 training step (forward and backward) beside its floor and beside the eager reference.

    python benchmarks/step.py --tokens 2048 --json step.json

The losses of the variants are compared before anything is timed: a fast wrong step is worth nothing. `floor` is what
the step cannot avoid (benchmarks/floor.py), its time the sum over its products and attention calls. With --parts,
`attention` is the attention of the whole unroll beside plain causal attention, `loss` the loss beside its products.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import eager_reference
import floor
import torch
from harness import Figures, Step, compare, machine, write
from problem import EPS, THETA, Inputs, Problem, make_batch, make_draft, memory

from torchspec.core import registry
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.mask import MaskSpec

LONGEST_EAGER = 2048


def prepare_product(problem: Problem, recompute: bool) -> Step:
    inputs = Inputs.of(problem)
    algorithm, draft = make_draft(problem, inputs)
    device = registry.load_device(problem.device)

    def step() -> float:
        draft.zero_grad()
        result = algorithm.step(draft, inputs.head, inputs.rows, device, memory(recompute=recompute))
        result.numerator.backward()
        loss = result.numerator.detach() / result.denominator
        return loss.item() if problem.device == "cpu" else 0.0

    return step


def prepare_eager(problem: Problem) -> Step:
    inputs = Inputs.of(problem)
    algorithm, draft = make_draft(problem, inputs)
    registry.load_device(problem.device)  # the same handling of memory
    weights = dict(draft.named_parameters())
    shape = eager_reference.Shape(
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        rope_theta=THETA,
        eps=EPS,
        unroll=problem.unroll,
        step_decay=algorithm.options.step_decay,
    )
    batch = eager_reference.Batch(
        input_ids_BT=inputs.features.input_ids_T[None],
        loss_mask_BT=inputs.mask_T[None],
        taps_BTZ=inputs.features.taps_TNH.flatten(1)[None],
        last_BTH=inputs.features.last_TH[None],
    )

    def step() -> float:
        draft.zero_grad()
        loss = eager_reference.step_loss(
            weights, shape, batch, inputs.head.embedding_VH, inputs.head.head_VH, inputs.ids_N
        )
        loss.backward()
        return loss.item()

    return step


def prepare_ttt(problem: Problem, with_diagonals: bool) -> Step:
    """The attention of every step of the unroll; without diagonals it is plain causal attention, K times."""
    attention = registry.load_device(problem.device).attention
    options = {"dtype": problem.torch_dtype, "device": problem.torch_device, "requires_grad": True}
    q = torch.randn(1, problem.tokens, problem.heads, problem.head_dim, **options)
    shape = (1, problem.tokens, problem.kv_heads, problem.head_dim)
    keys = [torch.randn(shape, **options) for _ in range(problem.unroll)]
    values = [torch.randn(shape, **options) for _ in range(problem.unroll)]
    dout = torch.randn_like(q)

    def step() -> float:
        for count in range(1, problem.unroll + 1):
            used = count if with_diagonals else 1
            out = ttt_attention(attention, q, keys[:used], values[:used], MaskSpec.causal(), problem.head_dim**-0.5)
            torch.autograd.grad(out, [q, *keys[:used], *values[:used]], dout)
        return 0.0

    return step


def prepare_loss(problem: Problem) -> Step:
    """The loss alone: teacher, draft logits, terms and gradients, on fixed outputs of the unroll."""
    inputs = Inputs.of(problem)
    algorithm, draft = make_draft(problem, inputs)
    device = registry.load_device(problem.device)
    batch = make_batch(problem, inputs)
    slots = batch.inputs.slots.index_BQ.shape[1]
    outputs = [
        torch.randn(1, slots, problem.hidden, device=problem.torch_device, dtype=problem.torch_dtype)
        for _ in range(problem.unroll)
    ]
    for output in outputs:
        output.requires_grad_()
    draft.unroll = lambda *_, **__: outputs  # type: ignore[method-assign]

    def step() -> float:
        draft.zero_grad()
        for output in outputs:
            output.grad = None
        algorithm.run(draft, inputs.head, batch, device).numerator.backward()
        return 0.0

    return step


def prepare_loss_products(problem: Problem) -> Step:
    registry.load_device(problem.device)
    runs = [item.prepare(problem) for item in floor.products(problem) if item.chunk is not None]

    def step() -> float:
        for run in runs:
            run()
        return 0.0

    return step


def measure(problem: Problem, *, rounds: int, threads: int, parts: bool) -> dict[str, Any]:
    """The body of the JSON for one problem; `parts`: also attention and loss, each beside its own floor."""
    eager = problem.tokens <= LONGEST_EAGER and problem.device == "cpu"
    variants: dict[str, Any] = {
        "product": partial(prepare_product, problem, False),
        "checkpointed": partial(prepare_product, problem, True),
        "floor": partial(floor.prepare, problem),
    }
    if eager:
        variants["eager"] = partial(prepare_eager, problem)
    if parts:
        variants |= {
            "ttt attention": partial(prepare_ttt, problem, True),
            "causal attention": partial(prepare_ttt, problem, False),
            "loss": partial(prepare_loss, problem),
            "loss products": partial(prepare_loss_products, problem),
        }
    weighed = [name for name in ("product", "checkpointed", "eager") if name in variants]
    found = compare(variants, weighed=weighed, rounds=rounds, threads=threads, device=problem.device)
    floor_parts = found["floor"].parts
    yardstick = 2 * 2048**3 / floor_parts[floor.SQUARE]
    items = [
        {
            "name": item.name,
            "rows": item.rows,
            "inputs": item.inputs,
            "outputs": item.outputs,
            "times": item.times,
            "gradients": list(item.gradients),
            "flops": item.flops,
            "cpu_seconds": floor_parts[item.name],
            "flops_per_second": item.flops / floor_parts[item.name],
        }
        for item in floor.products(problem)
    ]
    best = max(yardstick, *(item["flops_per_second"] for item in items))
    seconds = sum(item["cpu_seconds"] for item in items)
    least = seconds + floor_parts["attention"]
    rate = sum(item["flops"] for item in items) / seconds

    def row(figures: Figures) -> dict[str, float]:
        time = figures.cpu_seconds if problem.device == "cpu" else figures.wall_seconds
        return figures.plain() | {"floor_cpu_seconds": least, "over_floor": time / least}

    def ratio(name: str, base: str) -> dict[str, float]:
        ours, theirs = (
            found[key].cpu_seconds if problem.device == "cpu" else found[key].wall_seconds for key in (name, base)
        )
        return {"seconds": ours, f"{base.replace(' ', '_')}_seconds": theirs, "ratio": ours / theirs}

    return {
        "settings": vars(problem) | {"threads": threads, "rounds": rounds},
        **row(found["product"]),
        "checkpointed": row(found["checkpointed"]),
        **({"eager": row(found["eager"])} if eager else {}),
        **({"attention": ratio("ttt attention", "causal attention")} if parts else {}),
        **({"loss": ratio("loss", "loss products")} if parts else {}),
        "floor": {
            "products": items,
            "attention_seconds": floor_parts["attention"],
            "flops_per_second": rate,
            "best_flops_per_second": best,
            "share_of_best": rate / best,
        },
    }


def agree(problem: Problem) -> None:
    """Stop if the step's loss is not the eager reference's."""
    small = Problem(**(vars(problem) | {"tokens": min(problem.tokens, 256)}))
    losses = [prepare_product(small, recompute)() for recompute in (False, True)] + [prepare_eager(small)()]
    if max(losses) - min(losses) > 1e-5 * abs(losses[-1]):
        raise SystemExit(f"the losses differ: {losses}; nothing was timed")
    print(f"loss of the first tokens {losses[0]:.6f}, eager reference {losses[-1]:.6f}")


def show(body: dict[str, Any]) -> None:
    print(f"{'':14s} {'cpu s':>8s} {'over floor':>10s} {'peak MB':>8s}")
    for name in ("product", "checkpointed", "eager"):
        row = body if name == "product" else body.get(name)
        if row:
            print(f"{name:14s} {row['cpu_seconds']:8.3f} {row['over_floor']:10.3f} {row['peak_mb_over_base']:8.0f}")
    print(f"{'floor':14s} {body['floor_cpu_seconds']:8.3f}")
    share, rate = body["floor"]["share_of_best"], body["floor"]["flops_per_second"]
    print(f"the floor's products run at {rate / 1e9:.0f} GFLOP/s, {share:.0%} of the best rate of this run")
    for name in ("attention", "loss"):
        if name in body:
            print(f"{name} over its own floor {body[name]['ratio']:.3f}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the one sequence")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that is supervised")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", action="store_true", help="measure attention and loss alone too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments(parser)
    names = ("hidden", "intermediate", "heads", "kv_heads", "head_size", "vocabulary", "draft_vocabulary", "unroll")
    for name in names:
        default = Problem.__dataclass_fields__[name].default
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args()
    problem = Problem(**{name: getattr(args, name) for name in Problem.__dataclass_fields__})
    if problem.device == "cpu" and problem.dtype == "float32":
        agree(problem)
    body = measure(problem, rounds=args.rounds, threads=args.threads, parts=args.parts)
    show(body)
    command = shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]])
    write(args.json, {"command": command, "machine": machine(), **body})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
