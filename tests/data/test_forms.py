"""Records of well-known data sets are read as what they are, and fields can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from decausal.data.documents import read_documents, read_sources
from decausal.data.reading import Account, Reading
from decausal.data.sources import find_sources
from decausal.errors import UserError

TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
]


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], str]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    account = Account()
    found = list(read_sources(find_sources(path), Reading(**options), account))
    assert [record.pop("origin") for record in found] == [f"{path}:{number}" for number in range(1, len(rows) + 1)]
    return found, account.line(1).partition(", as ")[2]


@pytest.mark.parametrize(
    ("row", "record", "form"),
    [
        ({"conversations": TURNS}, {"messages": MESSAGES}, "ShareGPT ('conversations')"),
        ({"conversations": MESSAGES, "id": 1}, {"messages": MESSAGES}, "ShareGPT ('conversations'); not read: 'id'"),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"prompt": "Add.\n\n1 2\n", "completion": "3"},
            "Alpaca ('instruction', 'input', 'output')",
        ),
        (
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            {"prompt": "Greet.\n", "completion": "Hi"},
            "Alpaca ('instruction', 'input', 'output')",
        ),
        (
            {"instruction": "Greet.", "output": "Hi"},
            {"prompt": "Greet.\n", "completion": "Hi"},
            "Alpaca ('instruction', 'input', 'output')",
        ),
        (
            {"instruction": "Why?", "context": None, "response": "So."},
            {"prompt": "Why?\n", "completion": "So."},
            "Dolly ('instruction', 'context', 'response')",
        ),
        (
            {"question": "1+1?", "answer": "2"},
            {"prompt": "1+1?\n", "completion": "2"},
            "question and answer ('question', 'answer')",
        ),
        (
            {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "f()"},
            {"prompt": "def f():\n", "completion": "    pass\n"},
            "HumanEval ('prompt', 'canonical_solution'); not read: 'task_id', 'test'",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, "'prompt', 'completion'"),
    ],
)
def test_well_known_forms_are_recognised_by_their_fields(
    tmp_path: Path, row: dict[str, Any], record: dict[str, Any], form: str
) -> None:
    assert read(tmp_path, row, row) == ([record, record], form)


SCENE = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt", "form", "missing"),
    [
        ({"prompt": "one?"}, "one?", "'prompt'", "completion"),
        ({"prompt": "one?", "completion": ""}, "one?", "'prompt'", None),
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n\n1 2\n", "Alpaca ('instruction', 'input')", "output"),
        ({"instruction": "Add."}, "Add.\n", "Alpaca ('instruction', 'input')", "output"),
        ({"instruction": "Add.", "context": "1 2"}, "Add.\n\n1 2\n", "Dolly ('instruction', 'context')", "response"),
        ({"question": "1+1?"}, "1+1?\n", "question and answer ('question')", "answer"),
        ({"problem": "1+1?"}, "1+1?\n", "question and answer ('problem')", "solution"),
    ],
)
def test_prompts_of_well_known_forms_may_lack_their_answers_where_none_is_needed(
    row: dict[str, str], prompt: str, form: str, missing: str | None, tmp_path: Path
) -> None:
    records, reported = read(tmp_path, row, needs_answers=False)
    assert records == [{"prompt": prompt, "completion": ""}]
    assert reported.partition(";")[0] == form
    if missing is not None:
        with pytest.raises(UserError, match=f"and no '{missing}': a prompt without an answer is for recipes"):
            read(tmp_path, row)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_a_system_column_becomes_the_system_turn(tmp_path: Path, field: str, name: str) -> None:
    rows = [
        {field: TURNS[1:], name: "Be brief."},  # in the column alone
        {field: TURNS, name: "Be brief."},  # in both
        *({field: TURNS[1:], name: nothing} for nothing in ("", None)),
        {field: TURNS[1:]},
    ]
    expected = [{"messages": MESSAGES}] * 2 + [{"messages": MESSAGES[1:]}] * 3
    assert read(tmp_path, *rows)[0] == expected
    with pytest.raises(UserError, match=r"jsonl:1: the system's message and the system's field differ; keep one"):
        read(tmp_path, {field: TURNS, name: "Be long."})
    with pytest.raises(UserError, match=rf"field '{name}' holds a number, a string is expected"):
        read(tmp_path, {field: TURNS, name: 3})


def test_a_system_column_stands_before_questions_and_prompts_of_messages(tmp_path: Path) -> None:
    for question, answer in (("question", "response"), ("instruction", "output")):
        record = {"prompt": "Be brief.\n\none?\n", "completion": "two"}
        assert read(tmp_path, {"system_prompt": "Be brief.", question: "one?", answer: "two"})[0] == [record]
    (record,) = read(tmp_path, {"system": "Be brief.", "prompt": MESSAGES[1:2], "completion": MESSAGES[2:]})[0]
    assert record["messages"] == [SCENE, MESSAGES[1] | {"weight": 0}, MESSAGES[2]]


@pytest.mark.parametrize("row", [{"prompt": "one?", "completion": "two"}, {"prompt": "one?"}])
def test_a_system_column_stands_before_a_plain_prompt(tmp_path: Path, row: dict[str, str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row | {"system": "Be brief."}))
    (record,) = read_documents(path, Reading(needs_answers="completion" in row))
    assert (record["prompt"], record["completion"]) == ("Be brief.\n\none?", row.get("completion", ""))


HISTORY = [["Add 1 and 2.", "3"], ["And 4.", "7"]]


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_alpacas_history_stands_before_the_instruction(tmp_path: Path, history: object) -> None:
    row = {"system": "Be brief.", "instruction": "Double it.", "input": "", "output": "14", "history": history}
    given = "Be brief.\n\nAdd 1 and 2.\n3\n\nAnd 4.\n7\n\nDouble it.\n"
    assert read(tmp_path, row)[0] == [{"prompt": given, "completion": "14"}]
    for nothing in (None, [], ""):
        assert read(tmp_path, row | {"history": nothing})[0][0]["prompt"] == "Be brief.\n\nDouble it.\n"
    for broken in ("and so on", [["only a question"]], [["one?", 2]], {"a": "b"}):
        with pytest.raises(UserError, match=r"field 'history' holds .*, a list of \[question, answer\] is expected"):
            read(tmp_path, row | {"history": broken})


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_what_is_for_a_chat_template_is_refused_beside_plain_prompts(tmp_path: Path, name: str) -> None:
    row = {"prompt": "one?", "completion": "two"}
    assert read(tmp_path, row | {name: None}, row | {name: {}})[0] == [row, row]
    with pytest.raises(UserError, match=rf"field '{name}' is for a chat template, which a 'prompt' that is a string"):
        read(tmp_path, row | {name: {"a": 1}})


def test_numbers_beside_answers_that_were_written_here_are_not_mentioned(tmp_path) -> None:
    row = {"prompt": "a", "completion": "b", "finish_reason": "stop", "num_tokens": 3, "id": 0}
    assert "not read" not in read(tmp_path, row)[1]
    assert read(tmp_path, {"prompt": "a", "completion": "b", "id": 0})[1].endswith("not read: 'id'")


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "source": "web", "url": None}, {"text": "b", "messages": [], "source": "web"}]
    assert read(tmp_path, *rows)[1] == "'text'; not read: 'source', 'messages'"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    account = Account()
    list(read_sources(find_sources(tmp_path / "a.parquet"), Reading(), account))
    assert "; not read: 'source', 'url'" in account.line(1)
    many = {"text": "a"} | {f"field{number}": 1 for number in range(20)}
    assert read(tmp_path, many)[1].endswith("'field7' and 12 more")


def test_a_system_column_of_a_table_is_read(tmp_path: Path) -> None:
    rows = [{"system": "Be brief.", "conversations": TURNS[1:]}, {"system": None, "conversations": TURNS[1:]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [record["messages"] for record in read_documents(tmp_path / "a.parquet")]
    assert found == [MESSAGES, MESSAGES[1:]]


def test_named_fields_hold_prompt_and_completion_as_they_are(tmp_path: Path) -> None:
    row = {"text": "whole", "q": "1+1=", "a": "2"}
    record = {"prompt": "1+1=", "completion": "2"}
    assert read(tmp_path, row, prompt_field="q", completion_field="a") == ([record], "'q', 'a'; not read: 'text'")
    assert read(tmp_path, row | {"completion": "2"}, prompt_field="q")[0] == [record]
    assert read(tmp_path, row)[0] == [{"text": "whole"}]


def test_fields_that_are_not_there_are_refused_with_those_found(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"found 'q', 'a', but --prompt_field and --completion_field ask for 'q' and 'b'"
    ):
        read(tmp_path, {"q": "x", "a": "y"}, prompt_field="q", completion_field="b")
    with pytest.raises(UserError, match=r"--prompt_field and --completion_field both name 'q'"):
        read(tmp_path, {"q": "x"}, prompt_field="q", completion_field="q")


def test_an_unknown_form_proposes_the_flags(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"found 'q', 'a', .*--text_field NAME, or --prompt_field NAME --completion_field"
    ):
        read(tmp_path, {"q": "x", "a": "y"})


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"conversations": "hello"}, "field 'conversations' holds a string, a list of messages is expected"),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            "message 1 has no content, and no tool calls in its place",
        ),
        ({"question": "a", "answer": 3}, "field 'answer' holds a number, a string is expected"),
    ],
)
def test_malformed_ones_are_refused(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(tmp_path, row)
