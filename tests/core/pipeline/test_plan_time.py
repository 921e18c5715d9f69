"""The plan's time: its arithmetic by hand, what it says in words, and what it says where it knows too little."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.config.accelerators import accelerators
from torchspec.core.config.load import load_config
from torchspec.core.config.recipes import shipped
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.report import DatasetSettings
from torchspec.core.data.rows import ChatRow, TextRow
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.pipeline import plan_rates
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.plan_rates import Range, Rates, given_rates, stated_rates
from torchspec.core.pipeline.plan_texts import RowSample, representative, sampled_texts
from torchspec.core.pipeline.plan_time import HOST_SECONDS, Work, about, disk_of, figures, time_plan

ROOT = Path(__file__).resolve().parents[3]

WORK = Work(
    tokens=Range(low=3e6, high=3e6),
    epoch_tokens=Range(low=1e6, high=1e6),
    epochs=3,
    steps=300,
    counted="counted exactly",
    draft=10e9,
    target=20e9,
    passes=600,
    draft_operators=1000,
    target_operators=500,
    parameters=10**8,
    feature_bytes=8192,
    target_bytes=16 * 10**9,
    ranks=4,
    engine_devices=2,
)
RATES = Rates(
    draft=Range(low=1e12, high=2e12), target=Range(low=2e12, high=4e12), memory=Range(low=1e12, high=2e12), how="given"
)

Configs = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configs:
    """configure("section.key=value", ...)"""

    def make(*overrides: str) -> RunConfig:
        (tmp_path / "data.jsonl").write_text("{}\n")
        values = {"target": {"path": "embedded"}, "data": {"train": [str(tmp_path / "data.jsonl")]}}
        return load_config(values={**values, "output": str(tmp_path / "run")}, overrides=overrides)[0]

    return make


def test_training_and_capture_by_hand(configure: Configs) -> None:
    plan = time_plan(configure(), WORK, RATES, on_host=False)
    assert plan.training is not None
    assert plan.capture is not None
    moved = 300 * 28 * 1e8 / 4
    assert plan.training.low == pytest.approx(3e6 * 10e9 / (2e12 * 4) + moved / 2e12)
    assert plan.training.high == pytest.approx(3e6 * 10e9 / (1e12 * 4) + moved / 1e12)
    assert plan.capture.low == pytest.approx(3e6 * 20e9 / (4e12 * 2))
    read = 600 * 4 * 16e9 / 2 / 1e12  # of each rank's passes, on two devices
    assert plan.capture.high == pytest.approx(max(3e6 * 20e9 / (2e12 * 2), read))


def test_runs_are_sums_or_the_longer_part_or_training_alone(configure: Configs) -> None:
    plans = {
        topology: time_plan(configure(f"pipeline.topology={topology}", *more), WORK, RATES, on_host=False)
        for topology, more in (
            ("inprocess", ()),
            ("colocated", ()),
            ("disaggregated", ()),
            ("offline", ("pipeline.features=features",)),
        )
    }
    for plan in plans.values():
        assert plan.run is not None
        assert plan.training is not None
        assert plan.capture is not None
        wanted = {
            "disaggregated": (max(plan.training.low, plan.capture.low), max(plan.training.high, plan.capture.high)),
            "offline": (plan.training.low, plan.training.high),
        }.get(plan.topology, (plan.training.low + plan.capture.low, plan.training.high + plan.capture.high))
        assert (plan.run.low, plan.run.high) == pytest.approx(wanted)
    assert plans["colocated"].bottleneck == "capture"
    assert plans["offline"].bottleneck is None
    stored, fresh = plans["offline"].capture, plans["inprocess"].capture
    assert stored is not None
    assert fresh is not None
    assert stored.low == pytest.approx(fresh.low / 3)  # once for all epochs


def test_a_run_that_is_done_has_no_step_left(configure: Configs) -> None:
    none = Range(low=0.0, high=0.0)
    plan = time_plan(configure(), replace(WORK, tokens=none, epochs=0, steps=0, passes=0), RATES, on_host=False)
    assert plan.verdict() == "no step is left"
    assert plan.lines()[:2] == ["time (estimate)", "  no step is left"]


def test_small_batches_wait_for_their_host(configure: Configs) -> None:
    fast = replace(RATES, draft=Range(low=1e18, high=1e18), target=Range(low=1e18, high=1e18), memory=None)
    plan = time_plan(configure(), WORK, fast, on_host=False)
    assert plan.training == Range(low=600 * 1000 * HOST_SECONDS[0], high=600 * 1000 * HOST_SECONDS[1])
    assert plan.capture == Range(low=600 * 500 * HOST_SECONDS[0], high=600 * 500 * HOST_SECONDS[1])


def test_ranks_of_a_cpu_share_it(configure: Configs) -> None:
    one, four = (
        time_plan(configure(), replace(WORK, ranks=ranks, engine_devices=ranks), RATES, on_host=True)
        for ranks in (1, 4)
    )
    assert one.training == four.training


def test_disk_of_checkpoints_and_features(configure: Configs) -> None:
    config = configure("train.keep_last=2", "train.checkpoint_every=100")
    features = "features, if `torchspec capture` stored them,"
    assert disk_of(config, WORK) == {"2 checkpoint(s)": 2 * 12 * 10**8, features: 10**6 * 8192}
    assert disk_of(config, replace(WORK, steps=50)) == {"1 checkpoint(s)": 12 * 10**8, features: 10**6 * 8192}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (11_200, 21_000, "about 3 to 6 h"),
        (7, 52, "less than a minute"),
        (700, 2_300, "about 11 to 39 min"),
        (45_000, 86_000, "about 12 to 24 h"),
        (172_800, 400_000, "about 2 to 5 days"),
        (0.0, 3.0, "less than a minute"),
        (0.0, 61.0, "about 0 to 61 s"),
    ],
)
def test_times_are_rounded_outwards(low: float, high: float, words: str) -> None:
    assert about(Range(low=low, high=high)) == words


def test_figures_are_no_more_exact_than_they_are() -> None:
    assert figures(66_432, 561_000) == "66,000 to 570,000"
    assert figures(3_812_000, 6_353_000) == "3.8 million to 6.4 million"
    assert figures(2.0e9, 2.04e9) == "2 billion to 2.1 billion"


def test_rates_are_parts_of_what_is_stated_and_given() -> None:
    h100 = accelerators()["h100"]
    plain = stated_rates("h100", draft_fp8=False, target_fp8=False)
    both = stated_rates("h100", draft_fp8=True, target_fp8=False)
    assert plain.draft.high < h100.bf16 * 1e12
    assert both.draft.low == plain.draft.low
    assert both.draft.high == pytest.approx(plain.draft.high * 1979 / 989)
    assert both.target == plain.target
    assert "989 TFLOP/s in bfloat16" in plain.how
    assert "h100 (device_name)" in plain.how
    given = given_rates(300)
    assert given.draft.low < given.draft.high < 300e12
    assert "300 TFLOP/s" in given.how


def test_the_table_of_accelerators_says_where_its_figures_are_from() -> None:
    for name, facts in accelerators().items():
        assert facts.source.startswith("https://"), name
        assert facts.fp8 is None or 1.9 < facts.fp8 / facts.bf16 < 2.1, name
        assert 0.5 < facts.bandwidth < 10, name


def test_an_unknown_accelerator_is_refused_with_those_there_are(configure: Configs) -> None:
    with pytest.raises(ConfigError) as caught:
        configure("device_name=h9000")
    assert "device_name" in str(caught.value)
    assert "h100" in str(caught.value)
    assert "device_tflops" in str(caught.value)


def test_a_plan_says_its_time(make_config: Any, tmp_path: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.epochs=3")
    plan = make_plan(config, provenance)
    assert plan.time.run is not None
    assert plan.time.work is not None
    assert plan.time.work.steps == plan.steps["total"]
    assert plan.time.work.counted == "13 of 13 rows were tokenised for this"
    assert plan.time.work.tokens.low == pytest.approx(3 * plan.time.work.epoch_tokens.low)
    assert plan.time.verdict() in plan.to_text()
    assert "measured" in plan.to_text()
    described = json.loads(json.dumps(plan.to_json()))["time"]
    assert described["run"]["low"] < described["run"]["high"]
    assert described["bottleneck"] in ("training", "capture")
    assert described["verdict"] == plan.time.verdict()


def test_what_is_done_already_takes_no_time(make_config: Any, tmp_path: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.epochs=2", "device_tflops=0.01")
    whole = make_plan(config, provenance)
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").write_text("{}")
    rest = make_plan(config, provenance)
    assert whole.time.work is not None
    assert rest.time.work is not None
    assert rest.time.work.steps == whole.time.work.steps - 4
    assert rest.time.work.tokens.low == pytest.approx(whole.time.work.tokens.low * rest.time.work.steps / 8)


def test_a_warm_up_as_long_as_the_run_is_noted(make_config: Any, tmp_path: Path) -> None:
    plan = make_plan(*make_config(tmp_path / "run", "train.warmup_steps=2000"))
    assert [note for note in plan.notes if "train.warmup_steps=2000 is as long as the whole run" in note]
    assert plan.steps["warm-up"] == plan.steps["total"]
    plan = make_plan(*make_config(tmp_path / "run", "train.warmup_steps=null", "train.warmup_ratio=0.015"))
    assert plan.steps["warm-up"] == 1
    assert not [note for note in plan.notes if "warm" in note]


def test_rates_of_ones_own_come_first(make_config: Any, tmp_path: Path) -> None:
    slow, fast = (
        make_plan(*make_config(tmp_path / "run", f"device_tflops={rate}"), Ranks(all=2, here=2)).time
        for rate in (1e-3, 1e-2)
    )
    assert slow.rates is not None
    assert slow.run is not None
    assert fast.run is not None
    assert "device_tflops" in slow.rates.how
    assert slow.run.high > fast.run.high


def test_what_a_target_writes_during_the_run_has_no_time(make_config: Any, tmp_path: Path) -> None:
    plan = make_plan(*make_config(tmp_path / "run", "on_policy.enabled=true", "draft.vocab_size=null"))
    assert plan.time.run is None
    assert "writes the answers" in plan.time.verdict()


def test_an_algorithm_that_wants_numbers_does_not_end_the_plan(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_flops(*_: Any, **__: Any) -> None:
        raise RuntimeError("wants numbers")

    monkeypatch.setattr("torchspec.core.pipeline.plan_work.step_flops", step_flops)
    plan = make_plan(*make_config(tmp_path / "run"))
    assert "cannot be counted: RuntimeError: wants numbers" in plan.time.verdict()


def test_a_plan_for_another_machine_takes_what_its_vendor_states(table: ModuleType, tmp_path: Path) -> None:
    known = table.plan_of("qwen3-0.6b", tmp_path)
    assert "rtx4090 (device_name)" in known["time"]["rates"]["how"]
    assert "accelerator" in "".join(known["time"]["notes"])
    unknown = table.plan_of("qwen3-0.6b", tmp_path, "device_name=null")
    assert unknown["time"]["run"] is None
    assert "device_name" in unknown["time"]["verdict"]
    assert "device_tflops" in unknown["time"]["verdict"]
    # Few rows: no warm-up beyond them.
    assert known["steps"]["warm-up"] < known["steps"]["total"]
    assert not [note for note in known["notes"] if "warm" in note]


def test_recipes_for_targets_follow_the_length_of_the_run() -> None:
    for name, path in shipped("targets").items():
        assert "warmup_steps" not in path.read_text(encoding="utf-8"), name


def chat(number: int, words: int) -> ChatRow:
    messages = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "because " * words})
    return ChatRow(sample_id=f"s{number}", file=Path("f"), line=number, messages=messages, tools=None)


def test_few_rows_stand_for_all(tiny_target: Path) -> None:
    tokenizer, rows = load_tokenizer(tiny_target), RowSample(size=20)
    every = [chat(number, 1 + number % 30) for number in range(300)]
    for row in every:
        rows.look(row)
    reading = DatasetSettings(max_length=512)
    found = sampled_texts(rows, tokenizer, reading)
    whole = RowSample(size=300)
    for row in every:
        whole.look(row)
    exact = sampled_texts(whole, tokenizer, reading)
    assert found is not None
    assert exact is not None
    assert len(found.samples) == 20
    assert exact.tokens.low == exact.tokens.high
    assert found.tokens.low < exact.tokens.low < found.tokens.high
    assert "20 of 300 rows" in found.counted
    cut = sampled_texts(whole, tokenizer, DatasetSettings(max_length=40))
    assert cut is not None
    assert max(sample.input_ids_T.numel() for sample in cut.samples) == 40


def test_a_row_is_as_likely_as_any_other_to_be_looked_at() -> None:
    rows = RowSample(size=100)
    for number in range(1000):
        rows.look(chat(number, 1))
    places = [row.line for row in rows.rows]
    assert len(set(places)) == 100
    assert abs(sum(places) / 100 - 500) < 3 * 1000 / math.sqrt(12 * 100)


def test_without_a_tokenizer_characters_count() -> None:
    rows = RowSample()
    rows.look(TextRow(sample_id="a", file=Path("f"), line=1, text="x" * 600))
    rows.look(chat(1, 75))  # 600 characters of answer, 4 of question
    found = sampled_texts(rows, None, DatasetSettings(max_length=2048))
    assert found is not None
    assert found.tokens.low == pytest.approx(1204 / 5, rel=0.01)
    assert found.tokens.high == pytest.approx(1204 / 3, rel=0.01)
    taught = [int(sample.loss_mask_T.sum()) for sample in found.samples]
    assert 0 < taught[1] < found.samples[1].input_ids_T.numel()
    assert "without a tokenizer" in found.counted
    assert sampled_texts(RowSample(), None, DatasetSettings()) is None


def test_counted_samples_are_of_mean_length_in_their_half() -> None:
    def of(length: int) -> TrainingSample:
        mask_T = torch.ones(length, dtype=torch.bool)
        return TrainingSample(
            sample_id=str(length), input_ids_T=torch.zeros(length, dtype=torch.int64), loss_mask_T=mask_T
        )

    found = representative([of(length) for length in (5, 90, 1, 3, 100, 98)])
    assert [sample.input_ids_T.numel() for sample in found] == [3, 98]
    assert [sample.input_ids_T.numel() for sample in representative([of(7)])] == [7]


def test_a_matrix_that_no_memory_holds_is_measured_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rates, "MOST_WIDTH", 32)
    monkeypatch.setattr(plan_rates, "MOST_WEIGHTS", 32 * 16)
    seen: list[torch.Size] = []

    def fastest(device: object, work: Any) -> float:
        seen.append(work.args[1].shape)
        return 1.0

    monkeypatch.setattr(plan_rates, "_fastest", fastest)
    device: Any = None
    speed = plan_rates._products(device, torch.device("cpu"), [(10**9, 10**9), (8, 16)], 4, torch.float32)
    assert seen == [(32, 16), (16, 8)]
    whole = 10**18
    assert speed == pytest.approx(2 * 4 * (whole + 128) / (whole / 512 + 1))
