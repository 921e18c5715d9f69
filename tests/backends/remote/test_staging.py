"""The folder that makes any engine's environment a worker's: this torchspec, and nothing that it depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import torchspec
from torchspec import backends, core
from torchspec.backends.remote.staging import stage
from torchspec.core.workers import protocol

TRAINERS_OWN = ("transformers", "tokenizers", "pydantic", "yaml", "rich", "jinja2", "matplotlib")
"""What torchspec depends on and an engine's environment need not have."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path))
    return tmp_path / "worker"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return stage()


def python(staged: Path, code: str, *flags: str) -> str:
    """stdout of another interpreter that has the folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(staged)}
    done = subprocess.run(
        [sys.executable, "-P", *flags, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def worker_modules(staged: Path) -> list[str]:
    """Every module that runs in a worker, but for what stands in for packages that are not there."""
    folder = staged / "torchspec" / "backends"
    files = [path for path in folder.rglob("*.py") if "worker" in path.relative_to(folder).parts]
    files += [staged / "torchspec" / "core" / "workers" / f"{name}.py" for name in ("__main__", "hosted")]
    parts = [path.relative_to(staged).with_suffix("").parts for path in files]
    names = [".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts]
    return sorted(name for name in names if "cpu_shims" not in name)


def test_it_holds_the_modules_of_the_worker_and_no_assets(staged: Path) -> None:
    files = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    described = f"torchspec-{torchspec.__version__}.dist-info"
    assert {
        "torchspec/__init__.py",
        "torchspec/core/features/shared.py",
        "torchspec/core/workers/__main__.py",
        "torchspec/backends/vllm/worker/connector.py",
        "torchspec/backends/sglang/worker/plugin.py",
        "torchspec/backends/sglang/worker/cpu_shims/triton/__init__.py",
    } <= files
    assert {name for name in files if not name.endswith(".py")} == {
        f"{described}/METADATA", f"{described}/entry_points.txt",
    }  # fmt: skip
    assert not [name for name in files if name.startswith(("torchspec/cli", "torchspec/devices", "torchspec/assets"))]
    (folder,) = core.__path__
    ours = Path(folder) / "workers" / "server.py"
    assert (staged / "torchspec/core/workers/server.py").read_bytes() == ours.read_bytes()


def test_the_same_code_is_staged_once(cache: Path) -> None:
    first = stage()
    written = (first / "torchspec/__init__.py").stat().st_mtime_ns
    assert stage() == first
    assert (first / "torchspec/__init__.py").stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [first], "something half-made is left"


def test_other_code_gets_a_folder_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that still runs keeps the code that it was started with."""
    before = stage()
    more = tmp_path / "more" / "extra"
    more.mkdir(parents=True)
    (more / "__init__.py").write_text("")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(more.parent)])
    after = stage()
    assert after != before
    assert (after / "torchspec/backends/extra/__init__.py").exists()
    assert not (before / "torchspec/backends/extra").exists()
    assert before.is_dir()


def test_plug_in_systems_find_it_as_if_it_were_installed(staged: Path) -> None:
    """Without site-packages: by this folder alone."""
    code = """
import json
from importlib.metadata import distribution, entry_points
found = entry_points(group="sglang.srt.plugins")
print(json.dumps([distribution("torchspec").version, [[each.name, each.value] for each in found]]))
"""
    ours = [entry for entry in metadata.entry_points(group="sglang.srt.plugins") if entry.name == "torchspec"]
    assert ours, "the installation declares no plug-in"
    expected = [torchspec.__version__, [["torchspec", ours[0].value]]]
    assert json.loads(python(staged, code, "-S")) == expected


def test_the_protocol_needs_the_standard_library_alone(staged: Path) -> None:
    code = "import torchspec.core.workers.protocol as p; print(p.__file__, p.PROTOCOL)"
    file, version = python(staged, code, "-S").split()
    assert Path(file).is_relative_to(staged)
    assert version == str(protocol.PROTOCOL)


def test_workers_do_without_what_the_trainer_depends_on(staged: Path) -> None:
    """Every module of every worker is imported where those packages cannot be; those of an engine may lack it alone."""
    code = f"""
import importlib, json, sys
for name in {TRAINERS_OWN!r}:
    sys.modules[name] = None
lacking = {{}}
for name in {worker_modules(staged)!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        lacking[name] = str(error)
ours = [module.__file__ for name, module in sys.modules.items() if name.startswith("torchspec")]
strange = [file for file in ours if not file.startswith({str(staged)!r})]
print(json.dumps([lacking, strange, [name for name in {TRAINERS_OWN!r} if sys.modules[name] is not None]]))
"""
    lacking, strange, loaded = json.loads(python(staged, code))
    assert not strange, "torchspec was found elsewhere"
    assert not loaded
    assert lacking == {"torchspec.backends.vllm.worker.connector": "No module named 'vllm'"}
