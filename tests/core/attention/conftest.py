"""The attention of each registered device that can run here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from torchspec.core.interfaces.device import Attention
from torchspec.core.registry import devices, load_device


@dataclass(frozen=True, kw_only=True)
class Subject:
    attention: Attention
    device: torch.device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def subject(request: pytest.FixtureRequest) -> Subject:
    availability = devices().spec(request.param).probe()
    if not availability.ok:
        pytest.skip(f"{request.param}: {availability.reason}")
    device = load_device(request.param)
    return Subject(attention=device.attention, device=device.runtime.bind(0))
