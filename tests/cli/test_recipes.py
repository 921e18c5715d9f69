"""Recipes by their names: `torchspec recipes`, and `--config NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.cli import main
from torchspec.core.config.load import load_config
from torchspec.core.config.recipes import find, shipped, title
from torchspec.core.errors import ConfigError

FLAGS = {"output": "run", "data.train": ["a.jsonl"], "target.path": "target"}


def test_every_recipe_is_listed_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, file in shipped().items():
        assert title(file)
        assert any(line.split() == [name, *title(file).split()] for line in listed.splitlines()), name
    assert {"qwen3-8b", "eagle3", "full", "quickstart"} <= set(shipped())


def test_no_name_is_of_two_recipes() -> None:
    assert len(shipped()) == sum(len(shipped(kind)) for kind in ("targets", "algorithms", ""))


def test_a_recipe_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "qwen3-8b"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert (tmp_path / "mine.yaml").read_bytes() == shipped()["qwen3-8b"].read_bytes()
    config, sources = load_config(file=tmp_path / "mine.yaml", flags=FLAGS, probe=False)
    named, _ = load_config(file=Path("qwen3-8b"), flags=FLAGS, probe=False)
    assert named.model_dump() == config.model_dump()
    assert sources["device_gb"].startswith("mine.yaml:")


@pytest.mark.parametrize("words", [("recipes", "qwen3-8"), ("train", "--config", "qwen3-8", "--output", "x")])
def test_a_name_that_there_is_not(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "qwen3-8b" in said
    assert "llama-3.3-70b" in said
    assert "did you mean" in said
    assert "target.path" not in said, "what the recipe would have said is not missing"


def test_a_file_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(Path("qwen3-8b")) == shipped()["qwen3-8b"]
    (tmp_path / "qwen3-8b").write_text("seed: 7\n")
    assert find(Path("qwen3-8b")) == Path("qwen3-8b")
    assert load_config(file=Path("qwen3-8b"), flags=FLAGS, probe=False)[0].seed == 7


@pytest.mark.parametrize("name", ["gone.yaml", "recipes/gone"])
def test_what_looks_like_a_file_is_one(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file=Path(name), flags=FLAGS, probe=False)
