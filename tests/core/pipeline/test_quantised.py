"""Runs over a quantised target: planned, refused before anything is loaded, trained, and kept apart from others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.errors import ConfigError
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.capture import capture
from torchspec.core.pipeline.device_fit import Ranks, examined
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.plan_load import _kept
from torchspec.core.pipeline.preflight import check
from torchspec.core.registry import backends


@pytest.fixture(scope="module")
def targets(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, quantised_targets: ModuleType) -> Any:
    """The tiny Llama in FP8, and in float32 of the same worth."""
    return quantised_targets.quantise(tiny_llama, tmp_path_factory.mktemp("targets"), "fp8")


def say(target: Path, directory: Path, quantisation: dict[str, Any]) -> Path:
    copy = shutil.copytree(target, directory)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return copy


def test_a_plan_counts_what_the_engine_holds(targets: Any, make_config: Any, tmp_path: Path) -> None:
    """Dequantised weights, in the precision that the target runs in, though its files are smaller."""
    plans = [
        make_plan(*make_config(tmp_path / "run", f"target.path={path}", "target.dtype=bfloat16")) for path in targets
    ]
    quantised, floats = plans
    assert quantised.target["quantised"] == "fp8, blocks of 40 x 24"
    assert quantised.target["parameters"] == floats.target["parameters"]
    assert "the target is quantised: the hf engine dequantises its weights when it loads them" in quantised.notes
    assert "quantised" not in floats.target
    parts = {part.name: part for part in quantised.memory.need.parts}
    assert parts["target model"].bytes == 2 * quantised.target["parameters"]
    assert parts["target model"].bytes == {p.name: p.bytes for p in floats.memory.need.parts}["target model"]
    assert "quantised" in quantised.to_text()


def test_pages_of_files_are_not_what_a_dequantised_target_runs_on(
    tiny_llama: Path, make_config: Any, tmp_path: Path, quantised_targets: ModuleType
) -> None:
    """In the precision of what its files say too: there is nothing to map."""
    quantised, _ = quantised_targets.quantise(tiny_llama, tmp_path, "fp8")
    config = make_config(tmp_path / "run", f"target.path={quantised}", "target.dtype=bfloat16")
    how = {part.name: part.how for part in make_plan(*config).memory.need.parts}["target model"]
    assert "pages" not in how


def test_what_stays_quantised_counts_as_it_is_stored(tiny_llama: Path) -> None:
    weights = TargetWeights.open(tiny_llama)
    assert _kept(weights) == ()
    stored = sum(torch.Size(weights.shape(name)).numel() * 4 for name in weights.files)
    left = TargetWeights(
        path=weights.path, files=weights.files, stored=weights.stored, quantisation={"quant_method": "bitsandbytes"}
    )
    assert sum(_kept(left)) == stored


def test_what_cannot_run_is_one_problem_among_all(tiny_llama: Path, make_config: Any, tmp_path: Path) -> None:
    target = say(tiny_llama, tmp_path / "nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    config, _ = make_config(tmp_path / "run", f"target.path={target}", "data.max_length=100000")
    with pytest.raises(ConfigError) as caught:
        check(config, Ranks())
    found = {problem.field: problem.message for problem in caught.value.problems}
    assert set(found) == {"target.path", "data.max_length"}
    assert "is quantised (bitsandbytes), which the hf engine does not dequantise" in found["target.path"]


def test_an_engine_of_its_own_process_says_itself_what_it_runs(targets: Any) -> None:
    quantised, floats = (read_target_spec(path) for path in targets)
    assert examined(backends().spec("vllm"), quantised) == "backend vllm runs it with kernels of its own"
    assert examined(backends().spec("vllm"), floats) is None
    assert examined(backends().spec("hf"), floats) is None


def test_training_is_that_of_the_weights_it_stands_for(targets: Any, make_config: Any, tmp_path: Path) -> None:
    """Losses, and a validation that decodes against the target."""
    losses = []
    for target, validation in zip(targets, (("eval.every=2",), ("data.validation=[]",)), strict=True):
        words = ("train.max_steps=2", f"target.path={target}", *validation)
        config, provenance = make_config(tmp_path / target.name, *words)
        outcome = train(config, provenance=provenance)
        assert (outcome.acceptance_length is not None) == (target is targets[0])
        rows = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_features_are_of_one_target_alone(targets: Any, make_config: Any, tmp_path: Path) -> None:
    """Neither the weights that it stands for nor another reading of the same bytes may take them for its own."""
    quantised, floats = targets
    other = shutil.copytree(quantised, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (other / "config.json").write_text(json.dumps(config))
    captured, _ = make_config(tmp_path / "features", f"target.path={quantised}")
    capture(captured)
    for target, difference in ((floats, r"target\.quantisation"), (other, r"target\.quantisation\.activation_scheme")):
        words = ("pipeline.topology=offline", f"pipeline.features={tmp_path / 'features'}", f"target.path={target}")
        stored, _ = make_config(tmp_path / "run", *words)
        with pytest.raises(ConfigError, match=difference):
            check(stored, Ranks())
