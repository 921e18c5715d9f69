"""Images on their way to a worker: by their bytes, each with its digest; none of them is a path there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from torchspec.core.errors import DataError, TargetError
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.engine import CaptureRequest, ImageReference
from torchspec.core.interfaces.features import Quarantined, RecordRef
from torchspec.core.models.images import open_image, refer_to_image
from torchspec.core.workers import remote_engine
from torchspec.core.workers.image_proof import images_refused
from torchspec.core.workers.protocol import ProtocolError
from torchspec.core.workers.remote_engine import RemoteEngine
from torchspec.core.workers.requests import asks_of, capture_request
from torchspec.core.workers.runner import Ask, Facts, WorkerSettings, refuse_images

TAPS = (1, 3, 5)
FACTS = Facts(
    engine="other", engine_version="1", layers=6, hidden_size=4, itemsize=4, context=64, vocab_size=100,
    norm_state="post_norm", no_images=None,
)  # fmt: skip


def picture(path: Path, bright: int) -> ImageReference:
    Image.new("RGB", (3, 2), (bright, 7, 9)).save(path)
    return refer_to_image(str(path))


@pytest.fixture
def shown(tmp_path: Path) -> tuple[ImageReference, ...]:
    return picture(tmp_path / "a.png", 20), picture(tmp_path / "b.png", 30)


def test_they_arrive_as_bytes(shown: tuple[ImageReference, ...]) -> None:
    engine = object.__new__(RemoteEngine)
    engine._prefix, engine._numbers = "p", itertools.count()
    for parts in ((), (((0, 1),), ((1, 3),))):
        sent = CaptureRequest(record_id="s", input_ids=[3, 4, 5], parts=parts, part=0, images=shown)
        arrived = capture_request(json.loads(json.dumps(engine._sample(sent, 0))))
        assert (arrived.input_ids, arrived.parts) == ([3, 4, 5], parts)
        for image, before in zip(arrived.images, shown, strict=True):
            assert (image.source[:5], image.digest) == ("data:", before.digest)
            assert open_image(image).tobytes() == open_image(before).tobytes()
    assert "images" not in engine._sample(CaptureRequest(record_id="s", input_ids=[3]), 0)


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "hostname", "http://a/b.png", ""])
def test_a_worker_is_told_no_path(source: str) -> None:
    image = {"source": source, "digest": "0" * 64}
    with pytest.raises(ProtocolError, match="must be a data: URI"):
        capture_request({"id": "s", "input_ids": [3], "images": [image]})
    prompt = {"input_ids": [3], "seed": 0, "images": [image]}
    with pytest.raises(ProtocolError, match="must be a data: URI"):
        asks_of({"prompts": [prompt], "stop": [], "max_new_tokens": 1, "temperature": 0.0})
    with pytest.raises(ProtocolError, match="'digest'"):
        capture_request({"id": "s", "input_ids": [3], "images": [{"source": "data:,a"}]})


def test_texts_and_images_in_one_batch(
    start: Callable[..., RemoteEngine], fake: ModuleType, shown: tuple[ImageReference, ...], tmp_path: Path
) -> None:
    """The pixels reach the engine; what cannot be sent is out, with its reason, and takes nothing with it."""
    engine, store = start(images=True), MemoryStore()
    changed, gone = picture(tmp_path / "c.png", 40), picture(tmp_path / "d.png", 50)
    picture(tmp_path / "c.png", 41)
    (tmp_path / "d.png").unlink()
    text = tmp_path / "e.png"
    text.write_text("no image")
    batch = {"both": shown, "changed": (changed,), "text": (), "gone": (shown[0], gone), "one": shown[1:]}
    batch["broken"] = (refer_to_image(str(text)),)
    requests = [CaptureRequest(record_id=name, input_ids=[4, 5, 6], images=each) for name, each in batch.items()]
    found = dict(zip(batch, engine.capture(requests, TAPS, store), strict=True))
    for name, bright in (("both", 50), ("text", 0), ("one", 30)):
        ref = found[name]
        assert isinstance(ref, RecordRef)
        features = take(store, ref)
        assert torch.equal(
            features.last_TH, fake.features_of([4, 5, 6], TAPS, features.last_TH.shape[1], bright).last_TH
        )
    for name, reason in (
        ("changed", "another one than when"), ("gone", "cannot be read"), ("broken", "cannot be read as an image"),
    ):  # fmt: skip
        each = found[name]
        assert isinstance(each, Quarantined)
        assert reason in each.reason

    assert engine.generate([[5], [5]], max_new_tokens=2, images=[shown[:1], ()]) == [[26, 27], [6, 7]]
    with pytest.raises(DataError, match="another one than when"):
        engine.generate([[5]], max_new_tokens=2, images=[(changed,)])


def test_messages_have_a_size(
    start: Callable[..., RemoteEngine], shown: tuple[ImageReference, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples whose images do not fit together go one after the other; one that never fits is out."""
    engine, store = start(), MemoryStore()
    size = len(engine._sample(CaptureRequest(record_id="s", input_ids=[1], images=shown[:1]), 0)["images"][0]["source"])
    monkeypatch.setattr(remote_engine, "MOST_IMAGE_BYTES", int(1.5 * size))
    batch = [CaptureRequest(record_id=f"s{n}", input_ids=[n], images=shown[:1]) for n in range(1, 4)]
    assert [len(wave) for wave in engine._waves(engine._with_images(batch, {}))] == [1, 1, 1]
    batch.append(CaptureRequest(record_id="big", input_ids=[4], images=shown))
    *fine, big = engine.capture(batch, TAPS, store)
    assert all(isinstance(each, RecordRef) for each in fine)
    assert isinstance(big, Quarantined)
    assert "MB of a message" in big.reason


def test_an_engine_without_says_so_when_it_starts(start: Callable[..., RemoteEngine]) -> None:
    start(options={"no_images": "it is blind"})
    with pytest.raises(TargetError, match="takes no images of this target: it is blind"):
        start(options={"no_images": "it is blind"}, images=True)


def test_runners_refuse_what_they_said(shown: tuple[ImageReference, ...]) -> None:
    sample = CaptureRequest(record_id="s", input_ids=[1], images=shown)
    refuse_images(FACTS, [sample])
    blind = replace(FACTS, no_images="it is blind")
    refuse_images(blind, [replace(sample, images=())])
    for asked in ([sample], [Ask(input_ids=[1], max_new_tokens=1, temperature=0, seed=0, stop=(), images=shown)]):
        with pytest.raises(TargetError, match="other takes no images of this target: it is blind"):
            refuse_images(blind, asked)  # type: ignore[arg-type]


class Blind:
    """Captures through a fake, of the images themselves or of none."""

    def __init__(self, runner: object, *, sees: bool) -> None:
        self._runner, self._sees = runner, sees

    def capture(self, samples: list[CaptureRequest]) -> object:
        return self._runner.capture(  # type: ignore[attr-defined]
            samples if self._sees else [replace(each, images=()) for each in samples]
        )


def test_the_proof(fake: ModuleType, tiny_target: Path, tiny_llava: Path, tmp_path: Path) -> None:
    settings = WorkerSettings(
        target=tiny_llava, device="cpu", dtype="float32", taps=TAPS, store=tmp_path, options={"hidden": 4}
    )
    runner = fake.FakeRunner(replace(settings, target=tiny_target))

    def proved(sees: bool) -> str | None:
        return images_refused(Blind(runner, sees=sees), settings, lambda image: [3, 3, 3, 3], 10)  # type: ignore[arg-type]

    assert proved(sees=True) is None
    assert proved(sees=False) == "it gives two images of the same tokens the same hidden states"
    assert runner.store.usage().records == 0
    assert images_refused(runner, replace(settings, target=tiny_target), lambda image: [1], 10) is not None
    assert images_refused(runner, settings, lambda image: [fake.REFUSES], 10) == "hidden states that are not finite"
    assert images_refused(runner, replace(settings, taps=()), lambda image: [3], 10) is None
    runner.close()
