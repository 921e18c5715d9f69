"""`torchspec engine`, over environments that hold a module by the engine's name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspec.backends.remote import pins
from torchspec.backends.remote.environments import MARKER, place
from torchspec.cli import main
from torchspec.cli.commands.engine import parsers
from torchspec.cli.reference import render

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `torchspec engine` in this process, with environments of its own: (exit code, stdout, stderr)."""
    monkeypatch.setenv("TORCHSPEC_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHSPEC_DEVICE", "cpu")

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main(["engine", *words])
        except SystemExit as exit_:  # argparse's --help
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def put(engine: str, device: str) -> Path:
    """An environment in order, with nothing in it but a module."""
    pinned = pins.read_pins(engine, device)
    path = place(engine, device)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    (packages,) = path.glob("lib/python*/site-packages")
    (packages / f"{engine}.py").write_text(f"__version__ = {pinned.version!r}\nLLM = Engine = None\n")
    facts = {
        "engine": engine,
        "device": device,
        "version": pinned.version,
        "pins": pinned.digest,
        "installed_at": "now",
    }
    (path / MARKER).write_text(json.dumps(facts))
    return path


def test_without_a_word_it_describes_itself(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.startswith("usage: torchspec engine COMMAND")
    assert all(f"  {word}" in out for word in ("install", "list", "check", "remove"))
    assert run("--help") == (0, out, "")


@pytest.mark.parametrize("word", ["install", "list", "check", "remove"])
def test_every_word_has_help_and_is_in_the_reference(run: Run, word: str) -> None:
    code, out, _ = run(word, "--help")
    assert code == 0
    assert out.startswith(f"usage: torchspec engine {word}")
    page = render().partition(f"### torchspec engine {word}\n")[2].partition("\n##")[0]
    for action in parsers()[word].listed:
        assert "--help" in action.option_strings or f"`{(*action.option_strings, action.metavar)[0]}" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["instal"], "instal: no such command"),
        (["instal"], "did you mean install?"),
        (["install"], "the following arguments are required: ENGINE"),
        (["install", "vlm"], "ENGINE: no such engine (got 'vlm')\n    choices: sglang, vllm"),
        (["install", "vllm", "--device", "tpu"], "no environment of vllm is known for this device (got 'tpu')"),
        (["install", "vllm", "--device", "tpu", "--pyton", "x"], "--pyton: no such option\n    remedy: did you mean"),
        (["list", "vllm"], "vllm: no such argument"),
        (["check", "--device", "tpu"], "no environment of any engine is known for this device"),
        (["install", "vllm", "--python", "/nowhere"], "/nowhere cannot be run"),
        (["install", "sglang", "--device", "npu"], "engine.python="),
        (["command", "vllm", "--target", "embedded", "--port", "a"], "--port: must be a whole number from 1 to 65535"),
        (["command", "vllm", "--target", "embedded", "--port", "65536"], "(got '65536')"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_and_exit_2(run: Run, words: list[str], says: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert says in err


def test_a_file_in_the_place_of_the_environments_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("")
    code, _, err = run("install", "vllm")
    assert code == 1
    assert f"no environment can be made in {tmp_path / 'engines'} (TORCHSPEC_ENGINES): File exists" in err


def test_where_nothing_is_installed(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert f"no engine is installed in {tmp_path / 'engines'}" in out
    assert run("list", "--json")[:2] == (0, "[]\n")
    code, _, err = run("check")
    assert code == 1
    assert "no engine is installed" in err
    code, _, err = run("check", "vllm", "--device", "cuda")
    assert code == 1
    assert "vllm is not installed for cuda" in err
    assert "torchspec engine install vllm --device cuda" in err
    code, _, err = run("remove", "vllm")
    assert code == 1
    assert "there is no environment of vllm for cpu" in err


def test_what_is_installed_is_listed_and_checked(run: Run) -> None:
    path = put("vllm", "cpu")
    put("vllm", "cuda")
    version = pins.read_pins("vllm", "cpu").version
    listed = json.loads(run("list", "--json")[1])
    assert [entry["device"] for entry in listed] == ["cpu", "cuda"]
    assert listed[0] == {
        "engine": "vllm",
        "device": "cpu",
        "version": version,
        "path": str(path),
        "python": str(path / "bin" / "python"),
        "pins": pins.read_pins("vllm", "cpu").digest,
        "installed_at": "now",
        "current": True,
    }
    out = run("list")[1]
    assert all(word in out for word in ("vllm", "cpu", "cuda", str(version), "yes"))
    in_order = [f"vllm {version} for {device}: in order\n" for device in ("cpu", "cuda")]
    assert run("check")[:2] == (0, "".join(in_order))
    (path / "bin" / "python").unlink()
    code, out, _ = run("check")
    assert code == 1, "one of the two is spoilt"
    assert f"vllm {version} for cpu: its interpreter" in out
    assert out.endswith(in_order[1])
    assert run("check", "vllm", "--device", "cuda")[:2] == (0, in_order[1])


def test_one_that_is_in_order_is_not_installed_again(run: Run) -> None:
    path = put("vllm", "cpu")
    code, out, err = run("install", "vllm")
    assert (code, out) == (0, f"{path}\n")
    assert "for device cpu (TORCHSPEC_DEVICE)" in err
    assert "nothing to do" in err


def test_a_device_without_environment_leaves_the_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put("vllm", "cpu")
    monkeypatch.setenv("TORCHSPEC_DEVICE", "abacus")
    code, _, err = run("install", "vllm")
    assert code == 0
    assert "for device cpu (no environment of vllm is known for abacus)" in err


def test_removing_asks_which_only_when_it_must(run: Run) -> None:
    cpu, cuda = put("vllm", "cpu"), put("vllm", "cuda")
    code, _, err = run("remove", "vllm")
    assert code == 2
    assert "--device: vllm is installed for several devices\n    choices: cpu, cuda" in err
    assert run("remove", "vllm", "--device", "cuda")[0] == 0
    assert (cpu.exists(), cuda.exists()) == (True, False)
    assert run("remove", "vllm")[0] == 0
    assert not cpu.exists()
