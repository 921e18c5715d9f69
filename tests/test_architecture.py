"""Rules of the house that no import contract can state."""

from __future__ import annotations

import io
import re
import stat
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "core"

_VENDOR_CODE = re.compile(
    r"\btorch\s*\.\s*(cuda|npu|xpu|mps|musa)\b|\btorch_npu\b"
    r"|^\s*(import|from)\s+(sglang|vllm|mooncake|flash_attn|triton|torch_npu)\b|\.cuda\(",
    re.MULTILINE,
)
_VENDOR_WORDS = {"cuda", "npu", "nccl", "hccl", "xpu", "musa"}


def python_files(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def code_and_strings(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a string literal) of every token but comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            yield token.start[0], token.string, token.type == tokenize.STRING


def vendor_leaks(source: str) -> list[str]:
    found: list[str] = []
    code: dict[int, str] = {}
    for line, text, is_string in code_and_strings(source):
        if not is_string:
            code[line] = code.get(line, "") + text + " "
        elif text.strip("rbfRBF\"'").partition(":")[0].lower() in _VENDOR_WORDS:
            found.append(f"{line}: literal {text}")
    for line, text in code.items():
        squeezed = re.sub(r"\s*([.(])\s*", r"\1", text)
        found += [f"{line}: {hit.group(0).strip()}" for hit in _VENDOR_CODE.finditer(squeezed)]
    return found


@pytest.mark.parametrize(
    "planted",
    [
        "x = torch.cuda.current_device()",
        "import torch_npu",
        "from sglang.srt import entrypoints",
        "if True:\n    import vllm",
        'dist.init_process_group("nccl")',
        "x = tensor.to('cuda:0')",
        "x = tensor.cuda()",
    ],
)
def test_the_vendor_search_finds_what_it_must(planted: str) -> None:
    assert vendor_leaks(planted)


def test_the_vendor_search_leaves_prose_alone() -> None:
    assert not vendor_leaks('"""Serves in vllm and sglang; on cuda too."""\nx = "vllm"  # torch.cuda\n')


@pytest.mark.parametrize("path", python_files("core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_names_no_vendor(path: Path) -> None:
    if path == CORE / "features" / "mooncake.py":
        pytest.skip("the one file that talks to Mooncake")
    assert not vendor_leaks(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", python_files("core", "devices", "backends", "src"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_environment_variables_are_read_in_settings_alone(path: Path) -> None:
    if path != CORE / "settings.py":
        assert not re.search(
            r"\bos\.(environ|getenv|putenv)\b|from os import .*environ", path.read_text(encoding="utf-8")
        )


@pytest.mark.parametrize(
    "path", python_files("core", "devices", "backends", "src"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_is_pickled(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from)\s+(pickle|cloudpickle|dill|joblib)\b", text, re.MULTILINE)
    for call in re.finditer(r"torch\.load\((.*)", text):
        assert "weights_only=True" in call.group(1), call.group(0)


def test_models_do_not_communicate() -> None:
    for path in python_files("core/models", "core/algorithms", "core/attention"):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path


def test_ci_runs_the_command_the_readme_names() -> None:
    assert re.search(r"^exec .*ci/test", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    for script in (".ci/run", "ci/test", "ci/quickstart", "ci/lint"):
        assert (ROOT / script).stat().st_mode & stat.S_IXUSR, f"{script} is not executable"
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_readme_names_things_that_exist() -> None:
    from torchspec.cli import COMMANDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first_screen = "\n".join(readme.splitlines()[:40])
    for script in ("ci/quickstart", "ci/test"):
        assert script in first_screen
    for script in set(re.findall(r"(?<![\w/.])(ci/[\w.]+)", readme)):
        assert (ROOT / script).exists(), script
    for command in set(re.findall(r"^\s*torchspec ([a-z]+)", readme, re.MULTILINE)):
        assert command in COMMANDS, command


def test_every_folder_of_a_package_is_a_package() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for folder in table.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has modules and no __init__.py"


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_help_of_the_front_door_imports_no_torch() -> None:
    program = "import sys, torchspec.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_what_is_public_is_imported_when_it_is_used() -> None:
    program = (
        "import sys, torchspec as t; assert 'torch' not in sys.modules; [getattr(t, name) for name in t.__all__]; "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
