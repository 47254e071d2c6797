"""Prompts are what the model is given where the same record, as a training row, has something to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from decausal.data.documents import read_documents
from decausal.data.encode import encode_stream
from decausal.data.prompts import load_prompts
from decausal.errors import UserError
from tests.families import tiny_tokenizer


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


def test_of_a_completion_the_prompt_is_all_that_is_not_learned(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"prompt": f"the {i} ", "completion": "rain"} for i in range(5)])
    prompts = load_prompts(data, tiny_tokenizer(), 64, 4)
    documents = list(encode_stream(read_documents(data), tiny_tokenizer()))
    assert len(prompts) == 5
    for index, document in enumerate(documents):
        assert prompts[index].tolist() == document.ids[~document.is_maskable].tolist()


def test_of_a_conversation_the_prompt_is_what_stands_before_an_answer_at_its_end(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    messages = turns("one", "two", "three", "four")
    data = write(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": [*messages, turns("five")[0]]}])
    prompts = load_prompts(data, tokenizer, 200, 4)
    given = [messages[:3], [*messages, turns("five")[0]]]
    expected = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in given]
    assert [tokenizer.decode(prompts[index]) for index in range(2)] == expected
    document = next(encode_stream(read_documents(data), tokenizer))
    assert prompts[0].tolist() == document.ids[: len(prompts[0])].tolist()
    assert document.is_maskable[len(prompts[0])]


@example(lengths=[4, 1], fraction=0.25, max_length=7)  # a rest of two tokens, of which a quarter is none
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
    max_length=st.integers(6, 40),
)
@settings(max_examples=30, deadline=None)
def test_of_a_text_it_is_a_prefix_of_each_stretch_of_tokens_and_never_all_of_it(
    tmp_path_factory, lengths, fraction, max_length
):
    data = write(tmp_path_factory.mktemp("data") / "a.jsonl", [{"text": "xy" * length} for length in lengths])
    prompts = load_prompts(data, tiny_tokenizer(), max_length, 4, prompt_fraction=fraction)
    documents = encode_stream(read_documents(data), tiny_tokenizer())
    pieces = [d.ids[s : s + max_length] for d in documents for s in range(0, len(d.ids), max_length)]
    longer = iter(pieces)
    for index in range(len(prompts)):
        prompt = prompts[index].tolist()
        assert 1 <= len(prompt) <= max_length - 4
        piece = next(piece for piece in longer if len(piece) > 1)
        assert piece[: len(prompt)].tolist() == prompt
        assert len(prompt) < len(piece)
        assert len(prompt) <= max(1, fraction * len(piece))


def test_each_stretch_of_a_text_begins_with_what_the_tokenizer_puts_before_it(tmp_path):
    tokenizer = tiny_tokenizer()
    bos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    data = write(tmp_path / "a.jsonl", [{"text": "xyz" * 12}])
    prompts = load_prompts(data, tokenizer, 12, 4)
    assert len(prompts) == 4
    assert all(prompt[0] == bos and (prompt[1:] != bos).all() for prompt in map(prompts.__getitem__, range(4)))


def test_prompts_that_leave_no_room_are_left_out_and_reported(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"prompt": "x" * n, "completion": "y"} for n in (3, 12, 13)])
    with pytest.warns(UserWarning, match="left out 1 of 3 prompts: 0 without a token, 1 longer than --max_length 16"):
        prompts = load_prompts(data, tiny_tokenizer(), 16, 4)
    assert [len(prompts[i]) for i in range(len(prompts))] == [3, 12]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "x" * 13, "completion": "y"}], "no prompt leaves room for an answer: .*longest has 13 tokens"),
        ([{"prompt": "", "completion": "y"}], "no prompt leaves room for an answer: 1 without a token"),
        ([{"prompt": " ", "completion": " "}], "no text in"),
    ],
)
def test_data_without_a_usable_prompt_is_an_error(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path / "a.jsonl", records), tiny_tokenizer(), 16, 4)


@pytest.mark.parametrize(
    ("records", "written"),
    [
        ([{"prompt": "one"}], "one"),
        ([{"prompt": "one", "completion": ""}, {"prompt": "one"}], "one"),
        ([{"prompt": "one", "completion": None}], "one"),
        ([{"instruction": "one", "output": ""}], "one\n"),
        ([{"messages": turns("one")}], "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"),
        ([{"prompt": turns("one")}], "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"),
        (
            [{"prompt": turns("one"), "completion": turns("one", "two")[1:]}],
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_answers_may_be_missing_for_those_who_write_them_and_for_nobody_else(tmp_path, records, written):
    data, tokenizer = write(tmp_path / "a.jsonl", records), tiny_tokenizer(chat=True)
    prompts = load_prompts(data, tokenizer, 64, 4)
    assert [tokenizer.decode(prompts[index]) for index in range(len(prompts))] == [written] * len(records)
    assert prompts.has_conversations == written.startswith("<")
    if "two" not in json.dumps(records):
        with pytest.raises(UserError, match=r"opdlm|documents are empty|holds null|which earlier records have"):
            list(read_documents(data))


def test_a_mask_token_in_a_prompt_is_refused_with_its_place(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for record in ({"prompt": "a <mask>"}, {"messages": turns("a <mask>")}):
        with pytest.raises(UserError, match=r"a.jsonl:1: the text holds the mask token '<mask>'"):
            load_prompts(write(tmp_path / "a.jsonl", [record]), tokenizer, 64, 4)


def test_a_conversation_without_a_template_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl:1: 'messages' need a chat template"):
        load_prompts(write(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}]), tiny_tokenizer(), 16, 4)


def test_each_prompt_is_a_tensor_of_its_own(tmp_path):
    prompts = load_prompts(write(tmp_path / "a.jsonl", [{"text": "abcdef"}]), tiny_tokenizer(), 16, 4)
    prompts[0].fill_(0)
    assert torch.equal(prompts[0], prompts[0])
    assert prompts[0].any()
