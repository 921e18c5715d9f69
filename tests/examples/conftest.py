"""The distributions of examples/, built once into directories of their own, where subprocesses find them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="session")
def with_example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """with_example(name): the variables of processes that have the distribution."""

    def install(name: str) -> dict[str, str]:
        source, place = tmp_path_factory.mktemp(name) / "source", tmp_path_factory.mktemp(f"with_{name}")
        shutil.copytree(EXAMPLES / name, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        ran = subprocess.run(
            [*command, "--target", str(place), str(source)],
            env=environment(), capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return environment(PYTHONPATH=str(place))

    return install


@pytest.fixture(scope="session")
def installed(with_example: Callable[[str], dict[str, str]]) -> dict[str, str]:
    """The variables of processes that have the toy hardware."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    return with_example("torchspec-toyhw")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} and {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}, since {n} and {n} make {2 * n}."}]}
        for n in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def torchspec() -> Callable[[list[object], dict[str, str]], str]:
    """torchspec(words, variables): what the command prints."""

    def run(words: list[object], variables: dict[str, str]) -> str:
        command = [sys.executable, "-P", "-m", "torchspec", *map(str, words)]
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    return run


@pytest.fixture(scope="session")
def launching() -> ModuleType:
    """What the tests of examples/launch share."""
    spec = importlib.util.spec_from_file_location("launching", Path(__file__).with_name("launching.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
