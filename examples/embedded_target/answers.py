"""Pack answers of the embedded target into the file that ships with it, for `torchspec quickstart`.

    torchspec prepare --output build/stdlib
    torchspec generate --target embedded --data build/stdlib/train.jsonl --output build/answers.jsonl \\
        --batch-size 96 --max-new-tokens 192
    python examples/embedded_target/answers.py --answers build/answers.jsonl --max-new-tokens 192 \\
        --model src/torchspec/assets/embedded_target

The file holds nothing that `torchspec generate` would not write again: a quick start without it, or on another
Python whose library gives other questions, has the target answer itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from torchspec.core.decoding.remembered import write_answers

NAME = "answers.jsonl.xz"


def pairs(files: list[Path]) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, answer) of every generated conversation of one turn."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            start = row["loss_mask"].index(1)
            answer = [token for token, said in zip(row["input_ids"], row["loss_mask"], strict=True) if said]
            yield row["input_ids"][:start], answer


def main() -> None:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True, nargs="+", help="files of `torchspec generate`")
    parser.add_argument("--model", type=Path, required=True, help="model folder; the file is written into it")
    parser.add_argument("--max-new-tokens", type=int, required=True, help="as it was generated with")
    arguments = parser.parse_args()
    path = arguments.model / NAME
    count = write_answers(path, arguments.model, arguments.max_new_tokens, pairs(arguments.answers))
    print(f"{count:,} answers, {path.stat().st_size:,} bytes in {path}")


if __name__ == "__main__":
    main()
