"""Files that a user names may be of any kind: one without an end is refused before it fills the memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from decausal import files
from decausal.config import read_recipe
from decausal.data.template_file import read_template
from decausal.errors import UserError
from decausal.files import read_given
from decausal.models.directories import read_table
from decausal.sampling.job_files import check_job_files
from decausal.training.sample_prompts import read_sample_prompts
from decausal.verbs.flags import text_from

READERS: list[Callable[[str], object]] = [
    read_template,
    read_recipe,
    read_sample_prompts,
    lambda name: text_from(name, "edit"),
    lambda name: check_job_files(name, "out.jsonl"),
]


@pytest.mark.parametrize("read", READERS)
def test_a_file_without_an_end_is_refused(read: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"it is longer than 64 MiB|is not a regular file"):
        read(str(tmp_path / "endless.yaml"))


def test_standard_input_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/zero").open("rb") as endless:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless))
        with pytest.raises(UserError, match="edit: cannot read standard input: it is longer than 64 MiB"):
            text_from(None, "edit")


@pytest.mark.parametrize("read", [lambda name: read_table(Path(name)), read_recipe])
def test_what_is_nested_too_deeply_is_refused(read: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    with pytest.raises(UserError, match="nested too deeply to be read"):
        read(str(tmp_path / "deep.yaml"))


def test_a_pipe_is_read_where_once_is_enough_and_refused_as_the_prompts_of_a_job(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write("a text")
    assert text_from(f"/dev/fd/{reading}", "edit") == "a text"
    with pytest.raises(UserError, match="is not a regular file; write its content to a file"):
        check_job_files(f"/dev/fd/{reading}", tmp_path / "out.jsonl")
    os.close(reading)


def test_the_longest_file_is_read_whole_with_line_feeds_as_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_GIVEN_BYTES", 6)
    (tmp_path / "a").write_bytes(b"a\r\nb\rc")
    assert read_given(tmp_path / "a") == "a\nb\nc"
    (tmp_path / "a").write_bytes(b"1234567")
    with pytest.raises(OSError, match="longer than"):
        read_given(tmp_path / "a")
