"""Environments of engines, over a tiny engine that pip really installs from a package index on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchspec import backends
from torchspec.backends.remote import environments, installation, pins
from torchspec.backends.remote.environments import Environment, check, find, install, installed, place, remove
from torchspec.core.errors import TorchspecError, UnavailableError

BASE = Path(getattr(sys, "_base_executable", sys.executable))


class Handler(SimpleHTTPRequestHandler):
    """A folder per distribution, listed as pip reads it; /hang answers when the test is over."""

    over = threading.Event()

    def do_GET(self) -> None:
        if self.path.startswith("/hang"):
            self.over.wait(60)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a package index: `simple` holds the engine in three builds, `cpu` a build of torch of its own."""
    root = tmp_path_factory.mktemp("index")
    wheel(root / "simple", "tiny", "1.2", "__version__ = '1.2'\nimport helper\n")
    wheel(root / "simple", "tiny", "1.3", "__version__ = '1.2'\n")
    wheel(root / "simple", "tiny", "1.4", "import absent\n")
    for version in ("1", "2"):
        wheel(root / "simple", "helper", version, f"VERSION = {version}\n")
    wheel(root / "simple", "torch", "9.9", "BUILD = 'the default'\n")
    wheel(root / "cpu", "torch", "9.9+cpu", "BUILD = 'for the CPU'\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def wheel(index: Path, name: str, version: str, code: str) -> None:
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    described = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{described}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{described}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{described}/RECORD", "")


@dataclass
class Place:
    """Where a test's engine is pinned and installed, and what was said about it."""

    file: Path
    said: list[str]

    def install(self, python: Path, say: Callable[[str], None] | None = None) -> Environment:
        return install("tiny", "cpu", base_python=python, say=say or self.said.append)


@pytest.fixture
def tiny(tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    file = tmp_path / "backends" / "tiny" / "pins" / "cpu.txt"
    file.parent.mkdir(parents=True)
    file.write_text("tiny==1.2\nhelper==2\n")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path / "backends")])
    monkeypatch.setenv("TORCHSPEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/simple")
    monkeypatch.setattr(installation, "CPU_INDEX", f"{index}/cpu")
    return Place(file, [])


@pytest.fixture(scope="module")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that makes one environment and copies it: setting up pip takes most of an installation otherwise."""
    folder = tmp_path_factory.mktemp("python")
    script = folder / "python"
    make_once = f'[ -d {folder}/made ] || {BASE} "$1" "$2" "$3" {folder}/made || exit 1'
    script.write_text(
        f'#!/bin/sh\nif [ "$3" = venv ]; then {make_once}; exec cp -R {folder}/made/. "$4"; fi\nexec {BASE} "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def made(tiny: Place) -> Environment:
    """One in order, made without pip."""
    path = place("tiny", "cpu")
    subprocess.run([BASE, "-m", "venv", "--without-pip", path], check=True)
    (packages,) = path.glob("lib/python*/site-packages")
    (packages / "tiny.py").write_text("__version__ = '1.2+local'\n")
    facts = {"engine": "tiny", "device": "cpu", "version": "1.2", "installed_at": "2026-01-01T00:00:00+00:00"}
    facts["pins"] = pins.read_pins("tiny", "cpu").digest
    (path / environments.MARKER).write_text(json.dumps(facts))
    environment = find("tiny", "cpu")
    assert environment is not None
    return environment


def run_in(environment: Environment, code: str) -> str:
    return subprocess.run([environment.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_engine_is_installed_by_stages_and_found(tiny: Place, quick_python: Path) -> None:
    tiny.file.write_text("helper==1\ntorch==9.9\n# then\ntiny==1.2\nhelper==2  # over the first\n")
    assert (find("tiny", "cpu"), installed()) == (None, [])
    environment = tiny.install(quick_python)
    assert environment == find("tiny", "cpu")
    assert installed() == [environment]
    assert (environment.version, environment.current, check(environment)) == ("1.2", True, [])
    assert run_in(environment, "import helper, torch; print(helper.VERSION, torch.BUILD)") == "2 for the CPU"
    log = f"{environment.path}.log"
    assert [line for line in tiny.said if log in line], "the log is named"
    assert "Successfully installed helper-1" in Path(log).read_text()
    tiny.said.clear()
    assert tiny.install(quick_python) == environment
    assert "nothing to do" in tiny.said[-1]


def test_without_the_index_of_cpu_builds_torch_comes_from_the_default_one(
    tiny: Place, quick_python: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.file.write_text("torch==9.9\ntiny==1.2\nhelper==2\n")
    monkeypatch.setattr(installation, "CPU_INDEX", f"{index}/nowhere")
    assert run_in(tiny.install(quick_python), "import torch; print(torch.BUILD)") == "the default"


def test_one_that_was_interrupted_is_none_and_is_made_anew(
    tiny: Place, quick_python: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(text: str) -> None:
        if text.startswith("still installing"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(installation, "_SECONDS_BETWEEN_LINES", 0.5)
        patch.setenv("PIP_INDEX_URL", f"{index}/hang")
        with pytest.raises(KeyboardInterrupt):
            tiny.install(quick_python, interrupt)
    assert place("tiny", "cpu").is_dir()
    assert (find("tiny", "cpu"), installed()) == (None, [])
    with environments._lock(place("tiny", "cpu"), None):
        pass  # pip was stopped too: it would hold the lock
    assert tiny.install(quick_python).current
    assert f"removing what is in {place('tiny', 'cpu')}" in tiny.said


def test_one_that_breaks_while_it_is_made_anew_is_none(tiny: Place, made: Environment, quick_python: Path) -> None:
    tiny.file.write_text("tiny==1.2\nhelper==7\n")
    with pytest.raises(TorchspecError) as caught:
        tiny.install(quick_python)
    assert "installing failed with exit code 1" in str(caught.value)
    assert "No matching distribution found for helper==7" in str(caught.value), "the end of pip's output"
    assert f"{place('tiny', 'cpu')}.log" in str(caught.value)
    assert find("tiny", "cpu") is None


def test_two_at_a_time_make_one(tiny: Place, quick_python: Path) -> None:
    results: list[Environment] = []
    threads = [threading.Thread(target=lambda: results.append(tiny.install(quick_python))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    started = [line.split()[0] for line in tiny.said]
    assert (started.count("waiting"), started.count("making"), started.count("nothing")) == (1, 1, 1), tiny.said


@pytest.mark.parametrize(
    ("pinned", "says"),
    [
        ("tiny==1.3", "tiny is of version 1.2 there, and 1.3 is what torchspec is tested with"),
        ("tiny==1.4", "cannot import tiny: ModuleNotFoundError: No module named 'absent'"),
    ],
)
def test_what_does_not_work_is_not_marked_as_installed(tiny: Place, quick_python: Path, pinned: str, says: str) -> None:
    tiny.file.write_text(pinned)
    with pytest.raises(TorchspecError, match=says):
        tiny.install(quick_python)
    assert find("tiny", "cpu") is None


def test_without_a_network(tiny: Place, quick_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(TorchspecError, match=r"remedy: no package index can be reached from here\. .*HTTPS_PROXY"):
        tiny.install(quick_python)


def test_it_does_not_take_forever(tiny: Place, quick_python: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_SECONDS", 1.0)
    monkeypatch.setattr(installation, "_SECONDS_BETWEEN_LINES", 0.5)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/hang")
    with pytest.raises(TorchspecError, match="was not done after"):
        tiny.install(quick_python)
    assert "still installing, 0 s" in tiny.said or "still installing, 1 s" in tiny.said


def test_a_python_that_the_engine_is_not_made_for_is_refused(tiny: Place, tmp_path: Path) -> None:
    tiny.file.write_text("# python: 3.1 3.2\ntiny==1.2\n")
    version = "{}.{}".format(*sys.version_info)
    with pytest.raises(UnavailableError, match=rf"from 3\.1 to 3\.2, and .* is {version}\n.*--python") as caught:
        tiny.install(BASE)
    assert caught.value.exit_code == 2
    with pytest.raises(UnavailableError, match="cannot be run"):
        tiny.install(tmp_path / "nowhere")
    assert not place("tiny", "cpu").exists()


def test_unknown_engines_and_devices_are_refused(tiny: Place) -> None:
    with pytest.raises(UnavailableError, match=r"no environment is known for engine 'tinny', only for .*tiny"):
        install("tinny", "cpu", base_python=BASE, say=print)
    with pytest.raises(UnavailableError, match="no environment of tiny is known for device 'tpu', only for cpu"):
        install("tiny", "tpu", base_python=BASE, say=print)


def test_an_engine_on_no_index_is_left_to_people(tiny: Place) -> None:
    tiny.file.write_text("# Fetch tiny from where it grows.\nhelper==1\n")
    with pytest.raises(UnavailableError, match=f"by hand, as {tiny.file} says, .*engine.python"):
        tiny.install(BASE)


def test_one_in_order_has_nothing_wrong(made: Environment) -> None:
    assert check(made) == []


def spoil_interpreter(tiny: Place, environment: Environment) -> None:
    environment.python.unlink()


def spoil_engine(tiny: Place, environment: Environment) -> None:
    (module,) = environment.path.glob("lib/python*/site-packages/tiny.py")
    module.write_text("raise RuntimeError('wrong\\nturn')\n")


def spoil_version(tiny: Place, environment: Environment) -> None:
    (module,) = environment.path.glob("lib/python*/site-packages/tiny.py")
    module.write_text("print('hello')\n__version__ = '1.3'\n")


def change_pins(tiny: Place, environment: Environment) -> None:
    tiny.file.write_text("tiny==1.2\nhelper==1\n")


def drop_pins(tiny: Place, environment: Environment) -> None:
    shutil.rmtree(tiny.file.parent)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_interpreter, "its interpreter .*/bin/python is gone: run `torchspec engine install tiny --device cpu`"),
        (spoil_engine, "cannot import tiny: turn\n.*torchspec engine install tiny --device cpu"),
        (
            spoil_version,
            r"version 1\.3 there, and 1\.2 is what torchspec is tested with: run `torchspec engine install",
        ),
        (change_pins, "made from other versions than .*: run `torchspec engine install tiny --device cpu`"),
        (drop_pins, "this torchspec knows no environment of tiny for cpu: remove it"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(
    tiny: Place, made: Environment, spoil: Callable[[Place, Environment], None], says: str
) -> None:
    spoil(tiny, made)
    (text,) = check(made)
    assert re.search(says, text), text


def test_an_engine_that_hangs_is_noticed(made: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = made.path.glob("lib/python*/site-packages/tiny.py")
    module.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(environments, "_IMPORT_SECONDS", 1.0)
    (text,) = check(made)
    assert "did not finish importing tiny within 1 s" in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engine": "tiny"}', '{"of": "another torchspec"}'])
def test_a_marker_that_cannot_be_read_is_none(made: Environment, text: str) -> None:
    (made.path / environments.MARKER).write_text(text)
    assert (find("tiny", "cpu"), installed()) == (None, [])


def test_removing(tiny: Place, made: Environment) -> None:
    with environments._lock(made.path, None), pytest.raises(TorchspecError, match="is being installed by another"):
        remove("tiny", "cpu")
    assert find("tiny", "cpu") is not None
    (made.path / environments.MARKER).unlink()  # half-made
    remove("tiny", "cpu")
    assert not made.path.exists()
    with pytest.raises(TorchspecError, match="there is no environment of tiny for cpu"):
        remove("tiny", "cpu")


def test_pins_are_read(tiny: Place) -> None:
    tiny.file.write_text(
        "# Why.\n# pip: --no-deps --pre\n# python: 3.12 3.13\n--extra-index-url https://x.example\n"
        "A_b.c == 1.0 ; python_version < '4'\n\ntiny-cpu==1.5+local\n# then\nhelper  # any\n"
    )
    read = pins.read_pins("tiny", "cpu")
    assert read.stages == (("A_b.c == 1.0 ; python_version < '4'", "tiny-cpu==1.5+local"), ("helper",))
    assert read.arguments == ("--no-deps", "--pre", "--extra-index-url", "https://x.example")
    assert read.pythons == ((3, 12), (3, 13))
    assert (read.version, read.version_of("a-b-c"), read.version_of("helper")) == ("1.5+local", "1.0", None)
    tiny.file.write_text(tiny.file.read_text().replace("# Why.", "# Why not?"))
    assert pins.read_pins("tiny", "cpu").digest == read.digest, "comments install nothing"
    tiny.file.write_text(tiny.file.read_text().replace("--pre", ""))
    assert pins.read_pins("tiny", "cpu").digest != read.digest


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_engine_is_pinned_for_every_device(engine: str) -> None:
    assert pins.devices(engine) == ("cpu", "cuda", "npu")
    read = {device: pins.read_pins(engine, device) for device in pins.devices(engine)}
    assert read["cpu"].version is not None
    assert read["cuda"].version == read["cpu"].version
    for pinned in read.values():
        assert pinned.version or not pinned.complete


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_pins_for_the_cpu_are_a_whole_lock(engine: str) -> None:
    read = pins.read_pins(engine, "cpu")
    assert "--no-deps" in read.arguments
    assert read.version_of("torch"), "or a CUDA build is taken"
    for requirement in (requirement for stage in read.stages for requirement in stage):
        assert requirement.count("==") == 1, requirement
        assert not set("+@/ ") & set(requirement), f"{requirement} is of one machine alone"


def test_looking_for_environments_is_light() -> None:
    code = (
        "import sys; from torchspec.backends.remote import environments; environments.installed(); "
        "print(*({'torch', 'transformers', 'pydantic', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
