"""Plays `srun` and `scontrol` on one machine: tasks are processes here, and what was asked of Slurm is written down.

PLAYED is a folder: `asked` holds a line for each call, `tasks` the process numbers of the tasks that run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main() -> int:
    name, words, played = Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ["PLAYED"])
    with (played / "asked").open("a") as file:
        file.write(f"{name} {' '.join(words[:2])}\n")
    if name == "scontrol":
        if words[:2] == ["show", "hostnames"]:
            print("\n".join(words[2].split(",")))
        return 0
    split = next(number for number, word in enumerate(words) if not word.startswith("--"))
    options = dict(word.lstrip("-").partition("=")[::2] for word in words[:split])
    if options.get("nodelist", "localhost") not in os.environ["SLURM_JOB_NODELIST"].split(","):
        print(f"srun: error: no node {options['nodelist']}", file=sys.stderr)
        return 1
    count = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))
    tasks = []
    for number in range(count):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NTASKS": str(count)}
        # Signals of a job's steps go to their tasks alone: not to what these have started.
        tasks.append(subprocess.Popen(words[split:], env={**os.environ, **place}, stdin=subprocess.DEVNULL))
    with (played / "tasks").open("a") as file:
        file.writelines(f"{task.pid}\n" for task in tasks)
    signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
