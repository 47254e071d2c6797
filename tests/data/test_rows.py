"""Rows on disk equal rows packed in memory, and a cache is never stale and never half of a build."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decausal.data import reading
from decausal.data import rows as rows_module
from decausal.data.documents import read_documents
from decausal.data.encode import encode_stream
from decausal.data.packing import pack
from decausal.data.reading import Reading
from decausal.data.rows import PackedRows, keep_fraction, load_rows
from decausal.errors import UserError
from tests.families import tiny_tokenizer
from tests.hangs import PATIENCE

LENGTH = 16


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"the end of line {number}"}) + "\n" for number in range(200)))
    return path


def load(corpus: Path, **options: Any) -> PackedRows:
    return load_rows(str(corpus), tiny_tokenizer(), LENGTH, cache_dir=corpus.parent / "cache", **options)


def all_ids(rows: PackedRows) -> list[list[int]]:
    return [rows[index]["clean_ids"].tolist() for index in range(len(rows))]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records each build."""
    made: list[Path] = []
    build = rows_module._build

    def recording(directory: Path, *rest: Any) -> None:
        made.append(directory)
        build(directory, *rest)

    monkeypatch.setattr(rows_module, "_build", recording)
    return made


def test_rows_on_disk_equal_rows_packed_in_memory(corpus: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = load(corpus)
    expected = list(pack(encode_stream(read_documents(str(corpus)), tokenizer), LENGTH, tokenizer.eos_token_id))
    assert len(rows) == len(expected)
    for index, row in enumerate(expected):
        item = rows[index]
        assert {name: tensor.dtype for name, tensor in item.items()} == {
            "clean_ids": torch.int64,
            "document_ids": torch.int64,
            "is_maskable": torch.bool,
        }
        for name, tensor in item.items():
            assert np.array_equal(tensor.numpy(), getattr(row, name))
    assert rows.num_tokens == sum(int((row.document_ids >= 0).sum()) for row in expected)
    assert (rows.num_documents, rows.num_dropped) == (200, 0)


def test_rows_end_where_a_list_would(corpus: Path) -> None:
    rows = load(corpus)
    assert torch.equal(rows[-1]["clean_ids"], rows[len(rows) - 1]["clean_ids"])
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_what_a_caller_does_to_a_row_does_not_reach_the_cache(corpus: Path) -> None:
    rows = load(corpus)
    expected = all_ids(rows)
    for tensor in rows[0].values():
        tensor.zero_()
    assert all_ids(rows) == expected


def test_pickled_rows_are_the_same_rows_and_small(corpus: Path) -> None:
    rows = load(corpus)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert all_ids(pickle.loads(pickled)) == all_ids(rows)


def test_the_same_data_and_options_are_built_once(corpus: Path, builds: list[Path]) -> None:
    assert all_ids(load(corpus)) == all_ids(load(corpus, seed=1))  # the seed only matters to a fraction
    assert len(builds) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 3},
        {"data_fraction": 0.5},
        {"data_fraction": 0.5, "seed": 1},
        {"reading": Reading(text_field="body")},
    ],
)
def test_other_options_are_built_anew(corpus: Path, builds: list[Path], options: dict[str, Any]) -> None:
    corpus.write_text("".join(json.dumps({"text": f"the {i}", "body": f"a {i}"}) + "\n" for i in range(50)))
    load(corpus)
    load(corpus, data_fraction=0.25)
    load(corpus, **options)
    assert len(set(builds)) == len(builds) == 3


def test_a_changed_file_is_built_anew(corpus: Path, builds: list[Path]) -> None:
    before = all_ids(load(corpus))
    time.sleep(0.02)  # two writes of one tick of the file system's clock could look alike
    corpus.write_text(corpus.read_text().replace("end", "and"))
    assert all_ids(load(corpus)) != before
    assert len(builds) == 2


def test_a_new_file_in_a_directory_is_built_anew(tmp_path: Path, builds: list[Path]) -> None:
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "text" / name).write_text(f"the end of {name}")
        rows = load_rows(str(tmp_path / "text"), tiny_tokenizer(), LENGTH, cache_dir=tmp_path / "cache")
    assert rows.num_documents == len(builds) == 2


def test_another_tokenizer_or_template_or_length_is_built_anew(corpus: Path, builds: list[Path]) -> None:
    cache = corpus.parent / "cache"
    other = tiny_tokenizer()
    other.add_tokens(["end"])
    for tokenizer in (tiny_tokenizer(), other, tiny_tokenizer(chat=True)):
        load_rows(str(corpus), tokenizer, LENGTH, cache_dir=cache)
    load_rows(str(corpus), other, 2 * LENGTH, cache_dir=cache)
    assert len(set(builds)) == len(builds) == 4


def _killed_while_building(corpus: Path) -> None:
    def write_half(path: Path, rows: Any, sequence_length: int) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    rows_module.write_rows = write_half
    load(corpus)


def test_a_build_that_was_killed_is_done_again(corpus: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=_killed_while_building, args=(corpus,))
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    left = list((corpus.parent / "cache").glob("*.unfinished"))
    assert [(path / "rows.bin").read_bytes() for path in left] == [b"half"]
    assert load(corpus).num_documents == 200
    assert not list((corpus.parent / "cache").glob("*.unfinished"))


def test_rows_that_were_cut_short_are_built_anew(corpus: Path, builds: list[Path]) -> None:
    expected = all_ids(load(corpus))
    (file,) = (corpus.parent / "cache").glob("*/rows.bin")
    file.write_bytes(file.read_bytes()[:-1])
    assert all_ids(load(corpus)) == expected
    assert len(builds) == 2


def test_a_failed_build_leaves_nothing_behind(corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + "not JSON\n")
    with pytest.raises(UserError, match=":201: not JSON"):
        load(corpus)
    assert not [path for path in (corpus.parent / "cache").iterdir() if path.is_dir()]


def test_processes_that_ask_at_once_get_the_same_rows_of_one_build(corpus: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=lambda: queue.put(all_ids(load(corpus)))) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2] == all_ids(load(corpus))
    assert len([path for path in (corpus.parent / "cache").iterdir() if path.is_dir()]) == 1


def test_max_rows_gives_the_first_rows(corpus: Path) -> None:
    rows = load(corpus, max_rows=3)
    assert all_ids(rows) == all_ids(load(corpus))[:3]
    assert rows.num_tokens == 3 * LENGTH
    assert rows.num_documents < 10


def test_a_smaller_fraction_is_a_subset_of_a_larger_one() -> None:
    records = [{"origin": f"corpus.jsonl:{line}", "text": "text"} for line in range(200)]

    def kept(fraction: float, seed: int = 3) -> set[str]:
        return {record["origin"] for record in keep_fraction(records, fraction, seed)}

    assert kept(0.2) < kept(0.6) < kept(1.0)
    assert 20 <= len(kept(0.2)) <= 60
    assert len(kept(1.0)) == 200
    assert kept(0.2, seed=4) != kept(0.2)


def test_a_fraction_keeps_at_least_one_document(corpus: Path) -> None:
    assert load(corpus, data_fraction=1e-9).num_documents == 1


def test_documents_too_long_are_reported_when_built_and_when_cached(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"prompt": "the", "completion": end} for end in (" end", " end" * 50)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 1 document longer than a row of 16 tokens"):
            assert load(path).num_dropped == 1


def test_nothing_but_documents_too_long_is_refused_each_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "the", "completion": " end" * 50}))
    for _ in range(2):
        with pytest.raises(UserError, match="raise --max_length"):
            load(path)


@pytest.mark.parametrize(
    ("length", "options", "complaint"),
    [
        (1, {}, "--max_length 1: a row needs at least 2 tokens"),
        (8, {"data_fraction": 0.0}, "--data_fraction 0.0: must be above 0"),
        (8, {"data_fraction": 1.5}, "--data_fraction 1.5: must be above 0 and at most 1"),
        (8, {"max_rows": 0}, "max_rows 0: must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(corpus: Path, length: int, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_rows(str(corpus), tiny_tokenizer(), length, cache_dir=corpus.parent / "cache", **options)


def test_a_cache_that_cannot_be_written_is_refused(corpus: Path) -> None:
    (corpus.parent / "cache").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="cannot keep packed rows in"):
        load(corpus)


def test_one_line_says_what_was_read_also_from_the_cache(
    corpus: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        monkeypatch.setattr(reading, "_SAID", set())
        rows = load(corpus)
        assert capfd.readouterr() == (
            "",
            f"decausal: read {corpus}: 200 records, {rows.num_tokens:,} tokens, as 'text'\n",
        )
