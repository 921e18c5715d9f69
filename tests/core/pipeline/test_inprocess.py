"""A whole run with the real parts: EAGLE-3 for a tiny Qwen3, from conversations to an exported draft."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from torchspec.cli import main
from torchspec.core.algorithms.eagle3 import SPEC
from torchspec.core.errors import CheckpointError, ConfigError, TorchspecError
from torchspec.core.export.layout import read_draft
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.pipeline import rebuild as rebuilding
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.preflight import check
from torchspec.core.pipeline.rebuild import find_checkpoint, rebuild, recorded_probe
from torchspec.core.registry import algorithms
from torchspec.core.training.checkpoint import load_draft_state
from torchspec.core.training.checkpoint_files import directory_of, read_json, steps_on_disk


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_memory_options_and_objective_reach_the_step(make_config: Any, tmp_path: Path) -> None:
    runs = {
        "plain": [],
        "lean": ["train.recompute=true", "train.loss_memory_mb=1"],
        "other": ["draft.objective={tv: 1.0, ground_truth: 0.5}"],
    }
    losses = {}
    for name, words in runs.items():
        config, provenance = make_config(tmp_path / name, "train.max_steps=3", *words)
        losses[name] = [row["loss"] for row in rows(train(config, provenance=provenance).directory, "train")]
    assert losses["lean"] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["other"] != pytest.approx(losses["plain"], rel=0.1)


def test_a_run_leaves_everything_it_promises(make_config: Any, tmp_path: Path, tiny_target: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.epochs=2", "eval.every=4")
    outcome = train(config, provenance=provenance)
    run = outcome.directory
    assert (outcome.step, outcome.total_steps, outcome.signal, outcome.exit_code) == (8, 8, 0, 0)

    trained = rows(run, "train")
    assert [row["step"] for row in trained] == list(range(1, 9))
    assert trained[-1]["samples"] == 26
    promised = {"epoch", "tokens", "loss", "accuracy_per_position", "simulated_acceptance_length", "lr", "grad_norm"}
    assert promised <= trained[0].keys()
    assert trained[0]["memory"]["peak"] > 0
    assert sum(trained[0]["time"].values()) == pytest.approx(trained[0]["step_seconds"], rel=1e-3)

    validated = rows(run, "validation")
    assert [row["step"] for row in validated] == [4, 8]
    best = max(validated, key=lambda row: (row["acceptance_length"], -row["step"]))
    assert read_json(run / "checkpoints" / "best.json")["step"] == best["step"]
    assert outcome.acceptance_length == best["acceptance_length"]
    assert 8 in steps_on_disk(run / "checkpoints")

    # The exported draft is the best checkpoint's, tensor for tensor.
    assert outcome.draft == run / "draft"
    _, draft = read_draft(run / "draft", read_target_spec(tiny_target))
    _, state = load_draft_state(directory_of(run / "checkpoints", best["step"]))
    exported = draft.state_dict()
    assert state.keys() == exported.keys()
    for name, tensor in state.items():
        assert torch.equal(exported[name], tensor), name
    assert (run / "report.html").stat().st_size > 1000

    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 2
    assert json.loads((run / "provenance.json").read_text())["train.epochs"] == "command line"
    environment = json.loads((run / "environment.json").read_text())
    for facts in (environment, environment["sessions"][0]):
        assert (facts["torch"], facts["device"], facts["ranks"]) == (metadata.version("torch"), "cpu", 1)
    assert environment["sessions"][0]["from_step"] == 0
    assert json.loads((run / "data.json").read_text())["kept"] == 13

    # The same command again finds the run finished; a changed one says what changed.
    again = train(config, provenance=provenance)
    assert again.step == 8
    assert rows(run, "train") == trained
    changed, provenance = make_config(tmp_path / "run", "train.epochs=2", "draft.unroll=4", "seed=1")
    with pytest.raises(ConfigError, match=r"(?s)draft.unroll: the checkpoint has 3, this run 4.*order.seed"):
        train(changed, provenance=provenance)
    never, provenance = make_config(tmp_path / "run", "train.epochs=2", "train.resume=never")
    with pytest.raises(TorchspecError, match="holds a run already"):
        train(never, provenance=provenance)

    rebuilt = rebuild(run)
    assert rebuilt.step == best["step"]


@pytest.mark.parametrize("harm", ["damaged", "removed", "removed, without the mark"])
def test_a_run_without_a_whole_checkpoint_never_starts_over(make_config: Any, tmp_path: Path, harm: str) -> None:
    config, provenance = make_config(tmp_path / "run", "data.validation=[]", "train.max_steps=2")
    train(config, provenance=provenance)
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    checkpoints = tmp_path / "run" / "checkpoints"
    if harm == "damaged":
        os.truncate(directory_of(checkpoints, 2) / "trainer.json", 1)
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            train(config, provenance=provenance)
    else:
        shutil.rmtree(checkpoints)
    for name in [".checkpointed"] if harm.endswith("mark") else ["draft"]:
        place = tmp_path / "run" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match="never starts over by itself: restore one"):
            train(config, provenance=provenance)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == history


def test_a_damaged_best_checkpoint_gives_way_to_the_next(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And best.json may hold anything: the manifests say which is best."""
    config, provenance = make_config(tmp_path / "run", "train.max_steps=3", "train.checkpoint_every=1", "eval.every=1")
    train(config, provenance=provenance)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, score in ((1, 9.0), (2, 8.0)):
        directory = directory_of(checkpoints, step)
        if not directory.exists():
            shutil.copytree(directory_of(checkpoints, 3), directory)
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps({**manifest, "step": step, "score": score}))
    os.truncate(directory_of(checkpoints, 1) / "trainer.json", 1)
    (checkpoints / "best.json").write_text("[]")
    with caplog.at_level("WARNING", logger="torchspec"):
        assert train(config, provenance=provenance).acceptance_length == 8.0
    assert "step_00000001 is damaged and not used, renamed *.damaged" in caplog.text
    assert (checkpoints / "step_00000001.damaged").is_dir()
    assert read_json(checkpoints / "best.json")["step"] == 2
    (checkpoints / "best.json").write_text("{}")
    assert find_checkpoint(tmp_path / "run") == directory_of(checkpoints, 2)


@pytest.mark.parametrize("text", ["{", "[]", '{"sessions": 1}'])
def test_a_damaged_record_of_sessions_is_begun_anew(make_config: Any, tmp_path: Path, text: str) -> None:
    config, provenance = make_config(tmp_path)
    run = run_dir.open_run(config)
    (tmp_path / "environment.json").write_text(text)
    for step in (3, 6):
        run_dir.record_session(run, config, provenance, {"ranks": 2}, step, 9)
    run.lock.close()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert [(session["from_step"], session["ranks"]) for session in environment["sessions"]] == [(3, 2), (6, 2)]
    assert (tmp_path / "environment.json.damaged").read_text() == text


def test_a_damaged_probe_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "probe.safetensors").write_bytes(b"x" * 20)
    assert recorded_probe(tmp_path) is None
    assert "probe.safetensors is damaged and not used" in caplog.text


def test_a_run_killed_before_its_first_checkpoint_starts_again(make_config: Any, tmp_path: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "data.validation=[]", "train.max_steps=1")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    assert train(config, provenance=provenance).step == 1
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1]


def test_a_draft_goes_on_from_another_one(
    make_config: Any, tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary map is the earlier draft's, and the first loss goes on where it ended."""
    config, provenance = make_config(tmp_path / "first", "train.epochs=4", "train.schedule=constant")
    train(config, provenance=provenance)
    for source in ("draft", "checkpoints"):
        init = f"draft.init_from={tmp_path / 'first' / source}"
        config, provenance = make_config(tmp_path / source, init, "train.max_steps=1")
        train(config, provenance=provenance)
        first, later = rows(tmp_path / "first", "train"), rows(tmp_path / source, "train")
        assert later[0]["loss"] < first[0]["loss"] - 0.3
        other = ("draft.taps=[0, 3, 5]", "draft.norm_before_residual=true", "draft.vocab_size=99")
        config, provenance = make_config(tmp_path / "refused", init, *other)
        with pytest.raises(ConfigError) as caught:
            train(config, provenance=provenance)
        said = str(caught.value)
        if source == "draft":
            assert "draft.norm_before_residual: the draft in draft.init_from says False (got True)" in said
            assert "draft.vocab_size: the draft in draft.init_from says 100 (got 99)" in said
        else:
            assert "draft.taps: the draft in draft.init_from reads [1, 3, 4] (got [0, 3, 5])" in said
            assert "its norm_before_residual is False, this draft's True" in said
            assert "its draft_vocab_size is 100, this draft's 99" in said
        assert not (tmp_path / "refused").exists()

    for source in ("draft", "checkpoints", ""):
        init = f"draft.init_from={tmp_path / 'first' / source}"
        config, _ = make_config(tmp_path / "refused", init, draft={}, algorithm="dflash")
        with pytest.raises(ConfigError) as caught:
            check(config, Ranks(all=1, here=1), to_run=False)
        (problem,) = caught.value.problems
        assert problem.field == "draft.init_from"
        assert problem.message == "is a draft of eagle3, and this run trains dflash"
        assert "--algorithm eagle3" in problem.remedy

    # What differs in its loss alone (docs/add-an-algorithm.md) has the same drafts.
    own_loss = replace(SPEC, name="mine", reads=lambda config: False)
    specs = SimpleNamespace(spec=lambda name: own_loss if name == "mine" else algorithms().spec(name))
    monkeypatch.setattr(rebuilding.registry, "algorithms", lambda: specs)
    found = rebuilding.check_algorithm(tmp_path / "first" / "checkpoints", "mine", read_target_spec(tiny_target))
    assert found == "eagle3"
    monkeypatch.undo()

    # A finished run says the sizes of its draft.
    config, _ = make_config(tmp_path / "follows_a_run", f"draft.init_from={tmp_path / 'first'}", draft={"unroll": 3})
    assert check(config, Ranks(all=1, here=1), to_run=False).algorithm.vocabulary_size == 100

    turned = tmp_path / "turned"
    shutil.copytree(tmp_path / "first" / "draft", turned)
    stated = json.loads((turned / "config.json").read_text())
    rope = {**stated["rope_parameters"], "rope_theta": 12345.0}
    (turned / "config.json").write_text(json.dumps({**stated, "rope_parameters": rope}))
    words = (f"draft.init_from={turned}", f"draft.config={tmp_path / 'first' / 'draft'}")
    config, provenance = make_config(tmp_path / "refused", *words)
    with pytest.raises(ConfigError, match=r"(?s)its rope_parameters is \{.*12345.0.*draft.config=FILE"):
        train(config, provenance=provenance)
    config, provenance = make_config(tmp_path / "follows", f"draft.init_from={turned}", "train.max_steps=1")
    train(config, provenance=provenance)
    assert rebuild(tmp_path / "follows").algorithm.geometry.rope_parameters["rope_theta"] == 12345.0


def test_a_target_that_cannot_be_decoded_as_asked_is_refused_before_training(
    make_config: Any, tmp_path: Path, sliding_target: Path
) -> None:
    config, provenance = make_config(tmp_path / "run", "eval.batch_size=2", target={"path": str(sliding_target)})
    with pytest.raises(TorchspecError, match="decode with batch size 1, not 2"):
        train(config, provenance=provenance)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_target_with_code_of_its_own(make_config: Any, tmp_path: Path, own_code_target: Path) -> None:
    """Trained, validated and exported with leave; exported again from the checkpoint, and not without leave."""
    target = {"path": str(own_code_target), "trust_remote_code": True}
    config, provenance = make_config(tmp_path / "run", "train.max_steps=1", target=target)
    outcome = train(config, provenance=provenance)
    assert outcome.draft is not None
    checkpoint = ["--checkpoint", str(outcome.directory), "--format", "vllm"]
    exported = ["--checkpoint", str(outcome.draft), "--format", "vllm", "--target", str(own_code_target)]
    for number, words in enumerate((checkpoint, exported)):
        output = tmp_path / str(number)
        assert main(["export", *words, "--output", str(output)]) == 1
        assert main(["export", *words, "--output", str(output), "--trust-remote-code"]) == 0
        assert (output / "config.json").is_file()


@pytest.mark.slow
def test_two_ranks_stopped_and_continued_give_one_ranks_run(
    make_config: Any, tmp_path: Path, tiny_target: Path, conversations: Path
) -> None:
    """`torchspec train --nproc 2`, SIGTERM in the middle, the same command again; then against one rank."""
    settings = ["train.epochs=3", "train.resume=auto", "eval.every=0", "train.max_steps=10"]
    config, provenance = make_config(tmp_path / "one", *settings)
    train(config, provenance=provenance)
    written = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**written, "output": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torchspec", "train", "--config", str(tmp_path / "two.yaml"), "--nproc", "2"]

    metrics = tmp_path / "two" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    stopped = steps_on_disk(tmp_path / "two" / "checkpoints")[-1]
    if stopped < 10:
        assert process.returncode == 143, said
        assert f"step {stopped}" in said
        assert not (tmp_path / "two" / "draft").exists()
        subprocess.run(command, check=True, capture_output=True, timeout=240)

    one, two = rows(tmp_path / "one", "train"), rows(tmp_path / "two", "train")
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, 11))
    for row, expected in zip(two, one, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=2e-5), name
        assert row["tokens"] == expected["tokens"]
    assert [row["rounds"] for row in rows(tmp_path / "two", "validation")] == [
        row["rounds"] for row in rows(tmp_path / "one", "validation")
    ]
    assert (tmp_path / "two" / "draft" / "config.json").is_file()


def test_bfloat16_compute_trains_and_validates(make_config: Any, tmp_path: Path) -> None:
    """Close to float32, not equal to it; parameters and checkpoints stay float32."""
    losses = {}
    for compute in ("float32", "bfloat16"):
        config, provenance = make_config(tmp_path / compute, f"precision.compute={compute}")
        train(config, provenance=provenance)
        losses[compute] = [row["loss"] for row in rows(tmp_path / compute, "train")]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]
    _, state = load_draft_state(directory_of(tmp_path / "bfloat16" / "checkpoints", 4))
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.usefixtures("torchao")
def test_moments_in_8_bits_over_sessions_and_ranks(make_config: Any, tmp_path: Path, runs: ModuleType) -> None:
    """The same number of ranks goes on to the last bit, another one nearly so; either optimizer takes over."""
    settings = ("train.schedule=constant", "train.warmup_steps=0", "train.epochs=4", "eval.every=0", "train.lr=1e-3")
    eight = (*settings, "train.optimizer=adamw8bit")
    config, _ = make_config(tmp_path / "base")
    values = config.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    stop, end = "train.max_steps=3", "train.max_steps=6"
    whole = runs.figures(runs.alone(values, tmp_path / "whole", *eight, end))
    runs.alone(values, tmp_path / "parts", *eight, stop)
    for name in ("two", "plain"):
        shutil.copytree(tmp_path / "parts", tmp_path / name)
    codes = load_file(directory_of(tmp_path / "parts" / "checkpoints", 3) / "rng" / "rank_00000.safetensors")
    assert any(name.endswith("exp_avg_sq.codes") for name in codes)

    assert runs.figures(runs.alone(values, tmp_path / "parts", *eight, end)) == whole
    runs.alone(values, tmp_path / "plain", *settings, end)
    runs.two_ranks(values, {tmp_path / "two": (*eight, end)})
    for name in ("two", "plain"):
        figures = runs.figures(tmp_path / name)
        assert figures[:3] == whole[:3]
        assert [row[1] for row in figures] == pytest.approx([row[1] for row in whole], rel=1e-3)
        assert figures != whole
