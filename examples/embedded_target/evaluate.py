"""Measure a model folder on the held-out conversations.

    python examples/embedded_target/evaluate.py --model src/torchspec/assets/embedded_target

Prints one JSON object:

* ``perplexity``: exp of the mean cross-entropy (nats) over all assistant tokens of the split, the end of
  the turn included, one conversation at a time;
* ``repeated_8grams``: over all greedy answers together, the share of token 8-grams that occurred before in
  the same answer: sum over answers of (8-grams - distinct 8-grams) / sum of 8-grams. Answers of fewer than
  eight tokens have none. ``reference_repeated_8grams`` is the same figure of the true answers to the same
  questions, which is what an ideal model would show;
* ``ended``: share of greedy answers that close their turn within ``--new-tokens`` tokens;
* ``parsed``: share of the greedy answers to ``write`` questions that ``ast.parse`` accepts as they stand;
  ``parsed_of_ended`` counts only those that closed their turn.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchspec.core.data.stdlib_corpus import Conversation, iter_conversations

GRAM = 8


def repeated_share(answers: Sequence[Sequence[int]], gram: int = GRAM) -> float:
    """Share of the ``gram``-grams of all answers that occurred before in the same answer."""
    total = repeated = 0
    for ids in answers:
        grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def parses(text: str) -> bool:
    """Whether ``text`` is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return bool(text.strip())


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, conversations: Sequence[Conversation]) -> tuple[float, int]:
    """exp(mean cross-entropy) over the template's generation spans, and the tokens it is a mean of."""
    total, counted = 0.0, 0
    for conversation in conversations:
        rendered = tokenizer.apply_chat_template(
            conversation.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([rendered["input_ids"]], device=model.device)
        counts = torch.tensor(rendered["assistant_masks"], dtype=torch.bool, device=model.device)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits[counts], ids[0, 1:][counts], reduction="sum").item()
        counted += int(counts.sum())
    return math.exp(total / counted), counted


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], limit: int, *, rows: int = 16
) -> list[list[int]]:
    """Greedy answers (token ids, the end of the turn included where it came), in batches of ``rows``."""
    answers: list[list[int]] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(conversations), rows):
        questions = [c.messages[:-1] for c in conversations[start : start + rows]]
        inputs = tokenizer.apply_chat_template(
            questions, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            stop = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append(row[:stop])
    return answers


def evaluate(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """All figures of the module's docstring."""
    everything = list(iter_conversations(arguments.split))
    stride = max(1, len(everything) // arguments.prompts)
    asked = everything[::stride][: arguments.prompts]
    started = time.monotonic()
    answers = greedy(model, tokenizer, asked, arguments.new_tokens)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    ended = [ids[-1] == tokenizer.eos_token_id for ids in answers]
    written = [(text, end) for c, text, end in zip(asked, texts, ended, strict=True) if c.id.endswith(":write")]
    closed = [text for text, end in written if end]
    references = [tokenizer(c.answer, add_special_tokens=False)["input_ids"] for c in asked]
    for conversation, text in list(zip(asked, texts, strict=True))[: arguments.show]:
        print(f"--- {conversation.id}\n{conversation.messages[0]['content']}\n>>>\n{text}\n", file=sys.stderr)
    seconds = time.monotonic() - started
    scored = everything if arguments.score == 0 else everything[:: max(1, len(everything) // arguments.score)]
    value, counted = perplexity(model, tokenizer, scored)
    return {
        "split": arguments.split,
        "perplexity": round(value, 4),
        "perplexity_tokens": counted,
        "answers": len(answers),
        "answer_tokens": sum(map(len, answers)),
        "repeated_8grams": round(repeated_share(answers), 4),
        "reference_repeated_8grams": round(repeated_share(references), 4),
        "ended": round(sum(ended) / len(ended), 4),
        "parsed": round(sum(parses(text) for text, _ in written) / max(1, len(written)), 4),
        "parsed_of_ended": round(sum(map(parses, closed)) / max(1, len(closed)), 4),
        "seconds_generating": round(seconds, 1),
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description="Measure a model folder on the held-out conversations.")
    parser.add_argument("--model", type=Path, required=True, help="model folder with its tokenizer")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--prompts", type=int, default=128, help="questions answered, evenly spread")
    parser.add_argument("--score", type=int, default=0, help="conversations scored; 0 is all of them")
    parser.add_argument("--new-tokens", type=int, default=384, help="longest answer")
    parser.add_argument("--show", type=int, default=0, help="answers to print on standard error")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    print(json.dumps(evaluate(model.to(arguments.device).eval(), tokenizer, arguments), indent=1))


if __name__ == "__main__":
    main()
