"""report.html: one self-contained page per run, made from what the run directory holds."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from torchspec.core.config.secrets import blanked
from torchspec.core.errors import TorchspecError
from torchspec.core.export.card import CardFacts, serving
from torchspec.core.models.target_spec import resolve_target
from torchspec.core.report import curves
from torchspec.core.report.page import render, write_page
from torchspec.core.report.record import RunRecord, read_run
from torchspec.core.report.standing import moment, standing
from torchspec.core.report.values import listed, mapping, number, real

logger = logging.getLogger(__name__)

PLACES = 5
"""Of drafted tokens, that are told apart in decoded texts; later ones look like the last."""
Facts = list[tuple[str, str]]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises TorchspecError when the directory is no run: neither metrics.jsonl nor eval.json is in it.
    """
    record = read_run(run_dir)
    text = render(
        "template.html",
        name=run_dir.resolve().name,
        about=_about(record),
        standing=standing(record),
        notes=record.notes,
        tiles=_tiles(record),
        charts=curves.of_run(record),
        evaluation=_flat(record.evaluation),
        measure=_measure(record),
        samples=_samples(record),
        data=_flat(record.data),
        ledger=_ledger(record.ledger),
        environment=_flat(record.environment),
        serving=_serving(record),
        sessions=_sessions(record),
        config=yaml.safe_dump(blanked(record.config), sort_keys=False) if record.config else "",
    )
    return write_page(run_dir / "report.html", text)


def _about(record: RunRecord) -> str:
    """What is trained for what."""
    target, algorithm = mapping(record.config.get("target")).get("path"), record.config.get("algorithm")
    told = [f"a draft of {algorithm}" if algorithm else "", f"for the target {target}" if target else ""]
    return " ".join(part for part in told if part)


def _tiles(record: RunRecord) -> Facts:
    """The headline figures."""
    result = record.evaluation
    asked = {
        "acceptance length": (real(result.get("acceptance_length")), "{:.2f}"),
        "speed-up": (real(result.get("speedup")), "{:.2f}x"),
        "tokens/s with draft": (real(result.get("tokens_per_second")), ""),
        "tokens/s without": (real(result.get("tokens_per_second_draftless")), ""),
    }
    tiles = [
        (label, form.format(value) if form else number(value))
        for label, (value, form) in asked.items()
        if value is not None
    ]
    if isinstance(result.get("lossless"), bool):
        tiles.append(("lossless", number(result["lossless"])))
    if record.train:
        last = record.train[-1]
        tiles.append(("steps", number(last["step"])))
        tokens = real(last.get("tokens"))
        tiles += [] if tokens is None else [("tokens trained", f"{tokens:,.0f}")]
    if record.totals.quarantined:
        tiles.append(("samples quarantined", number(record.totals.quarantined)))
    return tiles


def _flat(values: Mapping[str, Any]) -> Facts:
    """What stands in an object itself, not in what is nested there."""
    shown = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
    return [(name.replace("_", " "), number(value)) for name, value in shown.items()]


def _samples(record: RunRecord) -> list[dict[str, Any]]:
    """Decoded texts of the evaluation, as `core.decoding.samples` writes them; those that are not so are left out."""
    return [
        {
            "id": each.get("id", ""),
            "prompt": each.get("prompt", ""),
            "pieces": [(text, max(0, min(place, PLACES)), place) for text, place in each["pieces"]],
            "drafted": sum(place > 0 for _, place in each["pieces"]),
        }
        for each in listed(record.evaluation.get("samples"))
        if _is_sample(each)
    ]


def _is_sample(given: object) -> bool:
    if not isinstance(given, dict) or not isinstance(given.get("pieces"), list):
        return False
    return all(
        isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and type(piece[1]) is int
        for piece in given["pieces"]
    )


def _ledger(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """What became of every row: `rows`, and `wrong`, what does not add up; {} where that is not recorded."""
    if not isinstance(ledger.get("wrong"), list):
        return {}
    rows = [(name, number(ledger.get(name))) for name in ("read", "unusable", "filtered", "samples")]
    for epoch in map(mapping, listed(ledger.get("epochs"))):
        left = f", {number(epoch['left'])} not reached" if epoch.get("left") else ""
        told = f"{number(epoch.get('trained'))} trained, {number(epoch.get('quarantined'))} quarantined{left}"
        rows.append((f"epoch {number(epoch.get('epoch'))}", told))
    return {"rows": rows, "wrong": [str(wrong) for wrong in ledger["wrong"]]}


def _measure(record: RunRecord) -> str:
    """The command that would measure a draft which nobody has measured; "" where there is none."""
    if record.evaluation or not (record.directory / "draft" / "config.json").is_file():
        return ""
    target = mapping(record.config.get("target")).get("path") or "TARGET"
    words = ["--target", str(target), "--draft", str(record.directory / "draft"), "--data", "HELD_OUT.jsonl"]
    return shlex.join(["torchspec", "eval", *words, "--output", str(record.directory / "eval.json")])


def _serving(record: RunRecord) -> dict[str, str]:
    """engine -> the command that serves the target with the run's draft; {} where there is none yet."""
    draft = record.directory / "draft"
    target = mapping(record.config.get("target")).get("path")
    if not (draft / "config.json").is_file() or not target:
        return {}
    result = record.evaluation
    length = real(result.get("best_draft_length")) or real(result.get("draft_length"))
    try:
        facts = CardFacts(
            algorithm=str(record.config.get("algorithm", "")),
            target_name=str(target),
            target_shape="",
            torchspec="",
            base_model=str(resolve_target(Path(str(target)))),
            repository=str(draft.resolve()),
            draft_length=int(length) if length is not None and length >= 1 else 5,
        )
        return serving(facts, draft)[0]
    except (TorchspecError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("how to serve %s is left out of the report: %s", draft, error)
        return {}


def _sessions(record: RunRecord) -> list[dict[str, str]]:
    """Of each session its command, when it began and where, and how it ended."""
    return [
        {"command": _command(session), "began": _began(session), "ended": _ended(mapping(session.get("ended")))}
        for session in map(mapping, listed(record.environment.get("sessions")))
        if session
    ]


def _command(session: Mapping[str, Any]) -> str:
    words = [str(word) for word in listed(session.get("command"))]
    return shlex.join(["torchspec" if Path(words[0]).name == "__main__.py" else words[0], *words[1:]]) if words else ""


def _began(session: Mapping[str, Any]) -> str:
    at, step = session.get("started"), session.get("from_step")
    return ", ".join(([moment(at)] if at else []) + ([f"from step {number(step)}"] if step is not None else []))


def _ended(ended: Mapping[str, Any]) -> str:
    if not ended:
        return ""
    cause = f" ({ended['cause']})" if ended.get("cause") else ""
    return f"{ended.get('how')}{cause} at step {number(ended.get('step'))}, {moment(ended.get('at'))}"
