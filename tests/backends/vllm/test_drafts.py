"""By which of its methods vLLM decodes with a draft, and which drafts it has none for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchspec.backends.vllm.worker.drafts import speculative_config
from torchspec.core.errors import ConfigError

DOMINO = {"architectures": ["DFlashDraftModel"], "dflash_config": {"projector_type": "domino"}}


def found(place: Path, config: Any) -> dict[str, Any]:
    (place / "config.json").write_text(json.dumps(config))
    return speculative_config(place / "target", place, 4)


@pytest.mark.parametrize(
    ("config", "method", "parallel"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "fc_norm": True}, "eagle3", False),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "eagle3", False),
        ({"architectures": ["LlamaForCausalLM"], "ptd_token_id": 7}, "eagle3", True),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 7}}, "dflash", False),
        ({"architectures": ["Qwen3DSparkModel"], "markov_head_type": "vanilla"}, "dspark", False),
        ({"speculators_model_type": "eagle3"}, "eagle3", False),
        ({"speculators_model_type": "peagle"}, "eagle3", True),
        ({"speculators_model_type": "dflash"}, "dflash", False),
        ({"speculators_model_type": "dspark"}, "dspark", False),
    ],
)
def test_each_draft_has_its_method(tmp_path: Path, config: dict[str, Any], method: str, parallel: bool) -> None:
    given = found(tmp_path, config)
    assert given == {
        "method": method, "model": str(tmp_path), "num_speculative_tokens": 4,
        **({"parallel_drafting": True} if parallel else {}),
    }  # fmt: skip


def test_a_target_with_a_head_is_its_own_draft(tmp_path: Path) -> None:
    assert speculative_config(tmp_path, tmp_path, 2) == {"method": "mtp", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (DOMINO, "with a projector of type domino"),
        ({"architectures": ["Qwen3DSparkModel"], "markov_head_type": "gated"}, "with a gated head"),
        ({"speculators_model_type": "medusa"}, "a draft of medusa"),
        ({"architectures": ["LlamaForCausalLM"]}, "a draft of .*LlamaForCausalLM"),
        ({}, "a draft of None"),
        ([], "no JSON object"),
    ],
)
def test_drafts_that_vllm_has_no_method_for(tmp_path: Path, config: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        found(tmp_path, config)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        speculative_config(tmp_path / "target", tmp_path, 4)
