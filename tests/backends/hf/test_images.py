"""Features of conversations with images, against transformers' own model and processor.

Tolerance as in test_capture; without the image, or with the positions of plain text, values differ by 0.1 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig

from torchspec.backends.api import CaptureRequest, Features, ImageReference, Quarantined
from torchspec.backends.hf.engine import HfEngine
from torchspec.core.errors import DataError, TargetError
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.images import refer_to_image
from torchspec.core.models.target_processor import TargetProcessor

ATOL = 2e-5
TAPS = (0, 5)


@pytest.fixture
def images(tmp_path: Path, image_targets: ModuleType) -> tuple[ImageReference, ImageReference]:
    picture = image_targets.picture
    first, second = picture(tmp_path / "a.png", 0), picture(tmp_path / "b.png", 1, (84, 56))
    return refer_to_image(str(first)), refer_to_image(str(second))


def captured(engine: HfEngine, batch: list[CaptureRequest], taps: tuple[int, ...] = TAPS) -> list[Features]:
    sink = MemoryStore()
    found = engine.capture(batch, taps, sink)
    return [take(sink, ref) for ref in found]  # type: ignore[arg-type]


def compare(features: Features, hidden: tuple[Tensor, ...], taps: tuple[int, ...] = TAPS) -> None:
    for column, tap in enumerate(taps):
        torch.testing.assert_close(features.taps_TNH[:, column], hidden[tap + 1][0], atol=ATOL, rtol=0)
    torch.testing.assert_close(features.last_TH, hidden[-1][0], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("name", "place"), [("tiny_llava", "<image>"), ("tiny_gemma3", "<start_of_image>")])
def test_features_at_images_and_text(
    name: str,
    place: str,
    request: pytest.FixtureRequest,
    load_hf: Callable[..., HfEngine],
    images: tuple[ImageReference, ImageReference],
) -> None:
    """Two conversations with images and one of text between them, in one batch."""
    path = request.getfixturevalue(name)
    engine = load_hf(path)
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    batch, expected = [], []
    for number, (text, shown) in enumerate(
        ((f"the {place} fox {place} of the value", images), ("quick brown fox", ()), (f"{place} value", images[1:]))
    ):
        pictures = [Image.open(image.source).convert("RGB") for image in shown]
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**inputs, output_hidden_states=True).hidden_states)
        ids = inputs["input_ids"][0].tolist()
        batch.append(CaptureRequest(record_id=f"s{number}", input_ids=ids, images=shown))
    found = captured(engine, batch)
    for features, hidden in zip(found, expected, strict=True):
        compare(features, hidden)
    (swapped,) = captured(engine, [CaptureRequest(record_id="x", input_ids=batch[0].input_ids, images=images[::-1])])
    assert (swapped.last_TH - found[0].last_TH).abs().max() > 0.1


def test_a_sample_whose_image_changed_is_quarantined(
    tiny_llava: Path,
    load_hf: Callable[..., HfEngine],
    images: tuple[ImageReference, ImageReference],
    image_targets: ModuleType,
) -> None:
    engine, ids = load_hf(tiny_llava), [7, 3, 3, 3, 3, 8]
    image_targets.picture(Path(images[0].source), 9)
    batch = [
        CaptureRequest(record_id="changed", input_ids=ids, images=images[:1]),
        CaptureRequest(record_id="good", input_ids=ids, images=images[1:]),
        CaptureRequest(record_id="short", input_ids=ids[2:], images=images[1:]),
    ]
    changed, good, short = engine.capture(batch, TAPS, MemoryStore())
    assert isinstance(changed, Quarantined)
    assert "another one than when it was tokenised" in changed.reason
    assert not isinstance(good, Quarantined)
    assert isinstance(short, Quarantined)
    assert "1 images take 4 tokens, the sample has 3" in short.reason


def test_a_target_of_text_refuses(qwen3: HfEngine, images: tuple[ImageReference, ImageReference]) -> None:
    request = CaptureRequest(record_id="s", input_ids=[1, 2], images=images[:1])
    with pytest.raises(TargetError, match="takes no images"):
        qwen3.capture([request], TAPS, MemoryStore())


@pytest.mark.parametrize(("name", "place"), [("tiny_llava", "<image>"), ("tiny_gemma3", "<start_of_image>")])
def test_decoding_behind_images(
    name: str,
    place: str,
    request: pytest.FixtureRequest,
    load_hf: Callable[..., HfEngine],
    images: tuple[ImageReference, ImageReference],
    image_targets: ModuleType,
) -> None:
    """Prefill, a step of several tokens, a rollback and a step after it, against one pass over the whole; and greedy
    text beside prompts without images."""
    path = request.getfixturevalue(name)
    engine = load_hf(path)
    processor, model = AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path).eval()
    pictures = [Image.open(image.source).convert("RGB") for image in images]
    inputs = processor(text=[f"the {place} fox {place} of the value"], images=pictures, return_tensors="pt")
    prompt, more = inputs["input_ids"][0].tolist(), [31, 32, 33, 34, 35]

    def whole(ids: list[int]) -> Tensor:
        kinds = torch.zeros(1, len(ids) - len(prompt), dtype=torch.int64)
        longer = {name: torch.cat((value, kinds), 1) for name, value in inputs.items() if name.endswith("type_ids")}
        beside = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), **{**beside, **longer}).logits[0]

    session = engine.open([prompt], TAPS, images=[images])
    torch.testing.assert_close(session.prefill.logits_BV[0], whole(prompt)[-1], atol=1e-4, rtol=0)
    stepped = session.step(torch.tensor([more[:3]])).logits_BnV[0]
    torch.testing.assert_close(stepped, whole([*prompt, *more[:3]])[-3:], atol=1e-4, rtol=0)
    session.rollback(torch.tensor([2]))
    stepped = session.step(torch.tensor([more[3:]])).logits_BnV[0]
    torch.testing.assert_close(stepped, whole([*prompt, more[0], *more[3:]])[-2:], atol=1e-4, rtol=0)

    expected = list(prompt)
    for _ in range(5):
        expected.append(int(whole(expected)[-1].argmax()))
    texts = [[7, 8, 9], prompt, [11, 12]]
    written = engine.generate(texts, max_new_tokens=5, images=[(), images, ()])
    stop = next((place + 1 for place, token in enumerate(expected[len(prompt) :]) if token == 2), 5)
    assert written[1] == expected[len(prompt) :][:stop]
    assert [written[0], written[2]] == engine.generate([texts[0], texts[2]], max_new_tokens=5)
    assert engine.generate([prompt], max_new_tokens=5, images=[images[::-1]]) != [written[1]]
    with pytest.raises(ValueError, match="decoded alone"):
        engine.open(texts, (), images=[(), images, ()])
    image_targets.picture(Path(images[0].source), 9)
    with pytest.raises(DataError, match="another one than when it was tokenised"):
        engine.open([prompt], (), images=[images])


@pytest.fixture
def qwen_vl(
    tmp_path: Path, load_hf: Callable[..., HfEngine], monkeypatch: pytest.MonkeyPatch, image_targets: ModuleType
) -> tuple[HfEngine, Any]:
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=290, video_token_id=291)
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "qwen_vl")
    processor = image_targets.QwenProcessor(290)
    monkeypatch.setattr(TargetProcessor, "load", lambda path, **options: TargetProcessor(path, processor))
    return load_hf(tmp_path / "qwen_vl"), processor


def test_positions_in_three_dimensions(
    qwen_vl: tuple[HfEngine, Any], images: tuple[ImageReference, ImageReference]
) -> None:
    """An image's tokens stand at (t, row, column) behind the text before; the text behind goes on after the largest."""
    engine, processor = qwen_vl
    pixels = processor.image_processor([Image.open(images[1].source)], return_tensors="pt")
    _, rows, columns = (pixels["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    ids = [5, 6, 7, *[290] * (rows * columns), 8, 9]
    places = [(p, p, p) for p in range(3)]
    places += [(3, 3 + row, 3 + column) for row in range(rows) for column in range(columns)]
    places += [(3 + max(rows, columns) + p,) * 3 for p in range(2)]
    assert (rows, columns) == (2, 3)  # six tokens take three positions

    (features,) = captured(engine, [CaptureRequest(record_id="s", input_ids=ids, images=images[1:])])
    model = engine._target.model
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([ids]), **pixels, position_ids=torch.tensor(places).T[:, None], use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
    compare(features, output.hidden_states)

    # So do tokens decoded behind it.
    more = [10, 11, 12]
    places += [(places[-1][0] + 1 + p,) * 3 for p in range(3)]
    with torch.no_grad():
        logits_behind = model(
            input_ids=torch.tensor([[*ids, *more]]), **pixels, position_ids=torch.tensor(places).T[:, None],
            use_cache=False,
        ).logits[0]  # fmt: skip
    behind = engine.open([ids], TAPS, images=[images[1:]])
    torch.testing.assert_close(
        behind.step(torch.tensor([more[:2]])).logits_BnV[0], logits_behind[-3:-1], atol=1e-4, rtol=0
    )
    # What the model remembers of that image is not for the text that is decoded next, nor this one for that.
    text = list(range(20, 31))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([text]), position_ids=torch.arange(11)[None], use_cache=False
        ).logits[0]  # fmt: skip
    session = engine.open([text[:6]], TAPS)
    torch.testing.assert_close(session.prefill.logits_BV[0], logits[5], atol=1e-4, rtol=0)
    torch.testing.assert_close(session.step(torch.tensor([text[6:]])).logits_BnV[0], logits[6:], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        behind.step(torch.tensor([more[2:]])).logits_BnV[0], logits_behind[-1:], atol=1e-4, rtol=0
    )
