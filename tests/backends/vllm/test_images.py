"""Where images stand in ids that have them already. Real vLLM: tests/backends/engines/test_images.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from torchspec.backends.vllm.worker.arguments import engine_arguments
from torchspec.backends.vllm.worker.images import ids_of, prompt_with_images
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import ImageReference
from torchspec.core.models.images import ImageError, refer_to_image
from torchspec.core.workers.runner import WorkerSettings

PAD, BREAK, BEGIN, END, NEWLINE = 3, 4, 5, 6, 7


@dataclass(frozen=True)
class Range:
    """vLLM's PlaceholderRange."""

    offset: int
    length: int
    is_embed: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """What a family makes of an image of `size` tokens, and which of that are embeddings (None: all)."""

    made: Callable[[int], list[int]]
    embeddings: tuple[int, ...] | None


PLAIN = Kind(lambda size: [PAD] * size, None)
FRAMED = Kind(lambda size: [NEWLINE, BEGIN, *[PAD] * size, END, NEWLINE], (PAD,))  # as Gemma-3's
IN_ROWS = Kind(lambda size: [*[PAD] * (size // 2), BREAK, *[PAD] * (size - size // 2), END], (PAD,))  # as Pixtral's
MIXED = Kind(lambda size: [*[PAD] * size, BREAK], None)  # what breaks rows is embedded, too, and stands in texts


class Renderer:
    """Of `LLMEngine`: images are as many tokens as they are wide."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.prompts: list[Any] = []

    def get_mm_processor(self) -> Any:
        tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [PAD] * text.count("<image>"))
        return SimpleNamespace(
            dummy_inputs=SimpleNamespace(get_dummy_text=lambda counts: "<image>" * counts["image"]),
            info=SimpleNamespace(get_tokenizer=lambda: tokenizer),
        )

    def render_cmpl(self, prompts: list[Any], *, skip_mm_cache: bool) -> list[Any]:
        assert skip_mm_cache
        (prompt,) = prompts
        self.prompts.append(prompt)
        ids: list[int] = []
        ranges = []
        assert prompt["prompt_token_ids"] == [PAD] * len(prompt["multi_modal_data"]["image"])
        for image in prompt["multi_modal_data"]["image"]:
            tokens, embeddings = self.kind.made(image.width), self.kind.embeddings
            is_embed = None if embeddings is None else torch.tensor([token in embeddings for token in tokens])
            ranges.append(Range(len(ids), len(tokens), is_embed))
            ids += tokens
        widths = [image.width for image in prompt["multi_modal_data"]["image"]]
        made = {"prompt_token_ids": ids, "mm_kwargs": {"image": widths}, "mm_hashes": prompt["multi_modal_uuids"]}
        return [{**made, "mm_placeholders": {"image": ranges}}]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    module.TokensPrompt = dict  # type: ignore[attr-defined]

    def mm_input(ids: list[int], mm_kwargs: Any, mm_hashes: Any, mm_placeholders: Any) -> dict[str, Any]:
        return {"ids": ids, "kwargs": mm_kwargs, "hashes": mm_hashes, "places": mm_placeholders["image"]}

    inputs.mm_input = mm_input  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)


@pytest.fixture
def images(tmp_path: Path) -> tuple[ImageReference, ...]:
    found = []
    for width in (4, 6):
        Image.new("RGB", (width, 2), (width, 0, 0)).save(tmp_path / f"{width}.png")
        found.append(refer_to_image(str(tmp_path / f"{width}.png")))
    return tuple(found)


def places(kind: Kind, ids: list[int], images: tuple[ImageReference, ...]) -> tuple[dict[str, Any], list[list[int]]]:
    """The prompt, and the ids at which the embeddings of each image will be put."""
    engine = SimpleNamespace(renderer=Renderer(kind))
    prompt = prompt_with_images(engine, ids, images)
    assert prompt["ids"] == ids
    assert prompt["hashes"] == {"image": [image.digest for image in images]}
    assert prompt["kwargs"] == {"image": [4, 6][: len(images)]}
    at = []
    for each in prompt["places"]:
        here = torch.ones(each.length, dtype=torch.bool) if each.is_embed is None else each.is_embed
        at.append((each.offset + here.nonzero().flatten()).tolist())
    return prompt, at


def test_each_image_is_where_its_tokens_are(images: tuple[ImageReference, ...]) -> None:
    assert places(PLAIN, [9, *[3] * 4, 9, *[3] * 6, 9], images)[1] == [[1, 2, 3, 4], list(range(6, 12))]
    assert places(PLAIN, [*[3] * 10, 9], images)[1] == [[0, 1, 2, 3], list(range(4, 10))]
    rows = [9, 3, 3, 4, 3, 3, 6, 9, 9, 3, 3, 3, 4, 3, 3, 3, 6]
    assert places(IN_ROWS, rows, images)[1] == [[1, 2, 4, 5], [9, 10, 11, 13, 14, 15]]
    assert places(MIXED, [4, 9, *[3] * 4, 4, 4, *[3] * 6, 4], images)[1] == [[2, 3, 4, 5, 6], list(range(8, 15))]


def test_text_around_an_image_may_be_tokenised_with_its_neighbours(images: tuple[ImageReference, ...]) -> None:
    """Two newlines on either side of a border may be one token."""
    for newline in (NEWLINE, 99):
        ids = [8, newline, BEGIN, *[3] * 4, END, newline, BEGIN, *[3] * 6, END, newline]
        assert places(FRAMED, ids, images)[1] == [[3, 4, 5, 6], list(range(10, 16))]


@pytest.mark.parametrize("ids", [[9, 3, 3, 3, 9], [*[3] * 4, 9, *[3] * 5], [*[3] * 6, 9, *[3] * 4], [*[3] * 11], [9]])
def test_other_numbers_of_tokens_are_refused(ids: list[int], images: tuple[ImageReference, ...]) -> None:
    with pytest.raises(TargetError, match="tokenised by another processor than that of this target"):
        places(PLAIN, ids, images)


def test_an_image_that_changed_does_not_reach_vllm(images: tuple[ImageReference, ...]) -> None:
    Image.new("RGB", (4, 2)).save(images[0].source)
    with pytest.raises(ImageError, match="another one than when it was tokenised"):
        places(PLAIN, [3] * 10, images)


def test_an_example_has_the_ids_of_vllm_itself(images: tuple[ImageReference, ...]) -> None:
    assert ids_of(SimpleNamespace(renderer=Renderer(FRAMED)), images[0]) == [NEWLINE, BEGIN, 3, 3, 3, 3, END, NEWLINE]


def test_targets_with_a_processor_have_their_tokenizer_and_no_room_for_videos(tiny_llava: Path) -> None:
    settings = WorkerSettings(target=tiny_llava, device="cpu", dtype="float32")
    found = engine_arguments(settings, 8, 512)
    assert not found["skip_tokenizer_init"]
    assert found["limit_mm_per_prompt"] == {"video": 0, "audio": 0}
