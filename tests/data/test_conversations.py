"""What is trained of conversations under the templates of well-known models."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from decausal.data.chat import answer_end_ids
from decausal.data.encode import SpecialTokens, encode_batch
from decausal.data.template import render
from decausal.errors import UserError
from tests.chat_templates import TEMPLATES, tokenizer_like, with_template
from tests.data.conversations import (
    CALLING,
    QWEN,
    THOUGHTS,
    TOOLS,
    TWO,
    marked,
    trained,
    turns,
)
from tests.families import tiny_tokenizer

# Qwen's template, with marks around what the assistant writes.
QWEN_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
def test_an_answer_is_what_the_model_has_to_write_after_its_prompt(
    name: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert trained({"messages": messages}, tokenizer_like(name)) == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "r1-distill"])
@pytest.mark.parametrize("messages", [TWO, THOUGHTS, [*TWO[:2], TWO[3]]])
def test_every_answer_begins_just_after_the_prompt_that_the_model_will_be_given(
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
