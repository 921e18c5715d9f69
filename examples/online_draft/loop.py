"""A draft that follows a policy: a toy reinforcement learning loop that feeds torchspec's trainer what it has anyway.

The policy counts up by one, with slips. The reward is for counting up by three, so reinforcement learning (REINFORCE
with a mean baseline, 32 texts a step) turns its distribution into another one. One draft is fed the policy's texts and
hidden states while that happens, a second one, equal at the start, is left as it was. Both are measured on fresh texts
of the policy as it is then, before they are trained on.

    python examples/online_draft/loop.py

Shape letters: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torchspec import OnlineDraftTrainer

V, B, T = 32, 32, 33
SLIPS = 0.3
"""Of the tokens that the policy first learns from, as many are any token."""


def make_policy() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    names = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **sizes, **names))


def counting() -> Tensor:
    """[B, T] texts that count up by one, with slips."""
    texts = [torch.randint(0, V, (B,))]
    for _ in range(T - 1):
        slip_B = torch.rand(B) < SLIPS
        texts.append(torch.where(slip_B, torch.randint(0, V, (B,)), (texts[-1] + 1) % V))
    return torch.stack(texts, dim=1)


def learn_to_count(policy: LlamaForCausalLM, steps: int) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        ids_BT = counting()
        policy(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write(policy: LlamaForCausalLM) -> Tensor:
    """[B, T] texts of the policy at temperature 1: the rollouts."""
    first_B1 = torch.randint(1, V, (B, 1))
    found: Tensor = policy.generate(first_B1, do_sample=True, top_k=0, min_new_tokens=T - 1, max_new_tokens=T - 1)
    return found


def reinforce(out: Any, ids_BT: Tensor) -> tuple[Tensor, float]:
    """(loss, mean reward): a token that is three more than the one before it is worth 1."""
    reward = (ids_BT[:, 1:] == (ids_BT[:, :-1] + 3) % V).float()
    logs = out.logits[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    return -((reward - reward.mean()) * logs).mean(), float(reward.mean())


def samples(trainer: OnlineDraftTrainer, out: Any, ids_BT: Tensor) -> Iterator[dict[str, Any]]:
    """What the loop's own forward pass knows of each text, as the trainer wants it."""
    places = dict(zip(trainer.required.tap_layers, trainer.required.hf_hidden_states, strict=True))
    for row, ids_T in enumerate(ids_BT):
        yield {
            "tokens": ids_T,
            "loss_mask": torch.arange(T) > 0,  # everything but the first token is the policy's
            "hidden_states": {layer: out.hidden_states[place][row] for layer, place in places.items()},
            "last": out.hidden_states[-1][row],
            "norm_state": "post_norm",
        }


def make_draft(policy: LlamaForCausalLM) -> OnlineDraftTrainer:
    return OnlineDraftTrainer(
        policy,
        draft={"unroll": 4, "taps": [0, 2, 4], "num_attention_heads": 4, "num_key_value_heads": 4},
        train={"lr": 3e-3, "batch_size": 8, "warmup_steps": 5},
        device="cpu",
    )


def feed(trainer: OnlineDraftTrainer, out: Any, ids_BT: Tensor) -> None:
    for sample in samples(trainer, out, ids_BT):
        trainer.add(**sample)
    while trainer.step() is not None:
        pass


def run(steps: int, seed: int = 0) -> Iterator[dict[str, float]]:
    """A row every tenth of the steps: reward, and the simulated acceptance length of both drafts."""
    torch.manual_seed(seed)
    policy = make_policy()
    learn_to_count(policy, 100)
    follows, frozen = make_draft(policy), make_draft(policy)
    for _ in range(30):
        ids_BT = write(policy)
        with torch.no_grad():
            feed(follows, policy(ids_BT, output_hidden_states=True), ids_BT)
    frozen.load_state_dict(follows.state_dict())

    optimizer = torch.optim.AdamW(policy.parameters(), lr=7e-4, weight_decay=0.0)
    for step in range(steps + 1):
        ids_BT = write(policy)
        out = policy(ids_BT, output_hidden_states=True)
        loss, reward = reinforce(out, ids_BT)
        if step % max(1, steps // 10) == 0:
            lengths = {name: measure(draft, out, ids_BT) for name, draft in (("follows", follows), ("frozen", frozen))}
            yield {"step": step, "reward": reward, **lengths}
        feed(follows, out, ids_BT)  # of this policy: before its update
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for each in (follows, frozen):
            each.update_target(policy)


def measure(draft: OnlineDraftTrainer, out: Any, ids_BT: Tensor) -> float:
    """Simulated acceptance length, of 5 at most: tokens of a round in which 4 are drafted."""
    return float(draft.evaluate(list(samples(draft, out, ids_BT)))["simulated_acceptance_length"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="updates of the policy")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    given = parser.parse_args()
    rows = []
    print("  step  reward  acceptance length of the draft that follows, and of the one that is frozen")
    for row in run(given.steps):
        rows.append(row)
        print(f"{row['step']:6d}  {row['reward']:6.2f}  {row['follows']:6.2f}  {row['frozen']:6.2f}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
