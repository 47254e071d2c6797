"""To the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from decausal.hub import checked_repo_id, hub_errors


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
    with hub_errors(f"cannot push {directory} to {repo_id}", "it is whole, and can be uploaded again"):
        created = api.create_repo(repo_id=checked_repo_id(repo_id), repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="model", folder_path=str(directory), commit_message="Upload with decausal"
        )
    return str(created)
