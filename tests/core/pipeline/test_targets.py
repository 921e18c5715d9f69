"""Whole runs over other kinds of targets than the tiny Qwen3: experts, latent attention, images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, Qwen3MoeConfig

from torchspec.cli import main
from torchspec.core import registry
from torchspec.core.errors import ConfigError
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions
from torchspec.core.interfaces.features import RecordRef
from torchspec.core.models.images import refer_to_image
from torchspec.core.pipeline import hosted
from torchspec.core.pipeline.capture import capture
from torchspec.core.pipeline.engine_setup import check_images
from torchspec.core.pipeline.inprocess import train

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "max_position_embeddings", "eos_token_id", "pad_token_id",
)  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.fixture
def save_like(tiny_target: Path, tmp_path: Path) -> Any:
    """save_like(class, ...): a target of another kind with the tiny target's sizes and tokenizer."""

    def save(kind: type[PreTrainedConfig], **facts: Any) -> Path:
        sizes = json.loads((tiny_target / "config.json").read_text())
        directory = tmp_path / kind.model_type
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**{name: sizes[name] for name in SHARED}, **facts}))
        model.save_pretrained(directory)
        for file in (*tiny_target.glob("*token*"), *tiny_target.glob("chat_template*")):
            shutil.copy(file, directory)
        return directory

    return save


def test_experts(save_like: Any, make_config: Any, tmp_path: Path) -> None:
    target = save_like(Qwen3MoeConfig, num_key_value_heads=2, num_experts=4, **EXPERTS)
    trained_and_evaluated(target, make_config, tmp_path / "run")


def test_latent_attention(save_like: Any, make_config: Any, tmp_path: Path) -> None:
    """The target's, and the draft's."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    target = save_like(DeepseekV3Config, num_key_value_heads=4, head_dim=8, v_head_dim=8, **ranks, **groups, **EXPERTS)
    trained_and_evaluated(target, make_config, tmp_path / "gqa")
    first = trained_and_evaluated(target, make_config, tmp_path / "mla", "draft.attention=mla")
    assert json.loads((first.draft / "config.json").read_text())["kv_lora_rank"] == 16
    words = ("draft.attention=mla", f"draft.init_from={first.directory}")
    trained_and_evaluated(target, make_config, tmp_path / "again", *words)
    before, after = (rows(tmp_path / name, "train")[0]["loss"] for name in ("mla", "again"))
    assert after < before


def trained_and_evaluated(target: Path, make_config: Any, output: Path, *more: str) -> Any:
    """Losses that fall, and a decoded acceptance: the validation decodes losslessly against the target, or raises."""
    words = ("train.max_steps=4", "eval.every=4", f"target.path={target}", *more)
    config, provenance = make_config(output, *words)
    outcome = train(config, provenance=provenance)
    losses = [row["loss"] for row in rows(outcome.directory, "train")]
    assert losses[-1] < losses[0]
    assert outcome.acceptance_length is not None
    assert outcome.acceptance_length >= 1
    assert outcome.draft is not None
    return outcome


@pytest.fixture
def shown(conversations: Path, tmp_path: Path) -> Path:
    """The conversations, every second one with an image."""
    Image.new("RGB", (40, 31), (200, 30, 90)).save(tmp_path / "a.png")
    rows = [json.loads(line) for line in (conversations / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        text = row["messages"][0]["content"]
        row["messages"][0]["content"] = [{"type": "image", "image": "a.png"}, {"type": "text", "text": text}]
    file = tmp_path / "shown.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_images_are_trained_on_and_captured_alike(
    tiny_llava: Path, shown: Path, make_config: Any, tmp_path: Path
) -> None:
    """And validated on; the features of an earlier capture give the same losses."""
    common = ("train.max_steps=3", "eval.every=3", f"target.path={tiny_llava}", f"data.train=[{shown}]")
    common += (f"data.validation=[{shown}]", "eval.samples=4", "eval.batch_size=3")
    config, provenance = make_config(tmp_path / "run", *common)
    outcome = train(config, provenance=provenance)
    assert outcome.acceptance_length is not None
    losses = [row["loss"] for row in rows(outcome.directory, "train")]

    captured, _ = make_config(tmp_path / "features", *common)
    found = capture(captured)
    assert (found.captured, found.quarantined) == (13, 0)
    stored, provenance = make_config(
        tmp_path / "stored", *common, "pipeline.topology=offline", f"pipeline.features={tmp_path / 'features'}"
    )
    again = [row["loss"] for row in rows(train(stored, provenance=provenance).directory, "train")]
    assert again == pytest.approx(losses, rel=1e-6)


def test_a_worker_is_sent_the_images(tiny_llava: Path, tmp_path: Path, image_targets: Any) -> None:
    """Of hf in a process of its own: features and text as in this one."""
    image = refer_to_image(str(image_targets.picture(tmp_path / "a.png", 1)))
    sample = CaptureRequest(record_id="s", input_ids=[7, 3, 3, 3, 3, 8, 9], images=(image,))
    options = EngineOptions(
        target=tiny_llava, device=registry.load_device("cpu"), taps=(0, 5), directory=tmp_path, images=True
    )
    own = registry.load_engine("hf", replace(options, directory=None))
    started = hosted.start("hf", options)
    try:
        worker = hosted.attach("hf", options)
        for engine in (own, worker):
            store = MemoryStore()
            (ref,) = engine.capture([sample], (0, 5), store)
            assert isinstance(ref, RecordRef)
            features = take(store, ref)
            text = engine.generate([sample.input_ids], max_new_tokens=5, images=[sample.images])
            if engine is own:
                expected = features, text
        assert torch.equal(features.taps_TNH, expected[0].taps_TNH)
        assert torch.equal(features.last_TH, expected[0].last_TH)
        assert text == expected[1]
        worker.close()
    finally:
        started.close()


def test_the_target_answers_questions_about_images(
    tiny_llava: Path, shown: Path, make_config: Any, tmp_path: Path, capsys: Any
) -> None:
    """`generate`, a training on what it wrote, and `eval`: the target sees the images in each."""
    words = ["--target", str(tiny_llava), "--device", "cpu", "--max-new-tokens", "6"]
    written = tmp_path / "other" / "written.jsonl"
    assert main(["generate", *words, "--data", str(shown), "--output", str(written)]) == 0
    entries = [json.loads(line) for line in written.read_text().splitlines()]
    with_images = [entry for entry in entries if "images" in entry]
    assert len(with_images) == len(entries) // 2 + 1
    engine = registry.load_engine("hf", EngineOptions(target=tiny_llava, device=registry.load_device("cpu")))
    for entry in with_images:
        assert entry["images"] == [str(tmp_path / "a.png")]
        start = entry["loss_mask"].index(1)
        session = engine.open([entry["input_ids"][:start]], (), images=[(refer_to_image(entry["images"][0]),)])
        assert int(session.prefill.logits_BV[0].argmax()) == entry["input_ids"][start]

    config, provenance = make_config(
        tmp_path / "run", "train.max_steps=3", f"target.path={tiny_llava}", f"data.train=[{written}]", "eval.every=0"
    )
    outcome = train(config, provenance=provenance)
    assert rows(outcome.directory, "train")[-1]["step"] == 3
    words = [*words, "--draft", str(outcome.draft), "--data", str(shown), "--json", "--batch-size", "3"]
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["lossless"]) == (len(entries), True)


def test_an_engine_without_images_refuses_by_name(make_config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config, _ = make_config(tmp_path / "run")
    able = registry.backends().spec("hf")
    unable = replace(able, capabilities=able.capabilities - {"images"})
    shown: Any = SimpleNamespace(with_images="c0")
    check_images(config, shown)
    monkeypatch.setattr(registry, "backends", lambda: SimpleNamespace(spec=lambda name: unable))
    with pytest.raises(ConfigError, match="captures no images, which sample 'c0' has"):
        check_images(config, shown)
    check_images(config, SimpleNamespace(with_images=None))  # type: ignore[arg-type]
