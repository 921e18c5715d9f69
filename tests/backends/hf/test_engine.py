"""Loading, refusing and closing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from torchspec.backends.api import TargetError
from torchspec.backends.hf.attention import NAME, grouped_sdpa
from torchspec.backends.hf.engine import HfEngine
from torchspec.backends.hf.target import choose_dtype
from torchspec.core.errors import ConfigError
from torchspec.core.registry import backends


def test_registered_with_its_capabilities() -> None:
    spec = backends().spec("hf")
    assert spec.capabilities == {"capture", "generate", "decode", "images"}
    assert spec.probe().ok
    assert spec.probe().reason.startswith("transformers 5")


def test_describes_the_target(qwen3: HfEngine, tiny_target: Path) -> None:
    spec = qwen3.describe()
    assert (spec.path, spec.num_layers, spec.hidden_size) == (tiny_target, 8, 64)


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("auto", torch.bfloat16, "meta", torch.bfloat16),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
        ("float16", torch.bfloat16, "meta", torch.float16),
    ],
)
def test_dtype_rule(name: str, stored: torch.dtype, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(name, stored, torch.device(device)) == expected


def test_unknown_dtype_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="auto, float32, bfloat16, float16"):
        choose_dtype("int8", torch.float32, torch.device("cpu"))


def test_bfloat16_runs(tiny_target: Path, load_hf: Callable[..., HfEngine]) -> None:
    engine = load_hf(tiny_target, dtype="bfloat16")
    session = engine.open([[1, 2, 3], [4]], (1,))
    assert session.prefill.logits_BV.dtype == session.prefill.taps[0].dtype == torch.bfloat16
    assert len(engine.generate([[1, 2], [3]], max_new_tokens=3, temperature=1.0)) == 2


def test_nothing_is_trained_or_dropped_out(qwen3: HfEngine) -> None:
    model = qwen3._target.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_close_lets_go(tiny_target: Path, load_hf: Callable[..., HfEngine]) -> None:
    engine = load_hf(tiny_target)
    engine.close()
    engine.close()
    assert engine._loaded is None
    assert engine.describe().num_layers == 8
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[1]], max_new_tokens=1)


def test_a_parameter_missing_from_the_checkpoint_is_an_error(
    tiny_target: Path, tmp_path: Path, load_hf: Callable[..., HfEngine]
) -> None:
    """transformers would warn and draw it at random."""
    broken = shutil.copytree(tiny_target, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"1 parameters .* missing.*model\.layers\.3\.mlp\.up_proj\.weight"):
        load_hf(broken)


def test_a_config_of_other_weights_is_an_error(
    tiny_target: Path, tmp_path: Path, load_hf: Callable[..., HfEngine]
) -> None:
    broken = shutil.copytree(tiny_target, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(
        TargetError, match=r"24 parameters .*down_proj\.weight \(stored \[64, 96\], expected \[64, 80\]\)"
    ):
        load_hf(broken)


def test_grouped_attention_is_the_definition(qwen3: HfEngine) -> None:
    """Against softmax(q k^T) v by loops in float64, with a hole in the mask; 1e-6 in float32 of order 1."""
    assert qwen3._target.model.config._attn_implementation == NAME
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    keep = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
    keep[1, :, :, 1] = False
    out, _ = grouped_sdpa(nn.Module(), q, k, v, keep, scaling=0.3, dropout=0.0)
    for b in range(2):
        for head in range(6):
            for row in range(3):
                scores = (k[b, head // 3].double() @ q[b, head, row].double()) * 0.3
                weights = F.softmax(scores.masked_fill(~keep[b, 0, row], float("-inf")), dim=-1)
                expected = (weights[:, None] * v[b, head // 3].double()).sum(0)
                torch.testing.assert_close(out[b, row, head].double(), expected, atol=1e-6, rtol=0)


def test_transformers_logging_is_left_as_it_was(tiny_target: Path, load_hf: Callable[..., HfEngine]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_hf(tiny_target)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_tied_and_untied_load_what_is_stored(tiny_llama: Path, llama: HfEngine) -> None:
    stored = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    loaded = llama._target.model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
