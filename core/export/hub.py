"""An exported draft onto the Hugging Face hub, by its own client. Nothing that is there becomes public by accident."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec.core.config.secrets import hidden
from torchspec.core.errors import Problem, TorchspecError
from torchspec.core.export.card import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


class HubError(TorchspecError):
    """The upload failed; the draft is where it was written."""


def hub_problems(field: str, repository: str) -> list[Problem]:
    """What can be known of an upload before anything is written: the name, and that somebody is logged in. Asks no
    server."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    found: list[Problem] = []
    try:
        validate_repo_id(repository)
        whole = HUB_ID.fullmatch(repository) is not None
    except HFValidationError:
        whole = False
    if not whole:
        message = "not OWNER/NAME of a repository on the hub"
        found.append(Problem(field=field, value=repository, message=message))
    if not get_token():
        message, remedy = "nobody is logged in to the hub", "run `hf auth login`, or set HF_TOKEN"
        found.append(Problem(field=field, message=message, remedy=remedy))
    return found


def push(directory: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload every file of a draft's directory in one commit; -> its address.

    The repository is made if it is not there, private unless `public`. Raises HubError, saying how to go on: also where
    it is there and public, and that was not asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="torchspec")
    try:
        try:
            seen_by_all = not api.repo_info(repository).private
        except RepositoryNotFoundError:
            api.create_repo(repository, private=not public)
            seen_by_all = public
        if seen_by_all and not public:
            raise HubError(
                f"{repository} is public already, so nothing was uploaded: give --public if everybody may see the "
                f"draft, or name another repository. The draft is in {directory}"
            )
        if public and not seen_by_all:
            logger.warning("%s is private and stays so: its settings on the hub make it public", repository)
        return _upload(api, directory, repository, message)
    except HubError:
        raise
    except Exception as error:  # the hub's, and those of the network library of whichever client
        raise _failed(directory, repository, error) from error


def _upload(api: HfApi, directory: Path, repository: str, message: str) -> str:
    done = api.upload_folder(folder_path=directory, repo_id=repository, commit_message=message)
    return str(done.commit_url)


def _failed(directory: Path, repository: str, error: Exception) -> HubError:
    why = hidden(str(error)).strip().splitlines() or [type(error).__name__]
    return HubError(
        f"the draft is in {directory}, whole and checked, but it could not be uploaded to {repository}: "
        f"{why[0]}\nTo try again: the same command, or `hf upload {repository} {directory}`"
    )
