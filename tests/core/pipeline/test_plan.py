"""`--dry-run`: right numbers, every problem at once, nothing loaded or written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core.algorithms.eagle3 import SPEC
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.preflight import check


def test_numbers_of_a_plan(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.epochs=3", "eval.every=5")
    plan = make_plan(config, provenance, Ranks(all=2, here=2))
    assert not (tmp_path / "run").exists()
    algorithm = SPEC.create(config.draft, read_target_spec(tiny_target))
    head = load_target_head(tiny_target, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(VocabularyMap(ids_N=torch.arange(100), target_size=300), head)
    trained = sum(p.numel() for p in draft.parameters())
    assert plan.draft["trained parameters"] == trained
    assert plan.draft["taps (target layers)"] == [1, 3, 4]
    assert plan.draft["lm_head.weight"] == "100 x 64"
    assert plan.steps["per epoch"] == 4
    assert plan.steps["total"] == 12
    assert plan.steps["validations"] == 3
    parts = {part.name: part.bytes for part in plan.memory.need.parts}
    assert parts["draft parameters"] == trained * 4 // 2
    assert parts["optimizer state"] == 2 * (trained * 4 // 2)
    weights = TargetWeights.open(tiny_target)
    stored = {name: torch.Size(weights.shape(name)).numel() for name in weights.files}
    assert parts["target model"] == sum(stored.values()) * 4
    sources = {row["path"]: (row["value"], row["source"]) for row in plan.settings}
    assert sources["train.epochs"] == (3, "command line")
    assert sources["train.lr"] == (1e-3, "default")
    assert sources["draft.unroll"] == (3, "python")
    text = plan.to_text()
    assert "train.epochs" in text
    assert "from command line" in text
    assert "None" not in text
    assert re.search(r"train\.max_steps +null +from default", text)
    described = json.loads(json.dumps(plan.to_json()))
    assert described["steps"]["total"] == 12
    memory = described["memory"]
    assert memory["peak"] == sum(part["bytes"] for part in memory["parts"]) == memory["moments"][memory["moment"]]
    assert memory["fits"]
    assert memory["verdict"] in text


def test_every_problem_is_reported_at_once(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    config, provenance = make_config(tmp_path / "run")
    damaged = tmp_path / "target"
    damaged.mkdir()
    (damaged / "config.json").write_text((tiny_target / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"cut off")
    (damaged / "tokenizer.json").write_text("{")
    (tmp_path / "run").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    draft = config.draft.model_copy(update={"taps": (1, 99), "init_from": tmp_path / "nowhere"})
    broken = config.model_copy(
        update={
            "target": config.target.model_copy(update={"path": damaged}),
            "data": config.data.model_copy(update={"train": [tmp_path / "empty.jsonl"]}),
            "draft": draft,
            "backend": "nonsense",
        }
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(broken, provenance)
    with pytest.raises(ConfigError) as started:
        train(broken, provenance=provenance)
    assert started.value.problems == caught.value.problems
    fields = [problem.field for problem in caught.value.problems]
    assert set(fields) == {"backend", "output", "target.path", "draft.taps", "draft.init_from", "data.train"}
    assert len(fields) == len(set(map(str, caught.value.problems)))
    messages = str(caught.value)
    for part in ("safetensors", "tokenizer", "empty.jsonl", "99"):
        assert part in messages, part


def test_a_configuration_is_enough_for_a_plan_and_not_for_a_run(
    make_config: Any, tmp_path: Path, tiny_target: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(tiny_target / "config.json", target)
    whole = make_plan(*make_config(tmp_path / "run"))
    config, provenance = make_config(tmp_path / "run", f"target.path={target}")
    plan = make_plan(config, provenance)
    assert [each.partition(":")[0] for each in plan.absent] == [
        f"{target} has no weights",
        f"{target} has no tokenizer",
    ]
    assert not whole.absent
    assert plan.target["parameters"] == whole.target["parameters"]
    parts = [{part.name: part.bytes for part in each.memory.need.parts} for each in (plan, whole)]
    del parts[0]["process"], parts[1]["process"]
    assert parts[0] == parts[1]
    with pytest.raises(ConfigError) as caught:
        check(config, Ranks())
    assert {problem.field for problem in caught.value.problems} == {"target.path"}
    assert "has no weights" in str(caught.value)
    assert "tokenizer" in str(caught.value)


def test_the_directory_of_the_target_is_no_output(make_config: Any, tiny_target: Path) -> None:
    config, _ = make_config(tiny_target / ".." / tiny_target.name)
    with pytest.raises(ConfigError, match="output: is the directory of the target"):
        check(config, Ranks())


def test_samples_longer_than_the_target_reads_are_refused_unless_nobody_asked_for_them(
    make_config: Any, tmp_path: Path
) -> None:
    """The target reads 512 tokens, the default is 2,048."""
    plan = make_plan(*make_config(tmp_path / "run"))
    (row,) = [row for row in plan.settings if row["path"] == "data.max_length"]
    assert (row["value"], row["source"]) == (512, "the target's context")
    assert "data.max_length is 512: the target's context" in plan.notes
    for run in (make_plan, lambda config, provenance: train(config, provenance=provenance)):
        with pytest.raises(ConfigError, match=r"(?s)data.max_length: the target reads at most 512.*got 513.*=512"):
            run(*make_config(tmp_path / "run", "data.max_length=513"))
    make_plan(*make_config(tmp_path / "run", "data.max_length=512"))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("config.json", lambda text: text.replace('"vocab_size": 300', '"vocab_size": 999'), "shape .999, 64."),
        (
            "chat_template.jinja",
            lambda text: "{% for m in messages %}{{ m.content }",
            "the chat template cannot be used",
        ),
        ("chat_template.jinja", None, "no chat template, which conversations need"),
    ],
)
def test_a_target_that_cannot_train_is_refused_before_it_is_loaded(
    make_config: Any, tmp_path: Path, tiny_target: Path, name: str, change: Any, says: str
) -> None:
    target = shutil.copytree(tiny_target, tmp_path / "target")
    text = (target / name).read_text()
    (target / name).unlink()
    if change is not None:
        assert change(text) != text
        (target / name).write_text(change(text))
    config, provenance = make_config(tmp_path / "run", f"target.path={target}")
    with pytest.raises(ConfigError, match=f"target.path: .*{says}"):
        make_plan(config, provenance)


def test_data_without_a_usable_row_say_why(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"prompt": "a"}\n' * 9)
    config, provenance = make_config(tmp_path / "run", f"data.train=[{tmp_path / 'none.jsonl'}]")
    with pytest.raises(ConfigError, match=r"no row can be used, of 9 read\n.*none.jsonl:1: no conversation") as caught:
        make_plan(config, provenance, Ranks(all=1, here=1))
    assert "none.jsonl:3" in str(caught.value)
    assert "none.jsonl:4" not in str(caught.value)


def test_texts_need_no_chat_template(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    target = shutil.copytree(tiny_target, tmp_path / "target")
    (target / "chat_template.jinja").unlink()
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick fox"}\n')
    words = (f"target.path={target}", f"data.train=[{tmp_path / 'texts.jsonl'}]", "data.validation=[]")
    make_plan(*make_config(tmp_path / "run", *words))


def test_the_run_of_another_configuration_is_refused_before_anything_is_loaded(
    make_config: Any, tmp_path: Path
) -> None:
    train_words = ("train.max_steps=1", "data.validation=[]")
    config, provenance = make_config(tmp_path / "run", *train_words)
    train(config, provenance=provenance)
    assert make_plan(config, provenance).run["continues from"] == "the checkpoint of step 1"
    copy = shutil.copy(config.data.train[0], tmp_path / "copy.jsonl")
    changes = ("train.batch_size=2", "data.max_length=64", f"data.train=[{copy}]", "draft.unroll=2")
    with pytest.raises(ConfigError) as caught:
        make_plan(*make_config(tmp_path / "run", *train_words, *changes))
    for line in (
        "order.batch_size: the checkpoint has 4, this run 2",
        "data.settings.max_length: the checkpoint has 512, this run 64",
        "data.files: the checkpoint has ['train.jsonl'], this run ['copy.jsonl']",
        "draft.unroll: the checkpoint has 3, this run 2",
    ):
        assert line in str(caught.value)
    assert str(caught.value).count("the checkpoint has") == 4
