"""Engines whose adapters are not part of this release are registered, and refuse with the reason and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.backends.api import EngineOptions, UnavailableError
from torchspec.core.registry import backends, load_device, load_engine


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_refused_with_reason_and_remedy(name: str, tmp_path: Path) -> None:
    options = EngineOptions(target=tmp_path, device=load_device("cpu"))
    spec = backends().spec(name)
    assert not spec.probe().ok
    assert spec.capabilities == frozenset()
    complaint = f"no adapter for {name} yet\n.*--backend hf"
    with pytest.raises(UnavailableError, match=complaint) as caught:
        load_engine(name, options)
    assert caught.value.exit_code == 2
    with pytest.raises(UnavailableError, match=complaint):
        spec.load(options)
