"""One run holds a directory, and a run that comes to nothing leaves nothing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import yaml

from decausal.errors import UserError
from decausal.training.run_directory import (
    RUN_FILE,
    STAGING,
    checkpoint_to_resume,
    checkpoints,
    claimed,
    disk_errors,
    is_whole,
    seal,
)


class OddError(Exception):
    pass


def make_checkpoint(directory, step):
    checkpoint = directory / f"checkpoint-{step}"
    (checkpoint / "part").mkdir(parents=True)
    (checkpoint / "part" / "weights").write_bytes(b"12345")
    seal(checkpoint)
    return checkpoint


def test_a_run_that_fails_before_it_begins_leaves_nothing_not_even_parents(tmp_path):
    with pytest.raises(OddError), claimed(tmp_path / "a" / "b" / "c"):
        raise OddError
    assert not (tmp_path / "a").exists()


def test_an_empty_directory_that_was_there_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OddError), claimed(tmp_path / "a" / "b"):
        raise OddError
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert not list((tmp_path / "a").iterdir())


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path):
    def begin_and_fail():
        with claimed(tmp_path / "out") as run_directory:
            run_directory.begin({"max_steps": 3, "align_layers": (1, 2)})
            assert yaml.safe_load((tmp_path / "out" / RUN_FILE).read_text()) == {"max_steps": 3, "align_layers": [1, 2]}
            (tmp_path / "out" / STAGING).mkdir()
            raise OddError

    with pytest.raises(OddError):
        begin_and_fail()
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_later_keeps_its_checkpoints_and_its_record(tmp_path):
    def save_and_fail():
        with claimed(tmp_path / "out") as run_directory:
            run_directory.begin({})
            make_checkpoint(tmp_path / "out", 3)
            raise OddError

    with pytest.raises(OddError):
        save_and_fail()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RUN_FILE, "checkpoint-3"}


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_directory_that_no_run_made_is_never_touched(tmp_path, flag):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no run of decausal made it"), claimed(tmp_path, **{flag: True}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("flag", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_what_a_run_left_that_was_killed_as_it_began_is_in_nobodys_way(tmp_path, flag):
    (tmp_path / f"{RUN_FILE}.tmp123").write_text("max_st")
    (tmp_path / ".lock").write_text("")
    with claimed(tmp_path, **flag) as run_directory:
        run_directory.begin({"seed": 1}, overwrite="overwrite" in flag)
        assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == [RUN_FILE]


def test_a_directory_that_is_not_empty_needs_a_flag(tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    with (
        pytest.raises(UserError, match=r"not empty; .*--resume_from_checkpoint true.*--overwrite true"),
        claimed(tmp_path),
    ):
        pass
    assert (tmp_path / RUN_FILE).exists()


def test_overwriting_waits_until_the_new_run_begins(tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    make_checkpoint(tmp_path, 3)
    with pytest.raises(OddError), claimed(tmp_path, overwrite=True):
        raise OddError
    assert checkpoints(tmp_path)
    with claimed(tmp_path, overwrite=True) as run_directory:
        run_directory.begin({"seed": 1}, overwrite=True)
        assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == [RUN_FILE]


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path):
    with claimed(tmp_path / "out"), pytest.raises(UserError, match="in use by another run"), claimed(tmp_path / "out"):
        pass
    with claimed(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_the_lock_ends_with_the_process_that_held_it(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from decausal.training.run_directory import claimed
with claimed(Path({str(tmp_path / "out")!r})) as run_directory:
    run_directory.begin({{}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert ended.returncode == -9
    assert (tmp_path / "out" / ".lock").exists()
    with claimed(tmp_path / "out", resume=True):
        pass


def _claim_often(output_dir, inside, num_claims, num_refused):
    for _ in range(200):
        try:
            with claimed(output_dir):
                with inside.get_lock():
                    inside.value += 1
                    assert inside.value == 1
                with inside.get_lock():
                    inside.value -= 1
                num_claims.value += 1
        except UserError:
            num_refused.value += 1


def test_no_two_processes_ever_hold_one_directory_however_they_race(tmp_path):
    fork = multiprocessing.get_context("fork")
    inside, num_claims, num_refused = (fork.Value("i", 0) for _ in range(3))
    arguments = (tmp_path / "out", inside, num_claims, num_refused)
    processes = [fork.Process(target=_claim_often, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert num_claims.value > 100


def test_a_file_in_the_directorys_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"), claimed(tmp_path / "out"):
        pass


def test_processes_after_the_first_neither_hold_nor_write(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path / "out") as run_directory:
        run_directory.begin({"seed": 1})
    assert not (tmp_path / "out").exists()


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-last").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoint_to_resume(tmp_path, "true") == checkpoint_to_resume(tmp_path, True) == tmp_path / "checkpoint-100"
    assert checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-3")) == tmp_path / "checkpoint-3"
    assert [checkpoint_to_resume(tmp_path, no) for no in (None, False, "false", "")] == [None] * 4


def test_a_seal_notices_every_missing_or_shorter_file(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 1)
    assert is_whole(checkpoint)
    (checkpoint / "part" / "weights").write_bytes(b"1234")
    assert not is_whole(checkpoint)
    (checkpoint / "part" / "weights").write_bytes(b"12345")
    assert is_whole(checkpoint)
    (checkpoint / "part" / "weights").unlink()
    assert not is_whole(checkpoint)
    assert not is_whole(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"),
            "No space",
        ),
    ],
    ids=["python", "rust", "torch"],
)
def test_every_librarys_full_disk_becomes_one_line_that_names_what_is_left(tmp_path, error, reported):
    with (
        pytest.raises(UserError, match=f"cannot save to .*{reported}.*no earlier checkpoint exists"),
        disk_errors(tmp_path),
    ):
        raise error
    make_checkpoint(tmp_path, 7)
    with pytest.raises(UserError, match="checkpoint-7 is whole"), disk_errors(tmp_path):
        raise error


def test_errors_that_are_not_the_disks_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes do not match")
