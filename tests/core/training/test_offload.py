"""Activations in the host's memory: the same gradients, every tensor out once, none taken for another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.core.ops.fp8 import E4M3, scaled
from torchspec.core.ops.fp8_weight import Fp8Weight
from torchspec.core.training.offload import HostOffload, offloaded


class Traffic:
    """Copies that stand for transfers, counted."""

    def __init__(self) -> None:
        self.out = self.home = 0

    def away(self, tensor: Tensor) -> Tensor:
        self.out += tensor.nbytes
        return tensor.clone()

    def back(self, host: Tensor, device: torch.device) -> Tensor:
        self.home += host.nbytes
        return host.clone()

    def hooks(self, *stays: Tensor) -> HostOffload:
        return HostOffload(away=self.away, back=self.back, smallest_bytes=0, stays=lambda: stays)


def test_gradients_are_the_same_and_a_tensor_goes_out_once() -> None:
    weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def loss() -> Tensor:
        x = torch.linspace(0, 1, 64, dtype=torch.float64).view(8, 8) @ weight
        return (x * x.sin() + x * x.cos() + x.exp()).sum()  # x is saved five times

    expected = torch.autograd.grad(loss(), weight)[0]
    traffic = Traffic()
    with traffic.hooks().hooks():
        made = loss()
    assert torch.equal(torch.autograd.grad(made, weight)[0], expected)
    # x, sin, cos, exp and the constant input; never the parameter.
    assert traffic.out == 5 * 64 * 8


def test_memory_that_was_freed_and_taken_again_is_another_tensor() -> None:
    """Without it the second tensor, at the first one's place, would come back as the first."""
    traffic = Traffic()
    packer = traffic.hooks()
    packed = []
    for value in range(20):
        tensor = torch.full((1000,), float(value))
        packed.append(packer.pack(tensor))
        del tensor
    assert [float(packer.unpack(kept)[0]) for kept in packed] == list(range(20))


def test_a_weight_in_fp8_stays() -> None:
    """As all parameters do; its memory is that of the numbers in it."""
    operand = scaled(torch.randn(16, 32), E4M3, "row", 1 << 20)
    whole = Fp8Weight(operand.values, operand.scale)
    for weight in (whole, whole[:, :16]):
        assert Traffic().hooks().pack(weight) is weight


def test_a_tensor_that_was_changed_is_another_one() -> None:
    packer = Traffic().hooks()
    tensor = torch.zeros(10)
    before = packer.pack(tensor)
    tensor.add_(1)
    after = packer.pack(tensor)
    assert float(packer.unpack(before).sum()) == 0
    assert float(packer.unpack(after).sum()) == 10


def test_a_tensor_comes_back_once_for_those_who_hold_it_together() -> None:
    traffic = Traffic()
    packer = traffic.hooks()
    packed = packer.pack(torch.ones(10))
    first, second = packer.unpack(packed), packer.unpack(packed)
    assert first is second
    assert traffic.home == 40
    del first, second
    packer.unpack(packed)
    assert traffic.home == 80


def test_parameters_stay_also_where_only_a_view_of_them_is_saved() -> None:
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 3, bias=False)
    traffic = Traffic()
    x = torch.randn(4, 8, requires_grad=True)
    with traffic.hooks(*first.parameters(), *second.parameters()).hooks():
        loss = second(first(x).relu()).square().sum()
    loss.backward()
    assert traffic.out == (x.numel() + 4 * 16 + 4 * 3) * 4  # x, relu's output, the squares' input


def test_small_tensors_stay() -> None:
    packer = HostOffload(away=torch.clone, back=lambda host, _: host, smallest_bytes=1 << 20)
    small = torch.ones(10)
    assert packer.pack(small) is small


def test_the_hooks_of_a_run_keep_the_numbers() -> None:
    x = torch.randn(700, 700, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(x.sin().square().sum(), x)[0]
    with offloaded(nn.Linear(2, 2), activations=True):
        made = x.sin().square().sum()
    assert torch.equal(torch.autograd.grad(made, x)[0], expected)
