"""Drafts of every algorithm in the engines: as they are exported, they decode as our decoder does, or the engine says
why it cannot. What the table of docs/engines.md says of it is what this shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import torchspec
from torchspec.cli import main

BLOCKS: dict[str, Any] = {"block_size": 5, "num_anchors": 16}
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3.1": {},
    "peagle": {"num_layers": 2},
    # vLLM 0.32.0 on a CPU reads the context's keys of all layers by the first one's norm.
    "dflash": {**BLOCKS, "num_layers": 1},
    "dspark": {**BLOCKS, "markov_rank": 16},
    "domino": {**BLOCKS, "gru_hidden_dim": 16},
    "mtp": {"init": "random", "family": "mimo", "objective": {"kl": 1}},
}
STEPS = {"eagle3.1": 40, "peagle": 40, "dflash": 40, "mtp": 40}
"""Of those that are decoded with; of others one step is enough to be refused."""

DECODED = {"vllm": ("eagle3.1", "peagle", "dflash", "mtp"), "sglang": ("eagle3.1", "mtp")}
REFUSED = {
    "vllm": {
        "dspark": "Model Runner V1 does not support: dspark speculative decoding",
        "domino": "with a projector of type domino; the vLLM worker decodes with",
    },
    "sglang": {
        "dflash": "DFLASH speculative decoding is not supported by CpuSRTPlatform on device 'cpu'",
        "domino": "DFLASH speculative decoding is not supported by CpuSRTPlatform on device 'cpu'",
        "dspark": "DSpark speculative decoding only supports CUDA, NPU or XPU device",
        "peagle": "no engine that reads this layout drafts as P-EAGLE does",
    },
}
"""Why these builds do not decode with a draft. A version that does has another row in docs/engines.md."""

EXACT = {("vllm", name) for name in DECODED["vllm"]} | {("sglang", "eagle3.1")}
"""Round by round. SGLang hands MiMo's head the state after the target's final norm, not before it."""


def cases(of: dict[str, Any]) -> pytest.MarkDecorator:
    pairs = [(engine, name) for engine, algorithms in of.items() for name in algorithms]
    ids = [f"{engine}-{name}" for engine, name in pairs]
    return pytest.mark.parametrize(
        ("engine_name", "algorithm"), pairs, ids=ids, indirect=["engine_name"], scope="session"
    )


@pytest.fixture(scope="session")
def mimo(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random target by MiMo's name, with the embedded one's tokenizer: the head of a Qwen2 is MiMo's."""
    path = tmp_path_factory.mktemp("mimo") / "target"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=0,
            initializer_range=0.05, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    for file in embedded.iterdir():
        if "token" in file.name or "template" in file.name:
            (path / file.name).symlink_to(file)
    return path


@pytest.fixture(scope="session")
def target_of(mimo: Path) -> Callable[[str], str]:
    return lambda algorithm: str(mimo) if algorithm == "mtp" else "embedded"


@pytest.fixture(scope="session")
def run_of(
    target_of: Callable[[str], str], conversations: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A short training, once for both engines."""
    made: dict[str, Path] = {}

    def make(algorithm: str) -> Path:
        if algorithm not in made:
            output = tmp_path_factory.mktemp("drafts") / "run"
            steps = STEPS.get(algorithm, 1)
            torchspec.train(
                {
                    "output": output,
                    "device": "cpu",
                    "algorithm": algorithm,
                    "target": {"path": target_of(algorithm), "dtype": "float32"},
                    "data": {"train": [conversations["train"]], "max_length": 128},
                    "train": {"max_steps": steps, "lr": 5e-3, "warmup_steps": min(5, steps), "schedule": "constant"},
                    "draft": DRAFTS[algorithm],
                }
            )
            made[algorithm] = output
        return made[algorithm]

    return make


def evaluate(target: str, draft: Path, engine: str, data: Path, output: Path) -> int:
    words = ["eval", "--target", target, "--draft", str(draft), "--data", str(data), "--engine", engine]
    words += ["--device", "cpu", "--dtype", "float32", "--samples", "8", "--max-new-tokens", "32"]
    return main([*words, "--max-length", "300", "--draft-length", "4", "--output", str(output)])


@cases(DECODED)
def test_a_draft_decodes_as_here(
    engine_name: str,
    algorithm: str,
    run_of: Callable[[str], Path],
    target_of: Callable[[str], str],
    conversations: dict[str, Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "eval.json"
    run, target = run_of(algorithm), target_of(algorithm)
    code = evaluate(target, run, engine_name, conversations["validation"], output)
    found = json.loads(output.read_text())
    assert (found["engine"], found["lossless"], found["prompts"]) == (engine_name, True, 8)
    assert found["acceptance_length"] > 1.05, "a draft that is never accepted shows nothing"
    if (engine_name, algorithm) in EXACT:
        assert code == 0
        assert found["same_rounds"] == found["compared_rounds"] == 8
        assert found["acceptance_length"] == pytest.approx(found["own_acceptance_length"], abs=1e-12)


@cases(REFUSED)
def test_what_an_engine_cannot_decode_with(
    engine_name: str,
    algorithm: str,
    run_of: Callable[[str], Path],
    target_of: Callable[[str], str],
    conversations: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reason, in the words of whoever has it."""
    run, target = run_of(algorithm), target_of(algorithm)
    assert evaluate(target, run, engine_name, conversations["validation"], tmp_path / "eval.json") != 0
    assert REFUSED[engine_name][algorithm] in capsys.readouterr().err
