"""A target with a trained head in it: one file or shards, with an older head or without; what can be a link is one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec.backends.api import EngineOptions
from torchspec.backends.remote import heads
from torchspec.backends.remote.heads import is_head, target_with_head
from torchspec.backends.remote.spec import Engine
from torchspec.core import registry
from torchspec.core.errors import TargetError
from torchspec.core.workers import starting

PREFIX = "model.mtp_layers.0."
OURS = {"torchspec": {"algorithm": "mtp"}, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}


def tensors(*names: str, value: float) -> dict[str, Tensor]:
    return {name: torch.full((2,), value) for name in names}


def written(place: Path, config: dict[str, object], **files: dict[str, Tensor]) -> Path:
    """A directory of these safetensors files, with an index where they are several."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer.json").write_text("{}")
    names = {"model": "model.safetensors"} | {key: f"model-{key}.safetensors" for key in files if key != "model"}
    for key, held in files.items():
        save_file(held, place / names[key])
    if "model" not in files:
        weights = {name: names[key] for key, held in files.items() for name in held}
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return place


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return written(tmp_path / "head", OURS, model=tensors(f"{PREFIX}norm.weight", f"{PREFIX}fc.weight", value=5.0))


def served(directory: Path) -> dict[str, float]:
    """What an engine ends up with: every tensor of every file that the index names, in the files' order."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, float] = {}
    for file in sorted(set(index.values())):
        for name, tensor in load_file(directory / file).items():
            assert index[name] == file
            assert name not in found, "a tensor may be in one file alone"
            found[name] = float(tensor[0])
    assert found.keys() == index.keys()
    return found


def test_one_file_without_a_head(tmp_path: Path, head: Path) -> None:
    target = written(tmp_path / "target", {"hidden_size": 2}, model=tensors("model.embed", "lm_head", value=1.0))
    made = target_with_head(target, head, tmp_path / "made")
    assert served(made) == {"model.embed": 1, "lm_head": 1, f"{PREFIX}norm.weight": 5, f"{PREFIX}fc.weight": 5}
    config = json.loads((made / "config.json").read_text())
    assert config == {"hidden_size": 2, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    assert not (made / "model.safetensors").exists(), "readers would take it for all of the weights"
    assert all(file.is_symlink() for file in made.glob("*.safetensors")), "nothing changed in them"
    assert (made / "tokenizer.json").read_text() == "{}"


def test_shards_with_a_head_of_their_own(tmp_path: Path, head: Path) -> None:
    """The old head's tensors are nowhere any more; the shard without any of them is a link."""
    target = written(
        tmp_path / "target",
        {"num_nextn_predict_layers": 1},
        a=tensors("model.embed", value=1.0),
        b=tensors("lm_head", f"{PREFIX}norm.weight", value=2.0),
        c=tensors(f"{PREFIX}fc.weight", value=3.0),
    )
    made = target_with_head(target, head, tmp_path / "made")
    assert served(made) == {"model.embed": 1, "lm_head": 2, f"{PREFIX}norm.weight": 5, f"{PREFIX}fc.weight": 5}
    assert (made / "model-a.safetensors").is_symlink()
    assert not (made / "model-b.safetensors").is_symlink()
    assert not (made / "model-c.safetensors").exists()
    assert set(load_file(target / "model-b.safetensors")) == {"lm_head", f"{PREFIX}norm.weight"}, (
        "the target is as it was"
    )


def test_what_is_a_head(tmp_path: Path, head: Path) -> None:
    assert is_head(head)
    for number, config in enumerate(
        ({"architectures": ["LlamaForCausalLMEagle3"]}, {"torchspec": {"tap_layers": [1]}})
    ):
        assert not is_head(written(tmp_path / str(number), config, model={}))
    assert not is_head(tmp_path / "nothing")


def test_a_target_without_weights_is_an_error(tmp_path: Path, head: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError):
        target_with_head(tmp_path / "empty", head, tmp_path / "made")


@pytest.mark.parametrize("starts", [True, False])
def test_an_engine_is_given_the_target_with_the_head(
    tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    """As its target and as its draft, in a folder that goes with the engine, or that is gone if it doesn't start."""
    target = written(tmp_path / "target", {}, model=tensors("model.embed", value=1.0))
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
    given: list[tuple[Path, Path | None]] = []
    closed: list[bool] = []

    def start(_: Any, options: EngineOptions, draft: Path | None, length: int) -> Any:
        assert length == 2
        given.append((options.target, draft))
        assert served(options.target)[f"{PREFIX}fc.weight"] == 5
        if not starts:
            raise TargetError("it cannot start")
        return SimpleNamespace(close=lambda: closed.append(options.target.exists()))

    monkeypatch.setattr(starting, "start", start)
    monkeypatch.setattr(starting, "attach", lambda name, options, stop, draft: SimpleNamespace(close=stop))
    monkeypatch.setattr(Engine, "_program", lambda self, options: None)
    engine = Engine(name="mine", module="my_engine", runner="my_package.worker")
    options = EngineOptions(target=target, device=registry.load_device("cpu"), directory=tmp_path)
    if starts:
        engine.serve(options, head, 2).close()
        assert closed == [True], "the engine goes before what it reads"
    else:
        with pytest.raises(TargetError, match="cannot start"):
            engine.serve(options, head, 2)
    ((as_target, as_draft),) = given
    assert as_target == as_draft == as_target.resolve()
    assert not as_target.parent.exists()


def test_other_drafts_are_given_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = written(tmp_path / "draft", {"architectures": ["LlamaForCausalLMEagle3"]}, model={})
    given: list[tuple[Path, Path | None]] = []
    monkeypatch.setattr(starting, "start", lambda _, options, draft, __: given.append((options.target, draft)))
    monkeypatch.setattr(starting, "attach", lambda *_: None)
    monkeypatch.setattr(Engine, "_program", lambda self, options: None)
    options = EngineOptions(target=tmp_path, device=registry.load_device("cpu"), directory=tmp_path)
    Engine(name="mine", module="my_engine", runner="my_package.worker").serve(options, draft, 2)
    assert given == [(tmp_path, draft)]


def test_what_cannot_be_read_is_an_error(tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = written(tmp_path / "target", {}, model=tensors("lm_head", f"{PREFIX}norm.weight", value=1.0))
    (target / "config.json").write_text("{")
    with pytest.raises(TargetError, match=r"target/config\.json cannot be read"):
        target_with_head(target, head, tmp_path / "made")

    def gone(*_: Any) -> Any:
        raise OSError("the disk went away")

    monkeypatch.setattr(heads, "safe_open", gone)
    with pytest.raises(TargetError, match=r"model\.safetensors cannot be read: the disk went away"):
        target_with_head(target, head, tmp_path / "again")
