"""What tox does around a cell of the matrix (ci/cells.py): a cell that this machine cannot run is skipped before
anything is installed, or fails if its hardware was promised; and what came of each is kept for `ci/cells.py table`."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.errors import Fail, Skip

_SPEC = importlib.util.spec_from_file_location("cells", Path(__file__).parent / "ci" / "cells.py")
assert _SPEC is not None
assert _SPEC.loader is not None
cells = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cells)

_began: dict[str, float] = {}


@impl
def tox_on_install(tox_env: ToxEnv, arguments: Any, section: str, of_type: str) -> None:
    name = tox_env.name
    if name not in cells.CELLS or name in _began:
        return
    _began[name] = time.monotonic()
    missing = cells.lacks(name)
    if missing and cells.promised(name):
        text = f"promised (PROMISED), but {missing}"
        cells.record(name, "FAIL", text)
        raise Fail(text)
    if missing:
        cells.record(name, "SKIP", missing)
        raise Skip(missing)
    cells.record(name, "FAIL", "its environment could not be set up, or it was stopped")


@impl
def tox_after_run_commands(tox_env: ToxEnv, exit_code: int, outcomes: list[Any]) -> None:
    name = tox_env.name
    if name not in cells.CELLS:
        return
    seconds = time.monotonic() - _began.get(name, time.monotonic())
    junit = Path(str(tox_env.conf["env_tmp_dir"])) / "junit.xml"
    counted = ", ".join(f"{n} {what}" for what, n in cells.counts(junit).items()) if junit.exists() else ""
    told = "all commands succeeded" if exit_code == 0 else f"ended with code {exit_code}"
    cells.record(name, "PASS" if exit_code == 0 else "FAIL", counted or told, seconds)
