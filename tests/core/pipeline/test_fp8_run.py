"""A run in FP8: what it says, plans and refuses, and that a resumed one goes on to the last bit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from torchspec.core import registry
from torchspec.core.errors import ConfigError
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.plan import Plan, make_plan
from torchspec.core.pipeline.preflight import check

FP8 = ("precision.compute=fp8", "draft.vocab_size=96")
EMULATED = "fp8 is emulated on cpu: numbers as on hardware, no speed"


def test_a_run_says_what_is_in_fp8_and_that_it_is_emulated(
    make_config: Any, tmp_path: Path, runs: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {}
    for name, words in {"bf16": ("precision.compute=bfloat16", FP8[1]), "row": FP8,
                        "tensor": (*FP8, "precision.fp8_scaling=tensor")}.items():  # fmt: skip
        config, provenance = make_config(tmp_path / name, "train.max_steps=3", *words)
        caplog.clear()
        with caplog.at_level(logging.INFO, "torchspec"):
            train(config, provenance=provenance)
        said = [record.message for record in caplog.records if record.message.startswith("fp8")]
        assert [EMULATED in text for text in said] == ([] if name == "bf16" else [False, True])
        assert name == "bf16" or f"with a scale for each {name}" in said[0]
        losses[name] = [row["loss"] for row in runs.rows(tmp_path / name)]
        assert load_file(tmp_path / name / "draft" / "model.safetensors")["lm_head.weight"].isfinite().all()
    for name in ("row", "tensor"):
        assert losses[name] == pytest.approx(losses["bf16"], rel=0.02)
        assert losses[name] != losses["bf16"]
    assert losses["row"] != losses["tensor"]


def test_a_resumed_run_is_the_whole_one_to_the_last_bit(make_config: Any, tmp_path: Path, runs: ModuleType) -> None:
    words = (*FP8, "data.validation=[]", "train.schedule=constant", "train.recompute=true")
    for name, stops in {"whole": (4,), "resumed": (2, 4)}.items():
        for stop in stops:
            config, provenance = make_config(tmp_path / name, *words, f"train.max_steps={stop}")
            train(config, provenance=provenance)
    assert runs.figures(tmp_path / "resumed") == runs.figures(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / "draft" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def planned(make_config: Any, tmp_path: Path, *words: str) -> Plan:
    config, provenance = make_config(tmp_path / "run", *words)
    return make_plan(config, provenance)


def test_a_plan_says_it_too_and_counts_the_weights_in_fp8(make_config: Any, tmp_path: Path) -> None:
    fp8, bf16 = (planned(make_config, tmp_path, FP8[1], f"precision.compute={it}") for it in ("fp8", "bfloat16"))
    assert any(EMULATED in note for note in fp8.notes)
    assert not any("fp8" in note for note in bf16.notes)
    shapes = {name: tuple(map(int, shape.split(" x "))) for name, shape in fp8.draft.items()
              if isinstance(shape, str) and name.endswith("weight")}  # fmt: skip
    elements = sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)
    parts = {part.name: part.bytes for part in fp8.memory.need.parts}
    assert parts["weights in FP8"] == 2 * elements
    assert "draft's head in fp32" not in parts
    other = planned(make_config, tmp_path, "draft.vocab_size=100", "precision.compute=fp8")
    assert any("in bfloat16 stay lm_head.weight" in note for note in other.notes)
    parts = {part.name: part.bytes for part in other.memory.need.parts}
    assert parts["weights in FP8"] == 2 * (elements - 96 * 64)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_scaling_of_what_is_not_fp8_is_refused(make_config: Any, tmp_path: Path, compute: str) -> None:
    config, _ = make_config(tmp_path / "run", f"precision.compute={compute}", "precision.fp8_scaling=row")
    with pytest.raises(ConfigError, match=f"precision.fp8_scaling: is for precision.compute=fp8, not {compute}"):
        check(config, Ranks())


@pytest.mark.parametrize(("missing", "choices"), [("fp8", "float32, bfloat16"), ("bf16", "float32\n")])
def test_a_device_without_it_is_refused_by_name(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, choices: str
) -> None:
    cpu = registry.devices().spec("cpu")
    spec = replace(cpu, capabilities=cpu.capabilities - {missing})
    monkeypatch.setattr(registry, "devices", lambda: SimpleNamespace(spec=lambda name: spec, names=lambda: ("cpu",)))
    config, _ = make_config(tmp_path / "run", *FP8)
    with pytest.raises(
        ConfigError, match="device cpu neither multiplies FP8 matrices nor offers to emulate it"
    ) as said:
        check(config, Ranks())
    assert f"choices: {choices}" in f"{said.value}\n"
