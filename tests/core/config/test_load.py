"""Merging, provenance, and every mistake reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from torchspec.core import registry
from torchspec.core.config.dump import to_yaml
from torchspec.core.config.fields import choices, sections, settings, type_text
from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig, run_schema
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.objectives.terms import Ramp

REQUIRED = {"target.path": "embedded", "data.train": ["train.jsonl"], "output": "runs/a"}


def full_schema() -> type[RunConfig]:
    return run_schema(registry.algorithms().spec("eagle3").options)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(**arguments: object) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(probe=False, **arguments)  # type: ignore[arg-type]
    found = caught.value.problems
    assert len({problem.field for problem in found}) == len(found), found
    return {problem.field: problem for problem in found}


def test_each_layer_wins_over_the_one_below_and_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "# a recipe\ntrain:\n  lr: 2e-4\n  batch_size: 4\n\ndraft:\n  unroll: 3\nseed: 7\n")
    config, source = load_config(
        file=file, flags=REQUIRED, overrides=["train.batch_size=6", "draft.taps=[1, 3, 4]"], probe=False
    )
    assert (config.train.lr, config.train.batch_size, config.train.epochs) == (2e-4, 6, 1)
    assert (config.draft.unroll, config.draft.taps, config.seed) == (3, (1, 3, 4), 7)
    assert config.data.train == [Path("train.jsonl")]
    assert source["train.lr"] == "run.yaml:3"
    assert source["draft.unroll"] == "run.yaml:7"
    assert source["seed"] == "run.yaml:8"
    assert source["train.batch_size"] == source["draft.taps"] == source["output"] == "command line"
    assert source["train.epochs"] == "default"
    assert set(source) == set(settings(full_schema()))


def test_python_values_stand_between_file_and_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {lr: 1, epochs: 2, batch_size: 3}\n")
    config, source = load_config(
        file=file, values={"train": {"epochs": 5, "lr": 0.5}}, flags=REQUIRED, overrides=["train.lr=0.25"], probe=False
    )
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (0.25, 5, 3)
    assert (source["train.epochs"], source["train.batch_size"]) == ("python", "run.yaml:1")


@pytest.mark.parametrize(
    ("word", "path", "expected"),
    [
        ("train.lr=1e-3", ("train", "lr"), 1e-3),
        ("train.lr=.5", ("train", "lr"), 0.5),
        ("train.clip_norm=null", ("train", "clip_norm"), None),
        ("train.clip_norm=", ("train", "clip_norm"), None),
        ("train.betas=[0.8, 0.9]", ("train", "betas"), (0.8, 0.9)),
        ("target.trust_remote_code=true", ("target", "trust_remote_code"), True),
        ("data.validation=[a.jsonl, b c.jsonl]", ("data", "validation"), [Path("a.jsonl"), Path("b c.jsonl")]),
        ("data.cache_dir=2026-01-02", ("data", "cache_dir"), Path("2026-01-02")),
        ("eval={samples: 3}", ("eval", "samples"), 3),
        ("data.cache_dir=a=b", ("data", "cache_dir"), Path("a=b")),
    ],
)
def test_override_values_are_yaml(word: str, path: tuple[str, str], expected: object) -> None:
    config, _ = load_config(flags=REQUIRED, overrides=[word], probe=False)
    assert getattr(getattr(config, path[0]), path[1]) == expected


def test_a_setting_that_is_a_mapping_is_given_whole_or_by_entry(tmp_path: Path) -> None:
    file = write(tmp_path, "draft:\n  objective: {kl: 1.0}\n")
    config, source = load_config(file=file, flags=REQUIRED, probe=False)
    assert config.draft.objective == {"kl": 1.0}
    assert source["draft.objective"] == "run.yaml:2"
    config, source = load_config(file=file, flags=REQUIRED, overrides=["draft.objective.tv=0.5"], probe=False)
    assert config.draft.objective == {"kl": 1.0, "tv": 0.5}
    assert source["draft.objective"] == "run.yaml:2, command line"
    found = problems(flags=REQUIRED, overrides=["draft.objective.tvv=1"])["draft.objective"]
    assert (found.message, found.value) == ("no such entry (command line)", "tvv")
    assert found.choices[:2] == ("cross_entropy", "kl")
    assert found.remedy == "did you mean tv?"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["draft.objective.kl=-1"], {"kl": -1}),
        (["draft.objective.kl=x"], {"kl": "x"}),
        (["draft.objective.tv.start=0"], {"tv": {"start": 0}}),
        (["draft.objective.tv.begin=0"], {"tv": {"begin": 0}}),
        (["draft.objective.tv=0.5", "draft.objective.tv.end=1"], {"tv": {"end": 1}}),
        (["draft.objective={kl: 1, tv: {start: 0, end: -1}}"], {"tv": {"start": 0, "end": -1}}),
    ],
)
def test_an_entry_is_refused_once_whole_and_by_its_name(words: list[str], value: dict[str, object]) -> None:
    (found,) = problems(flags=REQUIRED, overrides=words).values()
    ((name, given),) = value.items()
    assert (found.field, found.value) == (f"draft.objective.{name}", given)
    assert found.message == (
        "must be a number > 0 or {start: a number >= 0, end: a number >= 0, until: a number > 0 and <= 1} "
        "(command line)"
    )


def test_an_entry_that_breaks_a_rule_of_its_own_says_which() -> None:
    words = ["draft.objective.tv.start=0", "draft.objective.tv.end=0", "draft.objective.kl=-1"]
    tv, kl = problems(flags=REQUIRED, overrides=words).values()
    assert (tv.field, tv.value) == ("draft.objective.tv", {"start": 0, "end": 0})
    assert tv.message == "start and end are both 0: the term would never count, leave it out (command line)"
    assert kl.message.startswith("must be a number > 0 or ")


def test_a_mapping_without_entries_says_which_there_are() -> None:
    (found,) = problems(flags=REQUIRED, overrides=["draft.objective={}"]).values()
    assert (found.field, found.value) == ("draft.objective", {})
    assert found.message.startswith("must be a mapping of at least 1 of cross_entropy, kl, ")


def test_an_entry_may_be_a_ramp_given_by_its_parts(tmp_path: Path) -> None:
    words = ["draft.objective.tv.start=0", "draft.objective.tv.end=1", "draft.objective.lk_lambda=1"]
    config, source = load_config(flags=REQUIRED, overrides=words, probe=False)
    assert config.draft.objective == {"tv": Ramp(start=0, end=1, until=1), "lk_lambda": 1.0}
    assert source["draft.objective"] == "command line"
    again, _ = load_config(file=write(tmp_path, to_yaml(config, source)), probe=False)
    assert again.draft.objective == config.draft.objective


def test_the_flag_of_a_mapping_replaces_it_and_words_add_entries(tmp_path: Path) -> None:
    file = write(tmp_path, "draft:\n  objective: {kl: 1.0}\n")
    flags = {**REQUIRED, "draft.objective": {"tv": 1.0}}
    config, source = load_config(file=file, flags=flags, overrides=["draft.objective.jsd=0.5"], probe=False)
    assert config.draft.objective == {"tv": 1.0, "jsd": 0.5}
    assert source["draft.objective"] == "command line"
    for word in ("draft.objective.tv=2", "draft.objective.tv.start=0"):
        message = problems(flags=flags, overrides=[word])["draft.objective.tv"].message
        assert message.startswith(f"given as --objective (1.0) and as {word}")


def test_the_last_of_two_overrides_wins() -> None:
    assert load_config(flags=REQUIRED, overrides=["seed=1", "seed=2"], probe=False)[0].seed == 2


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "train:\n  lrr: 3\n  schedule: cosin\n  batch_size: 0\nevall: 3\ndraft:\n  unroll: 2.5\n")
    found = problems(
        file=file,
        flags={"device": 3, "algorithm": "eagle3"},
        overrides=[
            "lr=1",
            "data=4",
            "words",
            "target.dtype=bf16",
            "train.betas=[0.9, x]",
            "train.lr=.nan",
            "device=cpu",
        ],
    )
    assert set(found) == {
        "train.lrr", "train.schedule", "train.batch_size", "evall", "draft.unroll", "lr", "data", "words",
        "target.dtype", "train.betas", "train.lr", "device", "target.path", "data.train", "output",
    }  # fmt: skip
    assert "run.yaml:2" in found["train.lrr"].message
    assert "train.lr" in found["train.lrr"].remedy
    assert "eval?" in found["evall"].remedy
    assert "train.lr" in found["lr"].remedy
    assert found["train.schedule"].choices == ("cosine", "wsd", "constant")
    assert found["train.schedule"].value == "cosin"
    assert "did you mean cosine" in found["train.schedule"].remedy
    assert found["train.batch_size"].message == "must be a whole number >= 1 (run.yaml:4)"
    assert found["target.path"].remedy == "give --target"
    assert "section" in found["data"].message
    assert "section.key=value" in found["words"].remedy
    assert "--device" in found["device"].message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.betas=[0.9, 1.0]", "a list of 2 numbers >= 0 and < 1"),
        ("train.betas=[-0.1, 0.9]", "a list of 2 numbers >= 0 and < 1"),
        (f"seed={2**63}", "a whole number >= 0"),
        ("seed=-1", "a whole number >= 0"),
        ("eval.temperature=1e-300", "must be 0 (greedy) or a number >= 0.0001"),
        ("eval.temperature=-1", "must be a number >= 0"),
    ],
)
def test_values_that_torch_would_choke_on(word: str, says: str) -> None:
    path = word.partition("=")[0]
    found = problems(flags=REQUIRED, overrides=[word])
    assert list(found) == [path]
    assert says in found[path].message


def test_the_last_values_that_work() -> None:
    words = ["train.betas=[0, 0.9999]", f"seed={2**63 - 1}", "eval.temperature=1e-4"]
    config, _ = load_config(flags=REQUIRED, overrides=words, probe=False)
    assert (config.train.betas, config.seed, config.eval.temperature) == ((0.0, 0.9999), 2**63 - 1, 1e-4)


def test_an_unknown_algorithm_does_not_hide_other_errors() -> None:
    found = problems(flags={**REQUIRED, "algorithm": "eagl3"}, overrides=["train.lr=-1", "draft.unroll=3"])
    assert set(found) == {"algorithm", "train.lr"}
    assert found["algorithm"].choices == registry.algorithms().names()
    assert "eagle3" in found["algorithm"].remedy


def test_unknown_adapters_and_missing_files_come_with_field_errors(tmp_path: Path) -> None:
    flags = {"target.path": "embedded", "data.train": [str(tmp_path), "nowhere.jsonl"], "device": "gpu"}
    with pytest.raises(ConfigError) as caught:
        load_config(flags={**flags, "backend": "sglan", "output": __file__ + "/run"}, overrides=["train.lr=-1"])
    fields = [problem.field for problem in caught.value.problems]
    assert sorted(fields) == ["backend", "data.train", "data.train", "device", "output", "train.lr"]
    text = str(caught.value)
    assert "did you mean sglang?" in text
    assert "choices: cpu, cuda, npu" in text
    assert "no such file (got 'nowhere.jsonl')" in text
    assert "is a file, not a directory" in text


def test_a_device_that_is_not_there_is_refused_with_its_reason(tmp_path: Path) -> None:
    missing = next(name for name in registry.devices().names() if not registry.devices().spec(name).probe().ok)
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(flags={**REQUIRED, "data.train": [str(data)], "device": missing})
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("device", missing)
    assert registry.devices().spec(missing).probe().reason in problem.message
    assert problem.remedy


def test_the_device_is_resolved_and_its_reason_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")
    flags = {**REQUIRED, "data.train": [str(data)]}
    monkeypatch.setenv("TORCHSPEC_DEVICE", "cpu")
    config, source = load_config(flags=flags)
    assert (config.device, source["device"]) == ("cpu", "TORCHSPEC_DEVICE")
    config, source = load_config(flags={**flags, "device": "cpu"})
    assert (config.device, source["device"]) == ("cpu", "command line")
    monkeypatch.setenv("TORCHSPEC_DEVICE", "tpu")
    with pytest.raises(ConfigError, match=r"device \(TORCHSPEC_DEVICE\): no device of this name"):
        load_config(flags=flags)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "no such directory (got 'nowhere')\n    remedy: name a directory with config.json"),
        ("Owner/Model-8B", "on the Hugging Face hub: `hf download Owner/Model-8B --local-dir DIR`"),
        (__file__, "is a file"),
        (str(Path(__file__).parent), "no config.json in this directory"),
    ],
)
def test_what_is_no_target_is_told_apart(target: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags={**REQUIRED, "target.path": target, "device": "cpu"})
    (problem,) = (each for each in caught.value.problems if each.field == "target.path")
    assert says in str(problem)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("train:\n  lr: [1, 2\n", 3, "expected"),
        ("train:\n\tlr: 1\n", 2, "spaces"),
        ("a: 1\nb: 2\na: 3\n", 3, "line 1"),
        ("- 1\n", 1, "mapping"),
        ("x: !!python/object:os.system {}\n", 1, "tag"),
        ("a: &a\n  b: *a\n", 1, "contains itself"),
    ],
)
def test_yaml_mistakes_name_the_line_and_do_not_cascade(tmp_path: Path, text: str, line: int, says: str) -> None:
    found = problems(file=write(tmp_path, text), overrides=["train.lr=-1"])
    assert set(found) == {f"run.yaml:{line}", "train.lr"}, found
    assert says in str(found[f"run.yaml:{line}"])


def test_a_missing_file_is_one_problem(tmp_path: Path) -> None:
    found = problems(file=tmp_path / "none.yaml")
    assert set(found) == {"--config"}
    assert "none.yaml" in str(found["--config"])


def test_empty_sections_and_anchors_are_fine(tmp_path: Path) -> None:
    file = write(tmp_path, "eval:\n  # samples: 3\ntrain: &t\n  lr: 1\ndraft: {}\nprecision:\n  compute: bfloat16\n")
    config, source = load_config(file=file, flags=REQUIRED, probe=False)
    assert (config.eval.samples, config.train.lr, config.precision.compute) == (16, 1.0, "bfloat16")
    assert source["precision.compute"] == "run.yaml:7"
    assert load_config(file=write(tmp_path, ""), flags=REQUIRED, probe=False)[0].seed == 0


def test_no_error_text_comes_from_the_validation_library() -> None:
    """Every setting of the schema given something absurd: the message says what it must be, in our words."""
    strict = {path: info for path, info in settings(full_schema()).items() if type_text(info) != "values by name"}
    absurd = {path: {"an": ["absurd", "value"]} for path in strict}
    absurd |= {path: -1e999 for path, info in settings(full_schema()).items() if "number" in type_text(info)}
    with pytest.raises(ConfigError) as caught:
        load_config(flags={path: value for path, value in absurd.items() if path != "algorithm"}, probe=False)
    assert {problem.field for problem in caught.value.problems} == set(absurd) - {"algorithm"}
    text = str(caught.value)
    for foreign in ("Input should", "pydantic", "validation error", "For further information", "Extra inputs"):
        assert foreign not in text


def test_every_setting_is_described_and_typed() -> None:
    for path, info in settings(full_schema()).items():
        assert info.description, path
        assert "a value" not in type_text(info).removeprefix("values by name"), path
    schema = full_schema()
    assert type_text(settings(schema)["train.betas"]) == "a list of 2 numbers >= 0 and < 1"
    assert type_text(settings(schema)["train.max_steps"]) == "a whole number >= 1 or null"
    assert type_text(settings(schema)["train.decay_fraction"]) == "a number >= 0.0 and <= 1.0"
    assert choices(settings(schema)["train.resume"]) == ("auto", "never")
    assert set(sections(schema)) == {
        "target", "data", "train", "engine", "pipeline", "on_policy", "ray", "mooncake", "parallel", "precision",
        "eval", "eval.serving", "draft",
    }  # fmt: skip


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config, source = load_config(
        flags=REQUIRED,
        overrides=["train.lr=3e-5", "draft.taps=[1, 2, 4]", "data.validation=['# x', 'a: b', '1e-3', '07', 'no']"],
        probe=False,
    )
    text = to_yaml(config, source)
    lines = text.splitlines()
    assert "  lr: 3.0e-05  # command line" in lines
    assert "  epochs: 1  # default" in lines
    assert set(yaml.safe_load(text)) == set(RunConfig.model_fields)
    again, where = load_config(file=write(tmp_path, text), probe=False)
    assert again.model_dump() == config.model_dump()
    assert where["train.lr"] == f"run.yaml:{lines.index('  lr: 3.0e-05  # command line') + 1}"
