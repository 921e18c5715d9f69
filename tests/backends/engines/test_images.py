"""What an engine hands out where images stand is what transformers computes, and so is what it writes behind them.

Images are of sizes that processors leave as they are: where one has to be resized, the engine's environment may do that
with another library than this one, and pixels differ by a rounding.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from torchspec.backends.api import (
    CaptureRequest,
    EngineOptions,
    Features,
    ImageReference,
    Quarantined,
    RecordRef,
    TargetEngine,
    TargetError,
)
from torchspec.backends.remote.environments import find
from torchspec.core import registry
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.images import refer_to_image
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_processor import TargetProcessor

TAPS = (1, 3, 5)
LIMIT = 1e-4
"""Of the largest value."""

PIECES = {
    "vllm": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_num_seqs": 8},
    "sglang": {"chunked_prefill_size": 64, "max_running_requests": 8},
}
GEOMETRY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A family: the size of an image, and the ids that stand for it."""

    size: tuple[int, int]
    ids: tuple[int, ...]


KINDS = {
    "llava": Kind((28, 28), (3, 3, 3, 3)),
    "gemma3": Kind((28, 28), (3, 4, 4, 4, 4, 5)),
    "qwen_vl": Kind((84, 56), (5, 3, 3, 3, 3, 3, 3, 6)),
}
TAKEN = [("vllm", "llava"), ("vllm", "qwen_vl")]
REFUSED = [("vllm", "gemma3"), ("sglang", "gemma3"), ("sglang", "llava"), ("sglang", "qwen_vl")]
"""SGLang on a CPU leaves the images of Gemma-3 and Qwen2.5-VL out; the classes of the others hand out no layers."""


def needed(engine: str, name: str, config: pytest.Config) -> None:
    """Skips where the engine is not there, or has no library for the images of its targets."""
    environment = find(engine, "cpu")
    if environment is None:
        if engine in (config.getoption("--engines") or "").split(","):
            pytest.fail(f"no environment of {engine}")
        pytest.skip(f"no environment of {engine}")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is None)"
    if subprocess.run([environment.python, "-P", "-c", code], check=False).returncode:
        pytest.skip(f"no torchvision in {environment.path}, which {engine} needs for {name}")


@pytest.fixture(scope="module")
def target_of(image_targets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        directory: Path = getattr(image_targets, f"save_{name}")(tmp_path_factory.mktemp("shown") / name, GEOMETRY)
        return directory

    return save


@pytest.fixture(scope="module", params=TAKEN, ids="-".join)
def engines(
    request: pytest.FixtureRequest,
    target_of: Callable[[str], Path],
    options: Callable[..., EngineOptions],
    image_targets: ModuleType,
) -> Iterator[SimpleNamespace]:
    """A target in an engine that reads it in small pieces and keeps prefixes where it can, and in transformers."""
    name, kind = request.param
    needed(name, kind, request.config)
    target = target_of(kind)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "qwen_vl":
            processor = image_targets.QwenProcessor(3)
            patch.setattr(TargetProcessor, "load", lambda path, **more: TargetProcessor(path, processor))
        truth = registry.load_engine("hf", options(target, taps=TAPS))
        engine = registry.load_engine(name, replace(options(target, taps=TAPS, options=PIECES[name]), images=True))
        yield SimpleNamespace(engine=engine, truth=truth, target=target, kind=KINDS[kind])
        engine.close()
        truth.close()


@pytest.fixture
def images(engines: SimpleNamespace, image_targets: ModuleType, tmp_path: Path) -> tuple[ImageReference, ...]:
    """Two of one size, so that the same tokens stand for them."""
    return tuple(
        refer_to_image(str(image_targets.picture(tmp_path / f"{seed}.png", seed, engines.kind.size)))
        for seed in range(2)
    )


def samples(kind: Kind, images: tuple[ImageReference, ...]) -> list[CaptureRequest]:
    """Texts, one image, several, side by side, at pieces' borders; and the same tokens with other images."""
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> list[int]:
        return [int(token) for token in torch.randint(20, 300, (count,), generator=generator)]

    first, second = images
    both = [*text(3), *kind.ids, *text(57), *kind.ids, *text(40)]
    long = [*text(61), *kind.ids, *text(80)]
    found = [(text(100), ()), (both, (first, second)), (both, (second, first)), (both, (first, first))]
    found += [(text(9), ()), (long, (first,)), (long, (second,)), ([*kind.ids, *kind.ids, *text(5)], (first, second))]
    return [CaptureRequest(record_id=str(n), input_ids=ids, images=shown) for n, (ids, shown) in enumerate(found)]


def capture(engine: TargetEngine, batch: list[CaptureRequest]) -> list[Features]:
    store = MemoryStore()
    found = engine.capture(batch, TAPS, store)
    assert all(isinstance(each, RecordRef) for each in found), found
    return [take(store, each) for each in found if isinstance(each, RecordRef)]


def test_features_of_images_and_texts(engines: SimpleNamespace, images: tuple[ImageReference, ...]) -> None:
    """Twice: the second time an engine that keeps prefixes has all of them, of each image its own."""
    batch = samples(engines.kind, images)
    expected = capture(engines.truth, batch)
    assert float((expected[1].last_TH - expected[2].last_TH).abs().max()) > 0.1
    head = load_target_head(engines.target, dtype=torch.float32, device=torch.device("cpu"))
    for _ in range(2):
        for request, ours, theirs in zip(batch, expected, capture(engines.engine, batch), strict=True):
            assert theirs.input_ids_T.tolist() == request.input_ids
            largest = float(ours.taps_TNH.abs().max())
            assert float((theirs.taps_TNH - ours.taps_TNH).abs().max()) < LIMIT * largest
            normed, wanted = (head.normed(each.last_TH, each.norm_state) for each in (theirs, ours))
            assert float((normed - wanted).abs().max()) < LIMIT * float(wanted.abs().max())


def test_text_behind_images(engines: SimpleNamespace, images: tuple[ImageReference, ...]) -> None:
    """Greedy, of prompts with images and without in one request."""
    batch = samples(engines.kind, images)
    prompts, shown = [each.input_ids for each in batch], [each.images for each in batch]
    written = engines.engine.generate(prompts, max_new_tokens=6, images=shown)
    assert written == engines.truth.generate(prompts, max_new_tokens=6, images=shown)


def test_bad_images_are_out_alone(
    engines: SimpleNamespace, images: tuple[ImageReference, ...], image_targets: ModuleType, tmp_path: Path
) -> None:
    kind = engines.kind
    ids = [30, *kind.ids, 31]
    changed = refer_to_image(str(image_targets.picture(tmp_path / "c.png", 7, kind.size)))
    image_targets.picture(tmp_path / "c.png", 8, kind.size)
    batch = {"changed": (ids, (changed,)), "short": (ids, images), "long": ([*ids, *kind.ids], images[:1])}
    batch |= {"good": (ids, images[:1])}
    found = engines.engine.capture(
        [CaptureRequest(record_id=name, input_ids=some, images=shown) for name, (some, shown) in batch.items()],
        TAPS,
        MemoryStore(),
    )
    assert isinstance(found[-1], RecordRef)
    reasons = [each.reason for each in found if isinstance(each, Quarantined)]
    assert len(reasons) == 3
    assert "another one than when it was tokenised" in reasons[0]
    assert all("another processor than that of" in reason for reason in reasons[1:])


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_an_engine_does_not_take_is_refused_when_it_starts(
    request: pytest.FixtureRequest,
    name: str,
    kind: str,
    target_of: Callable[[str], Path],
    options: Callable[..., EngineOptions],
) -> None:
    needed(name, kind, request.config)
    with pytest.raises(TargetError):
        registry.load_engine(name, replace(options(target_of(kind), taps=TAPS), images=True))


def test_what_sglang_is_handed_is_in_its_source() -> None:
    """The call that the runner's tests make by hand, against the version that is installed."""
    environment = find("sglang", "cpu")
    if environment is None:
        pytest.skip("no environment of sglang")
    (source,) = environment.path.glob("lib/python*/site-packages/sglang/srt")
    tree = ast.parse((source / "entrypoints" / "engine.py").read_text())
    (call,) = (
        each for each in ast.walk(tree) if isinstance(each, ast.AsyncFunctionDef) and each.name == "async_generate"
    )
    names = {argument.arg for argument in call.args.args + call.args.kwonlyargs}
    assert {"input_ids", "rid", "sampling_params", "return_hidden_states", "image_data"} <= names
    assert '"processor_output"' in (source / "multimodal" / "processors" / "base_processor.py").read_text()
    assert "origin_input_ids_unpadded" in (source / "managers" / "schedule_batch.py").read_text()
