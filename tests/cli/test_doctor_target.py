"""What `torchspec doctor --target` says of how a target is stored and of who can run it, without a weight read."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchspec.cli import main
from torchspec.core.models.target_weights import TargetWeights


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`torchspec doctor` where no engine is installed."""
    monkeypatch.setenv("TORCHSPEC_ENGINES", str(tmp_path / "engines"))

    def call(*words: str) -> tuple[int, str, str]:
        code = main(("doctor", *words))
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return call


@pytest.fixture
def quantised(tiny_llama: Path, tmp_path: Path, quantised_targets: ModuleType) -> Path:
    path: Path = quantised_targets.quantise(tiny_llama, tmp_path / "targets", "fp8")[0]
    return path


def engines(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in found["target"]["engines"]}


def test_a_quantised_target(look: Any, quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetWeights, "read", lambda *_, **__: pytest.fail("a weight was read"))
    code, out, _ = look("--target", str(quantised), "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 0
    target = found["target"]
    assert (target["quantised"], target["not_read"]) == ("fp8, blocks of 40 x 24", None)
    files = sum(file.stat().st_size for file in quantised.glob("*.safetensors"))
    assert 0.9 * files < target["stored_bytes"] < files < target["float_bytes"]
    assert target["dtype"] == "float32"
    assert engines(found)["hf"] == {
        "name": "hf", "available": True, "remedy": "",
        "reason": "the hf engine dequantises its weights when it loads them",
    }  # fmt: skip
    for name in ("vllm", "sglang"):
        assert not engines(found)[name]["available"]
        assert f"torchspec engine install {name} --device cpu" in engines(found)[name]["remedy"]
    code, out, _ = look("--target", str(quantised), "--device", "cpu")
    assert "quantised: fp8, blocks of 40 x 24" in out
    assert "the hf engine would dequantise it: " in out
    assert "in float32 on cpu" in out


def test_an_engine_that_is_named_runs_it_with_its_own_kernels(look: Any, quantised: Path, tmp_path: Path) -> None:
    """Of an interpreter that finds the engine; nothing of it is imported or started."""
    (tmp_path / "vllm.py").write_text("raise SystemExit('imported')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    found = json.loads(look("--target", str(quantised), "--engine-python", str(python), "--json")[1])
    assert engines(found)["vllm"]["reason"] == "backend vllm runs it with kernels of its own"
    assert "has no module sglang" in engines(found)["sglang"]["reason"]


def test_a_form_that_is_not_read(look: Any, tiny_llama: Path, tmp_path: Path) -> None:
    target = shutil.copytree(tiny_llama, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 3, "group_size": 8}
    (target / "config.json").write_text(json.dumps(config))
    code, out, _ = look("--target", str(target), "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["target"]["not_read"] == "gptq of 3 bits in the form gptq"
    assert "which the hf engine does not dequantise" in engines(found)["hf"]["reason"]
    assert "the hf engine cannot dequantise it" in look("--target", str(target), "--device", "cpu")[1]


def test_a_target_that_is_not_quantised(look: Any, tiny_llama: Path) -> None:
    code, out, _ = look("--target", str(tiny_llama), "--device", "cpu")
    assert code == 0
    assert "not quantised" in out
    assert "runs it as it is stored" in out


def test_what_belongs_to_a_target_needs_one(look: Any, tmp_path: Path) -> None:
    code, _, err = look("--dtype", "bfloat16", "--engine-start-timeout", "3")
    assert code == 2
    assert "--dtype: is of a target" in err
    assert "--engine-start-timeout: is of the checks of an engine" in err
    code, _, err = look("--target", str(tmp_path), "--engine-start-timeout", "3")
    assert "--engine-start-timeout: is of the checks of an engine" in err
    assert "--target:" not in err
    code, _, err = look("--target", str(tmp_path / "nowhere"))
    assert code == 1
    assert "nowhere" in err
