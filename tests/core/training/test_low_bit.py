"""Moments in 8 bits: the update is AdamW's, what it holds is small, and what is stored brings it back."""

from __future__ import annotations

import importlib.util
import math
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from torchspec.core.config.schema import TrainConfig
from torchspec.core.errors import ConfigError
from torchspec.core.training import low_bit
from torchspec.core.training.low_bit import check_low_bit, state_bytes
from torchspec.core.training.optimizer import (
    build_optimizer,
    fill_optimizer,
    optimizer_codes,
    optimizer_tensors,
    set_learning_rate,
)

LR, DECAY, BETAS = 0.01, 0.1, (0.9, 0.95)
CODED = {"0.weight", "2.weight"}  # 64 * 128 and 128 * 64 values; the norm and the biases are too small


def make(optimizer: str = "adamw8bit") -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(3)
    draft = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64))
    config = TrainConfig(optimizer=optimizer, lr=1.0, weight_decay=DECAY, betas=BETAS)
    made = build_optimizer(draft, config)
    set_learning_rate(made, LR)
    return draft, made


def steps(draft: nn.Module, optimizer: Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        loss = F.mse_loss(draft(x), x.flip(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def weights(draft: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in draft.state_dict().items()}


pytestmark = pytest.mark.usefixtures("torchao")


def test_the_first_update_is_adamws() -> None:
    """Quantised is what is kept, not what the step itself takes (1711.05101, algorithm 2, t = 1)."""
    draft, optimizer = make()
    before = {name: parameter.detach().double() for name, parameter in draft.named_parameters()}
    x = torch.randn(32, 64)
    F.mse_loss(draft(x), x.flip(-1)).backward()
    grads = {
        name: parameter.grad.double() for name, parameter in draft.named_parameters() if parameter.grad is not None
    }
    optimizer.step()
    for name, parameter in draft.named_parameters():
        decay = DECAY if parameter.ndim >= 2 else 0.0
        grad = grads[name]
        expected = before[name] * (1 - LR * decay) - LR * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)


def test_it_learns_as_adamw_does() -> None:
    eight = steps(*make(), 0, 150)
    plain = steps(*make("adamw"), 0, 150)
    assert eight[0] == plain[0]
    assert eight[-1] < 0.2 * eight[0]
    assert math.fsum(eight[-20:]) == pytest.approx(math.fsum(plain[-20:]), rel=0.05)
    assert eight[-20:] != plain[-20:]


def test_what_is_held() -> None:
    draft, optimizer = make()
    steps(draft, optimizer, 0, 2)
    codes = optimizer_codes(draft, optimizer)
    assert {name.rsplit(".", 2)[0] for name in codes} == CODED
    for name in CODED:
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[draft.get_parameter(name)][moment]
            held = sum(part.nbytes for part in (state.codes, state.scale, state.qmap))
            assert held == state_bytes(8192)
            assert held < 0.3 * 4 * 8192
            assert state.signed == (moment == "exp_avg")  # the second is never negative
    assert state_bytes(4095) == 4 * 4095
    assert state_bytes(4097) == 4 * 4097


def continued(stored: dict[str, Tensor], codes: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    draft, optimizer = make()
    draft.load_state_dict(state)
    fill_optimizer(draft, optimizer, stored, codes)
    steps(draft, optimizer, 4, 8)
    return weights(draft)


def test_stored_state_brings_it_back() -> None:
    """To the last bit with this rank's codes; nearly, and not quite, from the values in fp32."""
    draft, optimizer = make()
    steps(draft, optimizer, 0, 4)
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(draft, optimizer).items()}
    codes = {name: tensor.clone() for name, tensor in optimizer_codes(draft, optimizer).items()}
    state = weights(draft)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert stored.keys() == optimizer_tensors(*make("adamw")).keys()
    steps(draft, optimizer, 4, 8)
    expected = weights(draft)

    exact, near = continued(stored, codes, state), continued(stored, {}, state)
    for name, tensor in expected.items():
        assert torch.equal(exact[name], tensor), name
        torch.testing.assert_close(near[name], tensor, rtol=0, atol=0.2 * LR)
    assert any(not torch.equal(near[name], tensor) for name, tensor in expected.items())


def test_codes_of_other_shards_are_not_taken() -> None:
    draft, optimizer = make()
    steps(draft, optimizer, 0, 2)
    stored = optimizer_tensors(draft, optimizer)
    codes = {name: tensor[:1].clone() for name, tensor in optimizer_codes(draft, optimizer).items()}
    fresh, anew = make()
    fill_optimizer(fresh, anew, stored, codes)
    for name, tensor in optimizer_tensors(fresh, anew).items():
        torch.testing.assert_close(tensor, stored[name], rtol=0.02, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the update")
def test_the_compiled_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make()
    steps(*expected, 0, 3)
    monkeypatch.setattr(low_bit, "WORTH_COMPILING", 1)
    compiled = make()
    steps(*compiled, 0, 3)
    for name, tensor in weights(expected[0]).items():
        torch.testing.assert_close(weights(compiled[0])[name], tensor, rtol=0, atol=0.05 * LR)


def test_a_host_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(low_bit, "WORTH_COMPILING", 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    steps(*make(), 0, 2)
    assert "there is no g++" in caplog.text


def test_missing_torchao_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.optimizer: torchao is not installed[\s\S]*torchspec\[lowbit\]"):
        check_low_bit()
