"""The embedded target's architecture, its initial weights and its optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from muon import BatchedMuon
from transformers import Qwen3Config, Qwen3ForCausalLM


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


def build_model(config: Qwen3Config) -> Any:
    """Freshly initialised fp32 weights; the last matrix of each block is scaled down by the depth."""
    model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(
    model: torch.nn.Module, *, muon_rate: float, adam_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    muon = BatchedMuon(inner, lr=muon_rate, weight_decay=weight_decay)
    adam = torch.optim.AdamW(outer, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]
