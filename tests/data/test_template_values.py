"""Chat templates that are given, and the values that they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decausal.data.prompts import prompts_of
from decausal.data.template import set_template
from decausal.errors import UserError
from tests.chat_templates import tokenizer_like, with_template
from tests.data.conversations import (
    QWEN,
    THOUGHTS,
    TWO,
    read,
    trained,
    with_values,
)
from tests.families import tiny_tokenizer


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
