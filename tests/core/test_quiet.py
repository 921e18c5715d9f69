"""Lines that libraries log at import, known one by one, are hidden; everything else is logged."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from torchspec.core.quiet import known_noise_hidden

KNOWN = {
    "torchao": "Failed to load /env/torchao/_C_mxfp8.cpython-310.so: Could not load this library",
    "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass and is now natively supported",
}


def test_the_command_line_says_nothing_of_torchao(torchao: None) -> None:
    """Whether it is transformers that imports it, or torchspec."""
    code = "import sys; from torchspec.cli import main; main(['recipes']); import transformers.modeling_utils, torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    plain = code.replace("from torchspec.cli import main; main(['recipes']); ", "")
    loud = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, timeout=300, check=True)
    assert "Failed to load" in loud.stderr


def test_inside_another_process_only_known_lines_are_hidden_and_only_meanwhile(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KNOWN:  # a command line that ran in this process before hides them for good
        monkeypatch.setattr(logging.getLogger(name), "filters", [])

    def logged() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for name, line in KNOWN.items():
                logging.getLogger(name).warning("%s", line)
                logging.getLogger(name).warning("something else")
        return [record.getMessage() for record in caplog.records]

    with known_noise_hidden(), known_noise_hidden():
        assert logged() == ["something else"] * 2
    assert sorted(logged()) == sorted([*KNOWN.values(), *["something else"] * 2])
