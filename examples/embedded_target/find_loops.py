"""Collect the loops that a model's own greedy answers end in, for ``train.py --loops``.

    python examples/embedded_target/find_loops.py --model build/et/model --output build/et/loops.npz

Questions are from the train split. An answer counts if its last tokens are two copies of a span of at most
``LONGEST`` tokens when the limit cuts it off. The file holds, for N loops of rows of ``T + 1`` tokens, with
the loop continued to the row's end: ``ids`` int32 [N, T + 1], ``start`` int32 [N] (the first token that
repeats one a period before), ``period`` int32 [N].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchspec.core.data.stdlib_corpus import iter_conversations

ROW = 256
LONGEST = 60


def loop_of(question: Sequence[int], answer: Sequence[int]) -> tuple[int, int] | None:
    """(start, period) of the loop that ``question + answer`` ends in, the smallest period first."""
    ids = [*question, *answer]
    for period in range(1, min(LONGEST, len(answer) // 2) + 1):
        if ids[-period:] == ids[-2 * period : -period]:
            start = len(ids) - period
            while start - 1 - period >= len(question) and ids[start - 1] == ids[start - 1 - period]:
                start -= 1
            return start, period
    return None


def main() -> None:
    """Parse the command line, answer the questions, write the loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder of export.py")
    parser.add_argument("--output", type=Path, required=True, help="npz file to write")
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--new-tokens", type=int, default=150, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="which questions")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device)
    conversations = list(iter_conversations("train"))
    order = np.random.default_rng(arguments.seed).permutation(len(conversations))
    short = [conversations[i] for i in order if len(conversations[i].messages[0]["content"]) < 450]
    asked = short[: arguments.questions]
    found = []
    answers = greedy(model.eval(), tokenizer, asked, arguments.new_tokens)
    for conversation, answer in zip(asked, answers, strict=True):
        question: Any = tokenizer.apply_chat_template(
            conversation.messages[:-1], add_generation_prompt=True, return_dict=False
        )
        loop = None if answer[-1] == tokenizer.eos_token_id else loop_of(question, answer)
        if loop is not None and loop[0] < ROW:
            ids = [*question, *answer]
            while len(ids) <= ROW:
                ids.append(ids[-loop[1]])
            found.append((ids[: ROW + 1], *loop))
    if not found:
        raise SystemExit("no answer ended in a loop")
    columns = (np.asarray(column, dtype=np.int32) for column in zip(*found, strict=True))
    np.savez(arguments.output, **dict(zip(("ids", "start", "period"), columns, strict=True)))
    print(f"{len(found)} loops among {len(asked)} answers in {arguments.output}")


if __name__ == "__main__":
    main()
