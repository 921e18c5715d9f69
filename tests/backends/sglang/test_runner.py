"""The runner over an engine made by hand: what it asks of SGLang, and what becomes of the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from torchspec.backends.sglang.worker.plugin import ACCEPTED
from torchspec.backends.sglang.worker.runner import SglangError, SglangRunner, prompt_seed
from torchspec.core.errors import FeatureStoreError, TargetError, UnavailableError
from torchspec.core.interfaces.engine import CaptureRequest, ServedText, ServingCounters
from torchspec.core.models.images import refer_to_image
from torchspec.core.models.target_processor import TargetProcessor
from torchspec.core.workers.runner import Ask, Facts, WorkerSettings

FACTS = Facts(
    engine="sglang",
    engine_version="1",
    layers=4,
    hidden_size=8,
    itemsize=4,
    context=32,
    vocab_size=100,
    norm_state="post_norm",
    no_images=None,
)
SECONDS = 20.0


class Engine:
    """Answers with what `answer` makes of a request; None: never."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.tokenizer_manager = SimpleNamespace(abort_request=lambda rid: self.aborted.append(rid))
        self.answer: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda asked: None
        self.closed = False

    async def async_generate(self, **asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        answer = self.answer(asked)
        if answer is None:
            await asyncio.sleep(SECONDS)
            raise AssertionError("nobody ended the wait")
        return answer

    def shutdown(self) -> None:
        self.closed = True


def finished(tokens: list[int], reason: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"output_ids": tokens, "meta_info": {"finish_reason": reason or {"type": "length"}, **more}}


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., SglangRunner]]:
    made: list[SglangRunner] = []

    def run(**settings: Any) -> SglangRunner:
        given = {"target": Path("t"), "device": "cpu", "dtype": "auto", "taps": (1,)} | settings
        made.append(SglangRunner(engine, WorkerSettings(**given), FACTS))
        return made[-1]

    yield run
    for runner in made:
        runner.close()
        assert not runner._thread.is_alive()
    assert engine.closed == bool(made)
    engine.loop.close()


def captured(runner: SglangRunner, record_id: str, ids: list[int]) -> Future[None]:
    (future,) = runner.capture([CaptureRequest(record_id=record_id, input_ids=ids)])
    return future


def ask(**changes: Any) -> Ask:
    given: dict[str, Any] = {"input_ids": [5, 6], "max_new_tokens": 4, "temperature": 0.0, "seed": 0, "stop": ()}
    return Ask(**given | changes)


def test_capture_is_done_when_the_hook_says_so(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([1], hidden_states=[[float(len(asked["input_ids"]))]])
    runner = start()
    assert captured(runner, "a", [1, 2, 3]).result(SECONDS) is None
    assert captured(runner, "a", [1, 2, 3]).result(SECONDS) is None
    first, second = engine.asked
    assert first["rid"] != second["rid"]
    assert first["return_hidden_states"] is True
    assert first["sampling_params"]["max_new_tokens"] == 1


def test_sglangs_own_hidden_states_are_no_record(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([1], hidden_states=[[[0.5] * 8] * 3])
    with pytest.raises(UnavailableError, match="without torchspec's plug-in"):
        captured(start(), "a", [1, 2, 3]).result(SECONDS)


@pytest.mark.parametrize("kind", [ValueError, None])
def test_reasons_reach_the_client(
    engine: Engine, start: Callable[..., SglangRunner], kind: type[Exception] | None
) -> None:
    def answer(_: dict[str, Any]) -> dict[str, Any]:
        if kind is not None:
            raise kind("row 7 is not finite")
        return finished([], {"type": "abort", "message": "row 7 is not finite"})

    engine.answer = answer
    runner = start()
    with pytest.raises(FeatureStoreError, match="row 7 is not finite"):
        captured(runner, "a", [1]).result(SECONDS)
    with pytest.raises(SglangError, match="row 7 is not finite"):
        runner.write([ask()])[0].result(SECONDS)


@pytest.mark.parametrize("ids", [[], [100], [-1], [0] * 33])
def test_prompts_that_do_not_fit_are_never_asked(
    engine: Engine, start: Callable[..., SglangRunner], ids: list[int]
) -> None:
    runner = start()
    for future in (captured(runner, "a", ids), runner.write([ask(input_ids=ids)])[0]):
        with pytest.raises(SglangError, match="a prompt"):
            future.result(SECONDS)
    assert engine.asked == []


def test_text_goes_on_to_its_own_stop_tokens(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([7, 8], {"type": "stop", "matched": 8})
    runner = start()
    assert runner.write([ask(stop=(8, 9))])[0].result(SECONDS) == ServedText(tokens=(7, 8))
    with pytest.raises(SglangError, match="where nobody asked"):
        runner.write([ask(stop=(9,))])[0].result(SECONDS)
    with pytest.raises(SglangError, match="where nobody asked"):
        runner.write([ask()])[0].result(SECONDS)
    with_stop, _, without = (asked["sampling_params"] for asked in engine.asked)
    assert (with_stop["stop_token_ids"], with_stop["ignore_eos"]) == ([8, 9], False)
    assert without["ignore_eos"] is True


def test_text_ends_with_the_context(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([1])
    start().write([ask(input_ids=[1] * 30, max_new_tokens=50)])[0].result(SECONDS)
    assert engine.asked[0]["sampling_params"]["max_new_tokens"] == 2


def test_seeds_are_of_the_prompt(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([1])
    runner = start()
    asks = [
        ask(temperature=0.7, seed=seed, input_ids=ids)
        for seed, ids in ((1, [5, 6]), (1, [5, 6]), (2, [5, 6]), (1, [56]))
    ]
    for each in asks:
        runner.write([each])[0].result(SECONDS)
    seeds = [asked["sampling_params"]["sampling_seed"] for asked in engine.asked]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    assert all(0 <= prompt_seed(n, [n]) < 2**63 for n in range(50))


def test_rounds_are_counted(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    noted = iter([[None, 2, None, None, 0], [None, 3]])
    engine.answer = lambda asked: finished([1, 2, 3], **{ACCEPTED: next(noted)})
    runner = start(taps=(), draft=Path("d"), draft_length=3)
    assert runner.write([ask()])[0].result(SECONDS) == ServedText(
        tokens=(1, 2, 3), accepted=(2, 0), rounds=2, accepted_tokens=2
    )
    assert runner.write([ask()])[0].result(SECONDS).accepted == (3,)
    assert runner.counters() == ServingCounters(rounds=3, drafted=9, accepted=5, per_position=(2, 2, 1))
    runner.forget_counters()
    assert runner.counters() == ServingCounters(rounds=0, drafted=0, accepted=0, per_position=(0, 0, 0))


def test_one_token_needs_no_round(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    engine.answer = lambda asked: finished([1])
    runner = start(taps=(), draft=Path("d"), draft_length=3)
    assert runner.write([ask(max_new_tokens=1)])[0].result(SECONDS).rounds == 0
    engine.answer = lambda asked: finished([1, 2])  # the plug-in is not there
    assert runner.write([ask()])[0].result(SECONDS).accepted is None


def test_what_sglang_would_do_greedily_is_not_sampled(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    runner = start(taps=(), draft=Path("d"), draft_length=3)
    with pytest.raises(SglangError, match="greedily on a CPU"):
        runner.write([ask(temperature=0.5)])[0].result(SECONDS)
    with pytest.raises(FeatureStoreError, match="without layers to capture"):
        captured(runner, "a", [1]).result(SECONDS)


def test_given_up_work_is_taken_back(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    future = captured(start(), "a", [1, 2])
    wait_until(lambda: bool(engine.asked))
    assert future.cancel()
    wait_until(lambda: engine.aborted == [engine.asked[0]["rid"]])


def test_death_is_heard_by_all_who_wait(engine: Engine, start: Callable[..., SglangRunner]) -> None:
    runner = start()
    waiting = [captured(runner, "a", [1]), captured(runner, "b", [2])]
    wait_until(lambda: len(engine.asked) == 2)
    runner._end("its scheduler died")
    for future in (*waiting, captured(runner, "c", [3])):
        with pytest.raises(FeatureStoreError, match="SGLang has ended: its scheduler died"):
            future.result(SECONDS)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_a_processor_makes_of_images_goes_beside_the_ids(
    engine: Engine, start: Callable[..., SglangRunner], tiny_llava: Path, image_targets: ModuleType, tmp_path: Path
) -> None:
    """In the form with which SGLang leaves the ids as they are."""
    engine.answer = lambda asked: finished([1], hidden_states=[[float(len(asked["input_ids"]))]])
    runner = start(target=tiny_llava)
    images = tuple(
        refer_to_image(str(image_targets.picture(tmp_path / f"{seed}.png", seed, (28, 28)))) for seed in range(2)
    )
    ids = [9, 3, 3, 3, 3, 9, 3, 3, 3, 3]
    sample = CaptureRequest(record_id="s", input_ids=ids, images=images)
    runner.capture([sample])[0].result(SECONDS)
    runner.write([ask(input_ids=ids, images=images)])[0].result(SECONDS)
    captured(runner, "text", [1, 2]).result(SECONDS)
    expected = TargetProcessor.load(tiny_llava).inputs(ids, images)
    for asked in engine.asked[:2]:
        assert asked["input_ids"] == ids
        (made,) = asked["image_data"]
        assert made.pop("format") == "processor_output"
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], value) for name, value in expected.items())
        assert made["pixel_values"].shape == (2, 3, 28, 28)
    assert "image_data" not in engine.asked[2]
    assert runner.images.ids_of(images[0]) == [3] * 4

    (short,) = runner.capture([replace(sample, input_ids=ids[:-1])])
    with pytest.raises(TargetError, match="2 images take 8 tokens, the sample has 7"):
        short.result(SECONDS)
    image_targets.picture(Path(images[0].source), 9)
    with pytest.raises(TargetError, match="another one than when it was tokenised"):
        runner.capture([sample])[0].result(SECONDS)
    assert len(engine.asked) == 3
    runner.facts = replace(FACTS, no_images="it is blind")
    with pytest.raises(TargetError, match="it is blind"):
        runner.capture([sample])
