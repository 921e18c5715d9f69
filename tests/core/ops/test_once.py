"""Every operation with a gradient by hand refuses a second one, and functorch; what a policy uses may be compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.attention.block import BlockForm, BlockMask, block_attention
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.attention.ulysses import spread_heads
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.models.fused import gated_linear, linear, normed_linear, rms_norm, rotate
from torchspec.core.objectives import hidden_log_probabilities, token_log_probabilities
from torchspec.core.parallel.sequence import gather_sequence
from torchspec.core.parallel.shards import Layout
from torchspec.core.registry import load_device

Operation = Callable[..., Tensor]

DEVICE = load_device("cpu")
OPS, ATTENTION = DEVICE.ops, DEVICE.attention
TOKENS = torch.tensor([1, 0, 3, -100])


def rows_gathered(x_BSH: Tensor) -> Tensor:
    """Of two ranks that hold the same; nothing is sent to see that a gradient has none."""
    two = SimpleNamespace(
        all_gather=lambda x, group: [x, x], reduce_scatter=lambda parts, group: parts[0] + parts[1]
    )  # fmt: skip
    sequence: Any = SimpleNamespace(size=2, group=None, communication=two)
    return gather_sequence(x_BSH, Layout(length=8, ring=2), sequence)


def heads_spread(key: Tensor, value: Tensor) -> Tensor:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    alone: Any = SimpleNamespace(
        ulysses=one, ring=one, communication=SimpleNamespace(all_to_all=lambda parts, group: parts)
    )
    return torch.stack(spread_heads(key, value, Layout(length=4), alone))


def in_blocks(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    block = BlockMask(size=2)
    mask = block.context(torch.tensor([[2, 4]]), torch.tensor([[0, 0]]))
    form = BlockForm(context=ATTENTION, own=ATTENTION, mask=mask, block=block, scale=0.5)
    return block_attention(form, q, (key, value), (key, value))


def rotated(x_BSHD: Tensor) -> Tensor:
    angle_P1 = torch.arange(4, dtype=x_BSHD.dtype)[:, None] * torch.ones(8, dtype=x_BSHD.dtype)
    return rotate(x_BSHD, torch.arange(4)[None], (angle_P1.cos(), angle_P1.sin()), OPS)


HEADS = (1, 4, 2, 8)
CASES: dict[str, tuple[Operation, tuple[tuple[int, ...], ...]]] = {
    "RMS norm": (lambda x, weight: rms_norm(x, weight, 1e-6, OPS), ((4, 8), (8,))),
    "rotary": (rotated, (HEADS,)),
    "normed linear": (lambda x, n, a, b: torch.cat(normed_linear(x, n, 1e-6, (a, b), (None, None), OPS), -1),
                      ((4, 8), (8,), (6, 8), (5, 8))),
    "gated linear": (lambda *x: gated_linear(*x, OPS), ((4, 6), (4, 6), (8, 6), (4, 8))),
    "linear": (lambda x, weight: linear(x, weight, OPS), ((4, 8), (6, 8))),
    "linear, added": (lambda x, weight, add: linear(x, weight, OPS, add), ((4, 8), (6, 8), (4, 6))),
    "attention": (lambda q, *kv: ttt_attention(ATTENTION, q, kv[:2], kv[2:], MaskSpec.causal(), 0.5), (HEADS,) * 5),
    "block attention": (in_blocks, (HEADS,) * 3),
    "heads": (heads_spread, (HEADS,) * 2),
    "rows": (rows_gathered, ((1, 4, 3),)),
    "log-probabilities": (lambda x: token_log_probabilities(x, TOKENS, OPS).log_probability_N, ((4, 8),)),
    "hidden log-probabilities": (lambda x, w: hidden_log_probabilities(x, w, TOKENS, OPS).log_probability_N,
                                 ((4, 8), (6, 8))),
}  # fmt: skip
LINEAR = ("rotary", "heads", "rows")
"""Their gradient does not depend on what they were given."""


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(name: str) -> tuple[Operation, list[Tensor]]:
    work, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    return work, [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def test_a_second_derivative_is_refused_and_never_taken_for_zero(name: str) -> None:
    """Of a plain sum, of which torch's own refusal knows nothing, and of a loss whose gradient has a graph."""
    work, leaves = drawn(name)
    for loss in (work(*leaves).sum(), work(*leaves).square().sum()):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        for gradient in gradients:
            if name in LINEAR and not gradient.requires_grad:
                continue
            assert gradient.requires_grad
            penalty = gradient.square().sum() + sum(leaf.square().sum() for leaf in leaves)
            with pytest.raises(RuntimeError, match="differentiable once, its gradient has no gradient"):
                torch.autograd.grad(penalty, leaves, retain_graph=True)
    assert gradients[0].requires_grad  # of the squares


def test_a_first_derivative_is_the_same_with_a_graph(name: str) -> None:
    work, leaves = drawn(name)
    for repeated, plain in zip(
        torch.autograd.grad(work(*leaves).sum(), leaves, create_graph=True),
        torch.autograd.grad(work(*leaves).sum(), leaves),
        strict=True,
    ):
        assert torch.equal(repeated, plain)


def test_functorch_is_refused(name: str) -> None:
    work, leaves = drawn(name)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda *x: work(*x).sum())(*leaves)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.vmap(work)(*(leaf[None].expand(2, *leaf.shape) for leaf in leaves))


@pytest.mark.parametrize("name", ["log-probabilities", "hidden log-probabilities"])
def test_compiled_it_is_the_same(name: str) -> None:
    """Of what a policy's loop may compile. The compiler makes of a Function a graph of its own."""
    work, leaves = drawn(name)
    compiled = torch.compile(work, backend="eager")
    want = torch.autograd.grad(work(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)
