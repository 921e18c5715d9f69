"""Train the embedded target within a time budget, on a CPU or an accelerator.

    python examples/embedded_target/train.py --tokenizer build/et/tokenizer --folder build/et/run --minutes 75

Phases, by the share of the budget that is spent: a mixture of library code, its test suite and conversations;
mostly whole conversations; the same, where assistant tokens alone count. From a point on, repeats in the model's
own answers are unlearned beside that (``own_answers.py``). The learning rate is constant at first and then falls
linearly to zero. ``--resume`` continues from the last checkpoint; time between the two runs does not count.

On a CPU that others use too, one process per core is faster than one process of several threads, which
waits at every operation for a core that is taken:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/embedded_target/train.py ...
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mixture import IGNORED, Cut, Packed, Row, Rows, batch, conversation_documents, pack, source_documents
from network import build_model, build_optimizers, model_config
from own_answers import OwnAnswers
from transformers import AutoTokenizer

from torchspec.core.data.stdlib_corpus import iter_conversations

CUT = 256  # tokens of a row of the mixture
PACKED = (256, 512, 1024)  # tokens of the rows of whole conversations; 99 % of these are shorter than the last
OWN = 512  # tokens of a row of the model's own answers, the question included
VALIDATION_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is not a matter of the machine."""

    tokens_per_step: int = 8192
    muon_rate: float = 3e-3
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    # Shares of the budget.
    conversations_from: float = 0.45
    decay_from: float = 0.5
    own_answers_from: float = 0.66
    answers_from: float = 0.8
    shares: dict[str, float] = field(default_factory=lambda: {"conversations": 0.35, "library": 0.30, "tests": 0.35})
    tests_share: float = 0.5  # of the steps that are for conversations: that text is new for longer
    own_every: int = 6  # steps
    own_weight: float = 1.0  # of a repeat, beside a token of the text
    own_rows: int = 24  # of a rank, in such a step
    seed: int = 0

    def rate(self, progress: float, step: int) -> float:
        """The learning rate as a share of its peak; ``progress`` is the share of the budget spent."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - self.decay_from))


def logits(states_RTH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    """[R * T, V], fp32 from a bf16 product."""
    with torch.autocast(states_RTH.device.type, torch.bfloat16):
        return F.linear(states_RTH, head_VH).float().flatten(0, 1)


def loss_sum(states_RTH: torch.Tensor, head_VH: torch.Tensor, labels_RT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the tokens that count, in nats, fp32."""
    return F.cross_entropy(logits(states_RTH, head_VH), labels_RT.flatten(), ignore_index=IGNORED, reduction="sum")


def repeat_loss_sum(states_RTH: torch.Tensor, head_VH: torch.Tensor, avoid_RT: torch.Tensor) -> torch.Tensor:
    """-log(1 - p) summed over the tokens to avoid, p being the probability of each, fp32."""
    avoid = avoid_RT.flatten()
    log_p = -F.cross_entropy(logits(states_RTH, head_VH), avoid.clamp(min=0), reduction="none")
    # A probability that rounds to one would have an infinite loss and no gradient.
    cost = -torch.log(-torch.expm1(log_p.clamp(max=-1e-4)))
    return torch.where(avoid != IGNORED, cost, 0.0).sum()


FINISH = Recipe(decay_from=0.7, own_every=2, own_weight=2.0)
"""After the run proper, for a few minutes more: the repeats above all. Average the result with what it started from."""


class Trainer:
    """One run: model, optimizers, streams, and the seconds spent so far.

    Every rank holds the whole model; ranks differ in the rows they draw.
    """

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe) -> None:
        self.arguments, self.recipe = arguments, recipe
        self.device = torch.device(arguments.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(recipe.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        self.model = build_model(model_config(self.tokenizer)).to(self.device)
        self.optimizers = build_optimizers(
            self.model,
            muon_rate=recipe.muon_rate,
            adam_rate=recipe.adam_rate,
            weight_decay=recipe.weight_decay,
        )
        self.loss_sum, self.repeat_loss_sum = loss_sum, repeat_loss_sum
        if arguments.compile:
            # Layer by layer: they share one piece of machine code, which takes seconds and not minutes to make.
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.loss_sum = torch.compile(loss_sum, dynamic=False)
            self.repeat_loss_sum = torch.compile(repeat_loss_sum, dynamic=False)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._clock = 0.0  # this rank's seconds; `seconds` is what all ranks agreed on at the last step
        self._load_text()

    def _load_text(self) -> None:
        seed, pad = self.recipe.seed + self.rank, self.tokenizer.pad_token_id
        talk = conversation_documents(self.tokenizer, "train")
        texts = {
            "conversations": talk,
            "library": source_documents(self.tokenizer, "train", tests=False),
            "tests": source_documents(self.tokenizer, "train", tests=True),
        }
        for name, documents in texts.items():
            self.say(f"{name}: {sum(len(document.ids) for document in documents):,} tokens")
        self.sources: dict[str, Rows] = {
            name: Cut(documents=documents, length=CUT, seed=seed) for name, documents in texts.items()
        }
        self.packed: list[Packed] = []
        for length, rows in pack(talk, PACKED, pad=pad).items():
            self.say(f"{len(rows)} rows of {length} tokens of whole conversations")
            self.packed.append(Packed(rows=rows, length=length, seed=seed))
            self.sources[f"packed{length}"] = self.packed[-1]
        asked = list(iter_conversations("train"))
        self.own_answers = OwnAnswers(self.model, self.tokenizer, asked, length=OWN, seed=seed)
        held_out = pack(conversation_documents(self.tokenizer, "validation"), PACKED[-1:], pad=pad)
        self.validation = held_out[PACKED[-1]][:VALIDATION_ROWS]

    def _states(self, ids_RT: torch.Tensor) -> torch.Tensor:
        """What the head reads: [R, T, H] after the final norm."""
        with torch.autocast(self.device.type, torch.bfloat16):
            states: torch.Tensor = self.model.model(input_ids=ids_RT, use_cache=False).last_hidden_state
        return states

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent."""
        return min(1.0, self.seconds / (60.0 * float(self.arguments.minutes)))

    def _rows(self) -> list[Row]:
        """This rank's rows of the step; all of one length, which is the same on all ranks."""
        tokens = self.recipe.tokens_per_step // self.ranks
        generator = np.random.default_rng([self.recipe.seed, self.step])
        if self.progress < self.recipe.conversations_from:
            names = list(self.recipe.shares)
            drawn = generator.choice(len(names), size=tokens // CUT, p=list(self.recipe.shares.values()))
            return [self.sources[names[i]].row() for i in drawn]
        sizes = np.array([len(source.rows) * source.length for source in self.packed], dtype=float)
        source: Rows = self.packed[generator.choice(len(sizes), p=sizes / sizes.sum())]
        if generator.random() < self.recipe.tests_share:
            source = self.sources["tests"]
        return [source.row() for _ in range(tokens // source.length)]

    def _reduce(self, loss: float, counted: int) -> tuple[float, int]:
        """Make gradients of sums into gradients of the mean over all ranks; (loss, tokens counted) in all.

        The time spent is rank 0's on every rank, so that all change phase and stop at the same step.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        extra = [loss, float(counted), self._clock if self.rank == 0 else 0.0]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(extra, device=self.device)])
        if self.ranks > 1:
            dist.all_reduce(flat)
        loss, total, self.seconds = flat[-3:].tolist()
        flat.div_(total)
        parts = torch.split(flat[:-3], [grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return loss, int(total)

    def train_step(self) -> float:
        """One optimizer step; the mean loss over its tokens that count, in nats."""
        recipe = self.recipe
        ids_RT, labels_RT = batch(self._rows(), answers_only=self.progress >= recipe.answers_from)
        total, counted, tokens = 0.0, int((labels_RT != IGNORED).sum()), ids_RT.numel()
        parts = max(1, ids_RT.numel() // self.arguments.micro_tokens)
        for part in zip(ids_RT.to(self.device).chunk(parts), labels_RT.to(self.device).chunk(parts), strict=True):
            loss = self.loss_sum(self._states(part[0]), self.model.lm_head.weight, part[1])
            torch.autograd.backward(loss)
            total += loss.item()
        if self.progress >= recipe.own_answers_from and self.step % recipe.own_every == 0:
            ids_RT, avoid_RT = self.own_answers.batch(recipe.own_rows)
            tokens += ids_RT.numel()
            rows = max(1, self.arguments.micro_tokens // OWN)
            for part in zip(ids_RT.to(self.device).split(rows), avoid_RT.to(self.device).split(rows), strict=True):
                states = self._states(part[0])
                cost = self.repeat_loss_sum(states, self.model.lm_head.weight, part[1])
                torch.autograd.backward(recipe.own_weight * cost)
        total, counted = self._reduce(total, counted)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.recipe.rate(self.progress, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens * self.ranks
        return total / counted

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over assistant tokens of the first validation rows, in nats."""
        total, counted = 0.0, 0
        for row in self.validation:
            ids_RT, labels_RT = (t.to(self.device) for t in batch([row], answers_only=True))
            total += loss_sum(self._states(ids_RT), self.model.lm_head.weight, labels_RT).item()
            counted += int((labels_RT != IGNORED).sum())
        return total / counted

    def save(self) -> None:
        """Write the checkpoint aside and rename it: a reader sees the old one or the new one."""
        path = self.arguments.folder / "checkpoint.pt"
        aside = path.with_suffix(f".{os.getpid()}")
        torch.save(
            {
                "config": self.model.config.to_dict(),
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "sources": {name: source.state() for name, source in self.sources.items()},
                "counters": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
            },
            aside,
        )
        aside.replace(path)

    def load(self) -> None:
        """Continue from the checkpoint in the run's folder."""
        saved = torch.load(self.arguments.folder / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, state in saved["sources"].items():
            self.sources[name].restore(state)
        for name, value in saved["counters"].items():
            setattr(self, name, value)
        self._clock = self.seconds

    def run(self) -> None:
        """Train until the budget is spent, with a progress line every 20 steps."""
        since_save = since_line = 0.0
        tokens_before, losses = self.tokens, list[float]()
        while self.progress < 1.0:
            start = time.monotonic()
            losses.append(self.train_step())
            spent = time.monotonic() - start
            self._clock += spent
            since_save, since_line = since_save + spent, since_line + spent
            if len(losses) == 20:
                speed = (self.tokens - tokens_before) / since_line
                left = self.arguments.minutes - self.seconds / 60
                self.say(
                    f"loss {np.mean(losses):.3f} tokens {self.tokens / 1e6:.2f}M "
                    f"{speed:.0f} tokens/s progress {self.progress:.3f} ETA {left:.1f} min "
                    f"own repeats {self.own_answers.repeated:.3f}"
                )
                tokens_before, losses, since_line = self.tokens, [], 0.0
            if self.rank == 0 and (since_save >= 60 * self.arguments.save_minutes or self.progress >= 1.0):
                self.save()
                self.say(f"saved, validation loss {self.validate():.4f}")
                since_save = 0.0

    def say(self, text: str) -> None:
        """A progress line, from rank 0 alone."""
        if self.rank == 0:
            print(f"step {self.step} {text}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of train_tokenizer.py")
    parser.add_argument("--folder", type=Path, required=True, help="folder for checkpoint.pt")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time, resumed runs included")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument("--device", default="cpu", help="a torch device, cpu by default")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --folder")
    parser.add_argument("--finish", action="store_true", help="with --resume and more --minutes: unlearn repeats")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if torch.device(arguments.device).type == "cpu" else None)
    trainer = Trainer(arguments, FINISH if arguments.finish else Recipe())
    if arguments.resume:
        trainer.load()
    trainer.run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
