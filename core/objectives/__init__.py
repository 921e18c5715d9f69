"""What drafts are taught, and the log-probabilities of policies that they are trained beside."""

from __future__ import annotations

from torchspec.core.objectives.log_probabilities import (
    LogProbabilities,
    hidden_log_probabilities,
    token_log_probabilities,
)

__all__ = ["LogProbabilities", "hidden_log_probabilities", "token_log_probabilities"]
