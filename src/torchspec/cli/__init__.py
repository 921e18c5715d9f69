"""The command line. Importing it is cheap: a command's module, and with it torch, comes when the command runs."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from torchspec.core.errors import ConfigError, Problem, TorchspecError
from torchspec.core.quiet import hide_known_noise

# Name -> what it does. The module torchspec.cli.commands.<name> has `parser()` and `run(words)`.
COMMANDS = {
    "quickstart": "train and measure a draft for the embedded target, from nothing, in minutes",
    "prepare": "build conversations from the Python standard library of this interpreter",
    "generate": "have the target write the assistant turns of conversations itself",
    "capture": "write the features of a target's data to a directory, for trainings without the target",
    "train": "train a draft for a target",
    "recipes": "list the recipes that ship, for published targets and for each algorithm",
    "eval": "measure a draft by lossless speculative decoding",
    "export": "write a checkpoint as a draft that an engine serves",
    "convert": "turn a draft that somebody published into another layout",
    "report": "write the HTML report of a run, or compare runs",
    "engine": "install engines, each into an environment of its own, and look after them",
    "bench": "measure algorithms side by side",
    "doctor": "say which devices and engines can be used here, and what the others lack",
}

EXIT_INTERRUPTED = 130
EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h

_LESS_MEMORY = "smaller batches, shorter samples or a smaller draft; for a training, --dry-run lists what makes it fit"
_EPILOG = """\
`torchspec COMMAND --help` describes a command. `--traceback` with any command shows where an error was raised.
`torchspec --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors become text here and nowhere else."""
    words = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    hide_known_noise()
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # here, where a reader that went away can still be answered
        return code
    except TorchspecError as error:
        return _failed(str(error), error.exit_code, with_traceback)
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED, with_traceback)
    except BrokenPipeError:  # the reader of stdout went away, as in `torchspec doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _failed(f"{error.strerror or error}{where}", 1, with_traceback)
    except Exception as error:  # noqa: BLE001  the last resort: a defect of ours, reported as one
        if _no_memory(error):
            return _failed(f"out of memory: {_first_line(error)}\n    remedy: {_LESS_MEMORY}", 1, with_traceback)
        hint = "" if with_traceback else "\nRun it again with --traceback to see where, and report it, please."
        message = f"an unexpected error, which is a defect of torchspec: {type(error).__name__}: {error}{hint}"
        return _failed(message, EXIT_INTERNAL, with_traceback)


def _no_memory(error: Exception) -> bool:
    """Whether a device or the host had no room. PyTorch says so of the host in a RuntimeError, by its text alone."""
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return own or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _failed(message: str, code: int, with_traceback: bool) -> int:
    sys.stdout.flush()
    if with_traceback:
        traceback.print_exc()
    print(f"torchspec: {message}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = words
    if name in ("--version", "version"):
        from torchspec import __version__

        print(f"torchspec {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        remedy = f"did you mean {near[0]}?" if near else ""
        message = "no such option" if name.startswith("-") else "no such command"
        raise ConfigError([Problem(field=name, message=message, choices=tuple(COMMANDS), remedy=remedy)])
    command = importlib.import_module(f"torchspec.cli.commands.{name}")
    code: int = command.run(rest)
    return code


def overview() -> str:
    """What `torchspec --help` prints."""
    width = max(len(name) for name in COMMANDS)
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return f"usage: torchspec COMMAND [options]\n\n{listed}\n\n{_EPILOG}"
