"""Capture once, train many times: the same losses to the last bit, and nothing lost, mixed up or taken on trust."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError, FeatureStoreError, TargetError
from torchspec.core.features.manifest import Manifest
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import Captured, FeatureSink
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.pipeline import capture as capturing
from torchspec.core.pipeline.capture import CaptureOutcome, capture
from torchspec.core.pipeline.capture_config import captured_config
from torchspec.core.pipeline.capture_groups import cut_of
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.preflight import check

SAMPLES = 13
Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: Any) -> Make:
    def made(output: Path, *words: str, **values: Any) -> RunConfig:
        config, _ = make_config(output, "data.validation=[]", "data.max_length=64", *words, **values)
        return config

    return made


@pytest.fixture
def features(make: Make, tmp_path: Path) -> Path:
    """A finished capture."""
    return capture(make(tmp_path / "features")).directory


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


def figures(run: Path) -> list[Any]:
    names = ("loss", "grad_norm", "tokens", "samples", "accuracy_per_position")
    return [[row[name] for name in names] for row in rows(run)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Asked:
    """An engine, and what it is asked for together: the ids of each sample."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    groups: ClassVar[list[list[list[int]]]] = []

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        self.groups.append([list(request.input_ids) for request in batch])
        found: list[Captured] = self.inner.capture(batch, taps, sink)
        return found

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    load, groups = registry.load_engine, []
    monkeypatch.setattr(registry, "load_engine", lambda *arguments: Asked(load(*arguments)))
    monkeypatch.setattr(Asked, "groups", groups)
    return groups


def offline(directory: Path) -> tuple[str, str]:
    return "pipeline.topology=offline", f"pipeline.features={directory}"


@pytest.mark.parametrize("cut", [(), ("train.tokens_per_rank=90",)], ids=["padded", "packed"])
def test_training_on_captured_features_is_training_beside_the_target(
    make: Make, tmp_path: Path, asked: list[list[list[int]]], cut: tuple[str, ...]
) -> None:
    """To the last bit, in the epoch whose groups were captured; close to it in the others."""
    if cut:  # with it a micro-batch has no number of samples
        values = {"train": {"batch_size": 4, "warmup_steps": 1}}
        made: Make = lambda output, *words: make(output, *cut, *words, **values)  # noqa: E731
    else:
        made = make
    outcome = capture(made(tmp_path / "features"))
    assert (outcome.samples, outcome.captured, outcome.kept, outcome.quarantined) == (SAMPLES, SAMPLES, 0, 0)
    before, captured = contents(tmp_path / "features"), asked[:]
    asked.clear()
    train(made(tmp_path / "inside", "train.epochs=2"), provenance={})
    probe, trained = asked[0], asked[1:]
    assert len(probe) == 1
    assert trained[: len(captured)] == captured
    assert max(map(len, captured)) > 1
    train(made(tmp_path / "outside", "train.epochs=2", *offline(outcome.directory)), provenance={})
    inside, outside = figures(tmp_path / "inside"), figures(tmp_path / "outside")
    assert len(outside) == len(inside) == 8
    assert outside[:4] == inside[:4]
    for mine, others in zip(outside[4:], inside[4:], strict=True):
        for value, other in zip(mine, others, strict=True):
            assert value == pytest.approx(other, rel=1e-5)
    probes = [load_file(tmp_path / run / "probe.safetensors") for run in ("inside", "outside")]
    assert probes[0].keys() == probes[1].keys()
    assert (tmp_path / "outside" / "draft" / "model.safetensors").is_file()
    assert contents(tmp_path / "features") == before, "the records are there for the next training"


@pytest.mark.slow
def test_two_ranks_that_share_sequences(make: Make, tmp_path: Path, tiny_target: Path, conversations: Path) -> None:
    """To the last bit: the groups are those that the two would capture."""
    words = ["parallel.ulysses=2", "data.max_length=64", "data.validation=[]"]
    directory = capture(make(tmp_path / "features", *words[:1])).directory
    values = {
        "device": "cpu", "target": {"path": str(tiny_target)},
        "data": {"train": [str(conversations / "train.jsonl")], "cache_dir": str(tmp_path / "cache")},
        "train": {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1},
        "draft": {"unroll": 3, "vocab_size": 100},
    }  # fmt: skip
    for name, topology in (("inside", ()), ("outside", offline(directory))):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / name)}))
        command = [sys.executable, "-m", "torchspec", "train", "--config", str(tmp_path / "run.yaml"), "--nproc", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*command, *words, *topology], env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    inside, outside = figures(tmp_path / "inside"), figures(tmp_path / "outside")
    assert len(inside) == len(outside) == 4
    assert outside == inside


def test_a_capture_killed_anywhere_goes_on_to_the_same_directory(make: Make, tmp_path: Path) -> None:
    config = make(tmp_path / "features")
    (tmp_path / "values.json").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    worker = Path(__file__).with_name("capture_worker.py")
    command = [sys.executable, str(worker), str(tmp_path / "values.json"), "0", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["killed"] >= 3, said
    made, expected = contents(tmp_path / "features"), contents(tmp_path / "features-undisturbed")
    assert made.keys() == expected.keys()
    assert len([name for name in made if name.endswith(".safetensors")]) == SAMPLES
    assert made == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_capture_and_the_same_call_goes_on(make: Make, tmp_path: Path, number: signal.Signals) -> None:
    told: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == capturing.STAGE:
            told.append(done)
            if len(told) == 3:
                os.kill(os.getpid(), number)

    config = make(tmp_path / "features")
    stopped = capture(config, progress=progress)
    assert (stopped.signal, stopped.exit_code) == (number, 128 + number)
    assert 0 < stopped.captured < SAMPLES
    assert not (tmp_path / "features" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="has not finished: give the same `torchspec capture` command again"):
        train(make(tmp_path / "run", *offline(stopped.directory)), provenance={})
    finished = capture(config, progress=progress)
    assert (finished.captured, finished.kept, finished.signal) == (SAMPLES, stopped.captured, 0)
    assert told == sorted(told[:4]) + sorted(told[4:]) or told[-1] == max(told)
    undisturbed = capture(make(tmp_path / "undisturbed"))
    assert contents(finished.directory) == contents(undisturbed.directory)


def test_a_finished_capture_is_left_as_it_is(make: Make, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loads no engine."""
    before = {path.name: path.stat().st_mtime_ns for path in features.iterdir() if path.name != ".lock"}
    monkeypatch.setattr(capturing.registry, "load_engine", lambda *arguments: pytest.fail("an engine was loaded"))
    again = capture(make(features))
    assert (again.captured, again.kept) == (SAMPLES, SAMPLES)
    assert {path.name: path.stat().st_mtime_ns for path in features.iterdir() if path.name != ".lock"} == before


def test_a_flipped_bit_is_a_hole_in_training_and_made_again_by_a_capture(
    make: Make, features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, record = contents(features), features / "00000007.features.safetensors"
    record.write_bytes(flipped(record.read_bytes(), -9))
    train(make(tmp_path / "run", *offline(features)), provenance={})
    lost = {name: why for row in rows(tmp_path / "run") for name, why in row.get("quarantined", {}).items()}
    assert list(lost) == ["c7"]
    assert "record 00000007" in lost["c7"]
    assert rows(tmp_path / "run")[-1]["samples"] == SAMPLES - 1

    with caplog.at_level("WARNING", logger="torchspec"):
        again = capture(make(features))
    assert "it is captured again" in caplog.text
    assert (again.captured, again.kept) == (SAMPLES, SAMPLES - 1)
    assert contents(features) == before


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 16
    return bytes(changed)


def test_other_features_are_refused_with_every_difference(
    make: Make, features: Path, tmp_path: Path, tiny_llama: Path, conversations: Path
) -> None:
    """By a training before anything is loaded, and by a capture, which leaves them as they are."""
    fewer = tmp_path / "train.jsonl"
    fewer.write_text("".join((conversations / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    data = {"data": {"train": [str(fewer)], "cache_dir": str(tmp_path / "cache")}}
    before = contents(features)
    cases: list[tuple[tuple[str, ...], dict[str, Any], list[str]]] = [
        (("draft.taps=[0, 3, 5]",), {}, ["taps: the features have [1, 3, 4], this run [0, 3, 5]"]),
        (("target.dtype=bfloat16",), {}, ["dtype: the features have 'float32', this run 'bfloat16'"]),
        (("data.max_length=32",), {}, ["data.settings.max_length: the features have 64, this run 32"]),
        ((), {"target": {"path": str(tiny_llama)}}, ["target.weights: ", "target.architecture: "]),
        ((), data, ["data.files.1 (train.jsonl): "]),
        (("draft.taps=[0, 3, 5]", "target.dtype=bfloat16"), data, ["taps: ", "dtype: ", "data.files.1 "]),
    ]
    for words, values, differences in cases:
        with pytest.raises(ConfigError) as refused:
            train(make(tmp_path / "run", *words, *offline(features), **values), provenance={})
        assert [problem.field for problem in refused.value.problems] == ["pipeline.features"]
        with pytest.raises(FeatureStoreError) as unwanted:
            capture(make(features, *words, **values))
        for said in (str(refused.value), str(unwanted.value)):
            for difference in differences:
                assert difference in said
        assert not (tmp_path / "run").exists()
    with pytest.raises(FeatureStoreError, match=r"captured.seed: the features have 0, this run 1"):
        capture(make(features, "seed=1"))
    assert contents(features) == before


def test_settings_that_mean_nothing_without_an_engine_are_refused_by_name(
    make: Make, features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        train(
            make(
                tmp_path, *offline(features), "engine.call_timeout=3", "target.tensor_parallel=2", "pipeline.engines=1"
            ),
            provenance={},
        )
    named = {problem.field for problem in refused.value.problems}
    assert {"engine.call_timeout", "target.tensor_parallel", "pipeline.engines"} <= named
    with pytest.raises(ConfigError, match=r"pipeline.features: a directory of captured features is needed"):
        train(make(tmp_path, "pipeline.topology=offline"), provenance={})
    with pytest.raises(ConfigError, match=r"pipeline.features: means nothing with pipeline.topology=inprocess"):
        train(make(tmp_path, f"pipeline.features={features}"), provenance={})
    with pytest.raises(ConfigError, match="no such directory"):
        train(make(tmp_path, *offline(tmp_path / "nowhere")), provenance={})


def test_a_capture_takes_no_directory_of_something_else(make: Make, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(FeatureStoreError, match=r"holds thesis.txt, and no capture to go on with"):
        capture(make(tmp_path / "used"))
    assert (tmp_path / "used" / "thesis.txt").read_text() == "mine"


Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_a_manifest_never_outlives_what_it_promises(
    make: Make, features: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """Though nothing could be made again."""
    record = features / "00000007.features.safetensors"
    content = record.read_bytes()
    record.unlink()
    if harm == "damaged":
        record.write_bytes(flipped(content, -9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(total=0, used=0, free=0))
    with pytest.raises(FeatureStoreError, match="name an output with more room"):
        capture(make(features))
    assert not (features / "manifest.json").exists()
    with pytest.raises(FeatureStoreError, match="has not finished"):
        Manifest.load(features)


def test_a_disk_without_room_is_known_before_anything_is_captured(
    make: Make, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is expected is what comes."""
    needed = Manifest.load(features).nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(total=0, used=0, free=int(0.9 * needed)))
    with pytest.raises(FeatureStoreError, match=r"name an output with more room") as refused:
        capture(make(tmp_path / "other"))
    assert f"{SAMPLES} samples" in str(refused.value)
    assert not list((tmp_path / "other").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(total=0, used=0, free=int(1.1 * needed)))
    with caplog.at_level("INFO", logger="torchspec"):
        assert capture(make(tmp_path / "other")).nbytes == needed
    assert f"{needed / 1e9:.3f} GB of features expected" in caplog.text


def test_a_disk_that_is_full_loses_nothing(make: Make, features: Path, tmp_path: Path) -> None:
    """The largest records don't fit: those before are kept, and the same call goes on when there is room."""
    sizes = sorted(path.stat().st_size for path in features.glob("*.safetensors"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-3] - 1, limits[1]))
    try:
        with pytest.raises(FeatureStoreError, match="the same command goes on with the others") as full:
            capture(make(tmp_path / "other"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there = list((tmp_path / "other").glob("*.safetensors"))
    assert f"{len(there)} of {SAMPLES} samples are captured and stay" in str(full.value)
    assert len(there) < SAMPLES
    assert not list((tmp_path / "other").glob(".0*")), "a torn record"
    outcome = capture(make(tmp_path / "other"))
    assert (outcome.captured, outcome.kept) == (SAMPLES, len(there))
    assert contents(tmp_path / "other") == contents(features)


@pytest.fixture
def odd_target(tiny_target: Path, tmp_path: Path, conversations: Path) -> Path:
    """The tiny target, with no finite state for a word that few conversations hold."""
    from torchspec.core.data.tokenizer import load_tokenizer

    directory = tmp_path / "odd"
    shutil.copytree(tiny_target, directory)
    token = load_tokenizer(tiny_target)("xylophone")["input_ids"][0]
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_every_row_of_data_is_accounted_for(
    make: Make, tmp_path: Path, odd_target: Path, conversations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (conversations / "train.jsonl").read_text().splitlines()
    odd = [{"role": "user", "content": "xylophone"}, {"role": "assistant", "content": "the value"}]
    mute = [{"role": "user", "content": "the"}, {"role": "assistant", "content": ""}]
    lines[3:3] = [json.dumps({"id": "odd", "messages": odd}), "no JSON", json.dumps({"id": "mute", "messages": mute})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "target": {"path": str(odd_target)},
        "data": {
            "train": [str(tmp_path / "data.jsonl")], "cache_dir": str(tmp_path / "cache"), "min_supervised_tokens": 3,
        },
    }  # fmt: skip
    outcome = capture(make(tmp_path / "features", **values))
    manifest = Manifest.load(outcome.directory)
    samples = len(manifest.checksums)
    assert (outcome.captured, outcome.quarantined) == (samples - 1, 1)
    assert (manifest.rows["read"], manifest.rows["filtered"], manifest.rows["bad_count"]) == (16, 1, 1)
    assert samples == 14
    (index,) = manifest.lost
    assert (index, manifest.lost[index].sample_id) == (3, "odd")
    assert "not finite" in manifest.lost[index].reason
    records = list(outcome.directory.glob("*.safetensors"))
    assert len(records) == 13
    assert manifest.nbytes == outcome.nbytes == sum(path.stat().st_size for path in records)

    before = contents(outcome.directory)
    again = capture(make(tmp_path / "features", **values))
    assert (again.captured, again.kept, again.quarantined) == (13, 13, 1), "what could not be captured is tried again"
    assert contents(outcome.directory) == before
    train(make(tmp_path / "run", *offline(outcome.directory), **values), provenance={})
    lost = {name: why for row in rows(tmp_path / "run") for name, why in row.get("quarantined", {}).items()}
    assert lost == {"odd": f"not captured: {manifest.lost[3].reason}"}


def test_a_target_that_captures_nothing_is_an_error(make: Make, tmp_path: Path, odd_target: Path) -> None:
    weights = load_file(odd_target / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = torch.nan
    save_file(weights, odd_target / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match="4 samples could not be captured so far and 0 could"):
        capture(make(tmp_path / "features", target={"path": str(odd_target)}))


def test_what_a_training_needs_and_a_capture_does_not_may_stand_in_its_configuration(
    make: Make, features: Path, tmp_path: Path
) -> None:
    """It makes no difference to the features."""
    words = (
        "train.epochs=7", "train.offload=states", "train.memory_gb=0.001", "parallel.exchange=auto", "eval.every=3",
        "target.tensor_parallel=4", "engine.call_timeout=9", "pipeline.topology=offline", "pipeline.features=/nowhere",
        "draft.init_from=/nowhere", "precision.compute=bfloat16",
    )  # fmt: skip
    outcome: CaptureOutcome = capture(make(tmp_path / "other", *words))
    assert contents(outcome.directory) == contents(features)


def test_packed_groups_are_cut_as_the_trainers(make: Make, tmp_path: Path) -> None:
    """Of three ranks that will share rows; what a document costs decides which row it comes into."""
    values = {"train": {"batch_size": 4}}
    config = make(tmp_path, "train.tokens_per_rank=30", "parallel.ring=3", **values)
    checked = check(captured_config(config), Ranks())
    cut = cut_of(checked)
    draft = checked.algorithm.build_draft(
        VocabularyMap(ids_N=torch.arange(100), target_size=checked.target.vocab_size),
        load_target_head(checked.target.path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False),
    )
    trained = sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
    assert (cut.row_tokens, cut.equal_length) == (90, trained / checked.target.hidden_size)


def test_a_missing_record_is_made_in_the_group_it_was_made_in(
    make: Make, features: Path, asked: list[list[list[int]]], tmp_path: Path
) -> None:
    """Alone it might be rounded otherwise; and nothing else is captured again."""
    before = contents(features)
    capture(make(tmp_path / "other"))
    groups = asked[:]
    asked.clear()
    for name in ("manifest.json", "00000003.features.safetensors"):
        (features / name).unlink()
    capture(make(features))
    ids = load_file(tmp_path / "other" / "00000003.features.safetensors")["input_ids"].tolist()
    assert asked == [group for group in groups if ids in group]
    assert len(asked[0]) == 2
    assert contents(features) == before


def test_two_captures_do_not_write_to_one_directory(make: Make, features: Path) -> None:
    from torchspec.core.pipeline.capture_directory import opened

    with opened(features), pytest.raises(FeatureStoreError, match="another capture is writing"):
        capture(make(features))
