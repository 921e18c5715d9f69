"""Capturing features through an engine, beside the same engine's plain prefill of the same prompts.

python benchmarks/capture.py --engine vllm --json benchmarks/results/capture_vllm.json

Two workers with the same target, one that captures and one that does not. In turn each gets a batch of prompts that it
has not seen (so no prefix is cached) and reads them: the one hands every hidden state asked for to this process, on its
device and checked, the other writes one token. The figure is the median over rounds of the ratio within the round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shlex import join
from typing import Any

import torch
from harness import machine, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from torchspec.core import registry
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions, EngineProcess, TargetEngine
from torchspec.core.interfaces.features import RecordRef

VOCABULARY = 2048


def make_target(args: argparse.Namespace, directory: Path) -> Path:
    """A random Qwen3 of the size asked for."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def batch(args: argparse.Namespace, number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randint(3, VOCABULARY, (args.tokens,), generator=generator).tolist() for _ in range(args.batch)]


def captures(engine: TargetEngine, taps: tuple[int, ...]) -> Callable[[list[list[int]]], None]:
    def run(prompts: list[list[int]]) -> None:
        store = MemoryStore()
        requests = [CaptureRequest(record_id=str(number), input_ids=ids) for number, ids in enumerate(prompts)]
        found = engine.capture(requests, taps, store)
        if not all(isinstance(each, RecordRef) for each in found):
            raise SystemExit(f"not captured: {found}")

    return run


def prefills(engine: TargetEngine) -> Callable[[list[list[int]]], None]:
    def run(prompts: list[list[int]]) -> None:
        engine.generate(prompts, max_new_tokens=1)

    return run


def timed(work: Callable[[list[list[int]]], None], prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    work(prompts)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, target: Path) -> dict[str, Any]:
    device = registry.load_device(args.device)
    layers = args.layers
    taps = (1, layers // 2 - 1, layers - 4)

    def options(wanted: tuple[int, ...]) -> EngineOptions:
        process = EngineProcess(python=args.engine_python)
        return EngineOptions(target=target, device=device, dtype=args.dtype, taps=wanted, process=process)

    capturing, plain = (registry.load_engine(args.engine, options(wanted)) for wanted in (taps, ()))
    try:
        ways = {"capture": captures(capturing, taps), "prefill": prefills(plain)}
        for work in ways.values():
            work(batch(args, 0))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            for name in order:
                seconds[name].append(timed(ways[name], batch(args, 1 + turn)))
        version = getattr(capturing, "version", "")
    finally:
        capturing.close()
        plain.close()
    tokens = args.batch * args.tokens
    ratios = [p / c for p, c in zip(seconds["prefill"], seconds["capture"], strict=True)]
    record = (len(taps) + 1) * args.hidden * (4 if args.dtype == "float32" else 2)
    return {
        "engine": args.engine,
        "engine_version": version,
        "device": args.device,
        "dtype": args.dtype,
        "target": {"hidden": args.hidden, "layers": layers},
        "taps": len(taps),
        "batch": args.batch,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "capture_tokens_per_second": tokens / statistics.median(seconds["capture"]),
        "prefill_tokens_per_second": tokens / statistics.median(seconds["prefill"]),
        "capture_over_prefill": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "feature_mb_per_second": record * tokens / statistics.median(seconds["capture"]) / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", help="vllm or sglang")
    parser.add_argument("--engine-python", type=Path, help="its interpreter; default: the installed environment's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        body = measure(args, make_target(args, Path(place)))
    print(
        f"{body['engine']} {body['engine_version']}: capture {body['capture_tokens_per_second']:.0f} tokens/s, prefill "
        f"{body['prefill_tokens_per_second']:.0f}; ratio {body['capture_over_prefill']:.2f} "
        f"({body['lowest']:.2f} to {body['highest']:.2f}), {body['feature_mb_per_second']:.0f} MB/s of features"
    )
    body = {"command": join(["python", "benchmarks/capture.py", *sys.argv[1:]]), "machine": machine(), **body}
    write(args.json, body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
