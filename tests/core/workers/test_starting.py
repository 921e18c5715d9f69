"""A worker's command line, read by the worker itself, and what the process that is started sees."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.errors import TargetError, UnavailableError
from torchspec.core.interfaces.engine import EngineOptions, EngineProcess
from torchspec.core.settings import visible_devices
from torchspec.core.workers import starting
from torchspec.core.workers.__main__ import parse
from torchspec.core.workers.supervisor import read_state

MakeOptions = Callable[..., EngineOptions]

# Announces itself as a worker does, and says what it was started with.
STAND_IN = """#!{python}
import json, os, sys, time
from pathlib import Path
told = {{"words": sys.argv[1:], "environment": dict(os.environ)}}
Path({told!r}).write_text(json.dumps(told))
announced = Path(sys.argv[sys.argv.index("--announce") + 1])
announced.with_suffix(".new").write_text(json.dumps({{"host": "127.0.0.1", "port": 9}}))
announced.with_suffix(".new").replace(announced)
sys.stdin.buffer.read()
"""


def read(words: list[str]) -> Any:
    """As the worker does, behind the interpreter's own words."""
    assert words[:3] == ["-P", "-m", "torchspec.core.workers"]
    return parse(words[3:])


def test_a_worker_reads_what_its_options_say(options: MakeOptions, tmp_path: Path) -> None:
    given = replace(
        options(
            taps=(1, 4), tensor_parallel=2, memory_fraction=0.25, host="0.0.0.0", store_mb=7,
            options={"text": "a b", "nested": {"deep": [1, None]}}, delivery={"kind": "device"},
        ),
        trust_remote_code=True,
        dtype="bfloat16",
    )  # fmt: skip
    got = read(starting.arguments("some.runner", given, tmp_path / "draft", 3))
    assert (got.runner, got.target, got.device, got.dtype) == ("some.runner", given.target, "cpu", "bfloat16")
    assert (got.taps, got.store_mb, got.tensor_parallel, got.memory_fraction) == ("1,4", 7, 2, 0.25)
    assert json.loads(got.options) == given.process.options
    assert json.loads(got.delivery) == {"kind": "device"}
    assert (got.draft, got.draft_length, got.host, got.trust_remote_code) == (tmp_path / "draft", 3, "0.0.0.0", True)


def test_what_is_not_said_is_the_workers_own(options: MakeOptions) -> None:
    """Among it that the target's own code is not run, and that nobody else's machine is listened to."""
    words = starting.arguments("some.runner", options(taps=()))
    got = read(words)
    assert (got.taps, got.draft, got.memory_fraction, got.trust_remote_code) == ("", None, None, False)
    assert got.host == "127.0.0.1"
    assert "--store-mb" not in words, "one that captures nothing holds nothing"


def test_the_target_is_named_whole(options: MakeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker may run elsewhere on the machine."""
    given = options()
    monkeypatch.chdir(given.target.parent)
    got = read(starting.arguments("some.runner", replace(given, target=Path(given.target.name))))
    assert got.target == given.target


@pytest.mark.parametrize(("said", "dtype"), [("auto", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_the_precision_is_named(options: MakeOptions, said: str, dtype: str) -> None:
    """Never `auto`, which every engine reads in its own way; the tiny target is kept in float32."""
    assert read(starting.arguments("some.runner", replace(options(), dtype=said))).dtype == dtype


def test_how_much_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As said; else 2000 MB, or most of what shared memory has left."""
    assert starting.store_mb(EngineProcess(store_mb=123)) == 123
    for free, expected in ((100_000_000_000, 2000), (100_000_000, 80), (100, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        assert starting.store_mb(EngineProcess()) == expected


@pytest.mark.parametrize(
    ("mine", "wanted", "seen"),
    [(None, (0, 1), "0,1"), ("4,5,6,7", (2, 3), "6,7"), ("GPU-a,GPU-b", (1,), "GPU-b")],
)
def test_accelerators_are_counted_among_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, mine: str | None, wanted: tuple[int, ...], seen: str
) -> None:
    monkeypatch.delenv("SOME_VISIBLE_DEVICES", raising=False)
    if mine is not None:
        monkeypatch.setenv("SOME_VISIBLE_DEVICES", mine)
    assert visible_devices("SOME_VISIBLE_DEVICES", wanted) == seen


def test_an_accelerator_that_the_user_hid_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UnavailableError, match="shows 2 accelerators, and an engine needs those of numbers 2, 3"):
        visible_devices("SOME_VISIBLE_DEVICES", (2, 3))


class Accelerated:
    """A runtime with accelerators to hide; all else is another's."""

    visible_devices_variable = "SOME_VISIBLE_DEVICES"

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize(("devices", "seen"), [((1, 2), "5,6"), (None, "4,5,6")])
def test_the_process_that_is_started(
    options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...] | None, seen: str
) -> None:
    """Its words, its devices, and a token that no one else is told; it ends with its supervisor."""
    monkeypatch.setenv("SOME_VISIBLE_DEVICES", "4,5,6")
    told, stand_in = tmp_path / "told.json", tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable, told=str(told)))
    stand_in.chmod(0o700)
    given = options(directory=tmp_path / "engine", devices=devices)
    given = replace(given, device=replace(given.device, runtime=Accelerated(given.device.runtime)))  # type: ignore[arg-type]
    program = starting.Program(
        name="some", runner="some.runner", python=stand_in,
        environment={"SOME_VISIBLE_DEVICES": "4,5,6", "ONLY": "this"},
    )  # fmt: skip
    supervisor = starting.start(program, given)
    try:
        got = json.loads(told.read_text())
        state = read_state(tmp_path / "engine")
        assert state is not None
        assert (state.state, state.url, state.pid) == ("ready", "http://127.0.0.1:9", supervisor.pid)
        assert got["words"][: len(starting.arguments("some.runner", given))] == starting.arguments("some.runner", given)
        environment = got["environment"]
        assert (environment["SOME_VISIBLE_DEVICES"], environment["ONLY"]) == (seen, "this")
        assert environment["TORCHSPEC_ENGINE_TOKEN"] == state.token
        assert state.token not in got["words"]
        assert "PATH" not in environment, "only what its program is to see"
    finally:
        supervisor.close()
    closed = read_state(tmp_path / "engine")
    assert closed is not None
    assert closed.state == "closed"


def test_attaching_to_nothing_ends(options: MakeOptions, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"some was not ready within 0 s \(engine.start_timeout\)"):
        starting.attach("some", options(directory=tmp_path, start_timeout=0.1))
