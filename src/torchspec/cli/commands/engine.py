"""`torchspec engine`: the environments that vLLM and SGLang run in, apart from this one."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from torchspec.cli.console import announce, print_table
from torchspec.cli.options import Parser
from torchspec.core.errors import ConfigError, Problem, TorchspecError

if TYPE_CHECKING:
    from torchspec.backends.remote.environments import Environment

_WORDS = {
    "install": "make the environment of an engine, or find it made",
    "list": "say which environments there are",
    "check": "see whether the engines there can still be used",
    "remove": "delete the environment of an engine",
    "command": "print the command that starts a worker to attach to",
}
_DEVICE = "cpu, cuda or npu"


def parser() -> Parser:
    width = max(map(len, _WORDS))
    listed = "\n".join(f"  {word:<{width}}  {what}" for word, what in _WORDS.items())
    return Parser(
        "engine",
        "Engines such as vLLM and SGLang run in Python environments of their own, since what they depend on conflicts\n"
        "with what torchspec depends on. They lie in ~/.local/share/torchspec/engines, or in TORCHSPEC_ENGINES.",
        usage="torchspec engine COMMAND [options]",
        epilog=f"{listed}\n\n`torchspec engine COMMAND --help` describes one.",
    )


def parsers() -> dict[str, Parser]:
    """One per word that may follow."""
    install = Parser(
        "engine install",
        "Make the environment of an engine, with the versions that this torchspec was tested with. Takes minutes and\n"
        "gigabytes. One that is there and in order is left alone; one that isn't is made anew.",
    )
    _add_engine(install)
    _add_device(install, f"{_DEVICE}; default: what is here")
    install.add_argument("--python", metavar="PATH", type=Path, help="the Python to make it with; default: this one")
    listing = Parser(
        "engine list", "List the environments, and whether this torchspec would install the same versions."
    )
    listing.add_argument("--json", action="store_true", help="print a JSON list on stdout instead of a table")
    check = Parser(
        "engine check",
        "Import each engine in its environment and compare its version with the tested one. Exit code 1 when\n"
        "something is wrong.",
    )
    _add_engine(check, nargs="?")
    _add_device(check, f"{_DEVICE}; default: every one there is")
    remove = Parser("engine remove", "Delete the environment of an engine.")
    _add_engine(remove)
    _add_device(remove, f"{_DEVICE}; default: the only one there is")
    command = Parser(
        "engine command",
        "Print the command that starts an engine by itself, for trainings that attach to it (engine.url). It holds a\n"
        "fresh token: give the same to the training in TORCHSPEC_ENGINE_TOKEN. Both must run on one machine.",
    )
    _add_engine(command)
    _add_device(command, f"{_DEVICE}; default: what is here")
    command.add_argument(
        "--target", metavar="PATH", type=Path, required=True, help="directory of the target [required]"
    )
    command.add_argument(
        "--algorithm",
        metavar="NAME",
        default="eagle3",
        help="draft algorithm whose default taps are captured [default: eagle3]",
    )
    command.add_argument(
        "--taps", metavar="L,L,L", help="layers to capture instead, counted from 0; none: for `generate`"
    )
    command.add_argument("--dtype", metavar="DTYPE", default="auto", help="precision of the target [default: auto]")
    command.add_argument("--port", metavar="N", type=_port, default=8123, help="port it listens on [default: 8123]")
    command.add_argument("--python", metavar="PATH", type=Path, help="the engine's Python; default: the installed one")
    return {"install": install, "list": listing, "check": check, "remove": remove, "command": command}


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535 (got {text!r})")


def _add_engine(parser: Parser, **shape: Any) -> None:
    from torchspec.backends.remote import pins

    parser.add_argument("engine", metavar="ENGINE", help=" or ".join(pins.engines()), **shape)


def _add_device(parser: Parser, what: str) -> None:
    parser.add_argument("--device", metavar="NAME", help=what)


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        parser().print_help()
        return 0
    word, *rest = words
    if word not in _WORDS:
        near = difflib.get_close_matches(word, _WORDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see `torchspec engine --help`"
        raise ConfigError([Problem(field=word, message="no such command", choices=tuple(_WORDS), remedy=remedy)])
    made = parsers()[word]
    values, loose, problems = made.split(rest)
    problems += made.surplus(loose) + _unknown_names(values)
    if problems:
        raise ConfigError(problems)
    return _RUN[word](values)


def _unknown_names(values: dict[str, Any]) -> list[Problem]:
    from torchspec.backends.remote import pins

    engine, device = values.get("engine"), values.get("device")
    if engine is not None and engine not in pins.engines():
        return [Problem(field="ENGINE", value=engine, message="no such engine", choices=pins.engines())]
    known = pins.devices(engine or "*")
    if device is not None and device not in known:
        message = f"no environment of {engine or 'any engine'} is known for this device"
        return [Problem(field="--device", value=device, message=message, choices=known)]
    return []


def _install(values: dict[str, Any]) -> int:
    engine = values["engine"]
    announce(f"making sure that {engine} is installed")
    from torchspec.backends.remote.environments import install

    device = values["device"] or _default_device(engine)
    environment = install(engine, device, base_python=values["python"] or _this_python(), say=announce)
    print(environment.path)
    return 0


def _default_device(engine: str) -> str:
    from torchspec.backends.remote import pins
    from torchspec.core import registry, settings

    device, why = registry.choose_device(None, settings.default_device())
    if device not in pins.devices(engine):
        device, why = "cpu", f"no environment of {engine} is known for {device}"
    announce(f"for device {device} ({why})")
    return device


def _this_python() -> Path:
    """The interpreter that this environment was itself made with."""
    return Path(getattr(sys, "_base_executable", sys.executable))


def _list(values: dict[str, Any]) -> int:
    from torchspec.backends.remote.environments import installed
    from torchspec.core.settings import engines_dir

    found = installed()
    if values["json"]:
        print(json.dumps([_facts(environment) for environment in found], indent=2))
    elif found:
        rows = [
            (each.engine, each.device, each.version, "yes" if each.current else "no", escape(str(each.path)))
            for each in found
        ]
        print_table("engines", ("engine", "device", "version", "current", "where"), rows, figures=False)
    else:
        print(f"no engine is installed in {engines_dir()}; `torchspec engine install ENGINE` installs one")
    return 0


def _facts(environment: Environment) -> dict[str, Any]:
    return {
        **{name: str(value) for name, value in vars(environment).items()},
        "current": environment.current,
    }


def _check(values: dict[str, Any]) -> int:
    from torchspec.backends.remote.environments import check

    found = _chosen(values)
    sound = True
    for environment in found:
        announce(f"importing {environment.engine} in {environment.path}")
        problems = check(environment)
        sound = sound and not problems
        name = f"{environment.engine} {environment.version} for {environment.device}"
        print("\n".join(f"{name}: {text}" for text in problems or ["in order"]))
    return 0 if sound else 1


def _chosen(values: dict[str, Any]) -> list[Environment]:
    """The environments asked for; TorchspecError where there are none."""
    from torchspec.backends.remote.environments import installed
    from torchspec.core.settings import engines_dir

    engine, device = values["engine"], values["device"]
    found = [each for each in installed() if engine in (None, each.engine) and device in (None, each.device)]
    if not found:
        what = f"{engine or 'no engine'} is {'not ' if engine else ''}installed{f' for {device}' if device else ''}"
        raise TorchspecError(
            f"{what} in {engines_dir()}\n    remedy: torchspec engine install {engine or 'ENGINE'}"
            + (f" --device {device}" if device else "")
        )
    return found


def _remove(values: dict[str, Any]) -> int:
    from torchspec.backends.remote import pins
    from torchspec.backends.remote.environments import place, remove

    engine, device = values["engine"], values["device"]
    if device is None:
        there = [each for each in pins.devices(engine) if place(engine, each).exists()]
        if len(there) > 1:
            message = f"{engine} is installed for several devices"
            raise ConfigError([Problem(field="--device", message=message, choices=tuple(there), remedy="name one")])
        device = there[0] if there else "cpu"
    remove(engine, device)
    announce(f"removed {place(engine, device)}")
    return 0


def _command(values: dict[str, Any]) -> int:
    announce(f"looking at {values['target']}")
    from torchspec.core import registry, settings
    from torchspec.core.interfaces.engine import EngineOptions, EngineProcess
    from torchspec.core.models.target_spec import read_target_spec, resolve_target

    spec = registry.backends().spec(values["engine"])
    if spec.command is None:
        raise TorchspecError(f"{spec.name} runs inside the trainer: there is nothing to attach to")
    target = read_target_spec(resolve_target(values["target"]))
    taps: tuple[int, ...] = ()
    if values["taps"] is None:
        algorithm = registry.algorithms().spec(values["algorithm"])
        taps = algorithm.create(algorithm.options(), target).taps
    elif values["taps"] != "none":
        taps = _layers(values["taps"], target.num_layers)
    name, _ = registry.choose_device(values["device"], settings.default_device())
    options = EngineOptions(
        target=target.path,
        device=registry.load_device(name),
        dtype=values["dtype"],
        taps=taps,
        process=EngineProcess(python=None if values["python"] is None else values["python"].absolute()),
    )
    print(spec.command(options, values["port"]))
    return 0


def _layers(text: str, count: int) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < count for part in parts):
        message = f"must be layers of the target, 0 to {count - 1}, with commas between them"
        raise ConfigError([Problem(field="--taps", value=text, message=message)])
    return tuple(int(part) for part in parts)


_RUN: dict[str, Callable[[dict[str, Any]], int]] = {
    "install": _install,
    "list": _list,
    "check": _check,
    "remove": _remove,
    "command": _command,
}
