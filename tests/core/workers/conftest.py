"""A real worker process around an engine made of arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchspec.backends.api import EngineOptions, EngineProcess
from torchspec.backends.remote.spec import Engine
from torchspec.core.registry import load_device
from torchspec.core.workers.remote_engine import RemoteEngine

HERE = Path(__file__).parent
TAPS = (1, 3, 5)

Start = Callable[..., RemoteEngine]


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """fake_runner.py."""
    spec = importlib.util.spec_from_file_location("fake_runner", HERE / "fake_runner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine's description, as an adapter registers it."""
    return Engine(name="fake", module="torch", runner="fake_runner", shims=lambda device: (str(HERE),))


@pytest.fixture
def options(tiny_target: Path) -> Callable[..., EngineOptions]:
    """As a training on the tiny target gives them."""

    def make(
        *,
        taps: tuple[int, ...] = TAPS,
        directory: Path | None = None,
        rank: int = 0,
        images: bool = False,
        **more: Any,
    ) -> EngineOptions:
        process: dict[str, Any] = {
            "python": Path(sys.executable), "start_timeout": 60.0, "call_timeout": 30.0, "store_mb": 10,
        }  # fmt: skip
        return EngineOptions(
            target=tiny_target,
            device=load_device("cpu"),
            local_rank=rank,
            taps=taps,
            directory=directory,
            images=images,
            process=EngineProcess(**{**process, **more}),
        )

    return make


@pytest.fixture
def start(engine: Engine, options: Callable[..., EngineOptions]) -> Iterator[Start]:
    """Start an engine; all are closed at the end."""
    opened: list[RemoteEngine] = []

    def load(**settings: Any) -> RemoteEngine:
        made = engine.load(options(**settings))
        assert isinstance(made, RemoteEngine)
        opened.append(made)
        return made

    yield load
    for each in opened:
        each.close()
