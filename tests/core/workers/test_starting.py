"""What is said of an engine that does not start."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.backends.api import EngineOptions, TargetError
from torchspec.backends.remote.spec import Engine
from torchspec.core.workers.remote_engine import RemoteEngine

Start = Callable[..., RemoteEngine]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"options": {"fails": "no such model"}}, "fake cannot start: no such model"),
        (
            {"options": {"fails": "scheduler died", "says": "[TP0] Traceback:\nnumpy.RangeError: no AMX here\nbye"}},
            r"cannot start: scheduler died\n.*its log is .*fake.log, with the errors\n    \| RangeError: no AMX here$",
        ),
        ({"options": {"exits": 1}}, r"fake ended while it started \(exit code 3\); its log .*the engine says why"),
        ({"options": {"sleeps": 60}, "start_timeout": 0.5}, r"did not start within 0 s \(engine.start_timeout\)"),
        ({"options": {"hidden": 7}}, r"not the one for this run:\n    hidden_size is 7, needed 64"),
    ],
)
def test_an_engine_that_does_not_start_says_why(start: Start, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TargetError) as caught:
        start(**settings)
    assert re.search(complaint, str(caught.value), re.DOTALL), str(caught.value)


def test_a_quantised_target_may_be_why_an_engine_does_not_start(
    engine: Engine, options: Callable[..., EngineOptions], tiny_target: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(tiny_target, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (target / "config.json").write_text(json.dumps(config))
    said = r"cannot start: no kernel\n.*the target is quantised \(awq, 4 bits, groups of 32\).*doctor --target"
    with pytest.raises(TargetError, match=f"(?s){said}"):
        engine.load(replace(options(options={"fails": "no kernel"}), target=target))
