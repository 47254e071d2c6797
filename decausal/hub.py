"""Downloads from the Hugging Face hub and uploads to it, with one-line errors for what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, tqdm, validate_repo_id

from decausal.errors import UserError, first_line

try:  # what the hub's client speaks HTTP with
    from huggingface_hub.utils import httpx
except ImportError:  # before huggingface_hub 1.31
    import httpx

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")  # never code
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
CONNECT = "check the connection, or set HF_HUB_OFFLINE=1 to use what was downloaded before"


class _NoBar(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def is_offline() -> bool:
    """Returns whether the user has forbidden requests to the hub (HF_HUB_OFFLINE)."""
    return constants.HF_HUB_OFFLINE


def fetch(
    repo_id: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES, *, is_shown: bool = True
) -> tuple[Path, str]:
    """Downloads files of a model repository: by default weights, configuration and tokenizer, never code.

    Args:
        repo_id: owner/name.
        revision: Branch, tag or commit; None: the main branch.
        files: Patterns of their names.
        is_shown: Whether progress bars are shown, where those are on.

    Returns:
        The directory in the hub's cache, and the commit. Offline, those of an earlier download.

    Raises:
        UserError: There is no such repository, it may not be read, it holds no such file, or the hub cannot be reached.
    """
    checked_repo_id(repo_id)
    with hub_errors(f"{repo_id} is neither a directory nor a model that the hub gives", CONNECT):
        if not is_offline():
            names = _file_names(repo_id, "model", revision)
            if not list(filter_repo_objects(names, allow_patterns=list(files))):
                raise UserError(f"{repo_id} on the hub is not a model that can be read: it holds no {files[0]}")
        bars = None if is_shown else _NoBar
        path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), tqdm_class=bars))
    return path, path.name


def refuse_unknown_dataset(name: str) -> None:
    """Asks the hub whether a data set exists. `datasets` would try for a long time if the hub cannot be reached.

    Raises:
        UserError: There is no such data set, it may not be read, or the hub cannot be reached.
    """
    checked_repo_id(name)
    with hub_errors(f"'{name}' is neither a file, a directory nor a data set that the hub gives", CONNECT):
        _file_names(name, "dataset", None)


def push(directory: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Uploads a directory as a model repository, which is created if it does not exist.

    Args:
        directory: All of it is uploaded, in one commit.
        repo_id: The owner/name on the hub.
        private: Whether a repository that is made now is private.
        api: A `huggingface_hub.HfApi`; None: one with the user's own login.

    Returns:
        The repository's address.

    Raises:
        UserError: The hub refuses, or cannot be reached; the directory stays.
    """
    api = api or HfApi()
    with hub_errors(f"cannot push {directory} to {repo_id}", "it is whole, and can be uploaded again"):
        created = api.create_repo(repo_id=checked_repo_id(repo_id), repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="model", folder_path=str(directory), commit_message="Upload with decausal"
        )
    return str(created)


def _file_names(repo_id: str, kind: str, revision: str | None) -> list[str]:
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=timeout)
    return [file.rfilename for file in info.siblings or ()]


def checked_repo_id(repo_id: str) -> str:
    """Returns `repo_id`.

    Raises:
        UserError: The hub would not take it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is not a hub id: {first_line(error)}; write owner/name") from error
    return repo_id


@contextmanager
def hub_errors(what: str, hint: str) -> Iterator[None]:
    """Turns errors of the hub, and of the way to it, into one line.

    Args:
        what: What could not be done.
        hint: What to do about a failure that is due to neither name nor rights.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{what}: not logged in; {LOG_IN}") from error
    except GatedRepoError as error:
        raise UserError(f"{what}: it is gated; ask for access on its page, then {LOG_IN}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what}: it has none of that name, or a private one; check the name, or {LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what}: it has no such revision; give a branch, tag or commit") from error
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            hint = f"check login and rights: {LOG_IN}"
        raise UserError(f"{what}: {first_line(error)}; {hint}") from error
    except LocalEntryNotFoundError as error:
        reason = "it was not downloaded whole before, and HF_HUB_OFFLINE is set; unset it" if is_offline() else hint
        raise UserError(f"{what}: {reason}") from error
    except httpx.TransportError as error:
        raise UserError(f"{what}: {constants.ENDPOINT} cannot be reached ({first_line(error)}); {hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {first_line(error)}; {hint}") from error
