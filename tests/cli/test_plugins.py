"""Plug-ins that somebody else broke: `doctor` lists them with the reason, and everything else goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspec.cli import main
from torchspec.core import registry

ENTRY_POINTS = """
[torchspec.devices]
cpu = broken_elsewhere:SPEC
leaver = broken_leaver:SPEC
[torchspec.backends]
ghost = broken_elsewhere:SPEC
[torchspec.algorithms]
ghost = broken_elsewhere:SPEC
leaver = broken_leaver:SPEC
"""


@pytest.fixture(autouse=True)
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution whose modules are missing or leave, and which registers a second `cpu`."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "broken_leaver.py").write_text("raise SystemExit('[/opt/x.so] is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    caches = (registry.devices, registry.backends, registry.algorithms)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_doctor_lists_everything_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) in (0, 1)  # a machine may have another device than the cpu
    found = json.loads(capsys.readouterr().out)
    for kind, known in (
        ("devices", registry.devices()), ("backends", registry.backends()), ("algorithms", registry.algorithms())
    ):  # fmt: skip
        assert [entry["name"] for entry in found[kind]] == list(known.names())
    entries = {(kind, entry["name"]): entry for kind in ("devices", "backends", "algorithms") for entry in found[kind]}
    assert entries["algorithms", "eagle3"]["available"]
    assert entries["backends", "hf"]["available"]
    for place, reason in {
        ("devices", "cpu"): "more than one installed distribution",
        ("devices", "leaver"): "SystemExit: [/opt/x.so] is missing",
        ("backends", "ghost"): "No module named 'broken_elsewhere'",
        ("algorithms", "ghost"): "No module named 'broken_elsewhere'",
        ("algorithms", "leaver"): "SystemExit: [/opt/x.so] is missing",
    }.items():
        assert not entries[place]["available"]
        assert reason in entries[place]["reason"]
        assert "broken" in entries[place]["registered_by"]
    main(["doctor"])
    assert "[/opt/x.so]" in capsys.readouterr().out


def test_help_of_train_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:  # argparse's --help
        main(["train", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "draft.unroll=7" in text
    assert "settings of algorithm ghost: algorithm 'ghost' (broken, broken_elsewhere:SPEC) cannot be loaded" in text
