"""An SGLang whose hooked functions are elsewhere is refused with words, not met with an error in its scheduler."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from torchspec.backends.sglang.worker.versions import APPEND, FINISH, PARAMETERS, TESTED, check_version
from torchspec.core.errors import UnavailableError


def sglang(**changed: Callable[..., object] | None) -> Callable[[str], object]:
    """Finds a function with the expected parameters for each target, other ones for the functions named."""

    def resolve(target: str) -> object:
        name = target.rpartition(".")[2]
        if name not in changed:
            return eval(f"lambda {', '.join(PARAMETERS[target])}: None")
        if changed[name] is None:
            raise AttributeError(f"no attribute {name!r}")
        return changed[name]

    return resolve


def test_tested_versions_pass_silently() -> None:
    for version in TESTED:
        assert check_version(version, sglang()) is None


def test_another_version_that_looks_alike_warns() -> None:
    warning = check_version("9.9.9", sglang())
    assert warning is not None
    assert "9.9.9 was never tested" in warning
    assert TESTED[0] in warning


@pytest.mark.parametrize("version", [TESTED[0], "9.9.9"])
def test_moved(version: str) -> None:
    name = APPEND.rpartition(".")[2]
    complaint = rf"(?s)SGLang moved: in version {version}, .*{name} is gone.*install.*{TESTED[0]}"
    with pytest.raises(UnavailableError, match=complaint):
        check_version(version, sglang(**{name: None}))
    other = FINISH.rpartition(".")[2]
    with pytest.raises(UnavailableError, match=rf"{other} takes self, tokens, where self, new_accepted_tokens were"):
        check_version(version, sglang(**{other: lambda self, tokens: None}))
