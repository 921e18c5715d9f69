"""What people get wrong, and what they are told."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from torchspec.cli import main

Answer = Callable[..., str]
GOOD_ROW = {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the quick fox"}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    directory = tmp_path_factory.mktemp("mistakes")
    (directory / "good.jsonl").write_text("\n".join(json.dumps({**GOOD_ROW, "id": str(n)}) for n in range(4)))
    (directory / "empty.jsonl").write_text("")
    (directory / "garbage.jsonl").write_text("{oops\nnot json\n")
    row: dict[str, Any] = {"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (directory / "roles.jsonl").write_text(json.dumps(row))
    for name, missing in (("no_tokenizer", "tokenizer.json"), ("no_weights", "model.safetensors")):
        shutil.copytree(tiny_target, directory / name)
        (directory / name / missing).unlink()
    wrong = {"model_type": "llama", "vocab_size": 999, "draft_vocab_size": 301, "num_attention_heads": 3}
    (directory / "misfit.json").write_text(json.dumps(wrong))
    (directory / "broken.json").write_text("{")
    return directory


@pytest.fixture(scope="module")
def answer(place: Path) -> Iterator[Answer]:
    """Run a command that must fail with this exit code; -> what it says on stderr."""

    def run(*words: object, code: int) -> str:
        out, err = io.StringIO(), io.StringIO()
        with chdir(place), redirect_stdout(out), redirect_stderr(err):
            got = main([str(word) for word in words])
        assert got == code, err.getvalue()
        assert "Traceback" not in err.getvalue()
        assert out.getvalue() == ""
        return err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSPEC_CACHE", str(place / "cache"))
        yield run


@pytest.fixture(scope="module")
def trained(place: Path, tiny_target: Path) -> Path:
    """Two checkpoints of a tiny run."""
    words = [
        "train",
        "--target",
        tiny_target,
        "--data",
        place / "good.jsonl",
        "--output",
        place / "run",
        "--device",
        "cpu",
    ]
    small = ["train.batch_size=2", "train.checkpoint_every=1", "draft.unroll=1", "draft.vocab_size=64"]
    assert main([str(word) for word in words + small]) == 0
    return place / "run"


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        ("missing.jsonl", 2, ["data.train", "no such file", "missing.jsonl"]),
        (".", 2, ["data.train", "is a directory"]),
        ("empty.jsonl", 2, ["empty.jsonl is empty"]),
        (
            "garbage.jsonl",
            1,
            ["can be used, of 2 read: 2 bad", "garbage.jsonl:1: not valid JSON", "garbage.jsonl:2"],
        ),
        ("roles.jsonl", 1, ["roles.jsonl:1", "unknown role 'robot'", "assistant"]),
    ],
)
def test_data(answer: Answer, tiny_target: Path, data: str, code: int, says: list[str]) -> None:
    said = answer("train", "--target", tiny_target, "--data", data, "--output", "o", "--device", "cpu", code=code)
    for part in says:
        assert part in said


@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        ("nowhere", 2, ["target.path", "no such directory", "`embedded`", "nothing is downloaded"]),
        (".", 2, ["target.path", "no config.json"]),
        ("no_tokenizer", 2, ["no_tokenizer holds no tokenizer", "tokenizer.json"]),
        ("no_weights", 2, ["no_weights has no weights", "model.safetensors"]),
    ],
)
def test_targets(answer: Answer, target: str, code: int, says: list[str]) -> None:
    said = answer("train", "--target", target, "--data", "good.jsonl", "--output", "o", "--device", "cpu", code=code)
    for part in says:
        assert part in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["draft.config=misfit.json"], ["999", "301", "draft.vocab_size"]),
        (["draft.config=broken.json"], ["draft.config", "not JSON"]),
        (["draft.config=nowhere.json"], ["draft.config", "cannot be read"]),
        (["draft.taps=[1, 1, 99]", "draft.head_dim=7"], ["the layers 0 to ", "ascending", "must be even"]),
    ],
)
def test_drafts_that_do_not_fit(
    answer: Answer, place: Path, tiny_target: Path, settings: list[str], says: list[str]
) -> None:
    words = ("train", "--target", tiny_target, "--data", "good.jsonl", "--output", "unfit", "--device", "cpu")
    said = answer(*words, *settings, code=2)
    for part in says:
        assert part in said
    assert not (place / "unfit").exists(), "refused before anything was made"


@pytest.mark.parametrize("command", ["train", "prepare", "quickstart"])
def test_outputs_that_cannot_be(answer: Answer, tiny_target: Path, command: str) -> None:
    words = ("--target", tiny_target, "--data", "good.jsonl") if command == "train" else ()
    said = answer(command, *words, "--output", "good.jsonl/inside", code=2)
    assert "good.jsonl is a file" in said


def test_a_directory_nobody_can_write(answer: Answer, tiny_target: Path) -> None:
    """/proc takes no directories, whoever asks (permissions mean nothing to root)."""
    words = ("train", "--target", tiny_target, "--data", "good.jsonl", "--device", "cpu")
    said = answer(*words, "--output", "/proc/torchspec", code=1)
    assert "/proc/torchspec" in said
    assert "cannot be written" in said


def test_a_truncated_checkpoint(answer: Answer, place: Path, trained: Path) -> None:
    damaged = place / "damaged"
    shutil.copytree(trained, damaged)
    for file in (damaged / "checkpoints").rglob("state/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    said = answer("export", "--checkpoint", damaged, "--format", "hf", "--output", "e", code=1)
    assert ".safetensors" in said
    assert not (place / "e").exists()


def test_a_damaged_best_checkpoint_is_passed_over(
    place: Path, trained: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of steps 1 and 2 the earlier is made the best and cut: the later one is exported. By itself, it is refused."""
    run = shutil.copytree(trained, place / "best_damaged")
    checkpoints = run / "checkpoints"
    best, newest = checkpoints / "step_00000001", checkpoints / "step_00000002"
    manifest = json.loads((best / "manifest.json").read_text())
    (best / "manifest.json").write_text(json.dumps({**manifest, "score": 9.0}))
    (weights,) = best.glob("state/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["export", "--format", "hf", "--output"]
    assert main([*words, str(place / "from_run"), "--checkpoint", str(run)]) == 0
    assert f"checkpoint {best} is damaged and passed over: {weights}" in caplog.text
    assert best.is_dir(), "a training may be going on here"
    assert main([*words, str(place / "from_newest"), "--checkpoint", str(newest)]) == 0
    exported = [(place / name / "model.safetensors").read_bytes() for name in ("from_run", "from_newest")]
    assert exported[0] == exported[1]
    assert main([*words, str(place / "from_best"), "--checkpoint", str(best)]) == 1
    assert str(weights) in capsys.readouterr().err
    assert not (place / "from_best").exists()


def test_a_draft_of_another_target(answer: Answer, trained: Path) -> None:
    words = ("eval", "--target", "embedded", "--data", "good.jsonl", "--device", "cpu")
    said = answer(*words, "--draft", trained / "draft", code=1)
    assert "vocabulary" in said or "vocab_size" in said


def test_export_for_another_target_of_the_same_shape(
    answer: Answer, place: Path, trained: Path, tiny_target: Path
) -> None:
    other = shutil.copytree(tiny_target, place / "other_weights")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    words = ("export", "--checkpoint", trained, "--format", "hf", "--output", "e")
    said = answer(*words, "--target", other, code=1)
    assert f"was trained on the target at {tiny_target.resolve()}" in said
    assert str(other) in said
    assert not (place / "e").exists()


def test_export_onto_a_target_is_refused_before_any_work(answer: Answer, place: Path, tiny_target: Path) -> None:
    target = shutil.copytree(tiny_target, place / "precious")
    said = answer("export", "--checkpoint", "nowhere", "--format", "hf", "--output", target, code=1)
    assert f"{target} exists and is not a draft directory" in said
    assert (target / "tokenizer.json").is_file()


def test_no_draft_and_no_checkpoint(answer: Answer, tiny_target: Path) -> None:
    words = ("eval", "--target", tiny_target, "--data", "good.jsonl", "--device", "cpu")
    said = answer(*words, "--draft", "nowhere", code=2)
    assert "--draft: no such directory (got 'nowhere')" in said
    assert "load target" not in said
    said = answer("export", "--checkpoint", "nowhere", "--format", "hf", "--output", "e", code=1)
    assert "neither a checkpoint nor a run" in said


def test_what_eval_is_to_read_is_looked_for_before_the_target_is_loaded(answer: Answer, tiny_target: Path) -> None:
    words = ("eval", "--target", tiny_target, "--data", "good.jsonl", "--draft", "no_tokenizer", "--device", "cpu")
    said = answer(*words, "--chat-template", "none.jinja", code=2)
    assert "--chat-template: no such file (got 'none.jinja')" in said
    assert "--engine-options: not a JSON object: " in answer(*words, "--engine-options", "{a", code=2)


def test_sizes_of_a_draft_that_do_not_go_together(
    answer: Answer, trained: Path, tiny_target: Path, place: Path
) -> None:
    draft = shutil.copytree(trained / "draft", place / "odd_draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "hidden_size": 77}))
    words = ("eval", "--target", tiny_target, "--data", "good.jsonl", "--device", "cpu", "--draft", draft)
    assert "config.json of the draft: The hidden size (77) is not a multiple" in answer(*words, code=1)


def test_results_that_are_none_are_named(answer: Answer, trained: Path) -> None:
    words = ("export", "--checkpoint", trained, "--format", "hf", "--output", "e")
    said = answer(*words, "--results", "none.json", "broken.json", code=2)
    assert "--results: cannot be read: No such file or directory (got 'none.json')" in said
    assert "--results: no result of `torchspec eval --output` (got 'broken.json')" in said


def test_adapters_of_eval_are_checked_with_its_files(answer: Answer, tiny_target: Path) -> None:
    said = answer(
        "eval",
        "--target",
        "nowhere",
        "--draft",
        "d",
        "--data",
        "missing.jsonl",
        "--device",
        "cup",
        "--backend",
        "vlm",
        code=2,
    )
    for part in ("--target", "--draft", "--data", "--device", "did you mean cpu?", "--backend", "did you mean vllm?"):
        assert part in said


def test_generating_onto_the_input(answer: Answer, tiny_target: Path) -> None:
    words = ("generate", "--target", tiny_target, "--data", "good.jsonl", "--device", "cpu")
    assert "one of the files that are read" in answer(*words, "--output", "good.jsonl", code=2)


@pytest.mark.parametrize("output", ["good.jsonl", "run/draft/model.safetensors", "run", "good.jsonl/eval.json"])
def test_eval_refuses_an_output_before_it_measures(
    answer: Answer, place: Path, trained: Path, tiny_target: Path, output: str
) -> None:
    words = ("eval", "--target", tiny_target, "--draft", trained / "draft", "--data", "good.jsonl", "--device", "cpu")
    before = (place / "good.jsonl").read_bytes()
    said = answer(*words, "--output", output, code=2)
    assert "--output" in said
    assert (place / "good.jsonl").read_bytes() == before
