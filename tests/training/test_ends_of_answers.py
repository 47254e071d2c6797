"""A model that is trained on conversations stops where its answers ended in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from decausal.data.encode import encode
from decausal.exchange.plain import export_plain
from decausal.models.checkpoint import load_converted
from decausal.models.facts import read_facts
from decausal.sampling.generate import end_token_ids
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import run

# As Qwen2.5's base model: documents end with EOS, turns with another token.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As GLM-4: a turn ends with the next role's token, the last one with nothing.
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHAT = [{"role": role, "content": "the rain"} for role in ("user", "assistant", "user", "assistant")]


def tokenizer_of(template: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name, special=True) for name in special]})
    tokenizer.chat_template = template
    return tokenizer


CHATML_TOKENS = (CHATML, "<|im_start|>", "<|im_end|>")
GLM_TOKENS = (GLM, "<|user|>", "<|assistant|>")


@pytest.mark.parametrize(("tokens", "end"), [(CHATML_TOKENS, "<|im_end|>"), (GLM_TOKENS, "<|user|>")])
def test_the_end_of_a_turn_ends_what_is_written_and_exported(tokens: tuple[str, ...], end: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(*tokens)
    FAMILIES["qwen3"](vocab_size=len(tokenizer) + 8).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    run(tmp_path / "source", tmp_path / "chat.jsonl", tmp_path / "out", max_steps=1, max_length=64)
    export_plain(tmp_path / "out", tmp_path / "exported")
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_id != tokenizer.eos_token_id
    for directory in (tmp_path / "out", tmp_path / "exported"):
        assert end_id in read_facts(directory).end_token_ids
        assert {tokenizer.eos_token_id, end_id} <= set(GenerationConfig.from_pretrained(directory).eos_token_id)
        assert {tokenizer.eos_token_id, end_id} <= set(end_token_ids(load_converted(directory)))


def test_an_answer_that_the_template_does_not_end_is_trained_to_end_with_eos() -> None:
    tokenizer = tokenizer_of(*GLM_TOKENS)
    encoded = encode({"origin": "a:1", "messages": CHAT}, tokenizer)
    rendered = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert encoded.ids.tolist() == [*rendered, tokenizer.eos_token_id]
    assert encoded.is_maskable[-1]
    ended = encode({"origin": "a:1", "messages": CHAT}, tokenizer_of(*CHATML_TOKENS))
    assert tokenizer.eos_token_id not in ended.ids
