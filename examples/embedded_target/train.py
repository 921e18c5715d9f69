"""Train the embedded target within a time budget, on a CPU or an accelerator.

    python examples/embedded_target/train.py --tokenizer build/et/tokenizer --folder build/et/run --minutes 75

Three phases, by the share of the budget that is spent: a mixture of library code, its test suite and
conversations; whole conversations; whole conversations where assistant tokens alone count. The learning
rate is constant at first and then falls linearly to zero. ``--resume`` continues from the last checkpoint;
time between the two runs does not count.

On a CPU that others use too, one process per core is faster than one process of several threads, which
waits at every operation for a core that is taken:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/embedded_target/train.py ...
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mixture import (
    IGNORED,
    Cut,
    Loops,
    Packed,
    Row,
    Rows,
    batch,
    conversation_documents,
    own_loops,
    pack,
    previous_batch,
    source_documents,
)
from network import build_model, build_optimizers, model_config
from transformers import AutoTokenizer

CUT = 512  # tokens of a row of the mixture
PACKED = (256, 512, 1024)  # tokens of the rows of whole conversations; 99 % of these are shorter than the last
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
    conversations_from: float = 0.5
    decay_from: float = 0.6
    loops_from: float = 0.7
    answers_from: float = 0.75
    shares: dict[str, float] = field(default_factory=lambda: {"conversations": 0.45, "library": 0.35, "tests": 0.20})
    seed: int = 0

    def rate(self, progress: float, step: int) -> float:
        """The learning rate as a share of its peak; ``progress`` is the share of the budget spent."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - self.decay_from))


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
        self.loss_sum = torch.compile(self._loss_sum, dynamic=False) if arguments.compile else self._loss_sum
        self.loop_loss_sum = self._loop_loss_sum
        if arguments.compile:
            self.loop_loss_sum = torch.compile(self._loop_loss_sum, dynamic=False)
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
        self.sources["loops"] = Loops(documents=talk, length=PACKED[0], seed=seed)
        own = own_loops(self.arguments.loops) if self.arguments.loops else []
        self.own_loops = Packed(rows=own, length=PACKED[0], seed=seed) if own else None
        held_out = pack(conversation_documents(self.tokenizer, "validation"), PACKED[-1:], pad=pad)
        self.validation = held_out[PACKED[-1]][:VALIDATION_ROWS]

    def _loss_sum(self, ids_RT: torch.Tensor, labels_RT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over the tokens that count, in nats, fp32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_RTV = self.model(input_ids=ids_RT, use_cache=False).logits
        flat = logits_RTV.float().flatten(0, 1)
        return F.cross_entropy(flat, labels_RT.flatten(), ignore_index=IGNORED, reduction="sum")

    def _loop_loss_sum(self, ids_RT: torch.Tensor, labels_RT: torch.Tensor, previous_RT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy before the loop; in it, -log(1 - |p - q / 2|), q being p one copy before.

        A loop feeds on itself: each copy makes the next one likelier. Here each is to be half as likely.
        """
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_RTV = self.model(input_ids=ids_RT, use_cache=False).logits
        flat = logits_RTV.float().flatten(0, 1)
        loss_RT = F.cross_entropy(flat, labels_RT.flatten(), ignore_index=IGNORED, reduction="none")
        loss_RT = loss_RT.view_as(labels_RT)
        p_RT = torch.exp(-loss_RT)
        q_RT = p_RT.detach().gather(1, previous_RT.clamp(min=0))
        looped_RT = -torch.log1p(-(p_RT - 0.5 * q_RT).abs().clamp(max=0.999))
        return torch.where(previous_RT >= 0, looped_RT, loss_RT).sum()

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent."""
        return min(1.0, self.seconds / (60.0 * float(self.arguments.minutes)))

    def _rows(self) -> list[Row]:
        """This rank's rows of the step; all of one length, which is the same on all ranks."""
        tokens = self.recipe.tokens_per_step // self.ranks
        generator = np.random.default_rng([self.recipe.seed, self.step])
        if self.progress >= self.recipe.conversations_from:
            sizes = np.array([len(source.rows) * source.length for source in self.packed], dtype=float)
            source: Rows = self.packed[generator.choice(len(sizes), p=sizes / sizes.sum())]
            if self._is_looped(source.length):
                return self._loops(tokens // source.length)
            return [source.row() for _ in range(tokens // source.length)]
        names = list(self.recipe.shares)
        drawn = generator.choice(len(names), size=tokens // CUT, p=list(self.recipe.shares.values()))
        return [self.sources[names[i]].row() for i in drawn]

    def _loops(self, count: int) -> list[Row]:
        """Rows of loops; two of three are the model's own where ``--loops`` gave some."""
        made, own = self.sources["loops"], self.own_loops
        return [(own if own and i % 3 else made).row() for i in range(count)]

    def _is_looped(self, length: int) -> bool:
        """Whether this rank's rows of this step are loops: every other time that rows are short."""
        wanted = self.progress >= self.recipe.loops_from and length == PACKED[0]
        return wanted and (self.step + self.rank) % 2 == 0

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
        rows = self._rows()
        ids_RT, labels_RT = batch(rows, answers_only=self.progress >= self.recipe.answers_from)
        tensors = [ids_RT, labels_RT]
        loss_sum: Callable[..., torch.Tensor] = self.loss_sum
        if rows[0].previous is not None:
            tensors, loss_sum = [*tensors, previous_batch(rows)], self.loop_loss_sum
        parts = max(1, ids_RT.numel() // self.arguments.micro_tokens)
        total = 0.0
        for part in zip(*(tensor.to(self.device).chunk(parts) for tensor in tensors), strict=True):
            loss = loss_sum(*part)
            torch.autograd.backward(loss)
            total += loss.item()
        total, counted = self._reduce(total, int((labels_RT != IGNORED).sum()))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.recipe.rate(self.progress, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids_RT.numel() * self.ranks
        return total / counted

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over assistant tokens of the first validation rows, in nats."""
        total, counted = 0.0, 0
        for row in self.validation:
            ids_RT, labels_RT = (t.to(self.device) for t in batch([row], answers_only=True))
            total += self._loss_sum(ids_RT, labels_RT).item()
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
                    f"{speed:.0f} tokens/s progress {self.progress:.3f} ETA {left:.1f} min"
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
    parser.add_argument("--loops", type=Path, help="file of find_loops.py")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if torch.device(arguments.device).type == "cpu" else None)
    trainer = Trainer(arguments, Recipe())
    if arguments.resume:
        trainer.load()
    trainer.run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
