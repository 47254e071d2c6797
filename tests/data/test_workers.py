"""Several processes give what one gives: the same rows, prompts, errors and lines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.data import encode as encode_module
from decausal.data import reading
from decausal.data.asked import AskedPrompts
from decausal.data.prompts import load_prompts
from decausal.data.reading import Reading
from decausal.data.rows import PackedRows, load_rows
from decausal.data.workers import UNDER_WAY, in_order
from decausal.errors import UserError
from decausal.training.settings import ConversionSettings
from tests.families import tiny_tokenizer

NUM_RECORDS = 60


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "BATCH_RECORDS", 7)
    monkeypatch.setattr(reading, "_SAID", set())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Conversations, some of which the template refuses, with values that it does not read."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(NUM_RECORDS):
            question = "no" if number in (11, 12, 40) else f"the end of {number}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"line {number} in"}]
            file.write(json.dumps({"messages": turns, "chat_template_kwargs": {"mood": "good"}}) + "\n")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"the end of line {n} " * (n % 9)}) + "\n" for n in range(NUM_RECORDS)))
    return path


def refusing_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(chat=True)
    refusal = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    return tokenizer


def rows_of(path: Path, num_proc: int, **options: Any) -> PackedRows:
    how = Reading(num_proc=num_proc, **options)
    cache_dir = path.parent / f"cache-{num_proc}"
    return load_rows(path, refusing_tokenizer(), 64, reading=how, cache_dir=cache_dir)


@pytest.mark.parametrize("kind", ["data", "texts"])
def test_rows_are_the_same_from_one_and_from_three_processes(
    request: pytest.FixtureRequest, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found, said = request.getfixturevalue(kind), [], []
    for num_proc in (1, 3):
        monkeypatch.setattr(reading, "_SAID", set())
        found.append(rows_of(path, num_proc, on_bad_record="skip"))
        said.append(capfd.readouterr().err)
    one, three = found
    assert (one.directory / "rows.bin").read_bytes() == (three.directory / "rows.bin").read_bytes()
    assert one.directory.name == three.directory.name  # the number of processes does not change the cache's name
    assert (one.counts, one.account) == (three.counts, three.account)
    assert said[0] == said[1]
    assert ("skipped 3 bad records" in said[0]) == ("reads no 'mood'" in said[0]) == (kind == "data")


def test_a_bad_record_is_named_as_by_one_process(data: Path) -> None:
    messages = []
    for num_proc in (1, 3):
        with pytest.raises(UserError, match=r"a.jsonl:12: the chat template refuses") as caught:
            rows_of(data, num_proc)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_cannot_be_read_is_named_after_what_was_read_before(texts: Path, data: Path) -> None:
    good = texts.read_text()
    texts.write_text(good + "not JSON\n")
    with pytest.raises(UserError, match=r"texts.jsonl:61: not JSON"):
        rows_of(texts, 3)
    data.write_text(data.read_text() + "not JSON\n")
    with pytest.raises(UserError, match=r"a.jsonl:12: the chat template refuses"):  # its batch was read before
        rows_of(data, 3)


def test_prompts_are_the_same_from_one_and_from_three_processes(data: Path, texts: Path) -> None:
    for path in (data, texts):
        one, three = (
            load_prompts(path, refusing_tokenizer(), 64, 4, reading=Reading(num_proc=num_proc, on_bad_record="skip"))
            for num_proc in (1, 3)
        )
        assert len(one) == len(three) > 40
        assert all(torch.equal(one[index], three[index]) for index in range(len(one)))


def test_prompts_to_ask_are_the_same_from_one_and_from_three_processes(data: Path, texts: Path) -> None:
    for path in (data, texts):
        one, three = (
            AskedPrompts(
                path,
                refusing_tokenizer(),
                max_length=40,
                num_new_tokens=4,
                num_prompts=50,
                reading=Reading(num_proc=num_proc, on_bad_record="skip"),
            )
            for num_proc in (1, 3)
        )
        assert len(one) == len(three) == 50
        for ours, theirs in zip(one, three, strict=True):
            assert ours.ids.tolist() == theirs.ids.tolist()
            assert ours.record == theirs.record


def _end_at(number: int, batch: int) -> int:
    if batch == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def test_a_process_that_is_killed_is_one_error() -> None:
    with pytest.raises(UserError, match="one of the 2 processes that tokenise was ended from outside"):
        list(in_order(partial(_end_at, 3), range(20), 2))


def _setting(_: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("TOKENIZERS_PARALLELISM")


def test_work_is_in_other_processes_without_threads_of_the_tokenizer() -> None:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    found = [result for _, result in in_order(_setting, range(8), 2)]
    assert os.getpid() not in {process for process, _ in found}
    assert {value for _, value in found} == {"false"}
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_few_batches_are_under_way() -> None:
    read: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    for batch, result in in_order(_setting, batches(), 2):
        assert result
        assert len(read) - batch <= 2 * UNDER_WAY


def test_fewer_than_one_process_is_refused() -> None:
    with pytest.raises(UserError, match="--dataset_num_proc 0: must be at least 1"):
        ConversionSettings("tiny", dataset_num_proc=0)
