"""Conversations with images: where those are found, which tokens stand for them, and what is supervised."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from torchspec.core.data.chat import Renderer
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset, load_prompts
from torchspec.core.data.messages import RowError
from torchspec.core.data.rows import parse_row
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.errors import DataError
from torchspec.core.models.images import ImageError, open_image, refer_to_image

Load = Callable[..., TokenDataset]


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 90), size: tuple[int, int] = (40, 31)) -> Path:
    image = Image.new("RGB", size, colour)
    image.putpixel((3, 4), (0, 255, 0))
    image.save(path)
    return path


def as_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The rows as a dataset for a target; images beside the data file."""

    def load(target: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> TokenDataset:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = DatasetSettings(cache_dir=tmp_path / "cache", **settings)
        return load_dataset([file], load_tokenizer(target), chosen)

    return load


def conversation(*images: str, question: str = "what is it", answer: str = "the fox") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content = [{"type": "text", "text": "look "}, *parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("name", ["tiny_llava", "tiny_gemma3"])
def test_tokens_are_the_processors_own_and_the_answer_is_supervised(
    name: str, request: pytest.FixtureRequest, load: Load, tmp_path: Path
) -> None:
    target = request.getfixturevalue(name)
    picture(tmp_path / "a.png")
    other = picture(tmp_path / "b.png", (1, 2, 3), (17, 60))
    row = conversation("a.png", as_uri(other))
    sample = load(target, [row])[0]

    processor = AutoProcessor.from_pretrained(target)
    shown = [{"type": "text", "text": "look "}, {"type": "image"}, {"type": "image"}]
    answer: Any = [{"type": "text", "text": "the fox"}] if name == "tiny_llava" else "the fox"
    chat = [
        {"role": "user", "content": [*shown, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": answer},
    ]
    text = processor.apply_chat_template(chat)
    pictures = [Image.open(tmp_path / file).convert("RGB") for file in ("a.png", "b.png")]
    expected = processor(text=[text], images=pictures, add_special_tokens=False)["input_ids"][0]
    assert sample.input_ids_T.tolist() == list(expected)

    tokenizer = load_tokenizer(target)
    said = sample.input_ids_T[sample.loss_mask_T].tolist()
    assert tokenizer.decode(said) == "the fox<|im_end|>"
    kinds_T = torch.tensor(processor.create_mm_token_type_ids([list(expected)]))[0]
    assert int((kinds_T == 1).sum()) == 8
    assert not sample.loss_mask_T[kinds_T == 1].any()
    assert [image.source for image in sample.images] == [str(tmp_path / "a.png"), as_uri(other)]


def test_text_alone_is_as_ever(tiny_llava: Path, load: Load) -> None:
    """The template loses a content that is text, so it is given one of parts."""
    row = {"messages": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "the fox"}]}
    dataset = load(tiny_llava, [row])
    tokenizer = load_tokenizer(tiny_llava)
    sample = dataset[0]
    text = "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>\n"
    assert tokenizer.decode(sample.input_ids_T) == text
    assert tokenizer.decode(sample.input_ids_T[sample.loss_mask_T]) == "the fox<|im_end|>"
    assert (sample.images, dataset.with_images) == ((), None)


def test_the_cache_keeps_each_samples_images(tiny_llava: Path, load: Load, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (9, 9, 9))
    plain = {"id": "plain", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [plain, {"id": "one", **conversation("a.png")}, plain, {"id": "two", **conversation("b.png", "a.png")}]
    for _ in range(2):  # the second time from the cache
        dataset = load(tiny_llava, rows)
        found = [[Path(image.source).name for image in dataset[index].images] for index in range(4)]
        assert found == [[], ["a.png"], [], ["b.png", "a.png"]]
        assert dataset.with_images == "one"


def test_images_are_never_cut(tiny_llava: Path, load: Load, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = conversation("a.png", answer="the fox " * 30)
    whole = load(tiny_llava, [row])[0]
    said = int(whole.loss_mask_T.nonzero().min())
    cut = load(tiny_llava, [row], max_length=said + 5)
    assert (cut.report.kept, cut.report.truncated) == (1, 1)
    assert cut[0].images == whole.images
    image_end = int((whole.input_ids_T == 3).nonzero().max()) + 1
    assert load(tiny_llava, [row], max_length=image_end, min_supervised_tokens=0).report.kept == 1
    with pytest.raises(DataError, match="1 with fewer"):
        load(tiny_llava, [row], max_length=image_end - 1, min_supervised_tokens=0)


def reason(row: dict[str, Any], target: Path, tmp_path: Path) -> str:
    with pytest.raises(RowError) as caught:
        Renderer(load_tokenizer(target)).prepare(parse_row(row, tmp_path / "data.jsonl", 1))
    return str(caught.value)


def test_images_that_cannot_be_used_make_a_row_bad(tiny_llava: Path, tiny_target: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    assert "nowhere.png cannot be read: No such file" in reason(conversation("nowhere.png"), tiny_llava, tmp_path)
    assert "text.png cannot be read as an image" in reason(conversation("text.png"), tiny_llava, tmp_path)
    assert "no data: URI that can be read" in reason(conversation("data:image/png;base64,%%"), tiny_llava, tmp_path)
    assert "the target takes none" in reason(conversation("a.png"), tiny_target, tmp_path)
    # A question that spells the placeholder would have the images put in the wrong places.
    spelled = conversation("a.png", question="an <image> token")
    assert "image" in reason(spelled, tiny_llava, tmp_path)


@pytest.mark.parametrize("name", ["tiny_llava", "tiny_gemma3"])
def test_a_prompt_is_the_processors_own(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    target = request.getfixturevalue(name)
    file, path = tmp_path / "data.jsonl", picture(tmp_path / "a.png")
    file.write_text(json.dumps(conversation("a.png")))
    tokenizer, settings = load_tokenizer(target), DatasetSettings(cache_dir=tmp_path / "cache")
    (prompt,) = load_prompts([file], tokenizer, settings, images=True)

    processor = AutoProcessor.from_pretrained(target)
    content = [{"type": "text", "text": "look "}, {"type": "image"}, {"type": "text", "text": "what is it"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(path) as opened:
        expected = processor(text=[text], images=[opened.convert("RGB")], add_special_tokens=False)["input_ids"][0]
    assert list(prompt.input_ids) == list(expected)
    assert [image.source for image in prompt.images] == [str(path)]
    # Who answers text alone gets no prompt without the image that it is about.
    with pytest.raises(DataError, match="what answers here takes text alone"):
        load_prompts([file], tokenizer, settings)


def test_token_rows_say_which_images_stand_among_them(tiny_llava: Path, load: Load, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    row = {"input_ids": [9, 3, 3, 3, 3, 8, 7], "loss_mask": [0, 0, 0, 0, 0, 0, 1], "images": ["a.png"]}
    sample = load(tiny_llava, [row])[0]
    assert [image.source for image in sample.images] == [str(path)]
    assert sample.input_ids_T.tolist() == row["input_ids"]
    with pytest.raises(DataError, match="can be used"):  # never cut within an image
        load(tiny_llava, [{**row, "loss_mask": [1, 0, 0, 0, 0, 0, 0]}], max_length=4)
    for wrong, said in (
        ({"images": "a.png"}, "a list of paths"),
        ({"images": ["b.png"]}, "cannot be read"),
        ({"images": ["http://x/a.png"]}, "have to be fetched"),
        ({"images": ["a.png", "a.png"]}, "2 images take 8 tokens, the sample has 4"),
        ({"images": ["a.png"], "loss_mask": [0, 1, 0, 0, 0, 0, 0]}, ""),
    ):
        if said:
            with pytest.raises(DataError, match=said):
                load(tiny_llava, [{**row, **wrong}])
        else:
            file = tmp_path / "data.jsonl"
            file.write_text(json.dumps({**row, **wrong}))
            with pytest.raises(DataError, match="among or behind the supervised"):
                load_prompts([file], load_tokenizer(tiny_llava), DatasetSettings(), images=True)


def test_an_image_that_changed_is_not_opened(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    reference = refer_to_image(str(path))
    assert open_image(reference).size == (40, 31)
    picture(path, (1, 1, 1))
    with pytest.raises(ImageError, match=r"a\.png is another one than when it was tokenised"):
        open_image(reference)


def test_template_that_only_the_processor_knows(tiny_llava: Path, tmp_path: Path) -> None:
    """Older checkpoints keep it in chat_template.json."""
    target = tmp_path / "old"
    shutil.copytree(tiny_llava, target)
    template = load_tokenizer(tiny_llava).chat_template
    for file in target.glob("chat_template*"):
        file.unlink()
    assert load_tokenizer(target).chat_template is None
    (target / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(target).chat_template == template
