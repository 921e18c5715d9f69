"""Training on what the target writes: that it is the target's own text, the same wherever the target is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError, DataError
from torchspec.core.pipeline.on_policy import on_policy_problems

COLOCATED = "pipeline.topology=colocated"
ON = ("on_policy.enabled=true", "on_policy.max_new_tokens=12")
HOT = (*ON, "on_policy.temperature=0.9")
DRAFTED = (*ON, "on_policy.draft_length=2", "on_policy.push_every=2")


@pytest.fixture(scope="module")
def values(tiny_target: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "device": "cpu",
        "target": {"path": str(tiny_target)},
        "data": {
            "train": [str(conversations / "train.jsonl")],
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "max_length": 64,
        },
        "train": {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "checkpoint_every": 3},
        "draft": {"unroll": 3, "vocab_size": 100},
    }


@pytest.fixture
def configured(values: dict[str, Any], tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *words: load_config(values={**values, "output": str(tmp_path / "run")}, overrides=words)[0]


def written(runs: ModuleType, run: Path) -> list[dict[str, float]]:
    return [row["on_policy"] for row in runs.rows(run)]


# What goes with what.


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), set()),
        (ON, set()),
        (DRAFTED, set()),
        (
            ("on_policy.temperature=0.5", "on_policy.draft_length=2"),
            {"on_policy.temperature", "on_policy.draft_length"},
        ),
        ((*ON, "pipeline.topology=offline"), {"on_policy.enabled"}),
        ((*ON, "on_policy.push_every=3"), {"on_policy.push_every"}),
        ((*ON, "data.max_length=12"), set()),
        (
            (*ON, "data.min_supervised_tokens=13", "data.last_turn_only=always"),
            {"data.last_turn_only", "data.min_supervised_tokens"},
        ),
    ],
)
def test_settings_that_cannot_be_are_named(
    configured: Callable[..., RunConfig], words: tuple[str, ...], fields: set[str]
) -> None:
    config = configured(*words)
    found = on_policy_problems(config, registry.backends().spec(config.backend))
    assert sorted(problem.field for problem in found) == sorted(fields)


def test_an_engine_that_takes_no_drafts_while_it_runs(configured: Callable[..., RunConfig]) -> None:
    vllm = registry.backends().spec("vllm")
    assert on_policy_problems(configured(*HOT), vllm) == []
    (problem,) = on_policy_problems(configured(*DRAFTED), vllm)
    assert (problem.field, problem.message) == ("on_policy.draft_length", "vllm takes no drafts while it runs")


def test_a_run_with_such_a_setting_is_refused(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"on_policy\.draft_length.*means nothing without on_policy\.enabled"):
        runs.alone(values, tmp_path / "run", "on_policy.draft_length=2")


def prompts_alone(tmp_path: Path) -> dict[str, list[str]]:
    file = tmp_path / "prompts.jsonl"
    questions = ("the quick brown", "fox returns", "value of function", "and list all", "values the")
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in questions))
    return {"train": [str(file)]}


def test_prompts_alone_cannot_choose_a_vocabulary(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    values = {**values, "data": {**values["data"], **prompts_alone(tmp_path)}}
    with pytest.raises(DataError, match=r"there are prompts alone\n    remedy: give draft\.vocab_size=\d+"):
        runs.alone(values, tmp_path / "run", *ON)


# The text.


def test_only_answers_after_prompts_that_are_used_choose_a_vocabulary(
    runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    """Not those of rows that are no prompts."""
    data = prompts_alone(tmp_path)
    with Path(data["train"][0]).open("a") as file:
        file.write(json.dumps({"text": "the quick brown fox"}) + "\n")
        file.write(json.dumps({"messages": [{"role": "assistant", "content": "returns"}]}) + "\n")
    with pytest.raises(DataError, match="there are prompts alone"):
        runs.alone({**values, "data": {**values["data"], **data}}, tmp_path / "run", *ON)


def greedy(target: Path, prompt: list[int], count: int) -> list[int]:
    """By transformers' own generation."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    new: list[int] = whole[0, len(prompt) :].tolist()
    return new


def test_it_is_the_targets_own_text_after_the_datas_prompts(
    runs: ModuleType, values: dict[str, Any], tiny_target: Path, tmp_path: Path
) -> None:
    """Of prompts that stand alone, with the target's whole vocabulary; as long as transformers makes it."""
    values = {**values, "data": {**values["data"], **prompts_alone(tmp_path)}}
    size = json.loads((tiny_target / "config.json").read_text())["vocab_size"]
    run = runs.alone(values, tmp_path / "run", *ON, f"draft.vocab_size={size}", "train.batch_size=1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    expected = []
    for line in Path(values["data"]["train"][0]).read_text().splitlines():
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        expected.append(len(prompt) + len(greedy(tiny_target, prompt, min(12, 64 - len(prompt)))))
    steps = [row["tokens"] for row in runs.rows(run)]
    assert sorted(after - before for before, after in zip([0, *steps], steps, strict=False)) == sorted(expected)
    assert sum(row["texts"] for row in written(runs, run)) == 5
    data = json.loads((run / "data.json").read_text())
    assert (data["read"], data["kept"], data["supervised_tokens"]) == (5, 5, 0)


# Wherever the target is.


@pytest.mark.slow
def test_an_engine_beside_the_trainer_writes_the_same(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    """At a temperature, alone."""
    words = (*HOT, "train.epochs=2")
    expected = runs.alone(values, tmp_path / "inprocess", *words)
    run = runs.alone(values, tmp_path / "colocated", *words, COLOCATED, "pipeline.prefetch_mb=1")
    assert runs.figures(run) == runs.figures(expected)
    assert written(runs, run) == written(runs, expected)
    assert sum(row["texts"] for row in written(runs, run)) == 26
    assert not any("acceptance_length" in row for row in written(runs, run))


@pytest.mark.slow
def test_with_the_draft_of_the_training(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    """Greedy text is the same with it and without; it takes part from the first hand-over on."""
    words = ("train.epochs=3",)
    plain = runs.alone(values, tmp_path / "plain", *words, *ON)
    inside = runs.alone(values, tmp_path / "inprocess", *words, *DRAFTED)
    beside = runs.alone(values, tmp_path / "colocated", *words, *DRAFTED, COLOCATED, "pipeline.prefetch_mb=1")
    assert runs.figures(inside) == runs.figures(plain)
    assert runs.figures(beside) == runs.figures(plain)
    drafted = [row.get("acceptance_length") for row in written(runs, inside)]
    assert drafted[:2] == [None, None]
    assert all(1 <= length <= 3 for length in drafted[2:])
    assert any("acceptance_length" in row for row in written(runs, beside)), "no draft reached the engine"
    for run in (inside, beside):
        assert sorted(path.name for path in (run / "pushed").iterdir()) == ["current", "step-10", "step-12"]


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(runs: ModuleType, values: dict[str, Any], tmp_path: Path) -> None:
    words = ("train.epochs=3", "train.schedule=constant", *DRAFTED)
    expected = runs.alone(values, tmp_path / "whole", *words)
    run = tmp_path / "run"
    runs.alone(values, run, *words, "train.max_steps=7")
    assert written(runs, run) == written(runs, expected)[:7]
    runs.alone(values, run, *words)
    assert runs.figures(run) == runs.figures(expected)
    assert "acceptance_length" in written(runs, run)[7], "the draft was there from the first step on"


@pytest.mark.slow
def test_what_was_drawn_with_a_draft_is_drawn_again_after_a_stop(
    runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    """In one process: the draft that was handed over last is there again, and none where none was."""
    words = (
        "train.epochs=2",
        "train.schedule=constant",
        *DRAFTED,
        "on_policy.temperature=0.9",
        "on_policy.push_every=3",
    )
    expected = runs.alone(values, tmp_path / "whole", *words)
    for stop in (2, 4):
        run = tmp_path / f"run-{stop}"
        runs.alone(values, run, *words, f"train.max_steps={stop}")
        runs.alone(values, run, *words)
        assert runs.figures(run) == runs.figures(expected)
        assert written(runs, run) == written(runs, expected)


@pytest.mark.slow
def test_the_length_of_answers_may_change_when_a_run_goes_on(
    runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    """Batches stay as they are, although some prompts now have less room than is asked for."""
    run = tmp_path / "run"
    runs.alone(values, run, *ON, "train.max_steps=2")
    runs.alone(values, run, *ON, "on_policy.max_new_tokens=50")
    assert json.loads((run / "ledger.json").read_text())["wrong"] == []


@pytest.mark.slow
def test_ranks_that_share_sequences_share_what_was_written(
    runs: ModuleType, values: dict[str, Any], tmp_path: Path
) -> None:
    words = ("parallel.ulysses=2", "train.epochs=2", *HOT)
    expected, run = tmp_path / "inprocess", tmp_path / "colocated"
    runs.two_ranks(values, {expected: words, run: (*words, COLOCATED, "pipeline.engines=2")})
    assert runs.figures(run) == runs.figures(expected)
    assert written(runs, run) == written(runs, expected)
    assert sum(row["texts"] for row in written(runs, run)) == 26
