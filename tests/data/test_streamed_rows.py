"""Streamed rows are those of packed data, exact after every kind of resume, in bounded memory and on a bounded disk."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from decausal.data import documents as documents_module
from decausal.data import encode as encode_module
from decausal.data import reading, streamed_rows
from decausal.data.reading import Reading
from decausal.data.rows import load_rows
from decausal.data.stream import Noising, TrainingStream
from decausal.data.streamed_rows import KEPT_WINDOWS, StreamedRows, stream_rows
from decausal.errors import UserError
from tests.families import tiny_tokenizer
from tests.hangs import PATIENCE

LENGTH, WINDOW = 64, 4
MANY = 10_000  # rows of a run


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "BATCH_RECORDS", 5)
    monkeypatch.setattr(documents_module, "ROWS_PER_MARK", 7)
    monkeypatch.setattr(reading, "_SAID", set())


@pytest.fixture
def opened() -> Iterator[list[StreamedRows]]:
    made: list[StreamedRows] = []
    yield made
    for rows in made:
        rows.close()


@pytest.fixture
def stream(tmp_path: Path, opened: list[StreamedRows]) -> Any:
    def make(data: Any, cache: str = "cache", **options: Any) -> StreamedRows:
        options = {"num_rows": MANY, "window_rows": WINDOW, "cache_dir": tmp_path / cache} | options
        rows = stream_rows(data, tiny_tokenizer(chat=True), LENGTH, **options)
        opened.append(rows)
        return rows

    return make


def texts(count: int = 120) -> list[dict[str, Any]]:
    """Some are longer than a window."""
    return [
        {"text": f"the end of line {number} " * (90 if number in (7, 60) else 1 + number % 4)}
        for number in range(count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(count: int = 60) -> list[dict[str, Any]]:
    return [{"prompt": "the", "completion": f" end {number}" * (1 + number % 3)} for number in range(count)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def mixed(directory: Path) -> list[str]:
    """A source of each kind."""
    records = texts(30)
    table = pyarrow.Table.from_pylist(records)
    write(directory / "a.jsonl", texts())
    with gzip.open(directory / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in chats()))
    pyarrow.parquet.write_table(table, directory / "c.parquet", row_group_size=7)
    with pyarrow.ipc.new_file(directory / "d.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=11)
    (directory / "e.csv").write_text("text\n" + "".join(f"the line {number}\n" for number in range(40)))
    (directory / "f.json").write_text(json.dumps(records))
    (directory / "g.txt").write_text("the end of line\n" * 50)
    datasets.Dataset.from_list(records).save_to_disk(directory / "saved")
    names = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.arrow", "e.csv", "f.json", "g.txt", "saved")
    return [*(str(directory / name) for name in names), "tasks:30"]


def test_a_pass_of_streamed_rows_is_the_packed_rows(tmp_path: Path, stream: Any) -> None:
    data = mixed(tmp_path)
    packed = load_rows(data, tiny_tokenizer(chat=True), LENGTH, cache_dir=tmp_path / "cache")
    rows = stream(data)
    assert len(packed) > 10 * WINDOW
    for index in range(len(packed) + 2 * WINDOW):  # then the next pass begins
        assert same(rows[index], packed[index % len(packed)])


def test_any_window_is_the_same_after_a_start_in_the_middle(tmp_path: Path, stream: Any) -> None:
    data = mixed(tmp_path)
    whole = stream(data)
    expected = [whole[index] for index in range(40 * WINDOW)]
    whole.close()
    for file in (tmp_path / "cache").glob("*/*.rows"):
        file.unlink()
    for number in (39, 3, 17, 24, 11, 31):  # the states are kept
        rows = stream(data)
        assert all(same(rows[index], expected[index]) for index in range(number * WINDOW, (number + 1) * WINDOW))
        rows.close()
    assert all(same(stream(data, "empty")[index], expected[index]) for index in (150, 151))  # nothing is kept


def test_a_data_set_of_the_hub_goes_on_from_its_own_marks(
    tmp_path: Path, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        table = pyarrow.Table.from_pylist([record | {"id": shard} for record in texts(30)])
        pyarrow.parquet.write_table(table, tmp_path / "shards" / f"{shard}.parquet", row_group_size=8)
    files = sorted(map(str, (tmp_path / "shards").iterdir()))
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: load("parquet", data_files=files))
    packed = load_rows(files, tiny_tokenizer(chat=True), LENGTH, cache_dir=tmp_path / "cache")
    rows = stream("owner/texts")
    assert all(same(rows[index], packed[index]) for index in range(len(packed)))
    rows.close()
    for file in (tmp_path / "cache").glob("*/*.rows"):
        file.unlink()
    starts: list[Any] = []
    go_on = datasets.IterableDataset.load_state_dict
    monkeypatch.setattr(
        datasets.IterableDataset, "load_state_dict", lambda self, state: (starts.append(state), go_on(self, state))[1]
    )
    for window in (len(packed) // WINDOW - 1, 9, 5):
        rows = stream("owner/texts")
        assert all(same(rows[index], packed[index]) for index in range(window * WINDOW, (window + 1) * WINDOW))
        rows.close()
    assert starts


def test_what_was_cut_off_on_disk_is_built_again(tmp_path: Path, stream: Any) -> None:
    data = write(tmp_path / "a.jsonl", texts())
    rows = stream(data)
    expected = [rows[index] for index in range(6 * WINDOW)]
    rows.close()
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for name in ("00000005.rows", "00000005.npz", "00000004.npz"):
        (directory / name).write_bytes((directory / name).read_bytes()[:100])
    assert same(stream(data)[5 * WINDOW], expected[5 * WINDOW])


@pytest.mark.parametrize("num_proc", [1, 3])
def test_skipped_records_and_passes_are_counted_exactly(
    tmp_path: Path, stream: Any, capfd: pytest.CaptureFixture[str], num_proc: int
) -> None:
    records = [*texts(20), {"text": "  "}, {"other": 1}, {"text": "<unk>" if num_proc < 0 else "the"}, *texts(20)]
    data = write(tmp_path / "a.jsonl", records)
    how = Reading(on_bad_record="skip", num_proc=num_proc)
    rows = stream(data, reading=how)
    packed = load_rows(data, tiny_tokenizer(chat=True), LENGTH, reading=how, cache_dir=tmp_path / "cache")
    _ = [rows[index] for index in range(0, len(packed) + WINDOW, WINDOW)]
    rows.close()
    resumed = stream(data, reading=how)
    _ = resumed[len(packed) + 2 * WINDOW]
    end = len(packed) // WINDOW * WINDOW
    resumed.say_read(end)
    resumed.say_read(len(packed) + 2 * WINDOW)
    said = [line for line in capfd.readouterr().err.splitlines() if "streamed: read" in line]
    assert "skipped 1 empty record; skipped 1 bad record: " in said[0]
    assert said[0].endswith("ended in pass 1 over the data")
    assert f"{end * LENGTH:,} tokens" in said[0]
    assert said[1].endswith("ended in pass 2 over the data")
    assert rows.epochs(end) == 0
    assert resumed.epochs(len(packed) + 2 * WINDOW) == 1 + 2 * WINDOW / len(packed)


def stream_of(rows: StreamedRows) -> TrainingStream:
    return TrainingStream(rows, MANY, seed=3, shift=1, noising=Noising())


def test_items_follow_from_seed_and_position_alone(tmp_path: Path, stream: Any) -> None:
    data = write(tmp_path / "a.jsonl", texts())
    once = stream_of(stream(data))
    expected = [once[position] for position in range(9 * WINDOW)]
    numbers = [once.row_index(position) for position in range(9 * WINDOW)]
    for window in range(9):
        inside = numbers[window * WINDOW : (window + 1) * WINDOW]
        assert sorted(inside) == list(range(window * WINDOW, (window + 1) * WINDOW))
    assert numbers != sorted(numbers)
    again = stream_of(stream(data))
    for position in (30, 31, 32, 33, 34, 5, 13):
        assert same(again[position], expected[position])


def test_the_disk_holds_few_windows(tmp_path: Path, stream: Any) -> None:
    rows = stream(write(tmp_path / "a.jsonl", texts()))
    for number in range(30):
        _ = rows[number * WINDOW]
        there = {int(file.stem) for file in (tmp_path / "cache").glob("*/*.rows")}
        assert there - {number + 1} == {0, *range(max(0, number - KEPT_WINDOWS + 1), number + 1)}


def test_no_window_behind_the_run_is_prepared(tmp_path: Path, stream: Any) -> None:
    rows = stream(write(tmp_path / "a.jsonl", texts()), num_rows=2 * WINDOW)
    _ = rows[0], rows[WINDOW]
    rows.close()
    assert len(list((tmp_path / "cache").glob("*/*.rows"))) == 2


def test_memory_is_bounded_by_windows_and_not_by_the_data(tmp_path: Path, stream: Any) -> None:
    bound, window, data = 1 << 20, 64, tmp_path / "large.jsonl"
    with data.open("w") as file:
        for number in range(1900):
            file.write(json.dumps({"text": f"the end of line {number} " * 20, "unread": "a" * 1400}) + "\n")
    assert data.stat().st_size > 3 * bound
    rows = stream(data, window_rows=window)
    _ = rows[0]
    tracemalloc.start()
    number = 0
    while not rows.epochs(number * window):  # until all has been read
        number += 1
        _ = rows[number * window]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number > 25
    assert peak < bound


def test_no_more_is_read_than_a_window_needs(tmp_path: Path, stream: Any) -> None:
    """What is wrong further on is reported when it is reached."""
    data = write(tmp_path / "a.jsonl", texts())
    data.write_text(data.read_text() + "not JSON\n")
    rows = stream(data)
    _ = rows[0]
    with pytest.raises(UserError, match=r"a.jsonl:121: not JSON.*--on_bad_record skip"):
        _ = [rows[index] for index in range(MANY)]
    rows.close()
    with pytest.raises(UserError, match=r"a.jsonl:121: not JSON"):
        _ = [stream(data)[index] for index in range(MANY)]


def _read(rows: StreamedRows, indices: list[int], queue: Any) -> None:
    queue.put([rows[index]["clean_ids"].tolist() for index in indices])
    rows.close()


def test_processes_share_windows(tmp_path: Path, stream: Any) -> None:
    data = write(tmp_path / "a.jsonl", texts())
    rows = stream(data)
    indices = list(range(12 * WINDOW))
    expected = [stream(data, "other")[index]["clean_ids"].tolist() for index in indices]
    assert rows.first[0]["clean_ids"].tolist() == expected[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read, args=(rows, indices, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    assert found == [expected] * 3


def test_pickled_rows_are_the_same_rows(tmp_path: Path, stream: Any) -> None:
    rows = stream(write(tmp_path / "a.jsonl", texts()))
    _ = rows[0]
    again = pickle.loads(pickle.dumps(rows))
    assert same(again[3 * WINDOW], rows[3 * WINDOW])
    again.close()


def test_a_fraction_streams_the_documents_that_it_packs(tmp_path: Path, stream: Any) -> None:
    data = write(tmp_path / "a.jsonl", texts())
    options = {"data_fraction": 0.4, "seed": 5}
    packed = load_rows(data, tiny_tokenizer(chat=True), LENGTH, cache_dir=tmp_path / "cache", **options)
    rows = stream(data, **options)
    assert all(same(rows[index], packed[index]) for index in range(len(packed)))
    with pytest.raises(UserError, match="--data_fraction 1e-09: none of the 120 records is in it; raise it"):
        _ = stream(data, data_fraction=1e-9)[0]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"text": " "}], r"no text in .*a.jsonl: all of its documents are empty \(1\)"),
        ([{"prompt": "the", "completion": " end" * 90}], "every document is longer than a row of 64 tokens"),
    ],
)
def test_data_without_rows_are_refused(tmp_path: Path, stream: Any, records: list[Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _ = stream(write(tmp_path / "a.jsonl", records))[0]


def test_sources_that_begin_with_conversations_are_known_before_they_are_read(tmp_path: Path, stream: Any) -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "end"}]
    plain = write(tmp_path / "a.jsonl", texts())
    (tmp_path / "chats").mkdir()
    chats = write(tmp_path / "chats" / "b.jsonl", [{"messages": turns}])
    assert stream([plain, chats]).has_conversations
    assert not stream(plain).has_conversations


def test_a_window_that_another_process_builds_is_not_prepared_twice(
    tmp_path: Path, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    build = streamed_rows.write_rows

    def recording(path: Path, *rest: Any) -> None:
        made.append(int(path.stem))
        build(path, *rest)

    monkeypatch.setattr(streamed_rows, "write_rows", recording)
    data = write(tmp_path / "a.jsonl", texts())
    one, other = stream(data), stream(data)
    for index in range(10 * WINDOW):
        assert same(one[index], other[index])
    one.close()
    other.close()
    assert sorted(set(made)) == sorted(made)
