"""How the messages of conversations are read, in all forms of data sets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from decausal.data.documents import read_documents
from decausal.errors import UserError
from tests.chat_templates import tokenizer_like
from tests.data.conversations import (
    CALL,
    CALLING,
    TOOLS,
    TWO,
    read,
    trained,
    turns,
    with_values,
)


def refusal(tmp_path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, row)
    assert "a.jsonl:1" in str(caught.value)
    return str(caught.value)


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
        ({"prompt": "a"}, "found 'prompt', and no 'completion': a prompt .*--recipe opdlm"),
        (
            {"prompt": "a", "chosen": "b"},
            "no 'completion': name the answer's field with --completion_field NAME; a prompt",
        ),
        (
            {"question": "a", "answers": "b"},
            "name the answer's field with --prompt_field question --completion_field NAME;",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(row: dict[str, Any], reported: str, tmp_path: Path) -> None:
    assert re.search(reported, refusal(tmp_path, row))
