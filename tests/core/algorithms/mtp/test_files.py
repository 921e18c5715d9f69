"""Heads under their published names: read from targets, written, read back; others are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec.core import registry
from torchspec.core.algorithms.mtp.algorithm import Mtp
from torchspec.core.algorithms.mtp.families import FAMILIES
from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.errors import CheckpointError, ConfigError, TargetError
from torchspec.core.export.layout import ExportContext, read_draft, read_files, write_draft
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.rebuild import initial_problems, read_initial

Worlds = Callable[..., Any]
Targets = Callable[..., Path]
CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))
PLACES = {
    "mimo": ("model.mtp_layers.0.token_layernorm.weight", "model.mtp_layers.0.mlp.up_proj.weight"),
    "deepseek": ("model.layers.3.enorm.weight", "model.layers.3.mlp.up_proj.weight"),
    "qwen": ("mtp.pre_fc_norm_embedding.weight", "mtp.layers.0.mlp.up_proj.weight"),
}


def create(path: Path, **options: Any) -> Mtp:
    return Mtp.create(MtpOptions(**options), read_target_spec(path))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        create(path, **options)
    return str(caught.value)


def change(path: Path, edit: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stated | config))
    return path


def test_it_is_found_by_its_name() -> None:
    assert registry.algorithms().spec("mtp").options is MtpOptions


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_draft_is_the_targets_head(make_world: Worlds, family: str, kind: str) -> None:
    world = make_world(family, kind, dtype=torch.float32)
    stored = load_file(world.algorithm.target.path / "model.safetensors")
    geometry = world.algorithm.geometry
    assert (geometry.family, geometry.qkv_bias, geometry.qk_norm) == (family, kind == "qwen2", kind == "qwen3")
    token_norm, up = PLACES[family]
    assert torch.equal(world.draft.token_norm.weight, stored[token_norm])
    assert torch.equal(world.draft.layer.mlp.up_proj.weight, stored[up])
    held = {name for name in stored if name.startswith(token_norm.partition(".weight")[0].rpartition(".")[0])}
    assert {FAMILIES[family].stored(name, 3) for name in world.draft.state_dict()} == held


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_engines_compute_and_can_be_read_back(
    make_world: Worlds, tmp_path: Path, family: str, kind: str, dtype: torch.dtype
) -> None:
    world = make_world(family, kind, dtype=torch.float32)
    with torch.no_grad():  # as training leaves it: other than the target's
        for parameter in world.draft.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    context = ExportContext(head=world.head, device=world.device)
    outcome = write_draft(world.algorithm, world.draft, "plain", tmp_path / "draft", context, dtype)
    assert outcome.total_variation < 1e-4
    files = read_files(tmp_path / "draft")
    stored = TargetWeights.open(world.algorithm.target.path)
    assert {name: tuple(value.shape) for name, value in files.tensors.items()} == {
        name: stored.shape(name) for name in FAMILIES[family].head_names(stored.files, 3)
    }
    assert files.config["num_nextn_predict_layers"] == 1
    algorithm, draft = read_draft(tmp_path / "draft", world.algorithm.target)
    assert isinstance(algorithm, Mtp)
    assert algorithm.geometry == world.algorithm.geometry
    assert algorithm.taps == world.algorithm.taps
    for name, value in world.draft.state_dict().items():
        assert torch.equal(draft.state_dict()[name], value.to(dtype).float()), name


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_self_check_knows_each_familys_rules(make_world: Worlds, family: str, kind: str) -> None:
    """A trained module that followed another family's rule in any one point would be found out."""
    world = make_world(family, kind, dtype=torch.float32)
    files = world.algorithm.to_files(world.draft.state_dict(), "plain")
    check_files(world.algorithm, world.draft, files, world.head, world.device, None)
    rules = FAMILIES[family]
    for changes in (
        {"embedding_first": not rules.embedding_first},
        {"state": "pre_norm" if rules.state == "post_norm" else "post_norm"},
        {"feeds_normed": not rules.feeds_normed},
        {"hides_first": not rules.hides_first},
    ):
        FAMILIES[family] = replace(rules, **changes)
        try:
            with pytest.raises(CheckpointError, match="total variation"):
                check_files(world.algorithm, world.draft, files, world.head, world.device, None)
        finally:
            FAMILIES[family] = rules


def test_an_engine_that_would_miss_or_ignore_a_tensor_is_named(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2", dtype=torch.float32)
    files = world.algorithm.to_files(world.draft.state_dict(), "plain")
    prefix = "model.mtp_layers.0."

    def served(tensors: dict[str, Tensor]) -> None:
        given = DraftFiles(config=files.config, tensors=tensors)
        ids_T = world.tokens(5)
        world.algorithm.serve(given, world.head, world.features(ids_T).taps_TNH, ids_T, ids_T[:2])

    with pytest.raises(CheckpointError, match=r"unknown.*model\.mtp_layers\.0\.extra"):
        served({**files.tensors, prefix + "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing: model\.mtp_layers\.0\.self_attn\.v_proj\.bias"):
        served({name: t for name, t in files.tensors.items() if not name.endswith("v_proj.bias")})
    with pytest.raises(CheckpointError, match="looked for"):
        served({"fc.weight": torch.zeros(1)})


def as_speculators(files: DraftFiles, **layer: Any) -> DraftFiles:
    """As vllm-project/speculators writes a head of Qwen's family: `convert/mtp/converter.py`, names and config."""
    exact = {"mtp.fc.weight": "input_proj.weight", "mtp.norm.weight": "final_layernorm.weight"}
    begins = {"mtp.pre_fc_norm_hidden.": "hidden_layernorm.", "mtp.pre_fc_norm_embedding.": "token_layernorm.",
              "mtp.layers.0.": ""}  # fmt: skip
    tensors = {}
    for name, tensor in files.tensors.items():
        own = exact.get(name) or next(new + name.removeprefix(old) for old, new in begins.items() if old in name)
        tensors[f"mtp_layers.0.{own}"] = tensor
    given = {name: value for name, value in files.config.items() if name not in ("torchspec", "architectures")}
    config = {
        "speculators_model_type": "mtp",
        "architectures": ["MTPDraftModel"],
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": {**given, **layer},
    }
    return DraftFiles(config=config, tensors=tensors)


def test_heads_in_the_speculators_layout_are_read(make_world: Worlds) -> None:
    world = make_world("qwen", "qwen3")
    files = world.algorithm.to_files(world.draft.state_dict(), "plain")
    given = as_speculators(files)
    embedded = DraftFiles(
        config=given.config, tensors={**given.tensors, "embed_tokens.weight": world.head.embedding_VH.clone()}
    )
    readers = [name for name in registry.algorithms().names() if registry.algorithms().spec(name).reads(given.config)]
    assert readers == ["mtp"]
    for each in (given, embedded):
        algorithm, draft = registry.algorithms().spec("mtp").from_files(each, world.algorithm.target)
        assert algorithm.geometry == world.algorithm.geometry
        for name, tensor in world.draft.state_dict().items():
            assert torch.equal(draft.state_dict()[name], tensor.float()), name
        assert algorithm.to_files(draft.state_dict(), "plain").tensors.keys() == files.tensors.keys()


def test_heads_of_that_layout_that_are_not_trained_here_are_refused(make_world: Worlds) -> None:
    world = make_world("qwen", "qwen3")
    files = world.algorithm.to_files(world.draft.state_dict(), "plain")
    target, read = world.algorithm.target, registry.algorithms().spec("mtp").from_files
    hybrid = as_speculators(files, model_type="qwen3_next")
    with pytest.raises(CheckpointError, match="its layer is that of qwen3_next, and mtp here knows dense layers"):
        read(hybrid, target)
    several = as_speculators(files)
    several.config["num_nextn_predict_layers"] = 2
    with pytest.raises(CheckpointError, match="it has 2 heads"):
        read(several, target)
    other = as_speculators(files)
    other.tensors["embed_tokens.weight"] = world.head.embedding_VH + 1
    with pytest.raises(CheckpointError, match="embed"):
        read(other, target)
    extra = as_speculators(files)
    extra.tensors["mtp_layers.1.input_proj.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unknown.*mtp_layers\.1\.input_proj"):
        read(extra, target)


def test_other_layouts_are_refused(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2")
    with pytest.raises(ConfigError, match="target's own directory"):
        world.algorithm.to_files(world.draft.state_dict(), "speculators")
    assert world.algorithm.layouts == ("plain",)


def test_how_to_serve_it_is_said(make_world: Worlds) -> None:
    def notes(family: str, kind: str) -> tuple[str, ...]:
        world = make_world(family, kind)
        files: DraftFiles = world.algorithm.to_files(world.draft.state_dict(), "plain")
        return files.notes

    merge, engines = notes("mimo", "qwen2")
    assert '"method": "mtp", "num_speculative_tokens": 3' in merge
    assert "before the target's final norm" in engines
    assert len(notes("qwen", "qwen3")) == 1


def test_a_target_without_a_head(make_target: Targets) -> None:
    message = refused(make_target(None, "qwen3"))
    assert "holds no multi-token-prediction head" in message
    assert "model.mtp_layers.0.input_proj.weight, model.layers.3.eh_proj.weight, mtp.fc.weight" in message
    assert "draft.init=random" in message


@pytest.mark.parametrize("family", [None, "deepseek", "qwen"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_fresh_head_has_a_layer_of_the_targets_kind(make_world: Worlds, family: str | None, kind: str) -> None:
    world = make_world(None, kind, dtype=torch.float32, init="random", family=family)
    geometry = world.algorithm.geometry
    assert geometry.family == (family or "mimo")
    assert (geometry.qkv_bias, geometry.qk_norm) == (kind == "qwen2", kind == "qwen3")
    result = world.step([world.features(world.tokens(20))], [torch.ones(20, dtype=torch.bool)])
    result.numerator.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in world.draft.parameters())
    final = load_file(world.algorithm.target.path / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(world.draft.norm.weight.detach(), final, rtol=1e-3, atol=0)  # but for its epsilon


def test_options_that_contradict_the_target(make_target: Targets) -> None:
    assert "stored as mimo" in refused(make_target("mimo", "qwen2"), family="qwen")
    create(make_target("mimo", "qwen2"), family="mimo")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            {"model.mtp_layers.0.mlp.experts.0.up_proj.weight": (4, 4)},
            r"no dense layer .*mlp\.experts\.0\.up_proj\.weight",
        ),
        ({"model.mtp_layers.0.self_attn.kv_a_proj_with_mqa.weight": (4, 4)}, "no dense layer .*kv_a_proj_with_mqa"),
        ({"model.mtp_layers.0.mlp.up_proj.weight": None}, "lacks model.mtp_layers.0.mlp.up_proj.weight"),
        ({"model.mtp_layers.0.mlp.up_proj.weight": (40, 32)}, r"other sizes .* is \[40, 32\], expected \[48, 32\]"),
        ({"model.mtp_layers.1.input_proj.weight": (32, 64)}, "several heads"),
    ],
    ids=["experts", "latent", "missing", "misshapen", "two heads"],
)
def test_heads_of_another_kind_are_refused(
    make_target: Targets, edit: dict[str, tuple[int, ...] | None], said: str
) -> None:
    def put(tensors: dict[str, Tensor]) -> None:
        for name, shape in edit.items():
            tensors.pop(name, None)
            if shape is not None:
                tensors[name] = torch.zeros(shape)

    path = change(make_target("mimo", "qwen2", fresh=True), put)
    message = refused(path)
    assert len(message.splitlines()) == 2
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 16.0, "factor": 2.0}}, "rope_type 'dynamic'"),
    ],
)
def test_layers_of_another_kind_are_refused(make_target: Targets, config: dict[str, object], said: str) -> None:
    path = change(make_target("mimo", "qwen2", fresh=True), lambda tensors: None, **config)
    assert said in refused(path)


def test_a_copy_of_the_embedding_or_the_head_must_be_one(make_target: Targets) -> None:
    """DeepSeek's checkpoints repeat both beside the head."""
    path = make_target("deepseek", "llama", fresh=True)
    ends = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    change(path, lambda t: t.update({f"model.layers.3.{copy}": t[name].clone() for copy, name in ends.items()}))
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    create(path).build_draft(VocabularyMap.identity(120), head)
    change(path, lambda t: t["model.layers.3.shared_head.head.weight"].add_(0.01))
    with pytest.raises(TargetError, match=r"shared_head.head.weight is not the target's head"):
        create(path).build_draft(VocabularyMap.identity(120), head)


def test_a_head_of_another_target_is_refused(make_world: Worlds, make_target: Targets) -> None:
    world = make_world("deepseek", "llama", dtype=torch.float32)
    files = world.algorithm.to_files(world.draft.state_dict(), "plain")
    spec = registry.algorithms().spec("mtp")
    other = replace(world.algorithm.target, hidden_size=64, num_layers=5)
    with pytest.raises(CheckpointError, match="hidden_size 32, not 64"):
        spec.from_files(files, other)
    unknown = DraftFiles(config=files.config | {"torchspec": {"algorithm": "mtp", "family": "none"}}, tensors={})
    with pytest.raises(CheckpointError, match="known: mimo, deepseek, qwen"):
        spec.from_files(unknown, world.algorithm.target)
    assert not spec.reads({"architectures": ["LlamaForCausalLM"]})


def test_a_training_can_start_from_an_exported_head(make_world: Worlds, tmp_path: Path) -> None:
    world = make_world("qwen", "qwen3", dtype=torch.float32)
    with torch.no_grad():
        world.draft.layer.mlp.up_proj.weight.add_(1.0)
    context = ExportContext(head=world.head, device=world.device)
    write_draft(world.algorithm, world.draft, "plain", tmp_path / "draft", context)
    target = world.algorithm.target
    assert initial_problems(tmp_path / "draft", world.algorithm, target) == []
    state, vocabulary = read_initial(tmp_path / "draft", target)
    fresh = make_world("qwen", "qwen3", dtype=torch.float32).draft
    fresh.load_state_dict(state)
    assert torch.equal(fresh.layer.mlp.up_proj.weight, world.draft.layer.mlp.up_proj.weight)
    assert vocabulary.size == 120
    other = make_world(None, "qwen3", init="random", family="mimo").algorithm
    assert any("its family is qwen" in str(p) for p in initial_problems(tmp_path / "draft", other, target))


def test_a_draft_of_shapes_has_no_storage(make_world: Worlds) -> None:
    """What a plan of memory asks for, without reading the target's tensors."""
    world = make_world("mimo", "qwen2")
    draft = draft_of_shapes(world.algorithm, world.algorithm.target)
    assert isinstance(draft, MtpDraft)
    assert all(parameter.is_meta for parameter in draft.parameters())
    assert {n: tuple(p.shape) for n, p in draft.named_parameters()} == world.algorithm.geometry.shapes
