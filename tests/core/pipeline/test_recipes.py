"""Recipes for published targets: each plans, fits the hardware that it names, and says nothing untrue of itself.

Targets are configurations alone (tests/fixtures/targets), with the sizes that their publishers state.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchspec.cli import main
from torchspec.core.config.recipes import shipped, title
from torchspec.core.models.target_outline import only_outlined, outline, stored_bytes

ROOT = Path(__file__).resolve().parents[3]
RECIPES = tuple(shipped("targets"))
LEFT_FOR_WORK = 0.05
"""Of a device: what an engine needs beside weights and cache at the least."""

Plans = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def plans(table: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """plans(recipe): its plan, made once."""

    @cache
    def plan(recipe: str) -> dict[str, Any]:
        made: dict[str, Any] = table.plan_of(recipe, tmp_path_factory.mktemp("recipe"))
        return made

    return plan


@pytest.fixture
def target(tmp_path: Path) -> Callable[[str], Path]:
    """target(name): a directory with a published target's config.json and nothing else."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        shutil.copy(ROOT / "tests" / "fixtures" / "targets" / f"{name}.json", path / "config.json")
        return path

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_devices_that_it_names(recipe: str, plans: Plans) -> None:
    plan = plans(recipe)
    named = re.search(r"(\d+) x (\d+) GB", title(shipped()[recipe]))
    assert named is not None
    devices, gigabytes = map(int, named.groups())
    chosen = {row["path"]: row["value"] for row in plan["settings"]}
    assert chosen["device_gb"] == gigabytes
    engines = chosen["engine.tensor_parallel"] * chosen["pipeline.engines"] if chosen["pipeline.engines"] else 0
    assert plan["run"]["ranks"] + engines == devices
    assert plan["memory"]["fits"], plan["memory"]["verdict"]
    assert plan["memory"]["available"] <= gigabytes * 10**9
    if chosen["pipeline.topology"] == "inprocess":
        assert plan["engine"] is None
    else:
        engine = plan["engine"]
        left = engine["share"] - engine["weights"] - engine["cache"]
        assert left >= LEFT_FOR_WORK * gigabytes * 10**9, engine["verdict"]
    shared = chosen["engine.memory_fraction"] if chosen["pipeline.topology"] == "colocated" else 0
    assert plan["memory"]["peak"] <= (1 - shared) * gigabytes * 10**9


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_is(recipe: str, table: ModuleType) -> None:
    text = shipped()[recipe].read_text(encoding="utf-8")
    assert table.words_of(recipe)[:3] == ["train", "--config", recipe]
    assert "Planned and parsed here, not trained here." in text
    assert "SpecForge" in text or "`llama-3.1-8b`" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_plan_for_another_machine_says_so(
    plans: Plans, table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = "\n".join(plans("qwen3-8b")["absent"])
    for lacks in (
        "device cuda is not available here",
        "backend vllm is not available here",
        "no weights",
        "no tokenizer",
    ):
        assert lacks in absent
    table.plan_of("qwen3-8b", tmp_path)
    words = [*table.words_of("qwen3-8b"), "--target", tmp_path / "target", "--data", tmp_path / "answers.jsonl"]
    words = [*map(str, words), "--output", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("planned for another machine: this one cannot run it\n  - device cuda")
    assert main(words) == 2, "it is a plan alone that needs no device"
    refused = capsys.readouterr().err
    for lacks in ("device: not available here", "backend: not available here"):
        assert lacks in refused


def test_a_device_that_is_too_small_is_said_with_what_helps(table: ModuleType, tmp_path: Path) -> None:
    plan = table.plan_of("qwen3-30b-a3b", tmp_path, "device_gb=24")
    assert plan["memory"]["fits"]
    assert not plan["engine"]["fits"]
    assert plan["engine"]["enough"] == 8, "61 GB over 8 are 7.6 GB of the engine's 12; over 4 they are 15.3"
    assert "engine.tensor_parallel=8 would do" in plan["engine"]["verdict"]
    plan = table.plan_of("qwen3-30b-a3b", tmp_path, "device_gb=10")
    assert not plan["memory"]["fits"]
    assert plan["memory"]["advice"]


def test_what_says_nothing_of_its_memory_is_not_judged(table: ModuleType, tmp_path: Path) -> None:
    plan = table.plan_of("qwen3-30b-a3b", tmp_path, "device_gb=null", "device_name=null")
    assert plan["memory"]["available"] is None
    assert plan["engine"]["share"] is None
    assert "device_gb=N" in plan["memory"]["verdict"]
    assert "device_gb=N" in plan["engine"]["verdict"]


def dense(hidden: int, layers: int, heads: int, keys: int, size: int, wide: int, vocabulary: int, normed: bool) -> int:
    """Qwen3 and Llama: separate head; Qwen3 has a norm of each head's queries and of its keys."""
    attention = 2 * hidden * heads * size + 2 * hidden * keys * size + (2 * size if normed else 0)
    return layers * (attention + 3 * hidden * wide + 2 * hidden) + hidden + 2 * vocabulary * hidden


def experts(hidden: int, layers: int, heads: int, keys: int, size: int, wide: int, count: int, vocabulary: int) -> int:
    """Qwen3-MoE: every layer's MLP is `count` experts and a router."""
    attention = 2 * hidden * heads * size + 2 * hidden * keys * size + 2 * size
    return layers * (attention + count * (3 * hidden * wide + hidden) + 2 * hidden) + hidden + 2 * vocabulary * hidden


def latent(dense_layers: int, layers: int, heads: int, count: int, vocabulary: int) -> int:
    """DeepSeek-V3 (2412.19437, section 4.2), whose sizes Kimi-K2 shares but for heads, experts and vocabulary."""
    hidden, q, kv, nope, rope, v = 7168, 1536, 512, 128, 64, 128
    attention = hidden * q + q + q * heads * (nope + rope) + hidden * (kv + rope) + kv
    attention += kv * heads * (nope + v) + heads * v * hidden
    routed = (count + 1) * 3 * hidden * 2048 + count * hidden
    mlp = dense_layers * 3 * hidden * 18432 + (layers - dense_layers) * routed
    return layers * (attention + 2 * hidden) + mlp + hidden + 2 * vocabulary * hidden


@pytest.mark.parametrize(
    ("name", "derived", "published"),
    [
        ("llama-3.1-8b", dense(4096, 32, 32, 8, 128, 14336, 128256, False), 8_030_261_248),
        ("llama-3.3-70b", dense(8192, 80, 64, 8, 128, 28672, 128256, False), 70_553_706_496),
        ("qwen3-8b", dense(4096, 36, 32, 8, 128, 12288, 151936, True), 8_190_735_360),
        ("qwen3-32b", dense(5120, 64, 64, 8, 128, 25600, 151936, True), 32_762_123_264),
        ("qwen3-30b-a3b", experts(2048, 48, 32, 4, 128, 768, 128, 151936), 30_532_122_624),
        ("qwen3-235b-a22b", experts(4096, 94, 64, 4, 128, 1536, 128, 151936), 235_093_634_560),
        ("deepseek-v3.1", latent(3, 61, 128, 256, 129280), 671e9),
    ],
)
def test_parameters_are_those_of_the_target(
    name: str, derived: int, published: float, target: Callable[[str], Path]
) -> None:
    """Derived by hand; published: bytes of the bfloat16 checkpoint by two, or the paper's figure."""
    weights = outline(target(name))
    counted = sum(_size(weights.shape(tensor)) for tensor in weights.files)
    assert counted == pytest.approx(derived, rel=1e-6)
    assert derived == pytest.approx(published, rel=0 if isinstance(published, int) else 1e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen3-8b", 16_381_470_720),
        ("qwen3-235b-a22b", 470_187_269_120),
        ("gemma-3-27b", 54_864_813_280),
        ("gemma-4-26b-a4b", 51_611_872_412),
        ("gpt-oss-20b", 13_761_264_768),
        ("gpt-oss-120b", 65_248_815_744),
        ("kimi-k2.5", 595e9),
        ("deepseek-v3.1", 671e9),
    ],
)
def test_bytes_of_a_checkpoint_from_its_configuration(
    name: str, published: float, target: Callable[[str], Path]
) -> None:
    """`total_size` of the published index, or what the hub says that the files take; DeepSeek-V3.1's without its
    prediction head."""
    assert stored_bytes(outline(target(name)), 2) == pytest.approx(published, rel=5e-3)


def test_an_index_without_its_shards_says_how_large_they_are(target: Callable[[str], Path]) -> None:
    path = target("gpt-oss-20b")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 12345}, "weight_map": {}})
    )
    assert only_outlined(path)
    assert stored_bytes(outline(path), 2) == 12345
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert not only_outlined(path), "a download that stopped is no plan's affair"


def test_a_draft_and_its_states_by_hand(plans: Plans) -> None:
    """EAGLE-3 for Qwen3-8B: fc, one layer that reads embedding and feature, four norms, a head of 32,000 tokens."""
    hidden, heads, keys, wide, tokens = 4096, 32 * 128, 8 * 128, 12288, 32000
    layer = 2 * hidden * (heads + 2 * keys) + heads * hidden + 3 * hidden * wide
    draft = 3 * hidden * hidden + layer + 4 * hidden + tokens * hidden
    plan = plans("qwen3-8b")
    parts = {part["name"]: part["bytes"] for part in plan["memory"]["parts"]}
    assert plan["draft"]["trained parameters"] == draft == 399_523_840
    assert parts["draft parameters"] == 4 * draft // 8
    assert parts["optimizer state"] == 8 * draft // 8
    assert parts["gathered parameters"] == 2 * draft
    assert parts["target embedding and head"] == 2 * 2 * 151936 * hidden
    assert parts["gradient of the draft's head"] == 4 * tokens * hidden


def test_what_an_engine_holds_by_hand(plans: Plans) -> None:
    engine = plans("qwen3-30b-a3b")["engine"]
    assert engine["weights"] == 61_064_245_248 // 2
    assert engine["cache"] == 4096 * 48 * 2 * 2 * 128 * 2, "of 4 key heads, 2 on each of 2 devices"
    assert engine["share"] == 40 * 10**9
    latents = plans("kimi-k2.5")["engine"]
    assert latents["cache"] == 4096 * 61 * (512 + 64) * 2, "whole on each of 8 devices"


def test_the_page_has_the_planners_figures(plans: Plans, table: ModuleType) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [table.row(recipe, plans(recipe)) for recipe in RECIPES], "run: python ci/recipes_table.py"


def test_the_guide_to_sizing_has_the_planners_figures(plans: Plans) -> None:
    page = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    plan = plans("qwen3-30b-a3b")
    assert plan["memory"]["verdict"] in page
    assert plan["engine"]["verdict"] in page
    kept = 2 * 4096 + 7 * (3 * 4096 + 2 * 4096 + 2 * 1024 + 2 * 12288)
    (activations,) = [part for part in plans("qwen3-8b")["memory"]["parts"] if part["name"] == "activations"]
    assert activations["bytes"] == 2 * 2048 * kept, "e t (2 H + K (3 H + 2 A + 2 C + 2 I))"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
