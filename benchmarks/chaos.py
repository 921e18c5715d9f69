"""Real kills at random moments: does every sample get trained once, along the trajectory of an undisturbed run?

python benchmarks/chaos.py --rounds 200 --json benchmarks/results/chaos.json

A round is a training of 40 samples over two epochs, in a topology and with a victim that its number chooses; the moment
is drawn from (seed, number) over the time that an undisturbed run takes. The command is given again until it ends well.
Then the ledger must balance, losses and gradient norms must be those of the undisturbed run to the last bit, and after
15 seconds no process may be left. Rounds already in the JSON file are not run again, so that it can be stopped at any
time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import machine, write

from torchspec.core.training.ledger import balance, read_ledger

MARK = "TORCHSPEC_CHAOS"
SAMPLES, STEPS, STEPS_PER_EPOCH = 40, 20, 10
ATTEMPTS = 6
LIMIT = 600.0
"""Seconds that one command may take: a wait without an end is a failure too."""
LEFT_SECONDS = 15.0
"""Ray's own helpers look every few seconds whether their node is still there."""

CAPTURED = [
    "--device", "cpu", "--target", "embedded", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96",
    "draft.vocab_size=500", "draft.unroll=2", "seed=1",
]  # fmt: skip
COMMON = [*CAPTURED, "train.epochs=2", "train.checkpoint_every=3"]


@dataclass(frozen=True)
class Topology:
    """`like`: whose numbers it must have; `victims`: kinds of process, as `Process.kind` names them."""

    words: tuple[str, ...]
    like: str
    victims: tuple[str, ...]


TWO_RANKS = ("parallel.ulysses=2",)
ENGINES = ("engine.start_timeout=60", "engine.call_timeout=60", "--engines")
TOPOLOGIES = {
    "inprocess": Topology(("--nproc", "2", *TWO_RANKS), "two", ("rank", "driver", "all")),
    "colocated": Topology(
        ("--topology", "colocated", "--nproc", "2", *ENGINES, "2", *TWO_RANKS),
        "two",
        ("engine", "rank", "driver", "all"),
    ),
    "offline": Topology(("--topology", "offline"), "one", ("driver", "all")),
    "disaggregated": Topology(
        ("--topology", "disaggregated", *ENGINES, "2", "--trainers", "2", *TWO_RANKS),
        "two",
        ("engine", "engine agent", "rank", "rank agent", "driver", "all"),
    ),
    "mooncake": Topology(
        ("--topology", "disaggregated", *ENGINES, "1", "--trainers", "1", "pipeline.store=mooncake",
         "engine.store_mb=100"),
        "one",
        ("engine", "engine agent", "rank", "rank agent", "mooncake master", "driver", "all"),
    ),
}  # fmt: skip
CASES = [(name, victim) for name, topology in TOPOLOGIES.items() for victim in topology.victims]
"""Every round takes the next: all of them come equally often."""


@dataclass(frozen=True)
class Process:
    pid: int
    words: str

    @property
    def kind(self) -> str:
        words = self.words
        if "torchspec.core.workers" in words:
            return "engine"
        if "mooncake_master" in words:
            return "mooncake master"
        if words.startswith("ray::EngineAgent"):
            return "engine agent"
        if words.startswith("ray::RankAgent"):
            return "rank agent"
        return "rank" if "-m torchspec train" in words else "other"


def processes(mark: str) -> list[Process]:
    """Those that carry the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words:  # a zombie has none
                    found.append(Process(int(entry.name), words))
        except OSError:
            continue
    return found


class Chaos:
    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed = place, seed
        self.data = place / "data.jsonl"
        self.features = place / "features"
        self.seconds: dict[str, float] = {}
        self.reference: dict[str, list[tuple[float, float]]] = {}
        write_conversations(self.data)

    def command(self, name: str, output: Path) -> list[str]:
        words = [*TOPOLOGIES[name].words, *COMMON, "--data", str(self.data), "--output", str(output)]
        words += [f"pipeline.features={self.features}"] if name == "offline" else []
        return [sys.executable, "-P", "-m", "torchspec", "train", *words]

    def start(self, command: list[str], mark: str, log: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def undisturbed(self, name: str) -> None:
        """How long it takes, and what its numbers are."""
        if name == "offline" and not self.features.exists():
            words = [*CAPTURED, "--data", str(self.data), "--output", str(self.features)]
            subprocess.run([sys.executable, "-P", "-m", "torchspec", "capture", *words], check=True, cwd=self.place)
        output, log = self.place / f"undisturbed-{name}", self.place / f"undisturbed-{name}.log"
        begin = time.monotonic()
        process = self.start(self.command(name, output), f"undisturbed-{name}", log)
        if process.wait(LIMIT) != 0:
            raise SystemExit(f"the undisturbed run of {name} failed:\n{log.read_text()[-3000:]}")
        self.seconds[name] = time.monotonic() - begin
        numbers = numbers_of(output)
        expected = self.reference.setdefault(TOPOLOGIES[name].like, numbers)
        if numbers != expected:
            raise SystemExit(f"the undisturbed run of {name} has other numbers than another topology's")
        shutil.rmtree(output)

    def round(self, number: int) -> dict[str, Any]:
        name, victim = CASES[number % len(CASES)]
        if name not in self.seconds:
            self.undisturbed(name)
        draw = random.Random(f"{self.seed}-{number}")
        moment = draw.uniform(0.1, 1.0) * self.seconds[name]
        output, log, mark = self.place / f"round-{number}", self.place / f"round-{number}.log", f"{self.seed}-{number}"
        row: dict[str, Any] = {"number": number, "topology": name, "victim": victim, "moment": round(moment, 2)}
        codes: list[int | str] = []
        begin = time.monotonic()
        for attempt in range(ATTEMPTS):
            process = self.start(self.command(name, output), mark, log)
            if attempt == 0:
                row["killed"] = self.strike(process, victim, mark, begin + moment, draw)
            try:
                codes.append(process.wait(LIMIT))
            except subprocess.TimeoutExpired:
                codes.append("no end")
                end(mark)
                break
            if codes[-1] == 0:
                break
            self.settle(mark)
        row |= {"codes": codes, "seconds": round(time.monotonic() - begin, 1)}
        row |= self.judge(name, output) if codes[-1] == 0 else {"wrong": ["it did not end well"]}
        row["left"] = self.left(mark)
        end(mark)
        # The run itself outlives an engine, and what its driver can start again.
        row["alone"] = victim not in ("driver", "all") and codes == [0]
        if not row["wrong"] and row["equal"] and (row["alone"] or "engine" not in victim):
            shutil.rmtree(output, ignore_errors=True)
            log.unlink()
        return row

    def strike(
        self, process: subprocess.Popen[bytes], victim: str, mark: str, at: float, draw: random.Random
    ) -> str | None:
        """SIGKILL one process of the kind when it is time, or as soon as there is one; SIGTERM all; -> who was hit."""
        while process.poll() is None:
            if time.monotonic() < at:
                time.sleep(0.02)
                continue
            if victim == "driver":
                process.kill()
                return "driver"
            found = processes(mark)
            if victim == "all":
                for each in found:
                    kill(each.pid, signal.SIGTERM)
                return f"SIGTERM to {len(found)}"
            mine = [each for each in found if each.kind == victim and each.pid != process.pid]
            if mine:
                chosen = draw.choice(mine)
                kill(chosen.pid, signal.SIGKILL)
                return f"{victim} {mine.index(chosen) + 1} of {len(mine)}"
            time.sleep(0.02)
        return None

    def left(self, mark: str) -> list[str]:
        """What is still there when everything has had time to see that its run is over."""
        until = time.monotonic() + LEFT_SECONDS
        while (found := processes(mark)) and time.monotonic() < until:
            time.sleep(0.2)
        return [each.words[:80] for each in found]

    def settle(self, mark: str) -> None:
        """What a killed driver leaves ends by itself, or it would meet the next attempt."""
        until = time.monotonic() + 60
        while time.monotonic() < until and any(each.kind != "other" for each in processes(mark)):
            time.sleep(0.1)

    def judge(self, name: str, output: Path) -> dict[str, Any]:
        rows = read_ledger(output / "ledger.jsonl")
        found = balance(rows, samples=SAMPLES, steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
        counted = Counter((row["epoch"], sample) for row in rows for sample in row["trained"] + row["quarantined"])
        return {
            "wrong": list(found.wrong),
            "lost": 2 * SAMPLES - len(counted),
            "repeated": sum(count - 1 for count in counted.values()),
            "quarantined": sum(each.quarantined for each in found.epochs),
            "equal": numbers_of(output) == self.reference[TOPOLOGIES[name].like],
        }


def numbers_of(output: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def end(mark: str) -> None:
    for each in processes(mark):
        kill(each.pid, signal.SIGKILL)


def write_conversations(path: Path) -> None:
    draw = random.Random(0)
    words = ["the", "list", "of", "values", "is", "sorted", "and", "every", "function", "returns", "a", "new", "object"]
    with path.open("w") as file:
        for number in range(SAMPLES):
            question, answer = (" ".join(draw.choices(words, k=draw.randint(4, 24))) for _ in range(2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rounds": len(rows),
        "hit": sum(row["killed"] is not None for row in rows),
        "lost": sum(row.get("lost", 0) for row in rows),
        "repeated": sum(row.get("repeated", 0) for row in rows),
        "quarantined": sum(row.get("quarantined", 0) for row in rows),
        "unbalanced": [row["number"] for row in rows if row["wrong"]],
        "other numbers": [row["number"] for row in rows if not row.get("equal")],
        "left processes": [row["number"] for row in rows if row["left"]],
        "by topology": dict(Counter(row["topology"] for row in rows)),
        "by victim": dict(Counter(row["victim"] for row in rows)),
        "outlived": dict(Counter(f"{row['topology']}: {row['victim']}" for row in rows if row["alone"])),
        "commands": dict(Counter(len(row["codes"]) for row in rows)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="run just these rounds, and write nothing")
    parser.add_argument("--topology", choices=sorted(TOPOLOGIES), help="only its rounds")
    parser.add_argument("--minutes", type=float, default=600, help="begin no round after so many")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists() and options.only is None:
        known = json.loads(options.json.read_text())["rounds"]
    numbers = options.only if options.only is not None else range(options.rounds)
    numbers = [n for n in numbers if n not in {row["number"] for row in known}]
    numbers = [n for n in numbers if options.topology in (None, CASES[n % len(CASES)][0])]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchspec-chaos-") as place:
        chaos = Chaos(Path(place), options.seed)
        for number in numbers:
            if time.monotonic() - begin > 60 * options.minutes:
                break
            row = chaos.round(number)
            known.append(row)
            print(json.dumps(row), flush=True)
            log = Path(place) / f"round-{number}.log"
            if log.exists():
                print(log.read_text()[-4000:], flush=True)
            if options.json is not None and options.only is None:
                command = shlex.join(["python", *sys.argv])
                found = sorted(known, key=lambda row: row["number"])
                write(options.json, {"command": command, "seed": options.seed, "machine": machine(),
                                     "summary": summary(found), "rounds": found})  # fmt: skip
    total = summary(known)
    print(json.dumps(total, indent=2))
    return 1 if total["unbalanced"] or total["other numbers"] or total["left processes"] else 0


if __name__ == "__main__":
    sys.exit(main())
