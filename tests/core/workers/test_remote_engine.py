"""An engine in another process: nothing is lost, nothing wrong is let in, nothing is left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.backends.api import (
    Captured,
    CaptureRequest,
    EngineOptions,
    Quarantined,
    RecordRef,
    TargetError,
    UnavailableError,
)
from torchspec.backends.remote.spec import Engine
from torchspec.core.features.memory import MemoryStore
from torchspec.core.workers import client
from torchspec.core.workers.place import Managed
from torchspec.core.workers.remote_engine import RemoteEngine
from torchspec.core.workers.supervisor import State, read_state

TAPS = (1, 3, 5)
Start = Callable[..., RemoteEngine]


def ask(engine: RemoteEngine, samples: Sequence[Sequence[int]], store: MemoryStore) -> list[Captured]:
    batch = [CaptureRequest(record_id=f"s{number}", input_ids=ids) for number, ids in enumerate(samples)]
    return engine.capture(batch, TAPS, store)


def check_right(
    fake: ModuleType, samples: Sequence[Sequence[int]], found: Sequence[Captured], store: MemoryStore
) -> None:
    for ids, ref in zip(samples, found, strict=True):
        assert isinstance(ref, RecordRef), ref
        got, expected = store.get(ref), fake.features_of(ids, TAPS, store.get(ref).last_TH.shape[1])
        assert torch.equal(got.input_ids_T, expected.input_ids_T)
        assert torch.equal(got.taps_TNH, expected.taps_TNH)
        assert torch.equal(got.last_TH, expected.last_TH)
        assert (got.tap_layers, got.norm_state) == (TAPS, "pre_norm")


def worker_pid(engine: RemoteEngine) -> int:
    """Of the worker that runs now."""
    assert isinstance(engine._place, Managed)
    state = read_state(engine._place._directory)
    assert state is not None
    assert state.pid, "0 would be all of our own processes"
    return state.pid


def test_features_come_through_whole_and_the_store_is_empty_after(start: Start, fake: ModuleType) -> None:
    engine, store = start(), MemoryStore()
    samples = [[5], [1, 2, 3], list(range(80)), [7] * 200]
    check_right(fake, samples, ask(engine, samples, store), store)
    session = engine._link.session
    assert session is not None
    assert session.store is not None
    assert session.store.usage().records == 0
    root, pid = session.store.root, worker_pid(engine)
    engine.close()
    engine.close()
    assert not root.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="is closed"):
        ask(engine, samples, store)


def test_text_and_counters(start: Start) -> None:
    engine = start(taps=())
    assert engine.generate([[5], [1, 20]], max_new_tokens=2) == [[6, 7], [21, 22]]
    (text,) = engine.decode([[5]], max_new_tokens=3)
    assert (text.tokens, text.accepted) == ((6, 7, 8), (1, 0))
    assert engine.counters().rounds == 3
    alone = engine.generate([[3, 4]], max_new_tokens=3, temperature=1.0, seed=5)
    together = engine.generate([[9], [3, 4]], max_new_tokens=3, temperature=1.0, seed=5)
    assert together[1] == alone[0], "what is drawn depends on the other prompts"


def test_an_engine_that_is_killed_loses_nothing(
    start: Start, fake: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, store = start(options={"marks": str(tmp_path)}), MemoryStore()
    samples = [[1, 2], [3, fake.DIES_ONCE], [5, 6, 7], [8]]
    with caplog.at_level(logging.WARNING, logger="torchspec"):
        check_right(fake, samples, ask(engine, samples, store), store)
    assert "fake died (exit code 9)" in caplog.text
    more = MemoryStore()
    check_right(fake, [[4, 4]], ask(engine, [[4, 4]], more), more)


def test_kill_from_outside_between_two_batches(start: Start, fake: ModuleType) -> None:
    engine = start()
    for _ in range(2):
        os.kill(worker_pid(engine), signal.SIGKILL)
        store = MemoryStore()
        check_right(fake, [[1, 2], [3]], ask(engine, [[1, 2], [3]], store), store)


def test_a_sample_that_kills_the_engine_is_quarantined_alone(start: Start, fake: ModuleType) -> None:
    engine, store = start(), MemoryStore()
    samples = [[1, 2], [3, fake.DIES], [5, 6]]
    first, second, third = ask(engine, samples, store)
    assert isinstance(second, Quarantined)
    assert second.reason.startswith("failed 3 times, the last time: the fake worker at http://127.0.0.1:")
    check_right(fake, [samples[0], samples[2]], [first, third], store)


def asked(marks: Path) -> list[list[list[int]]]:
    """What the workers were asked to capture together, by the samples' tokens."""
    path = marks / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    return [[ids for _, *ids in json.loads(line)] for line in lines]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_samples_are_asked_for_together_once_more_and_then_alone(
    start: Start, fake: ModuleType, tmp_path: Path
) -> None:
    engine, store = start(options={"marks": str(tmp_path)}), MemoryStore()
    samples = [[1, 2], [3, fake.DIES], [5, 6]]
    assert [isinstance(each, Quarantined) for each in ask(engine, samples, store)] == [False, True, False]
    assert asked(tmp_path) == [samples, samples, [samples[0]], [samples[1]], [samples[2]]]


def in_threads(work: Callable[[int], None], count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_an_engine_that_several_threads_lose_is_lost_once(
    start: Start, fake: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each asks the next engine for its own samples, together as before; and one more is started, not one for each."""
    engine = start(options={"marks": str(tmp_path)}, directory=tmp_path / "engine")
    groups = [[[number, fake.WAITS], [number, 7, 8]] for number in range(1, 5)]

    def work(number: int) -> None:
        store = MemoryStore()
        check_right(fake, groups[number], ask(engine, groups[number], store), store)
        done.append(number)

    done: list[int] = []
    with caplog.at_level(logging.WARNING, logger="torchspec.core.workers.link"):
        threads = in_threads(work, len(groups))
        wait_for(lambda: len(asked(tmp_path)) == len(groups))
        os.kill(worker_pid(engine), signal.SIGKILL)
        (tmp_path / "go").touch()
        for thread in threads:
            thread.join(60)
    assert sorted(done) == [0, 1, 2, 3]
    told = [record for record in caplog.records if record.name == "torchspec.core.workers.link"]
    assert len(told) == 1, caplog.text
    calls = asked(tmp_path)
    assert sorted(calls[:4]) == sorted(calls[4:]) == groups
    state = read_state(tmp_path / "engine")
    assert state is not None
    assert state.generation == 2


def test_a_thread_whose_sample_kills_the_engine_takes_no_other_with_it(
    start: Start, fake: ModuleType, tmp_path: Path
) -> None:
    engine, store = start(), MemoryStore()
    found: dict[int, list[Captured]] = {}
    groups = [[[1, fake.DIES], [2]], [[3, 4], [5]]]

    def work(number: int) -> None:
        batch = [CaptureRequest(record_id=f"{number}-{n}", input_ids=ids) for n, ids in enumerate(groups[number])]
        found[number] = engine.capture(batch, TAPS, store)

    for thread in in_threads(work, 2):
        thread.join(60)
    assert isinstance(found[0][0], Quarantined)
    check_right(fake, [[2], *groups[1]], [found[0][1], *found[1]], store)


PARTS = (((0, 2),), ((1, 3), (4, 5)))


def parts_of(ids: Sequence[int], part: int, name: str = "run-0") -> CaptureRequest:
    return CaptureRequest(record_id=name, input_ids=ids, parts=PARTS, part=part)


def check_part(fake: ModuleType, ids: Sequence[int], part: int, found: Sequence[Captured], store: MemoryStore) -> None:
    (ref,) = found
    assert isinstance(ref, RecordRef), ref
    got, whole = store.get(ref), fake.features_of(ids, TAPS, store.get(ref).last_TH.shape[1])
    rows = [row for start, stop in PARTS[part] for row in range(start, stop)]
    assert got.input_ids_T.tolist() == [ids[row] for row in rows]
    assert torch.equal(got.taps_TNH, whole.taps_TNH[rows])
    assert torch.equal(got.last_TH, whole.last_TH[rows])


@pytest.mark.parametrize("killed", [False, True])
def test_ranks_take_parts_of_one_capture(
    engine: Engine, start: Start, fake: ModuleType, tmp_path: Path, killed: bool
) -> None:
    """Made once; and once more by the next engine where the first was killed over it."""
    ranks = [start(options={"marks": str(tmp_path)}, directory=tmp_path / "engine", rank=rank) for rank in range(2)]
    stores = [MemoryStore(), MemoryStore()]
    ids = [1, 2, fake.WAITS, 4, 5]
    found: dict[int, list[Captured]] = {}

    def work(rank: int) -> None:
        found[rank] = ranks[rank].capture([parts_of(ids, rank)], TAPS, stores[rank])

    threads = in_threads(work, 2)
    wait_for(lambda: len(asked(tmp_path)) == 1)
    if killed:
        os.kill(worker_pid(ranks[0]), signal.SIGKILL)
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        check_part(fake, ids, rank, found[rank], stores[rank])
    session = ranks[0]._link.session
    assert session is not None
    assert session.store is not None
    if not killed:  # else one of them may have asked the second engine alone, and the other not at all
        assert asked(tmp_path) == [[ids]]
        assert session.store.usage().records == 0


def test_a_part_of_other_tokens_is_not_let_in(start: Start, fake: ModuleType) -> None:
    engine, store = start(), MemoryStore()
    (found,) = engine.capture([parts_of([1, 2, 3, 4, fake.OTHER], 1)], TAPS, store)
    assert isinstance(found, Quarantined)
    assert found.reason.endswith("fake captured other tokens than it was given")
    assert len(store) == 0


def test_reasons_of_the_engine_reach_the_quarantine(start: Start, fake: ModuleType) -> None:
    engine, store = start(), MemoryStore()
    samples = [[fake.REFUSES, 1], [fake.SHORT, 2, 3], [fake.OTHER, 3], [4]]
    *bad, good = ask(engine, samples, store)
    reasons = [each.reason for each in bad if isinstance(each, Quarantined)]
    assert [reason.removeprefix("failed 3 times, the last time: ") for reason in reasons] == [
        "hidden states that are not finite",
        "2 tokens were captured of 3",
        "fake captured other tokens than it was given",
    ]
    check_right(fake, [[4]], [good], store)
    assert len(store) == 1
    session = engine._link.session
    assert session is not None
    assert session.store is not None
    assert session.store.usage().records == 0, "what was refused stays in shared memory"


def test_an_engine_that_hangs_is_replaced(start: Start, fake: ModuleType) -> None:
    engine, store = start(call_timeout=1.0), MemoryStore()
    pid = worker_pid(engine)
    (bad,) = ask(engine, [[fake.HANGS]], store)
    assert isinstance(bad, Quarantined)
    assert "did not finish in the time given" in bad.reason
    check_right(fake, [[4]], ask(engine, [[4]], store), store)
    assert worker_pid(engine) != pid


def test_an_engine_that_is_frozen_is_replaced(start: Start, fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nothing, the order to exit neither."""
    monkeypatch.setattr(client, "GRACE_SECONDS", 0.2)
    engine, store = start(call_timeout=1.0, start_timeout=20.0), MemoryStore()
    pid = worker_pid(engine)
    os.kill(pid, signal.SIGSTOP)
    check_right(fake, [[4]], ask(engine, [[4]], store), store)
    assert worker_pid(engine) != pid


def test_prompts_that_kill_the_engine_end_in_an_error(start: Start, fake: ModuleType) -> None:
    engine = start(taps=())
    with pytest.raises(TargetError, match="fake failed 3 times on the same prompts"):
        engine.generate([[fake.DIES]], max_new_tokens=2)
    assert engine.generate([[5]], max_new_tokens=2) == [[6, 7]]


def test_more_than_the_store_holds_goes_in_waves(start: Start, fake: ModuleType, tiny_target: Path) -> None:
    engine, store = start(store_mb=1), MemoryStore()
    samples = [[number] * 250 for number in range(1, 41)]
    check_right(fake, samples, ask(engine, samples, store), store)
    session = engine._link.session
    assert session is not None
    assert session.row_bytes * 250 * 40 > 2_000_000, "it would all have fit at once"


def test_a_sample_that_can_never_fit_names_the_setting(start: Start) -> None:
    engine = start(store_mb=1)
    with pytest.raises(TargetError, match=r"take [\d.]+ MB and the store may hold 1\.0 MB: raise engine\.store_mb"):
        ask(engine, [[1] * 20_000], MemoryStore())


def test_other_taps_and_tokens_are_the_callers_mistake(start: Start) -> None:
    engine = start()
    with pytest.raises(ValueError, match=r"started for the taps \(1, 3, 5\), not \(2,\)"):
        engine.capture([CaptureRequest(record_id="a", input_ids=[1])], (2,), MemoryStore())
    with pytest.raises(ValueError, match="another tokenizer"):
        ask(engine, [[1, 5000]], MemoryStore())


def test_the_token_is_for_this_user_alone(start: Start, tmp_path: Path) -> None:
    start(directory=tmp_path)
    state = read_state(tmp_path)
    assert state is not None
    assert state.state == "ready"
    assert oct((tmp_path / "worker.json").stat().st_mode)[-3:] == "600"
    assert state.token not in (tmp_path / "fake.log").read_text()


def test_one_that_is_killed_while_it_starts_is_started_again(start: Start, fake: ModuleType, tmp_path: Path) -> None:
    count = tmp_path / "count"
    engine, store = start(options={"killed": [str(count), 2]}), MemoryStore()
    check_right(fake, [[5, 6]], ask(engine, [[5, 6]], store), store)
    assert count.read_text() == "3"
    count.unlink()
    with pytest.raises(TargetError, match="ended while it started \\(signal SIGKILL\\)"):
        start(options={"killed": [str(count), 9]})
    assert count.read_text() == "3", "not for ever"


def test_it_gives_up_when_the_next_one_does_not_start(start: Start, tmp_path: Path) -> None:
    """For every rank, with the reason."""
    marks = tmp_path / "marks"
    engine = start(directory=tmp_path, options={"once": str(marks)})
    follower = start(directory=tmp_path, rank=1)
    os.kill(worker_pid(engine), signal.SIGKILL)
    for each in (engine, follower):
        with pytest.raises(TargetError, match="fake cannot start: it was here before"):
            ask(each, [[1]], MemoryStore())


def test_ranks_of_a_machine_share_one_engine(start: Start, fake: ModuleType, tmp_path: Path) -> None:
    """The one that starts it may come last; when it is replaced, all of them find the new one."""
    found: dict[int, Any] = {}

    def follow(rank: int) -> None:
        found[rank] = start(directory=tmp_path, rank=rank)

    thread = threading.Thread(target=follow, args=(1,))
    thread.start()
    time.sleep(0.5)
    leader = start(directory=tmp_path)
    thread.join(timeout=60)
    follower = found[1]
    for engine in (leader, follower):
        store = MemoryStore()
        check_right(fake, [[1, 2]], ask(engine, [[1, 2]], store), store)
    os.kill(worker_pid(leader), signal.SIGKILL)
    both = [threading.Thread(target=lambda e=e: ask(e, [[3]], MemoryStore())) for e in (leader, follower)]  # type: ignore[misc]
    for each in both:
        each.start()
    for each in both:
        each.join(timeout=60)
    for engine in (leader, follower):
        store = MemoryStore()
        check_right(fake, [[1, 2]], ask(engine, [[1, 2]], store), store)


def test_a_worker_of_an_earlier_run_is_none_of_ours(tmp_path: Path) -> None:
    """Its process number may be anybody's by now."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        place = Managed(tmp_path, name="fake", patience=0.3)
        left = State(state="ready", generation=1, url="http://127.0.0.1:9", token="t", pid=stranger.pid)
        (tmp_path / "worker.json").write_text(json.dumps(asdict(left)))
        client = place.client()
        (tmp_path / "worker.json").write_text(json.dumps(asdict(State(state="starting", generation=1))))
        place.lost(client)
        assert stranger.poll() is None
        with pytest.raises(TargetError, match="was not ready within"):
            place.client()
    finally:
        stranger.kill()
        stranger.wait()


_PARENT = """
import sys, time
from pathlib import Path
from torchspec.backends.api import EngineOptions, EngineProcess
from torchspec.backends.remote.spec import Engine
from torchspec.core.registry import load_device
here, target, directory = sys.argv[1:]
engine = Engine(name="fake", module="torch", runner="fake_runner", shims=lambda device: (here,))
process = EngineProcess(python=Path(sys.executable), store_mb=10)
cpu = load_device("cpu")
options = EngineOptions(target=Path(target), device=cpu, taps=(1,), process=process, directory=Path(directory))
made = engine.load(options)
print(made._link.session.store.root, flush=True)
time.sleep(60)
"""


def test_the_engine_does_not_outlive_a_trainer_that_is_killed(tiny_target: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", _PARENT, str(Path(__file__).parent), str(tiny_target), str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    root = Path(parent.stdout.readline().strip())
    assert root.is_dir()
    worker = int(root.name.split("-")[3])
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker still runs")


def test_attaching_to_a_running_worker(
    engine: Engine, options: Callable[..., EngineOptions], fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the printed command, word for word in a shell."""
    command = engine.attach_command(options(), 0)
    shell = subprocess.Popen(["bash", "-c", f"exec env {command}"], stdout=subprocess.PIPE, text=True)
    try:
        assert shell.stdout is not None
        place = json.loads(shell.stdout.readline())
        url = f"http://{place['host']}:{place['port']}"
        attached = options(python=None, url=url)
        monkeypatch.delenv("TORCHSPEC_ENGINE_TOKEN", raising=False)
        answer = engine.available("cpu", attached.process)
        assert not answer.ok
        assert "TORCHSPEC_ENGINE_TOKEN" in answer.hint
        monkeypatch.setenv("TORCHSPEC_ENGINE_TOKEN", "wrong")
        with pytest.raises(TargetError, match="refuses us: the token is missing or not this worker's"):
            engine.load(attached)
        monkeypatch.setenv("TORCHSPEC_ENGINE_TOKEN", command.split("TORCHSPEC_ENGINE_TOKEN=")[1].split()[0])
        made, store = engine.load(attached), MemoryStore()
        assert isinstance(made, RemoteEngine)
        check_right(fake, [[1, 2]], ask(made, [[1, 2]], store), store)
        made.close()
        assert shell.poll() is None, "an attached worker is not ours to stop"
        other = options(python=None, url=url, taps=(2,))
        with pytest.raises(TargetError, match=r"taps is \[1, 3, 5\], needed \[2\]"):
            engine.load(other)
    finally:
        shell.terminate()
        shell.wait(timeout=20)
        assert shell.stdout is not None
        shell.stdout.close()


def test_an_interpreter_without_the_engine(
    engine: Engine, options: Callable[..., EngineOptions], tmp_path: Path
) -> None:
    other = Engine(name="fake", module="no_such_engine", runner="fake_runner")
    answer = other.available("cpu", options().process)
    assert not answer.ok
    assert "has no module no_such_engine" in answer.reason
    assert "torchspec engine install fake" in answer.hint
    gone = other.available("cpu", options(python=tmp_path / "python").process)
    assert "cannot be run" in gone.reason
    with pytest.raises(UnavailableError, match="torchspec engine install fake"):
        other.load(options(python=None))
