"""What may be masked is exactly the text, the completion, or the assistant's answers with their end of turn."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from decausal.data.encode import Encoded, encode, encode_batch, encode_stream
from decausal.data.packing import pack
from decausal.errors import UserError
from tests.families import tiny_tokenizer

SYSTEM = {"role": "system", "content": "be brief"}
QUESTION = {"role": "user", "content": "what is the end?"}
ANSWER = {"role": "assistant", "content": "the end is here"}
LATER = [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": " nothing.\nreally"}]
CHAT = [SYSTEM, QUESTION, ANSWER, *LATER]
ANSWERED = ["the end is here<|im_end|>", " nothing.\nreally<|im_end|>"]

MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}END{% endgeneration %}AFTER"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: only the last answer is rendered with a (here empty) thought before it.
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: content is stripped, and the end of turn stands after a space.
SPACED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] | trim }} "
    "<|endoftext|>{% else %}[INST] {{ message['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
# The question is rendered differently once it is answered.
UNFAITHFUL_TEMPLATE = THINKING_TEMPLATE.replace("<|im_start|>{{", "<|im_start|>{{ messages | length }}{{")


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Lets the tokenizer put a BOS before and an EOS after each text, as some do."""
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    bos = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]
    )
    return tokenizer


def maskable_text(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns the text of each run of maskable tokens."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], encoded.is_maskable.astype(np.int8), [0]])))
    return [tokenizer.decode(encoded.ids[start:end]) for start, end in bounds.reshape(-1, 2)]


def refusal(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(UserError) as caught:
        encode(record, tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    assert "here:7" in message
    return message


def test_a_text_is_its_tokens_and_eos_all_maskable_and_splittable() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode({"origin": "x", "text": "in the end"}, tokenizer)
    assert encoded.ids.tolist() == [*tokenizer("in the end").input_ids, tokenizer.eos_token_id]
    assert encoded.is_maskable.all()
    assert encoded.splittable
    without = encode({"origin": "x", "text": "in the end"}, tokenizer, append_eos=False)
    assert without.ids.tolist() == encoded.ids.tolist()[:-1]


def test_the_tokenizers_own_bos_stays_visible_and_its_own_eos_comes_once() -> None:
    tokenizer = with_bos(tiny_tokenizer())
    text = encode({"origin": "x", "text": "the end"}, tokenizer)
    assert text.ids.tolist() == tokenizer("the end").input_ids
    assert text.is_maskable.tolist() == [False] + [True] * (len(text.ids) - 1)
    completion = encode({"origin": "x", "prompt": "the", "completion": " end"}, tokenizer)
    assert completion.ids.tolist() == text.ids.tolist()


def test_pieces_of_a_text_join_to_the_tokens_of_the_whole() -> None:
    tokenizer = with_bos(tiny_tokenizer())
    lines = ["the first\n", "the second\n", "the third\n"]
    pieces = [
        {"origin": f"x{index}", "text": line, "is_start": index == 0, "is_end": index == 2}
        for index, line in enumerate(lines)
    ]
    documents = encode_batch(pieces, tokenizer)
    whole = encode({"origin": "x", "text": "".join(lines)}, tokenizer).ids.tolist()
    assert [token for piece in documents for token in piece.ids.tolist()[piece.num_before :]] == whole[1:]
    assert all(piece.ids[0] == whole[0] for piece in documents), "each is read by itself, so it begins with BOS"


def test_rows_that_cut_a_text_begin_with_its_bos_and_never_train_it() -> None:
    tokenizer = with_bos(tiny_tokenizer())
    encoded = list(encode_stream([{"origin": "x", "text": "the end of the line"}], tokenizer, num_proc=2))
    rows = list(pack(encoded, 6, tokenizer.eos_token_id))
    assert len(rows) > 1
    assert all(row.clean_ids[0] == encoded[0].ids[0] and not row.is_maskable[0] for row in rows)
    kept = [row.document_ids >= 0 for row in rows]
    joined = [token for row, is_kept in zip(rows, kept, strict=True) for token in row.clean_ids[is_kept].tolist()[1:]]
    assert joined == encoded[0].ids.tolist()[1:]
    assert sum(row.is_maskable.sum() for row in rows) == len(joined)


def test_a_row_without_room_for_more_than_bos_is_refused() -> None:
    document = encode({"origin": "x", "text": "the end"}, with_bos(tiny_tokenizer()))
    long = replace(document, num_before=3)
    with pytest.raises(UserError, match="--max_length 3: a row needs at least 4 tokens"):
        list(pack([long], 3, 0))


@pytest.mark.parametrize(("prompt", "completion"), [("in the", " end"), ("in t", "he end"), ("", "the end")])
def test_a_prompt_stays_visible_and_its_completion_and_eos_are_maskable(prompt: str, completion: str) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode({"origin": "x", "prompt": prompt, "completion": completion}, tokenizer)
    assert encoded.ids[~encoded.is_maskable].tolist() == tokenizer(prompt, add_special_tokens=False).input_ids
    assert maskable_text(encoded, tokenizer) == [completion + tokenizer.eos_token]
    assert not encoded.splittable


def test_answers_and_their_ends_of_turn_are_maskable_and_all_else_is_visible() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    encoded = encode({"origin": "x", "messages": CHAT}, tokenizer)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert maskable_text(encoded, tokenizer) == ANSWERED
    assert not encoded.splittable


def test_answers_stand_behind_their_own_prompts_where_only_the_last_one_is_rendered_with_a_thought() -> None:
    tokenizer = with_template(THINKING_TEMPLATE)
    first, last = encode_batch([{"origin": "x", "messages": CHAT}], tokenizer)
    assert first.ids.tolist() == tokenizer.apply_chat_template(CHAT[:3])["input_ids"]
    assert last.ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert maskable_text(first, tokenizer) == ["<think></think>" + ANSWERED[0]]
    assert maskable_text(last, tokenizer) == ["<think></think>" + ANSWERED[1]]


def test_answers_are_found_where_the_template_strips_them_and_ends_turns_behind_a_space() -> None:
    tokenizer = with_template(SPACED_TEMPLATE)
    padded = [QUESTION, ANSWER | {"content": "\n the end \n"}]
    encoded = encode({"origin": "x", "messages": padded}, tokenizer)
    assert maskable_text(encoded, tokenizer) == [" the end <|endoftext|>"]


def test_a_templates_own_marks_say_what_the_answer_is() -> None:
    tokenizer = with_template(MARKED_TEMPLATE)
    encoded = encode({"origin": "x", "messages": CHAT}, tokenizer)
    assert maskable_text(encoded, tokenizer) == ["the end is hereEND", " nothing.\nreallyEND"]


@pytest.mark.parametrize("after", ["{% endgeneration %}<|im_end|>\n", "<|im_end|>\n{% endgeneration %}"])
def test_the_end_of_turn_is_maskable_whether_the_templates_marks_hold_it_or_not(after: str) -> None:
    tokenizer = with_template(MARKED_TEMPLATE.replace("END{% endgeneration %}AFTER", after))
    encoded = encode({"origin": "x", "messages": CHAT}, tokenizer)
    newline = "\n" if after.startswith("<") else ""
    assert maskable_text(encoded, tokenizer) == [answer + newline for answer in ANSWERED]


def test_an_assistants_opening_message_is_visible() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    opening = {"role": "assistant", "content": "hello"}
    encoded = encode({"origin": "x", "messages": [opening, *CHAT[1:3]]}, tokenizer)
    assert maskable_text(encoded, tokenizer) == ANSWERED[:1]


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<\uf8f0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_maskable_tokens_of_any_conversation_decode_to_its_answers(turns: list[tuple[str, str]]) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    encoded = encode_batch([{"origin": "x", "messages": messages}], tokenizer)[0]
    assert maskable_text(encoded, tokenizer) == [f"{answer}<|im_end|>" for _, answer in turns]


def test_a_batch_of_any_records_equals_its_records_one_by_one() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    records: list[dict[str, Any]] = [
        {"origin": "a", "text": "the end"},
        {"origin": "b", "messages": CHAT},
        {"origin": "c", "prompt": "in", "completion": " the end"},
        {"origin": "d", "text": "in the end"},
        {"origin": "e", "messages": CHAT[:3]},
    ]
    for batch in (encode_batch(records, tokenizer), list(encode_stream(records, tokenizer))):
        for record, encoded in zip(records, batch, strict=True):
            alone = encode(record, tokenizer)
            assert (encoded.origin, encoded.splittable) == (record["origin"], alone.splittable)
            assert np.array_equal(encoded.ids, alone.ids)
            assert np.array_equal(encoded.is_maskable, alone.is_maskable)


def test_long_documents_are_encoded_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    long = "the end " * 200
    transformers_logger = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, transformers_logger.name)  # a command run in this process may have lowered it
    transformers_logger.addHandler(caplog.handler)
    try:
        for template in (tiny_tokenizer(chat=True).chat_template, MARKED_TEMPLATE):
            encode({"origin": "x", "messages": [QUESTION, ANSWER | {"content": long}]}, with_template(template))
        encode({"origin": "x", "text": long}, tiny_tokenizer())
        encode({"origin": "x", "prompt": long, "completion": long}, tiny_tokenizer())
        assert not caplog.records
        tiny_tokenizer()(long)
        assert caplog.records, "the tokenizer warns when it is called in the ordinary way"
    finally:
        transformers_logger.removeHandler(caplog.handler)


def test_a_document_of_special_tokens_alone_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    assert "nothing but special tokens" in refusal({"origin": "here:7", "text": "<|endoftext|><|im_end|>"}, tokenizer)
    record = {"origin": "here:7", "prompt": "a prompt", "completion": "<|im_end|>"}
    assert "nothing but special tokens" in refusal(record, tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        {"text": "the <mask> end"},
        {"prompt": "the <mask>", "completion": "end"},
        {"messages": [QUESTION | {"content": "<mask>?"}, ANSWER]},
    ],
)
def test_a_document_that_holds_the_mask_token_is_refused(content: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", special=True)})
    assert "holds the mask token '<mask>'" in refusal({"origin": "here:7", **content}, tokenizer)


def test_messages_without_a_chat_template_are_refused_with_what_to_do() -> None:
    message = refusal({"origin": "here:7", "messages": CHAT}, tiny_tokenizer())
    assert "this tokenizer has none; give one with --chat_template FILE, or give 'prompt' and 'completion'" in message


def test_a_template_that_changes_the_prompt_once_it_is_answered_is_refused() -> None:
    message = refusal({"origin": "here:7", "messages": CHAT}, with_template(UNFAITHFUL_TEMPLATE))
    assert "renders earlier messages differently once the answer follows" in message


def test_a_template_that_rewrites_answers_is_refused() -> None:
    tokenizer = with_template(THINKING_TEMPLATE.replace("['content'] }}", "['content'] | length }}"))
    assert "the chat template rewrites its content" in refusal({"origin": "here:7", "messages": CHAT}, tokenizer)


def test_a_template_that_marks_no_answer_is_refused() -> None:
    tokenizer = with_template(MARKED_TEMPLATE.replace("== 'assistant'", "== 'model'"))
    assert "marks no token" in refusal({"origin": "here:7", "messages": CHAT}, tokenizer)


@pytest.mark.parametrize("template", [SPACED_TEMPLATE, MARKED_TEMPLATE])
def test_a_templates_own_refusal_is_passed_on(template: str) -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}" + template)
    message = refusal({"origin": "here:7", "messages": CHAT}, tokenizer)
    assert "the chat template refuses these messages (roles must alternate)" in message


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="set its eos_token"):
        encode({"origin": "x", "text": "the end"}, tokenizer)
    assert len(encode({"origin": "x", "text": "the end"}, tokenizer, append_eos=False).ids)
