"""Exported drafts predict what the trained draft predicts, and ways of writing or reading them wrongly are caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchspec.core import registry
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.layout import ExportContext, read_draft, read_files, write_draft
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import Algorithm, DraftFiles
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec


def make(target: Path, vocab_size: int = 120, **options: Any) -> tuple[Algorithm, nn.Module, ExportContext]:
    """A draft with every weight random, norms included, so that no tensor could be left out unnoticed."""
    torch.manual_seed(0)
    device = registry.load_device("cpu")
    head = load_target_head(target, dtype=torch.float32, device=torch.device("cpu"))
    spec = registry.algorithms().spec("peagle")
    algorithm = spec.create(spec.options(vocab_size=vocab_size, depths=5, **options), read_target_spec(target))
    ids_N = torch.randperm(300)[:vocab_size].sort().values
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=300), head)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif name != "lm_head.weight":
                parameter.normal_(std=0.15)
        draft.mask_hidden.normal_()
    return algorithm, draft, ExportContext(head=head, device=device)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 3},
        {"num_layers": 1, "vocab_size": 300, "taps": (0, 2, 5, 6)},
        {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "norm_before_residual": True, "mask_token": 5},
    ],
)
def test_round_trip_predicts_the_same(tiny_target: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    algorithm, draft, context = make(tiny_target, **options)
    check = write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    assert check.total_variation < 1e-5
    again, loaded = read_draft(tmp_path / "draft", algorithm.target)
    assert (again.name, again.taps, again.geometry) == (algorithm.name, algorithm.taps, algorithm.geometry)
    assert again.options.depths == 5
    state = loaded.state_dict()
    assert state.keys() == draft.state_dict().keys()
    for name, value in draft.state_dict().items():
        assert torch.equal(state[name], value), name
    assert ("d2t" in load_file(tmp_path / "draft/model.safetensors")) == (options.get("vocab_size") != 300)


def published(directory: Path, change: dict[str, Any], mask: str) -> DraftFiles:
    """The draft as Amazon's stand: an EAGLE-3 directory of vLLM's names and numbering, without speculators fields."""
    files = read_files(directory)
    own = files.config
    config = {
        **own["transformer_layer_config"],
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": own["draft_vocab_size"],
        "norm_before_residual": own["norm_before_residual"],
        "eagle_aux_hidden_state_layer_ids": own["eagle_aux_hidden_state_layer_ids"],
        mask: own["mask_token_id"],
        **change,
    }
    names = {name: name.replace("layers.0.", "midlayer.", 1) for name in files.tensors}
    tensors = {names[name]: tensor for name, tensor in files.tensors.items()}
    return DraftFiles(config=config, tensors={**tensors, "mask_hidden": files.tensors["mask_hidden"].flatten()})


@pytest.mark.parametrize(
    ("mask", "change"),
    [("ptd_token_id", {}), ("pard_token", {"architectures": ["LlamaForCausalLM"]})],
)
def test_drafts_of_the_layout_before_are_read(
    tiny_target: Path, tmp_path: Path, mask: str, change: dict[str, Any]
) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=2, norm_before_residual=True, mask_token=7, taps=(0, 3, 5))
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = published(tmp_path / "draft", change, mask)
    readers = [name for name in registry.algorithms().names() if registry.algorithms().spec(name).reads(files.config)]
    assert readers == ["peagle"]
    again, loaded = registry.algorithms().spec("peagle").from_files(files, algorithm.target)
    assert (again.taps, again.geometry) == (algorithm.taps, algorithm.geometry)
    for name, value in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    written = again.to_files(dict(loaded.state_dict()), "speculators")
    assert check_files(again, loaded, written, context.head, context.device, None).total_variation < 1e-5
    (tmp_path / "config.json").write_text(json.dumps(files.config))
    options = registry.algorithms().spec("peagle").options(config=tmp_path / "config.json")
    derived = registry.algorithms().spec("peagle").create(options, algorithm.target)
    assert (derived.taps, derived.geometry) == (algorithm.taps, algorithm.geometry)


def test_an_unsaid_field_of_the_layout_before_is_what_vllm_takes(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=1)
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = published(tmp_path / "draft", {}, "ptd_token_id")
    for name in ("num_hidden_layers", "norm_before_residual", "eagle_aux_hidden_state_layer_ids"):
        del files.config[name]
    again, _ = registry.algorithms().spec("peagle").from_files(files, algorithm.target)
    assert (again.taps, again.geometry) == (algorithm.taps, algorithm.geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pard_token": 8}, "name different tokens"),
        ({"ptd_token_id": "7"}, "mask_token_id must be a token's number"),
        ({"fc_norm": True}, "fc_norm is True"),
        ({"num_hidden_layers": 2}, "missing: layers.1"),
    ],
)
def test_what_the_layout_before_says_wrongly_is_refused(
    tiny_target: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=1)
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = published(tmp_path / "draft", change, "ptd_token_id")
    files.config.update(change)
    with pytest.raises(CheckpointError, match=message):
        registry.algorithms().spec("peagle").from_files(files, algorithm.target)


def test_bf16_export_is_checked_as_closely(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=2)
    check = write_draft(algorithm, draft, "speculators", tmp_path / "draft", context, dtype=torch.bfloat16)
    assert 0 < check.total_variation < 1e-5


def test_names_and_fields_that_vllm_reads(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=2)
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert "model_type" not in config  # vLLM would take the directory for a whole model
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "peagle"
    assert config["mask_token_id"] == 299
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["norm_before_residual"] is config["norm_before_fc"] is False
    assert config["transformer_layer_config"]["num_hidden_layers"] == 2
    (method,) = config["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == 5
    tensors = load_file(tmp_path / "draft/model.safetensors")
    assert tensors["mask_hidden"].shape == (1, 1, 3 * 64)
    assert [tensors[f"layers.{n}.self_attn.q_proj.weight"].shape[1] for n in (0, 1)] == [2 * 64, 64]
    assert "layers.1.hidden_norm.weight" not in tensors


def test_another_number_of_taps_is_told(tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=1, taps=(2, 5))
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 2
    (message,) = caplog.messages
    assert "num_aux_hidden_states; this one has 2" in message


def _mask_feature_negated(files: DraftFiles) -> None:
    files.tensors["mask_hidden"] = -files.tensors["mask_hidden"]


def _other_mask_token(files: DraftFiles) -> None:
    files.config["mask_token_id"] = 3


def _layers_exchanged(files: DraftFiles) -> None:
    for name in [name for name in files.tensors if name.startswith("layers.1.")]:
        other = name.replace("layers.1.", "layers.2.")
        files.tensors[name], files.tensors[other] = files.tensors[other], files.tensors[name]


def _norm_flag_set(files: DraftFiles) -> None:
    files.config["norm_before_residual"] = True


def _head_lost(files: DraftFiles) -> None:
    files.tensors["lm_head.weight"] = files.tensors["lm_head.weight"].roll(1, dims=0)


@pytest.mark.parametrize(
    "fault", [_mask_feature_negated, _other_mask_token, _layers_exchanged, _norm_flag_set, _head_lost]
)
def test_self_check_catches(tiny_target: Path, tmp_path: Path, fault: Callable[[DraftFiles], None]) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=3)
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    fault(files)
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def _renamed(files: DraftFiles) -> None:
    files.tensors["layers.1.mlp.gate_projection.weight"] = files.tensors.pop("layers.1.mlp.gate_proj.weight")


def _mask_feature_lost(files: DraftFiles) -> None:
    del files.tensors["mask_hidden"]


def _one_layer_fewer(files: DraftFiles) -> None:
    files.config["transformer_layer_config"]["num_hidden_layers"] = 1


def _mask_token_lost(files: DraftFiles) -> None:
    del files.config["mask_token_id"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_renamed, r"missing: layers.1.mlp.gate_proj.weight; unknown.*gate_projection"),
        (_mask_feature_lost, "missing: mask_hidden"),
        (_one_layer_fewer, "unknown.*layers.1.input_layernorm.weight"),
        (_mask_token_lost, "mask_token_id"),
    ],
)
def test_what_vllm_would_refuse_or_skip_is_named(
    tiny_target: Path, tmp_path: Path, fault: Callable[[DraftFiles], None], message: str
) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=2)
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    fault(files)
    with pytest.raises(CheckpointError, match=message):
        check_files(algorithm, draft, files, context.head, context.device, None)
    with pytest.raises(CheckpointError, match=message):
        registry.algorithms().spec("peagle").from_files(files, algorithm.target)


@pytest.mark.parametrize("planted", [[1, 3, 4], None, [3, 4, 5]])
def test_self_check_catches_tap_ids(tiny_target: Path, tmp_path: Path, planted: list[int] | None) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=1, taps=(0, 3, 4))
    write_draft(algorithm, draft, "speculators", tmp_path / "draft", context)
    files = read_files(tmp_path / "draft")
    files.config["eagle_aux_hidden_state_layer_ids"] = planted
    with pytest.raises(CheckpointError, match="tap ids are wrong"):
        check_files(algorithm, draft, files, context.head, context.device, None)


def test_the_plain_layout_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    algorithm, draft, context = make(tiny_target, num_layers=1)
    with pytest.raises(ConfigError, match="--format vllm"):
        write_draft(algorithm, draft, "plain", tmp_path / "draft", context)
    assert not (tmp_path / "draft").exists()
