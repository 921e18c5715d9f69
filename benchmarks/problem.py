"""One EAGLE-3 training step on random data: the same weights, features and supervision for every variant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.batch import Batch, build_batch
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead

THETA, EPS, TAPS = 10000.0, 1e-6, 3
SPAN = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Problem:
    tokens: int
    supervised: float = 1.0
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 32000
    draft_vocabulary: int = 8000
    unroll: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    head_size: int = 0
    """0: the hidden size over the heads."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def steps(self) -> int:
        return self.unroll


@dataclass(frozen=True, kw_only=True)
class Inputs:
    head: SafetensorsTargetHead
    ids_N: Tensor
    features: Features
    mask_T: Tensor

    @property
    def rows(self) -> FeatureRows:
        return FeatureRows.of([self.features], [self.mask_T])

    @classmethod
    def of(cls, problem: Problem) -> Inputs:
        """Random features, tokens and target ends; supervision in even spans of about `SPAN` tokens."""
        torch.manual_seed(0)
        tokens, dtype, device = problem.tokens, problem.torch_dtype, problem.torch_device

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape) * scale).to(device=device, dtype=dtype)

        return cls(
            head=SafetensorsTargetHead(
                embedding_VH=random(problem.vocabulary, problem.hidden, scale=0.02),
                head_VH=random(problem.vocabulary, problem.hidden, scale=0.05),
                final_norm=nn.Identity(),
            ),
            ids_N=torch.randperm(problem.vocabulary)[: problem.draft_vocabulary].sort().values,
            features=Features(
                input_ids_T=torch.randint(0, problem.vocabulary, (tokens,)),
                taps_TNH=random(tokens, TAPS, problem.hidden),
                last_TH=random(tokens, problem.hidden),
                tap_layers=(1, 3, 4),
                norm_state="post_norm",
            ),
            mask_T=supervision(tokens, problem.supervised),
        )


def supervision(tokens: int, share: float) -> Tensor:
    """bool [tokens]: everything, or spans of 64 tokens or more at even distances that hold this share of them."""
    mask_T = torch.full((tokens,), share >= 1.0)
    if share < 1.0:
        spans = max(1, round(tokens * share / SPAN))
        length = max(64, round(tokens * share / spans))
        for span in range(spans):
            end = tokens * (span + 1) // spans
            mask_T[max(0, end - length) : end] = True
    return mask_T


def make_draft(problem: Problem, inputs: Inputs) -> tuple[Eagle3, Eagle3Draft]:
    target = TargetSpec(
        path=Path("benchmark"),
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=8,
        hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        vocab_size=problem.vocabulary,
        max_position_embeddings=1 << 18,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        dtype=problem.torch_dtype,
        tie_word_embeddings=False,
        eos_token_ids=(0,),
    )
    options = Eagle3Options(vocab_size=problem.draft_vocabulary, unroll=problem.unroll)
    algorithm = registry.algorithms().spec("eagle3").create(options, target)
    torch.manual_seed(1)
    vocabulary = VocabularyMap(ids_N=inputs.ids_N, target_size=problem.vocabulary)
    draft = algorithm.build_draft(vocabulary, inputs.head)
    return algorithm, draft.to(device=problem.torch_device, dtype=problem.torch_dtype)


def make_batch(problem: Problem, inputs: Inputs) -> Batch:
    """The product's own plan of the step: which slots run, which pairs and rows count, in which chunks."""
    algorithm, _ = make_draft(problem, inputs)
    plan = algorithm.plan(inputs.head, registry.load_device(problem.device).ops.loss_bytes)
    return build_batch(inputs.rows, plan)


def memory(*, recompute: bool) -> StepMemory:
    return StepMemory(recompute=recompute)
