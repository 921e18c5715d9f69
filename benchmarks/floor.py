"""The least that an EAGLE-3 step must compute: its matrix products and attention calls, each once, and nothing else.

Shared work counts once: the embeddings' share of q, k and v is one product over all tokens, the teacher's logits one
per row that teaches. Products of the loss run in the product's own chunks, since no more rows may be alive at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from problem import Inputs, Problem, make_batch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.objectives.chunks import vocabulary_tile


@dataclass(frozen=True, kw_only=True)
class Product:
    """`times` linear maps of [rows, inputs] to `outputs`, forward and then the gradients named.

    chunk, tile    at most so many rows, and so many of the outputs, at a time
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    times: int = 1
    gradients: tuple[str, ...] = ("input", "weight")
    chunk: int | None = None
    tile: int | None = None

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * self.times * (1 + len(self.gradients))

    def prepare(self, problem: Problem) -> Callable[[], None]:
        options = {"dtype": problem.torch_dtype, "device": problem.torch_device}
        count = min(self.chunk or self.rows, self.rows)
        x, w = torch.randn(self.rows, self.inputs, **options), torch.randn(self.outputs, self.inputs, **options)
        width = self.tile or self.outputs
        y = torch.randn(count, width, **options)
        dx, dw = torch.empty(count, self.inputs, **options), torch.zeros(self.outputs, self.inputs, **options)

        def run() -> None:
            for first in range(0, self.rows, count):
                part = x[first : first + count]
                for column in range(0, self.outputs, width):
                    maps = w[column : column + width]
                    out = y.view(-1)[: len(part) * len(maps)].view(len(part), len(maps))
                    torch.mm(part, maps.T, out=out)
                if "input" in self.gradients:
                    torch.mm(out, w, out=dx[: len(part)])
                if "weight" in self.gradients and count == self.rows:
                    torch.mm(out.T, part, out=dw)
                elif "weight" in self.gradients:
                    dw.addmm_(out.T, part)

        def run_all() -> None:
            for _ in range(self.times):
                run()

        return run_all


def products(problem: Problem) -> list[Product]:
    """Of the step that the product plans for these inputs."""
    batch = make_batch(problem, Inputs.of(problem))
    tokens, slots = problem.tokens, batch.inputs.slots.index_BQ.shape[1]
    pairs, rows, steps = batch.pairs.row_M.numel(), batch.pairs.place_R.numel(), problem.unroll
    hidden, wide = problem.hidden, problem.intermediate
    kv = 2 * problem.kv_heads * problem.head_dim
    chunks = max(1, len(batch.chunks))
    forward: tuple[str, ...] = ()
    return [
        Product(name="fc", rows=tokens, inputs=3 * hidden, outputs=hidden, gradients=("weight",)),
        Product(name="embedding to q, k, v", rows=tokens + steps, inputs=hidden, outputs=hidden + kv),
        Product(name="feature to k, v, first step", rows=tokens, inputs=hidden, outputs=kv),
        Product(name="feature to q, first step", rows=slots, inputs=hidden, outputs=hidden),
        Product(name="feature to q, k, v", rows=slots, inputs=hidden, outputs=hidden + kv, times=steps - 1),
        Product(name="attention output", rows=slots, inputs=hidden, outputs=hidden, times=steps),
        Product(name="MLP gate and up", rows=slots, inputs=hidden, outputs=2 * wide, times=steps),
        Product(name="MLP down", rows=slots, inputs=wide, outputs=hidden, times=steps),
        Product(
            name="draft head",
            rows=pairs,
            inputs=hidden,
            outputs=problem.draft_vocabulary,
            chunk=-(-pairs // chunks),
        ),
        Product(
            name="teacher",
            rows=rows,
            inputs=hidden,
            outputs=problem.vocabulary,
            gradients=forward,
            chunk=-(-rows // chunks),
            tile=vocabulary_tile(problem.vocabulary),
        ),
    ]


def prepare_attention(problem: Problem) -> Callable[[], None]:
    """The steps' attention over step-0 keys, forward and backward, on the device's kernel."""
    attention = registry.load_device(problem.device).attention
    batch = make_batch(problem, Inputs.of(problem))
    mask: MaskSpec = batch.inputs.mask
    slots = batch.inputs.slots.index_BQ.shape[1]
    options = {"dtype": problem.torch_dtype, "device": problem.torch_device}
    q = torch.randn(1, slots, problem.heads, problem.head_dim, **options)
    k, v = (torch.randn(1, problem.tokens, problem.kv_heads, problem.head_dim, **options) for _ in range(2))

    def run() -> None:
        for _ in range(problem.unroll):
            out, lse = attention.forward(q, k, v, mask, problem.head_dim**-0.5)
            attention.backward(out, q, k, v, out, lse, mask, problem.head_dim**-0.5)

    return run


def prepare(problem: Problem) -> Callable[[], dict[str, float]]:
    """Run everything; -> CPU seconds of each part."""
    parts: dict[str, Callable[[], None]] = {item.name: item.prepare(problem) for item in products(problem)}
    parts["attention"] = prepare_attention(problem)
    square: Tensor = torch.randn(2048, 2048, dtype=problem.torch_dtype, device=problem.torch_device)
    parts[SQUARE] = lambda: _square(square)

    def step() -> dict[str, float]:
        return dict(_timed(parts, problem.device))

    return step


SQUARE = "square product of 2048, a yardstick outside the floor"


def _timed(parts: dict[str, Callable[[], None]], device: str) -> Iterator[tuple[str, float]]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    for name, run in parts.items():
        begun = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        yield name, clock() - begun


def _square(x: Tensor) -> None:
    torch.mm(x, x)
