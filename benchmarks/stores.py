"""Handing features over, from put to get in another process, through each store; beside the plain moving of the bytes.

python benchmarks/stores.py --json benchmarks/results/stores.json

One process writes, this one reads and then gives back what it took. Ways take turns, and the figure of a store is the
median over rounds of the ratio within the round: of what lies in files or in shared memory to a copy of as many bytes,
of Mooncake to its own client moving as many bytes by put_from and get_into, and to the fastest of the client's ways,
which reads in pieces. What a store verifies, it verifies here. The memory store hands over in one process, which copies
nothing. Buffers are used again, as in a run. Opening files and other processes' answers are not part of the time.
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
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from shlex import join
from typing import Any

import torch
from harness import machine, write

from torchspec.core.features.directory import DirectoryStore
from torchspec.core.features.memory import MemoryStore
from torchspec.core.features.mooncake import MooncakeSettings, MooncakeStore
from torchspec.core.features.pool import PooledStore
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.device import SharedMemory
from torchspec.core.interfaces.features import Features, FeatureStore, RecordRef
from torchspec.core.pipeline.mooncake_master import MooncakeMaster
from torchspec.core.registry import load_device

TAPS, HIDDEN = 3, 4096
POOL, FILES = "shared memory (pool)", "shared memory (a file each)"
RAW = "raw put_from + get_into"
PIECES = {f"raw in pieces of {size} MiB": size << 20 for size in (4, 16, 64)}
LIMITS = {f"{POOL} / memcpy": 1.5, f"mooncake / {RAW}": 1.2}


def features(megabytes: float) -> Features:
    tokens = int(megabytes * 1e6) // (2 * (TAPS + 1) * HIDDEN)
    return Features(
        input_ids_T=torch.arange(tokens),
        taps_TNH=torch.randn(tokens, TAPS, HIDDEN).bfloat16(),
        last_TH=torch.randn(tokens, HIDDEN).bfloat16(),
        tap_layers=(1, 2, 3),
        norm_state="pre_norm",
    )


def memory() -> SharedMemory:
    found = load_device("cpu").shared_memory
    assert found is not None
    return found


def opened(name: str, place: str) -> FeatureStore:
    """A store as a process other than its owner opens it."""
    if name == POOL:
        return PooledStore(memory(), root=Path(place))
    if name == FILES:
        return SharedMemoryStore(root=Path(place))
    if name == "directory":
        return DirectoryStore(Path(place))
    return MooncakeStore(MooncakeSettings(**json.loads(place)), "benchmark")


def serve(pipe: Connection, places: dict[str, str], megabytes: float) -> None:
    """The writing process: answers each question with seconds and a reference. The pool is its own."""
    torch.set_num_threads(1)
    record = features(megabytes)
    pool = PooledStore(memory(), capacity=int(megabytes * 4e6))
    stores: dict[str, FeatureStore] = {POOL: pool, **{name: opened(name, place) for name, place in places.items()}}
    mooncake = stores["mooncake"]
    assert isinstance(mooncake, MooncakeStore)
    client, placing = mooncake._link.client, mooncake._link.placing
    flat = record.taps_TNH.new_zeros((record.taps_TNH.nbytes + record.last_TH.nbytes) // 2)
    client.register_buffer(flat.data_ptr(), flat.nbytes)
    pipe.send(str(pool.root))
    for name in iter(pipe.recv, None):
        start = time.perf_counter()
        if name in stores:
            ref = stores[name].put("sample", record)
            pipe.send((time.perf_counter() - start, asdict(ref)))
        else:
            assert client.put_from("raw", flat.data_ptr(), flat.nbytes, placing) == 0
            pipe.send((time.perf_counter() - start, None))
        pipe.recv()
        stores[name].remove(ref) if name in stores else client.remove("raw", True)
        pipe.send("removed")
    for store in stores.values():
        store.close()


def raw_reads(client: Any, buffer: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Every way in which the client reads what lies under "raw"; only the bytes, nothing is verified."""
    address, nbytes = buffer.data_ptr(), buffer.nbytes

    def whole() -> None:
        assert client.get_into("raw", address, nbytes) == nbytes

    def in_pieces(size: int) -> None:
        assert client.batch_get_session_start(["raw"]) == [0]
        for at in range(0, nbytes, size):
            length = min(size, nbytes - at)
            codes = client.batch_get_into_multi_buffer_ranges(["raw"], [[address + at]], [[length]], [[at]])
            assert codes[0] >= 0
        client.batch_get_session_end(["raw"])

    return {RAW: whole, **{name: partial(in_pieces, size) for name, size in PIECES.items()}}


def measure(args: argparse.Namespace, master: MooncakeMaster, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    owner = SharedMemoryStore(capacity=int(args.megabytes * 4e6))
    record = features(args.megabytes)
    size = record.taps_TNH.nbytes + record.last_TH.nbytes
    places = {
        FILES: str(owner.root),
        "directory": str(directory),
        "mooncake": json.dumps(asdict(replace(master.settings, segment_bytes=4 * size))),
    }
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, places, args.megabytes))
    process.start()
    there.close()
    places |= {"mooncake": json.dumps(asdict(master.settings)), POOL: here.recv()}
    stores = {name: opened(name, place) for name, place in places.items()}
    mooncake = stores["mooncake"]
    assert isinstance(mooncake, MooncakeStore)
    buffer, copy = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    mooncake._link.client.register_buffer(buffer.data_ptr(), size)

    def handed(name: str, read: Callable[[RecordRef], object]) -> dict[str, float]:
        here.send(name)
        put, ref = here.recv()
        start = time.perf_counter()
        got = read(RecordRef(**ref) if ref else RecordRef(record_id="raw", length=0))
        get = time.perf_counter() - start
        del got
        here.send("remove")
        here.recv()
        return {name: put + get, f"{name}, get alone": get}

    def copied() -> dict[str, float]:
        start = time.perf_counter()
        copy.copy_(buffer)
        return {"memcpy": time.perf_counter() - start}

    def in_memory() -> dict[str, float]:
        store = MemoryStore()
        start = time.perf_counter()
        store.get(store.put("sample", record))
        return {"memory": time.perf_counter() - start}

    raw = raw_reads(mooncake._link.client, buffer)
    ways: list[Callable[[], dict[str, float]]] = [
        copied,
        in_memory,
        *(partial(handed, name, lambda _, read=read: read()) for name, read in raw.items()),  # type: ignore[misc]
        *(partial(handed, name, store.get) for name, store in stores.items()),
    ]
    rounds: list[dict[str, float]] = []
    for turn in range(args.rounds + 2):
        taken: dict[str, float] = {}
        for way in ways if turn % 2 else ways[::-1]:
            taken |= way()
        rounds.append(taken)
    here.send(None)
    process.join(60)
    for store in (*stores.values(), owner):
        store.close()
    return {"bytes": size, "rounds": args.rounds, **figures(rounds[2:])}  # the first ones touch fresh memory


def figures(rounds: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}
    fastest = min((RAW, *PIECES), key=medians.__getitem__)
    pairs = {f"{name} / memcpy": (name, "memcpy") for name in (POOL, f"{POOL}, get alone", FILES, "directory")}
    pairs |= {f"{name} / {RAW}": (name, RAW) for name in PIECES}
    pairs |= {f"mooncake / {RAW}": ("mooncake", RAW), "mooncake / fastest raw": ("mooncake", fastest)}
    ratios = {name: [taken[a] / taken[b] for taken in rounds] for name, (a, b) in pairs.items()}
    return {
        "milliseconds": {name: 1e3 * seconds for name, seconds in medians.items()},
        "fastest_raw": fastest,
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
    print(f"the fastest raw way of Mooncake: {body['fastest_raw']}")
    for name, each in body["ratios"].items():
        limit = f", limit {LIMITS[name]}" if name in LIMITS else ""
        print(f"{name}: {each['median']:.3g} ({each['lowest']:.3g} to {each['highest']:.3g}{limit})")
    body = {"command": join(["python", "benchmarks/stores.py", *sys.argv[1:]]), "machine": machine(), **body}
    write(args.json, body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
