"""Exported drafts predict what the trained draft predicts, and every way of writing them wrongly is caught."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from torchspec.core import registry
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.layout import ExportContext, read_draft, read_files, write_draft
from torchspec.core.export.selfcheck import Probe, check_files
from torchspec.core.interfaces.algorithm import Algorithm, DraftFiles
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec

DRAFT_VOCABULARY = 64


def make(
    target: Path, vocab_size: int | None = DRAFT_VOCABULARY, **options: object
) -> tuple[Algorithm, nn.Module, ExportContext]:
    """A draft with every weight random, norms included, so that no tensor could be left out unnoticed.

    With options of EAGLE-3.1 it is one.
    """
    torch.manual_seed(0)
    device = registry.load_device("cpu")
    head = load_target_head(target, dtype=torch.float32, device=torch.device("cpu"))
    spec = registry.algorithms().spec("eagle3.1" if {"fc_norm", "norm_output"} & options.keys() else "eagle3")
    algorithm = spec.create(spec.options(vocab_size=vocab_size, **options), read_target_spec(target))
    ids_N = torch.randperm(300)[: algorithm.vocabulary_size].sort().values
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=300), head)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif name != "lm_head.weight":
                parameter.normal_(std=0.15)
    return algorithm, draft, ExportContext(head=head, device=device)


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"taps": (0, 2, 5)},
        {"hidden_size": 32, "num_attention_heads": 2},
        {"fc_norm": True},
        {"fc_norm": True, "norm_output": False},
        {"fc_norm": False, "norm_before_fc": True, "norm_output": False},
        {"fc_norm": False, "hidden_size": 32, "num_attention_heads": 2},
    ],
)
def test_round_trip_predicts_the_same(tiny_target: Path, tmp_path: Path, layout: str, options: dict) -> None:
    algorithm, draft, context = make(tiny_target, **options)
    check = write_draft(algorithm, draft, layout, tmp_path / "draft", context)
    assert check.total_variation < 1e-5
    again, loaded = read_draft(tmp_path / "draft", algorithm.target)
    assert (again.name, again.taps) == (algorithm.name, algorithm.taps)
    assert again.geometry == algorithm.geometry
    state = loaded.state_dict()
    assert state.keys() == draft.state_dict().keys()
    for name, value in draft.state_dict().items():
        assert torch.equal(state[name], value), name


def test_bf16_export_is_checked_as_closely(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    check = write_draft(algorithm, draft, "plain", tmp_path / "draft", context, dtype=torch.bfloat16)
    assert 0 < check.total_variation < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in draft.state_dict().items())
    assert load_file(tmp_path / "draft/model.safetensors")["fc.weight"].dtype == torch.bfloat16


def test_names_and_fields_engines_read(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "plain", context)
    write_draft(algorithm, draft, "speculators", tmp_path / "spec", context)
    plain = json.loads((tmp_path / "plain/config.json").read_text())
    assert plain["architectures"] == ["LlamaForCausalLMEagle3"]
    assert plain["rope_scaling"] is None
    assert plain["vocab_size"] == 300
    assert plain["draft_vocab_size"] == DRAFT_VOCABULARY
    assert "eagle_aux_hidden_state_layer_ids" not in plain["eagle_config"]  # both engines' default is ours
    spec = json.loads((tmp_path / "spec/config.json").read_text())
    assert "model_type" not in spec  # vLLM would take the directory for a whole model
    assert spec["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        assert spec[flag] is False
    names = load_file(tmp_path / "spec/model.safetensors").keys()
    assert "layers.0.self_attn.q_proj.weight" in names
    offsets = load_file(tmp_path / "plain/model.safetensors")["d2t"]
    assert torch.equal(torch.arange(DRAFT_VOCABULARY) + offsets, draft.vocabulary.ids_N)


@pytest.mark.parametrize("layout", ["plain", "speculators"])
def test_the_norms_of_eagle31_are_told_to_engines(
    tiny_target: Path, tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, draft, context = make(tiny_target, fc_norm=True)
    write_draft(algorithm, draft, layout, tmp_path / "draft", context)
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert config["fc_norm"] is True
    assert config["norm_output"] is True
    tensors = load_file(tmp_path / "draft/model.safetensors")
    assert [tensors[f"fc_norm.{tap}.weight"].shape for tap in range(3)] == [(64,)] * 3
    (message,) = caplog.messages
    assert "without fc_norm and norm_output" in message


@pytest.mark.parametrize("layout", ["plain", "speculators"])
def test_a_vocabulary_that_is_not_pruned_has_no_map(tiny_target: Path, tmp_path: Path, layout: str) -> None:
    """vLLM makes no parameter for one, and refuses a checkpoint with a tensor that it does not know."""
    algorithm, draft, context = make(tiny_target, vocab_size=None)
    write_draft(algorithm, draft, layout, tmp_path / "draft", context)
    tensors = load_file(tmp_path / "draft/model.safetensors")
    assert tensors["lm_head.weight"].shape[0] == 300
    assert not {"d2t", "t2d"} & tensors.keys()
    _, again = read_draft(tmp_path / "draft", algorithm.target)
    assert torch.equal(again.vocabulary.ids_N, torch.arange(300))
    save_file({**tensors, "d2t": torch.zeros(300, dtype=torch.int64)}, tmp_path / "draft/model.safetensors")
    files = read_files(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="d2t: the draft says all 300 tokens"):
        algorithm.serve(files, context.head, torch.zeros(2, 3, 64), torch.tensor([1, 2]), torch.tensor([3]))


def test_tap_ids_that_are_not_the_default(tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Engines count an explicit list differently in the plain layout: the one that is not served is named."""
    algorithm, draft, context = make(tiny_target, taps=(0, 2, 5))
    write_draft(algorithm, draft, "speculators", tmp_path / "spec", context)
    assert not caplog.messages
    write_draft(algorithm, draft, "plain", tmp_path / "plain", context)
    plain, spec = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "spec"))
    assert plain["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert spec["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    (message,) = caplog.messages
    assert "only SGLang" in message
    assert "--format vllm" in message


def test_default_taps_need_no_note(tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "plain", context)
    assert not caplog.messages


def _offsets_as_ids(files: DraftFiles) -> None:
    files.tensors["d2t"] = files.tensors["d2t"] + torch.arange(DRAFT_VOCABULARY)


def _taps_swapped(files: DraftFiles) -> None:
    files.tensors["fc.weight"] = files.tensors["fc.weight"].roll(64, dims=1)


def _wrong_theta(files: DraftFiles) -> None:
    files.config["rope_theta"] = 100.0
    files.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}


def _norms_exchanged(files: DraftFiles) -> None:
    first, second = "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"
    files.tensors[first], files.tensors[second] = files.tensors[second], files.tensors[first]


def _head_lost(files: DraftFiles) -> None:
    files.tensors["lm_head.weight"] = files.tensors["lm_head.weight"].roll(1, dims=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [_offsets_as_ids, _taps_swapped, _wrong_theta, _norms_exchanged, _head_lost])
def test_self_check_catches(
    tiny_target: Path, tmp_path: Path, fault: Callable[[DraftFiles], None], dtype: torch.dtype
) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context, dtype)
    files = read_files(tmp_path / "draft")
    fault(files)
    if fault is _offsets_as_ids:  # ids beyond the vocabulary cannot even be placed
        files.tensors["d2t"].clamp_(max=300 - DRAFT_VOCABULARY)
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def _tap_norms_exchanged(files: DraftFiles) -> None:
    first, last = "fc_norm.0.weight", "fc_norm.2.weight"
    files.tensors[first], files.tensors[last] = files.tensors[last], files.tensors[first]


def _output_flag_lost(files: DraftFiles) -> None:
    del files.config["norm_output"]


def _tap_flag_lost(files: DraftFiles) -> None:
    files.config["fc_norm"] = False


def _tap_norm_lost(files: DraftFiles) -> None:
    del files.tensors["fc_norm.2.weight"]


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_tap_norms_exchanged, "does not predict"),
        (_output_flag_lost, "does not predict"),
        (_tap_flag_lost, r"skip or refuse them: fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        (_tap_norm_lost, r"missing: fc_norm.2.weight"),
    ],
)
def test_self_check_catches_the_norms_of_eagle31(
    tiny_target: Path, tmp_path: Path, layout: str, fault: Callable[[DraftFiles], None], message: str
) -> None:
    algorithm, draft, context = make(tiny_target, fc_norm=True)
    write_draft(algorithm, draft, layout, tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    fault(files)
    with pytest.raises(CheckpointError, match=message):
        check_files(algorithm, draft, files, context.head, context.device, None)


@pytest.mark.parametrize(
    ("layout", "taps", "planted"),
    [
        ("plain", None, [2, 4, 5]),
        ("plain", (0, 2, 5), [1, 3, 6]),
        ("plain", (0, 2, 5), None),
        ("speculators", None, [1, 3, 4]),
        ("speculators", (0, 2, 5), [0, 2, 5]),
        ("speculators", (0, 2, 5), None),
    ],
)
def test_self_check_catches_tap_ids(
    tiny_target: Path, tmp_path: Path, layout: str, taps: tuple[int, ...] | None, planted: list[int] | None
) -> None:
    """8 layers, by default [1, 3, 4]. Planted: the other engine's numbering, and a list that was left out."""
    algorithm, draft, context = make(tiny_target, taps=taps)
    write_draft(algorithm, draft, layout, tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    place = files.config if layout == "speculators" else files.config["eagle_config"]
    place["eagle_aux_hidden_state_layer_ids"] = planted
    with pytest.raises(CheckpointError, match="tap ids are wrong"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def test_self_check_sees_small_shifts_of_a_flat_draft(tiny_target: Path, tmp_path: Path) -> None:
    """No probability of a flat draft is far from another, whatever its order."""
    algorithm, draft, context = make(tiny_target)
    with torch.no_grad():
        draft.get_parameter("lm_head.weight").mul_(0.01)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    _head_lost(files)
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def test_unknown_and_missing_tensors_are_refused(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    tensors = load_file(tmp_path / "draft/model.safetensors")
    tensors["midlayer.mlp.gate_projection.weight"] = tensors.pop("midlayer.mlp.gate_proj.weight")
    save_file(tensors, tmp_path / "draft/model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: midlayer.mlp.gate_proj.weight; unknown.*gate_projection"):
        read_draft(tmp_path / "draft", algorithm.target)


def test_plain_refuses_what_sglang_would_serve_wrongly(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target, taps=(4,), norm_before_residual=True)
    with pytest.raises(ConfigError) as caught:
        write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    assert {problem.field for problem in caught.value.problems} == {"draft.taps", "draft.norm_before_residual"}
    assert not (tmp_path / "draft").exists()
    assert algorithm.layouts == ("speculators",)  # what a run writes at its end
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)


@pytest.mark.parametrize("taps", [(1, 4), (0, 2, 4, 5)])
def test_other_numbers_of_taps_are_said(
    tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, taps: tuple[int, ...]
) -> None:
    """SGLang, since it reads how many there are, in `num_aux_hidden_states` or from the list."""
    algorithm, draft, context = make(tiny_target, taps=taps)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert (
        config["num_aux_hidden_states"] == len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]) == len(taps)
    )
    assert any(f"24663 (May 2026); this one has {len(taps)}" in message for message in caplog.messages)
    again, _ = read_draft(tmp_path / "draft", algorithm.target)
    assert again.taps == taps


def test_a_failed_export_leaves_the_old_one(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    before = (tmp_path / "draft/model.safetensors").read_bytes()

    def damaged(self: object, state: dict[str, Tensor], layout: str) -> DraftFiles:
        files = original(self, state, layout)
        _taps_swapped(files)
        return files

    original = type(algorithm).to_files
    monkeypatch.setattr(type(algorithm), "to_files", damaged)
    with pytest.raises(CheckpointError, match="does not predict"):
        write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    assert (tmp_path / "draft/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_directory_of_something_else_is_not_replaced(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not a draft directory"):
        write_draft(algorithm, draft, "plain", tmp_path / "mine", context)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_target_and_a_draft_with_files_of_others_are_not_replaced(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    shutil.copytree(tiny_target, tmp_path / "target")
    (tmp_path / "bare").mkdir()  # a target of a draft's two files
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_target / name, tmp_path / "bare")
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    (tmp_path / "draft/README.md").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in (("target", "not a draft"), ("bare", "not a draft"), ("draft", "also holds README.md")):
        with pytest.raises(CheckpointError, match=message):
            write_draft(algorithm, draft, "plain", tmp_path / name, context)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_modes_follow_the_umask(tiny_target: Path, tmp_path: Path, umask: int, file: int, directory: int) -> None:
    algorithm, draft, context = make(tiny_target)
    earlier = os.umask(umask)
    try:
        write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
        Probe.synthetic(3, context.head).save(tmp_path / "probe.safetensors")
    finally:
        os.umask(earlier)
    assert (tmp_path / "probe.safetensors").stat().st_mode & 0o777 == file
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "draft").iterdir()}
    assert modes == {"config.json": file, "model.safetensors": file}
    assert (tmp_path / "draft").stat().st_mode & 0o777 == directory


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "truncated"),
        (lambda d: (d / "config.json").write_text('{"architectures": ["BertModel"]}'), "which no algorithm here reads"),
        (lambda d: (d / "config.json").write_text('{"architectures": null}'), "which no algorithm here reads"),
        (lambda d: (d / "config.json").write_text('{"architectures": 5}'), "which no algorithm here reads"),
    ],
)
def test_unreadable_drafts(tiny_target: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    damage(tmp_path / "draft")
    with pytest.raises(CheckpointError, match=message):
        read_draft(tmp_path / "draft", algorithm.target)


@pytest.mark.parametrize(
    "fields",
    [
        {"eagle_config": "abc"},
        {"torchspec": {"tap_layers": 3}},
        {"torchspec": None, "eagle_config": {"eagle_aux_hidden_state_layer_ids": "abc"}},
        {"torchspec": [1, 3, 4]},
    ],
)
def test_odd_values_are_named(tiny_target: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    path = tmp_path / "draft/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=r"config.json of the draft: .* must be "):
        read_draft(tmp_path / "draft", algorithm.target)


def test_a_draft_for_another_target_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    other = replace(algorithm.target, vocab_size=500, hidden_size=128)
    with pytest.raises(CheckpointError, match="does not fit the target"):
        read_draft(tmp_path / "draft", other)


def test_a_map_from_another_tokenizer_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    tensors = load_file(tmp_path / "draft/model.safetensors")
    tensors["d2t"] = tensors["d2t"] + 1000
    save_file(tensors, tmp_path / "draft/model.safetensors")
    with pytest.raises(CheckpointError, match="belongs to another tokenizer or is damaged"):
        read_draft(tmp_path / "draft", algorithm.target)


def test_a_copied_target_embedding_is_accepted_and_another_refused(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    path = tmp_path / "draft/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "embed_tokens.weight": context.head.embedding_VH.clone()}, path)
    read_draft(tmp_path / "draft", algorithm.target)
    save_file({**tensors, "embed_tokens.weight": context.head.embedding_VH + 1}, path)
    with pytest.raises(CheckpointError, match="made for another target"):
        read_draft(tmp_path / "draft", algorithm.target)


def test_probe_round_trip(tmp_path: Path) -> None:
    probe = Probe(taps_TNH=torch.randn(5, 3, 8), next_tokens_T=torch.arange(5))
    probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert torch.equal(loaded.taps_TNH, probe.taps_TNH)
    assert torch.equal(loaded.next_tokens_T, probe.next_tokens_T)


def test_an_algorithm_that_cannot_be_loaded_is_in_nobodys_way(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, draft, context = make(tiny_target)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    known = registry.algorithms()
    broken = EntryPoint("absent", "no_such_module:SPEC", "torchspec.algorithms")  # asked before eagle3
    monkeypatch.setattr(registry, "algorithms", lambda: replace(known, entries={"absent": [broken], **known.entries}))
    assert read_draft(tmp_path / "draft", algorithm.target)[0].taps == algorithm.taps
    assert "No module named 'no_such_module'" in caplog.text
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)


LATENT: list[dict[str, object]] = [
    {},
    {"fc_norm": True},
    {"hidden_size": 32, "v_head_dim": 16},
    {"taps": (0, 2, 5, 6), "num_attention_heads": 2},
]


@pytest.mark.parametrize("options", LATENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_latent_attention_round_trip(
    tiny_deepseek: Path, tmp_path: Path, options: dict[str, object], dtype: torch.dtype
) -> None:
    algorithm, draft, context = make(tiny_deepseek, attention="mla", **options)
    check = write_draft(algorithm, draft, "plain", tmp_path / "draft", context, dtype)
    assert check.total_variation < 1e-5
    again, loaded = read_draft(tmp_path / "draft", algorithm.target)
    assert (again.name, again.taps, again.geometry) == (algorithm.name, algorithm.taps, algorithm.geometry)
    state = loaded.state_dict()
    for name, value in draft.state_dict().items():
        kept = value.to(dtype).float() if value.is_floating_point() else value
        assert torch.equal(state[name], kept), name


def test_engines_find_latent_attention_where_they_look(
    tiny_deepseek: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, draft, context = make(tiny_deepseek, attention="mla", fc_norm=True)
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Eagle3DeepseekV2ForCausalLM"], "deepseek_v2")
    assert (config["fc_norm"], config["norm_output"], config["rope_interleave"]) == (True, True, True)
    assert "head_dim" not in config
    assert "24826" in caplog.text
    assert "51092" not in caplog.text  # it is about plain rotation
    # How engines come to the sizes and the rotation: through transformers.
    read = AutoConfig.from_pretrained(tmp_path / "draft")
    geometry = algorithm.geometry
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(read, name) == getattr(geometry, name), name
    rope = read.rope_parameters
    assert {name: rope[name] for name in geometry.rope_parameters} == geometry.rope_parameters
    names = load_file(tmp_path / "draft/model.safetensors").keys()
    assert "midlayer.self_attn.kv_a_proj_with_mqa.weight" in names
    assert "midlayer.self_attn.q_proj.weight" not in names


def test_published_names_of_latent_attention_are_read(tiny_deepseek: Path, tmp_path: Path) -> None:
    """`layers.0`, a model_type of Kimi-K2, no fields of ours, and a copy of the target's embedding."""
    algorithm, draft, context = make(tiny_deepseek, attention="mla")
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    path = tmp_path / "draft/config.json"
    config = json.loads(path.read_text()) | {"model_type": "kimi_k2"}
    del config["torchspec"], config["rope_parameters"], config["rope_interleave"]
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "draft/model.safetensors")
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    tensors["embed_tokens.weight"] = context.head.embedding_VH.clone()
    save_file(tensors, tmp_path / "draft/model.safetensors")
    again, loaded = read_draft(tmp_path / "draft", algorithm.target)
    assert again.geometry == algorithm.geometry
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in draft.state_dict().items())


def test_plain_rotation_of_latent_attention_is_remarked(
    tiny_deepseek: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 5e3}))
    algorithm, draft, context = make(tiny_deepseek, attention="mla", config=tmp_path / "config.json")
    check = write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    assert check.total_variation < 1e-5
    assert "51092" in caplog.text


def test_speculators_refuse_latent_attention(tiny_deepseek: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_deepseek, attention="mla")
    with pytest.raises(ConfigError, match="--format sglang"):
        write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)


def _halves(files: DraftFiles) -> None:
    """Rotated parts laid out as for a rotation of halves."""
    weight = files.tensors["midlayer.self_attn.kv_a_proj_with_mqa.weight"]
    weight[-4:] = weight[-4:].view(2, 2, -1).transpose(0, 1).flatten(0, 1).clone()


def _strength_lost(files: DraftFiles) -> None:
    del files.config["rope_parameters"]["mscale_all_dim"]


def _stretch_lost(files: DraftFiles) -> None:
    files.config["rope_parameters"]["factor"] = 1.0


def _latent_norms_exchanged(files: DraftFiles) -> None:
    weight = files.tensors["midlayer.self_attn.kv_a_layernorm.weight"]
    files.tensors["midlayer.self_attn.kv_a_layernorm.weight"] = weight.flip(0)


def _keys_behind_values(files: DraftFiles) -> None:
    weight = files.tensors["midlayer.self_attn.kv_b_proj.weight"]
    files.tensors["midlayer.self_attn.kv_b_proj.weight"] = weight.view(4, 14, -1).roll(6, 1).flatten(0, 1)


@pytest.mark.parametrize(
    "fault", [_halves, _strength_lost, _stretch_lost, _latent_norms_exchanged, _keys_behind_values]
)
def test_self_check_catches_faults_of_latent_attention(
    tiny_deepseek: Path, tmp_path: Path, fault: Callable[[DraftFiles], None]
) -> None:
    algorithm, draft, context = make(tiny_deepseek, attention="mla")
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    fault(files)
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def test_tensors_of_the_other_kind_of_attention_are_refused(tiny_deepseek: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_deepseek, attention="mla")
    write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    path = tmp_path / "draft/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLMEagle3"]}))
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj"):
        read_draft(tmp_path / "draft", algorithm.target)
