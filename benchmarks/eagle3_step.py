"""EAGLE-3 training step (forward and backward) beside the eager reference, on the same weights and batch.

    python benchmarks/eagle3_step.py --tokens 1024 --json benchmarks/results/eagle3_step.json

The two losses are compared before anything is timed: a fast wrong step is worth nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from eager_reference import Batch, Shape, step_loss
from harness import Step, compare, publish
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead

THETA, EPS, TAPS = 10000.0, 1e-6, 3


@dataclass(frozen=True, kw_only=True)
class Problem:
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    draft_vocabulary: int
    unroll: int
    supervised: float


@dataclass(frozen=True, kw_only=True)
class Inputs:
    head: SafetensorsTargetHead
    ids_N: Tensor
    features: Features
    mask_T: Tensor


def make_inputs(problem: Problem) -> Inputs:
    """Random features, tokens and target ends; the last `supervised` share of the tokens is supervised."""
    torch.manual_seed(0)
    embedding = torch.randn(problem.vocabulary, problem.hidden) * 0.02
    head = torch.randn(problem.vocabulary, problem.hidden) * 0.05
    tokens = problem.tokens
    return Inputs(
        head=SafetensorsTargetHead(embedding_VH=embedding, head_VH=head, final_norm=nn.Identity()),
        ids_N=torch.randperm(problem.vocabulary)[: problem.draft_vocabulary].sort().values,
        features=Features(
            input_ids_T=torch.randint(0, problem.vocabulary, (tokens,)),
            taps_TNH=torch.randn(tokens, TAPS, problem.hidden),
            last_TH=torch.randn(tokens, problem.hidden),
            tap_layers=(1, 3, 4),
            norm_state="post_norm",
        ),
        mask_T=torch.arange(tokens) >= tokens * (1 - problem.supervised),
    )


def make_draft(problem: Problem, inputs: Inputs):  # type: ignore[no-untyped-def]
    target = TargetSpec(
        path=Path("benchmark"),
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=8,
        hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        num_attention_heads=problem.heads,
        num_key_value_heads=problem.kv_heads,
        head_dim=problem.hidden // problem.heads,
        vocab_size=problem.vocabulary,
        max_position_embeddings=1 << 17,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        dtype=torch.float32,
        tie_word_embeddings=False,
        eos_token_ids=(0,),
    )
    options = Eagle3Options(vocab_size=problem.draft_vocabulary, unroll=problem.unroll)
    algorithm = registry.algorithms().spec("eagle3").create(options, target)
    torch.manual_seed(1)
    vocabulary = VocabularyMap(ids_N=inputs.ids_N, target_size=problem.vocabulary)
    return algorithm, algorithm.build_draft(vocabulary, inputs.head)


def prepare_product(problem: Problem) -> Step:
    inputs = make_inputs(problem)
    algorithm, draft = make_draft(problem, inputs)
    device = registry.load_device("cpu")

    def step() -> float:
        draft.zero_grad()
        result = algorithm.step(draft, inputs.head, [inputs.features], [inputs.mask_T], device)
        loss = result.numerator / result.denominator
        loss.backward()
        return loss.item()

    return step


def prepare_eager(problem: Problem) -> Step:
    inputs = make_inputs(problem)
    algorithm, draft = make_draft(problem, inputs)
    weights = dict(draft.named_parameters())
    shape = Shape(
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.hidden // problem.heads,
        rope_theta=THETA,
        eps=EPS,
        unroll=problem.unroll,
        step_decay=algorithm.options.step_decay,
    )
    batch = Batch(
        input_ids_BT=inputs.features.input_ids_T[None],
        loss_mask_BT=inputs.mask_T[None],
        taps_BTZ=inputs.features.taps_TNH.flatten(1)[None],
        last_BTH=inputs.features.last_TH[None],
    )

    def step() -> float:
        draft.zero_grad()
        loss = step_loss(weights, shape, batch, inputs.head.embedding_VH, inputs.head.head_VH, inputs.ids_N)
        loss.backward()
        return loss.item()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the one sequence")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that is supervised")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    for name, value in (("hidden", 512), ("intermediate", 1536), ("heads", 8), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("vocabulary", 32000), ("draft-vocabulary", 8000), ("unroll", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    problem = Problem(**{name: getattr(args, name) for name in Problem.__dataclass_fields__})
    ours, reference = prepare_product(problem)(), prepare_eager(problem)()
    if abs(ours - reference) > 1e-4 * abs(reference):
        print(f"the losses differ: {ours} and {reference}; nothing was timed", file=sys.stderr)
        return 1
    print(f"loss {ours:.6f}, eager reference {reference:.6f}")
    variants = {"product": partial(prepare_product, problem), "eager reference": partial(prepare_eager, problem)}
    results = compare(variants, rounds=args.rounds, threads=args.threads)
    command = shlex.join(["python", "benchmarks/eagle3_step.py", *sys.argv[1:]])
    publish(args.json, command=command, settings=vars(problem) | {"threads": args.threads}, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
