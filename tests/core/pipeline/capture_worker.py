"""Captures that are killed: `capture_worker.py values.json SEED KILLS`.

Every attempt is a fork of this process, killed at a random call of a function in either of its threads; then one runs
to its end. Prints how many calls that takes from nothing, and how many attempts were killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
from itertools import count
from pathlib import Path
from typing import Any

import torch

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.pipeline import capture as capturing

BEFORE_A_NAME = -1
"""Where a record is whole and has not got its name."""


def run(values: dict[str, Any], kill_at: int | None) -> int:
    """-> calls: of all that touches the directory, and not of the target, which takes most of them."""
    calls = count(1)
    seen = [0]

    def note(frame: Any, event: str, argument: Any) -> None:
        seen[0] = next(calls)
        naming = kill_at == BEFORE_A_NAME and event == "c_call" and argument is os.link
        if naming or seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    opened, load_engine, run_groups = capturing.opened, registry.load_engine, capturing._Session.run

    def opened_noted(directory: Path) -> Any:
        sys.setprofile(note)
        return opened(directory)

    def loaded_unnoted(*arguments: Any) -> Any:
        sys.setprofile(None)
        return load_engine(*arguments)

    def writer_noted(*arguments: Any) -> int:
        threading.setprofile(note)  # of threads that start from here on
        received = run_groups(*arguments)
        sys.setprofile(note)
        return received

    capturing.opened = opened_noted  # type: ignore[assignment]
    registry.load_engine = loaded_unnoted  # type: ignore[assignment]
    capturing._Session.run = writer_noted  # type: ignore[assignment,method-assign]
    config, _ = load_config(values=values)
    capturing.capture(config)
    sys.setprofile(None)
    return seen[0]


def attempt(values: dict[str, Any], kill_at: int | None) -> int:
    """In a fork; -> its calls, or 0 where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(writer, str(run(values, kill_at)).encode())
            code = 0
        except Exception:  # noqa: BLE001 - a fork must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), ended
    return int(said or 0)


def main() -> None:
    torch.set_num_threads(1)
    values, (seed, kills) = json.loads(Path(sys.argv[1]).read_text()), map(int, sys.argv[2:])
    draw = random.Random(seed)
    calls = attempt({**values, "output": values["output"] + "-undisturbed"}, None)
    assert attempt(values, BEFORE_A_NAME) == 0
    assert list(Path(values["output"]).glob(".0*"))
    killed = sum(attempt(values, draw.randint(1, calls // 2)) == 0 for _ in range(kills))
    attempt(values, None)
    print(json.dumps({"calls": calls, "killed": killed}))


if __name__ == "__main__":
    main()
