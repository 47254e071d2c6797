"""What a model wrote, as training data: the tokens that are trained are those that it wrote, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.data.asked import AskedPrompts
from decausal.data.documents import read_documents
from decausal.data.encode import encode, encode_batch
from decausal.data.prompts import Prompt
from decausal.data.reading import Account, Reading
from decausal.data.rows import load_rows
from decausal.data.written import Written, as_training_data
from tests.chat_templates import TEMPLATES, tokenizer_like
from tests.families import tiny_tokenizer

ASKED = [{"role": "user", "content": "one"}]


def prompts(tmp_path: Path, records: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Prompt]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return list(AskedPrompts(tmp_path / "in.jsonl", tokenizer, **{"max_length": 200, "num_new_tokens": 20} | options))


def trained_behind(written: Written, tmp_path: Path, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before the trained ones, and those, as a file of the record gives them."""
    (tmp_path / "out.jsonl").write_text(json.dumps(written.record) + "\n")
    rows = load_rows(tmp_path / "out.jsonl", tokenizer, 256, cache_dir=tmp_path / "cache")
    assert len(rows) == 1
    ids, is_maskable = rows[0]["clean_ids"].tolist(), rows[0]["is_maskable"].tolist()
    first, last = is_maskable.index(True), 256 - is_maskable[::-1].index(True)
    assert all(is_maskable[first:last])
    return ids[:first], ids[first:last]


# What is cut off


@pytest.mark.parametrize("reason", ["length", "stop", None])
def test_what_was_cut_off_trains_no_end(tmp_path: Path, reason: str | None) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    kinds = {
        "a.jsonl": {"prompt": "one", "completion": " two"},
        "b.jsonl": {"messages": [*ASKED, {"role": "assistant", "content": "two"}]},
        "c.jsonl": {"question": "one", "answer": "two"},
        "d.jsonl": {"text": "two"},
    }
    for name, record in kinds.items():
        (tmp_path / name).write_text(json.dumps(record | {"finish_reason": reason}) + "\n")
        account = Account()
        (read,) = read_documents(tmp_path / name)
        document = encode(read, tokenizer)
        text = tokenizer.decode(document.ids[document.is_maskable]).strip()
        ends = {"b.jsonl": "<|im_end|>"}.get(name, tokenizer.eos_token)
        assert text == ("two" if reason == "length" else f"two{ends}"), name
        assert document.is_maskable[-1] or reason != "length", "nothing stands after what was cut off"
        assert not account.num_cut


def test_answers_that_were_cut_off_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": "one", "completion": "two", "finish_reason": reason} for reason in ("length", "stop")]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    load_rows(tmp_path / "cut.jsonl", tiny_tokenizer(), 64, cache_dir=tmp_path / "cache")
    assert "1 of finish_reason 'length' trained without an end" in capsys.readouterr().err


def test_only_the_last_answer_is_cut_off() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    messages = [*ASKED, {"role": "assistant", "content": "two"}] * 2
    (document,) = encode_batch([{"origin": "a:1", "messages": messages, "is_end": False}], tokenizer)
    assert tokenizer.decode(document.ids[document.is_maskable]) == "two<|im_end|>two"
    asked = [{"origin": "a:1", "messages": [*messages, *ASKED], "is_end": False}]
    (document,) = encode_batch(asked, tokenizer)  # the answer was not the last to be said
    assert tokenizer.decode(document.ids[document.is_maskable]) == "two<|im_end|>" * 2


# Round trips


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("has_end", [True, False])
def test_under_every_template_an_answer_comes_back_as_its_tokens(tmp_path: Path, name: str, has_end: bool) -> None:
    tokenizer = tokenizer_like(name)
    (prompt,) = prompts(tmp_path, [{"messages": ASKED}], tokenizer)
    # What a model trained on such conversations writes, whatever the template puts around it:
    answered = {"origin": "a:1", "messages": [*ASKED, {"role": "assistant", "content": "two three"}]}
    (document,) = encode_batch([answered], tokenizer)
    ids = document.ids[document.is_maskable].tolist()
    ids = ids if has_end else ids[:-1]
    written = as_training_data(prompt, ids, has_end, tokenizer)
    assert written is not None
    assert (written.num_tokens, written.is_whole, written.is_cut) == (len(ids), True, not has_end)
    assert trained_behind(written, tmp_path, tokenizer) == (prompt.ids.tolist(), ids)


@pytest.mark.parametrize("text", ["hm\n</think>\n\ntwo", "hm hm"])
def test_thoughts_that_the_prompt_opens_come_back_whether_they_were_ended_or_cut_off(tmp_path: Path, text: str) -> None:
    tokenizer = tokenizer_like("r1-distill")
    (prompt,) = prompts(tmp_path, [{"messages": ASKED}], tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for written_ids, has_end in ((ids, False), ([*ids, tokenizer.eos_token_id], True)):
        written = as_training_data(prompt, written_ids, has_end, tokenizer)
        assert written is not None
        assert (written.is_whole, written.is_cut) == (True, not has_end)
        assert trained_behind(written, tmp_path, tokenizer) == (prompt.ids.tolist(), written_ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 250), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_of_any_tokens_those_are_trained_that_were_written(ids: list[int], has_end: bool, is_chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    given_ids = encode({"origin": "a:1", "prompt": "ask", "completion": "b"}, tokenizer, append_eos=False)
    prompt = Prompt(given_ids.ids[~given_ids.is_maskable], {"origin": "a:1", "prompt": "ask", "completion": ""})
    end = tokenizer.eos_token_id
    if is_chat:
        text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
        prompt = Prompt(np.array(tokenizer(text)["input_ids"], dtype=np.int32), {"origin": "a:1", "messages": ASKED})
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [each for each in ids if each < len(tokenizer)] + ([end] if has_end else [])
    written = as_training_data(prompt, ids, has_end, tokenizer)
    if written is None:
        return
    content = written.record | {"origin": "a:1", "is_end": not written.is_cut}
    (document,) = encode_batch([content], tokenizer)
    assert document.ids[~document.is_maskable].tolist()[: len(prompt.ids)] == prompt.ids.tolist()
    assert document.ids[document.is_maskable].tolist() == ids[: written.num_tokens]
    assert written.is_whole == (written.num_tokens == len(ids))
    assert written.is_cut != (has_end and written.is_whole)


def test_an_answer_is_kept_as_far_as_it_comes_back_as_the_tokens_that_were_written() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenizer(" the")["input_ids"]
    apart = [token for letter in " the" for token in tokenizer(letter)["input_ids"]]
    assert len(whole) < len(apart), "else this test says nothing"
    prompt = Prompt(np.array(tokenizer("in")["input_ids"], dtype=np.int32), {"origin": "a:1", "prompt": "in"})
    written = as_training_data(prompt, [*whole, *apart, tokenizer.eos_token_id], True, tokenizer)
    assert written is not None
    assert written.num_tokens >= len(whole)
    assert (written.is_whole, written.is_cut) == (False, True)
    assert tokenizer("in" + written.record["completion"])["input_ids"][1:] == [*whole, *apart][: written.num_tokens]


def test_an_answer_without_text_is_none() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Prompt(np.array([5], dtype=np.int32), {"origin": "a:1", "prompt": "x"})
    assert as_training_data(prompt, [tokenizer.eos_token_id], True, tokenizer) is None
    assert as_training_data(prompt, [], False, tokenizer) is None


def test_earlier_answers_are_read_and_not_trained_and_what_stands_beside_is_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    before = [*ASKED, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    record = {"messages": [*before, {"role": "assistant", "content": "thrown away"}], "system": "be brief"}
    (prompt,) = prompts(tmp_path, [record], tokenizer)
    ids = [*tokenizer("four")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = as_training_data(prompt, ids, True, tokenizer)
    assert written is not None
    assert [message["content"] for message in written.record["messages"]] == ["be brief", "one", "two", "three", "four"]
    assert trained_behind(written, tmp_path, tokenizer) == (prompt.ids.tolist(), ids)


def test_prompts_of_texts_are_read_again_as_they_were_given(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = prompts(tmp_path, [{"text": "the rain in spain stays"}], tokenizer, prompt_fraction=0.5)
    (prompt,) = found
    assert "the rain in spain stays".startswith(prompt.record["prompt"])
    assert prompt.ids.tolist() == tokenizer(prompt.record["prompt"])["input_ids"]


def test_a_reading_for_prompts_takes_no_notice_of_a_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "one", "completion": "two", "finish_reason": "length"}))
    (record,) = read_documents(tmp_path / "a.jsonl", Reading(needs_answers=False))
    assert "is_end" not in record
