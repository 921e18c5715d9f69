"""The differentiable layer pieces: numerical gradients, their plain composition, and what they keep.

Shape letters: B batch, S rows, H input features, Z output features of one map, I MLP width, N heads, D head size,
P angles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.models import fused

EPS = 1e-2
B, S, H, Z, I, N, D, P = 2, 3, 5, (4, 6, 2), 7, 2, 6, 11  # noqa: E741


class SmallSlices(FusedOps):
    """Two rows of seven numbers at a time."""

    temporary_bytes = 2 * 7 * 8


OPS = SmallSlices()


def plain_norm(x: Tensor, weight_H: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_H


def plain_rotate(x_BSHD: Tensor, angle_BS: Tensor, tables_PD: tuple[Tensor, Tensor]) -> Tensor:
    cos_BSD, sin_BSD = (table_PD[angle_BS].unsqueeze(-2) for table_PD in tables_PD)
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos_BSD + torch.cat((-second, first), dim=-1) * sin_BSD


def plain_normed_linear(
    x: Tensor, norm_H: Tensor, weights_ZH: Sequence[Tensor], adds: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    made = [F.linear(plain_norm(x, norm_H), weight_ZH) for weight_ZH in weights_ZH]
    return tuple(out if add is None else out + add for out, add in zip(made, adds, strict=True))


def plain_gated_linear(gate: Tensor, up: Tensor, weight_HI: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(F.silu(gate) * up, weight_HI)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A fused form and its plain one over the same tensors; both return tuples."""

    given: tuple[Tensor, ...]
    fused: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.detach().to(dtype).requires_grad_() for x in self.given)


def random(seed: int, *shape: int) -> Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.arange(P, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    angle_PD = torch.cat((half, half), dim=-1)
    return angle_PD.cos().to(dtype), angle_PD.sin().to(dtype)


ANGLES = torch.tensor([[0, 4, 10], [7, 7, 1]])


def norm_piece() -> Piece:
    return Piece(
        given=(random(0, B, S, H), random(1, H)),
        fused=lambda x, w: (fused.rms_norm(x, w, EPS, OPS),),
        plain=lambda x, w: (plain_norm(x, w),),
    )


def rotate_piece() -> Piece:
    return Piece(
        given=(random(0, B, S, N, D),),
        fused=lambda x: (fused.rotate(x, ANGLES, tables(x.dtype), OPS),),
        plain=lambda x: (plain_rotate(x, ANGLES, tables(x.dtype)),),
    )


def normed_linear_piece(added: Sequence[bool]) -> Piece:
    maps = [random(2 + place, size, H) for place, size in enumerate(Z)]
    adds = [random(8 + place, B, S, size) for place, size in enumerate(Z) if added[place]]

    def split(rest: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        left = iter(rest[len(Z) :])
        return rest[: len(Z)], [next(left) if wanted else None for wanted in added]

    def fused_form(x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, given = split(rest)
        return fused.normed_linear(x, w, EPS, weights, given, OPS)

    def plain_form(x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return plain_normed_linear(x, w, *split(rest))

    return Piece(given=(random(0, B, S, H), random(1, H), *maps, *adds), fused=fused_form, plain=plain_form)


def gated_piece() -> Piece:
    return Piece(
        given=(random(0, B, S, I), random(1, B, S, I), random(2, H, I), random(3, B, S, H)),
        fused=lambda g, u, w, r: (fused.gated_linear(g, u, w, r, OPS),),
        plain=lambda g, u, w, r: (plain_gated_linear(g, u, w, r),),
    )


PIECES = {
    "rms_norm": norm_piece(),
    "rotate": rotate_piece(),
    "normed_linear": normed_linear_piece((False, False, False)),
    "normed_linear, all added": normed_linear_piece((True, True, True)),
    "normed_linear, some added": normed_linear_piece((True, False, True)),
    "gated_linear": gated_piece(),
}


@pytest.fixture(params=list(PIECES))
def piece(request: pytest.FixtureRequest) -> Piece:
    return PIECES[request.param]


def gradients(outs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every entry counts differently."""
    weighted = [(out * torch.linspace(-1.0, 2.0, out.numel()).view_as(out).to(out.dtype)).sum() for out in outs]
    return torch.autograd.grad(sum(weighted[1:], weighted[0]), leaves)


def near(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < tolerance, f"{tuple(one.shape)}: {error:.1e}"


def test_gradients_are_the_numerical_ones(piece: Piece) -> None:
    assert torch.autograd.gradcheck(piece.fused, piece.given)


def test_values_and_gradients_are_the_plain_compositions(piece: Piece) -> None:
    leaves = piece.to(torch.float64)
    got, want = piece.fused(*leaves), piece.plain(*leaves)
    near(got, want, 1e-14)
    near(gradients(got, leaves), gradients(want, leaves), 1e-14)


def test_bfloat16_is_close_to_fp32(piece: Piece) -> None:
    """Within a few roundings of 8 bits, in bf16's own dtype; the oracle reads the same rounded numbers."""
    narrow = piece.to(torch.bfloat16)
    wide = tuple(x.detach().float().requires_grad_() for x in narrow)
    got, want = piece.fused(*narrow), piece.plain(*wide)
    made = gradients(got, narrow)
    assert all(x.dtype == torch.bfloat16 for x in (*got, *made))
    near(got, want, 8e-3)
    near(made, gradients(want, wide), 1.2e-2)


def scattered(x: Tensor) -> Tensor:
    """The same numbers, with the last two axes swapped in memory and gaps between them."""
    room = x.new_empty(*x.shape[:-2], x.shape[-1], 2 * x.shape[-2])
    view = room[..., ::2].transpose(-1, -2)
    view.copy_(x)
    return view.detach().requires_grad_()


def test_inputs_need_not_be_contiguous(piece: Piece) -> None:
    leaves = tuple(scattered(x.detach()) if x.dim() > 1 else x for x in piece.given)
    assert not any(x.is_contiguous() for x in leaves if x.dim() > 1)
    got, want = piece.fused(*leaves), piece.plain(*piece.given)
    near(got, want, 1e-14)
    near(gradients(got, leaves), gradients(want, piece.given), 1e-14)


def test_gradients_that_arrive_scattered(piece: Piece) -> None:
    outs = piece.fused(*piece.given)
    seeds = [random(20 + place, *out.shape).detach() for place, out in enumerate(outs)]
    want = torch.autograd.grad(piece.plain(*piece.given), piece.given, seeds)
    near(torch.autograd.grad(outs, piece.given, [scattered(seed).detach() for seed in seeds]), want, 1e-14)


@pytest.mark.parametrize("name", [name for name in PIECES if name != "rotate"])
def test_rows_without_a_batch(name: str) -> None:
    """[S, ...] as [1, S, ...]; the rotation has heads behind its rows and always a batch."""
    piece = PIECES[name]
    leaves = tuple(x.detach()[0].clone().requires_grad_() if x.dim() == 3 else x for x in piece.given)
    got, want = piece.fused(*leaves), piece.plain(*leaves)
    near(got, want, 1e-14)
    near(gradients(got, leaves), gradients(want, leaves), 1e-14)


def test_incoming_gradients_are_left_alone(piece: Piece) -> None:
    """They may belong to other uses of the same output."""
    outs = piece.fused(*piece.given)
    seeds = [random(20 + place, *out.shape).detach() for place, out in enumerate(outs)]
    before = [seed.clone() for seed in seeds]
    torch.autograd.grad(outs, piece.given, seeds)
    assert all(torch.equal(seed, copy) for seed, copy in zip(seeds, before, strict=True))


def test_an_output_nobody_uses() -> None:
    piece = PIECES["normed_linear, some added"]
    leaves = piece.to(torch.float64)
    used = torch.autograd.grad(piece.fused(*leaves)[1].square().sum(), leaves)
    want = torch.autograd.grad(piece.plain(*leaves)[1].square().sum(), leaves, allow_unused=True)
    for one, other in zip(used, want, strict=True):
        near([one], [other], 1e-14) if other is not None else torch.testing.assert_close(one, torch.zeros_like(one))


def kept(run: Callable[[], object], parameters: Sequence[Tensor]) -> dict[int, int]:
    """Elements of each storage that the graph of `run` holds, those of the parameters left out."""
    known = {x.untyped_storage().data_ptr() for x in parameters}
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        alive = run()  # what is dropped would lend its address to the next
    del alive
    return found


def test_the_norm_keeps_its_input_and_one_value_a_row() -> None:
    x, weight_H = PIECES["rms_norm"].given
    found = kept(lambda: fused.rms_norm(x, weight_H, EPS, OPS), (weight_H,))
    assert found.pop(x.untyped_storage().data_ptr()) == x.numel()
    assert list(found.values()) == [B * S]


def test_the_rotation_keeps_row_numbers() -> None:
    (x_BSHD,) = PIECES["rotate"].given
    tables_PD = tables(torch.float64)
    found = kept(lambda: fused.rotate(x_BSHD, ANGLES, tables_PD, OPS), tables_PD)
    assert found == {ANGLES.untyped_storage().data_ptr(): B * S}


@pytest.mark.parametrize("added", [(False, False, False), (True, False, True)])
def test_normed_maps_keep_their_input_alone(added: tuple[bool, bool, bool]) -> None:
    piece = normed_linear_piece(added)
    x, *rest = piece.given
    found = kept(lambda: piece.fused(*piece.given), rest[: 1 + len(Z)])
    assert found == {x.untyped_storage().data_ptr(): B * S * H}


def test_the_gated_map_keeps_gate_and_up_alone() -> None:
    gate, up, weight_HI, residual = PIECES["gated_linear"].given
    found = kept(lambda: fused.gated_linear(gate, up, weight_HI, residual, OPS), (weight_HI,))
    assert found == {x.untyped_storage().data_ptr(): B * S * I for x in (gate, up)}
