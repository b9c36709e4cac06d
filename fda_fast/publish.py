"""Uploading a merged model to the Hugging Face Hub, checked before the work starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fda_fast.errors import InputError
from fda_fast.hub import is_connection_error


@dataclass(frozen=True)
class Destination:
    """A place on the Hub that uploading to is known to be allowed.

    Attributes:
        repo_id: "user/name".
        private: whether the repository is made private if it is new.
    """

    repo_id: str
    private: bool

    def upload(self, folder: str | os.PathLike[str], message: str = "Upload merged model") -> str:
        """Upload a folder as one commit.

        Args:
            folder: what ``merge`` wrote.
            message: of the commit.

        Returns:
            The model's address.

        Raises:
            InputError: the Hub refuses or cannot be reached; the folder stays.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = HfApi().upload_folder(
                repo_id=self.repo_id, folder_path=Path(folder), commit_message=message
            )
        except Exception as error:
            if isinstance(error, HfHubHTTPError) or is_connection_error(error):
                raise InputError(
                    f"upload to {self.repo_id} failed: {_first_line(error)}",
                    fix=f"The merged model is in {folder}: `hf upload {self.repo_id} {folder}` "
                    "tries again.",
                ) from error
            raise
        return str(found.commit_url).partition("/commit/")[0]


def destination(repo_id: str, *, private: bool = False) -> Destination:
    """Make sure that a model can be uploaded, and make its repository.

    Args:
        repo_id: "user/name", or "name" for the user who is logged in.
        private: make a new repository private.

    Raises:
        InputError: not a valid name, no token, a token that the Hub does not take or that may
            not write there, no connection, offline mode.

    Cost: two requests.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo_id}: {_first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub", expected="a connection", got="HF_HUB_OFFLINE=1")
    if get_token() is None:
        raise InputError(
            "--push-to-hub", expected="a token of the Hub", got="none",
            fix="Log in with `hf auth login`, or set HF_TOKEN.",
        )  # fmt: skip
    api = HfApi()
    try:
        user: dict[str, Any] = api.whoami()
        if "/" not in repo_id:
            repo_id = f"{user['name']}/{repo_id}"
        api.create_repo(repo_id, private=private, exist_ok=True)
    except Exception as error:
        if isinstance(error, HfHubHTTPError):
            raise InputError(
                f"--push-to-hub {repo_id}: the Hub refuses: {_first_line(error)}",
                fix="Check the name and that the token may write to it.",
            ) from error
        if is_connection_error(error):
            raise InputError(
                f"--push-to-hub {repo_id}: the Hub cannot be reached: {_first_line(error)}"
            ) from error
        raise
    return Destination(repo_id, private)


def push_to_hub(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Upload a folder that ``merge`` wrote, in one commit.

    Args:
        folder: the merged model.
        repo_id: "user/name", or "name" for the user who is logged in; made if it does not exist.
        private: make a new repository private.

    Returns:
        The model's address.

    Raises:
        InputError: as ``destination`` and ``Destination.upload``; no folder.
    """
    if not Path(folder).is_dir():
        raise InputError(f"push_to_hub: no folder {folder}")
    return destination(repo_id, private=private).upload(folder)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__
