"""What tox does around a cell of the matrix (ci/cells.py): a cell that this machine cannot run is skipped before
anything is installed, or fails if its hardware was promised; and what came of each is kept for `ci/cells.py table`."""

from __future__ import annotations

import importlib.util
import shlex
import time
from pathlib import Path
from typing import Any

from tox.config.sets import ConfigSet
from tox.plugin import impl
from tox.session.state import State
from tox.tox_env.api import ToxEnv
from tox.tox_env.errors import Fail, Skip

_SPEC = importlib.util.spec_from_file_location("cells", Path(__file__).parent / "ci" / "cells.py")
assert _SPEC is not None
assert _SPEC.loader is not None
cells = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cells)

_began: dict[str, float] = {}
_words: list[str] = []
"""What follows `--` on tox's command line, which chooses among a cell's tests."""


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    _words[:] = state.conf.pos_args(None) or ()


def _recorded(tox_env: ToxEnv) -> bool:
    """Whether this is a cell whose own commands are run: not `--notest`, `devenv` or `exec`."""
    if tox_env.name not in cells.CELLS:
        return False
    options = tox_env.options
    return not (options.no_test or options.package_only or options.command in ("exec", "e"))


@impl
def tox_on_install(tox_env: ToxEnv, arguments: Any, section: str, of_type: str) -> None:
    name = tox_env.name
    if not _recorded(tox_env) or name in _began:
        return
    _began[name] = time.monotonic()
    try:
        broken = cells.broken_promise(name)
    except ValueError as error:
        broken = str(error)
    if broken:
        cells.record(name, "FAIL", broken)
        raise Fail(broken)
    if missing := cells.lacks(name):
        cells.record(name, "SKIP", missing)
        raise Skip(missing)
    cells.record(name, "FAIL", "its environment could not be set up, or it was stopped")


@impl
def tox_after_run_commands(tox_env: ToxEnv, exit_code: int, outcomes: list[Any]) -> None:
    name = tox_env.name
    if not _recorded(tox_env):
        return
    seconds = time.monotonic() - _began.get(name, time.monotonic())
    found = cells.findings(Path(str(tox_env.conf["env_tmp_dir"])))
    chosen = f"only with: {shlex.join(_words)}" if _words else ""
    told = f"ended with code {exit_code}" if exit_code else "" if found else "all commands succeeded"
    status = "FAIL" if exit_code else "PART" if chosen else "PASS"
    cells.record(name, status, "; ".join(filter(None, (told, chosen, found))), seconds)
