"""A run directory with everything that a page shows, and a browser to look at pages with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchspec.core.report import charts

WriteRun = Callable[..., Path]


def train_row(step: int) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "epoch": 0, "samples": 8 * step, "tokens": 500 * step, "loss": 1 + 8 / step,
        "kl": 8 / step, "accuracy_per_position": [0.3, 0.2, 0.1], "simulated_acceptance_length": 2 - 1 / step,
        "joint_prefix_length": 2.5 - 1 / step, "lr": 1e-3 / step, "grad_norm": 3.0 / step, "tokens_per_second": 900.0,
        "step_seconds": 2.0, "time": {"data": 0.1, "capture": 0.9, "forward": 0.6, "backward": 0.4},
        "memory": {"allocated": 2**28, "peak": 2**29 + step, "total": 2**34},
        "quarantined": {"a": "too long"} if step == 2 else {}, "on_policy": {"acceptance_length": 1.5},
        "pipeline": {"held_bytes": 1, "engines": [{"busy": 0.9, "tokens_per_second": 9.0}]},
    }  # fmt: skip


def whole_files(steps: int = 30) -> dict[str, Any]:
    """File -> what is in it; of metrics.jsonl the rows."""
    rows = [train_row(step) for step in range(1, steps + 1)]
    decoded = {"kind": "validation", "step": steps, "acceptance_length": 1.9, "draft_length": 3}
    served = {"kind": "served", "step": steps, "engine": "vllm", "acceptance_length": 1.8}
    return {
        "metrics.jsonl": [*rows, decoded, served],
        "eval.json": {
            "acceptance_length": 2.0, "acceptance_per_position": [0.6, 0.3, 0.1], "tokens_per_second": 40.0,
            "tokens_per_second_draftless": 25.0, "speedup": 1.6, "lossless": True, "prompts": 8, "draft_length": 3,
            "machine": {"device_name": "x", "threads": 1}, "best_draft_length": 2, "prompts_digest": "0a",
            "sweep": [{"draft_length": n, "speedup": 1 + n / 10, "acceptance_length": 1 + n / 5} for n in (1, 2, 3)],
            "samples": [{"id": "s", "prompt": "Ask", "pieces": [["a", 0], ["b", 1], ["c", 2], ["d", 7]]}],
        },
        "config.yaml": {"algorithm": "eagle3", "target": {"path": "embedded"}, "train": {"lr": 1e-3}, "draft": {}},
        "environment.json": {
            "torch": "2", "host": "here",
            "sessions": [
                {"started": "2026-01-02T03:04:05+00:00", "from_step": 0, "total_steps": steps, "host": "here",
                 "command": ["/x/__main__.py", "train", "--output", "a b"],
                 "ended": {"how": "finished", "at": "2026-01-02T04:04:05+00:00", "step": steps, "cause": ""}},
            ],
        },
        "data.json": {"read": 9, "kept": 8, "fingerprint": "f"},
        "ledger.json": {
            "read": 9, "unusable": 0, "filtered": 1, "samples": 8, "wrong": [],
            "epochs": [{"epoch": 0, "trained": 7, "quarantined": 1, "left": 0}],
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_files() -> Callable[..., dict[str, Any]]:
    return whole_files


@pytest.fixture
def files() -> dict[str, Any]:
    return whole_files()


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """write_run(place, files): a run directory of those files."""

    def write(place: Path, files: dict[str, Any]) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            if name.endswith(".jsonl"):
                text = "".join(json.dumps(row) + "\n" for row in value)
            else:
                text = yaml.safe_dump(value) if name.endswith(".yaml") else json.dumps(value)
            (place / name).write_text(text)
        return place

    return write


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty drawings, which is faster."""
    monkeypatch.setattr(charts, "_svg", lambda draw, salt: "<svg></svg>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """See browser.py; tests are skipped where there is no Chromium."""
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = module.found()
    if program is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(module.NAMES)} is on the PATH")
    with module.Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started
