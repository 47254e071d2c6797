"""A directory is read by what its files hold, its card and its names say; what is left out is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pytest

from decausal.data.documents import read_sources
from decausal.data.reading import Account, Reading
from decausal.data.sources import find_sources
from decausal.errors import UserError
from decausal.training.settings import ConversionSettings


def read(data: str | Path | list[str], split: str = "train", **options: str) -> tuple[list[str], Account]:
    account = Account()
    sources = find_sources(data, split, account)
    records = read_sources(sources, Reading(split=split, **options), account)
    return [record["text"] for record in records], account


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


# What save_to_disk wrote


def test_a_saved_data_set_gives_its_records_alone(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0] == ["one", "two"]


def test_of_saved_splits_the_one_asked_for_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0] == ["train"]
    assert read(tmp_path / "saved", "test")[0] == ["test"]
    with pytest.raises(UserError, match=r"has no split 'dev'; give --dataset_split train or test"):
        read(tmp_path / "saved", "dev")


def test_saved_data_sets_below_a_directory_or_matched_by_a_glob_give_their_records_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        datasets.Dataset.from_list([{"text": name}]).save_to_disk(tmp_path / "all" / name)
    (tmp_path / "all" / "two" / "cache-1f.arrow").write_bytes(
        (tmp_path / "all/two/data-00000-of-00001.arrow").read_bytes()
    )
    texts, account = read(tmp_path / "all")
    assert texts == ["one", "two"]
    assert list(account.left_out) == ["about a saved data set"]
    assert read(f"{tmp_path}/all/*")[0] == ["one", "two"]


def test_saved_splits_below_a_directory_are_known_by_their_names(tmp_path: Path) -> None:
    for name in ("train", "test"):
        datasets.Dataset.from_list([{"text": name}]).save_to_disk(tmp_path / name)
    assert [read(tmp_path, split)[0] for split in ("train", "test")] == [["train"], ["test"]]


def test_a_saved_data_set_that_is_damaged_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "one"}]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot load .*saved, which save_to_disk wrote"):
        read(tmp_path / "saved")


# Copies of hub data sets


def test_a_copy_of_a_hub_data_set_gives_its_train_split_and_names_what_it_leaves(tmp_path: Path) -> None:
    write(tmp_path, README_DOT_md="---\nlicense: mit\n---\n# Card", LICENSE="MIT", data__notes_DOT_txt="notes")
    write(tmp_path, **{"data__train-00000-of-00001_DOT_jsonl": lines("one")})
    write(tmp_path, **{"data__test-00000-of-00001_DOT_jsonl": lines("two")})
    texts, account = read(tmp_path)
    assert texts == ["one"]
    assert account.left_out == {
        "documentation": ["LICENSE", "README.md"],
        "in no split": ["data/notes.txt"],
        "split test": ["data/test-00000-of-00001.jsonl"],
    }
    assert read(tmp_path, "test")[0] == ["two"]
    with pytest.raises(UserError, match=r"has no split 'dev'"):
        read(tmp_path, "dev")


def test_a_card_says_which_files_are_which_split(tmp_path: Path) -> None:
    card = """---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: a.jsonl}
  - {split: held_out, path: b.jsonl}
- config_name: large
  data_files: c.jsonl
---
"""
    write(tmp_path, README_DOT_md=card, **{f"{name}_DOT_jsonl": lines(name) for name in "abc"})
    texts, account = read(tmp_path)
    assert texts == ["a"]
    assert account.left_out == {
        "documentation": ["README.md"],
        "in no split": ["c.jsonl"],
        "split held_out": ["b.jsonl"],
    }
    assert read(tmp_path, "held_out")[0] == ["b"]
    assert read(f"{tmp_path}:large")[0] == ["c"]
    with pytest.raises(UserError, match=r"has no configuration 'larg'; there is small, large; did you mean 'large'"):
        read(f"{tmp_path}:larg")


def test_several_configurations_without_a_default_are_named(tmp_path: Path) -> None:
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in "ab")
    write(tmp_path, README_DOT_md=f"---\nconfigs:\n{configs}---\n", a_DOT_jsonl=lines("a"), b_DOT_jsonl=lines("b"))
    with pytest.raises(UserError, match=r"several configurations; write .*:NAME, of a, b"):
        read(tmp_path)


def test_a_card_that_names_missing_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, README_DOT_md="---\nconfigs:\n- {config_name: a, data_files: no.jsonl}\n---\n", a_DOT_jsonl="")
    with pytest.raises(UserError, match=r"names files that are not there"):
        read(tmp_path)


def test_documentation_beside_tables_is_no_data(tmp_path: Path) -> None:
    write(tmp_path, README_DOT_md="# About", LICENSE="MIT", records_DOT_jsonl=lines("one"))
    texts, account = read(tmp_path)
    assert texts == ["one"]
    assert account.left_out == {"documentation": ["LICENSE", "README.md"]}


def test_without_a_train_split_files_that_name_none_are_read(tmp_path: Path) -> None:
    write(tmp_path, corpus_DOT_jsonl=lines("one"), test_DOT_jsonl=lines("two"))
    texts, account = read(tmp_path)
    assert texts == ["one"]
    assert account.left_out == {"split test": ["test.jsonl"]}


def test_plain_texts_have_splits_by_name_too(tmp_path: Path) -> None:
    write(tmp_path, train_DOT_txt="one", test_DOT_txt="two")
    assert read(tmp_path)[0] == ["one"]


def test_source_code_is_read_whole_with_its_tests_and_fixtures(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_py="a", test__b_DOT_py="b", test__test_DOT_jsonl=lines("c"), README_DOT_md="d")
    assert sorted(read(tmp_path)[0]) == ["a", "b", "c", "d"]


def test_a_split_of_a_directory_without_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt="one")
    with pytest.raises(UserError, match=r"has no splits.* --dataset_split test names none; .*--eval_split train"):
        read(tmp_path, "test")


# Formats


def test_json_lines_in_a_json_file_are_records(tmp_path: Path) -> None:
    write(tmp_path, train_DOT_json=lines("one", "x" * 20_000))
    assert read(tmp_path)[0] == ["one", "x" * 20_000]
    assert read(tmp_path / "train.json")[0] == ["one", "x" * 20_000]


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.JSONL", "a.JsonL.GZ"])
def test_every_name_of_json_lines_is_known(tmp_path: Path, name: str) -> None:
    content = lines("one").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read(tmp_path / name)[0] == read(tmp_path)[0] == ["one"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,id\n"one, ""two""\nand three",1\n'),
        ("b.csv", 'id;text\n1;"one, ""two""\nand three"\n'),
        ("a.tsv", 'text\tid\n"one, ""two""\nand three"\t1\n'),
        ("c.csv", 'id|text\n1|"one, ""two""\nand three"\n'),
        ("a.csv.xz", 'text,id\n"one, ""two""\nand three",1\n'),
    ],
)
def test_tables_with_delimiters_are_records(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(lzma.compress(content.encode()) if name.endswith("xz") else content.encode())
    assert read(tmp_path / name)[0] == read(tmp_path)[0] == ['one, "two"\nand three']


def test_a_table_without_a_known_column_in_a_directory_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt="one", table_DOT_csv="x,y\n1,2\n")
    texts, account = read(tmp_path)
    assert texts == ["one"]
    assert account.left_out == {"no column that is read": [str(tmp_path / "table.csv")]}
    with pytest.raises(UserError, match=r"found 'x', 'y', but a record has 'text'"):
        read(tmp_path / "table.csv")


def test_arrow_files_and_compressed_ones_are_read_beside_others(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_jsonl=lines("one"))
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(lines("two").encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines("three").encode()))
    frames = [pyarrow.compress(lines(text).encode(), "zstd", asbytes=True) for text in ("zstd", "in frames")]
    (tmp_path / "e.jsonl.zst").write_bytes(b"".join(frames))
    datasets.Dataset.from_list([{"text": "four"}, {"text": "five"}]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "d.arrow")
    for left in (tmp_path / "saved").iterdir():
        left.unlink()
    assert read(tmp_path)[0] == ["one", "two", "three", "four", "five", "zstd", "in frames"]


COMPRESSIONS = {
    "gz": (gzip.compress, "gzip"),
    "bz2": (bz2.compress, "bzip2"),
    "xz": (lzma.compress, "xz"),
    "zst": (lambda content: pyarrow.compress(content, "zstd", asbytes=True), "zstd"),
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_broken_compressed_file_is_refused_and_in_a_directory_named(tmp_path: Path, suffix: str) -> None:
    compress, name = COMPRESSIONS[suffix]
    write(tmp_path, a_DOT_jsonl=lines("one"))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(lines("two").encode())[:20])
    assert read(tmp_path)[1].left_out == {"cannot be decompressed": [f"b.jsonl.{suffix}"]}
    with pytest.raises(UserError, match=f"is not a whole {name} file"):
        read(tmp_path / f"b.jsonl.{suffix}")


def test_a_name_with_a_comma_is_one_name_where_it_exists(tmp_path: Path) -> None:
    for name in ("a,b.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert read(str(tmp_path / "a,b.txt"))[0] == ["a,b.txt"]
    assert read(f"{tmp_path}/a.txt,{tmp_path}/b.txt")[0] == ["a.txt", "b.txt"]

    (tmp_path / "c,d,e.txt").write_text("c,d,e.txt")
    several = f"{tmp_path}/a,b.txt, {tmp_path}/c,d,e.txt,{tmp_path}/a.txt"
    assert read(several)[0] == ["a,b.txt", "c,d,e.txt", "a.txt"]
    with pytest.raises(UserError, match="no data given"):
        read(" , ")


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_a_named_file_of_objects_line_by_line_is_records_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(lines("one", "two"))
    assert read(tmp_path / name)[0] == ["one", "two"]
    assert read(tmp_path)[0] == [lines("one", "two")]
    (tmp_path / name).write_text("{ a program }\n{ of two lines }\n")
    assert read(tmp_path / name)[0] == ["{ a program }\n{ of two lines }\n"]


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("text".encode("utf-16"), r"\(UTF-16\); convert it to UTF-8"),
        (b"PK\x03\x04\0", r"\(a zip archive.*\); unpack it"),
        (b"\0" * 257 + b"ustar", r"\(a tar archive\); unpack it"),
        (b"\x89PNG\0", r"\(it holds zero bytes\); leave it out"),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_do(tmp_path: Path, content: bytes, reported: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"a is not text {reported}"):
        read(tmp_path / "a")


def test_the_line_names_the_first_files_and_counts_the_rest(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_jsonl=lines("one", " "), README="about")
    for number in range(5):
        (tmp_path / f"image{number}.png").write_bytes(b"\x89PNG\0")
    _, account = read(tmp_path)
    assert account.line(1234) == (
        f"read {tmp_path}/a.jsonl: 1 record, 1,234 tokens, as 'text'; skipped image0.png, image1.png, image2.png and "
        "2 more (not text); skipped README (documentation); skipped 1 empty record"
    )


@pytest.mark.parametrize("data", ["{}/a.txt", "stdlib", "tasks:10", "{}/a.txt,stdlib"])
def test_a_split_of_what_has_none_is_refused(data: str, tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt="one")
    with pytest.raises(UserError, match=r"only directories and hub data sets have splits.* --dataset_split dev names"):
        find_sources(data.format(tmp_path), "dev")


def test_single_files_may_stand_beside_data_with_splits(tmp_path: Path) -> None:
    """The split of the data is not asked of held-out data that have none."""
    write(tmp_path, a_DOT_txt="one", data__test_DOT_jsonl=lines("two"))
    both = [str(tmp_path / "a.txt"), str(tmp_path / "data")]
    assert len(find_sources(both, "test")) == 2
    settings = ConversionSettings(data=both[1], eval_data=both[0], dataset_split="test")
    assert (settings.reading.split, settings.eval_reading.split) == ("test", "train")
