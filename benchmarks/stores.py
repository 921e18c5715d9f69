"""Handing features over, from put to get in another process, through each store; beside the plain moving of the bytes.

python benchmarks/stores.py --json benchmarks/results/stores.json

One process writes and removes, this one reads. Stores take turns, and the figure of a store is the median over rounds
of the ratio within the round: of shared memory and the directory to a copy of as many bytes, of Mooncake to its own
put_from and get_into of as many bytes. What a store verifies, it verifies here. The memory store hands over in one
process, which copies nothing. Opening files and other processes' answers are not part of the time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from shlex import join
from typing import Any

import torch
from harness import machine, write

from torchspec.core.features.directory import DirectoryStore
from torchspec.core.features.memory import MemoryStore
from torchspec.core.features.mooncake import MooncakeSettings, MooncakeStore
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.features import Features, FeatureStore, RecordRef
from torchspec.core.pipeline.mooncake_master import MooncakeMaster

TAPS, HIDDEN = 3, 4096
LIMITS = {"shared/memcpy": 1.5, "mooncake/raw": 1.2}


def features(megabytes: float) -> Features:
    tokens = int(megabytes * 1e6) // (2 * (TAPS + 1) * HIDDEN)
    return Features(
        input_ids_T=torch.arange(tokens),
        taps_TNH=torch.randn(tokens, TAPS, HIDDEN).bfloat16(),
        last_TH=torch.randn(tokens, HIDDEN).bfloat16(),
        tap_layers=(1, 2, 3),
        norm_state="pre_norm",
    )


def opened(name: str, place: str) -> FeatureStore:
    """A store as a process other than its owner opens it."""
    if name == "shared":
        return SharedMemoryStore(root=Path(place))
    if name == "directory":
        return DirectoryStore(Path(place))
    return MooncakeStore(MooncakeSettings(**json.loads(place)), "benchmark")


def serve(pipe: Connection, places: dict[str, str], megabytes: float) -> None:
    """The writing process: answers each question with seconds and a reference."""
    torch.set_num_threads(1)
    record = features(megabytes)
    stores = {name: opened(name, place) for name, place in places.items()}
    mooncake = stores["mooncake"]
    assert isinstance(mooncake, MooncakeStore)
    client, placing = mooncake._client, mooncake._placing
    flat = record.taps_TNH.new_zeros((record.taps_TNH.nbytes + record.last_TH.nbytes) // 2)
    client.register_buffer(flat.data_ptr(), flat.nbytes)
    pipe.send("ready")
    for name in iter(pipe.recv, None):
        start = time.perf_counter()
        if name == "raw":
            assert client.put_from("raw", flat.data_ptr(), flat.nbytes, placing) == 0
            pipe.send((time.perf_counter() - start, None))
        else:
            ref = stores[name].put("sample", record)
            pipe.send((time.perf_counter() - start, asdict(ref)))
        pipe.recv()
        client.remove("raw", True) if name == "raw" else stores[name].remove(ref)
        pipe.send("removed")
    for store in stores.values():
        store.close()


def measure(args: argparse.Namespace, master: MooncakeMaster, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    owner = SharedMemoryStore(capacity=int(args.megabytes * 4e6))
    nbytes = features(args.megabytes)
    size = nbytes.taps_TNH.nbytes + nbytes.last_TH.nbytes
    places = {
        "shared": str(owner.root),
        "directory": str(directory),
        "mooncake": json.dumps(asdict(replace(master.settings, segment_bytes=4 * size))),
    }
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, places, args.megabytes))
    process.start()
    there.close()
    places["mooncake"] = json.dumps(asdict(master.settings))
    stores = {name: opened(name, place) for name, place in places.items()}
    mooncake = stores["mooncake"]
    assert isinstance(mooncake, MooncakeStore)
    buffer, copy = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    mooncake._client.register_buffer(buffer.data_ptr(), size)
    assert here.recv() == "ready"

    def handed(name: str, read: Callable[[RecordRef], object]) -> float:
        here.send(name)
        seconds, ref = here.recv()
        start = time.perf_counter()
        got = read(RecordRef(**ref) if ref else RecordRef(record_id="raw", length=0))
        seconds += time.perf_counter() - start
        del got
        here.send("remove")
        here.recv()
        return float(seconds)

    def copied() -> float:
        start = time.perf_counter()
        copy.copy_(buffer)
        return time.perf_counter() - start

    def in_memory() -> float:
        store = MemoryStore()
        start = time.perf_counter()
        store.get(store.put("sample", nbytes))
        return time.perf_counter() - start

    def raw(_: RecordRef) -> None:
        assert mooncake._client.get_into("raw", buffer.data_ptr(), size) == size

    ways: dict[str, Callable[[], float]] = {
        "memcpy": copied,
        "memory": in_memory,
        "raw": lambda: handed("raw", raw),
        **{name: (lambda name=name: handed(name, stores[name].get)) for name in stores},  # type: ignore[misc]
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 2):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            taken = ways[name]()
            if turn > 1:
                seconds[name].append(taken)
    here.send(None)
    process.join(60)
    for store in (*stores.values(), owner):
        store.close()
    return {"bytes": size, "rounds": args.rounds, **figures(seconds)}


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    pairs = [("shared", "memcpy"), ("directory", "memcpy"), ("mooncake", "raw")]
    ratios = {f"{a}/{b}": [x / y for x, y in zip(seconds[a], seconds[b], strict=True)] for a, b in pairs}
    return {
        "milliseconds": {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()},
        "ratios": {
            name: {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
            for name, each in ratios.items()
        },
        "limits": LIMITS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64.0, help="hidden states of a record, 1e6 bytes each")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, MooncakeMaster(Path(place) / "master") as master:
        body = measure(args, master, Path(place) / "records")
    for name, each in body["ratios"].items():
        limit = f", limit {LIMITS[name]}" if name in LIMITS else ""
        print(f"{name}: {each['median']:.2f} ({each['lowest']:.2f} to {each['highest']:.2f}{limit})")
    body = {"command": join(["python", "benchmarks/stores.py", *sys.argv[1:]]), "machine": machine(), **body}
    write(args.json, body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
