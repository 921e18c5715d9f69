"""The embedded target's architecture, its initial weights and its optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from muon import BatchedMuon
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

BLOCKED = "blocked_causal"
_BLOCK, _BLOCKS = 128, 4  # queries of a block at least, and blocks at most: compilation unrolls them


def blocked_causal(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention as matrix products, a block of queries at a time against the keys up to its end.

    Compiled, a whole training step is 1.4 to 1.5 times faster with it on a CPU than with torch's flash kernel
    (rows of 256 and 512 tokens). Rows have no padding on the left, so ``mask`` is not needed. [B, T, H, D] comes back.
    """
    rows, heads, length, size = q_BHTD.shape
    groups = k_BGTD.shape[1]
    share = heads // groups
    q = (q_BHTD * scaling).view(rows, groups, share, length, size)
    outputs = []
    step = max(_BLOCK, length // _BLOCKS)
    for start in range(0, length, step):
        end = min(length, start + step)
        block = q[:, :, :, start:end].reshape(rows * groups, share * (end - start), size)
        keys, values = (part[:, :, :end].reshape(rows * groups, end, size) for part in (k_BGTD, v_BGTD))
        scores = torch.bmm(block, keys.mT).view(rows * groups, share, end - start, end).float()
        seen = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
        shares = torch.softmax(scores.masked_fill(~seen.to(scores.device), float("-inf")), dim=-1).to(values.dtype)
        mixed = torch.bmm(shares.view(rows * groups, share * (end - start), end), values)
        outputs.append(mixed.view(rows, groups, share, end - start, size))
    return torch.cat(outputs, dim=3).reshape(rows, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCKED, blocked_causal)


def model_config(tokenizer: Any) -> Qwen3Config:
    """Deep and narrow: 14 layers of width 192, 5.04 million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=BLOCKED,
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
