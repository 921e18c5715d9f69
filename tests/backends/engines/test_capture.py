"""What an engine hands out is what transformers computes: every layer asked for, whole, of the right sample."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torchspec.backends.api import CaptureRequest, EngineOptions, Features, RecordRef, TargetEngine, TargetError
from torchspec.core import registry
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.target_head import load_target_head
from torchspec.core.workers.remote_engine import RemoteEngine

TAPS = (1, 3, 5)
LIMIT = 1e-4
LENGTHS = (1, 2, 17, 33, 150, 200, 511, 512)
# Small pieces and few of them at a time; and, for engines that keep prefixes, nothing that forbids it.
CHUNKED = {
    "vllm": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_num_seqs": 8},
    "sglang": {"chunked_prefill_size": 64, "max_running_requests": 8},
}


def samples() -> list[list[int]]:
    """Some begin alike, which a prefix cache would use; the longest fills the target's context."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return [int(token) for token in torch.randint(3, 300, (count,), generator=generator)]

    beginning = draw(64)
    return [draw(length) for length in LENGTHS] + [beginning + draw(length) for length in (5, 9, 100)]


def capture(engine: TargetEngine, ids: list[list[int]]) -> list[Features]:
    store = MemoryStore()
    requests = [CaptureRequest(record_id=str(number), input_ids=each) for number, each in enumerate(ids)]
    found = engine.capture(requests, TAPS, store)
    assert all(isinstance(each, RecordRef) for each in found), found
    return [take(store, each) for each in found if isinstance(each, RecordRef)]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """transformers' features of the samples."""

    ids: list[list[int]]
    features: list[Features]
    target: Path

    def check(self, got: list[Features]) -> None:
        head = load_target_head(self.target, dtype=torch.float32, device=torch.device("cpu"))
        for ids, ours, theirs in zip(self.ids, self.features, got, strict=True):
            assert theirs.input_ids_T.tolist() == ids
            assert theirs.tap_layers == TAPS
            assert theirs.taps_TNH.shape == ours.taps_TNH.shape
            assert float((theirs.taps_TNH - ours.taps_TNH).abs().max()) < LIMIT
            expected = head.normed(ours.last_TH, ours.norm_state)
            assert float((head.normed(theirs.last_TH, theirs.norm_state) - expected).abs().max()) < LIMIT


def truth_of(target: Path, options: Callable[..., EngineOptions]) -> Truth:
    ids = samples()
    engine = registry.load_engine("hf", options(target, taps=TAPS))
    features = [each for sample in ids for each in capture(engine, [sample])]
    engine.close()
    return Truth(ids=ids, features=features, target=target)


@pytest.fixture(scope="module")
def chunked(
    engine_name: str, targets: dict[str, Path], options: Callable[..., EngineOptions]
) -> Iterator[tuple[TargetEngine, Truth]]:
    """A Llama read in small pieces."""
    target = targets["llama"]
    engine = registry.load_engine(engine_name, options(target, taps=TAPS, options=CHUNKED[engine_name]))
    yield engine, truth_of(target, options)
    engine.close()


def test_chunked_prefill_and_what_was_read_before(chunked: tuple[TargetEngine, Truth]) -> None:
    """The second time an engine that keeps prefixes has all of them."""
    engine, truth = chunked
    for _ in range(2):
        truth.check(capture(engine, truth.ids))


def test_a_killed_engine_loses_nothing(chunked: tuple[TargetEngine, Truth]) -> None:
    """SIGKILL while it captures: to vLLM's worker, and to SGLang's scheduler, which is a process of its own."""
    engine, truth = chunked
    assert isinstance(engine, RemoteEngine)
    many = truth.ids * 4
    session = engine._link.session
    assert session is not None
    assert session.store is not None
    worker = int(session.store.root.name.split("-")[3])
    before = session.client.url

    def kill() -> None:
        time.sleep(0.3)
        scheduler = [pid for pid in children(worker) if b"scheduler" in command_of(pid)]
        if scheduler:  # of SGLang: the worker itself lives on, and has to notice
            os.kill(scheduler[0], signal.SIGKILL)
        else:
            os.killpg(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    got = capture(engine, many)
    killer.join()
    for start in range(0, len(many), len(truth.ids)):
        truth.check(got[start : start + len(truth.ids)])
    truth.check(capture(engine, truth.ids))
    assert engine._link.session is not None
    assert engine._link.session.client.url != before, "it was not killed in time to show anything"


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_other_architectures(
    engine_name: str, kind: str, targets: dict[str, Path], options: Callable[..., EngineOptions]
) -> None:
    """Whole prompts; a tied head; experts."""
    engine = registry.load_engine(engine_name, options(targets[kind], taps=TAPS))
    try:
        truth_of(targets[kind], options).check(capture(engine, samples()))
    finally:
        engine.close()


def test_a_target_on_two_devices(
    engine_name: str, targets: dict[str, Path], options: Callable[..., EngineOptions]
) -> None:
    """Tensor parallel: each record is written once, whole."""
    target = targets["llama"]
    engine = registry.load_engine(engine_name, options(target, taps=TAPS, tensor_parallel=2))
    try:
        truth_of(target, options).check(capture(engine, samples()))
    finally:
        engine.close()


@pytest.mark.parametrize("engine_name", ["sglang"], indirect=True)  # vLLM is given its connector by name
def test_a_plug_in_that_does_not_load_is_noticed(
    engine_name: str, targets: dict[str, Path], options: Callable[..., EngineOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "somebody-elses")
    with pytest.raises(TargetError, match="without torchspec's plug-in: its scheduler didn't load it"):
        registry.load_engine(engine_name, options(targets["llama"], taps=TAPS))
