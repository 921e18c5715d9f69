"""A run in FP8: what it says, plans and refuses, and that a resumed one goes on to the last bit."""

from __future__ import annotations

import logging
import re
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
from torchspec.core.training.checkpoint import load_draft_state
from torchspec.core.training.checkpoint_files import directory_of

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


def test_runs_go_on_with_and_without_weights_gathered_in_fp8(
    make_config: Any, tmp_path: Path, runs: ModuleType
) -> None:
    """Two ranks; a checkpoint holds float32 tensors in either case, and the exported draft is the same file."""
    config, _ = make_config(tmp_path / "base", *FP8, "data.validation=[]", "train.schedule=constant")
    values = config.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    begun, ends = "train.max_steps=2", "train.max_steps=4"
    on, off = (f"precision.fp8_all_gather={value}" for value in ("on", "off"))
    runs.two_ranks(values, {tmp_path / "whole": (off, ends), tmp_path / "a": (on, begun), tmp_path / "b": (off, begun)})
    runs.two_ranks(values, {tmp_path / "a": (off, ends), tmp_path / "b": (on, ends)})
    whole, exported = runs.figures(tmp_path / "whole"), load_file(tmp_path / "whole" / "draft" / "model.safetensors")
    assert len(whole) == 4
    for name in ("a", "b"):
        assert runs.figures(tmp_path / name) == whole
        own = load_file(tmp_path / name / "draft" / "model.safetensors")
        assert all(torch.equal(own[key], tensor) for key, tensor in exported.items())
        for step in (3, 4):
            _, state = load_draft_state(directory_of(tmp_path / name / "checkpoints", step))
            assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.usefixtures("torchao")
def test_moments_in_8_bits_know_nothing_of_the_gathering(make_config: Any, tmp_path: Path, runs: ModuleType) -> None:
    config, _ = make_config(tmp_path / "base", *FP8, "data.validation=[]", "train.optimizer=adamw8bit")
    values = config.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    jobs = {tmp_path / value: (f"precision.fp8_all_gather={value}", "train.max_steps=3") for value in ("on", "off")}
    runs.two_ranks(values, jobs)
    assert runs.figures(tmp_path / "on") == runs.figures(tmp_path / "off")


def planned(make_config: Any, tmp_path: Path, *words: str, ranks: int = 1) -> Plan:
    config, provenance = make_config(tmp_path / "run", *words)
    return make_plan(config, provenance, Ranks(all=ranks, here=ranks))


def test_a_plan_counts_what_is_gathered(make_config: Any, tmp_path: Path) -> None:
    """A byte an element in place of two, and none beside it by rows. The head's parts have any number of rows."""
    words = (*FP8, "data.validation=[]")
    alone, two = (planned(make_config, tmp_path, *words, ranks=ranks) for ranks in (1, 2))
    off = planned(make_config, tmp_path, *words, "precision.fp8_all_gather=off", ranks=2)
    vocabulary = ("target.shard_logits=vocabulary", "parallel.ulysses=2")
    in_parts = planned(make_config, tmp_path, *words, *vocabulary, ranks=2)
    inside = sum(shape[0] * shape[1] for shape in shapes(two) if len(shape) == 2)
    trained = inside + sum(shape[0] for shape in shapes(two) if len(shape) == 1)
    (count,) = (re.search(r"fp8: (\d+) weights", note) for note in two.notes if note.startswith("fp8: "))
    assert count is not None
    for plan, gathered in ((alone, 0), (two, inside), (off, 0), (in_parts, inside - 96 * 64)):
        parts = {part.name: part.bytes for part in plan.memory.need.parts}
        assert parts["gathered parameters"] == 2 * trained - gathered
        assert parts.get("gathering", 0) == (0 if plan is alone else 2 * trained - gathered)
        assert parts["weights in FP8"] == 2 * inside - gathered
        text = f"{int(count[1]) - (plan is in_parts)} of them gathered in it"
        assert any(text in note for note in plan.notes) == bool(gathered)
    assert not any("gathered in it" in note for plan in (alone, off) for note in plan.notes)


def shapes(plan: Plan) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split(" x "))) for name, shape in plan.draft.items()
            if isinstance(shape, str) and name.endswith("weight")]  # fmt: skip


def test_a_plan_says_it_too_and_counts_the_weights_in_fp8(make_config: Any, tmp_path: Path) -> None:
    fp8, bf16 = (planned(make_config, tmp_path, FP8[1], f"precision.compute={it}") for it in ("fp8", "bfloat16"))
    assert any(EMULATED in note for note in fp8.notes)
    assert not any("fp8" in note for note in bf16.notes)
    elements = sum(shape[0] * shape[1] for shape in shapes(fp8) if len(shape) == 2)
    parts = {part.name: part.bytes for part in fp8.memory.need.parts}
    assert parts["weights in FP8"] == 2 * elements
    assert "draft's head in fp32" not in parts
    other = planned(make_config, tmp_path, "draft.vocab_size=100", "precision.compute=fp8")
    assert any("in bfloat16 stay lm_head.weight" in note for note in other.notes)
    parts = {part.name: part.bytes for part in other.memory.need.parts}
    assert parts["weights in FP8"] == 2 * (elements - 96 * 64)


@pytest.mark.parametrize(
    ("compute", "value", "said"),
    [
        ("bfloat16", "on", "is for precision.compute=fp8, not bfloat16"),
        ("float32", "off", "is for precision.compute=fp8, not float32"),
        ("fp8", "on", "one rank gathers nothing.*start several, or leave it at auto"),
    ],
)
def test_a_gathering_that_there_is_not_is_refused(
    make_config: Any, tmp_path: Path, compute: str, value: str, said: str
) -> None:
    config, _ = make_config(
        tmp_path / "run", f"precision.compute={compute}", f"precision.fp8_all_gather={value}", "draft.vocab_size=96"
    )
    with pytest.raises(ConfigError, match=f"(?s)precision.fp8_all_gather: {said}"):
        check(config, Ranks())


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
