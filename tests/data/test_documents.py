"""Every kind of source gives its documents once and in order; every malformed one is refused on one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from decausal.data import formats
from decausal.data.corpus import stdlib_documents
from decausal.data.documents import read_documents
from decausal.data.reading import SKIP_HINT, Reading
from decausal.errors import UserError

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]


def texts(data: Any, **options: Any) -> list[str]:
    return [record["text"] for record in read_documents(data, Reading(**options))]


def contents(data: Any, **options: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key != "origin"}
        for record in read_documents(data, Reading(**options))
    ]


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(data: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(data, Reading(**options)))
    message = str(caught.value)
    assert "\n" not in message
    return message.removesuffix(SKIP_HINT)


def test_a_text_file_is_one_document_with_its_bytes_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("première\r\nligne\n".encode())
    assert list(read_documents(tmp_path / "a.txt")) == [
        {"origin": str(tmp_path / "a.txt"), "text": "première\r\nligne\n"}
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert texts(tmp_path / "a.txt") == ["abc"]


def test_pieces_of_a_long_file_join_to_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", 50)
    text = "".join(f"ligne numéro {number}\n" for number in range(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    records = list(read_documents(tmp_path / "a.txt"))
    assert "".join(record["text"] for record in records) == text
    assert all(len(record["text"].encode()) <= 50 and record["text"].endswith("\n") for record in records)
    assert [record["is_start"] for record in records] == [True] + [False] * (len(records) - 1)
    assert [record["is_end"] for record in records] == [False] * (len(records) - 1) + [True]
    assert len({record["origin"] for record in records}) == len(records)


def test_a_directory_gives_its_text_files_sorted_without_hidden_cached_and_binary_ones(tmp_path: Path) -> None:
    for name in ("b/c.py", "a.py", "b/a.md", ".git/config", "__pycache__/a.txt", "b/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "settings.json").write_text('{"tab": 4}')
    assert texts(tmp_path) == ["a.py", "b/a.md", "b/c.py", '{"tab": 4}']


def test_a_directory_reads_records_from_its_data_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": "one"})
    (tmp_path / "b.json").write_text('[{"text": "two"}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "c.parquet")
    assert texts(tmp_path) == ["one", "two", "three"]


def test_a_glob_gives_each_match_once_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("one.txt", "x/two.txt", "x/y/three.txt", "x/four.md"):
        (tmp_path / name).write_text(name)
    assert texts(str(tmp_path / "*.txt")) == ["one.txt"]
    assert texts(str(tmp_path / "**" / "*.txt")) == ["one.txt", "x/two.txt", "x/y/three.txt"]
    assert sorted(texts(str(tmp_path / "**"))) == sorted(["one.txt", "x/two.txt", "x/y/three.txt", "x/four.md"])


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("itself")
    assert texts(str(tmp_path / "a[1].txt")) == ["itself"]


def test_a_list_gives_its_parts_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert texts([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]) == ["b", "a"]


def test_jsonl_texts_name_their_lines_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "other": 3}\n{"text": " "}')
    assert list(read_documents(path)) == [
        {"origin": f"{path}:1", "text": "one"},
        {"origin": f"{path}:3", "text": "two"},
    ]


def test_compressed_jsonl_reads_like_plain(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "one"}\n')
    assert texts(tmp_path / "a.jsonl.gz") == texts(tmp_path) == ["one"]


@pytest.mark.parametrize("content", [{"messages": CHAT}, {"prompt": "1+1=", "completion": "2"}])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_kind_of_record_reads_the_same_from_every_format(
    tmp_path: Path, content: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(path, content, content)
    elif suffix == "json":
        path.write_text(json.dumps([content, content]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([content, content]), path)
    assert contents(path) == [content, content]


def test_text_field_names_the_field_to_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "one", "messages": CHAT})
    assert texts(path, text_field="body") == ["one"]
    assert contents(path) == [{"messages": CHAT}]


def test_stdlib_gives_the_embedded_corpus() -> None:
    expected = [(f"stdlib-heldout/{path}", text) for path, text in stdlib_documents("heldout")]
    assert [(record["origin"], record["text"]) for record in read_documents("stdlib-heldout")] == expected


def test_a_hub_data_set_is_asked_for_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = list(read_documents("owner/name:config", Reading(split="test")))
    assert asked == [("owner/name", "config", "test")]
    assert records[1] == {"origin": "owner/name:config[test], row 2", "text": "two"}


def test_a_hub_data_set_that_cannot_be_had_is_refused() -> None:
    message = refusal("nobody/nothing")
    assert "cannot load data set 'nobody/nothing[train]'" in message
    assert "on_bad_record" not in message  # a hub that cannot be reached is no bad record
    assert "no file or directory" in message


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot JSON\n')
    reading = read_documents(path)
    assert next(reading)["text"] == "one"
    with pytest.raises(UserError):
        next(reading)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    assert "did you mean 'corpus.txt'?" in refusal(str(tmp_path / "corpsu.txt"))
    assert "no such file or directory: ./nowhere" in refusal("./nowhere")


def test_a_misspelt_stdlib_is_refused_with_the_right_name() -> None:
    assert "did you mean 'stdlib'?" in refusal("stdlb")


def test_no_data_is_refused() -> None:
    assert "no data given" in refusal([])


def test_a_glob_without_matches_is_refused_by_its_pattern(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.txt")
    assert f"no file matches '{pattern}'" in refusal(pattern)


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert "holds no text file" in refusal(tmp_path)


def test_text_that_is_empty_throughout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert refusal(tmp_path / "a.txt") == f"no text in {tmp_path}/a.txt: it has no documents"
    write_lines(tmp_path / "b.jsonl", {"text": ""}, {"text": " \n"})
    assert refusal(tmp_path / "b.jsonl") == f"no text in {tmp_path}/b.jsonl: all of its documents are empty (2)"
    write_lines(tmp_path / "c.jsonl", {"messages": [CHAT[0], CHAT[1] | {"content": ""}]})
    assert "all of its documents are empty (1)" in refusal(tmp_path / "c.jsonl")


def test_empty_documents_among_others_are_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "one"})
    assert texts(tmp_path / "a.jsonl") == ["one"]


def test_a_line_that_is_not_json_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": two}\n')
    message = refusal(path)
    assert message.startswith(f"{path}:2: not JSON")
    assert "column 10" in message


def test_a_line_that_is_no_object_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n["two"]\n')
    assert refusal(path).startswith(f"{path}:2: a list where an object")


def test_a_record_without_content_is_refused_with_its_fields_and_those_accepted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "one", "id": 1})
    message = refusal(path)
    assert message.startswith(f"{path}:1: found 'body', 'id', but a record has 'text', or 'messages', or 'prompt'")
    assert "--text_field" in message


def test_a_later_record_without_the_files_field_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"body": "two"})
    assert refusal(path) == f"{path}:2: no field 'text', which earlier records have; found 'body'"


@pytest.mark.parametrize(("value", "kind"), [(3, "a number"), (None, "null"), (["a"], "a list"), ({}, "an object")])
def test_a_field_of_the_wrong_type_is_refused(tmp_path: Path, value: Any, kind: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": value})
    assert refusal(path) == f"{path}:1: field 'text' holds {kind}, a string is expected"


def test_a_completion_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "1+1=", "completion": 2})
    assert "field 'completion' holds a number" in refusal(path)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "field 'messages' holds a string, a list of messages is expected"),
        (["hello"], "message 1 is a string"),
        ([CHAT[0], {"role": "assistant"}], "message 2 has no content, and no tool calls in its place"),
        ([{"content": "one?"}, CHAT[1]], "message 1 has no string 'role'; found 'content'"),
        ([CHAT[0]], "no message has role 'assistant'"),
        ([], "no message has role 'assistant'"),
    ],
)
def test_malformed_messages_are_refused(tmp_path: Path, messages: Any, complaint: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": messages})
    assert refusal(path).startswith(f"{path}:1: {complaint}")


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe9t\xe9")
    assert refusal(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt is not UTF-8 text (byte 3)")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xe9"}\n')
    assert "(byte 26)" in refusal(tmp_path / "b.jsonl")


def test_a_json_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}')
    assert "an object where an array of records is expected" in refusal(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('[{"text":\n one}]')
    assert f"{tmp_path}/b.json: not JSON" in refusal(tmp_path / "b.json")
    assert "line 2, column 2" in refusal(tmp_path / "b.json")


def test_a_parquet_row_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    assert refusal(path) == f"{path}, row 2: field 'text' holds null, a string is expected"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    assert "found 'body', but a record has 'text'" in refusal(path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    assert "is not a whole parquet file" in refusal(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:40])
    assert "is not a whole gzip file" in refusal(tmp_path / "b.jsonl.gz")
