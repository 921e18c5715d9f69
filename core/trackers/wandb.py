"""Weights & Biases, online or, with WANDB_MODE=offline, into OUTPUT/wandb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from torchspec.core import settings
from torchspec.core.interfaces.device import Availability
from torchspec.core.interfaces.tracker import Result, TrackedRun, TrackerSpec
from torchspec.core.trackers.packages import PROJECT, installed

STEP = "step"
ANSWER_SECONDS = 20.0
"""For the server to begin the run, and at its end for what is yet to be uploaded; `wandb sync` brings the rest."""
_WITHOUT_ACCOUNT = ("offline", "dryrun", "disabled")
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def probe() -> Availability:
    """Its package, and an account to send to: with none, W&B would ask for one in the middle of the run."""
    found = installed("wandb")
    if not found.ok:
        return found
    import wandb

    chosen = wandb.setup().settings
    if chosen.mode in _WITHOUT_ACCOUNT or chosen.api_key or any(map(settings.is_set, _KEYS)) or _netrc(chosen.base_url):
        return found
    hint = "run `wandb login`, set WANDB_API_KEY, or keep the run here with WANDB_MODE=offline"
    return replace(found, ok=False, reason="nobody is logged in", hint=hint)


def _netrc(address: str) -> bool:
    """Whether `wandb login` has left a key for this server, or for the one of W&B's own."""
    try:
        known = netrc(settings.value_of("NETRC") or Path.home() / ".netrc")
    except (OSError, NetrcParseError):
        return False
    return any(known.authenticators(host) for host in (urlsplit(address).hostname or "", "api.wandb.ai"))


class WeightsAndBiases:
    """Steps are a figure of their own: W&B's count drops what comes for an earlier one."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project or settings.value_of("WANDB_PROJECT") or PROJECT,
            id=run.id,
            name=run.name,
            resume="allow",
            dir=str(run.directory),
            config={**run.config, **{f"environment.{name}": value for name, value in run.environment.items()}},
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_meta=True,  # the command line, in which secrets may be, is a part of it
                init_timeout=ANSWER_SECONDS,
                finish_timeout=ANSWER_SECONDS,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def results(self, values: Mapping[str, Result]) -> None:
        self._run.summary.update({f"results/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._run.finish()


SPEC = TrackerSpec(name="wandb", probe=probe, open=WeightsAndBiases)
