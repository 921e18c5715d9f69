"""What vLLM's engine is constructed with on each device, how it numbers layers, and which options are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.backends.vllm.worker.arguments import engine_arguments, environment, layer_ids
from torchspec.core.errors import ConfigError
from torchspec.core.workers.runner import WorkerSettings

LAYERS, CONTEXT = 8, 512


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(target=tmp_path / "target", device="cuda", dtype="bfloat16")


def arguments(settings: WorkerSettings, **changes: Any) -> dict[str, Any]:
    return engine_arguments(replace(settings, **changes), LAYERS, CONTEXT)


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_each_device(settings: WorkerSettings, tmp_path: Path, device: str) -> None:
    fraction = None if device == "cpu" else 0.4
    found = arguments(settings, device=device, tensor_parallel=2, memory_fraction=fraction, trust_remote_code=True)
    assert found["model"] == str(tmp_path / "target")
    assert (found["dtype"], found["tensor_parallel_size"], found["trust_remote_code"]) == ("bfloat16", 2, True)
    assert found["skip_tokenizer_init"]
    assert not found["disable_log_stats"], "its counters would be silent"
    assert found.get("enforce_eager", False) == (device == "cpu")
    assert found.get("gpu_memory_utilization") == (None if device == "cpu" else 0.4)
    assert not {"speculative_config", "kv_transfer_config", "max_model_len"} & found.keys()


def test_a_share_of_memory_means_nothing_on_a_cpu(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE"):
        arguments(settings, device="cpu", memory_fraction=0.4)


def test_an_engine_that_is_told_nothing_of_memory_uses_its_default(settings: WorkerSettings) -> None:
    assert "gpu_memory_utilization" not in arguments(settings)


def test_prompts_go_through_a_cpu_whole_unless_layers_are_captured(settings: WorkerSettings) -> None:
    """A piece of a prompt would cost the next one its random numbers; a capture draws none."""
    found = arguments(settings, device="cpu")
    assert (found["enable_chunked_prefill"], found["max_num_batched_tokens"]) == (False, 8192)
    assert engine_arguments(replace(settings, device="cpu"), LAYERS, 40_000)["max_num_batched_tokens"] == 40_000
    for changes in ({"device": "cpu", "taps": (1,)}, {"device": "cuda"}):
        assert "enable_chunked_prefill" not in arguments(settings, **changes)


@pytest.mark.parametrize(
    ("taps", "ids"), [((1, 3, 5), [2, 4, 6, 8]), ((5, 1), [2, 6, 8]), ((0,), [1, 8]), ((2, 7), [3, 8]), ((7,), [8])]
)
def test_layers_as_vllm_numbers_them(settings: WorkerSettings, taps: tuple[int, ...], ids: list[int]) -> None:
    """Its 0 is the embedding, its 8 the last of 8 layers before the norm: listed once, where it is a tap too."""
    assert layer_ids(taps, LAYERS) == ids
    config = arguments(settings, taps=taps)["speculative_config"]
    assert config["method"] == "extract_hidden_states"
    assert config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == ids


def test_capture_goes_through_our_connector(settings: WorkerSettings, tmp_path: Path) -> None:
    found = arguments(settings, taps=(5, 1), store=tmp_path / "store", store_bytes=7)
    transfer = found["kv_transfer_config"]
    assert transfer["kv_connector"] == "TorchspecConnector"
    assert transfer["kv_connector_module_path"] == "torchspec.backends.vllm.worker.connector"
    assert transfer["kv_role"] == "kv_producer"
    assert transfer["kv_connector_extra_config"]["torchspec"] == {
        "store": str(tmp_path / "store"), "store_bytes": 7, "taps": [5, 1], "layers": 8,
    }  # fmt: skip
    assert found["max_model_len"] == CONTEXT + 1, "a record may be as long as the target reads"
    assert environment(replace(settings, taps=(5, 1)))["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in environment(settings)


def test_draft_is_decoded_with_and_its_rounds_are_told(settings: WorkerSettings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    found = arguments(settings, draft=tmp_path, draft_length=5)
    assert found["speculative_config"] == {"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": 5}
    assert found["per_request_spec_decode_metrics"] == "detailed"
    assert "max_model_len" not in found


def test_environment(settings: WorkerSettings) -> None:
    for device in ("cpu", "cuda", "npu"):
        found = environment(replace(settings, device=device))
        assert (found["VLLM_NO_USAGE_STATS"], found["DO_NOT_TRACK"], found["HF_HUB_OFFLINE"]) == ("1", "1", "1")
        assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert ("VLLM_CPU_KVCACHE_SPACE" in found) == (device == "cpu")
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment(replace(settings, device=device, tensor_parallel=2))


def test_options_go_before_what_torchspec_would_choose(settings: WorkerSettings) -> None:
    options = {"enforce_eager": False, "enable_chunked_prefill": True, "max_num_seqs": 4}
    found = arguments(settings, device="cpu", options=options)
    assert found | options == found
    assert arguments(settings, taps=(1,), options={"max_model_len": 64})["max_model_len"] == 64


@pytest.mark.parametrize("name", ["speculative_config", "kv_transfer_config"])
def test_options_that_torchspec_works_by_are_refused(settings: WorkerSettings, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.options\.{name}: vLLM captures and drafts by it"):
        arguments(settings, options={name: {}, "max_num_seqs": 4})


def test_every_refused_option_is_named(settings: WorkerSettings) -> None:
    with pytest.raises(ConfigError, match="2 configuration errors"):
        arguments(settings, options={"speculative_config": {}, "kv_transfer_config": {}})
