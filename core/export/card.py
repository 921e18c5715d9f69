"""README.md beside an exported draft: the model card, in the form that the Hugging Face hub reads.

No path of the machine is in it: a target is known by its id on the hub, or by the name of its directory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.core import registry
from torchspec.core.errors import ConfigError, UnavailableError
from torchspec.core.interfaces.algorithm import DraftFiles

# yaml and jinja2 are imported where a card is made: engines' workers read drafts without them.
if TYPE_CHECKING:
    from jinja2 import Template

CARD = "README.md"
TARGET, DRAFT = "TARGET", "DRAFT"
"""Words of the commands for what is not known."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARK = re.compile(r"<!-- torchspec card ([0-9a-f]{64}) -->\n")
_FRONT = re.compile(r"\A---\n(.*?)^---$", re.MULTILINE | re.DOTALL)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]+)")
_RESULTS = re.compile(r"^## Results\n.*?(?=^## )", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Decoding with the draft. `what`: on which prompts; `where`: the machine, as far as speeds depend on it."""

    what: str
    acceptance_length: float
    draft_length: int
    prompts: int | None = None
    temperature: float = 0.0
    tokens_per_second: float | None = None
    speedup: float | None = None
    lossless: bool | None = None
    per_position: Sequence[float] = ()
    where: str = ""

    @classmethod
    def of(cls, what: str, figures: Mapping[str, Any]) -> Measured:
        """From eval.json, of our own decoder or an engine, or a validation's row of metrics.jsonl; KeyError, TypeError
        or ValueError for anything else."""
        machine = figures.get("machine") or {}
        engine = " ".join(str(figures[name]) for name in ("engine", "engine_version") if figures.get(name))
        place = str(machine.get("device_name") or machine.get("device") or "")
        where = [engine or None, place or None, figures.get("dtype")]
        return cls(
            what=what,
            acceptance_length=float(figures["acceptance_length"]),
            draft_length=int(figures["draft_length"]),
            prompts=figures.get("prompts"),
            temperature=float(figures.get("temperature", 0.0)),
            tokens_per_second=figures.get("tokens_per_second") if "speedup" in figures else None,
            speedup=figures.get("speedup"),
            lossless=figures.get("lossless"),
            per_position=figures.get("acceptance_per_position") or (),
            where=", ".join(part for part in where if part),
        )


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says beside what the files hold.

    target_name   for people: the id on the hub, or the directory's name
    base_model    the target's id on the hub, if that is known; `revision`: the one that was trained on
    license       of the draft; `license_from`: why it is that
    repository    where the draft will be on the hub
    origin        how the draft came about, in sentences, where that is not a run of torchspec
    counts        data and training, by words; `recipe`: settings that make this draft again; `machine`: where
    """

    algorithm: str
    target_name: str
    target_shape: str
    torchspec: str
    base_model: str | None = None
    revision: str | None = None
    license: str | None = None
    license_from: str = ""
    repository: str | None = None
    draft_length: int = 5
    taps: Sequence[int] = ()
    longest: int | None = None
    origin: str = ""
    counts: Mapping[str, object] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    results: Sequence[Measured] = ()


def make_card(facts: CardFacts, files: DraftFiles, directory: Path) -> str:
    """The text for a draft whose files stand in `directory`."""
    tensors = files.tensors
    dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in tensors.values() if each.is_floating_point()})
    commands, without = serving(facts, directory)
    body = _template("card.md.jinja").render(
        facts=facts,
        target=_linked(facts),
        layout="speculators" if "speculators_model_type" in files.config else "plain",
        architecture=files.config.get("speculators_model_type") or ", ".join(files.config.get("architectures") or ()),
        parameters=sum(each.numel() for each in tensors.values() if each.is_floating_point()),
        megabytes=sum(each.numel() * each.element_size() for each in tensors.values()) / 1e6,
        dtypes=", ".join(dtypes),
        draft_vocabulary=files.config.get("draft_vocab_size"),
        words=[word for word, known in ((TARGET, facts.base_model), (DRAFT, facts.repository)) if not known],
        commands=commands,
        without=without,
        notes=[without_paths(note) for note in files.notes],
        results=results_text(facts.results),
        recipe=_yaml(dict(facts.recipe), default_flow_style=None) if facts.recipe else "",
    )  # fmt: skip
    return _front_matter(facts, list(commands)) + _marked(body)


def results_text(results: Sequence[Measured]) -> str:
    text: str = _template("results.md.jinja").render(results=results)
    return text


def with_results(card: str, results: Sequence[Measured]) -> str:
    """A card of ours with other results; one that somebody has changed is returned as it is."""
    if not unchanged(card):
        return card
    front, _, body = _parts(card)
    text = f"## Results\n\n{results_text(results)}\n"
    return front + _marked(_RESULTS.sub(lambda _: text, body))


def unchanged(card: str) -> bool:
    """Whether a text is a card that torchspec wrote and nobody has touched since."""
    _, digest, body = _parts(card)
    return digest is not None and digest == _digest(body) and _RESULTS.search(body) is not None


def _linked(facts: CardFacts) -> str:
    known = facts.base_model
    return facts.target_name if known is None else f"[{known}](https://huggingface.co/{known})"


def _parts(card: str) -> tuple[str, str | None, str]:
    """(front matter, the digest that stands behind it, what follows)."""
    mark = _MARK.search(card)
    return (card, None, "") if mark is None else (card[: mark.start()], mark[1], card[mark.end() :])


def _marked(body: str) -> str:
    return f"<!-- torchspec card {_digest(body)} -->\n{body}"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _front_matter(facts: CardFacts, engines: Sequence[str]) -> str:
    """YAML; what is not known stands there as a comment, to be filled in."""
    lines = ["---"]
    unknown = "# license: fill in, such as that of the target"
    lines.append(f"license: {facts.license}" if facts.license else unknown)
    lines.append(
        f"base_model: {facts.base_model}" if facts.base_model else "# base_model: fill in OWNER/NAME of the target"
    )
    known = {
        "library_name": "torchspec",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", facts.algorithm, *engines],
    }
    return "\n".join(lines) + "\n" + _yaml(known) + "---\n\n"


def serving(facts: CardFacts, directory: Path) -> tuple[dict[str, str], list[str]]:
    """(engine -> the command that serves the target with this draft, engines that do not decode with it)."""
    commands: dict[str, str] = {}
    without: list[str] = []
    target, draft = facts.base_model or TARGET, facts.repository or DRAFT
    for name in registry.backends().names():
        try:
            command = registry.backends().spec(name).serving_command
        except UnavailableError:  # a plug-in that cannot be loaded here says nothing of this draft
            continue
        if command is None:
            continue
        try:
            commands[name] = command(target, directory, draft, facts.draft_length)
        except ConfigError:
            without.append(name)
    return commands, without


def hub_id(path: Path) -> tuple[str, str] | None:
    """(OWNER/NAME, revision) of a directory in the hub's cache; None for any other."""
    found = _SNAPSHOT.search(path.resolve().as_posix()) or _SNAPSHOT.search(path.absolute().as_posix())
    return None if found is None else (f"{found[1]}/{found[2]}", found[3])


def stated_license(directory: Path) -> str | None:
    """What a model's own card gives as its license."""
    import yaml

    try:
        front = _FRONT.search((directory / CARD).read_text(encoding="utf-8"))
        values = yaml.safe_load(front[1]) if front is not None else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.-]+", found) else None


def without_paths(text: str) -> str:
    """Absolute paths by their last name: a card must not tell where things were."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/,;:'\"`)]+/)*([^\s/,;:'\"`)]+)", r"\1", text)


def _yaml(values: Mapping[str, Any], **style: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, **style)
    return text


def _template(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["count"] = lambda value: f"{value:,}" if isinstance(value, int) else str(value)
    text = resources.files("torchspec.core.export").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(text)
