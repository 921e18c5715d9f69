"""EAGLE-3.1 is EAGLE-3 with two norms: which of the two a run or a draft is, and that neither is taken for the other.

The arithmetic is tested together with EAGLE-3's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_spec import read_target_spec

LAYER = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 300}
PLAIN = {"architectures": ["LlamaForCausalLMEagle3"], **LAYER}
SPECULATORS = {"speculators_model_type": "eagle3", "transformer_layer_config": LAYER}


@pytest.fixture
def spec(tiny_llama: Path) -> TargetSpec:
    return read_target_spec(tiny_llama)


@pytest.fixture
def draft_config(tmp_path: Path) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return path

    return write


def create(name: str, target: TargetSpec, **options: Any) -> Algorithm:
    found = registry.algorithms().spec(name)
    return found.create(found.options(**options), target)


def norms(algorithm: Any) -> tuple[bool, bool]:
    return algorithm.geometry.fc_norm, algorithm.geometry.norm_output


def test_both_norms_are_the_default(spec: TargetSpec) -> None:
    algorithm = create("eagle3.1", spec)
    assert algorithm.name == "eagle3.1"
    assert norms(algorithm) == (True, True)
    assert norms(create("eagle3.1", spec, norm_output=False)) == (True, False)
    assert norms(create("eagle3", spec)) == (False, False)


def test_neither_norm_is_eagle3(spec: TargetSpec) -> None:
    with pytest.raises(ConfigError, match="algorithm=eagle3"):
        create("eagle3.1", spec, fc_norm=False, norm_output=False)


@pytest.mark.parametrize("config", [PLAIN, SPECULATORS], ids=["plain", "speculators"])
@pytest.mark.parametrize("stated", [{"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}])
def test_eagle3_refuses_a_config_with_norms_and_names_the_other(
    spec: TargetSpec, draft_config: Callable[..., Path], config: dict[str, Any], stated: dict[str, bool]
) -> None:
    with pytest.raises(ConfigError, match=r"algorithm=eagle3\.1") as caught:
        create("eagle3", spec, config=draft_config(**config, **stated))
    assert len(caught.value.problems) == 1
    other = {"fc_norm": False, "norm_output": False} | stated
    assert norms(create("eagle3.1", spec, config=draft_config(**config, **other))) == tuple(other.values())


def test_a_config_without_the_fields_leaves_them_to_the_options(
    spec: TargetSpec, draft_config: Callable[..., Path]
) -> None:
    assert norms(create("eagle3.1", spec, config=draft_config(**PLAIN))) == (True, True)
    with pytest.raises(ConfigError, match="the draft config says True"):
        create("eagle3.1", spec, config=draft_config(**PLAIN, fc_norm=True), fc_norm=False)


def test_one_norm_of_all_taps_takes_the_place_of_one_each(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    config = draft_config(**SPECULATORS, norm_before_fc=True)
    algorithm: Any = create("eagle3.1", spec, config=config)
    assert (algorithm.geometry.norm_before_fc, *norms(algorithm)) == (True, False, False)
    with pytest.raises(ConfigError, match=r"(?s)its norm_before_fc is of EAGLE-3.1.*algorithm=eagle3\.1"):
        create("eagle3", spec, config=config)
    with pytest.raises(ConfigError, match=r"(?s)one of fc_norm, .* and norm_before_fc.*draft.fc_norm=false"):
        create("eagle3.1", spec, norm_before_fc=True)


@pytest.mark.parametrize("config", [PLAIN, SPECULATORS], ids=["plain", "speculators"])
@pytest.mark.parametrize(
    ("stated", "reader"),
    [
        ({}, "eagle3"),
        ({"fc_norm": False, "norm_output": False}, "eagle3"),
        ({"fc_norm": True}, "eagle3.1"),
        ({"norm_output": True}, "eagle3.1"),
        ({"norm_before_fc": True}, "eagle3.1"),
    ],
)
def test_every_draft_has_one_reader(config: dict[str, Any], stated: dict[str, bool], reader: str) -> None:
    known = registry.algorithms()
    reads = [name for name in ("eagle3", "eagle3.1") if known.spec(name).reads(config | stated)]
    assert reads == [reader]
