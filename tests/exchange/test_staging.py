"""A directory appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decausal.errors import UserError
from decausal.exchange.staging import staged
from tests.runs import kept_from_others


def everything(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_what_was_written_appears_under_the_name_at_the_end(tmp_path):
    with staged(tmp_path / "a" / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert everything(tmp_path) == ["a", "a/out", "a/out/sub", "a/out/sub/file"]


def test_an_empty_directory_is_filled_and_others_may_read_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "plain").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging / "file").write_text("x")
        save_file({"weight": torch.zeros(1)}, staging / "model.safetensors")  # for its owner alone
    assert (tmp_path / "out" / "file").read_text() == "x"
    assert kept_from_others(tmp_path / "out") == []
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_what_fails_leaves_nothing(error, tmp_path):
    def write() -> None:
        with staged(tmp_path / "a" / "b" / "out") as staging:
            (staging / "file").write_text("x")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert everything(tmp_path) == []


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    def write() -> None:
        with staged(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write to output_dir .*out: No space left on device"):
        write()
    assert everything(tmp_path) == []


def test_a_directory_that_holds_something_and_a_file_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty; name a new directory"), staged(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="is a file"), staged(tmp_path / "out" / "file"):
        pass
    assert everything(tmp_path) == ["out", "out/file"]


def test_a_directory_that_another_filled_meanwhile_is_left_alone(tmp_path):
    def write() -> None:
        with staged(tmp_path / "out") as staging:
            (staging / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(UserError, match="cannot write to output_dir"):
        write()
    assert everything(tmp_path) == ["out", "out/file"]
    assert (tmp_path / "out" / "file").read_text() == "theirs"
