"""How pytest makes the checks of a conformance suite that were selected: in a process of their own, as `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from torchspec.pytest_plugin import DEVICES, NAMED

if TYPE_CHECKING:
    from torchspec.core.conformance.checks import Result

_WORDS = pytest.StashKey[dict[str, list[str]]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Look at the options, so that what is wrong with them is told once, and before a check is begun."""
    from torchspec.core.errors import TorchspecError

    config = session.config
    if config.option.collectonly:
        return
    try:
        config.stash[_WORDS] = {suite: _words(suite, config) for suite in config.stash[NAMED]}
    except TorchspecError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """`make(name)` passes, skips or fails as that check did. A module's SUITE names its suite."""
    from torchspec.cli.conformance import START_SECONDS
    from torchspec.core.conformance.apart import LOADING, run_apart

    suite = request.module.SUITE
    words = request.config.stash[_WORDS][suite]
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    checks: list[Any] = [item.callspec.params["check"] for item in items if item.module is request.module]
    made: dict[str, Result] = {}
    with closing(run_apart(suite, words, list(dict.fromkeys(checks)), start_seconds=START_SECONDS[suite])) as results:

        def tell(name: str) -> None:
            while name not in made and LOADING not in made:
                result = next(results)  # as they are made: in the order of the tests
                made[result.check] = result
            _tell(made.get(name) or made[LOADING])

        yield tell


def _tell(result: Result) -> None:
    if result.status == "SKIP":
        pytest.skip(result.text)
    if result.status == "FAIL":
        pytest.fail("\n".join(filter(None, [f"{result.check}: {result.text}", result.where])), pytrace=False)
    print(result.text)


def _words(suite: str, config: pytest.Config) -> list[str]:
    """For the process of this suite; TorchspecError where the options name nothing that can be checked here."""
    from torchspec.cli.conformance import device_words, engine_words
    from torchspec.cli.schemas import EngineFlags

    option, what = ("--device", "device") if suite == DEVICES else ("--backend", "engine")
    name, device = config.getoption(option), config.getoption("--device")
    if name is None:
        raise pytest.UsageError(f"which {what}? {option} NAME")
    if suite == DEVICES:
        return device_words(option, name)
    return engine_words(EngineFlags(backend=name, target=Path(config.getoption("--target")), device=device))
