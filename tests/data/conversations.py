"""Conversations that tests encode, and how they show what is trained of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decausal.data.documents import read_documents
from decausal.data.encode import Encoded, encode_batch


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


QWEN = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


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


def with_values(values: Any) -> dict[str, Any]:
    return {"messages": TWO[:2], "chat_template_kwargs": values}
