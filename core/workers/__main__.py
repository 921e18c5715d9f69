"""Start a worker: `python -m torchspec.core.workers RUNNER --target DIR ...`, in the engine's environment.

The token that clients must bear is read from the environment variable TORCHSPEC_ENGINE_TOKEN. When the worker is ready
it writes one line of JSON to the file given with --announce (or to stdout): where it listens and who it is. With
--with-parent it ends when its standard input ends, so that it never outlives the process that started it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from torchspec.core.errors import TorchspecError
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.settings import engine_token
from torchspec.core.workers import protocol
from torchspec.core.workers.delivery import STREAM, make_delivery
from torchspec.core.workers.runner import WorkerSettings
from torchspec.core.workers.server import Worker, make_server, shut_down

log = logging.getLogger("torchspec.worker")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchspec.core.workers", description=__doc__)
    parser.add_argument("runner", help="module whose `make_runner` starts the engine: torchspec.backends.vllm.worker")
    parser.add_argument("--target", type=Path, required=True, help="directory of the target")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--taps", default="", help="layers to capture, as torchspec numbers them: 1,6,10")
    parser.add_argument("--draft", type=Path, help="directory of an exported draft to decode with")
    parser.add_argument("--draft-length", type=int, default=0, help="tokens drafted per round")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the target")
    parser.add_argument("--memory-fraction", type=float, help="of each device's memory, for the engine")
    parser.add_argument("--store-mb", type=int, default=1000, help="features that wait to be taken hold at most this")
    parser.add_argument("--delivery", default='{"kind": "shared"}', help="JSON: how features come to their callers")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--options", default="{}", help="JSON object of the engine's own constructor arguments")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; any other address is for others too")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--announce", type=Path, help="file that gets the line of JSON")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input ends")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """0 when asked to stop; 1 with the reason on stderr and in the announcement."""
    options = parse(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    token = engine_token()
    if not token:
        return _failed(options, f"the environment variable {protocol.TOKEN_VARIABLE} must hold the token")
    if options.with_parent:
        # Before the engine is loaded, which takes long: an orphan must not go on with it.
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        return serve(options, token)
    except TorchspecError as error:
        return _failed(options, str(error))
    except Exception as error:  # engines fail in any way; the cause goes to whoever waits
        log.exception("the engine could not be started")
        return _failed(options, f"{type(error).__name__}: {error}")


def serve(options: argparse.Namespace, token: str) -> int:
    taps = tuple(int(part) for part in options.taps.split(",") if part)
    store = SharedMemoryStore(capacity=options.store_mb * 1_000_000) if taps else None
    try:
        settings = WorkerSettings(
            target=options.target,
            device=options.device,
            dtype=options.dtype,
            taps=taps,
            draft=options.draft,
            draft_length=options.draft_length,
            store=None if store is None else store.root,
            store_bytes=options.store_mb * 1_000_000,
            tensor_parallel=options.tensor_parallel,
            memory_fraction=options.memory_fraction,
            trust_remote_code=options.trust_remote_code,
            options=json.loads(options.options),
        )
        module = importlib.import_module(options.runner)
        runner = module.make_runner(settings)
        wanted = json.loads(options.delivery)
        streamed = wanted.get("kind") == STREAM
        separate = store is not None and not streamed and wanted.get("kind") != "shared"
        delivery = make_delivery(wanted, settings) if separate else None
        worker = Worker(runner, settings, store, delivery, streamed=streamed)
        server = make_server(worker, options.host, options.port, token)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stopping.set())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        _announce(options, {"host": str(host), "port": port, "pid": os.getpid(), "session": worker.session})
        worker.stopping.wait()
        shut_down(server, worker)
        return 0
    finally:
        if store is not None:
            store.close()


def _announce(options: argparse.Namespace, facts: dict[str, object]) -> None:
    """Whole or not at all."""
    line = json.dumps(facts)
    if options.announce is None:
        print(line, flush=True)
        return
    aside = options.announce.with_name(options.announce.name + ".new")
    aside.write_text(line + "\n")
    aside.replace(options.announce)


def _failed(options: argparse.Namespace, reason: str) -> int:
    print(f"torchspec worker: {reason}", file=sys.stderr)
    if options.announce is not None:
        _announce(options, {"error": reason})
    return 1


def _end_with_parent() -> None:
    while os.read(0, 1 << 16):  # not through sys.stdin, whose lock a thread that waits there would hold at exit
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
