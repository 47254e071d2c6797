"""A model that is trained on conversations stops where its answers ended in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from decausal.data.encode import encode
from decausal.exchange.plain import export_plain
from decausal.models.checkpoint import load_converted
from decausal.models.facts import read_facts
from decausal.sampling.stopping import end_token_ids
from tests.chat_templates import TEMPLATES, tokenizer_like
from tests.families import FAMILIES
from tests.runs import run

CHAT = [{"role": role, "content": "the rain"} for role in ("user", "assistant", "user", "assistant")]


ROLLOUT = {"rows": "rollout", "layout": "block", "block_size": 4, "rollout_tokens": 8}


def converted(tmp_path: Path, name: str, record: dict[str, Any], out: str = "out", **settings: Any) -> Path:
    """Trains a step on one record, from a tiny model with the template of a public one, or from what is there."""
    source, tokenizer = tmp_path / "source", tokenizer_like(name)
    if not source.exists():
        FAMILIES["qwen3"](vocab_size=len(tokenizer) + 8).save_pretrained(source)
        tokenizer.save_pretrained(source)
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    run(source, tmp_path / "data.jsonl", tmp_path / out, max_steps=1, max_length=64, **settings)
    return tmp_path / out


@pytest.mark.parametrize(
    ("name", "end", "settings"),
    [("qwen2.5", "<|im_end|>", {}), ("glm-4", "<|user|>", {}), ("qwen2.5", "<|im_end|>", ROLLOUT)],
)
def test_the_end_of_a_turn_ends_what_is_written_and_exported(
    name: str, end: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    record = {"messages": CHAT[:3] if settings else CHAT}  # rollouts need no answer
    out = converted(tmp_path, name, record, **settings)
    export_plain(out, tmp_path / "exported")
    tokenizer = tokenizer_like(name)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_id != tokenizer.eos_token_id
    for directory in (out, tmp_path / "exported"):
        assert end_id in read_facts(directory).end_token_ids
        assert {tokenizer.eos_token_id, end_id} <= set(GenerationConfig.from_pretrained(directory).eos_token_id)
        assert {tokenizer.eos_token_id, end_id} <= set(end_token_ids(load_converted(directory)))


def test_ends_of_answers_come_with_conversations_and_stay_in_later_stages(tmp_path: Path) -> None:
    assert read_facts(converted(tmp_path, "qwen2.5", {"text": "the rain"})).end_token_ids == []
    chat = converted(tmp_path, "qwen2.5", {"messages": CHAT}, "chat")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the rain"}) + "\n")
    run(chat, tmp_path / "text.jsonl", tmp_path / "later", max_steps=1, max_length=64)
    assert read_facts(tmp_path / "later").end_token_ids == read_facts(chat).end_token_ids != []


def test_the_template_that_is_trained_with_is_saved_with_its_values(tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(TEMPLATES["qwen3"][0])
    given = {"chat_template": str(tmp_path / "other.jinja"), "chat_template_kwargs": {"enable_thinking": False}}
    out = converted(tmp_path, "qwen2.5", {"messages": CHAT[:2]}, **given)
    tokenizer = load_converted(out).tokenizer
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_an_answer_that_the_template_does_not_end_is_trained_to_end_with_eos() -> None:
    tokenizer = tokenizer_like("glm-4")
    encoded = encode({"origin": "a:1", "messages": CHAT}, tokenizer)
    rendered = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert encoded.ids.tolist() == [*rendered, tokenizer.eos_token_id]
    assert encoded.is_maskable[-1]
    ended = encode({"origin": "a:1", "messages": CHAT}, tokenizer_like("qwen2.5"))
    assert tokenizer.eos_token_id not in ended.ids
