"""Records of well-known data sets are read as what they are, and fields can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decausal.data.documents import read_sources
from decausal.data.reading import Account, Reading
from decausal.data.sources import find_sources
from decausal.errors import UserError

TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
]


def read(tmp_path: Path, *rows: dict[str, Any], **options: str) -> tuple[list[dict[str, Any]], str]:
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
        ({"conversations": MESSAGES, "id": 1}, {"messages": MESSAGES}, "ShareGPT ('conversations')"),
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
            "HumanEval ('prompt', 'canonical_solution')",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, "'prompt', 'completion'"),
    ],
)
def test_well_known_forms_are_told_by_their_fields(
    tmp_path: Path, row: dict[str, Any], record: dict[str, Any], form: str
) -> None:
    assert read(tmp_path, row, row) == ([record, record], form)


def test_named_fields_hold_prompt_and_completion_as_they_are(tmp_path: Path) -> None:
    row = {"text": "whole", "q": "1+1=", "a": "2"}
    record = {"prompt": "1+1=", "completion": "2"}
    assert read(tmp_path, row, prompt_field="q", completion_field="a") == ([record], "'q', 'a'")
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
