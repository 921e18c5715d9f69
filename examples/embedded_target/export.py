"""Export a checkpoint of ``train.py`` as a model folder in bf16.

    python examples/embedded_target/export.py --run build/et/run --tokenizer build/et/tokenizer \\
        --output src/torchspec/assets/embedded_target

The folder is written aside and swapped in by renames, so a reader finds the old one or the new one whole,
but for the instant between two renames. A ``MODEL_CARD.md`` in the old folder is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

KEPT = "MODEL_CARD.md"


def load_model(run: Path) -> Qwen3ForCausalLM:
    """The checkpoint's fp32 model, in evaluation mode."""
    saved = torch.load(run / "checkpoint.pt", map_location="cpu")
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(saved["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def swap_in(aside: Path, output: Path) -> None:
    """Put the folder ``aside`` in the place of ``output``."""
    old = output.with_name(f".{output.name}.old{os.getpid()}")
    if output.exists():
        if (output / KEPT).exists():
            shutil.copy2(output / KEPT, aside / KEPT)
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def export(run: Path, tokenizer_folder: Path, output: Path) -> int:
    """Write the model folder and return its bytes."""
    model = load_model(run).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ends, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, do_sample=False)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        swap_in(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in output.iterdir())


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that holds checkpoint.pt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of train_tokenizer.py")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write or replace")
    arguments = parser.parse_args()
    size = export(arguments.run, arguments.tokenizer, arguments.output)
    print(f"{size:,} bytes in {arguments.output}")


if __name__ == "__main__":
    main()
