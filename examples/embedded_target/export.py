"""Export a checkpoint of ``train.py`` as a model folder in bf16.

    python examples/embedded_target/export.py --folder build/et/run --tokenizer build/et/tokenizer \\
        --output src/torchspec/assets/embedded_target

``--average FOLDER`` exports the mean of the weights of two checkpoints of one run.

The folder is written aside and swapped in by renames, so a reader finds the old one or the new one whole,
but for the instant between two renames. A ``MODEL_CARD.md`` in the old folder is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

KEPT = "MODEL_CARD.md"


def load_model(folder: Path) -> Any:
    """The checkpoint's fp32 model, in evaluation mode."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu")
    model: Any = Qwen3ForCausalLM(Qwen3Config.from_dict(saved["config"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save it under the class name that every version of transformers knows, without this machine's state."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def swap_in(aside: Path, output: Path) -> None:
    """Put the folder ``aside`` in the place of ``output``."""
    old = output.with_name(f".{output.name}.old{os.getpid()}")
    if output.exists():
        if (output / KEPT).exists():
            shutil.copy2(output / KEPT, aside / KEPT)
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def average_into(model: Any, other: Any) -> None:
    """The mean of both models' weights, in place."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.lerp_(theirs, 0.5)


def export(folder: Path, tokenizer_folder: Path, output: Path, average: Path | None = None) -> int:
    """Write the model folder and return its bytes."""
    model = load_model(folder)
    if average is not None:
        average_into(model, load_model(average))
    model = model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ends, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = {"eos_token_id": ends, "pad_token_id": pad, "do_sample": False}
    model.generation_config = GenerationConfig.from_dict(settings)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside)
        for path in aside.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone; a wheel is for everybody
        swap_in(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(path.stat().st_size for path in output.iterdir())


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder that holds checkpoint.pt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of train_tokenizer.py")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write or replace")
    parser.add_argument("--average", type=Path, help="folder of another checkpoint.pt of the same run")
    arguments = parser.parse_args()
    size = export(arguments.folder, arguments.tokenizer, arguments.output, arguments.average)
    print(f"{size:,} bytes in {arguments.output}")


if __name__ == "__main__":
    main()
