"""A record that cannot be used is refused on one line, or left out, counted and named; no input takes up memory."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from decausal.data import files, formats, reading
from decausal.data.documents import read_sources
from decausal.data.prompts import load_prompts
from decausal.data.reading import Account, Reading
from decausal.data.rows import load_rows
from decausal.data.sources import find_sources
from decausal.errors import UserError
from tests.families import tiny_tokenizer

DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
BAD_LINES = {
    "half a surrogate pair (character 5)": b'{"text": "bad \\ud83d"}',
    "field 'text' holds null": b'{"text": null}',
    "no field 'text'": b'{"other": "a"}',
    "a number where an object": b"7",
    "not JSON": b'{"text": }',
    "is not UTF-8 text": '{"text": "é"}'.encode("latin-1"),
    "nested too deeply": DEEP,
    "a number with too many digits": b'{"text": "a", "id": ' + b"7" * 5000 + b"}",
}


def read(data: str | Path, on_bad_record: str = "error") -> tuple[list[str], Account]:
    account = Account()
    how = Reading(on_bad_record=on_bad_record)
    return [record["text"] for record in read_sources(find_sources(data, "train", account), how, account)], account


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_refused_by_its_number_or_left_out(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "one"}', BAD_LINES[reason], b'{"text": "two"}']))
    with pytest.raises(UserError) as caught:
        read(path)
    assert reason in str(caught.value)
    assert str(caught.value).endswith("--on_bad_record skip leaves such records out")
    texts, account = read(path, "skip")
    assert texts == ["one", "two"]
    assert account.num_bad == 1
    assert f"skipped 1 bad record: {path}" in account.line(9)


@pytest.mark.parametrize("content", [DEEP, BAD_LINES["a number with too many digits"]])
def test_arrays_of_poison_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + content + b"]")
    with pytest.raises(UserError, match=r"a\.json: the JSON (is nested too deeply|holds a number with too many)"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["latin.txt", "binary.txt", "half.csv"])
def test_a_bad_file_is_refused_or_left_out_whole(tmp_path: Path, name: str) -> None:
    contents = {"latin.txt": "é".encode("latin-1"), "binary.txt": b"a\0b", "half.csv": b'text\n"one'}
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / name).write_bytes(contents[name])
    both = f"{tmp_path / 'a.txt'},{tmp_path / name}"
    with pytest.raises(UserError, match=name):
        read(both)
    texts, account = read(both, "skip")
    assert texts == ["good"]
    assert account.num_bad == 1


def test_the_first_bad_records_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("null\n" * 5 + '{"text": "one"}\n')
    _, account = read(path, "skip")
    line = account.line(3)
    assert "skipped 5 bad records: " in line
    assert [f"{path}:{number}:" in line for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert line.endswith(" and 2 more")


def test_nothing_but_bad_records_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("null\n7\n")
    with pytest.raises(UserError, match=r"none of its records can be used \(2 bad\): .*a.jsonl:1: null where"):
        read(tmp_path / "a.jsonl", "skip")


BAD_TO_A_TOKENIZER = [{"text": "the <mask> end"}, {"text": "</s>"}]


@pytest.mark.parametrize("record", BAD_TO_A_TOKENIZER)
def test_what_the_tokenizer_cannot_take_is_refused_or_left_out(tmp_path: Path, record: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    text = record["text"].replace("</s>", tokenizer.eos_token)
    path = tmp_path / "a.jsonl"
    good = [{"text": f"the end of line {number}"} for number in range(50)]
    whole = [*good[:20], {"text": text}, *good[20:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in whole))
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(record) + "\n" for record in good))
    with pytest.raises(UserError, match=r":21: .*--on_bad_record skip"):
        load_rows(path, tokenizer, 16, cache_dir=tmp_path / "cache")
    rows = load_rows(path, tokenizer, 16, cache_dir=tmp_path / "cache", reading=Reading(on_bad_record="skip"))
    expected = load_rows(tmp_path / "good.jsonl", tokenizer, 16, cache_dir=tmp_path / "cache")
    assert np.array_equal(rows._file.records, expected._file.records)
    assert re.search(": 50 records, .*; skipped 1 bad record: ", rows.account.line(1))
    path.write_text(json.dumps({"text": text}))
    with pytest.raises(UserError, match=r"none of the records can be used \(1 bad\)"):
        load_rows(path, tokenizer, 16, cache_dir=tmp_path / "cache", reading=Reading(on_bad_record="skip"))


def test_a_refusal_of_the_template_is_a_bad_record_of_rows_and_of_prompts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SAID", set())
    tokenizer = tiny_tokenizer(chat=True)
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}"
    tokenizer.chat_template = template + tokenizer.chat_template
    path = tmp_path / "a.jsonl"
    for question in ("the", "no", "end"):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "of line"}]
        with path.open("a") as file:
            file.write(json.dumps({"messages": turns}) + "\n")
    skip = Reading(on_bad_record="skip")
    with pytest.raises(UserError, match=r"a.jsonl:2: the chat template refuses .*never.*--on_bad_record skip"):
        load_rows(path, tokenizer, 64, cache_dir=tmp_path / "cache")
    assert load_rows(path, tokenizer, 64, cache_dir=tmp_path / "cache", reading=skip).num_documents == 2
    with pytest.raises(UserError, match=r"a.jsonl:2: the chat template refuses"):
        load_prompts(path, tokenizer, 64, 4)
    assert len(load_prompts(path, tokenizer, 64, 4, reading=skip)) == 2
    assert capfd.readouterr().err.count("skipped 1 bad record: ") == 2


def test_a_fault_of_the_tokenizer_is_no_bad_record(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("the end")
    with pytest.raises(UserError, match=r"no end-of-text token; set its eos_token$"):
        load_rows(tmp_path / "a.txt", tokenizer, 16, cache_dir=tmp_path, reading=Reading(on_bad_record="skip"))


# Bounds


@pytest.fixture
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(formats, "PIECE_BYTES", 1 << 16)


def peak_megabytes(path: Path, on_bad_record: str = "skip") -> tuple[float, str]:
    """Returns what reading all of a file takes up at most, and what was wrong with it."""
    account = Account()
    tracemalloc.start()
    try:
        for _ in read_sources(find_sources(path), Reading(on_bad_record=on_bad_record), account):
            pass
        problem = ""
    except UserError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak / 2**20, problem


def inflating(path: Path, start: bytes, filler: bytes, megabytes: int = 48) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(filler * (2**20 // len(filler)))
    return path


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize(
    ("name", "start", "filler", "problem"),
    [
        ("a.jsonl.gz", b'{"text": "', b"a", "a.jsonl.gz:1: one record of more than 1 MiB"),
        ("a.json.gz", b'[{"text": "', b"a", "a.json.gz: one record of more than 1 MiB"),
        ("a.csv.gz", b'text\n"', b"a" * 4095 + b"\n", "field larger than field limit"),
        ("b.csv.gz", b"text\n", b"a", "b.csv.gz:2: one record of more than 1 MiB"),
        ("a.txt.gz", b"", b"\0", "is not text"),
        ("b.txt.gz", b"", "aé".encode() + b"a", ""),
        ("b.json.gz", b"[", b" ", "b.json.gz: not JSON"),
        ("c.jsonl.gz", b"", b" ", "c.jsonl.gz:1: one record of more"),
    ],
)
def test_what_inflates_without_end_is_read_in_bounded_memory(
    tmp_path: Path, name: str, start: bytes, filler: bytes, problem: str
) -> None:
    peak, found = peak_megabytes(inflating(tmp_path / name, start, filler), "error")
    assert problem in found
    assert bool(problem) == bool(found)
    assert peak < 20


@pytest.mark.usefixtures("small_records")
def test_a_record_too_long_is_left_out_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{{"text": "{"a" * 3_000_000}"}}\n{{"text": "two"}}\n')
    texts, account = read(path, "skip")
    assert texts == ["one", "two"]
    assert account.bad == [f"{path}:2: one record of more than 1 MiB; cut it into several"]


@pytest.mark.usefixtures("small_records")
def test_long_arrays_are_read_record_by_record(tmp_path: Path) -> None:
    expected = [f"{number} é {'x' * (number % 7 * 30_000)}" for number in range(300)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in expected], ensure_ascii=False, indent=1), encoding="utf-8")
    texts, _ = read(path)
    assert texts == expected
    assert peak_megabytes(path)[0] < 20 < 2 * path.stat().st_size / 2**20


@pytest.mark.usefixtures("small_records")
def test_a_text_without_line_breaks_is_cut_between_characters(tmp_path: Path) -> None:
    text = "€é𝄞a" * 60_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    texts, _ = read(tmp_path / "a.txt")
    assert len(texts) > 5
    assert "".join(texts) == text


def test_devices_and_pipes_are_refused() -> None:
    with pytest.raises(UserError, match=r"/dev/zero is not a regular file; write its content to a file"):
        read("/dev/zero")
