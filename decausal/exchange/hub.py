"""To and from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from decausal.errors import UserError
from decausal.models.adapt import first_line

_READ = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")  # never code


def checked_repo_id(repo_id: str) -> str:
    """Returns `repo_id`.

    Raises:
        UserError: the hub would not take it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no hub id: {first_line(error)}; write owner/name") from error
    return repo_id


def push(directory: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Uploads a directory as a model repository, made if it does not exist.

    Args:
        directory: all of it is uploaded, in one commit.
        repo_id: owner/name.
        private: of a repository that is made now.
        api: a `huggingface_hub.HfApi`; None: one with the user's own login.

    Returns:
        The repository's address.

    Raises:
        UserError: the hub refuses, or cannot be reached; the directory stays.
    """
    api = api or HfApi()
    with _hub_errors(f"cannot push {directory} to {repo_id}", "it is whole, and can be uploaded again"):
        created = api.create_repo(repo_id=checked_repo_id(repo_id), repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="model", folder_path=str(directory), commit_message="Upload with decausal"
        )
    return str(created)


def fetch(repo_id: str, revision: str | None = None) -> tuple[Path, str]:
    """Brings a checkpoint's weights, configuration and tokenizer here, and none of its code.

    Returns:
        The directory, and the commit.

    Raises:
        UserError: there is no such repository, or it cannot be reached.
    """
    with _hub_errors(f"{repo_id} is neither a directory nor a model that the hub gives", "check its name"):
        path = Path(snapshot_download(checked_repo_id(repo_id), revision=revision, allow_patterns=list(_READ)))
    return path, path.name


@contextmanager
def _hub_errors(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{what}: not logged in; run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            hint = "check login (`hf auth login`) and rights"
        raise UserError(f"{what}: {first_line(error)}; {hint}") from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{what}: {first_line(error)}; {hint}") from error
