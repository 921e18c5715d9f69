"""report.html: one self-contained page per run, made from what the run directory holds."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, select_autoescape

from torchspec.core.errors import TorchspecError
from torchspec.core.export.card import CardFacts, serving
from torchspec.core.models.target_spec import resolve_target
from torchspec.core.report import charts, pipeline

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The parts of a run directory that exist; a run may have stopped anywhere."""

    directory: Path
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    served: list[Row] = field(default_factory=list)
    evaluation: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    ledger: Row = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    note: str
    svg: str


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises TorchspecError when the directory is no run: neither metrics.jsonl nor eval.json is in it.
    """
    record = read_run(run_dir)
    text = render(
        "template.html",
        run=record,
        name=run_dir.resolve().name,
        tiles=_tiles(record),
        charts=_charts(record),
        samples=_samples(record),
        serving=_serving(record),
        commands=_commands(record),
        config=yaml.safe_dump(record.config, sort_keys=False) if record.config else "",
    )
    return write_page(run_dir / "report.html", text)


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file, with the style that all pages share."""
    style = _asset("style.html")
    return _environment().from_string(_asset(template)).render(style=style, **values)


def _asset(name: str) -> str:
    return resources.files("torchspec.core.report").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, text: str) -> Path:
    """Whole or not at all; TorchspecError when it cannot be written."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TorchspecError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; lines of metrics.jsonl that are unfinished or no rows are passed over."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file() and not (run_dir / "eval.json").is_file():
        raise TorchspecError(
            f"{run_dir} is not a run directory: it holds neither metrics.jsonl nor eval.json. "
            "Name the --output of a `torchspec train`"
        )
    rows = _json_lines(metrics)
    return RunRecord(
        directory=run_dir,
        train=[row for row in rows if row["kind"] == "train"],
        validation=[row for row in rows if row["kind"] == "validation"],
        served=sorted((row for row in rows if row["kind"] == "served"), key=lambda row: row["step"]),
        evaluation=_json(run_dir / "eval.json"),
        config=_object(run_dir / "config.yaml", yaml.safe_load),
        environment=_json(run_dir / "environment.json"),
        data=_json(run_dir / "data.json"),
        ledger=_json(run_dir / "ledger.json"),
    )


def _environment() -> Environment:
    environment = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment


def number(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _json(path: Path) -> Row:
    return _object(path, json.loads)


def _object(path: Path, parse: Callable[[str], Any]) -> Row:
    """What a file beside the metrics holds; the page goes without one that is damaged."""
    if not path.is_file():
        return {}
    try:
        loaded = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s is damaged and left out of the report: %s", path, error)
        return {}
    if not isinstance(loaded, dict):
        logger.warning("%s is damaged and left out of the report: a %s", path, type(loaded).__name__)
        return {}
    return loaded


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line a killed run was writing
            if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    """The headline figures."""
    result = record.evaluation
    tiles: list[tuple[str, str]] = []
    if "acceptance_length" in result:
        tiles.append(("acceptance length", f"{result['acceptance_length']:.2f}"))
    if result.get("speedup"):
        tiles.append(("speed-up", f"{result['speedup']:.2f}x"))
    if result.get("tokens_per_second"):
        tiles.append(("tokens/s with draft", number(float(result["tokens_per_second"]))))
    if result.get("tokens_per_second_draftless"):
        tiles.append(("tokens/s without", number(float(result["tokens_per_second_draftless"]))))
    if result.get("lossless") is not None:
        tiles.append(("lossless", "yes" if result["lossless"] else "no"))
    if record.train:
        last = record.train[-1]
        tiles.append(("steps", number(int(last["step"]))))
        tiles.append(("tokens trained", number(int(last.get("tokens", 0)))))
        lost = sum(len(row.get("quarantined", {})) for row in record.train)
        if lost:
            tiles.append(("samples quarantined", number(lost)))
    return tiles


def series(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have it."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _positions(rows: list[Row], key: str) -> dict[str, list[tuple[float, float]]]:
    count = max((len(row[key]) for row in rows if isinstance(row.get(key), list)), default=0)
    return {
        f"position {k + 1}": [(r["step"], r[key][k]) for r in rows if isinstance(r.get(key), list) and k < len(r[key])]
        for k in range(count)
    }


def _charts(record: RunRecord) -> list[Chart]:
    drawn: list[Chart] = []

    def add(title: str, note: str, series: dict[str, list[tuple[float, float]]], y: str, smooth: bool = True) -> None:
        present = {name: points for name, points in series.items() if points}
        if present:
            drawn.append(Chart(title=title, note=note, svg=charts.lines(present, x="step", y=y, smooth=smooth)))

    result = record.evaluation
    if result.get("acceptance_per_position"):
        rates = {str(k + 1): float(rate) for k, rate in enumerate(result["acceptance_per_position"])}
        note = "Share of drafting rounds in which at least this many drafted tokens were accepted (unconditional)."
        svg = charts.bars(rates, x="drafted position", y="accepted", top=1.0)
        drawn.append(Chart(title="Acceptance per position", note=note, svg=svg))
    if result.get("sweep"):
        speed = [
            (float(row["draft_length"]), float(row["speedup"]))
            for row in result["sweep"]
            if row.get("speedup") is not None
        ]
        length = [(float(row["draft_length"]), float(row["acceptance_length"])) for row in result["sweep"]]
        svg = charts.lines({"speed-up": speed, "acceptance length": length}, x="draft length", y="")
        drawn.append(Chart(title="Which draft length pays", note="Decoded with each chain length.", svg=svg))
    add(
        "Loss",
        "Cross-entropy against the target's distribution; KL is what it is above that distribution's own entropy.",
        {"loss": series(record.train, "loss"), "KL": series(record.train, "kl")},
        "nats",
    )
    add(
        "Acceptance length",
        "Simulated: the walk decoding would take over the training text, where every position of it was drafted; the "
        "mean over positions is above it, since decoding lingers where drafting is hard. Decoded: real speculative "
        "decoding of validation prompts, by torchspec itself or in a serving engine.",
        {
            "simulated": series(record.train, "simulated_acceptance_length"),
            "mean over trained positions": series(record.train, "joint_prefix_length"),
            "decoded": series(record.validation, "acceptance_length"),
            "decoded while the text was written": series(
                [{"step": row["step"], **row["on_policy"]} for row in record.train if row.get("on_policy")],
                "acceptance_length",
            ),
            **{
                f"in {name}" if name else "decoded beside the training": series(rows, "acceptance_length")
                for name, rows in _by_engine(record.served).items()
            },
        },
        "tokens per round",
    )
    add(
        "Accuracy per position",
        "Draft and target agree on the next token.",
        _positions(record.train, "accuracy_per_position"),
        "",
    )
    add("Learning rate", "", {"lr": series(record.train, "lr")}, "", smooth=False)
    add("Gradient norm", "Before clipping.", {"norm": series(record.train, "grad_norm")}, "")
    add("Throughput", "", {"tokens/s": series(record.train, "tokens_per_second")}, "tokens/s")
    add(
        "Pipeline",
        pipeline.verdict(record.train),
        {"trainer waits": pipeline.waiting(record.train), "engines work": pipeline.working(record.train)},
        "share of the time",
    )
    memory = [{"step": row["step"], **row["memory"]} for row in record.train if isinstance(row.get("memory"), dict)]
    add(
        "Memory",
        "The highest so far, of the rank that needs most.",
        {"peak": [(step, value / 2**20) for step, value in series(memory, "peak")]},
        "MiB",
        smooth=False,
    )
    where = _time_shares(record.train)
    if where:
        svg = charts.bars(where, x="", y="share of step time", top=1.0)
        drawn.append(Chart(title="Where the time went", note="Mean over all steps.", svg=svg))
    return drawn


def _samples(record: RunRecord) -> list[Row]:
    """Decoded texts of the evaluation, as `core.decoding.samples` writes them; those that are not so are left out."""
    given = record.evaluation.get("samples")
    return [each for each in given if _is_sample(each)] if isinstance(given, list) else []


def _is_sample(given: object) -> bool:
    if not isinstance(given, dict) or not isinstance(given.get("pieces"), list):
        return False
    return all(
        isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and isinstance(piece[1], int)
        for piece in given["pieces"]
    )


def _serving(record: RunRecord) -> dict[str, str]:
    """engine -> the command that serves the target with the run's draft; {} where there is none yet."""
    draft = record.directory / "draft"
    target = record.config.get("target")
    if not (draft / "config.json").is_file() or not isinstance(target, dict) or not target.get("path"):
        return {}
    length = record.evaluation.get("best_draft_length") or record.evaluation.get("draft_length")
    try:
        facts = CardFacts(
            algorithm=str(record.config.get("algorithm", "")),
            target_name=str(target["path"]),
            target_shape="",
            torchspec="",
            base_model=str(resolve_target(Path(str(target["path"])))),
            repository=str(draft.resolve()),
            draft_length=length if isinstance(length, int) else 5,
        )
        return serving(facts, draft)[0]
    except (TorchspecError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("how to serve %s is left out of the report: %s", draft, error)
        return {}


def _commands(record: RunRecord) -> list[str]:
    """The command of each session."""
    sessions = record.environment.get("sessions")
    found = [each.get("command") for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []
    told = [[str(word) for word in words] for words in found if isinstance(words, list) and words]
    return [shlex.join(["torchspec" if Path(first).name == "__main__.py" else first, *rest]) for first, *rest in told]


def _by_engine(rows: list[Row]) -> dict[str, list[Row]]:
    """Measurements made beside the training; those of our own decoder name no engine."""
    names = sorted({str(row.get("engine") or "") for row in rows})
    return {name: [row for row in rows if str(row.get("engine") or "") == name] for name in names}


def _time_shares(rows: list[Row]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in rows:
        for name, seconds in (row.get("time") or {}).items():
            totals[name] = totals.get(name, 0.0) + float(seconds)
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()} if whole else {}
