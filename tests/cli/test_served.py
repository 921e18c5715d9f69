"""In which layout `eval --engine` hands a run's draft to an engine."""

from __future__ import annotations

import pytest

from torchspec.cli.served import _layout


@pytest.mark.parametrize(
    ("engine", "layouts", "expected"),
    [
        ("vllm", ("plain", "speculators"), "speculators"),
        ("vllm", ("plain",), "plain"),  # heads of a target, Domino
        ("sglang", ("plain", "speculators"), "plain"),
        ("sglang", ("speculators",), "plain"),  # which the export refuses, saying why
        ("mine", ("speculators",), "speculators"),
    ],
)
def test_the_engines_own_layout_or_the_one_that_all_read(engine: str, layouts: tuple[str, ...], expected: str) -> None:
    assert _layout(engine, layouts) == expected
