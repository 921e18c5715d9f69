"""What SGLang's engine is constructed with on each device, and what is refused before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.backends.sglang.worker.arguments import MARGIN, Shape, engine_arguments, environment, read_shape
from torchspec.core.errors import ConfigError, TargetError
from torchspec.core.workers.runner import WorkerSettings

SHAPE = Shape(layers=6, context=512, dtype="bfloat16")


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle3"]}))
    return WorkerSettings(target=tmp_path / "target", device="cpu", dtype="auto", store=tmp_path)


DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_cuda_graph": True},
    "cuda": {"sampling_backend": "pytorch"},
    "npu": {"attention_backend": "ascend", "sampling_backend": "ascend"},
}


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_each_device(settings: WorkerSettings, device: str) -> None:
    found = engine_arguments(replace(settings, device=device, tensor_parallel=2, memory_fraction=0.4), SHAPE)
    assert found["device"] == device
    assert found | DEVICES[device] == found
    assert (found["tp_size"], found["mem_fraction_static"], found["dtype"]) == (2, 0.4, "bfloat16")
    assert found["skip_tokenizer_init"]
    assert not found["trust_remote_code"]
    assert "speculative_algorithm" not in found


def test_environment_of_the_cpu_alone_is_special(settings: WorkerSettings) -> None:
    assert environment(settings, [0, 1])["SGLANG_USE_CPU_ENGINE"] == "1"
    for device in ("cuda", "npu"):
        found = environment(replace(settings, device=device, tensor_parallel=2), [0, 1])
        assert found == {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"), [([0, 1], 2, "0|1"), ([2, 3, 5, 8], 2, "2,5|3,8"), ([4], 3, "4|4|4")]
)
def test_ranks_on_the_cpu_share_its_cores(settings: WorkerSettings, cores: list[int], ranks: int, shares: str) -> None:
    found = environment(replace(settings, tensor_parallel=ranks), cores)
    assert found["SGLANG_CPU_OMP_THREADS_BIND"] == shares


def test_capture(settings: WorkerSettings) -> None:
    found = engine_arguments(replace(settings, taps=(4, 0)), SHAPE)
    assert found["return_aux_hidden_state_layer_ids"] == [0, 4]
    assert found["enable_return_aux_hidden_states"]
    assert found["disable_radix_cache"]
    assert found["context_length"] == 512 + MARGIN
    assert "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN" in environment(replace(settings, taps=(4, 0)), [0])


def test_prompts_may_fill_the_context_unless_a_draft_decodes(settings: WorkerSettings, tmp_path: Path) -> None:
    """SGLang takes a longer context only where its variable says so."""
    drafting = {"draft": tmp_path / "draft", "draft_length": 2}
    for changes, longer in (({}, True), ({"taps": (4, 0)}, True), (drafting, False)):
        asked = replace(settings, **changes)
        assert ("context_length" in engine_arguments(asked, SHAPE)) == longer
        assert ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN" in environment(asked, [0])) == longer


def test_draft_is_a_chain(settings: WorkerSettings, tmp_path: Path) -> None:
    found = engine_arguments(replace(settings, draft=tmp_path / "draft", draft_length=5), SHAPE)
    assert found["speculative_algorithm"] == "EAGLE3"
    assert found["speculative_draft_model_path"] == str(tmp_path / "draft")
    assert found["speculative_num_steps"] == 5
    assert found["speculative_num_draft_tokens"] == 6
    assert found["speculative_eagle_topk"] == 1


def test_options_go_before_what_torchspec_would_choose(settings: WorkerSettings) -> None:
    found = engine_arguments(
        replace(settings, options={"attention_backend": "intel_amx", "chunked_prefill_size": 16}), SHAPE
    )
    assert found["attention_backend"] == "intel_amx"
    assert found["chunked_prefill_size"] == 16


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"taps": (1, 5)}, "cannot capture layer 5, the target's last"),
        ({"taps": (1, 6)}, "layers 0 to 5 and no layer 6"),
        ({"taps": (1, 1)}, "named twice"),
        (
            {"taps": (1,), "options": {"disable_radix_cache": False}},
            "disable_radix_cache.*no hidden states for the tokens",
        ),
        ({"taps": (1,), "options": {"pp_size": 2}}, "pp_size"),
        ({"taps": (1,), "store": None}, "needs a feature store"),
        ({"options": {"tp_size": 2}}, "engine.options.tp_size.*engine.tensor_parallel"),
        ({"options": {"allow_auto_truncate": True}}, "shortened prompt"),
        ({"device": "tpu"}, "choices: cpu, cuda, npu"),
    ],
)
def test_refused_by_name(settings: WorkerSettings, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        engine_arguments(replace(settings, **change), SHAPE)


def test_an_option_that_says_what_holds_anyway_is_no_problem(settings: WorkerSettings) -> None:
    engine_arguments(replace(settings, taps=(1,), options={"disable_radix_cache": True}), SHAPE)


def test_drafts_that_sglang_cannot_decode_with(settings: WorkerSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)capture layers and decode.*at least one token"):
        engine_arguments(replace(settings, draft=tmp_path / "draft", taps=(1,)), SHAPE)
    with pytest.raises(ConfigError, match="cannot be read"):
        engine_arguments(replace(settings, draft=tmp_path / "none", draft_length=2), SHAPE)


def given(settings: WorkerSettings, config: dict[str, Any]) -> WorkerSettings:
    assert settings.store is not None
    (settings.store / "draft" / "config.json").write_text(json.dumps(config))
    return replace(settings, draft=settings.store / "draft", draft_length=4)


@pytest.mark.parametrize(
    ("config", "algorithm"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "fc_norm": True}, "EAGLE3"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "EAGLE3"),
        ({"architectures": ["DFlashDraftModel"]}, "DFLASH"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "domino"}}, "DFLASH"),
        ({"architectures": ["Qwen3DSparkModel"]}, "DSPARK"),
    ],
)
def test_each_draft_has_its_algorithm(settings: WorkerSettings, config: dict[str, Any], algorithm: str) -> None:
    """A block is drafted in one step, so that there is none to count."""
    settings = given(settings, config)
    found = engine_arguments(settings, SHAPE)
    assert (found["speculative_algorithm"], found["speculative_num_draft_tokens"]) == (algorithm, 5)
    assert found["speculative_draft_model_path"] == str(settings.draft)
    assert found.get("speculative_num_steps") == (4 if algorithm == "EAGLE3" else None)


def test_a_target_with_a_head_is_its_own_draft(settings: WorkerSettings) -> None:
    found = engine_arguments(replace(settings, draft=settings.target, draft_length=2), SHAPE)
    assert (found["speculative_algorithm"], found["speculative_num_steps"]) == ("NEXTN", 2)
    assert found["speculative_draft_model_path"] == str(settings.target)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM; the SGLang worker decodes with plain drafts of"),
        ({"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"]}, "a draft of peagle"),
        ({}, "a draft of None"),
        ([], "no JSON object"),
    ],
)
def test_drafts_that_sglang_has_no_algorithm_for(settings: WorkerSettings, config: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        engine_arguments(given(settings, config), SHAPE)


@pytest.mark.parametrize("nested", [False, True])
def test_shape_is_read_from_the_configuration(tmp_path: Path, nested: bool) -> None:
    text = {"num_hidden_layers": 3, "max_position_embeddings": 64, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text} if nested else text))
    assert read_shape(tmp_path) == Shape(layers=3, context=64, dtype="float16")


def test_no_shape(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="has no 'num_hidden_layers'"):
        read_shape(tmp_path)
