"""From an engine's features to a draft, and back into the engine: what it accepts is what our decoder accepts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import torchspec
from torchspec.cli import main

STEPS = 40

# What is tested has nothing of one engine, and SGLang takes long to start.
IN_VLLM = pytest.mark.parametrize("engine_name", ["vllm"], indirect=True, scope="session")


def run_config(conversations: dict[str, Path], output: Path, **more: Any) -> dict[str, Any]:
    """A short run on the embedded target. Its rate is constant: a shorter one begins in the same way."""
    train = {"max_steps": STEPS, "batch_size": 8, "lr": 2e-3, "warmup_steps": 5, "schedule": "constant"}
    return {
        "output": output,
        "device": "cpu",
        "target": {"path": "embedded", "dtype": "float32"},
        "data": {"train": [conversations["train"]], "max_length": 128},
        "train": train,
        **more,
    }


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows_of(output)]


@pytest.fixture(scope="module")
def trained(engine_name: str, conversations: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose features came from the engine."""
    output = tmp_path_factory.mktemp(engine_name) / "run"
    outcome = torchspec.train(run_config(conversations, output, backend=engine_name))
    assert outcome.step == STEPS
    return output


def test_the_loss_curve_is_that_of_transformers_features(
    trained: Path, conversations: dict[str, Path], tmp_path: Path
) -> None:
    """Every step within 1e-4, relative: rounding of 1e-6 in the first features grows with the steps."""
    config = run_config(conversations, tmp_path / "hf")
    config["train"]["max_steps"] = 12
    torchspec.train(config)
    expected = losses(tmp_path / "hf")
    assert len(expected) == 12
    assert losses(trained)[:12] == pytest.approx(expected, rel=1e-4)


def test_training_on_what_the_engine_writes(engine_name: str, conversations: dict[str, Path], tmp_path: Path) -> None:
    """Ahead of the steps, greedy: transformers' text, and so its losses up to rounding."""
    config = run_config(conversations, tmp_path / "hf", on_policy={"enabled": True, "max_new_tokens": 24})
    config["train"] |= {"max_steps": 3}
    torchspec.train(config)
    config |= {"output": tmp_path / "engine", "backend": engine_name, "pipeline": {"topology": "colocated"}}
    torchspec.train(config)
    expected = rows_of(tmp_path / "hf")
    assert [row["on_policy"] for row in rows_of(tmp_path / "engine")] == [row["on_policy"] for row in expected]
    assert all(row["on_policy"]["texts"] == 8 for row in expected)
    assert losses(tmp_path / "engine") == pytest.approx(losses(tmp_path / "hf"), rel=1e-4)


def evaluate(draft: Path, engine: str, conversations: dict[str, Path], output: Path, *more: str) -> int:
    words = ["eval", "--target", "embedded", "--draft", str(draft), "--data", str(conversations["validation"])]
    words += ["--engine", engine, "--device", "cpu", "--dtype", "float32", "--samples", "8", "--max-new-tokens", "40"]
    return main([*words, "--max-length", "400", "--draft-length", "4", "--output", str(output), *more])


def test_the_engine_accepts_what_our_decoder_accepts(
    trained: Path, engine_name: str, conversations: dict[str, Path], tmp_path: Path
) -> None:
    """Round by round, and the text is the engine's own without the draft."""
    assert evaluate(trained, engine_name, conversations, tmp_path / "eval.json") == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["engine"] == engine_name
    assert found["lossless"] is True
    assert found["prompts"] == 8
    assert found["compared_rounds"] == found["same_rounds"] == 8
    assert found["acceptance_length"] == pytest.approx(found["own_acceptance_length"], abs=1e-12)
    assert found["acceptance_length"] > 1.05, "a draft that is never accepted shows nothing"
    assert sum(found["acceptance_per_position"]) + 1 == pytest.approx(found["acceptance_length"])


@IN_VLLM
def test_an_exported_plain_draft_loads_unchanged(
    trained: Path, engine_name: str, conversations: dict[str, Path], tmp_path: Path
) -> None:
    """The directory that training leaves. SGLang reads no other layout, so there the test above has shown it."""
    assert evaluate(trained / "draft", engine_name, conversations, tmp_path / "eval.json", "--engine-only") == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["acceptance_length"] > 1.05


@IN_VLLM
def test_a_draft_that_is_served_otherwise_is_an_error(
    trained: Path,
    engine_name: str,
    conversations: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine is told to tap the last layers; our decoder taps those that the draft was trained on."""
    draft = tmp_path / "draft"
    shutil.copytree(trained / "draft", draft)
    config = json.loads((draft / "config.json").read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [10, 11, 12]
    (draft / "config.json").write_text(json.dumps(config))
    assert evaluate(draft, engine_name, conversations, tmp_path / "eval.json") == 1
    said = capsys.readouterr().err
    assert "accepts the tokens that our decoder accepts, round by round, in only" in said
    assert "tap ids: engines number layers differently" in said
    assert json.loads((tmp_path / "eval.json").read_text())["lossless"] is True, "its text is right all the same"


@IN_VLLM
def test_training_is_validated_in_the_engine(engine_name: str, conversations: dict[str, Path], tmp_path: Path) -> None:
    """Measured by a process of its own. That the best of several is picked: tests/core/training/test_served.py."""
    evaluation = {"samples": 2, "max_new_tokens": 16, "engine": engine_name}
    config = run_config(conversations, tmp_path / "run", eval=evaluation)
    config["data"]["validation"] = [conversations["validation"]]
    config["train"] |= {"max_steps": 10}
    outcome = torchspec.train(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    served = {row["step"]: row for row in rows if row["kind"] == "served"}
    assert sorted(served) == [10]
    assert all(row["engine"] == engine_name and row["lossless"] for row in served.values())
    best = max(row["acceptance_length"] for row in served.values())
    assert outcome.acceptance_length == best
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["acceptance_length"] == best
