"""`torchspec train`."""

from __future__ import annotations

import json
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from torchspec.cli.console import announce
from torchspec.cli.options import Parser, add_options
from torchspec.cli.training import TrainingDisplay, train
from torchspec.core.config.fields import FLAGS, default_text, settings, type_text
from torchspec.core.config.schema import RunConfig
from torchspec.core.config.sources import parse_value
from torchspec.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torchspec.core.pipeline.plan import Plan

OBJECTIVE = "draft.objective"
"""The algorithm's, whose settings are not known before it is imported."""

_INTRODUCTION = """\
Train a draft for a target on conversations.

Values are taken from, in rising order: defaults, the YAML file given with --config, the command line. Every setting
can be given as `section.key=value` (values as in YAML: 3, 1e-3, true, null, [a, b]); the most common ones have
options of their own. The run continues where it stopped when the same command is given again."""


def parser() -> Parser:
    made = bare_parser()
    made.epilog = "settings (section.key=value):\n" + _settings_text(RunConfig) + _draft_text()
    return made


def bare_parser() -> Parser:
    """The options alone; listing the algorithm's settings takes an import of torch."""
    made = Parser("train", _INTRODUCTION, usage="torchspec train [options] [section.key=value ...]")
    add_options(made, RunConfig, {path: flag for path, flag in FLAGS.items() if path != OBJECTIVE})
    made.add_argument(
        FLAGS[OBJECTIVE],
        dest=OBJECTIVE,
        metavar="TERM[=WEIGHT],...",
        default=SUPPRESS,
        help="terms of the loss, each with a weight (1 if none is given), in the place of the default: lk_lambda, or "
        "kl=0.5,tv=0.5 (the terms: draft.objective)",
    )
    made.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings, or a recipe that ships (`torchspec recipes`)",
    )
    made.add_argument("--nproc", metavar="N", default="1", help="start N ranks on this machine [default: 1]")
    made.add_argument("--dry-run", action="store_true", help="check everything and print the plan; train nothing")
    made.add_argument("--json", action="store_true", help="with --dry-run: print the plan as one JSON object")
    return made


def _settings_text(schema: Any, prefix: str = "") -> str:
    lines = []
    for path, info in settings(schema).items():
        if path == "draft":
            continue
        lines.append(f"  {prefix}{path}={default_text(info)}\n      {info.description}; {type_text(info)}")
    return "\n".join(lines) + "\n"


def _draft_text() -> str:
    from torchspec.core import registry

    text = ""
    for name in registry.algorithms().names():
        text += f"\nsettings of algorithm {name}:\n"
        try:
            text += _settings_text(registry.algorithms().spec(name).options, "draft.")
        except Exception as error:  # a plug-in may fail in any way, and this is still help  # noqa: BLE001
            text += f"  {error}\n"
    return text


def run(words: Sequence[str]) -> int:
    wants_help = "--help" in words or "-h" in words
    made = parser() if wants_help else bare_parser()
    values, overrides, problems = made.split(words)
    file, dry_run, as_json = values.pop("config"), values.pop("dry_run"), values.pop("json")
    if as_json and not dry_run:
        problems.append(Problem(field="--json", message="prints the plan of --dry-run", remedy="give both or neither"))
    nproc = _nproc(values.pop("nproc"), problems)
    if OBJECTIVE in values:
        values[OBJECTIVE] = read_terms(values[OBJECTIVE], problems)

    from torchspec import __version__
    from torchspec.core.settings import launch as place
    from torchspec.core.settings import launcher

    here = place()
    first = here.rank == 0
    if first:
        announce(f"torchspec {__version__}: checking the configuration")
    from torchspec.core.config.load import load_config

    try:
        config, provenance = load_config(file=file, flags=values, overrides=overrides, planned=dry_run)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if nproc > 1 and here.world_size > 1:
        problems.append(Problem(field="--nproc", value=nproc, message="a launcher has already started the ranks"))
    if config.pipeline.multiplex == "on" and here.world_size > 1 and launcher() is None:
        message, remedy = "only ranks that torchspec starts can have it", "start them with --nproc, or leave it at auto"
        problems.append(Problem(field="pipeline.multiplex", value="on", message=message, remedy=remedy))
    if problems:
        raise ConfigError(problems)
    if dry_run and not first:
        return 0  # one plan is enough

    from torchspec.core.pipeline.device_fit import Ranks

    ranks = Ranks(all=max(nproc, here.world_size), here=max(nproc, here.local_world_size), launched=here.world_size > 1)
    apart = config.pipeline.topology == "disaggregated"
    if apart:
        from torchspec.core.pipeline.topology_fit import trainers_in_all

        ranks = Ranks(all=trainers_in_all(config), here=1, launched=True)
        if nproc > 1:
            message, remedy = "is for ranks of this machine alone", "give --trainers with this topology"
            raise ConfigError([Problem(field="--nproc", value=nproc, message=message, remedy=remedy)])
    if dry_run:
        from torchspec.core.pipeline.plan import make_plan

        return _show_plan(make_plan(config, provenance, ranks), as_json)
    if nproc > 1 or (here.world_size == 1 and launcher() is None and config.pipeline.topology == "colocated"):
        from torchspec.core.pipeline.launch import launch, torchspec_command
        from torchspec.core.pipeline.multiplexing import multiplexed
        from torchspec.core.pipeline.preflight import check

        checked = check(config, ranks)
        with multiplexed(checked.config, checked.device.name) as variables:
            if nproc > 1 or variables:  # they must be there before the device is used, so a lone rank is started too
                return launch(torchspec_command(["train", *_without_nproc(words)]), nproc, variables=variables)
    if apart and launcher() is None:
        from torchspec.core.pipeline import cluster
        from torchspec.core.pipeline.preflight import check

        checked_config = check(config, ranks).config
        with TrainingDisplay(checked_config) as progress:
            return cluster.run(checked_config, words, progress.say)
    return train(config, provenance, silent=not first)


def read_terms(text: str, problems: list[Problem]) -> dict[str, Any]:
    """Terms and weights of `kl=0.5,tv=0.5`; which there are and what they may weigh is the schema's to say."""
    terms: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        try:
            value = parse_value(weight) if equals else 1.0
        except YAMLError:
            value = None
        if not name or value is None:
            message, remedy = "not TERM or TERM=WEIGHT", "such as lk_lambda or kl=0.5,tv=0.5"
            problems.append(Problem(field=FLAGS[OBJECTIVE], value=part, message=message, remedy=remedy))
        elif name in terms:
            problems.append(Problem(field=FLAGS[OBJECTIVE], value=name, message="given twice"))
        else:
            terms[name] = value
    return terms


def _show_plan(plan: Plan, as_json: bool) -> int:
    print(json.dumps(plan.to_json(), indent=2) if as_json else plan.to_text())
    return 0


def _nproc(text: str, problems: list[Problem]) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    problems.append(Problem(field="--nproc", value=text, message="must be a whole number >= 1"))
    return 1


def _without_nproc(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--nproc":
            skip = True
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept
