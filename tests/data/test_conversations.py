"""What is trained of conversations under the templates of well-known models, and how their messages are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from decausal.data.chat import answer_end_ids
from decausal.data.documents import read_documents
from decausal.data.encode import Encoded, SpecialTokens, encode_batch
from decausal.data.prompts import prompts_of
from decausal.data.template import render, set_template
from decausal.errors import UserError
from tests.chat_templates import TEMPLATES, tokenizer_like, with_template
from tests.families import tiny_tokenizer

# The same with marks around what the assistant writes.
QWEN_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(*contents: str, **last: Any) -> list[dict[str, Any]]:
    found = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
    return [*found[:-1], found[-1] | last]


TWO = turns("one", "two", "three", "four")
THOUGHTS = turns("one", "<think>\nhm\n</think>\n\ntwo")
TOOLS = [{"type": "function", "function": {"name": "w"}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
CALLING = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
    {"role": "assistant", "content": "It rains"},
]


def marked(document: Encoded, tokenizer: Any) -> str:
    """The document's text, with what is trained in ⟦⟧."""
    pieces, was_trained = [], False
    for token, is_trained in zip(document.ids.tolist(), document.is_maskable.tolist(), strict=True):
        pieces.append(("⟦" if is_trained else "⟧") if is_trained != was_trained else "")
        pieces.append(tokenizer.decode([token]))
        was_trained = is_trained
    return "".join(pieces) + ("⟧" if was_trained else "")


def trained(record: dict[str, Any], tokenizer: Any) -> list[str]:
    return [marked(document, tokenizer) for document in encode_batch([{"origin": "a:1", **record}], tokenizer)]


def read(tmp_path: Path, row: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = read_documents(tmp_path / "a.jsonl")
    return {name: value for name, value in record.items() if name != "origin"}


def refusal(tmp_path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, row)
    assert "a.jsonl:1" in str(caught.value)
    return str(caught.value)


# Templates


QWEN = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
R1 = "<｜bos｜><｜User｜>one<｜Assistant｜>"
R1_LATER = "<｜User｜>three<｜Assistant｜>"


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("qwen2.5", TWO, [f"{QWEN}⟦two<|im_end|>⟧\n{QWEN.replace('one', 'three')}⟦four<|im_end|>⟧\n"]),
        (
            "qwen3",
            TWO,
            [
                f"{QWEN}⟦<think>\n\n</think>\n\ntwo<|im_end|>⟧\n",
                f"{QWEN}two<|im_end|>\n{QWEN.replace('one', 'three')}⟦<think>\n\n</think>\n\nfour<|im_end|>⟧\n",
            ],
        ),
        ("qwen3", THOUGHTS, [f"{QWEN}⟦<think>\nhm\n</think>\n\ntwo<|im_end|>⟧\n"]),
        ("qwen3", turns("one", "two", reasoning_content="hm"), [f"{QWEN}⟦<think>\nhm\n</think>\n\ntwo<|im_end|>⟧\n"]),
        (
            "qwen3",
            [*TWO[:2], TWO[3]],
            [
                f"{QWEN}⟦<think>\n\n</think>\n\ntwo<|im_end|>⟧\n<|im_start|>assistant\n"
                "⟦<think>\n\n</think>\n\nfour<|im_end|>⟧\n"
            ],
        ),
        (
            "glm-4",
            TWO,
            ["[gMASK]<sop><|user|>\none<|assistant|>⟦\ntwo<|user|>⟧\nthree<|assistant|>⟦\nfour<|endoftext|>⟧"],
        ),
        (
            "mistral",
            TWO,
            ["<s>[INST] one[/INST]⟦ two<|endoftext|>⟧[INST] three[/INST]⟦ four<|endoftext|>⟧"],
        ),
        (
            "gemma",
            turns("one", " two\n"),
            ["<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n⟦two<end_of_turn>⟧\n"],
        ),
        ("phi-3", turns("one", "end"), ["<|user|>\none<|end|>\n<|assistant|>\n⟦end<|end|>⟧\n<|endoftext|>"]),
        ("deepseek-v3", TWO[:2], [f"{R1}⟦two<|endoftext|>⟧"]),
        ("deepseek-v3", THOUGHTS, [f"{R1}⟦<think>\nhm\n</think>\n\ntwo<|endoftext|>⟧"]),
        ("deepseek-v3.1", THOUGHTS, [f"{R1}</think>⟦two<|endoftext|>⟧"]),
        ("r1-distill", TWO, [f"{R1}⟦two<|endoftext|>⟧{R1_LATER}⟦four<|endoftext|>⟧"]),
        ("r1-distill", THOUGHTS, [f"{R1}<think>\n⟦hm\n</think>\n\ntwo<|endoftext|>⟧"]),
        (
            "r1-distill",
            [*THOUGHTS, *turns("three", "<think>ha</think>four")],
            [
                f"{R1}<think>\n⟦hm\n</think>\n\ntwo<|endoftext|>⟧",
                f"{R1}\n\ntwo<|endoftext|>{R1_LATER}<think>\n⟦ha</think>four<|endoftext|>⟧",
            ],
        ),
        (
            "qwen2.5",
            CALLING,
            [
                f'{QWEN}⟦<tool_call>\n{{"name": "w", "arguments": {{"city": "Oslo"}}}}\n</tool_call><|im_end|>⟧\n'
                "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n⟦It rains<|im_end|>⟧\n"
            ],
        ),
        (
            "glm-4",
            CALLING,
            [
                '[gMASK]<sop><|user|>\none<|assistant|>⟦w\n{"city": "Oslo"}<|observation|>⟧\nrain<|assistant|>'
                "⟦\nIt rains<|endoftext|>⟧"
            ],
        ),
        (
            "deepseek-v3",
            CALLING,
            [
                f'{R1}⟦<｜calls▁begin｜><｜call▁begin｜>w\n{{"city": "Oslo"}}<｜call▁end｜><｜calls▁end｜>'
                "<|endoftext|>⟧<｜outputs▁begin｜>rain<｜outputs▁end｜>⟦It rains<|endoftext|>⟧"
            ],
        ),
    ],
)
def test_an_answer_is_what_the_model_has_to_write_behind_its_prompt(
    name: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert trained({"messages": messages}, tokenizer_like(name)) == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "r1-distill"])
@pytest.mark.parametrize("messages", [TWO, THOUGHTS, [*TWO[:2], TWO[3]]])
def test_every_answer_begins_just_behind_the_prompt_that_the_model_will_be_given(
    name: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = tokenizer_like(name)
    prompts = {
        render(messages[:index], tokenizer, "a:1", add_generation_prompt=True)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    for document in trained({"messages": messages}, tokenizer):
        befores = [document[: found.start()] for found in re.finditer("⟦", document)]
        assert befores
        assert {re.sub("[⟦⟧]", "", before) for before in befores} <= prompts


@pytest.mark.parametrize("is_marked", [False, True])
def test_no_token_joins_a_prompt_to_its_answer(is_marked: bool) -> None:
    tokenizer = tokenizer_like("qwen2.5")
    if is_marked:
        tokenizer.chat_template = QWEN_MARKED
    tokenizer.add_tokens(["\n\n", "\n  "])
    messages = turns("one", "\n\ntwo", "three", "  four", "five", "six")
    [document] = encode_batch([{"origin": "a:1", "messages": messages}], tokenizer)

    prompt = tokenizer(render(messages[:1], tokenizer, "a:1", add_generation_prompt=True))["input_ids"]
    assert document.ids[: len(prompt)].tolist() == prompt
    answers = re.findall("⟦(.*?)⟧", marked(document, tokenizer), re.DOTALL)
    assert answers == ["\n\ntwo<|im_end|>", "  four<|im_end|>", "six<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen2.5", {"<|im_end|>"}),
        ("qwen3", {"<|im_end|>"}),
        ("glm-4", {"<|user|>", "<|observation|>", "<|endoftext|>"}),
        ("llama-3", {"<|eot_id|>"}),
        ("gemma", {"<end_of_turn>"}),
        ("mistral", {"<|endoftext|>"}),
        ("deepseek-v3", {"<|endoftext|>"}),
        ("deepseek-v3.1", {"<|endoftext|>"}),
        ("r1-distill", {"<|endoftext|>"}),
        ("phi-3", {"<|end|>"}),
    ],
)
def test_the_ends_of_answers_are_what_answers_are_trained_to_end_with(name: str, ends: set[str]) -> None:
    tokenizer = tokenizer_like(name)
    found = answer_end_ids(tokenizer, SpecialTokens(tokenizer).ids)
    assert set(tokenizer.convert_ids_to_tokens(found)) == ends


def test_a_token_that_opens_answers_is_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    opening = "{{ '<|im_start|>' if m.role == 'assistant' else 'Q: ' }}"
    plain = "{% for m in messages %}" + opening + "{{ m.content + '\n' }}{% endfor %}"
    tokenizer = with_template(plain + "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")
    assert answer_end_ids(tokenizer, SpecialTokens(tokenizer).ids) == [tokenizer.eos_token_id]
    picky = with_template("{{ raise_exception('documents are missing') }}")
    assert answer_end_ids(picky, SpecialTokens(picky).ids) == []
    assert "which tokens end an answer is not known beside EOS" in capsys.readouterr().err


def test_a_template_that_does_not_read_tools_or_thoughts_is_refused_with_advice() -> None:
    for record, reported in (
        ({"messages": TWO, "tools": TOOLS}, "leaves 'tools' out; .*--chat_template FILE"),
        ({"messages": turns("one", "two", reasoning_content="hm")}, "message 2.* leaves 'reasoning_content' out"),
    ):
        with pytest.raises(UserError, match=reported):
            trained(record, tokenizer_like("llama-3"))


def test_tools_reach_the_template() -> None:
    (document,) = trained({"messages": CALLING, "tools": TOOLS}, tokenizer_like("qwen2.5"))
    assert document.startswith("<|im_start|>system\n" + json.dumps(TOOLS[0]) + "<|im_end|>")
    whole = trained({"messages": TWO, "tools": TOOLS}, tokenizer_like("mistral"))
    assert [document.count("⟦") for document in whole] == [1, 1]  # they stand before the last question
    assert all("[AVAILABLE_TOOLS]" in document.partition("⟦")[0] for document in whole)


def with_values(values: Any) -> dict[str, Any]:
    return {"messages": TWO[:2], "chat_template_kwargs": values}


@pytest.mark.parametrize("is_marked", [True, False])
def test_the_values_of_a_record_reach_the_template(is_marked: bool, tmp_path: Path) -> None:
    answer = "{{ m.content + '<|im_end|>' }}"
    answer = f"{{% generation %}}{answer}{{% endgeneration %}}" if is_marked else answer
    tokenizer = with_template(
        "{{ 'mood ' + mood | default('none') }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.role == 'assistant' %}}{answer}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>",
        "<|im_end|>",
    )
    for values, mood in (({"mood": "calm"}, "calm"), ('{"mood": "calm"}', "calm"), ({}, "none"), (None, "none")):
        record = read(tmp_path, with_values(values))
        (document,) = trained(record, tokenizer)
        assert document.startswith(f"mood {mood}<|im_start|>user")
        assert "⟦two<|im_end|>⟧" in document
        (prompt,) = prompts_of([{"origin": "a", **record}], tokenizer, 99, 99, 0.5)
        assert tokenizer.decode(prompt) == document.partition("⟦")[0]


def test_the_values_of_a_record_go_before_those_of_the_whole_run() -> None:
    tokenizer = tokenizer_like("qwen3")
    set_template(tokenizer, kwargs={"enable_thinking": False})
    thinks, not_reported = with_values({"enable_thinking": True}), with_values({})
    (document,) = trained(thinks, tokenizer)
    assert "⟦<think>" in document
    (document,) = trained(not_reported, tokenizer)
    assert "</think>\n\n⟦two" in document


def test_values_that_the_template_does_not_read_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    (document,) = trained(with_values({"moood": 1}), tokenizer_like("qwen2.5"))
    assert [document] == trained({"messages": TWO[:2]}, tokenizer_like("qwen2.5"))
    assert "the chat template reads no 'moood', which 'chat_template_kwargs' of records" in capsys.readouterr().err
    for name in ("tools", "tokenize", "add_generation_prompt", "a b"):
        with pytest.raises(UserError, match=f"'{name}' of 'chat_template_kwargs' is not the chat template's to read"):
            trained(with_values({name: True}), tokenizer_like("qwen2.5"))


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "marked"])
def test_a_message_of_weight_0_is_read_and_not_trained(name: str) -> None:
    tokenizer = tokenizer_like(name) if name != "marked" else tiny_tokenizer(chat=True)
    if name == "marked":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
            "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        )
    draft = [*TWO[:1], TWO[1] | {"weight": 0}, *TWO[2:]]
    (document,) = trained({"messages": draft}, tokenizer)
    assert document.count("⟦") == 1
    assert "two<|im_end|>" in document.partition("⟦")[0]
    assert "four<|im_end|>⟧" in document


# Messages


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}, {"loss": False}]
)
def test_marks_of_what_is_not_trained_are_understood(mark: dict[str, Any], tmp_path: Path) -> None:
    given = [TWO[0], TWO[1] | mark, TWO[2], TWO[3] | dict.fromkeys(mark, 1)]
    expected = [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]
    assert read(tmp_path, {"messages": given}) == {"messages": expected}
    share_gpt = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"} | mark, *TWO[2:]]
    assert read(tmp_path, {"conversations": share_gpt}) == {"messages": expected}


def test_text_parts_tool_calls_and_tools_are_read_in_every_form(tmp_path: Path) -> None:
    as_json = json.loads(json.dumps(CALLING))
    as_json[1]["tool_calls"] = json.dumps(CALLING[1]["tool_calls"])
    parts = [{"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}, *as_json[1:]]
    with_json_arguments = json.loads(json.dumps(CALLING))
    with_json_arguments[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    for messages in (parts, with_json_arguments, json.dumps(CALLING)):
        for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
            assert read(tmp_path, {"messages": messages, "tools": tools}) == {"messages": CALLING, "tools": TOOLS}
    for tools in (None, [], "[]", "null", ""):
        assert read(tmp_path, {"messages": CALLING, "tools": tools}) == {"messages": CALLING}


def test_speakers_of_sharegpt_call_tools(tmp_path: Path) -> None:
    turns = [
        ("human", "a"),
        ("function_call", '{"name": "w", "arguments": {"b": 1}}'),
        ("observation", "c"),
        ("gpt", "d"),
    ]
    record = read(tmp_path, {"conversations": [{"from": name, "value": value} for name, value in turns]})
    assert record["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "w", "arguments": {"b": 1}}]},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_nulls_of_united_structs_are_dropped_at_every_depth(tmp_path: Path) -> None:
    other = [*CALLING[:1], CALLING[1] | {"tool_calls": [CALL | {"function": {"name": "v", "arguments": {"a": [1]}}}]}]
    tools = [{"type": "function", "function": {"name": "v", "parameters": {"a": 1}}}]
    rows = [{"messages": CALLING, "tools": TOOLS}, {"messages": other, "tools": tools}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = list(read_documents(tmp_path / "a.parquet"))
    assert [{name: record[name] for name in ("messages", "tools")} for record in records] == rows


def test_lists_of_messages_may_be_prompt_and_completion_and_the_completion_is_trained(tmp_path: Path) -> None:
    record = read(tmp_path, {"prompt": TWO[:3], "completion": TWO[3:], "tools": TOOLS})
    assert record == {"messages": [message | {"weight": 0} for message in TWO[:3]] + TWO[3:], "tools": TOOLS}
    (document,) = trained(record, tokenizer_like("qwen2.5"))
    assert document.endswith("⟦four<|im_end|>⟧\n")
    assert document.count("⟦") == 1


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        ({"messages": turns("a", "b", content=[{"type": "image_url", "image_url": {}}])}, "a part of type 'image_url'"),
        ({"messages": turns("a", "b", weight=0.5)}, "'weight' is 0.5"),
        ({"messages": turns("a", "b", content=None)}, "message 2 has no content, and no tool calls"),
        (
            {"messages": turns("a", "b", tool_calls=[{"function": {"name": "w", "arguments": "{"}}])},
            "tool call 1: .*JSON",
        ),
        ({"messages": turns("a", "b", tool_calls=[{"id": "x"}])}, "tool call 1 names no function"),
        ({"messages": TWO, "tools": "w"}, "field 'tools' holds a string"),
        (with_values([1]), "field 'chat_template_kwargs' holds a list, an object is expected"),
        ({"prompt": TWO[:1], "completion": "b"}, "'prompt' holds a list and 'completion' a string"),
        ({"prompt": "a", "completion": TWO[1:2]}, "'prompt' holds a string and 'completion' a list; give two lists"),
        ({"conversations": [{"from": "function_call", "value": "w()"}]}, "message 1: 'tool_calls' holds a list"),
        ({"messages": TWO[:1]}, "no answer to learn; .*--recipe opdlm"),
        ({"prompt": "a"}, "found 'prompt', and no 'completion': .*--recipe opdlm"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(row: dict[str, Any], reported: str, tmp_path: Path) -> None:
    assert re.search(reported, refusal(tmp_path, row))


# The template


def test_values_that_the_template_reads_are_its_defaults_from_then_on() -> None:
    tokenizer = tokenizer_like("qwen3")
    set_template(tokenizer, kwargs={"enable_thinking": False})
    closed = "<think>\n\n</think>\n\n"
    assert trained({"messages": TWO[:2]}, tokenizer) == [f"{QWEN}{closed}⟦two<|im_end|>⟧\n"]
    assert [text.count("⟦") for text in trained({"messages": TWO}, tokenizer)] == [1, 1]
    assert trained({"messages": THOUGHTS}, tokenizer) == [f"{QWEN}{closed}⟦two<|im_end|>⟧\n"]
    prompt = tokenizer.apply_chat_template(TWO[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == QWEN + closed
    asked = tokenizer.apply_chat_template(TWO[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked == QWEN


@pytest.mark.parametrize("value", [None, True, 3, -0.5, 'a"b\\c\n{{ x }} %} ü 😀', ["a", None, {"b": [False]}], {}])
def test_any_value_reaches_the_template_as_it_is(value: Any) -> None:
    tokenizer = with_template("{{ messages[0].content }}{{ given | tojson }}")
    set_template(tokenizer, kwargs={"given": value})
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    assert json.loads(rendered) == value


def test_a_template_comes_from_a_file_or_is_given(tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    for given in (file, str(file), file.read_text()):
        tokenizer = tiny_tokenizer()
        set_template(tokenizer, given)
        assert tokenizer.chat_template == file.read_text()


@pytest.mark.parametrize(
    ("text", "kwargs", "reported"),
    [
        (None, {}, "No such file"),
        ("hello", {}, "is not a chat template"),
        ("{% for m in messages %}{{ m.content }", {}, r"a.jinja is not Jinja \(line 1: "),
        ("{{ messages }}", {"thinking": 1}, "the chat template reads no 'thinking'"),
        ("{{ messages }}{{ tools }}", {"tools": []}, "'tools' is not the chat template's to read"),
        ("{{ messages }}", {"a b": 1}, "'a b' is not the chat template's to read"),
    ],
)
def test_what_is_no_template_or_not_read_is_refused(
    text: str | None, kwargs: dict[str, Any], reported: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=reported):
        set_template(tiny_tokenizer(), file, kwargs)
