"""`--objective`: named terms of the loss and their weights."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from torchspec.cli import main
from torchspec.cli.commands.train import bare_parser, read_terms
from torchspec.core.errors import Problem


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("lk_lambda", {"lk_lambda": 1.0}),
        ("kl=0.5,tv=0.5", {"kl": 0.5, "tv": 0.5}),
        ("kl, tv = 5e-1", {"kl": 1.0, "tv": 0.5}),
        ("kl=much", {"kl": "much"}),
    ],
)
def test_terms_weigh_one_unless_told(text: str, terms: dict[str, Any]) -> None:
    problems: list[Problem] = []
    assert read_terms(text, problems) == terms
    assert not problems


@pytest.mark.parametrize("text", ["", "kl,", "=1", "kl=", "kl=[", "kl={start: 0", "kl=null"])
def test_what_is_no_term_is_said(text: str) -> None:
    problems: list[Problem] = []
    read_terms(text, problems)
    assert [problem.field for problem in problems] == ["--objective"]
    assert problems[0].message == "not TERM or TERM=WEIGHT"


def test_a_term_is_given_once() -> None:
    problems: list[Problem] = []
    read_terms("kl=1,tv,kl=2", problems)
    assert [(problem.message, problem.value) for problem in problems] == [("given twice", "kl")]


@pytest.mark.parametrize("words", [["--objective", "kl=0.5,tv"], ["--objective=kl=0.5,tv"]])
def test_the_option_takes_one_word(words: list[str]) -> None:
    values, loose, problems = bare_parser().split([*words, "train.lr=1"])
    assert (values["draft.objective"], loose, problems) == ("kl=0.5,tv", ["train.lr=1"], [])


def answer(*words: str, code: int) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(list(words)) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_unknown_terms_and_bad_weights_come_with_the_terms_there_are(tmp_path: Path) -> None:
    words = ("train", "--target", "embedded", "--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "o"))
    said = answer(*words, "--device", "cpu", "--objective", "lk_lamda,kl=-1,tv=", code=2)[1]
    for part in (
        "draft.objective: no such entry (command line) (got 'lk_lamda')",
        "choices: cross_entropy, kl, reverse_kl, jsd, tv, lk_alpha, lk_lambda, argmax, ground_truth",
        "did you mean lk_lambda?",
        "draft.objective.kl: must be a number > 0 or {start",
        "--objective: not TERM or TERM=WEIGHT (got 'tv=')",
        "none.jsonl",  # with everything else that is wrong
    ):
        assert part in said
    assert "Traceback" not in said


def test_the_plan_shows_the_terms_in_the_place_of_the_default(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "train.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the fox"}]}\n')
    words = ("train", "--dry-run", "--target", str(tiny_target), "--data", str(data), "--output", str(tmp_path / "o"))
    ramp = ("draft.objective.tv.start=0", "draft.objective.tv.end=1")
    shown = answer(*words, "--device", "cpu", "--objective", "lk_lambda,kl=0.5", *ramp, code=0)[0]
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["draft.objective"])
    assert "{'lk_lambda': 1.0, 'kl': 0.5, 'tv': {'start': 0.0, 'end': 1.0, 'until': 1.0}}" in line
    assert "command line" in line
