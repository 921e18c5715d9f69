"""`torchspec convert`, and training on from what others published, through the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from torchspec.cli import main
from torchspec.core.models.target_head import load_target_head

Call = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, published_drafts: ModuleType, published_target: Path) -> Path:
    directory = tmp_path_factory.mktemp("convert")
    rows = []
    for n in range(16):
        said = " ".join(["the", "quick", "brown", "fox", "returns", "a", "value"][n % 4 :] * 2)
        turns = [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": said}]
        rows.append(json.dumps({"id": f"row{n}", "messages": turns}) + "\n")
    (directory / "train.jsonl").write_text("".join(rows))
    head = load_target_head(published_target, dtype=torch.float32, device=torch.device("cpu"))
    ends = {
        "embedding": head.embedding_VH,
        "head": head.head_VH,
        "norm": head.normed(torch.full((1, 64), 1.0), "pre_norm")[0],
    }
    for kind, each in published_drafts.PUBLISHED.items():
        each.write(directory / kind, ends)
    return directory


@pytest.fixture(scope="module")
def call(place: Path) -> Iterator[Call]:
    """Run the command line in this process and that directory, expecting an exit code: what it says."""

    def run(*given: str | Path, code: int = 0) -> str:
        out, err = io.StringIO(), io.StringIO()
        with chdir(place), redirect_stdout(out), redirect_stderr(err):
            got = main([str(word) for word in given])
        assert got == code, err.getvalue()
        assert "Traceback" not in err.getvalue()
        return out.getvalue() + err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSPEC_CACHE", str(place / "cache"))
        yield run


def test_a_dry_run_says_what_a_draft_is(call: Call, published_target: Path, place: Path) -> None:
    said = call("convert", "--draft", "eagle", "--dry-run")
    assert "eagle: a draft of eagle3 in the plain layout" in said
    assert "pytorch_model.bin: 15 tensors" in said
    assert "float16" in said
    assert "config.json names LlamaForCausalLM: read as LlamaForCausalLMEagle3" in said
    said = call("convert", "--draft", "speculators-0.6", "--target", published_target, "--dry-run")
    assert "taps [1, 2, 6], 96 tokens" in said
    assert "norm_before_fc: True" in said
    assert "fits       the speculators layout: --format vllm" in said
    assert "does not   fit the plain layout: draft.norm_before_residual: SGLang does not read this flag" in said
    assert "what an engine computes from it is at most" in said
    assert sorted(path.name for path in place.glob("*draft*")) == []


def test_one_command_turns_it_into_another_layout(call: Call, published_target: Path, place: Path) -> None:
    words = ("convert", "--draft", "eagle", "--target", published_target)
    said = call(*words, "--format", "vllm", "--output", "for-vllm")
    assert "for-vllm: read again, it is the same draft, tensor by tensor, in float16" in said
    assert json.loads((place / "for-vllm/config.json").read_text())["speculators_model_type"] == "eagle3"
    assert load_file(place / "for-vllm/model.safetensors")["layers.0.hidden_norm.weight"].dtype == torch.float16
    card = (place / "for-vllm/README.md").read_text()
    assert "put the draft of the directory `eagle` into this layout" in card
    assert "Who trained it, on which data and with which settings is not known here; no card was beside it." in card
    assert "None: this draft has not been measured by decoding." in card
    assert "Written with torchspec" in card
    assert str(place) not in card
    assert ModelCard(card).data.license is None
    (place / "for-vllm/README.md").write_text("---\nlicense: cc-by-4.0\n---\nMine. Acceptance length 9.\n")
    # And back, in another precision.
    words = ("convert", "--draft", "for-vllm", "--target", published_target, "--dtype", "float32")
    call(*words, "--format", "sglang", "--output", "back")
    card = (place / "back/README.md").read_text()
    assert "its own card may say" in card
    assert "License: that of the converted draft, as its own card gives it." in card
    assert "Acceptance length 9" not in card
    assert ModelCard(card).data.license == "cc-by-4.0"
    back, first = (
        load_file(place / "back/model.safetensors"),
        torch.load(place / "eagle/pytorch_model.bin", weights_only=True),
    )
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], value.to(back[name].dtype)) for name, value in first.items())


def test_what_is_missing_is_said_at_once(call: Call, place: Path, published_target: Path) -> None:
    said = call("convert", "--draft", "eagle", code=2)
    assert all(f"--{name}: required" in said for name in ("target", "format", "output"))
    said = call("convert", "--draft", "speculators-dflash", "--target", published_target, "--format", "hf",
                "--output", "refused", code=2)  # fmt: skip
    assert "the plain layout has no head of its own" in said
    assert not (place / "refused").exists()
    said = call("convert", "--draft", "nowhere", "--dry-run", code=1)
    assert "nowhere has no config.json" in said


FINE_TUNED = (
    ("eagle", "hf"), ("speculators-0.6", "vllm"), ("z-lab", "vllm"), ("speculators-dflash", "vllm"),
    ("specforge-dspark", "hf"), ("specforge-peagle", "vllm"),
    *(pytest.param(kind, layout, marks=pytest.mark.slow) for kind, layout in (
        ("specforge-state", "vllm"), ("specforge-eagle3.1", "hf"), ("torchspec", "vllm"), ("specforge-domino", "hf"),
    )),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "layout"), FINE_TUNED)
def test_training_goes_on_from_it(
    call: Call, place: Path, published_drafts: ModuleType, published_target: Path, kind: str, layout: str
) -> None:
    """With one setting: geometry and taps are the draft's. The first loss is that of the converted draft, to the bit,
    and a few steps lower it; what is saved is rebuilt without the directory that it started from."""
    name = published_drafts.PUBLISHED[kind].name
    words = (
        "train", "--algorithm", name, "--target", published_target, "--data", "train.jsonl", "--device", "cpu",
        "data.max_length=96", "train.batch_size=8", "train.schedule=constant", "train.warmup_steps=0", "eval.every=0",
        "train.checkpoint_every=100",
    )  # fmt: skip
    call(*words, f"draft.init_from={kind}", "train.lr=0.003", "train.epochs=4", "--output", f"run-{kind}")
    call("convert", "--draft", kind, "--target", published_target, "--format", layout, "--output", f"{kind}-{layout}")
    call(*words, f"draft.init_from={kind}-{layout}", "train.max_steps=1", "--output", f"one-{kind}")
    losses, (first,) = (
        [row["loss"] for row in map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
         if row["kind"] == "train"]
        for run in (f"run-{kind}", f"one-{kind}")
    )  # fmt: skip
    assert losses[0] == first
    assert sum(losses[-2:]) < sum(losses[:2])
    (place / kind).rename(place / f"moved-{kind}")
    try:
        call("export", "--checkpoint", f"run-{kind}", "--format", layout, "--output", f"after-{kind}")
    finally:
        (place / f"moved-{kind}").rename(place / kind)
    assert (place / f"after-{kind}" / "config.json").is_file()


def test_a_draft_of_another_algorithm_is_named(call: Call, published_target: Path) -> None:
    said: Any = call("train", "--algorithm", "eagle3", "--target", published_target, "--data", "train.jsonl",
                     "draft.init_from=z-lab", "--output", "other", "--dry-run", code=2)  # fmt: skip
    assert "1 configuration error" in said
    assert "draft.init_from: is a draft of dflash, and this run trains eagle3 (got 'z-lab')" in said
    assert "train it further with --algorithm dflash" in said
