"""What is pushed to the hub, and what is said when the hub does not take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from decausal import hub
from decausal.cli import main
from decausal.errors import UserError
from tests.exchange.checkpoints import save_block_model


class FakeApi:
    """Records what it is asked, and fails where it is asked to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error
        self.uploaded: list[str] = []

    def create_repo(self, **options: Any) -> str:
        self.calls.append(("create_repo", options))
        return f"https://huggingface.co/{options['repo_id']}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))
        self.uploaded = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        if self.error is not None:
            raise self.error


def http_error(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co/api/repos/create"))
    return HfHubHTTPError(f"{status} from the hub\nmore", response=response)


def test_a_directory_is_uploaded_whole_to_a_repository_that_may_exist(tmp_path):
    (tmp_path / "file").write_text("x")
    api = FakeApi()
    assert hub.push(tmp_path, "owner/name", private=True, api=api) == "https://huggingface.co/owner/name"
    (_, created), (_, uploaded) = api.calls
    assert created == {"repo_id": "owner/name", "repo_type": "model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("owner/name", str(tmp_path))
    assert api.uploaded == ["file"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (http_error(403), "403 from the hub; check login"),
        (http_error(500), "500 from the hub; it is whole"),
        (LocalTokenNotFoundError("no token"), "not logged in; log in with `hf auth login`"),
        (ConnectionError("no network"), "no network"),
    ],
)
def test_what_the_hub_says_is_reported_in_one_line(error, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as caught:
        hub.push(tmp_path, "owner/name", api=FakeApi(error))
    assert f"cannot push {tmp_path} to owner/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_push_from_the_command_line_uploads_what_was_exported(tmp_path, monkeypatch, capsys):
    save_block_model(tmp_path / "converted")
    api = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    flags = ["--format", "hf", "--output_dir", str(tmp_path / "out"), "--push_to_hub", "owner/name"]
    assert main(["export", str(tmp_path / "converted"), *flags]) == 0
    assert "pushed: https://huggingface.co/owner/name" in capsys.readouterr().out
    assert {"README.md", "config.json", "decausal.json", "model.safetensors"} <= set(api.uploaded)
    assert api.calls[0][1]["private"] is False


def test_a_push_that_fails_leaves_the_export(tmp_path, monkeypatch, capsys):
    save_block_model(tmp_path / "converted")
    monkeypatch.setattr(hub, "HfApi", lambda: FakeApi(http_error(401)))
    flags = ["--format", "sdar", "--output_dir", str(tmp_path / "out"), "--push_to_hub", "owner/name"]
    assert main(["export", str(tmp_path / "converted"), *flags]) == 2
    assert "cannot push" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_name_that_the_hub_would_not_take_costs_no_export(tmp_path, capsys):
    save_block_model(tmp_path / "converted")
    flags = ["--format", "hf", "--output_dir", str(tmp_path / "out"), "--push_to_hub", "a/b/c"]
    assert main(["export", str(tmp_path / "converted"), *flags]) == 2
    assert "'a/b/c' is not a hub id" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
