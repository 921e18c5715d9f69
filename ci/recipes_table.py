"""The table of docs/recipes.md: what the planner says of every recipe for a published target.

Targets are the configurations in tests/fixtures/targets: sizes as their publishers state them, and no weights.
`python ci/recipes_table.py` prints the table; a test holds the page to it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torchspec.cli import main as torchspec
from torchspec.core.config.recipes import shipped, title

TARGETS = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "targets"
VARIANTS = {"qwen3-8b-dflash": "qwen3-8b", "llama-3.1-8b-128k": "llama-3.1-8b"}
"""Recipes for a target that another recipe is called after."""
HEAD = (
    "recipe",
    "devices",
    "algorithm",
    "target",
    "draft",
    "a rank needs",
    "may take",
    "an engine's device",
    "may take",
)


def words_of(recipe: str) -> list[str]:
    """The command in the recipe's head, without the files that it names."""
    text = shipped()[recipe].read_text(encoding="utf-8")
    (command,) = re.findall(r"^#   torchspec (train .*)$", text, re.MULTILINE)
    named = command.split()
    for flag in ("--target", "--data", "--output"):
        place = named.index(flag)
        del named[place : place + 2]
    return named


def plan_of(recipe: str, directory: Path, *more: str) -> dict[str, Any]:
    """The plan of the command in the recipe's head, for the target's configuration alone, as JSON."""
    target = directory / "target"
    target.mkdir(exist_ok=True)
    shutil.copy(TARGETS / f"{VARIANTS.get(recipe, recipe)}.json", target / "config.json")
    data = directory / "answers.jsonl"
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    data.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    files = ["--target", str(target), "--data", str(data), "--output", str(directory / "run")]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = torchspec([*words_of(recipe), *files, "--dry-run", "--json", *more])
    if code:
        raise SystemExit(code)
    plan: dict[str, Any] = json.loads(shown.getvalue())
    return plan


def row(recipe: str, plan: dict[str, Any]) -> str:
    """A line of the table."""
    devices = re.search(r"\d+ x \d+ GB", title(shipped()[recipe]))
    assert devices is not None
    engine, memory = plan["engine"], plan["memory"]
    held = (
        ("in the trainer", "") if engine is None else (_gb(engine["weights"] + engine["cache"]), _gb(engine["share"]))
    )
    cells = (
        f"`{recipe}`",
        devices[0],
        plan["draft"]["algorithm"],
        f"{plan['target']['parameters'] / 1e9:,.1f}B",
        f"{plan['draft']['trained parameters'] / 1e6:,.0f}M",
        _gb(memory["peak"]),
        _gb(memory["available"]),
        *held,
    )
    return "| " + " | ".join(cells) + " |"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def main() -> None:
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for recipe in shipped("targets"):
        with tempfile.TemporaryDirectory() as directory:
            print(row(recipe, plan_of(recipe, Path(directory))))


if __name__ == "__main__":
    main()
