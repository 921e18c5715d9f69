"""The model card of a run's draft, and what goes to the hub: a hub of our own answers over HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from torchspec.cli import main
from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.export.card import (
    CardFacts,
    Measured,
    hub_id,
    serving,
    stated_license,
    unchanged,
    with_results,
    without_paths,
)
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.pipeline.card import brought_facts, put_result
from torchspec.core.pipeline.inprocess import train

TOKEN = "hf_sesamesesamesesamesesamesesamesesam"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, conversations: Path) -> Path:
    """A run of three steps, with validation."""
    place = tmp_path_factory.mktemp("carded")
    values = {
        "output": str(place / "run"),
        "target": {"path": str(tiny_target)},
        "data": {
            "train": [str(conversations / "train.jsonl")], "validation": [str(conversations / "validation.jsonl")],
            "cache_dir": str(place / "cache"),
        },
        "device": "cpu",
    }  # fmt: skip
    words = [
        "train.max_steps=3", "train.batch_size=4", "train.lr=2e-3", "draft.unroll=2", "draft.vocab_size=64",
        "data.max_length=96", "eval.samples=2", "eval.max_new_tokens=6", "eval.draft_length=2",
    ]  # fmt: skip
    config, provenance = load_config(values=values, overrides=words)
    train(config, provenance=provenance)
    return place / "run"


def export(run: Path, output: Path, *words: object, code: int = 0) -> None:
    told = ["export", "--checkpoint", run, "--output", output, *words]
    assert main([str(word) for word in told]) == code


def test_a_run_s_draft_has_a_card_that_tells_no_place(trained: Path, tiny_target: Path) -> None:
    text = (trained / "draft" / "README.md").read_text()
    front = ModelCard(text).data
    assert (front.library_name, front.pipeline_tag, front.license, front.base_model) == (
        "torchspec", "text-generation", None, None,
    )  # fmt: skip
    assert {"speculative-decoding", "eagle3", "vllm", "sglang"} <= set(front.tags or [])
    assert "# base_model: fill in" in text
    assert "# license: fill in" in text
    assert str(tiny_target.parent) not in text
    assert not re.search(r"(?<![\w.:/])/(home|tmp|root|work|var)\b", text)
    data = json.loads((trained / "data.json").read_text())
    assert f"| of them used | {data['kept']} |" in text
    assert "| steps | 3 |" in text
    (progress,) = (trained / "checkpoints").glob("step_00000003/trainer.json")
    assert f"| samples trained on, repeats counted | {json.loads(progress.read_text())['samples']} |" in text
    validated = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"| validation prompts of the training (2) | 2 | {validated['acceptance_length']:.2f} |" in text
    assert '"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 2' in text
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT" in text


def test_its_recipe_makes_such_a_draft_again(trained: Path, tmp_path: Path) -> None:
    text = (trained / "draft" / "README.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    recipe = yaml.safe_load(block[1])
    assert recipe["train"] == {"max_steps": 3, "batch_size": 4, "lr": 0.002}
    assert recipe["draft"] == {"unroll": 2, "vocab_size": 64}
    assert recipe["data"] == {"max_length": 96}
    (tmp_path / "recipe.yaml").write_text(block[1])
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    values = {"output": str(tmp_path / "again"), "target": saved["target"], "data": {"train": saved["data"]["train"]}}
    again, _ = load_config(file=tmp_path / "recipe.yaml", values=values)
    first = load_config(file=trained / "config.yaml")[0]
    assert again.train == first.train
    assert again.draft == first.draft
    assert again.data.max_length == first.data.max_length


def test_results_are_added_and_an_edited_card_is_left_alone(trained: Path, tmp_path: Path) -> None:
    figures = {
        "acceptance_length": 2.5, "acceptance_per_position": [0.9, 0.6], "draft_length": 2, "prompts": 7,
        "temperature": 0.0, "tokens_per_second": 30.0, "speedup": 1.5, "lossless": True, "dtype": "float32",
        "machine": {"device": "cpu", "device_name": "Some Processor"},
    }  # fmt: skip
    (tmp_path / "mt-bench.json").write_text(json.dumps(figures))
    (tmp_path / "none.json").write_text("[]")
    out = tmp_path / "draft"
    export(trained, out, "--format", "hf", "--results", tmp_path / "mt-bench.json", "--license", "mit")
    text = (out / "README.md").read_text()
    row = "| mt-bench (7) | 2 | 2.50 | 30.0 | 1.50x | yes | greedy, Some Processor, float32 |"
    assert row in text
    assert "validation prompts of the training" in text
    assert ModelCard(text).data.license == "mit"
    export(trained, out, "--format", "hf", "--results", tmp_path / "none.json", code=2)
    export(trained, out, "--format", "hf")  # a card that nobody touched is replaced
    assert row not in (out / "README.md").read_text()

    put_result(out, "held-out questions", figures)
    text = (out / "README.md").read_text()
    assert "| held-out questions (7) | 2 | 2.50 |" in text
    assert unchanged(text)
    edited = text.replace("## Limits", "## Limits\n\nMine.")
    (out / "README.md").write_text(edited)
    put_result(out, "others", figures)
    assert (out / "README.md").read_text() == edited
    export(trained, out, "--format", "hf", code=1)
    assert (out / "README.md").read_text() == edited


def test_a_draft_of_others_gets_a_card_without_a_history(trained: Path, tmp_path: Path, tiny_target: Path) -> None:
    out = tmp_path / "again"
    export(trained / "draft", out, "--format", "vllm", "--target", tiny_target, "--base-model", "Qwen/Tiny")
    text = (out / "README.md").read_text()
    assert "That is not known here" in text
    assert "this draft has not been measured" in text
    assert "Not in this layout: sglang" in text
    assert ModelCard(text).data.base_model == "Qwen/Tiny"
    verifier = json.loads((out / "config.json").read_text())["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == "Qwen/Tiny"


def test_a_draft_from_a_loop_tells_of_a_target_that_changed(tmp_path: Path, tiny_target: Path) -> None:
    """Of one that stayed the name on the hub; of one that was replaced no name, since those weights have none."""
    snapshot = tmp_path / "models--Qwen--Tiny" / "snapshots" / "abc1"
    shutil.copytree(tiny_target, snapshot)
    target = read_target_spec(snapshot)
    spec = registry.algorithms().spec("eagle3")
    algorithm = spec.create(spec.options(unroll=2), target)
    settings = {"algorithm": "eagle3", "draft": {"init_from": "/home/me/first"}, "train": {"lr": 0.1}}

    def facts(updates: int, spec: TargetSpec) -> CardFacts:
        return brought_facts(algorithm, spec, {"steps": 3}, updates, settings, {"ranks": 1})

    stayed, changed = facts(0, target), facts(2, target)
    assert (stayed.base_model, stayed.revision) == ("Qwen/Tiny", "abc1")
    assert "replaced" not in stayed.origin
    assert (changed.base_model, changed.revision, changed.target_name) == (None, None, "Qwen/Tiny")
    assert "The target's weights were replaced 2 times meanwhile" in changed.origin
    assert stayed.recipe["draft"] == {"init_from": "first"}
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "README.md").write_text("---\nlicense: mit\n---\n")
    with chdir(tmp_path):  # what a target without a directory is called must not be looked up
        loose = facts(0, replace(target, path=Path("target")))
    assert (loose.target_name, loose.license, loose.base_model) == ("a model that was given in memory", None, None)


def test_commands_that_serve_hold_whole_paths(trained: Path) -> None:
    target, draft = "/models/my target $HOME", "/runs/it's mine/draft"
    facts = CardFacts(
        algorithm="eagle3", target_name="", target_shape="", torchspec="", base_model=target, repository=draft
    )  # fmt: skip
    commands, _ = serving(facts, trained / "draft")
    assert {"vllm", "sglang"} <= commands.keys()
    for command in commands.values():
        words = shlex.split(command)
        assert target in words
        assert any(word == draft or json.loads(word)["model"] == draft for word in words if "mine" in word)


def test_what_a_directory_tells_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert hub_id(snapshot) == ("Qwen/Qwen3-8B", "abc123")
    assert hub_id(tmp_path) is None
    assert stated_license(snapshot) is None
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert stated_license(snapshot) == "apache-2.0"
    (snapshot / "README.md").write_text("---\nlicense: [a\n---\n")
    assert stated_license(snapshot) is None


def test_paths_lose_where_they_were() -> None:
    text = "a copy of /root/models/qwen3 (at https://host/a/b), 1/2, `vllm serve COPY`"
    assert without_paths(text) == "a copy of qwen3 (at https://host/a/b), 1/2, `vllm serve COPY`"


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as an upload takes: what it is asked, and repositories by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuses = False
        super().__init__(("127.0.0.1", 0), Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, value: Any, status: int = 200, error: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _begin(self) -> bytes:
        self.server.asked.append((self.command, self.path.partition("?")[0]))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        return self._body()

    def do_GET(self) -> None:
        self._begin()
        found = re.match(r"/api/models/([\w.-]+/[\w.-]+)", self.path)
        repository = self.server.repositories.get(found[1]) if found else None
        if repository is None:
            self._answer({"error": "Repository not found"}, 404, "RepoNotFound")
        else:
            assert found is not None
            self._answer({"id": found[1], "private": repository["private"], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self._begin()
        if self.server.refuses:
            self._answer({"error": f"out of order, {self.headers.get('Authorization')}"}, 400)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories[name] = {"private": private, "files": {}}
            self._answer({"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            found = re.match(r"/api/models/([\w.-]+/[\w.-]+)/commit/", self.path)
            assert found is not None
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[found[1]]["files"][line["value"]["path"]] = content
            self._answer({"commitUrl": f"{self.server.url}/{found[1]}/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": "unknown"}, 404)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_draft_is_uploaded_in_private_unless_it_is_to_be_public(
    trained: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--format", "vllm", "--base-model", "Qwen/Tiny", "--push-to-hub", "me/tiny-draft")
    export(trained, tmp_path / "draft", *words)
    made = hub.repositories["me/tiny-draft"]
    assert made["private"] is True
    local = {path.name: path.read_bytes() for path in (tmp_path / "draft").iterdir()}
    assert made["files"] == local
    assert set(local) == {"README.md", "config.json", "model.safetensors"}
    card = local["README.md"].decode()
    assert "vllm serve Qwen/Tiny --speculative-config" in card
    assert '"model": "me/tiny-draft"' in card
    said = "".join(capsys.readouterr())
    assert f"{hub.url}/me/tiny-draft/commit/1" in said
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}
    assert TOKEN not in said

    export(trained, tmp_path / "draft", *words[:-1], "me/open-draft", "--public")
    assert hub.repositories["me/open-draft"]["private"] is False
    hub.asked.clear()
    export(trained, tmp_path / "draft", *words[:-1], "me/open-draft", code=1)  # public already, which was not asked for
    assert "is public already, so nothing was uploaded" in capsys.readouterr().err
    assert not [path for method, path in hub.asked if method == "POST"]


def test_an_upload_that_fails_costs_nothing_and_says_how_to_go_on(
    trained: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    out = tmp_path / "draft"
    export(trained, out, "--format", "hf", "--base-model", "Qwen/Tiny", "--push-to-hub", "me/tiny", code=1)
    said = "".join(capsys.readouterr())
    assert f"hf upload me/tiny {out}" in said
    assert "whole and checked" in said
    assert TOKEN not in said
    assert (out / "model.safetensors").is_file()


def test_everything_that_keeps_a_draft_from_the_hub_is_said_first(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", os.fspath(tmp_path / "none"))
    out = tmp_path / "draft"
    export(trained, out, "--format", "hf", "--push-to-hub", "no/such/name", "--base-model", "mine", code=2)
    said = capsys.readouterr().err
    assert "3 configuration errors" in said
    assert "not OWNER/NAME of a repository" in said
    assert "nobody is logged in to the hub" in said
    assert "--base-model: not OWNER/NAME" in said
    export(trained, out, "--format", "hf", "--public", code=2)
    assert "--public: is for --push-to-hub" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export(trained, out, "--format", "hf", "--push-to-hub", "me/tiny", code=2)
    assert "give --base-model OWNER/NAME" in capsys.readouterr().err
    assert not out.exists()


def test_a_measurement_without_speeds_has_none() -> None:
    measured = Measured.of("x", {"acceptance_length": 2, "draft_length": 3, "tokens_per_second": 9.0})
    assert (measured.tokens_per_second, measured.per_position, measured.where) == (None, (), "")
    assert with_results("no card of ours", [measured]) == "no card of ours"
    facts = CardFacts(algorithm="a", target_name="t", target_shape="s", torchspec="0")
    assert (facts.results, facts.repository) == ((), None)
