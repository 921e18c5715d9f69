"""Each adapter against its package's recorded signatures (recorded.json); TensorBoard against the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchspec.core import registry
from torchspec.core.interfaces.tracker import TrackedRun
from torchspec.core.trackers import packages

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())
Calls = list[tuple[str, dict[str, Any]]]


class Fake:
    """A package, or an object of it: every call must fit what was recorded, and is kept."""

    def __init__(self, package: str, prefix: str = "", answers: Mapping[str, Any] | None = None) -> None:
        self._package, self._prefix, self._answers = package, prefix, dict(answers or {})
        self.calls: Calls = []

    def __getattr__(self, name: str) -> Any:
        path = f"{self._prefix}{name}"
        known = RECORDED[self._package].get(path)
        assert known is not None, f"{self._package} has no {path} that was recorded"

        def call(*given: Any, **named: Any) -> Any:
            assert len(given) <= len(known)
            values = {**dict(zip(known, given, strict=False)), **named}
            assert set(values) <= set(known), f"{path} does not take {sorted(set(values) - set(known))}"
            self.calls.append((path, values))
            answer = self._answers.get(name)
            return answer(**values) if callable(answer) else answer

        return call

    def named(self, path: str) -> list[dict[str, Any]]:
        return [values for name, values in self.calls if name == path]


def run(tmp_path: Path, *, step: int = 0, lr: float = 0.001) -> TrackedRun:
    return TrackedRun(
        id="0123456789abcdef",
        name="mine",
        project=None,
        step=step,
        directory=tmp_path,
        config={"train.lr": lr},
        environment={"torch": "2.13"},
    )


def opened(name: str, told: TrackedRun) -> Any:
    return registry.trackers().spec(name).open(told)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    made = ModuleType(name)
    vars(made).update(values)
    monkeypatch.setitem(sys.modules, name, made)


def test_the_four_are_entry_points_and_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mlflow", "tensorboard", "trackio", "wandb")
    assert set(names) <= set(registry.trackers().names())
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for name in names:
        found = registry.probe(registry.trackers().spec(name))
        assert (found.ok, found.hint) == (False, f'pip install "torchspec[{name}]"')


def test_tensorboard_hides_what_a_resumed_run_tells_again(tmp_path: Path) -> None:
    first = opened("tensorboard", run(tmp_path))
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0 / step})
    first.close()
    second = opened("tensorboard", run(tmp_path, step=2))
    second.log(3, {"train/loss": 9.0})
    second.results({"acceptance_length": 2.5, "hardware": "cpu"})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [(event.step, event.value) for event in events.Scalars("results/acceptance_length")] == [(3, 2.5)]
    assert {"config/text_summary", "environment/text_summary", "results/text_summary"} <= set(events.Tags()["tensors"])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    followed = Fake("wandb", "Run.")
    followed.summary = {}  # type: ignore[misc]
    package = Fake("wandb", answers={"init": lambda **_: followed, "Settings": lambda **values: values})
    package.followed = followed  # type: ignore[misc]
    chosen = SimpleNamespace(mode="online", api_key=None, base_url="https://w.example")
    package.chosen = chosen  # type: ignore[misc]
    setup = SimpleNamespace(settings=chosen)
    module(monkeypatch, "wandb", init=package.init, Settings=package.Settings, setup=lambda: setup)
    return package


def test_wandb_goes_on_with_the_run_and_keeps_steps_as_a_figure(
    wandb: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "drafts")
    tracker = opened("wandb", run(tmp_path, step=2))
    (begun,) = wandb.named("init")
    assert (begun["id"], begun["resume"], begun["project"]) == ("0123456789abcdef", "allow", "drafts")
    assert begun["dir"] == str(tmp_path)
    assert begun["config"] == {"train.lr": 0.001, "environment.torch": "2.13"}
    assert begun["settings"]["console"] == "off"
    assert begun["settings"]["x_disable_meta"] is True
    tracker.log(3, {"train/loss": 0.5})
    tracker.results({"acceptance_length": 2.5})
    tracker.close()
    assert wandb.followed.named("Run.log") == [{"data": {"step": 3, "train/loss": 0.5}}]
    assert {"name": "*", "step_metric": "step"} in wandb.followed.named("Run.define_metric")
    assert wandb.followed.summary == {"results/acceptance_length": 2.5}
    assert wandb.followed.calls[-1][0] == "Run.finish"


def test_wandb_asks_for_an_account_before_the_run(wandb: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.trackers().spec("wandb")
    monkeypatch.setattr("torchspec.core.trackers.wandb.installed", lambda name: packages.Availability(ok=True))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = registry.probe(spec)
    assert not found.ok
    assert "wandb login" in found.hint
    (tmp_path / "netrc").write_text("machine w.example login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert registry.probe(spec).ok
    (tmp_path / "netrc").unlink()
    wandb.chosen.mode = "offline"
    assert registry.probe(spec).ok
    wandb.chosen.mode = "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert registry.probe(spec).ok


def mlflow(monkeypatch: pytest.MonkeyPatch, known: list[Any]) -> Fake:
    def found(**values: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="its own"), data=SimpleNamespace(params={}))

    answers = {"create_experiment": lambda **_: "7", "search_runs": lambda **_: known, "create_run": found}
    client = Fake("mlflow", "MlflowClient.", answers)
    entities = Fake("mlflow", "entities.", {name: lambda **values: values for name in ("Metric", "Param", "RunTag")})
    module(monkeypatch, "mlflow", MlflowClient=lambda: client)
    module(
        monkeypatch, "mlflow.entities", Metric=entities.Metric, Param=entities.Param, RunTag=entities.RunTag
    )  # fmt: skip
    return client


def test_mlflow_begins_a_run_and_finds_it_again_by_our_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow(monkeypatch, [])
    tracker = opened("mlflow", run(tmp_path))
    assert client.named("MlflowClient.search_runs")[0]["filter_string"] == "tags.`torchspec.run` = '0123456789abcdef'"
    (made,) = client.named("MlflowClient.create_run")
    assert made == {"experiment_id": "7", "tags": {"torchspec.run": "0123456789abcdef"}, "run_name": "mine"}
    tracker.log(3, {"train/loss": 0.5})
    tracker.results({"acceptance_length": 2.5, "hardware": "cpu"})
    tracker.close()
    told = [each for call in client.named("MlflowClient.log_batch") for each in call.get("params", [])]
    assert {"key": "train.lr", "value": "0.001"} in told
    (metric,) = [each for call in client.named("MlflowClient.log_batch") for each in call.get("metrics", [])]
    assert (metric["key"], metric["value"], metric["step"]) == ("train/loss", 0.5, 3)
    assert client.named("MlflowClient.set_tag")[0]["value"] == "cpu"
    assert client.calls[-1][0] == "MlflowClient.set_terminated"

    earlier = SimpleNamespace(
        info=SimpleNamespace(run_id="its own"),
        data=SimpleNamespace(params={"train.lr": "0.001", "environment.torch": "2.13"}),
    )
    client = mlflow(monkeypatch, [earlier])
    opened("mlflow", run(tmp_path, step=2, lr=0.002))
    assert client.named("MlflowClient.create_run") == []
    assert client.named("MlflowClient.update_run") == [{"run_id": "its own", "status": "RUNNING"}]
    (changed,) = client.named("MlflowClient.log_batch")
    assert changed["tags"] == [{"key": "now.train.lr", "value": "0.002"}]


def test_trackio_goes_on_by_name_in_private_and_leaves_stdout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed = Fake("trackio", "Run.")

    def init(**_: Any) -> Fake:
        vars(sys.modules["trackio"])["print"]("* Trackio project initialized")
        return followed

    package = Fake("trackio", answers={"init": init})
    module(monkeypatch, "trackio", init=package.init)
    tracker = opened("trackio", run(tmp_path))
    (begun,) = package.named("init")
    assert (begun["name"], begun["resume"], begun["private"]) == ("mine-01234567", "allow", True)
    assert begun["project"] == "torchspec"
    tracker.log(3, {"train/loss": 0.5})
    tracker.results({"acceptance_length": 2.5})
    tracker.close()
    assert followed.named("Run.log") == [
        {"metrics": {"train/loss": 0.5}, "step": 3},
        {"metrics": {"results/acceptance_length": 2.5}, "step": 3},
    ]
    assert followed.calls[-1][0] == "Run.finish"
    assert capsys.readouterr().out == ""
