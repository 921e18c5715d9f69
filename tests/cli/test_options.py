"""Options generated from a schema, and words sorted into options, settings and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from torchspec.cli.options import Parser, add_options, all_flags, is_override, read_options
from torchspec.core.config.schema import Positive, Section
from torchspec.core.errors import ConfigError


class Options(Section):
    file: Path = Field(description="a file, 100 % of it")
    files: list[Path] = Field([], description="files")
    many: list[Positive] = Field([], description="numbers")
    rate: float = Field(0.5, ge=0, description="a rate")
    kind: Literal["warm", "cold"] = Field("warm", description="a kind")
    loud: bool = Field(False, description="a switch")


@pytest.fixture
def parser() -> Parser:
    made = Parser("test", "A test.")
    add_options(made, Options, all_flags(Options))
    return made


def test_values_become_typed(parser: Parser) -> None:
    words = ["--file", "a", "--many", "1", "2", "--rate=1e-3", "--loud"]
    assert read_options(parser, Options, words) == Options(file=Path("a"), many=[1, 2], rate=1e-3, loud=True)


def test_numbers_may_be_separated_by_commas(parser: Parser) -> None:
    assert read_options(parser, Options, ["--file", "a", "--many", "1,2", "3"]).many == [1, 2, 3]


def test_help_shows_descriptions_choices_and_defaults(parser: Parser) -> None:
    text = " ".join(parser.format_help().split())
    for part in (
        "a file, 100 % of it [required]",
        "(warm | cold) [default: warm]",
        "--many N [N ...]",
        "[default: 0.5]",
    ):
        assert part in text


def test_mistakes_are_collected(parser: Parser) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(parser, Options, ["--many", "1", "x", "--rate", "-1", "--kind", "wram", "--lou", "a.b=3"])
    found = {problem.field: problem for problem in caught.value.problems}
    assert set(found) == {"--file", "--many", "--rate", "--kind", "--lou", "a.b=3"}
    assert found["--kind"].remedy == "did you mean warm?"
    assert found["--lou"].remedy == "did you mean --loud?"


@pytest.mark.parametrize("words", [["--file", ""], ["--file="], ["--file", "a", "--files", "b", ""]])
def test_an_empty_path_is_not_the_working_directory(parser: Parser, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--files?: is empty"):
        read_options(parser, Options, words)
    assert read_options(parser, Options, ["--file", "."]).file == Path()


def test_null_is_not_asked_for_on_a_command_line() -> None:
    class Nullable(Section):
        steps: Positive | None = Field(None, description="steps")

    made = Parser("test", "a test")
    add_options(made, Nullable, all_flags(Nullable))
    with pytest.raises(ConfigError, match=r"--steps: must be a whole number >= 1 \(got '0'\)"):
        read_options(made, Nullable, ["--steps", "0"])


def test_abbreviations_are_not_guessed(parser: Parser) -> None:
    with pytest.raises(ConfigError, match="--fil: no such option"):
        read_options(parser, Options, ["--fil", "a"])


def test_files_whose_names_look_like_settings_stay_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3").touch()
    assert not is_override("lr=3")
    assert is_override("train.lr=3")
    assert not is_override("runs/a=3")
    assert not is_override("--x=3")
