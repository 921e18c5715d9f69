"""Train the embedded target within a time budget, on a CPU or an accelerator.

    python examples/embedded_target/train.py --tokenizer build/et/tokenizer --run build/et/run --minutes 75

Two phases, by the share of the budget that is spent. First the learning rate is constant and every token
of a mixture counts (library code, its test suite, conversations). Then it falls linearly to zero over
whole conversations, where assistant tokens alone count. ``--resume`` continues from the last checkpoint;
time between the two runs does not count.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mixture import IGNORED, Packed, Stream, batch, conversation_documents, source_documents
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

LONG = 1024  # tokens of a row in the second phase: 98 % of the conversations are shorter
SHORT = 512
VALIDATION_ROWS = 48


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is not a matter of the machine."""

    tokens_per_step: int = 8192
    muon_rate: float = 3e-3
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    anneal_from: float = 0.6  # share of the budget
    shares: dict[str, float] = field(default_factory=lambda: {"conversations": 0.45, "library": 0.35, "tests": 0.20})
    seed: int = 0

    def rate(self, progress: float, step: int) -> float:
        """The learning rate as a share of its peak; ``progress`` is the share of the budget spent."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - self.anneal_from))


def model_config(tokenizer: Any) -> Qwen3Config:
    """Deep and narrow: 12 layers of width 192, 5.65 million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(config: Qwen3Config) -> Qwen3ForCausalLM:
    """Freshly initialised fp32 weights; the last matrix of each block is scaled down by the depth."""
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    muon = torch.optim.Muon(
        inner, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(outer, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


class Trainer:
    """One run: model, optimizers, streams, and the seconds spent so far."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe) -> None:
        self.arguments, self.recipe = arguments, recipe
        self.device = torch.device(arguments.device)
        torch.manual_seed(recipe.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        self.model = build_model(model_config(self.tokenizer)).to(self.device)
        self.optimizers = build_optimizers(self.model, recipe)
        self.loss_sum = torch.compile(self._loss_sum, dynamic=False) if arguments.compile else self._loss_sum
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._load_text()

    def _load_text(self) -> None:
        seed, pad = self.recipe.seed, self.tokenizer.pad_token_id
        talk = conversation_documents(self.tokenizer, "train")
        texts = {
            "conversations": talk,
            "library": source_documents(self.tokenizer, "train", tests=False),
            "tests": source_documents(self.tokenizer, "train", tests=True),
        }
        self.streams: dict[str, Stream | Packed] = {
            name: Stream(documents=texts[name], length=SHORT, seed=seed) for name in texts
        }
        self.streams["packed"] = Packed(documents=talk, length=LONG, seed=seed, pad=pad)
        held_out = conversation_documents(self.tokenizer, "validation")
        rows = Packed(documents=held_out, length=LONG, seed=seed, pad=pad).rows()
        self.validation = rows[:VALIDATION_ROWS]
        for name, documents in texts.items():
            print(f"{name}: {sum(len(d.ids) for d in documents):,} tokens", flush=True)

    def _loss_sum(self, ids_RT: torch.Tensor, labels_RT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over the tokens that count, in nats, fp32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_RTV = self.model(input_ids=ids_RT, use_cache=False).logits
        flat = logits_RTV.float().flatten(0, 1)
        return F.cross_entropy(flat, labels_RT.flatten(), ignore_index=IGNORED, reduction="sum")

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent."""
        return min(1.0, self.seconds / (60.0 * self.arguments.minutes))

    def _rows(self, count: int) -> list[Any]:
        """The next rows of the phase: ``count`` rows of ``SHORT`` tokens or as many tokens in long ones."""
        if self.progress >= self.recipe.anneal_from:
            return [self.streams["packed"].row() for _ in range(count * SHORT // LONG)]
        names = list(self.recipe.shares)
        generator = np.random.default_rng([self.recipe.seed, self.step])
        drawn = generator.choice(len(names), size=count, p=list(self.recipe.shares.values()))
        return [self.streams[names[i]].row() for i in drawn]

    def train_step(self) -> float:
        """One optimizer step; the mean loss over its tokens that count, in nats."""
        rows = self._rows(self.recipe.tokens_per_step // SHORT)
        ids_RT, labels_RT = (tensor.to(self.device) for tensor in batch(rows))
        counted = int((labels_RT != IGNORED).sum())
        parts = max(1, ids_RT.numel() // self.arguments.micro_tokens)
        total = 0.0
        for ids, labels in zip(ids_RT.chunk(parts), labels_RT.chunk(parts), strict=True):
            loss = self.loss_sum(ids, labels)
            (loss / counted).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.recipe.rate(self.progress, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids_RT.numel()
        return total / counted

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over assistant tokens of the first validation rows, in nats."""
        total, counted = 0.0, 0
        for row in self.validation:
            ids_RT, labels_RT = (tensor.to(self.device) for tensor in batch([row]))
            total += self._loss_sum(ids_RT, labels_RT).item()
            counted += int((labels_RT != IGNORED).sum())
        return total / counted

    def save(self) -> None:
        """Write the checkpoint aside and rename it: a reader sees the old one or the new one."""
        path = self.arguments.run / "checkpoint.pt"
        aside = path.with_suffix(f".{os.getpid()}")
        torch.save(
            {
                "config": self.model.config.to_dict(),
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "streams": {name: stream.state() for name, stream in self.streams.items()},
                "counters": {"step": self.step, "tokens": self.tokens, "seconds": self.seconds},
            },
            aside,
        )
        aside.replace(path)

    def load(self) -> None:
        """Continue from the checkpoint in the run's folder."""
        saved = torch.load(self.arguments.run / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, state in saved["streams"].items():
            self.streams[name].restore(state)
        for name, value in saved["counters"].items():
            setattr(self, name, value)

    def run(self) -> None:
        """Train until the budget is spent, with a progress line every 20 steps."""
        since_save = since_line = 0.0
        tokens_before, losses = self.tokens, list[float]()
        while self.progress < 1.0:
            start = time.monotonic()
            losses.append(self.train_step())
            spent = time.monotonic() - start
            self.seconds += spent
            since_save, since_line = since_save + spent, since_line + spent
            if len(losses) == 20:
                speed = (self.tokens - tokens_before) / since_line
                left = self.arguments.minutes - self.seconds / 60
                print(
                    f"step {self.step} loss {np.mean(losses):.3f} tokens {self.tokens / 1e6:.2f}M "
                    f"{speed:.0f} tokens/s progress {self.progress:.3f} ETA {left:.1f} min",
                    flush=True,
                )
                tokens_before, losses, since_line = self.tokens, [], 0.0
            if since_save >= 60 * self.arguments.save_minutes or self.progress >= 1.0:
                self.save()
                print(f"step {self.step} saved, validation loss {self.validate():.4f}", flush=True)
                since_save = 0.0


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of train_tokenizer.py")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoint.pt")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time, resumed runs included")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument("--device", default="cpu", help="a torch device, cpu by default")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --run")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments, Recipe())
    if arguments.resume:
        trainer.load()
    trainer.run()


if __name__ == "__main__":
    main()
